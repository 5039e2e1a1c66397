//! The command line of chaos.

use std::net::SocketAddr;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use chaos::fault;
use chaos::report::{self, FaultResult};
use chaos::trial::Effort;
use clap::{Arg, ArgMatches, Command, value_parser};
use lab::machine;
use lab::report::{Section, document, section, with_section};

/// A report that is written to a file.
struct ReportFile {
    /// The file's name in `docs`.
    file: &'static str,
    /// The command that writes it.
    command: &'static str,
}

const FAULTS: ReportFile = ReportFile {
    file: "faults.md",
    command: "make chaos",
};
const KILLS: ReportFile = ReportFile {
    file: "kills.md",
    command: "make chaos-long",
};

/// The sections of docs/kills.md that `proof` writes.
const OF_PROOF: [&str; 4] = [
    "Power cuts",
    "Power cuts of Compose",
    "Lost machines",
    "Order",
];

/// The folder of the reports.
const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs");

/// Explains the columns.
const METHOD: &str = "
Sixteen clients visit all the time. Each visit goes to a random one of two replicas (three where a \
process is killed, five where five start at once). The clients record every response. At the end, \
every acknowledged number must have its own row in the table, with a time between the visit's start \
and its response. The columns:

- *duplicated*: numbers that more than one visit got (in Redis, between two restarts), and numbers and \
rows that no visit explains.
- *out of order*: visits sent after a visit with the same or a higher number had a response, in either \
store.
- *in doubt*: visits whose client got no response, or a response that says so.
- *first error*: time from the start of the fault to the first harmed visit.
- *recovery*: time from when the broken part works again, observed without the service, until every \
replica has made a visit that both stores have counted. If open connections fall silent, the service \
must recover by itself, so the time runs from the start of the fault.
- *longest acknowledged*, *longest response*: the longest acknowledged visit and the longest response. \
A client that connects just as a listener closes waits a second until TCP repeats its SYN; both \
columns leave that out, and the time in which the test suspended the replicas.
- *stop*: one replica is stopped during the same fault, or during the start if the fault concerns the \
start. This is the time until it has exited.
- *start*: time from its restart, with everything working, to its first complete visit.
- *slowest sync*, *latest wake*: the machine's own delays. A thread that does nothing else writes 8 KiB \
to the same disk every 10 ms. These are the longest sync, and the longest delay until the sleeping \
thread ran.

Several times are shown as median (lowest – highest). A fault without evidence that it took effect \
counts as a violation. A *complete* visit is recorded in PostgreSQL and counted in Redis.
";

/// Long enough for every timeout to expire several times.
const HOLD: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_secs(30);
const AFTERMATH: Duration = Duration::from_millis(2500);
/// A batch is in flight almost always, and the fault still gets processor time.
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
        .help("Test only faults whose name contains this; writes no report");
    Command::new("chaos")
        .about("Tests the service under faults, overload and attacks. Exit status 1: a goal is not met")
        .subcommand_required(true)
        .subcommand(
            Command::new("all")
                .about("Run all tests and write docs/faults.md")
                .arg(number(
                    "repeat",
                    "1",
                    "Repetitions of each fault that lasts",
                ))
                .arg(number("kills", "10", "Repetitions of each kill"))
                .arg(only.clone()),
        )
        .subcommand(
            Command::new("short")
                .about("Test each fault once, shortened, and print the results")
                .arg(only),
        )
        .subcommand(Command::new("overload").about("Overload the service and print the results"))
        .subcommand(Command::new("hostile").about("Attack the service and print the results"))
        .subcommand(Command::new("bounds").about("Measure the resource use and print it"))
        .subcommand(
            Command::new("rolling")
                .about("Restart replicas in turn and print the results")
                .arg(number("restarts", "100", "Number of restarts")),
        )
        .subcommand(
            Command::new("long")
                .about(
                    "Kill each part at random times, restart replicas and write docs/kills.md",
                )
                .arg(number("kills", "100", "Repetitions of each kill, and number of restarts")),
        )
        .subcommand(Command::new("list").about("List the faults"))
        .subcommand(
            Command::new("visit")
                .about(
                    "Visit a running service until standard input ends, and judge the responses. \
                     A line CUT OFF of the input, in microseconds since 1970, is a power cut",
                )
                .arg(
                    Arg::new("address")
                        .required(true)
                        .value_parser(value_parser!(SocketAddr)),
                )
                .arg(number(
                    "pause",
                    "10",
                    "Milliseconds between two visits of a client",
                ))
                .arg(
                    Arg::new("rows")
                        .required(true)
                        .num_args(1..)
                        .last(true)
                        .help("Command that prints the time of each row in the order of the ids"),
                ),
        )
}

