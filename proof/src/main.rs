//! The command line of proof.

use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::{Arg, ArgAction, ArgMatches, Command};
use proof::isolate::{self, Needs};
use proof::powercut::{self, Cuts};

/// What a disk whose power can be cut needs.
const POWERCUT: Needs = Needs {
    programs: &[("mkfs.xfs", "xfsprogs"), ("mkfs.ext4", "e2fsprogs")],
    loops: true,
    network: false,
};

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
}

fn run(matches: &ArgMatches) -> Result<bool> {
    let is_inside = matches.get_flag("inside");
    let (name, matches) = matches.subcommand().context("no subcommand")?;
    let needs = POWERCUT;
    if !is_inside {
        if let Some(why) = isolate::skip_reason(needs) {
            println!("proof {name}: SKIPPED: {why}");
            return Ok(true);
        }
        return isolate::run(needs.network);
    }
    let plan = matches.get_one::<String>("plan").context("a default")?;
    power_cuts(plan)
}

fn power_cuts(plan: &str) -> Result<bool> {
    let series = match plan {
        "quick" => powercut::QUICK,
        "long" => powercut::LONG,
        _ => powercut::WHOLE,
    };
    let all = powercut::run(series, |cuts: &Cuts| eprintln!("proof: {}", cuts.line()))?;
    let (table, is_as_wanted) = powercut::report(&all);
    print!("{table}");
    Ok(is_as_wanted)
}
