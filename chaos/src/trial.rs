//! Tests one fault: starts the load, injects and heals the fault, measures the recovery, and stops
//! a replica during the fault. `judge` then checks the acknowledged visits.

mod judge;

use std::ops::Range;
use std::time::{Duration, Instant};

use anyhow::Result;
use lab::history::{Outcome, Verdict, Visit};
use lab::stalls::{StallWatch, Stalls};

use crate::chance;
use crate::fault::{ActiveFault, Fault, Harm, Kind, Repair};
use crate::ground::{Ground, Needs, Store};
use crate::ledger::Ledger;
use crate::service::Service;

/// Durations and repetitions of a trial.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Repetitions of a fault that lasts.
    pub repetitions: usize,
    /// Repetitions of a kill.
    pub kills: usize,
    /// How long a fault lasts.
    pub hold: Duration,
    /// How long a paused store stays suspended.
    pub pause: Duration,
    /// How long visits must stay complete after a fault that lasts; the service checks its stores
    /// every second.
    pub aftermath: Duration,
    /// Whether to stop a replica during the fault.
    pub stop: bool,
    /// The number of faults that are tested at the same time.
    pub at_once: usize,
    /// How long a client pauses between two visits.
    pub visit_pause: Duration,
}

/// The result of a tested fault.
#[derive(Clone, Debug)]
pub struct Trial {
    /// The fault.
    pub fault: Fault,
    /// The number of repetitions.
    pub repetitions: usize,
    /// The judge's comparison of the table with the clients' numbers.
    pub verdict: Verdict,
    /// Visits with status 503.
    pub refused: usize,
    /// Time from each start of the fault to the first harmed visit, in seconds, if there was one.
    pub first_errors: Vec<f64>,
    /// Time from when the broken part worked again until every replica had made a complete visit,
    /// in seconds, if a visit was harmed.
    pub recoveries: Vec<f64>,
    /// The longest acknowledged visit.
    pub longest_recorded: Duration,
    /// The longest response.
    pub longest: Duration,
    /// How long a replica took to stop during the fault.
    pub time_to_stop: Option<Duration>,
    /// Time from the replica's next start, with both stores working, to its first complete visit.
    pub time_to_start: Option<Duration>,
    /// The machine's own delays meanwhile. Not measured if several faults are tested at the same
    /// time.
    pub stalls: Option<Stalls>,
    /// Violations that the fault does not excuse.
    pub violations: Vec<String>,
}

/// Maximum response time: `VISIT_TIMEOUT` plus a tenth.
pub const LONGEST_RESPONSE: Duration = Duration::from_millis(2200);
/// Maximum time to stop: `SHUTDOWN_TIMEOUT` plus a tenth.
pub const LONGEST_STOP: Duration = Duration::from_secs(11);

/// The number of visits before the first fault.
const WARM: usize = 200;
/// Timeout for complete visits after a fault.
const RECOVERY_TIMEOUT: Duration = Duration::from_secs(30);
/// How much longer a fault lasts at most, until it has harmed a visit to every replica.
const HARM_TIMEOUT: Duration = Duration::from_secs(5);
/// The pause between two kills, and before a stop.
const MOMENT: Duration = Duration::from_millis(300);
/// A fault that the service must recover from while active lasts longer than the allowed recovery.
const MIN_HOLD_TO_RECOVER: Duration = Duration::from_secs(3);
/// The maximum random delay before a fault is injected.
const RANDOM_DELAY: Duration = Duration::from_millis(60);

/// A fault under test.
struct Attempt<'a> {
    fault: &'a Fault,
    ground: &'a Ground,
    services: Vec<Service>,
    ledger: Ledger,
    /// Visits of clients other than the ledger's.
    others: Vec<Visit>,
    stop: Option<Stop>,
    /// The periods in which a service ended, with visits that its saved counters can miss.
    gaps: Vec<Range<Instant>>,
    /// The periods in which the fault's injection suspended the replicas.
    suspensions: Vec<Range<Instant>>,
    /// The periods in which Redis was certainly down.
    redis_outages: Vec<Range<Instant>>,
    strikes: usize,
    first_errors: Vec<f64>,
    recoveries: Vec<f64>,
    violations: Vec<String>,
}

/// A stop during a fault.
#[derive(Clone, Copy, Debug)]
struct Stop {
    asked: Instant,
    ended: Instant,
    /// When the restarted service made complete visits again, or a later bound.
    back: Instant,
    time_to_start: Option<Duration>,
}

