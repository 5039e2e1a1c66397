//! What became of what was acknowledged: the clients' numbers beside the table's rows.
//!
//! Rows carry no number, but the n-th row in the order of their ids is the one that a visit with the
//! number n was told of, as long as nobody deletes any. Its `data` is the moment when that visit
//! arrived, and must lie between the visit's beginning and its answer: so each acknowledged visit is
//! looked for in a row of its own, and not only in their sum.

use std::collections::HashSet;

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
    /// Visits of clients that wrote nothing down, and refusals whose service ended before it could
    /// be asked whether they were in doubt.
    pub unknown: usize,
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
    let unanswered = visits
        .iter()
        .filter(|visit| matches!(visit.outcome, Outcome::Unanswered | Outcome::Wrong(_)))
        .count();
    let acknowledged = acknowledged.count();
    let in_doubt = unanswered + doubt.counted;
    let mut duplicated = repeated(visits.iter().filter_map(Visit::total))
        + moments
            .len()
            .saturating_sub(acknowledged + in_doubt + doubt.unknown);
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
    let row = visit
        .total()
        .and_then(|total| usize::try_from(total - 1).ok());
    let Some(moment) = row.and_then(|row| moments.get(row)) else {
        return false;
    };
    let took = i64::try_from(visit.took.as_micros()).unwrap_or(i64::MAX);
    let earliest = visit.sent_at - TOLERANCE;
    (earliest..=visit.sent_at.saturating_add(took) + TOLERANCE).contains(moment)
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
        let visits = [told(SECOND, 1), visit(SECOND, Outcome::Unanswered)];
        let rows = [SECOND; 4];
        let doubt = Doubt {
            counted: 1,
            unknown: 0,
        };
        let found = verdict(&visits, &rows, doubt, false);
        assert_eq!((found.in_doubt, found.duplicated), (2, 1));
        let doubt = Doubt {
            unknown: 1,
            ..doubt
        };
        assert_eq!(verdict(&visits, &rows, doubt, false).duplicated, 0);
    }
}
