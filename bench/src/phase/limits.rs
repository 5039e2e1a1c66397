//! The limits of the stores: their throughput and latency without the service.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use lab::measure::{Spread, grouped, milliseconds};
use lab::process;
use lab::program::scratch;
use lab::report::{Section, table};

use crate::ground::{Ground, Owner, Stores};
use crate::progress;
use crate::round::Effort;

/// The numbers of clients of each tool.
const CLIENTS: [usize; 2] = [1, 64];

const INSERT: &str = "insert into visitas default values;";

/// Inserts of one row, each committed and flushed, by this many clients of pgbench.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Inserts {
    pub(crate) clients: usize,
}

/// The results of pgbench.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Transactions {
    pub(crate) throughput: f64,
    /// Seconds.
    pub(crate) median: f64,
    /// Seconds.
    pub(crate) mean: f64,
}

pub(crate) fn limits(ground: &mut Ground, effort: Effort) -> Result<Section> {
    let mut inserts = CLIENTS.map(|clients| (clients, Vec::new()));
    let mut increments = CLIENTS.map(|clients| (clients, Vec::new()));
    for round in 1..=effort.rounds {
        for (clients, all) in &mut inserts {
            all.push(insert(
                ground,
                Inserts { clients: *clients },
                effort.duration,
            )?);
        }
        for (clients, all) in &mut increments {
            all.push(increment(ground, *clients, Stores::Near)?);
        }
        progress!("round {round} of {}: limits of the stores", effort.rounds);
    }
    let inserts = inserts.map(|(clients, all)| {
        [
            format!("PostgreSQL: one insert per commit, {clients} pgbench clients"),
            Spread::new(all.iter().map(|inserted| inserted.throughput)).format_with(grouped),
            milliseconds(Spread::new(all.iter().map(|inserted| inserted.median)).median),
        ]
    });
    let increments = increments.map(|(clients, all)| {
        [
            format!("Redis: `INCR`, {clients} redis-benchmark clients"),
            Spread::new(all.iter().map(|&(throughput, _)| throughput)).format_with(grouped),
            milliseconds(Spread::new(all.iter().map(|&(_, median)| median)).median),
        ]
    });
    Ok(Section {
        title: "Limits of the stores",
        text: table(
            &["", "per second", "median"],
            inserts.into_iter().chain(increments),
        ),
        goals: Vec::new(),
    })
}

/// Inserts into a table of the same shape for `duration`.
pub(crate) fn insert(
    ground: &mut Ground,
    inserts: Inserts,
    duration: Duration,
) -> Result<Transactions> {
    let database = ground.database(Owner::Peer, 0)?;
    transactions(ground, &database, INSERT, inserts.clients, duration)
}

/// The medians of a lone `select 1`, a lone insert and a lone `INCR`, in seconds. `stores` are
/// reached as a subject reaches them.
pub(crate) fn lone_calls(
    ground: &mut Ground,
    stores: Stores,
    duration: Duration,
) -> Result<[f64; 3]> {
    let database = ground.database(Owner::Peer, 0)?;
    ground.set_commit_delay(&database, stores)?;
    let [select, insert] = ["select 1;", INSERT]
        .map(|statement| transactions_at(ground, stores, &database, statement, 1, duration));
    ground.set_commit_delay(&database, Stores::Near)?;
    let (_, increment) = increment(ground, 1, stores)?;
    Ok([select?.median, insert?.median, increment])
}

/// Runs the statement that records a visit, by one client of pgbench.
pub(crate) fn record(ground: &mut Ground, duration: Duration) -> Result<Transactions> {
    let database = ground.database(Owner::Visitas, 0)?;
    let statement = "select public.registrar_visitas(array[now()]);";
    transactions(ground, &database, statement, 1, duration)
}

fn transactions(
    ground: &Ground,
    database: &str,
    statement: &str,
    clients: usize,
    duration: Duration,
) -> Result<Transactions> {
    transactions_at(ground, Stores::Near, database, statement, clients, duration)
}

