//! What became of what was acknowledged: the clients' numbers beside the table's rows.
//!
//! Rows carry no number, but the n-th row in the order of their ids is the one that a visit with the
//! number n was told of, as long as nobody deletes any. Its `data` is the moment when that visit
//! arrived, and must lie between the visit's beginning and its answer: so each acknowledged visit is
//! looked for in a row of its own, and not only in their sum.

use std::collections::HashSet;
use std::ops::RangeInclusive;

use crate::visitor::{Outcome, Visit};

/// What is known when all has been said.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Visits that were answered 200.
    pub acknowledged: usize,
    /// Those of them that have no row.
    pub lost: usize,
    /// Numbers that were told twice, and rows more than all visits can have made.
    pub duplicated: usize,
    /// Visits that may be recorded though nobody was told so.
    pub in_doubt: usize,
    /// Rows.
    pub rows: usize,
}

/// What may have been recorded without having been acknowledged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Doubt {
    /// What the service has counted as such.
    pub counted: usize,
    /// Refusals whose service ended before it could be asked whether they were in doubt.
    pub unasked: usize,
}

/// Between the service's look at the clock and ours, in microseconds.
const TOLERANCE: i64 = 10_000;

/// Compares. `moments` are the `data` of all rows by id, in microseconds since 1970; the numbers in
/// Redis are looked at where the counter has never started over.
#[must_use]
pub fn verdict(
    visits: &[Visit],
    moments: &[i64],
    doubt: Doubt,
    counter_started_over: bool,
) -> Verdict {
    let acknowledged = visits.iter().filter(|visit| visit.total().is_some());
    let lost = acknowledged
        .clone()
        .filter(|visit| !has_row(visit, moments))
        .count();
    let number = |of: fn(Outcome) -> bool| visits.iter().filter(|visit| of(visit.outcome)).count();
    let unanswered = number(|outcome| matches!(outcome, Outcome::Unanswered | Outcome::Wrong(_)));
    let left = number(|outcome| outcome == Outcome::Left);
    let acknowledged = acknowledged.count();
    let in_doubt = unanswered + doubt.counted;
    let all = acknowledged + in_doubt + doubt.unasked + left;
    let excess = moments.len().saturating_sub(all);
    let mut duplicated =
        repeated(visits.iter().filter_map(Visit::total)) + excess.max(strays(visits, moments));
    if !counter_started_over {
        duplicated += repeated(visits.iter().filter_map(Visit::redis));
    }
    Verdict {
        acknowledged,
        lost,
        duplicated,
        in_doubt,
        rows: moments.len(),
    }
}

fn has_row(visit: &Visit, moments: &[i64]) -> bool {
    row(visit)
        .and_then(|row| moments.get(row))
        .is_some_and(|moment| arrival(visit).contains(moment))
}

/// Which row an acknowledged visit was told of, from 0.
fn row(visit: &Visit) -> Option<usize> {
    usize::try_from(visit.total()? - 1).ok()
}

/// When the service can have taken it.
fn arrival(visit: &Visit) -> RangeInclusive<i64> {
    let took = i64::try_from(visit.took.as_micros()).unwrap_or(i64::MAX);
    let latest = visit.sent_at.saturating_add(took).saturating_add(TOLERANCE);
    visit.sent_at - TOLERANCE..=latest
}

/// How many rows nobody was told of for which there is no visit that may have made them, each of
/// those having made no more than one.
fn strays(visits: &[Visit], moments: &[i64]) -> usize {
    let told: HashSet<_> = visits.iter().filter_map(row).collect();
    let untold = moments
        .iter()
        .enumerate()
        .filter(|(row, _)| !told.contains(row));
    let mut untold: Vec<_> = untold.map(|(_, moment)| *moment).collect();
    untold.sort_unstable();
    let makers = visits.iter().filter(|visit| {
        !matches!(
            visit.outcome,
            Outcome::Acknowledged { .. } | Outcome::NotSent
        )
    });
    let mut makers: Vec<_> = makers.map(arrival).collect();
    // Whoever may have made the earliest rows alone goes first.
    makers.sort_unstable_by_key(|arrival| *arrival.end());
    untold
        .into_iter()
        .filter(|moment| {
            let maker = makers.iter().position(|arrival| arrival.contains(moment));
            maker.map(|maker| makers.remove(maker)).is_none()
        })
        .count()
}

