//! Compares the service with its limits and with what it replaces: `make bench`.
//!
//! In reading order: `subject` (a program to measure), `ground` (stores, collector, databases),
//! `relay` (makes the stores far away), `load` (throughput; `lab`'s `paced` measures latency),
//! `round` (repeats measurements). `phase` has one file per section of the report, `chart` draws a
//! chart. `peer` has the programs that the service is compared with.

mod chart;
mod ground;
mod load;
mod peer;
mod phase;
mod relay;
mod round;
mod subject;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use clap::{Arg, ArgMatches, Command, value_parser};
use lab::machine;
use lab::report::{self, Section};

use crate::ground::Ground;
use crate::peer::Peer;
use crate::round::Effort;
use crate::subject::{Subject, Traces};

/// Prints progress to standard error.
macro_rules! progress {
    ($($text:tt)+) => { eprintln!("bench: {}", format_args!($($text)+)) };
}
use progress;

/// Explains the figures of measurements in rounds.
const METHOD: &str = "Each subject is measured once per round, in turn. Figures are medians of the rounds (lowest – \
     highest). Ratios are taken within a round, so that both sides saw the same speed of the machine. \
     Each measurement restarts the subject and warms it up. Afterwards, the number of another visit \
     is compared with `select count(*)`, and a difference ends the run. The median decides whether a \
     goal is met.";

/// The folder of the reports.
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
    let before = Arg::new("before")
        .long("before")
        .value_parser(value_parser!(PathBuf))
        .help("The service's program of another revision, to compare this one with");
    Command::new("bench")
        .about("Measure the service")
        .subcommand_required(true)
        .subcommand(
            Command::new("full")
                .about("Run all measurements and write report.md and throughput.svg")
                .arg(before.clone())
                .arg(number("rounds", "5", "Rounds of each comparison"))
                .arg(number("seconds", "6", "Seconds of each measurement"))
                .arg(number("large", "1000000", "Rows of the large table"))
                .arg(number("huge", "10000000", "Rows of the huge table")),
        )
        .subcommand(
            Command::new("quick")
                .about("Run the main measurements and print the results")
                .arg(before.clone())
                .arg(number("rounds", "3", "Rounds of each comparison"))
                .arg(number("seconds", "4", "Seconds of each measurement")),
        )
        .subcommand(
            Command::new("far")
                .about("Measure with stores a network away and print the results")
                .arg(before)
                .arg(number("rounds", "3", "Rounds of each comparison"))
                .arg(number("seconds", "4", "Seconds of each measurement")),
        )
        .subcommand(
            Command::new("scale")
                .about("Measure what slower commits allow, next to a model, and print the results")
                .arg(number("rounds", "3", "Rounds of each comparison"))
                .arg(number("seconds", "3", "Seconds of each measurement")),
        )
        .subcommand(
            Command::new("peers")
                .about("Compare with the peers, by connections, and print the results")
                .arg(number("rounds", "3", "Rounds of each comparison"))
                .arg(number("seconds", "4", "Seconds of each measurement")),
        )
        .subcommand(
            Command::new("soak")
                .about("Measure memory at the peak and write soak.md")
                .arg(number(
                    "seconds",
                    "600",
                    "Seconds of the run with scrapes; the run without takes twice as long",
                )),
        )
        .subcommand(
            Command::new("ceiling")
                .about("Serve a constant")
                .arg(address.clone()),
        )
        .subcommand(
            Command::new("textbook")
                .about("Serve the textbook version of a visit")
                .arg(address.clone()),
        )
        .subcommand(
            Command::new("relay")
                .about("Relay to two servers with a delay")
                .arg(
                    Arg::new("microseconds")
                        .required(true)
                        .value_parser(value_parser!(u64))
                        .help("Delay in each direction"),
                )
                .arg(
                    address
                        .num_args(4)
                        .help("Two addresses to listen on, and those of their servers"),
                ),
        )
}

