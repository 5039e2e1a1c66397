//! Judges a trial after its load has ended: compares clients, rows, the service's own counters and
//! Redis with each other.

use std::ops::Range;
use std::time::{Duration, Instant};

use anyhow::Result;
use lab::history::{History, Outcome, Visit, judge};
use lab::visitor::Visitor;

use super::{Attempt, LONGEST_RESPONSE, MOMENT, Trial};
use crate::fault::{Harm, Kind};
use crate::service::Service;

impl Attempt<'_> {
    /// Ends the load and compares the records.
    pub(super) fn judge(mut self) -> Result<Trial> {
        let visits = self.ledger.stop();
        // The service counts the last visits just after their responses.
        std::thread::sleep(MOMENT);
        let counted = self.services.iter().map(Service::counters);
        let counted: Vec<_> = counted.collect::<Result<_>>()?;
        let in_doubt: usize = counted.iter().map(|counted| counted.in_doubt).sum();
        let known: usize = counted.iter().map(|counted| counted.recorded).sum();
        let further = self.visit_each_replica();
        let rows = self.ground.row_times()?;
        self.compare_with_rows(&further, rows.len());
        let all = [&visits[..], &self.others, &further].concat();
        let recorded_since = further.iter().filter(|visit| visit.is_recorded()).count();
        let before = rows.len().saturating_sub(recorded_since);
        self.compare_with_counters(&all, before, known, in_doubt);
        let verdict = judge(History {
            visits: &all,
            rows: &rows,
            redis_outages: &self.redis_outages,
        });

        self.check_unexcused_harm(&visits);
        let sent = || {
            visits
                .iter()
                .filter(|visit| visit.outcome != Outcome::NotSent)
        };
        let suspensions = std::mem::take(&mut self.suspensions);
        let took = |visit: &Visit| took_without(visit, &suspensions);
        let longest = sent().map(took).max().unwrap_or_default();
        if longest > LONGEST_RESPONSE {
            self.report_violation(format!("a response took {longest:?}"));
        }
        // A client that connects just as a listener closes repeats its SYN after a second: that
        // delay is not the fault's.
        let stop = self.stop;
        let meets_a_closing_listener = |visit: &&Visit| {
            visit.replica == 0
                && stop.is_some_and(|stop| (stop.asked..=stop.ended).contains(&visit.sent))
        };
        let longest = sent()
            .filter(|visit| !meets_a_closing_listener(visit))
            .map(took)
            .max()
            .unwrap_or_default();
        let refused = |visit: &&Visit| matches!(visit.outcome, Outcome::Refused | Outcome::InDoubt);
        let panics: Vec<_> = self.services.iter().flat_map(Service::panics).collect();
        self.violations.extend(panics);
        let recorded = visits
            .iter()
            .filter(|visit| visit.is_recorded() && !meets_a_closing_listener(visit));
        Ok(Trial {
            fault: *self.fault,
            repetitions: self.strikes,
            verdict,
            refused: visits.iter().filter(refused).count(),
            first_errors: self.first_errors,
            recoveries: self.recoveries,
            longest_recorded: recorded.map(took).max().unwrap_or_default(),
            longest,
            time_to_stop: self.stop.map(|stop| stop.ended - stop.asked),
            time_to_start: self.stop.and_then(|stop| stop.time_to_start),
            stalls: None,
            violations: self.violations,
        })
    }

    /// Makes one more visit to each replica, in sequence.
    fn visit_each_replica(&self) -> Vec<Visit> {
        let replicas = self.services.iter().enumerate();
        let visit = |(replica, service): (usize, &Service)| {
            let mut visitor = Visitor::new(usize::MAX, replica, service.address);
            self.ground.runtime.block_on(visitor.visit())
        };
        replicas.map(visit).collect()
    }

    /// Checks that these sequential visits got the numbers of the last rows, at each replica.
    fn compare_with_rows(&mut self, further: &[Visit], rows: usize) {
        for (visit, total) in further.iter().rev().zip((0..=rows).rev()) {
            let returned = visit.total.and_then(|total| usize::try_from(total).ok());
            if returned != Some(total) {
                let (replica, outcome) = (visit.replica, visit.outcome);
                self.report_violation(format!(
                    "replica {replica} returned {returned:?} ({outcome:?}) with {total} rows in the table"
                ));
            }
            // Redis counts committed visits once: it can miss some if visits were harmed, and never
            // counts more.
            let is_allowed = match self.fault.harm {
                Harm::Nothing => visit.redis == visit.total,
                Harm::Count | Harm::Visits => visit.redis <= visit.total,
            };
            if !is_allowed {
                let redis = visit.redis;
                self.report_violation(format!(
                    "Redis returned {redis:?} with {total} rows in the table"
                ));
            }
        }
    }

    /// Checks that a service counted every row and every visit in doubt, except while a service
    /// ended with unsaved counters.
    fn compare_with_counters(
        &mut self,
        visits: &[Visit],
        rows: usize,
        known: usize,
        in_doubt: usize,
    ) {
        let in_a_gap = |visit: &&Visit| {
            let mut gaps = self.gaps.iter();
            visit.outcome != Outcome::NotSent
                && gaps.any(|gap| visit.ended >= gap.start && visit.sent <= gap.end)
        };
        let in_gaps = visits.iter().filter(in_a_gap).count();
        let most = known + in_doubt + in_gaps;
        if !(known..=most).contains(&rows) {
            self.report_violation(format!(
                "{rows} rows in the table, but {known} to {most} visits were recorded"
            ));
        }
        let confirmed = visits
            .iter()
            .filter(|visit| visit.outcome == Outcome::InDoubt)
            .count();
        let silent = visits.iter().filter(|visit| visit.is_in_doubt()).count() - confirmed;
        if !(confirmed.saturating_sub(in_gaps)..=confirmed + silent + in_gaps).contains(&in_doubt) {
            self.report_violation(format!(
                "the service counted {in_doubt} visits in doubt, but {confirmed} clients got such a response"
            ));
        }
        if self.fault.harm != Harm::Visits && in_doubt > 0 {
            self.report_violation(format!("{in_doubt} visits in doubt"));
        }
    }

    /// Checks for harmed visits that the fault does not excuse.
    fn check_unexcused_harm(&mut self, visits: &[Visit]) {
        let (fault, stop) = (self.fault, self.stop);
        let excused_by_the_stop = |visit: &Visit| {
            visit.replica == 0
                && stop.is_some_and(|stop| visit.ended >= stop.asked && visit.sent <= stop.back)
        };
        // Requests sent before the stop must get a response.
        let needs_no_response = |visit: &Visit| {
            visit.replica == 0
                && (fault.kind == Kind::KillService
                    || stop.is_some_and(|stop| (stop.asked..=stop.back).contains(&visit.sent)))
        };
        let harm = |visit: &Visit| {
            if fault.affects(visit.replica) {
                fault.harm
            } else {
                Harm::Nothing
            }
        };
        // While Redis works, a recorded visit is counted and a refusal has the last number from
        // Redis.
        let is_redis_skipped = |visit: &Visit| {
            let has_response = match visit.outcome {
                Outcome::Recorded | Outcome::Refused | Outcome::InDoubt => true,
                Outcome::NoResponse | Outcome::NotSent | Outcome::Left | Outcome::Wrong(_) => false,
            };
            fault.spares_redis() && has_response && visit.redis.is_none()
        };
        let unexcused = |visit: &&Visit| match (visit.outcome, harm(visit)) {
            (Outcome::Wrong(_), _) => true,
            (Outcome::NoResponse, _) if !needs_no_response(visit) => true,
            _ if is_redis_skipped(visit) => !excused_by_the_stop(visit),
            (_, Harm::Nothing) => !visit.is_complete() && !excused_by_the_stop(visit),
            (_, Harm::Count) => !visit.is_recorded() && !excused_by_the_stop(visit),
            (_, Harm::Visits) => false,
        };
        let unexcused: Vec<_> = visits.iter().filter(unexcused).collect();
        if let Some(first) = unexcused.first() {
            self.report_violation(format!(
                "the fault does not excuse {} harmed visits; the first, to replica {}, had the outcome \
                 {:?} and the number {:?} from Redis after {:?}",
                unexcused.len(),
                first.replica,
                first.outcome,
                first.redis,
                first.took()
            ));
        }
    }
}

/// How long the client waited, without the time in which the test itself suspended the replicas.
fn took_without(visit: &Visit, suspensions: &[Range<Instant>]) -> Duration {
    let overlap = |period: &Range<Instant>| {
        let (start, end) = (visit.sent.max(period.start), visit.ended.min(period.end));
        end.saturating_duration_since(start)
    };
    let suspended: Duration = suspensions.iter().map(overlap).sum();
    visit.took().saturating_sub(suspended)
}
