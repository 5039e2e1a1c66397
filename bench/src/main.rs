//! Measures the service beside what limits it and what it replaces: `make bench`.
//!
//! In reading order: `subject` (what is measured) on its `ground` (stores, collector, databases),
//! by `load` (throughput) and `lab`'s `paced` (latency), in rounds (`round`). `phase` has the
//! questions, `chart` draws the answers. `peer` and `flask` are what the service is measured
//! beside.

mod chart;
mod flask;
mod ground;
mod load;
mod peer;
mod phase;
mod round;
mod subject;

use std::net::SocketAddr;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::{Arg, ArgMatches, Command, value_parser};
use lab::machine;
use lab::report::{self, Section};

use crate::ground::Ground;
use crate::round::Effort;
use crate::subject::{Subject, Traces};

/// Says on standard error how far it has come.
macro_rules! progress {
    ($($text:tt)+) => { eprintln!("bench: {}", format_args!($($text)+)) };
}
use progress;

/// How to read what was measured in rounds.
const METHOD: &str = "In each round every subject is measured once, in turn; figures are medians of the rounds (lowest \
     – highest), and ratios are taken within a round, so that the machine's own ups and downs meet \
     both sides. Each measurement starts the subject anew and warms it up; after it the service's \
     number is compared with `select count(*)`, and a difference ends the run. Goals are met or not \
     by the median.";

/// Where reports are kept.
const FOLDER: &str = env!("CARGO_MANIFEST_DIR");

fn main() -> ExitCode {
    let matches = command().get_matches();
    match run(&matches) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn command() -> Command {
    let number = |name: &'static str, default: &'static str, help: &'static str| {
        Arg::new(name)
            .long(name)
            .default_value(default)
            .value_parser(value_parser!(u64).range(1..))
            .help(help)
    };
    let address = Arg::new("address")
        .required(true)
        .value_parser(value_parser!(SocketAddr));
    Command::new("bench")
        .about("Measures the service")
        .subcommand_required(true)
        .subcommand(
            Command::new("full")
                .about("Asks every question and writes report.md and throughput.svg")
                .arg(number("rounds", "5", "Rounds of each comparison"))
                .arg(number("seconds", "6", "Seconds of each measurement"))
                .arg(number("large", "1000000", "Rows of the large table"))
                .arg(number("huge", "10000000", "Rows of the huge table")),
        )
        .subcommand(
            Command::new("quick")
                .about("Asks the main questions and prints the answers")
                .arg(number("rounds", "3", "Rounds of each comparison"))
                .arg(number("seconds", "4", "Seconds of each measurement")),
        )
        .subcommand(
            Command::new("soak")
                .about("Watches memory at the peak and writes soak.md")
                .arg(number(
                    "seconds",
                    "600",
                    "Seconds of the run that is scraped; the other takes twice as long",
                )),
        )
        .subcommand(
            Command::new("ceiling")
                .about("Serves a constant")
                .arg(address.clone()),
        )
        .subcommand(
            Command::new("textbook")
                .about("Serves visits as they are written first")
                .arg(address)
                .arg(Arg::new("database").required(true))
                .arg(Arg::new("redis").required(true)),
        )
}

fn run(matches: &ArgMatches) -> Result<()> {
    let (name, matches) = matches.subcommand().context("no subcommand")?;
    let text = |name: &str| {
        matches
            .get_one::<String>(name)
            .context("an argument is missing")
    };
    let address = || {
        matches
            .get_one::<SocketAddr>("address")
            .context("no address")
    };
    let number = |name: &str| *matches.get_one::<u64>(name).expect("it has a default");
    match name {
        "ceiling" => return peer::ceiling(*address()?),
        "textbook" => return peer::textbook(*address()?, text("database")?, text("redis")?),
        _ if !machine::confine() => {
            progress!("taskset does not work: everything uses all processors");
        }
        _ => {}
    }
    let seconds = Duration::from_secs(number("seconds"));
    if name == "soak" {
        return soak(seconds);
    }
    let rounds = usize::try_from(number("rounds"))?;
    let effort = Effort {
        rounds,
        warmup: Duration::from_secs(if name == "full" { 2 } else { 1 }).min(seconds),
        duration: seconds,
    };
    if name == "full" {
        full(effort, [0, number("large"), number("huge")])
    } else {
        quick(effort)
    }
}

fn full(effort: Effort, sizes: [u64; 3]) -> Result<()> {
    // What no goal depends on needs no five rounds.
    let fewer = Effort {
        rounds: effort.rounds.min(3),
        ..effort
    };
    let mut ground = Ground::start(true)?;
    let ground = &mut ground;
    let subjects = [
        Subject::Ceiling,
        Subject::Visitas(Traces::Off),
        Subject::Visitas(Traces::Hundredth),
        Subject::Visitas(Traces::All),
        Subject::Visitas(Traces::Nowhere),
        Subject::Textbook,
        Subject::Flask,
    ];
    let throughput = phase::throughput(ground, &subjects, effort)?;
    let processors = phase::processors(ground, effort)?;
    let lone = phase::lone(ground, effort)?;
    let lone_visit = phase::lone_visit(ground, fewer)?;
    let paced = phase::paced(ground, effort)?;
    let footprint = phase::footprint(ground)?;
    let connections = phase::connections(ground, fewer)?;
    let replicas = phase::replicas(ground, effort)?;
    let outage = phase::outage(ground, fewer)?;
    let snapshot = phase::snapshot(
        ground,
        Effort {
            duration: effort.duration * 2,
            ..effort
        },
    )?;
    let limits = phase::limits(ground, fewer)?;
    let (rows, chart) = phase::rows(ground, sizes, effort)?;
    std::fs::write(Path::new(FOLDER).join("throughput.svg"), chart)?;
    let sections = [
        throughput,
        processors,
        rows,
        lone,
        lone_visit,
        paced,
        connections,
        replicas,
        outage,
        snapshot,
        footprint,
        limits,
    ];
    publish(
        ground,
        "make bench",
        &in_rounds(effort),
        &sections,
        Some("report.md"),
    )
}

fn quick(effort: Effort) -> Result<()> {
    let mut ground = Ground::start(false)?;
    let ground = &mut ground;
    let subjects = [
        Subject::Ceiling,
        Subject::Visitas(Traces::Hundredth),
        Subject::Visitas(Traces::All),
        Subject::Textbook,
    ];
    let throughput = phase::throughput(ground, &subjects, effort)?;
    let lone = phase::lone(ground, effort)?;
    publish(
        ground,
        "make bench-quick",
        &in_rounds(effort),
        &[throughput, lone],
        None,
    )
}

fn soak(duration: Duration) -> Result<()> {
    let mut ground = Ground::start(false)?;
    let section = phase::soak(&mut ground, duration)?;
    publish(&ground, "make bench-soak", "", &[section], Some("soak.md"))
}

fn in_rounds(effort: Effort) -> String {
    let Effort {
        rounds, duration, ..
    } = effort;
    let seconds = duration.as_secs();
    format!("\nUp to {rounds} rounds of {seconds} s each. {METHOD}\n")
}

fn publish(
    ground: &Ground,
    command: &str,
    method: &str,
    sections: &[Section],
    file: Option<&str>,
) -> Result<()> {
    let head = machine::describe(&ground.postgres, command, &load::describe()?)? + method;
    let document = report::document("What was measured", &head, sections);
    print!("{document}");
    if let Some(file) = file {
        std::fs::write(Path::new(FOLDER).join(file), document)?;
        progress!("written to bench/{file}");
    }
    Ok(())
}