/// How many of them occurred before.
fn repeated(numbers: impl Iterator<Item = i64>) -> usize {
    let mut seen = HashSet::new();
    numbers.filter(|&number| !seen.insert(number)).count()
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    const SECOND: i64 = 1_000_000;

    fn visit(sent_at: i64, outcome: Outcome) -> Visit {
        Visit {
            sent: Instant::now(),
            sent_at,
            took: Duration::from_millis(100),
            outcome,
        }
    }

    fn told(sent_at: i64, total: i64) -> Visit {
        let redis = Some(total);
        visit(sent_at, Outcome::Acknowledged { total, redis })
    }

    #[test]
    fn visits_that_have_their_rows_are_neither_lost_nor_repeated() {
        let visits = [told(SECOND, 1), told(2 * SECOND, 2)];
        let found = verdict(
            &visits,
            &[SECOND, 2 * SECOND + 50_000],
            Doubt::default(),
            false,
        );
        let expected = Verdict {
            acknowledged: 2,
            rows: 2,
            ..Verdict::default()
        };
        assert_eq!(found, expected);
    }

    #[test]
    fn visit_whose_row_is_another_ones_is_lost() {
        let visits = [told(SECOND, 1), told(2 * SECOND, 2)];
        let found = verdict(&visits, &[SECOND, 3 * SECOND], Doubt::default(), false);
        assert_eq!(found.lost, 1);
        assert_eq!(verdict(&visits, &[SECOND], Doubt::default(), false).lost, 1);
    }

    #[test]
    fn number_told_twice_is_a_duplicate() {
        let visits = [told(SECOND, 1), told(SECOND, 1)];
        assert_eq!(
            verdict(&visits, &[SECOND], Doubt::default(), true).duplicated,
            1
        );
    }

    #[test]
    fn rows_that_no_visit_can_have_made_are_duplicates() {
        let doubt = Doubt {
            counted: 1,
            ..Doubt::default()
        };
        let of = |visits: &[Visit]| {
            let found = verdict(visits, &[SECOND; 4], doubt, false);
            (found.in_doubt, found.duplicated)
        };
        let unanswered = visit(SECOND, Outcome::Unanswered);
        let left = visit(SECOND, Outcome::Left);
        let refused = visit(SECOND, Outcome::Refused);
        assert_eq!(of(&[told(SECOND, 1), unanswered, left]), (2, 1));
        assert_eq!(of(&[told(SECOND, 1), unanswered, left, left]), (2, 0));
        assert_eq!(of(&[told(SECOND, 1), unanswered, left, refused]), (2, 0));
        let elsewhere = visit(2 * SECOND, Outcome::Left);
        assert_eq!(of(&[told(SECOND, 1), unanswered, left, elsewhere]), (2, 1));
    }

    #[test]
    fn each_row_that_nobody_was_told_of_needs_a_visit_of_its_own() {
        let refused = visit(SECOND, Outcome::Refused);
        let doubt = Doubt {
            counted: 2,
            ..Doubt::default()
        };
        let of = |visits: &[Visit], rows: &[i64]| verdict(visits, rows, doubt, false).duplicated;
        assert_eq!(of(&[refused], &[SECOND]), 0);
        assert_eq!(of(&[refused], &[SECOND, SECOND]), 1);
        assert_eq!(of(&[refused], &[2 * SECOND]), 1);
        // One may have made either row, the other only the second.
        let longer = Visit {
            took: Duration::from_secs(2),
            ..refused
        };
        assert_eq!(of(&[longer, refused], &[SECOND, 2 * SECOND]), 0);
        let not_sent = visit(SECOND, Outcome::NotSent);
        assert_eq!(of(&[not_sent], &[SECOND]), 1);
    }
}
