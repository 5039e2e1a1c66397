//! The judge of histories: checks the responses that clients got against the table's rows and
//! against each other.
//!
//! A history is a list of visits, the time of every row in the order of the rows' ids, and the
//! outages of Redis that emptied its counter. The n-th row belongs to the visit whose number is n,
//! as long as no row is deleted. The judge knows no fault, no process, no connection and no clock.

use std::cmp::Reverse;
use std::collections::HashSet;
use std::ops::{Range, RangeInclusive};
use std::time::{Duration, Instant};

/// One visit, as recorded by its client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Visit {
    /// The client that made it.
    pub client: usize,
    /// The replica that got the request.
    pub replica: usize,
    /// The time just before the request was sent.
    pub sent: Instant,
    /// The same time by the system's clock, in microseconds since 1970.
    pub sent_at: i64,
    /// When the client read the response or gave up.
    pub ended: Instant,
    /// What the client knows of the visit.
    pub outcome: Outcome,
    /// The visit's number in Postgres, if it is recorded.
    pub total: Option<i64>,
    /// The number in Redis of a recorded visit; the last reading of Redis in a refusal.
    pub redis: Option<i64>,
}

/// What a client knows of its visit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The visit is recorded.
    Recorded,
    /// The visit is certainly not recorded: `503` with `Retry-After`.
    Refused,
    /// The visit might be recorded: `503` without `Retry-After`.
    InDoubt,
    /// The request was sent, and no response came.
    NoResponse,
    /// No connection could be opened.
    NotSent,
    /// The client disconnected before a response.
    Left,
    /// A response with a status that no visit can have.
    Wrong(u16),
}

/// The input of the judge.
#[derive(Clone, Copy, Debug)]
pub struct History<'a> {
    /// All visits, in any order.
    pub visits: &'a [Visit],
    /// `data` of all rows in the order of their ids, in microseconds since 1970.
    pub rows: &'a [i64],
    /// The periods in which Redis was certainly down, in order. Its counter restarts after each.
    pub redis_outages: &'a [Range<Instant>],
}

/// The result of the judge.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Visits whose clients know that they are recorded.
    pub recorded: usize,
    /// Recorded visits that have no matching row.
    pub lost: usize,
    /// Visits that might be recorded although their clients waited and got no confirmation.
    pub in_doubt: usize,
    /// Rows in the table.
    pub rows: usize,
    /// Violations in the numbers from Postgres.
    pub postgres: Numbers,
    /// Violations in the numbers from Redis.
    pub redis: Numbers,
}

/// Violations in the numbers of one store. All are zero in a correct history.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Numbers {
    /// Numbers that more than one visit got; in Redis, between two restarts.
    pub repeated: usize,
    /// Numbers that no visit got and no visit in doubt explains: skipped, or recorded twice.
    pub unexplained: usize,
    /// Visits sent after a visit with the same or a higher number had ended.
    pub out_of_order: usize,
}

/// When the power of the database's machine was off.
#[derive(Clone, Copy, Debug)]
pub struct PowerCut {
    /// Just before the disk was copied: responses from before it are kept to.
    pub cut: Instant,
    /// When the killed processes had ended.
    pub off: Instant,
}

/// Maximum difference between the service's and the client's clock readings, in microseconds.
const TOLERANCE: i64 = 10_000;
/// How much later than its client gave up a visit can be counted: the default of `VISIT_TIMEOUT`.
const LATEST_COUNT: Duration = Duration::from_secs(2);

impl Visit {
    /// How long the client waited.
    pub fn took(&self) -> Duration {
        self.ended - self.sent
    }

    /// Whether the visit is recorded in Postgres and counted in Redis.
    pub fn is_complete(&self) -> bool {
        self.is_recorded() && self.redis.is_some()
    }

    /// Whether the client knows that the visit is recorded.
    pub fn is_recorded(&self) -> bool {
        self.outcome == Outcome::Recorded
    }

    /// Whether the visit might be recorded although its client got no confirmation.
    pub fn is_in_doubt(&self) -> bool {
        match self.outcome {
            Outcome::InDoubt | Outcome::NoResponse | Outcome::Left | Outcome::Wrong(_) => true,
            Outcome::Recorded | Outcome::Refused | Outcome::NotSent => false,
        }
    }

    /// The index of a recorded visit's row, from 0.
    fn row(&self) -> Option<usize> {
        usize::try_from(self.total? - 1).ok()
    }

    /// The period in which the service can have received the visit.
    fn arrival(&self) -> RangeInclusive<i64> {
        let took = i64::try_from(self.took().as_micros()).unwrap_or(i64::MAX);
        let latest = self.sent_at.saturating_add(took).saturating_add(TOLERANCE);
        self.sent_at - TOLERANCE..=latest
    }

    /// The lives of Redis (periods between restarts, from 0) in which the visit can have been
    /// counted. Empty if Redis was down for the whole visit.
    fn redis_lives(&self, outages: &[Range<Instant>]) -> RangeInclusive<usize> {
        // The service can still count a visit whose client has left or given up.
        let counted = self.ended + LATEST_COUNT * u32::from(self.is_in_doubt());
        let started = outages.iter().filter(|outage| outage.start <= self.sent);
        let over = outages.iter().filter(|outage| outage.end <= counted);
        started.count()..=over.count()
    }
}

