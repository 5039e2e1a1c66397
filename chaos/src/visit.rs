//! Visits a service that another program runs, replaces or breaks, until standard input ends, and
//! judges the responses.
//!
//! `tests/e2e-kubernetes.sh` does so during a rolling update, `tests/powercut-compose.sh` through power
//! cuts. Must not know: what happens to the service meanwhile, except when the power was cut.

use std::io::BufRead;
use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use lab::client;
use lab::history::{History, Outcome, PowerCut, Verdict, Visit, judge};
use tokio::runtime::Runtime;

use crate::ledger::Ledger;

/// The responses of all clients, and what the judge found.
#[derive(Debug)]
pub struct Visited {
    /// All visits.
    visits: Vec<Visit>,
    /// Violations.
    verdict: Verdict,
    /// The longest time without a response that acknowledges a visit.
    silence: Duration,
}

/// Visits `address` with the ledger's clients, each over one connection that it keeps. A request is
/// repeated only if no byte of it was sent. At the end the command `rows` must print the `data` of
/// all rows in the order of their ids, in microseconds since 1970, one on each line.
///
/// A line `CUT OFF` of standard input, both in the same unit, is a power cut, which also empties
/// Redis: only what was answered before `CUT` must be kept, and nothing ran any more at `OFF`.
pub fn run(address: SocketAddr, pause: Duration, rows: &[&str]) -> Result<Visited> {
    // All numbers after these belong to the ledger's visits.
    let (total, counted) = client::visit(address).context("the first visit")?;
    let counted = counted.context("the first visit was not counted in Redis")?;
    let runtime = Runtime::new()?;
    let started = Instant::now();
    let mut ledger = Ledger::start(runtime.handle(), &[address], pause);
    let cuts = read_cuts(std::io::stdin().lock())?;
    let mut visits = ledger.stop();
    for cut in &cuts {
        cut.hide(&mut visits);
    }
    let silence = longest_silence(started, &visits);
    for visit in &mut visits {
        visit.total = visit.total.map(|number| number - total);
        // After a power cut, Redis counts from 1.
        if cuts.iter().all(|cut| visit.sent <= cut.off) {
            visit.redis = visit.redis.map(|number| number - counted);
        }
    }
    let redis_outages: Vec<_> = cuts.iter().map(|cut| cut.off..cut.off).collect();
    let rows = read_rows(rows)?;
    let rows = rows.get(usize::try_from(total)?..);
    let rows = rows.context("rows of earlier visits are missing")?;
    let verdict = judge(History {
        visits: &visits,
        rows,
        redis_outages: &redis_outages,
    });
    Ok(Visited {
        visits,
        verdict,
        silence,
    })
}

/// Reads power cuts until the input ends.
fn read_cuts(input: impl BufRead) -> Result<Vec<PowerCut>> {
    let now = Instant::now();
    let now_at = SystemTime::now().duration_since(UNIX_EPOCH)?;
    let instant = |microseconds: &str| -> Result<Instant> {
        let at = Duration::from_micros(microseconds.parse()?);
        (now + at).checked_sub(now_at).context("too long ago")
    };
    let mut cuts = Vec::new();
    for line in input.lines() {
        let line = line?;
        let (cut, off) = line.split_once(' ').context("a line is not CUT OFF")?;
        cuts.push(PowerCut {
            cut: instant(cut)?,
            off: instant(off)?,
        });
    }
    Ok(cuts)
}

fn read_rows(command: &[&str]) -> Result<Vec<i64>> {
    let (program, arguments) = command.split_first().context("no command for the rows")?;
    let output = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("running {program}"))?;
    ensure!(output.status.success(), "{program}: {}", output.status);
    let printed = String::from_utf8(output.stdout)?;
    printed.lines().map(|row| Ok(row.parse()?)).collect()
}

