//! The command line of proof.

use std::fs;
use std::io;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::{Arg, ArgAction, ArgMatches, Command, value_parser};
use lab::report::with_section;
use proof::compare::{self, Design, Finding};
use proof::isolate::{self, Needs};
use proof::powercut::{self, Cuts};
use proof::{cluster, document, failover, order};

/// What a disk whose power can be cut needs.
const POWERCUT: Needs = Needs {
    programs: &[("mkfs.xfs", "xfsprogs"), ("mkfs.ext4", "e2fsprogs")],
    loops: true,
    network: false,
};

/// What three machines with Patroni need.
const MACHINES: Needs = Needs {
    programs: &[
        ("etcd", "etcd-server"),
        ("haproxy", "haproxy"),
        ("curl", "curl"),
        ("ip", "iproute2"),
    ],
    loops: false,
    network: true,
};

/// The folder of the reports.
const DOCS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs");

/// How long the visits of `order` can take.
const ORDER_LIMIT: Duration = Duration::from_hours(2);

fn main() -> ExitCode {
    let matches = command().get_matches();
    match run(&matches) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("proof: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn command() -> Command {
    let inside = Arg::new("inside")
        .long("inside")
        .action(ArgAction::SetTrue)
        .global(true)
        .hide(true);
    Command::new("proof")
        .about("Cuts the power and loses machines. Exit status 1: something is not as promised")
        .subcommand_required(true)
        .arg(inside)
        .subcommand(
            Command::new("powercut")
                .about("Cut the power of the database's machine")
                .arg(
                    Arg::new("plan")
                        .value_parser(["quick", "whole", "long"])
                        .default_value("whole")
                        .help(
                            "quick: three cuts and a control. long: a hundred, into docs/kills.md",
                        ),
                ),
        )
        .subcommand(Command::new("compose").about(
            "Write the table of tests/powercut-compose.sh, from standard input, into docs/kills.md",
        ))
        .subcommand(
            Command::new("compare")
                .about("Hold other counters to the same test, and write docs/proof.md")
                .arg(
                    Arg::new("only")
                        .long("only")
                        .help("Test only the counters whose name contains this; writes nothing"),
                ),
        )
        .subcommand(
            Command::new("failover").about(
                "Lose the machine of the database's leader, and write it into docs/kills.md",
            ),
        )
        .subcommand(
            Command::new("order")
                .about(
                    "Visit through kills, restarts and a failover, and write it into docs/kills.md",
                )
                .arg(
                    Arg::new("visits")
                        .default_value("10000000")
                        .value_parser(value_parser!(u64).range(1000..=100_000_000))
                        .help("How many; fewer than ten million write nothing"),
                ),
        )
}

fn run(matches: &ArgMatches) -> Result<bool> {
    let is_inside = matches.get_flag("inside");
    let (name, matches) = matches.subcommand().context("no subcommand")?;
    if name == "compose" {
        let table = io::read_to_string(io::stdin())?;
        write_section("Power cuts of Compose", &document::compose(&table)?)?;
        return Ok(true);
    }
    let needs_machines = matches!(name, "failover" | "order");
    let needs = if needs_machines { MACHINES } else { POWERCUT };
    if !is_inside {
        let mut why = isolate::skip_reason(needs);
        if needs_machines && why.is_none() {
            // From inside, nothing can be reached.
            why = cluster::prepare().err().map(|error| format!("{error:#}"));
        }
        if let Some(why) = why {
            println!("proof {name}: SKIPPED: {why}");
            return Ok(true);
        }
        return isolate::run(needs.network);
    }
    match name {
        "compare" => compare(matches.get_one::<String>("only").map(String::as_str)),
        "failover" => lose_machines(),
        "order" => keep_order(*matches.get_one::<u64>("visits").context("a default")?),
        _ => cut_power(matches.get_one::<String>("plan").context("a default")?),
    }
}

fn cut_power(plan: &str) -> Result<bool> {
    let series = match plan {
        "quick" => powercut::QUICK,
        "long" => powercut::LONG,
        _ => powercut::WHOLE,
    };
    let all = powercut::run(series, |cuts: &Cuts| eprintln!("proof: {}", cuts.line()))?;
    let (table, is_as_wanted) = powercut::report(&all);
    print!("{table}");
    if plan == "long" {
        write_section("Power cuts", &document::power_cuts(&table)?)?;
    }
    Ok(is_as_wanted)
}

fn lose_machines() -> Result<bool> {
    let findings = failover::run(|finding| eprintln!("proof: {finding:?}"))?;
    let table = failover::report(&findings);
    print!("{table}");
    write_section("Lost machines", &document::lost_machines(&table)?)?;
    Ok(findings.iter().all(failover::Finding::is_as_wanted))
}

fn keep_order(visits: u64) -> Result<bool> {
    let finding = order::run(usize::try_from(visits)?, ORDER_LIMIT)?;
    let text = finding.text();
    print!("{text}");
    if visits >= 10_000_000 {
        write_section("Order", &document::order(&text)?)?;
    }
    Ok(finding.is_as_wanted())
}

/// Writes a section of docs/kills.md.
fn write_section(title: &str, text: &str) -> Result<()> {
    let file = Path::new(DOCS).join("kills.md");
    let before = fs::read_to_string(&file)?;
    fs::write(file, with_section(&before, title, text))?;
    eprintln!("proof: written to docs/kills.md");
    Ok(())
}

fn compare(only: Option<&str>) -> Result<bool> {
    let is_wanted = |design: &Design| only.is_none_or(|only| design.to_string().contains(only));
    let mut findings = Vec::new();
    let mut skipped = Vec::new();
    for design in compare::ALL.into_iter().filter(is_wanted) {
        if let Err(why) = design.prepare() {
            println!("proof: {design}: SKIPPED: {why:#}");
            skipped.push(format!("{design}: {why:#}"));
            continue;
        }
        let finding = compare::test(design).with_context(|| design.to_string())?;
        eprintln!("proof: {finding:?}");
        findings.push(finding);
    }
    let table = compare::report(&findings);
    print!("{table}");
    if only.is_none() && skipped.is_empty() {
        fs::write(Path::new(DOCS).join("proof.md"), document::proof(&table)?)?;
        eprintln!("proof: written to docs/proof.md");
    }
    let unexpected = findings.iter().filter(|finding| !finding.is_as_known());
    for finding in unexpected {
        println!("\n{}: not as it is known to be", finding.design);
    }
    Ok(findings.iter().all(Finding::is_as_known))
}
