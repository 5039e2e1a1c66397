//! The command line of devstack.

use std::ffi::OsString;
use std::process::ExitCode;

const USAGE: &str = "\
usage: devstack run -- COMMAND [ARGUMENT...]   run a command with PostgreSQL and Redis up
       devstack check                          show which PostgreSQL and Redis would be used
       devstack folder                         show where the servers keep their files";

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    let words: Vec<_> = arguments
        .iter()
        .map(|argument| argument.to_str().unwrap_or_default())
        .collect();
    let outcome = match *words {
        ["check"] => devstack::check().map(|found| {
            println!("{found}");
            0
        }),
        ["folder"] => devstack::folder().map(|folder| {
            println!("{}", folder.display());
            0
        }),
        ["run", "--", _, ..] => devstack::run(&arguments[2..]),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match outcome {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("devstack: {error:#}");
            ExitCode::FAILURE
        }
    }
}
