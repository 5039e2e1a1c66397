//! The judge of histories: what clients were told about their visits, checked against the table's
//! rows and against itself.
//!
//! A history is a list of visits, the moment of every row in the order of the rows' ids, and the
//! outages of Redis that emptied its counter. The n-th row belongs to the visit whose number is n,
//! as long as no row is deleted. The judge knows no fault, no process, no connection and no clock.

use std::cmp::Reverse;
use std::collections::HashSet;
use std::ops::{Range, RangeInclusive};
use std::time::{Duration, Instant};

/// One visit as its client saw it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Visit {
    /// The client that made it.
    pub client: usize,
    /// The replica that was asked.
    pub replica: usize,
    /// Just before the request was sent.
    pub sent: Instant,
    /// The same moment by the system's clock, in microseconds since 1970.
    pub sent_at: i64,
    /// When the response was read, or when the client gave up.
    pub ended: Instant,
    /// What the client knows of the visit.
    pub outcome: Outcome,
    /// The number in Postgres; recorded visits have one.
    pub total: Option<i64>,
    /// The number in Redis of a recorded visit; the last reading of Redis in a refusal.
    pub redis: Option<i64>,
}

/// What a client knows of its visit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is recorded.
    Recorded,
    /// It is certainly not recorded: `503` with `Retry-After`.
    Refused,
    /// It might be recorded: `503` without `Retry-After`.
    InDoubt,
    /// It was sent, and no response came.
    Unanswered,
    /// There was no connection to send it over.
    NotSent,
    /// It was sent, and its client left before a response.
    Left,
    /// A response that no visit can have, by its status.
    Wrong(u16),
}

/// What the judge is given.
#[derive(Clone, Copy, Debug)]
pub struct History<'a> {
    /// All visits that were made, in any order.
    pub visits: &'a [Visit],
    /// `data` of all rows in the order of their ids, in microseconds since 1970.
    pub rows: &'a [i64],
    /// When Redis was certainly down between two of its lives, in order. Its counter starts over
    /// after each.
    pub redis_outages: &'a [Range<Instant>],
}

/// What the judge found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Visits that their clients know to be recorded.
    pub recorded: usize,
    /// Recorded visits that have no row of their own.
    pub lost: usize,
    /// Visits that might be recorded although their clients, which waited, were not told so.
    pub in_doubt: usize,
    /// Rows in the table.
    pub rows: usize,
    /// Violations by the numbers in Postgres.
    pub postgres: Numbers,
    /// Violations by the numbers in Redis.
    pub redis: Numbers,
}

/// Violations by the numbers of one store. All are zero in a correct history.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Numbers {
    /// Numbers that were told to more than one visit; in Redis, within one of its lives.
    pub repeated: usize,
    /// Numbers that no visit was told and no visit in doubt explains: skipped, or recorded twice.
    pub unexplained: usize,
    /// Visits that were sent after a visit with the same or a higher number had ended.
    pub out_of_order: usize,
}

/// Between the service's reading of the clock and the client's, in microseconds.
const TOLERANCE: i64 = 10_000;

impl Visit {
    /// How long the client waited.
    pub fn took(&self) -> Duration {
        self.ended - self.sent
    }

    /// Whether it is recorded and counted in Redis.
    pub fn is_good(&self) -> bool {
        self.is_recorded() && self.redis.is_some()
    }

    /// Whether its client knows that it is recorded.
    pub fn is_recorded(&self) -> bool {
        self.outcome == Outcome::Recorded
    }

    /// Whether it might be recorded although its client was not told so.
    pub fn is_in_doubt(&self) -> bool {
        match self.outcome {
            Outcome::InDoubt | Outcome::Unanswered | Outcome::Left | Outcome::Wrong(_) => true,
            Outcome::Recorded | Outcome::Refused | Outcome::NotSent => false,
        }
    }

    /// Which row a recorded visit was told of, from 0.
    fn row(&self) -> Option<usize> {
        usize::try_from(self.total? - 1).ok()
    }

    /// When the service can have taken it.
    fn arrival(&self) -> RangeInclusive<i64> {
        let took = i64::try_from(self.took().as_micros()).unwrap_or(i64::MAX);
        let latest = self.sent_at.saturating_add(took).saturating_add(TOLERANCE);
        self.sent_at - TOLERANCE..=latest
    }

    /// The lives of Redis, from 0, in which it can have been counted: none if Redis was down from
    /// before it was sent until after it ended.
    fn redis_lives(&self, outages: &[Range<Instant>]) -> RangeInclusive<usize> {
        let begun = outages.iter().filter(|outage| outage.start <= self.sent);
        let over = outages.iter().filter(|outage| outage.end <= self.ended);
        begun.count()..=over.count()
    }
}

impl Verdict {
    /// How many violations there are.
    pub fn violations(&self) -> usize {
        self.lost + self.duplicated() + self.out_of_order()
    }

    /// Numbers of both stores that were told twice or that no visit explains.
    pub fn duplicated(&self) -> usize {
        let both = [self.postgres, self.redis];
        both.iter().map(|of| of.repeated + of.unexplained).sum()
    }

    /// Visits whose number in either store contradicts the order in which visits were made.
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

/// How many rows that no visit was told of cannot be matched with a visit in doubt, each of which
/// has made one row at most.
fn unexplained_rows(visits: &[Visit], rows: &[i64]) -> usize {
    let told: HashSet<_> = visits.iter().filter_map(Visit::row).collect();
    let untold = rows.iter().enumerate();
    let untold = untold.filter(|(row, _)| !told.contains(row));
    let mut untold: Vec<_> = untold.map(|(_, moment)| *moment).collect();
    untold.sort_unstable();
    let makers = visits.iter().filter(|visit| visit.is_in_doubt());
    let mut makers: Vec<_> = makers.map(Visit::arrival).collect();
    // A row goes to the visit that can explain the fewest later rows.
    makers.sort_unstable_by_key(|arrival| *arrival.end());
    let mut unexplained = 0;
    for moment in untold {
        match makers.iter().position(|arrival| arrival.contains(&moment)) {
            Some(maker) => drop(makers.remove(maker)),
            None => unexplained += 1,
        }
    }
    unexplained
}

/// Judges the numbers in Redis, each of its lives for itself. A visit that spans two lives has a
/// number of either: it is not compared, but it can explain a missing number of both.
fn judge_redis(visits: &[Visit], outages: &[Range<Instant>]) -> Numbers {
    let from_nowhere = |visit: &&Visit| visit.is_good() && visit.redis_lives(outages).is_empty();
    let mut found = Numbers {
        unexplained: visits.iter().filter(from_nowhere).count(),
        ..Numbers::default()
    };
    for life in 0..=outages.len() {
        let (mut counted, mut explain) = (Vec::new(), 0);
        for visit in visits {
            let lives = visit.redis_lives(outages);
            if !lives.contains(&life) {
                continue;
            }
            if visit.is_good() && lives.start() == lives.end() {
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

/// How many visits were sent after a visit with the same or a higher number had ended. Walks down
/// from the highest number and keeps the earliest end of the visits above.
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

/// How many numbers occurred before.
fn repeated(numbers: impl Iterator<Item = i64>) -> usize {
    let mut seen = HashSet::new();
    numbers.filter(|&number| !seen.insert(number)).count()
}

#[cfg(test)]
mod tests;
