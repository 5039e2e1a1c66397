//! The command line of chaos.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use chaos::fault;
use chaos::report::{self, Tried};
use chaos::trial::Effort;
use clap::{Arg, ArgMatches, Command, value_parser};
use lab::machine;
use lab::report::{Section, document};

/// A report that is kept.
struct Kept {
    /// Its name in `docs`.
    file: &'static str,
    /// What writes it.
    command: &'static str,
}

const FAULTS: Kept = Kept {
    file: "faults.md",
    command: "make chaos",
};
const KILLS: Kept = Kept {
    file: "kills.md",
    command: "make chaos-long",
};

/// Where they are kept.
const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs");

/// How to read it.
const METHOD: &str = "\nSixteen clients visit all the time, each of them a random one of two replicas (three where \
     a process is killed, five where five start at once), and write down what they are told; at the end every \
     number that was acknowledged is looked for in the table, in a row of its own whose moment lies \
     between the visit's beginning and its answer. *Duplicated* are numbers that were told twice (in Redis, \
     within one of its lives), and numbers and rows that no visit explains. *Out of order* are visits that were \
     sent after a visit with the same or a higher number had been answered, in either store. A visit is *in doubt* \
     if its client got no answer, or one that says so. *First error* is from the fault's beginning; *recovery* from \
     the moment when what was broken works again, as seen without the service, until every replica has made a visit \
     that both stores have counted (for connections that fall silent, which the service has to get over by \
     itself, from the beginning); where several times are given it is their median (lowest – \
     highest). A fault of which there is no evidence that it took effect is itself a violation. Then one replica is \
     asked to stop in the midst of the same fault, or while it starts where that is what the fault is about: *stop* \
     is how long that took, and *start* from when it was started again, with all of it working, to the first good \
     visit. A client that connects just as a listener closes waits a second, until TCP repeats its SYN: that is left \
     out of the longest waits. *Slowest sync* and *latest wake* are what the machine itself kept waiting: a thread that \
     did nothing else wrote 8 KiB to the same disk every 10 ms, and this is the longest that it waited until they were \
     synced, and until it ran after it was due.\n";

/// Long enough for every deadline to have passed several times.
const HOLD: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_secs(30);
const AFTERMATH: Duration = Duration::from_millis(2500);
/// So that a batch is in flight at almost any moment, and the machine has time for the fault.
const VISIT_PAUSE: Duration = Duration::from_millis(1);
const STEP: Duration = Duration::from_secs(5);
const HOSTILE_ROUNDS: usize = 3;
const HOSTILE_STEP: Duration = Duration::from_secs(3);
const IDLE_CONNECTIONS: usize = 10_000;
const FACTORS: [f64; 3] = [2.0, 5.0, 10.0];

fn main() -> ExitCode {
    let matches = command().get_matches();
    match run(&matches) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("chaos: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn command() -> Command {
    let number = |name: &'static str, default: &'static str, help: &'static str| {
        Arg::new(name)
            .long(name)
            .default_value(default)
            .value_parser(value_parser!(u64).range(1..=1000))
            .help(help)
    };
    let only = Arg::new("only")
        .long("only")
        .help("Nothing but the faults whose name contains this; writes no report");
    Command::new("chaos")
        .about("Breaks what the service stands on. Exit status 1: a goal is not met")
        .subcommand_required(true)
        .subcommand(
            Command::new("all")
                .about("Tries everything and writes docs/faults.md")
                .arg(number(
                    "repeat",
                    "1",
                    "How often a fault that lasts strikes",
                ))
                .arg(number("kills", "10", "How often a kill strikes"))
                .arg(only.clone()),
        )
        .subcommand(
            Command::new("short")
                .about("Tries each fault once, shortened, and prints what came of it")
                .arg(only),
        )
        .subcommand(Command::new("overload").about("Overloads it and prints what came of it"))
        .subcommand(Command::new("hostile").about("Attacks it and prints what came of it"))
        .subcommand(Command::new("bounds").about("Prints what it takes"))
        .subcommand(
            Command::new("rolling")
                .about("Restarts replicas in turn and prints what came of it")
                .arg(number("restarts", "100", "How often")),
        )
        .subcommand(
            Command::new("long")
                .about(
                    "Kills each part at random moments, restarts replicas and writes docs/kills.md",
                )
                .arg(number("kills", "100", "How often, and how many restarts")),
        )
        .subcommand(Command::new("list").about("Names the faults"))
}