fn longest_silence(started: Instant, visits: &[Visit]) -> Duration {
    let mut ends: Vec<_> = visits
        .iter()
        .filter(|visit| visit.is_recorded())
        .map(|visit| visit.ended)
        .collect();
    ends.push(started);
    ends.sort_unstable();
    let gaps = ends.windows(2).map(|pair| pair[1] - pair[0]);
    gaps.max().unwrap_or_default()
}

impl Visited {
    /// Whether the judge found no violation.
    pub fn is_exact(&self) -> bool {
        self.verdict.violations() == 0
    }

    /// One line of `name=number`, for scripts. Times are in milliseconds.
    pub fn line(&self) -> String {
        let count = |wanted: fn(Outcome) -> bool| {
            let outcomes = self.visits.iter().map(|visit| visit.outcome);
            outcomes.filter(|&outcome| wanted(outcome)).count()
        };
        let recorded = self.visits.iter().filter(|visit| visit.is_recorded());
        let longest = recorded.map(Visit::took).max().unwrap_or_default();
        let figures = [
            ("answered", self.verdict.recorded),
            // Certainly not recorded.
            ("refused", count(|outcome| outcome == Outcome::Refused)),
            ("in_doubt", count(|outcome| outcome == Outcome::InDoubt)),
            ("broken", count(|outcome| outcome == Outcome::NoResponse)),
            (
                "wrong",
                count(|outcome| matches!(outcome, Outcome::Wrong(_))),
            ),
            // No failure: the client connects again.
            ("not_sent", count(|outcome| outcome == Outcome::NotSent)),
            ("lost", self.verdict.lost),
            ("duplicated", self.verdict.duplicated()),
            ("out_of_order", self.verdict.out_of_order()),
            ("rows", self.verdict.rows),
            ("longest_ms", milliseconds(longest)),
            ("silence_ms", milliseconds(self.silence)),
        ];
        figures
            .map(|(name, figure)| format!("{name}={figure}"))
            .join(" ")
    }
}

fn milliseconds(duration: Duration) -> usize {
    usize::try_from(duration.as_millis()).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn visit(sent: Instant, ended: Instant, outcome: Outcome) -> Visit {
        Visit {
            client: 0,
            replica: 0,
            sent,
            sent_at: 0,
            ended,
            outcome,
            total: (outcome == Outcome::Recorded).then_some(1),
            redis: None,
        }
    }

    #[test]
    fn silence_lasts_from_one_acknowledged_visit_to_the_next() {
        let started = Instant::now();
        let at = |milliseconds| started + Duration::from_millis(milliseconds);
        let visits = [
            visit(at(0), at(40), Outcome::Recorded),
            visit(at(50), at(60), Outcome::Refused),
            visit(at(0), at(10), Outcome::Recorded),
            visit(at(70), at(95), Outcome::Recorded),
        ];
        let silence = longest_silence(started, &visits);
        assert_eq!(silence, Duration::from_millis(55));
        assert_eq!(longest_silence(started, &[]), Duration::ZERO);
    }

    #[test]
    fn power_cuts_are_read_from_lines() {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let now = now.as_micros();
        let lines = format!("{} {}\n{now} {now}\n", now - 3_000_000, now - 1_000_000);
        let [first, second] = read_cuts(lines.as_bytes()).unwrap().try_into().unwrap();
        assert_eq!(first.off - first.cut, Duration::from_secs(2));
        assert_eq!(second.cut - first.off, Duration::from_secs(1));
        assert!(second.off.elapsed() < Duration::from_secs(1));
        assert!(read_cuts("".as_bytes()).unwrap().is_empty());
        assert!(read_cuts("now\n".as_bytes()).is_err());
    }

    #[test]
    fn rows_are_read_from_a_commands_lines() {
        let rows = read_rows(&["printf", "1\\n20\\n"]).unwrap();
        assert_eq!(rows, [1, 20]);
        assert!(read_rows(&["printf", "one\\n"]).is_err());
        assert!(read_rows(&["false"]).is_err());
    }
}