impl PowerCut {
    /// Takes back what was answered after the cut, which no client can have read: the power was off.
    pub fn hide(self, visits: &mut [Visit]) {
        let is_hidden = |visit: &&mut Visit| {
            visit.is_recorded() && visit.ended >= self.cut && visit.sent <= self.off
        };
        for visit in visits.iter_mut().filter(is_hidden) {
            visit.outcome = Outcome::NoResponse;
            visit.total = None;
            visit.redis = None;
        }
    }
}

impl Verdict {
    /// The number of violations.
    pub fn violations(&self) -> usize {
        self.lost + self.duplicated() + self.out_of_order()
    }

    /// Numbers of both stores that occurred twice or that no visit explains.
    pub fn duplicated(&self) -> usize {
        let both = [self.postgres, self.redis];
        both.iter()
            .map(|numbers| numbers.repeated + numbers.unexplained)
            .sum()
    }

    /// Visits whose number in either store contradicts the order of the visits.
    pub fn out_of_order(&self) -> usize {
        self.postgres.out_of_order + self.redis.out_of_order
    }
}

/// Judges a history.
pub fn judge(history: History<'_>) -> Verdict {
    let visits = history.visits;
    let recorded = || visits.iter().filter(|visit| visit.is_recorded());
    Verdict {
        recorded: recorded().count(),
        lost: recorded()
            .filter(|visit| !has_row(visit, history.rows))
            .count(),
        in_doubt: visits
            .iter()
            .filter(|visit| visit.is_in_doubt() && visit.outcome != Outcome::Left)
            .count(),
        rows: history.rows.len(),
        postgres: Numbers {
            repeated: repeated(recorded().filter_map(|visit| visit.total)),
            unexplained: unexplained_rows(visits, history.rows),
            out_of_order: out_of_order(recorded(), |visit| visit.total),
        },
        redis: judge_redis(visits, history.redis_outages),
    }
}

fn has_row(visit: &Visit, rows: &[i64]) -> bool {
    visit
        .row()
        .and_then(|row| rows.get(row))
        .is_some_and(|moment| visit.arrival().contains(moment))
}

/// The number of rows that belong to no recorded visit and cannot be matched with a visit in doubt.
/// A visit in doubt made at most one row.
fn unexplained_rows(visits: &[Visit], rows: &[i64]) -> usize {
    let known: HashSet<_> = visits.iter().filter_map(Visit::row).collect();
    let unknown = rows.iter().enumerate();
    let unknown = unknown.filter(|(row, _)| !known.contains(row));
    let mut unknown: Vec<_> = unknown.map(|(_, moment)| *moment).collect();
    unknown.sort_unstable();
    let makers = visits.iter().filter(|visit| visit.is_in_doubt());
    let mut makers: Vec<_> = makers.map(Visit::arrival).collect();
    // A row goes to the visit that can explain the fewest later rows.
    makers.sort_unstable_by_key(|arrival| *arrival.end());
    let mut unexplained = 0;
    for moment in unknown {
        match makers.iter().position(|arrival| arrival.contains(&moment)) {
            Some(maker) => drop(makers.remove(maker)),
            None => unexplained += 1,
        }
    }
    unexplained
}

/// Judges the numbers in Redis, separately for each life. A visit that spans two lives can have a
/// number of either: it is not compared, but it can explain a missing number in both.
fn judge_redis(visits: &[Visit], outages: &[Range<Instant>]) -> Numbers {
    let counted_while_down =
        |visit: &&Visit| visit.is_complete() && visit.redis_lives(outages).is_empty();
    let mut found = Numbers {
        unexplained: visits.iter().filter(counted_while_down).count(),
        ..Numbers::default()
    };
    for life in 0..=outages.len() {
        let (mut counted, mut explain) = (Vec::new(), 0);
        for visit in visits {
            let lives = visit.redis_lives(outages);
            if !lives.contains(&life) {
                continue;
            }
            if visit.is_complete() && lives.start() == lives.end() {
                counted.push(visit);
            } else if visit.is_recorded() || visit.is_in_doubt() {
                explain += 1;
            }
        }
        let numbers: HashSet<_> = counted.iter().filter_map(|visit| visit.redis).collect();
        let highest = numbers.iter().copied().max().unwrap_or(0);
        let highest = usize::try_from(highest).unwrap_or(0);
        found.repeated += counted.len() - numbers.len();
        found.unexplained += highest.saturating_sub(numbers.len() + explain);
        found.out_of_order += out_of_order(counted.into_iter(), |visit| visit.redis);
    }
    found
}

/// The number of visits sent after a visit with the same or a higher number had ended. Goes from
/// the highest number down and keeps the earliest end of the visits above.
fn out_of_order<'a>(
    visits: impl Iterator<Item = &'a Visit>,
    number: impl Fn(&Visit) -> Option<i64>,
) -> usize {
    let numbered = visits.filter_map(|visit| Some((number(visit)?, visit)));
    let mut numbered: Vec<_> = numbered.collect();
    numbered.sort_unstable_by_key(|(number, visit)| (Reverse(*number), visit.ended));
    let mut earliest_end: Option<Instant> = None;
    let mut out_of_order = 0;
    for (_, visit) in numbered {
        if earliest_end.is_some_and(|end| end < visit.sent) {
            out_of_order += 1;
        }
        earliest_end = Some(earliest_end.map_or(visit.ended, |end| end.min(visit.ended)));
    }
    out_of_order
}

/// The number of values that occurred before.
fn repeated(numbers: impl Iterator<Item = i64>) -> usize {
    let mut seen = HashSet::new();
    numbers.filter(|&number| !seen.insert(number)).count()
}

#[cfg(test)]
mod tests;
