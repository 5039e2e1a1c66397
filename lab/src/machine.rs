//! The machine of a measurement: its processors, and the versions of the software.

use std::fmt::Write as _;
use std::process::Command;

use anyhow::{Result, ensure};
use devstack::Postgres;

use crate::measure::grouped;
use crate::program::visitas;

/// The number of processors that load, subject and stores share, on every machine.
const PROCESSORS: usize = 2;

/// Confines this process, and with it every process that it starts, to the first two processors.
/// Must be called before other threads start. Returns whether the limit holds now; the report shows
/// the number of processors.
pub fn confine() -> bool {
    let Some(allowed) = allowed() else {
        return false;
    };
    if allowed.len() <= PROCESSORS {
        return true;
    }
    let list: Vec<_> = allowed[..PROCESSORS]
        .iter()
        .map(ToString::to_string)
        .collect();
    let confined = Command::new("taskset")
        .args(["--cpu-list", "--pid", &list.join(",")])
        .arg(std::process::id().to_string())
        .output();
    confined.is_ok_and(|output| output.status.success())
}

/// Describes the machine, the versions, the command and the load generator, one line each.
pub fn describe(postgres: &Postgres, command: &str, load: &str) -> Result<String> {
    let processor = field("/proc/cpuinfo", "model name").unwrap_or_else(|| "unknown".to_owned());
    let memory = field("/proc/meminfo", "MemTotal")
        .and_then(|value| value.strip_suffix(" kB")?.parse::<f64>().ok())
        .map_or_else(
            || "unknown".to_owned(),
            |kibibytes| format!("{} GiB", grouped((kibibytes / 1024.0 / 1024.0).round())),
        );
    let processors = std::thread::available_parallelism()?;
    let files = stdout_of(
        "stat",
        &["-f", "-c", "%T", &postgres.folder().display().to_string()],
    );
    let visitas = stdout_of(&visitas()?.display().to_string(), &["--version"])?;
    let lines = [
        ("date", time::OffsetDateTime::now_utc().date().to_string()),
        ("command", format!("`{command}`")),
        (
            "machine",
            format!(
                "{processor}, {memory} of memory, {} {}, data on {}",
                std::env::consts::OS,
                std::env::consts::ARCH,
                files.unwrap_or_else(|_| "an unknown file system".to_owned())
            ),
        ),
        (
            "processors",
            format!("{processors}, shared by load generator, subject, PostgreSQL and Redis"),
        ),
        (
            "service",
            format!(
                "{visitas}, {}",
                stdout_of("rustc", &["--version"]).unwrap_or_default()
            ),
        ),
        (
            "stores",
            format!(
                "PostgreSQL {} with `fsync` and `synchronous_commit` on and its default settings, {}",
                postgres.sql(devstack::DATABASE, "show server_version")?,
                stdout_of("redis-server", &["--version"])
                    .unwrap_or_default()
                    .split(" sha=")
                    .next()
                    .unwrap_or_default()
            ),
        ),
        ("load", load.to_owned()),
    ];
    let mut text = String::new();
    for (name, value) in lines {
        writeln!(text, "- {name}: {value}")?;
    }
    Ok(text)
}

fn stdout_of(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program).args(arguments).output()?;
    ensure!(output.status.success(), "{program} failed");
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

/// The processors that this process is allowed to use, where the system reports them.
fn allowed() -> Option<Vec<u32>> {
    parse_list(&field("/proc/self/status", "Cpus_allowed_list")?)
}

/// A list such as `0-2,5`.
fn parse_list(list: &str) -> Option<Vec<u32>> {
    let mut all = Vec::new();
    for part in list.split(',') {
        let (from, to) = part.split_once('-').unwrap_or((part, part));
        all.extend(from.parse::<u32>().ok()?..=to.parse().ok()?);
    }
    Some(all)
}

/// The value of a line `name : value`, if the file exists.
fn field(file: &str, name: &str) -> Option<String> {
    let text = std::fs::read_to_string(file).ok()?;
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(key, _)| key.trim() == name)
        .map(|(_, value)| value.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn list_of_processors_is_read() {
        assert_eq!(parse_list("0-2,5").unwrap(), [0, 1, 2, 5]);
        assert_eq!(parse_list("3").unwrap(), [3]);
        assert!(parse_list("x").is_none());
    }
}