fn run(matches: &ArgMatches) -> Result<bool> {
    let (name, matches) = matches.subcommand().context("no subcommand")?;
    let number = |name: &str| -> Result<usize> {
        let number = matches.get_one::<u64>(name).context("it has a default")?;
        Ok(usize::try_from(*number)?)
    };
    match name {
        "all" => {
            let effort = Effort {
                repetitions: number("repeat")?,
                kills: number("kills")?,
                hold: HOLD,
                pause: PAUSE,
                aftermath: AFTERMATH,
                stop: true,
                at_once: 1,
                visit_pause: VISIT_PAUSE,
            };
            let only = matches.get_one::<String>("only").map(String::as_str);
            let tried = faults(only, effort)?;
            let mut sections = vec![report::faults(&tried)];
            if only.is_some() {
                return publish(&sections, None);
            }
            sections.extend([overload()?, hostile()?, bounds()?]);
            publish(&sections, Some(&FAULTS))
        }
        "short" => {
            let only = matches.get_one::<String>("only").map(String::as_str);
            publish(&[report::faults(&faults(only, chaos::SHORT)?)], None)
        }
        "overload" => publish(&[overload()?], None),
        "hostile" => publish(&[hostile()?], None),
        "bounds" => publish(&[bounds()?], None),
        "rolling" => publish(&[rolling(number("restarts")?)?], None),
        "long" => {
            let effort = Effort {
                kills: number("kills")?,
                at_once: 1,
                visit_pause: VISIT_PAUSE,
                ..chaos::SHORT
            };
            let killed = report::faults(&faults(Some("killed"), effort)?);
            publish(&[killed, rolling(number("kills")?)?], Some(&KILLS))
        }
        _ => {
            for fault in fault::ALL {
                println!("{}", fault.name);
            }
            Ok(true)
        }
    }
}

fn faults(only: Option<&str>, effort: Effort) -> Result<Vec<Tried>> {
    let tried = chaos::faults(only, effort, |tried| match tried {
        Tried::Skipped(name, why) => eprintln!("chaos: {name}: SKIPPED: {why}"),
        Tried::Failed(name, why) => eprintln!("chaos: {name}: could not be tried: {why}"),
        Tried::Ran(trial) => {
            let verdict = trial.verdict;
            eprintln!(
                "chaos: {}: {} acknowledged, {} lost, {} duplicated, {} out of order, {} in doubt, \
                 recovery {:?}",
                trial.fault.name,
                verdict.recorded,
                verdict.lost,
                verdict.duplicated(),
                verdict.out_of_order(),
                verdict.in_doubt,
                trial.recoveries
            );
            for complaint in &trial.complaints {
                eprintln!("chaos: {}: {complaint}", trial.fault.name);
            }
        }
    });
    ensure!(!tried.is_empty(), "no fault has such a name");
    Ok(tried)
}

fn overload() -> Result<Section> {
    eprintln!("chaos: overload");
    Ok(report::overload(&chaos::overload::run(&FACTORS, STEP)?))
}

fn hostile() -> Result<Section> {
    eprintln!("chaos: hostile clients");
    let hostile = chaos::hostile::run(HOSTILE_ROUNDS, HOSTILE_STEP, IDLE_CONNECTIONS)?;
    Ok(report::hostile(&hostile))
}

fn bounds() -> Result<Section> {
    eprintln!("chaos: bounds");
    Ok(report::bounds(&chaos::bounds::run()?))
}

fn rolling(restarts: usize) -> Result<Section> {
    eprintln!("chaos: rolling restarts");
    let rolled = chaos::rolling::run(restarts)?;
    Ok(chaos::rolling::section(restarts, &rolled))
}

/// Prints and writes, and says whether all goals are met.
fn publish(sections: &[Section], kept: Option<&Kept>) -> Result<bool> {
    let mut head = String::new();
    if let Some(Kept { command, .. }) = kept {
        let postgres = devstack::Postgres::start(devstack::PostgresOptions::default())?;
        let load = "sixteen clients of this program";
        head = machine::describe(&postgres, command, load)? + METHOD;
    }
    let document = document("What was broken", &head, sections);
    print!("{document}");
    if let Some(Kept { file, .. }) = kept {
        std::fs::create_dir_all(FOLDER)?;
        std::fs::write(Path::new(FOLDER).join(file), &document)?;
        eprintln!("chaos: written to docs/{file}");
    }
    let mut goals = sections.iter().flat_map(|section| &section.goals);
    Ok(goals.all(lab::report::Goal::is_met))
}