/// Tests a fault.
pub fn run(fault: &Fault, effort: Effort) -> Result<Trial> {
    let is_alone = effort.at_once == 1;
    let ground = Ground::start(Needs {
        memory: !is_alone,
        ..fault.needs()
    })?;
    let watch = is_alone
        .then(|| StallWatch::start(&devstack::folder()?))
        .transpose()?;
    let services = (0..fault.replicas())
        .map(|_| Service::new(&ground))
        .collect::<Result<Vec<_>>>()?;
    let repetitions = if fault.is_a_kill() {
        effort.kills
    } else {
        effort.repetitions
    };
    let mut attempt = if fault.precedes_start() {
        Attempt::start_broken(fault, &ground, services, effort)?
    } else {
        let mut attempt = Attempt::start_healthy(fault, &ground, services, effort)?;
        for _ in 0..repetitions {
            attempt.strike(effort)?;
            if !attempt.violations.is_empty() {
                break;
            }
        }
        attempt
    };
    if effort.stop && !fault.precedes_start() {
        attempt.stop_during_fault(effort.aftermath)?;
    }
    let stalls = watch.map(StallWatch::stop);
    let trial = attempt.judge()?;
    Ok(Trial { stalls, ..trial })
}

impl<'a> Attempt<'a> {
    /// Starts the replicas and the load without the fault.
    fn start_healthy(
        fault: &'a Fault,
        ground: &'a Ground,
        mut services: Vec<Service>,
        effort: Effort,
    ) -> Result<Self> {
        for service in &mut services {
            service.start()?;
            service.wait_until_ready()?;
        }
        let attempt = Self::new(fault, ground, services, effort.visit_pause);
        let deadline = Instant::now() + RECOVERY_TIMEOUT;
        while attempt.ledger.count() < WARM && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(attempt)
    }

    /// Starts the replicas while the fault is active.
    fn start_broken(
        fault: &'a Fault,
        ground: &'a Ground,
        mut services: Vec<Service>,
        effort: Effort,
    ) -> Result<Self> {
        let active = fault.inject(ground, &mut services)?;
        let began = Instant::now();
        for service in &mut services {
            service.start()?;
        }
        let mut attempt = Self::new(fault, ground, services, effort.visit_pause);
        attempt.strikes = 1;
        if fault.kind == Kind::MigrationLocked {
            std::thread::sleep(effort.hold);
            if effort.stop {
                attempt.stop()?;
                attempt.services[0].start()?;
                std::thread::sleep(MOMENT);
            }
            let healed_at = Instant::now();
            let repair = active.heal(ground, &mut attempt.services)?;
            attempt.recover(0, began, began..healed_at, repair.at, effort.aftermath);
            attempt.mark_back(None);
        } else {
            if effort.stop {
                // Stops one replica as soon as it responds, while all of them start.
                attempt.services[0].wait_until_it_responds()?;
                attempt.stop()?;
            }
            let stays = usize::from(effort.stop);
            for service in &mut attempt.services[stays..] {
                service.wait_until_ready()?;
            }
            let ready = Instant::now();
            attempt.recoveries.push((ready - began).as_secs_f64());
            if effort.stop {
                attempt.services[0].start()?;
                let started = Instant::now();
                attempt.services[0].wait_until_ready()?;
                attempt.mark_back(Some(started.elapsed()));
            }
            attempt.check_aftermath(0, Instant::now(), effort.aftermath);
        }
        Ok(attempt)
    }

    fn new(
        fault: &'a Fault,
        ground: &'a Ground,
        services: Vec<Service>,
        visit_pause: Duration,
    ) -> Self {
        let addresses: Vec<_> = services.iter().map(|service| service.address).collect();
        Self {
            fault,
            ground,
            services,
            ledger: Ledger::start(ground.runtime.handle(), &addresses, visit_pause),
            others: Vec::new(),
            stop: None,
            gaps: Vec::new(),
            suspensions: Vec::new(),
            redis_outages: Vec::new(),
            strikes: 0,
            first_errors: Vec::new(),
            recoveries: Vec::new(),
            violations: Vec::new(),
        }
    }

    /// Runs one repetition.
    fn strike(&mut self, effort: Effort) -> Result<()> {
        self.strikes += 1;
        let from = self.ledger.count();
        std::thread::sleep(RANDOM_DELAY.mul_f64(chance::fraction()));
        let began = Instant::now();
        let active = self.inject()?;
        let injected_at = Instant::now();
        if self.fault.kind == Kind::KillService {
            self.gaps.push(began..injected_at);
        }
        // A part that is killed many times stays down only briefly.
        let is_killed_again = self.fault.is_a_kill() && effort.kills > 1;
        let hold = match self.fault.kind {
            Kind::Pause(_) => effort.pause,
            _ if is_killed_again => effort.hold.min(MOMENT),
            _ if self.fault.must_recover_while_active() => effort.hold.max(MIN_HOLD_TO_RECOVER),
            _ => effort.hold,
        };
        std::thread::sleep(hold);
        self.wait_for_harm(from, began);
        if let Some(missing) = active.missing_evidence(self.ground)? {
            self.report_violation(format!("the fault took no effect: {missing}"));
        }
        let healed_at = Instant::now();
        let Repair { at, others } = active.heal(self.ground, &mut self.services)?;
        self.note_redis_outage(injected_at..healed_at);
        self.check_effects(from, &(injected_at..healed_at), &others);
        self.others.extend(others);
        let due = if self.fault.must_recover_while_active() {
            began
        } else {
            at
        };
        let aftermath = if is_killed_again {
            MOMENT
        } else {
            effort.aftermath
        };
        self.recover(from, began, injected_at..healed_at, due, aftermath);
        Ok(())
    }