fn run(matches: &ArgMatches) -> Result<()> {
    let (name, matches) = matches.subcommand().context("no subcommand")?;
    let addresses = || -> Vec<SocketAddr> {
        let addresses = matches.get_many("address");
        addresses
            .expect("the argument is required")
            .copied()
            .collect()
    };
    let number = |name: &str| {
        *matches
            .get_one::<u64>(name)
            .expect("the option has a default or is required")
    };
    match name {
        "ceiling" => return peer::ceiling(addresses()[0]),
        "textbook" => return peer::textbook(addresses()[0]),
        "relay" => {
            let [one, other, server, other_server] = addresses()[..] else {
                bail!("not four addresses");
            };
            let delay = Duration::from_micros(number("microseconds"));
            return relay::run(delay, [(one, server), (other, other_server)]);
        }
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
    match name {
        "peers" => return peers(effort),
        "scale" => return scale(effort),
        _ => {}
    }
    let before = matches.get_one::<PathBuf>("before").cloned();
    match name {
        "full" => full(effort, [0, number("large"), number("huge")], before),
        "far" => far(effort, before),
        _ => quick(effort, before),
    }
}

fn full(effort: Effort, sizes: [u64; 3], before: Option<PathBuf>) -> Result<()> {
    // A goal that is far from met or missed, or none, needs fewer rounds.
    let fewer = Effort {
        rounds: effort.rounds.min(3),
        ..effort
    };
    // Sections with dozens of cases have shorter measurements, too.
    let brief = Effort {
        warmup: effort.warmup.min(Duration::from_secs(1)),
        duration: effort.duration.min(Duration::from_secs(4)),
        ..fewer
    };
    let peers: Vec<_> = peer::FAST.into_iter().chain([Peer::Flask]).collect();
    let mut ground = Ground::start(&peers, before)?;
    let ground = &mut ground;
    let subjects = [
        Subject::Ceiling,
        Subject::Visitas(Traces::Off),
        Subject::Visitas(Traces::Hundredth),
        Subject::Visitas(Traces::All),
        Subject::Visitas(Traces::Nowhere),
        Subject::Textbook,
        Subject::Peer(Peer::Flask),
    ];
    let throughput = phase::throughput(ground, &subjects, effort)?;
    let processors = phase::processors(ground, effort)?;
    let lone = phase::lone(ground, effort)?;
    let lone_visit = phase::lone_visit(ground, fewer)?;
    let paced = phase::paced(ground, effort)?;
    let footprint = phase::footprint(ground)?;
    let connections = phase::connections(ground, brief)?;
    let far = phase::far(ground, brief)?;
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
    let (rows, chart) = phase::rows(ground, sizes, fewer)?;
    std::fs::write(Path::new(FOLDER).join("throughput.svg"), chart)?;
    let sections = [
        throughput,
        processors,
        rows,
        lone,
        lone_visit,
        paced,
        connections,
        far,
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

fn far(effort: Effort, before: Option<PathBuf>) -> Result<()> {
    let mut ground = Ground::start(&[], before)?;
    let section = phase::far(&mut ground, effort)?;
    let method = in_rounds(effort);
    publish(&ground, "make bench-far", &method, &[section], None)
}

fn peers(effort: Effort) -> Result<()> {
    let mut ground = Ground::start(&peer::FAST, None)?;
    let section = phase::connections(&mut ground, effort)?;
    let method = in_rounds(effort);
    publish(&ground, "make bench-peers", &method, &[section], None)
}

fn scale(effort: Effort) -> Result<()> {
    let mut ground = Ground::start(&[], None)?;
    let section = phase::scale(&mut ground, effort)?;
    let method = in_rounds(effort);
    publish(&ground, "make bench-scale", &method, &[section], None)
}

fn quick(effort: Effort, before: Option<PathBuf>) -> Result<()> {
    let mut ground = Ground::start(&[], before)?;
    let ground = &mut ground;
    let subjects = [
        Subject::Ceiling,
        Subject::Visitas(Traces::Hundredth),
        Subject::Visitas(Traces::All),
        Subject::Textbook,
    ];
    let throughput = phase::throughput(ground, &subjects, effort)?;
    let lone = phase::lone(ground, effort)?;
    let far = phase::far_quick(ground, effort)?;
    publish(
        ground,
        "make bench-quick",
        &in_rounds(effort),
        &[throughput, lone, far],
        None,
    )
}

fn soak(duration: Duration) -> Result<()> {
    let mut ground = Ground::start(&[], None)?;
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
    let introduction = machine::describe(&ground.postgres, command, &load::describe()?)? + method;
    let document = report::document("Measurements", &introduction, sections);
    print!("{document}");
    if let Some(file) = file {
        std::fs::write(Path::new(FOLDER).join(file), document)?;
        progress!("written to bench/{file}");
    }
    Ok(())
}
