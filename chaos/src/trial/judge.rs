//! What is known once a trial's load has ended, and what of it must not be: clients, rows, the
//! service's own counters and Redis, each held against the others.

use anyhow::Result;
use lab::history::{History, Outcome, Visit, judge};
use lab::visitor::Visitor;

use super::{Attempt, LONGEST_ANSWER, MOMENT, Trial};
use crate::fault::{Harm, Kind};
use crate::service::Service;

impl Attempt<'_> {
    /// Ends the load and compares.
    pub(super) fn judge(mut self) -> Result<Trial> {
        let visits = self.ledger.stop();
        // The last are counted just after they are answered.
        std::thread::sleep(MOMENT);
        let counted = self.services.iter().map(Service::counted);
        let counted: Vec<_> = counted.collect::<Result<_>>()?;
        let in_doubt: usize = counted.iter().map(|counted| counted.in_doubt).sum();
        let known: usize = counted.iter().map(|counted| counted.recorded).sum();
        let further = self.visit_each_replica();
        let rows = self.ground.moments()?;
        self.compare_with_rows(&further, rows.len());
        let all = [&visits[..], &self.others, &further].concat();
        let recorded_since = further.iter().filter(|visit| visit.is_recorded()).count();
        let before = rows.len().saturating_sub(recorded_since);
        self.compare_with_counters(&all, before, known, in_doubt);
        let found = judge(History {
            visits: &all,
            rows: &rows,
            redis_outages: &self.redis_outages,
        });

        self.look_for_needless_harm(&visits);
        let sent = || {
            visits
                .iter()
                .filter(|visit| visit.outcome != Outcome::NotSent)
        };
        let longest = sent().map(Visit::took).max().unwrap_or_default();
        if longest > LONGEST_ANSWER {
            self.complain(format!("an answer took {longest:?}"));
        }
        // A client that connects just as a listener closes repeats its SYN after a second: that is
        // no wait of the fault's.
        let stop = self.stop;
        let meets_a_closing_listener = |visit: &&Visit| {
            visit.replica == 0
                && stop.is_some_and(|stop| (stop.asked..=stop.ended).contains(&visit.sent))
        };
        let longest = sent()
            .filter(|visit| !meets_a_closing_listener(visit))
            .map(Visit::took)
            .max()
            .unwrap_or_default();
        let refused = |visit: &&Visit| matches!(visit.outcome, Outcome::Refused | Outcome::InDoubt);
        let panics: Vec<_> = self.services.iter().flat_map(Service::panics).collect();
        self.complaints.extend(panics);
        let good = visits
            .iter()
            .filter(|visit| visit.is_recorded() && !meets_a_closing_listener(visit));
        Ok(Trial {
            fault: *self.fault,
            repetitions: self.strikes,
            verdict: found,
            refused: visits.iter().filter(refused).count(),
            first_errors: self.first_errors,
            recoveries: self.recoveries,
            worst_good: good.map(Visit::took).max().unwrap_or_default(),
            longest,
            stopped_in: self.stop.map(|stop| stop.ended - stop.asked),
            back_in: self.stop.and_then(|stop| stop.back_in),
            stalls: None,
            complaints: self.complaints,
        })
    }

    /// Makes one more visit to each replica, one after the other.
    fn visit_each_replica(&self) -> Vec<Visit> {
        let replicas = self.services.iter().enumerate();
        let visit = |(replica, service): (usize, &Service)| {
            let mut visitor = Visitor::new(usize::MAX, replica, service.address);
            self.ground.runtime.block_on(visitor.visit())
        };
        replicas.map(visit).collect()
    }

    /// The numbers of visits that were made alone are those of the rows, at each replica.
    fn compare_with_rows(&mut self, further: &[Visit], rows: usize) {
        for (visit, total) in further.iter().rev().zip((0..=rows).rev()) {
            let told = visit.total.and_then(|total| usize::try_from(total).ok());
            if told != Some(total) {
                let (replica, outcome) = (visit.replica, visit.outcome);
                self.complain(format!(
                    "replica {replica} says {told:?} ({outcome:?}) where {total} rows are"
                ));
            }
            // Redis counts what is committed, once: it may have missed some where there was harm,
            // and never knows more.
            let as_it_may_be = match self.fault.harm {
                Harm::Nothing => visit.redis == visit.total,
                Harm::Count | Harm::Visits => visit.redis <= visit.total,
            };
            if !as_it_may_be {
                let redis = visit.redis;
                self.complain(format!("Redis says {redis:?} where {total} rows are"));
            }
        }
    }

    /// Every row is known to a service, and every doubt of a client is known to it, except where a
    /// service took its counters along.
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
        let may_be = known + in_doubt + in_gaps;
        if !(known..=may_be).contains(&rows) {
            self.complain(format!(
                "{rows} rows where {known} to {may_be} were recorded"
            ));
        }
        let told = visits
            .iter()
            .filter(|visit| visit.outcome == Outcome::InDoubt)
            .count();
        let silent = visits.iter().filter(|visit| visit.is_in_doubt()).count() - told;
        if !(told.saturating_sub(in_gaps)..=told + silent + in_gaps).contains(&in_doubt) {
            self.complain(format!(
                "the service counted {in_doubt} visits in doubt, and told {told} clients so"
            ));
        }
        if self.fault.harm != Harm::Visits && in_doubt > 0 {
            self.complain(format!("{in_doubt} visits in doubt"));
        }
    }

    /// Visits that suffered what this fault does not excuse.
    fn look_for_needless_harm(&mut self, visits: &[Visit]) {
        let (fault, stop) = (self.fault, self.stop);
        let excused_by_the_stop = |visit: &Visit| {
            visit.replica == 0
                && stop.is_some_and(|stop| visit.ended >= stop.asked && visit.sent <= stop.back)
        };
        // Whoever asked before the stop is answered, whatever else happens then.
        let owed_no_answer = |visit: &Visit| {
            visit.replica == 0
                && (fault.kind == Kind::KillService
                    || stop.is_some_and(|stop| (stop.asked..=stop.back).contains(&visit.sent)))
        };
        let harm = |visit: &Visit| {
            if fault.strikes(visit.replica) {
                fault.harm
            } else {
                Harm::Nothing
            }
        };
        // A recorded visit is counted, and a refusal has the last reading, as long as Redis works.
        let is_redis_skipped = |visit: &Visit| {
            let is_answered = match visit.outcome {
                Outcome::Recorded | Outcome::Refused | Outcome::InDoubt => true,
                Outcome::Unanswered | Outcome::NotSent | Outcome::Left | Outcome::Wrong(_) => false,
            };
            fault.spares_redis() && is_answered && visit.redis.is_none()
        };
        let needless = |visit: &&Visit| match (visit.outcome, harm(visit)) {
            (Outcome::Wrong(_), _) => true,
            (Outcome::Unanswered, _) if !owed_no_answer(visit) => true,
            _ if is_redis_skipped(visit) => !excused_by_the_stop(visit),
            (_, Harm::Nothing) => !visit.is_good() && !excused_by_the_stop(visit),
            (_, Harm::Count) => !visit.is_recorded() && !excused_by_the_stop(visit),
            (_, Harm::Visits) => false,
        };
        let needless: Vec<_> = visits.iter().filter(needless).collect();
        if let Some(first) = needless.first() {
            self.complain(format!(
                "{} visits suffered that need not have; the first, to replica {}, came to {:?} and \
                 {:?} in Redis after {:?}",
                needless.len(),
                first.replica,
                first.outcome,
                first.redis,
                first.took()
            ));
        }
    }
}