fn run(matches: &ArgMatches) -> Result<bool> {
    let (name, matches) = matches.subcommand().context("no subcommand")?;
    let number = |name: &str| -> Result<usize> {
        let number = matches
            .get_one::<u64>(name)
            .context("the option has a default")?;
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
            let results = faults(only, effort)?;
            let mut sections = vec![report::faults(&results)];
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
            let kills = report::faults(&faults(Some("killed"), effort)?);
            publish(&[kills, rolling(number("kills")?)?], Some(&KILLS))
        }
        "visit" => {
            let address = matches.get_one("address").context("required")?;
            let rows: Vec<_> = matches
                .get_many::<String>("rows")
                .context("required")?
                .map(String::as_str)
                .collect();
            let pause = Duration::from_millis(u64::try_from(number("pause")?)?);
            let visited = chaos::visit::run(*address, pause, &rows)?;
            println!("{}", visited.line());
            Ok(visited.is_exact())
        }
        _ => {
            for fault in fault::ALL {
                println!("{}", fault.name);
            }
            Ok(true)
        }
    }
}

fn faults(only: Option<&str>, effort: Effort) -> Result<Vec<FaultResult>> {
    let results = chaos::faults(only, effort, |result| match result {
        FaultResult::Skipped(name, why) => eprintln!("chaos: {name}: SKIPPED: {why}"),
        FaultResult::Failed(name, why) => eprintln!("chaos: {name}: could not be tested: {why}"),
        FaultResult::Completed(trial) => {
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
            for violation in &trial.violations {
                eprintln!("chaos: {}: {violation}", trial.fault.name);
            }
        }
    });
    ensure!(!results.is_empty(), "no fault's name contains this");
    Ok(results)
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
    let results = chaos::rolling::run(restarts)?;
    Ok(chaos::rolling::section(restarts, &results))
}

/// Prints the report, writes it to its file, and returns whether all goals are met.
fn publish(sections: &[Section], file: Option<&ReportFile>) -> Result<bool> {
    let mut introduction = String::new();
    if let Some(ReportFile { command, .. }) = file {
        let postgres = devstack::Postgres::start(devstack::PostgresOptions::default())?;
        let load = "sixteen clients of this program";
        introduction = machine::describe(&postgres, command, load)? + METHOD;
    }
    let mut document = document("Fault tests", &introduction, sections);
    print!("{document}");
    if let Some(ReportFile { file, .. }) = file {
        std::fs::create_dir_all(FOLDER)?;
        let path = Path::new(FOLDER).join(file);
        let before = std::fs::read_to_string(&path).unwrap_or_default();
        for title in OF_PROOF {
            if let Some((_, text)) = section(&before, title).and_then(|kept| kept.split_once('\n'))
            {
                document = with_section(&document, title, text.trim());
            }
        }
        std::fs::write(path, &document)?;
        eprintln!("chaos: written to docs/{file}");
    }
    let mut goals = sections.iter().flat_map(|section| &section.goals);
    Ok(goals.all(lab::report::Goal::is_met))
}