    fn inject(&mut self) -> Result<ActiveFault> {
        let began = Instant::now();
        let active = self.fault.inject(self.ground, &mut self.services)?;
        if self.fault.suspends_replicas() {
            self.suspensions.push(began..Instant::now());
        }
        Ok(active)
    }

    /// Waits until the fault has harmed a visit to every replica, if it must: while the machine's
    /// disk stalls, no visit gets far enough. If there is none, [`Self::first_error`] reports it.
    fn wait_for_harm(&self, from: usize, began: Instant) {
        if self.fault.must_harm_every_replica() {
            for replica in (0..self.services.len()).filter(|&replica| self.fault.affects(replica)) {
                self.first_harmed(replica, from, began, HARM_TIMEOUT);
            }
        }
    }

    /// Waits up to `timeout` for a visit to a replica that the fault has harmed.
    fn first_harmed(
        &self,
        replica: usize,
        from: usize,
        began: Instant,
        timeout: Duration,
    ) -> Option<Visit> {
        self.ledger.find(from, timeout, |visit| {
            visit.replica == replica && self.fault.is_harmed(visit) && visit.ended > began
        })
    }

    /// Checks that a fault without harm took effect: by the duration of visits, or by the visits of
    /// other clients.
    fn check_effects(&mut self, from: usize, meanwhile: &Range<Instant>, others: &[Visit]) {
        let shortest = self.fault.shortest_visit();
        let visits = self.ledger.since(from);
        let mut visits = visits
            .iter()
            .filter(|visit| visit.sent > meanwhile.start && visit.ended < meanwhile.end)
            .peekable();
        if visits.peek().is_none() && self.fault.harm == Harm::Nothing {
            self.report_violation("no visit was made during the fault".to_owned());
        }
        if let Some(quick) = visits.find(|visit| visit.took() < shortest) {
            let took = quick.took();
            self.report_violation(format!("the fault took no effect: a visit took {took:?}"));
        }
        let left = |visit: &Visit| visit.outcome == Outcome::Left;
        if self.fault.kind == Kind::Disconnects && !others.iter().any(left) {
            self.report_violation("the fault took no effect: no client disconnected".to_owned());
        }
    }

    /// Notes that Redis was killed and restarted, which restarts its counter.
    fn note_redis_outage(&mut self, down: Range<Instant>) {
        if self.fault.kind == Kind::Kill(Store::Redis) {
            self.redis_outages.push(down);
        }
    }

    /// Waits until every replica has made a complete visit after `due`, and checks that visits stay
    /// complete. The injection began at `began`; the fault was fully active during `active`.
    fn recover(
        &mut self,
        from: usize,
        began: Instant,
        active: Range<Instant>,
        due: Instant,
        aftermath: Duration,
    ) {
        let mut errors = Vec::new();
        let mut recovered = due;
        for replica in 0..self.services.len() {
            let is_struck = self.fault.affects(replica);
            let error = if is_struck {
                self.first_error(replica, from, began, &active)
            } else {
                None
            };
            let since = error.map_or(due, |error| error.ended.max(due));
            let Some(complete) = self.first_complete_visit(replica, from, due, since) else {
                return;
            };
            recovered = recovered.max(complete.ended);
            if let Some(error) = error {
                errors.push((error.ended - began, complete.ended - due));
            }
        }
        let first_error = errors.iter().map(|(error, _)| error.as_secs_f64());
        if let Some(first_error) = first_error.min_by(f64::total_cmp) {
            self.first_errors.push(first_error);
            let recoveries = errors.iter().map(|(_, recovery)| recovery.as_secs_f64());
            self.recoveries.extend(recoveries.max_by(f64::total_cmp));
        }
        self.check_aftermath(from, recovered, aftermath);
    }