fn transactions_at(
    ground: &Ground,
    stores: Stores,
    database: &str,
    statement: &str,
    clients: usize,
    duration: Duration,
) -> Result<Transactions> {
    let [postgres, _] = ground.addresses(stores)?;
    let folder = scratch()?;
    let script = folder.join("transaction.sql");
    std::fs::write(&script, statement)?;
    let log = folder.join("pgbench");
    remove_logs(&log)?;
    let clients = clients.to_string();
    let output = process::command(ground.postgres.programs().join("pgbench"))
        .env("PGPASSWORD", devstack::PASSWORD)
        // The same settings as the service's sessions.
        .env(
            "PGOPTIONS",
            "-c jit=off -c plan_cache_mode=force_generic_plan",
        )
        .args(["--no-vacuum", "--protocol", "prepared", "--log"])
        .arg(format!("--log-prefix={}", log.display()))
        .args(["--client", &clients, "--jobs", "1"])
        .args(["--time", &duration.as_secs().max(1).to_string()])
        .arg("--file")
        .arg(&script)
        .args(["--host", &postgres.ip().to_string()])
        .args(["--port", &postgres.port().to_string()])
        .args(["--username", devstack::USER, database])
        .output()
        .context("cannot run pgbench")?;
    let report = String::from_utf8_lossy(&output.stdout);
    ensure!(
        output.status.success(),
        "pgbench: {report}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let throughput = tps(&report).with_context(|| format!("pgbench printed\n{report}"))?;
    let mut times = Vec::new();
    for path in logs(&log)? {
        times.extend(times_in(&std::fs::read_to_string(path)?)?);
    }
    remove_logs(&log)?;
    Ok(Transactions {
        throughput,
        mean: times.iter().sum::<f64>() / times.len() as f64,
        median: Spread::new(times).median,
    })
}

fn tps(report: &str) -> Option<f64> {
    report
        .lines()
        .find_map(|line| line.strip_prefix("tps = "))?
        .split_whitespace()
        .next()?
        .parse()
        .ok()
}

/// The durations in seconds from pgbench's log, which has one line per transaction and the duration
/// in the third column.
fn times_in(log: &str) -> Result<Vec<f64>> {
    log.lines()
        .map(|line| {
            let column = line.split(' ').nth(2).context("a line without a time")?;
            Ok(column.parse::<f64>()? / 1e6)
        })
        .collect()
}

fn logs(prefix: &std::path::Path) -> Result<Vec<std::path::PathBuf>> {
    let folder = prefix.parent().context("no folder")?;
    let mut logs = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.file_stem() == prefix.file_name() {
            logs.push(path);
        }
    }
    Ok(logs)
}

fn remove_logs(prefix: &std::path::Path) -> Result<()> {
    for path in logs(prefix)? {
        std::fs::remove_file(path)?;
    }
    Ok(())
}

/// Increments for a few seconds at most: returns the throughput and the median latency.
fn increment(ground: &Ground, clients: usize, stores: Stores) -> Result<(f64, f64)> {
    let [_, redis] = ground.addresses(stores)?;
    let requests = match (clients, stores) {
        (1, Stores::Near) => "20000",
        (1, _) => "2000",
        _ => "100000",
    };
    let output = process::command("redis-benchmark")
        .args(["-h", &redis.ip().to_string()])
        .args(["-p", &redis.port().to_string()])
        .args(["-t", "incr", "-n", requests, "-c", &clients.to_string()])
        .arg("--csv")
        .output()
        .context("cannot run redis-benchmark")?;
    let report = String::from_utf8_lossy(&output.stdout);
    increments(&report).with_context(|| format!("redis-benchmark printed\n{report}"))
}

/// Parses `"test","rps","avg_latency_ms","min_latency_ms","p50_latency_ms",…` and the line below
/// it.
fn increments(csv: &str) -> Result<(f64, f64)> {
    let line = csv
        .lines()
        .find(|line| line.starts_with("\"INCR\""))
        .context("no line of INCR")?;
    let columns: Vec<_> = line
        .split(',')
        .map(|column| column.trim_matches('"'))
        .collect();
    ensure!(columns.len() >= 5, "too few columns");
    Ok((columns[1].parse()?, columns[4].parse::<f64>()? / 1e3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn throughput_of_pgbench_is_read() {
        let report = "latency average = 0.555 ms\ninitial connection time = 3.9 ms\n\
                    tps = 1801.370241 (without initial connection time)\n";
        assert_eq!(tps(report), Some(1_801.370_241));
    }

    #[test]
    fn times_of_pgbench_are_microseconds() {
        let log = "0 1 612 0 1764000000 100\n0 2 498 0 1764000000 700\n";
        assert_eq!(times_in(log).unwrap(), [0.000_612, 0.000_498]);
        assert!(times_in("0 1").is_err());
    }

    #[test]
    fn report_of_redis_benchmark_is_read() {
        let csv = "\"test\",\"rps\",\"avg_latency_ms\",\"min_latency_ms\",\"p50_latency_ms\"\n\
                   \"INCR\",\"52631.58\",\"0.015\",\"0.008\",\"0.016\",\"0.023\"\n";
        assert_eq!(increments(csv).unwrap(), (52631.58, 0.000_016));
        assert!(increments("").is_err());
    }
}
