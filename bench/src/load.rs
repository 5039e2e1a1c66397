//! Closed-loop load by `wrk`, for throughput: every connection makes its next visit after a
//! response. Its latencies omit the visits that a slow response delays, so `paced` measures
//! latency.

use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use lab::process;

/// The results of one run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Load {
    /// Successful responses per second.
    pub(crate) throughput: f64,
    /// Other responses and failed connections.
    pub(crate) failed: u64,
    /// Seconds.
    pub(crate) median: f64,
    /// Seconds.
    pub(crate) p99: f64,
}

/// A run in progress.
pub(crate) struct LoadRun(Child);

/// Makes visits over `connections` connections for `duration`.
pub(crate) fn run(address: SocketAddr, connections: usize, duration: Duration) -> Result<Load> {
    start(address, connections, duration)?.finish()
}

/// Makes visits to several replicas at once. The connections are shared out. The median is the mean
/// of the replicas' medians, and p99 the highest of theirs.
pub(crate) fn run_on_all(
    addresses: &[SocketAddr],
    connections: usize,
    duration: Duration,
) -> Result<Load> {
    let share = (connections / addresses.len()).max(1);
    let runs: Vec<_> = addresses
        .iter()
        .map(|&address| start(address, share, duration))
        .collect::<Result<_>>()?;
    let loads: Vec<_> = runs
        .into_iter()
        .map(LoadRun::finish)
        .collect::<Result<_>>()?;
    let sum = |figure: fn(&Load) -> f64| loads.iter().map(figure).sum::<f64>();
    Ok(Load {
        throughput: sum(|load| load.throughput),
        failed: loads.iter().map(|load| load.failed).sum(),
        median: sum(|load| load.median) / loads.len() as f64,
        p99: loads.iter().map(|load| load.p99).fold(0.0, f64::max),
    })
}

/// Starts a run on one address without waiting for it.
pub(crate) fn start(
    address: SocketAddr,
    connections: usize,
    duration: Duration,
) -> Result<LoadRun> {
    let threads = connections.min(2);
    let child = process::command("wrk")
        .args(["--latency", "--timeout", "60s"])
        .args(["--threads", &threads.to_string()])
        .args(["--connections", &connections.to_string()])
        .args(["--duration", &format!("{}s", duration.as_secs().max(1))])
        .arg(format!("http://{address}/"))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot run wrk")?;
    Ok(LoadRun(child))
}

/// Describes the load generators: wrk for throughput, and a client for latency.
pub(crate) fn describe() -> Result<String> {
    // wrk prints its version only with its usage text, and exits with a failure.
    let output = Command::new("wrk")
        .arg("-v")
        .output()
        .context("cannot run wrk")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let version = text.split_whitespace().take(2).collect::<Vec<_>>();
    Ok(format!(
        "{} for throughput, a client of this bench for latency",
        version.join(" ")
    ))
}

impl LoadRun {
    pub(crate) fn id(&self) -> u32 {
        self.0.id()
    }

    pub(crate) fn finish(self) -> Result<Load> {
        let output = self.0.wait_with_output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        ensure!(
            output.status.success(),
            "wrk: {text}{}",
            String::from_utf8_lossy(&output.stderr)
        );
        parse(&text).with_context(|| format!("wrk printed\n{text}"))
    }
}

fn parse(text: &str) -> Result<Load> {
    let line = |start: &str| {
        text.lines()
            .find_map(|line| line.trim_start().strip_prefix(start))
            .map(str::trim)
    };
    let (requests, seconds) = text
        .lines()
        .find_map(|line| line.split_once(" requests in "))
        .context("no number of requests")?;
    let requests: f64 = requests.trim().parse()?;
    let seconds = seconds.split_once(',').context("no duration")?.0;
    let refused = line("Non-2xx or 3xx responses:").unwrap_or("0");
    let refused: u64 = refused.parse()?;
    let broken: u64 = line("Socket errors:")
        .unwrap_or_default()
        .split(|letter: char| !letter.is_ascii_digit())
        .filter_map(|number| number.parse::<u64>().ok())
        .sum();
    Ok(Load {
        throughput: (requests - refused as f64) / span(seconds)?,
        failed: refused + broken,
        median: span(line("50%").context("no median")?)?,
        p99: span(line("99%").context("no 99th percentile")?)?,
    })
}

/// Parses a duration of wrk into seconds.
fn span(text: &str) -> Result<f64> {
    let unit = text
        .find(|letter: char| letter.is_ascii_alphabetic())
        .with_context(|| format!("{text} has no unit"))?;
    let (number, unit) = text.split_at(unit);
    let number: f64 = number.parse()?;
    Ok(match unit {
        "us" => number / 1e6,
        "ms" => number / 1e3,
        "s" => number,
        "m" => number * 60.0,
        "h" => number * 3600.0,
        _ => anyhow::bail!("{text} has an unknown unit"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAID: &str = "\
Running 6s test @ http://127.0.0.1:15001/
  2 threads and 256 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency     4.90ms    1.22ms  31.99ms   88.26%
    Req/Sec    26.05k     2.31k   31.62k    71.00%
  Latency Distribution
     50%  640.00us
     75%    5.20ms
     90%    6.01ms
     99%    1.02s
  3000 requests in 6.00s, 63.10MB read
Requests/sec:    500.00
Transfer/sec:     10.51MB
";

    #[test]
    fn report_of_wrk_is_read() {
        let load = parse(SAID).unwrap();
        let expected = Load {
            throughput: 500.0,
            failed: 0,
            median: 0.00064,
            p99: 1.02,
        };
        assert_eq!(load, expected);
    }

    #[test]
    fn only_successes_count_as_throughput() {
        let failures = "  Socket errors: connect 1, read 2, write 3, timeout 4\n  \
                        Non-2xx or 3xx responses: 600\nRequests/sec:";
        let load = parse(&SAID.replace("Requests/sec:", failures)).unwrap();
        assert_eq!((load.throughput, load.failed), (400.0, 610));
    }

    #[test]
    fn report_without_a_percentile_is_an_error() {
        assert!(parse(&SAID.replace("50%", "")).is_err());
    }
}