    /// The first complete visit to a replica that was sent after `since`, when no visit from before
    /// `healed` can be harmed any more: with several batches in flight, one can be complete before
    /// the replica learns that another was lost, and refuses visits until a probe has succeeded.
    /// Reports a violation if there is none.
    fn first_complete_visit(
        &mut self,
        replica: usize,
        from: usize,
        healed: Instant,
        since: Instant,
    ) -> Option<Visit> {
        let ledger = &self.ledger;
        let complete = if ledger.wait_for_visits_before(from, healed, RECOVERY_TIMEOUT) {
            let visits = ledger.since(from).into_iter();
            let harmed = visits.filter(|visit| {
                visit.replica == replica && visit.sent < healed && !visit.is_complete()
            });
            let since = harmed.map(|visit| visit.ended).fold(since, Instant::max);
            ledger.find(from, RECOVERY_TIMEOUT, |visit| {
                visit.replica == replica && visit.is_complete() && visit.sent > since
            })
        } else {
            None
        };
        if complete.is_none() {
            self.report_violation(format!(
                "no complete visit to replica {replica} within {RECOVERY_TIMEOUT:?}"
            ));
        }
        complete
    }

    /// The first harmed visit to a replica. Reports a violation if there is none although the fault
    /// must harm one, or if a fault that harms every visit spared a later one.
    fn first_error(
        &mut self,
        replica: usize,
        from: usize,
        began: Instant,
        active: &Range<Instant>,
    ) -> Option<Visit> {
        let error = self.first_harmed(replica, from, began, Duration::ZERO);
        match error {
            Some(error) if self.fault.harms_every_visit() => {
                let spared = self.ledger.find(from, Duration::ZERO, |visit| {
                    visit.replica == replica
                        && visit.sent > error.ended.max(active.start)
                        && visit.ended < active.end
                        && !self.fault.is_harmed(visit)
                });
                if let Some(spared) = spared {
                    let after = spared.sent - began;
                    self.report_violation(format!(
                        "a visit {after:?} after the fault began was not harmed"
                    ));
                }
            }
            None if self.fault.must_harm_every_replica() => {
                self.report_violation(format!("no visit to replica {replica} was harmed"));
            }
            _ => {}
        }
        error
    }

    /// Checks that visits stay complete after `recovered`.
    fn check_aftermath(&mut self, from: usize, recovered: Instant, aftermath: Duration) {
        std::thread::sleep(aftermath);
        let relapse = self.ledger.find(from, Duration::ZERO, |visit| {
            !visit.is_complete() && visit.sent > recovered
        });
        if let Some(relapse) = relapse {
            self.report_violation(format!(
                "a visit {:?} after the recovery had the outcome {:?}",
                relapse.sent - recovered,
                relapse.outcome
            ));
        }
    }

    /// Stops a replica during the fault, and restarts it afterwards.
    fn stop_during_fault(&mut self, aftermath: Duration) -> Result<()> {
        let from = self.ledger.count();
        let began = Instant::now();
        let active = self.inject()?;
        let injected_at = Instant::now();
        std::thread::sleep(MOMENT);
        if self.fault.kind == Kind::KillService {
            self.gaps.push(began..injected_at);
            // A killed service must be restarted before it can be stopped.
            active.heal(self.ground, &mut self.services)?;
            self.services[0].wait_until_it_responds()?;
            self.stop()?;
        } else {
            self.stop()?;
            let healed_at = Instant::now();
            let repair = active.heal(self.ground, &mut self.services)?;
            self.note_redis_outage(injected_at..healed_at);
            self.others.extend(repair.others);
        }
        self.services[0].start()?;
        let started = Instant::now();
        let mut recovered = started;
        for replica in 0..self.services.len() {
            let Some(complete) = self.first_complete_visit(replica, from, started, started) else {
                return Ok(());
            };
            if replica == 0 {
                self.mark_back(Some(complete.ended - started));
            }
            recovered = recovered.max(complete.ended);
        }
        self.check_aftermath(from, recovered, aftermath);
        self.services
            .iter_mut()
            .try_for_each(Service::wait_until_ready)
    }

    /// Notes that the stopped replica works again.
    fn mark_back(&mut self, time_to_start: Option<Duration>) {
        if let Some(stop) = &mut self.stop {
            stop.back = Instant::now();
            stop.time_to_start = time_to_start;
        }
    }

    fn stop(&mut self) -> Result<()> {
        let counted = Instant::now();
        let asked = self.services[0].terminate()?;
        let ended = self.services[0].wait_for_exit(LONGEST_STOP + Duration::from_secs(1))?;
        let took = asked.elapsed();
        match ended {
            None => self.report_violation("the replica did not stop and was killed".to_owned()),
            Some(false) => self.report_violation("the replica stopped with a failure".to_owned()),
            Some(true) if took > LONGEST_STOP => {
                self.report_violation(format!("the replica took {took:?} to stop"));
            }
            Some(true) => {}
        }
        let ended = asked + took;
        self.gaps.push(counted..ended);
        self.stop = Some(Stop {
            asked,
            ended,
            back: ended + RECOVERY_TIMEOUT,
            time_to_start: None,
        });
        Ok(())
    }

    fn report_violation(&mut self, violation: String) {
        self.violations.push(violation);
    }
}
