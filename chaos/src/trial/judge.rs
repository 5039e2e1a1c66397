//! What is known once a trial's load has ended, and what of it must not be: clients, rows, the
//! service's own counters and Redis, each held against the others.

use anyhow::Result;
use bench::client;

use super::{Attempt, LONGEST_ANSWER, MOMENT, Trial};
use crate::fault::{Harm, Kind};
use crate::service::Service;
use crate::verdict::{Doubt, verdict};
use crate::visitor::{Outcome, Visit};

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
        let moments = self.rows_after_one_more()?;
        let all = [&visits[..], &self.others].concat();
        // No row that no service knows of, but for visits whose service took its counters along.
        let in_a_gap = |visit: &&Visit| {
            let mut gaps = self.gaps.iter();
            visit.outcome != Outcome::NotSent
                && gaps.any(|gap| visit.answered() >= gap.start && visit.sent <= gap.end)
        };
        let may_be = known + in_doubt + all.iter().filter(in_a_gap).count();
        if !(known..=may_be).contains(&moments.len()) {
            let rows = moments.len();
            self.complain(format!(
                "{rows} rows where {known} to {may_be} were recorded"
            ));
        }
        if self.fault.harm != Harm::Visits && in_doubt > 0 {
            self.complain(format!("{in_doubt} visits in doubt"));
        }
        let refused = |visit: &&Visit| visit.outcome == Outcome::Refused;
        let doubt = Doubt {
            counted: in_doubt,
            // Nobody can be asked any more which of these were in doubt.
            unasked: self.stop.map_or(0, |stop| {
                let meanwhile = |visit: &&Visit| {
                    refused(visit) && (stop.counted..=stop.ended).contains(&visit.answered())
                };
                visits.iter().filter(meanwhile).count()
            }),
        };
        let found = verdict(&all, &moments, doubt, self.fault.counter_starts_over());

        self.look_for_needless_harm(&visits);
        let answers = visits
            .iter()
            .filter(|visit| visit.outcome != Outcome::NotSent);
        let longest = answers.map(|visit| visit.took).max().unwrap_or_default();
        if longest > LONGEST_ANSWER {
            self.complain(format!("an answer took {longest:?}"));
        }
        let panics: Vec<_> = self.services.iter().flat_map(Service::panics).collect();
        self.complaints.extend(panics);
        let good = visits.iter().filter(|visit| visit.total().is_some());
        Ok(Trial {
            fault: *self.fault,
            repetitions: self.strikes,
            verdict: found,
            refused: visits.iter().filter(refused).count(),
            first_errors: self.first_errors,
            recoveries: self.recoveries,
            worst_good: good.map(|visit| visit.took).max().unwrap_or_default(),
            longest,
            stopped_in: self.stop.map(|stop| stop.ended - stop.asked),
            back_in: self.stop.and_then(|stop| stop.back_in),
            complaints: self.complaints,
        })
    }

    /// Makes one more visit, alone: its number is that of the rows. Returns the others' rows.
    fn rows_after_one_more(&mut self) -> Result<Vec<i64>> {
        let further = client::numbers(self.services[0].address);
        let mut moments = self.ground.moments()?;
        let rows = moments.len();
        match further {
            Ok((total, redis)) => {
                if usize::try_from(total).ok() != Some(rows) {
                    self.complain(format!("the service says {total} where {rows} rows are"));
                }
                // Redis counts what is committed, once: it may have missed some where there was
                // harm, and never knows more.
                let as_it_may_be = match self.fault.harm {
                    Harm::Nothing => redis == Some(total),
                    Harm::Count | Harm::Visits => redis.is_none_or(|redis| redis <= total),
                };
                if !as_it_may_be {
                    self.complain(format!("Redis says {redis:?} where {rows} rows are"));
                }
                moments.pop();
            }
            Err(error) => self.complain(format!("a visit after it all: {error:#}")),
        }
        Ok(moments)
    }

    /// Visits that suffered what this fault does not excuse.
    fn look_for_needless_harm(&mut self, visits: &[Visit]) {
        let (fault, stop) = (self.fault, self.stop);
        let excused_by_the_stop = |visit: &Visit| {
            stop.is_some_and(|stop| visit.answered() >= stop.asked && visit.sent <= stop.back)
        };
        // Whoever asked before the stop is answered, whatever else happens then.
        let owed_no_answer = |visit: &Visit| {
            fault.kind == Kind::KillService
                || stop.is_some_and(|stop| (stop.asked..=stop.back).contains(&visit.sent))
        };
        let needless = |visit: &&Visit| match (visit.outcome, fault.harm) {
            (Outcome::Wrong(_), _) => true,
            (Outcome::Unanswered, _) if !owed_no_answer(visit) => true,
            (_, Harm::Nothing) => !visit.is_good() && !excused_by_the_stop(visit),
            (_, Harm::Count) => visit.total().is_none() && !excused_by_the_stop(visit),
            (_, Harm::Visits) => false,
        };
        let needless: Vec<_> = visits.iter().filter(needless).collect();
        if let Some(first) = needless.first() {
            self.complain(format!(
                "{} visits suffered that need not have; the first came to {:?} after {:?}",
                needless.len(),
                first.outcome,
                first.took
            ));
        }
    }
}
