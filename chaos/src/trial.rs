//! One fault: load, the fault, its end, how soon visits are good again, and a stop in the midst of
//! it. What became of what had been acknowledged is for `judge`.

mod judge;

use std::ops::Range;
use std::time::{Duration, Instant};

use anyhow::Result;
use lab::history::{Outcome, Verdict, Visit};
use lab::stalls::{StallWatch, Stalls};

use crate::chance;
use crate::fault::{Fault, Harm, Kind, Repair};
use crate::ground::{Ground, Store, obstacle};
use crate::ledger::Ledger;
use crate::service::Service;

/// How long and how often.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Of a fault that lasts.
    pub repetitions: usize,
    /// Of a kill.
    pub kills: usize,
    /// How long a fault lasts.
    pub hold: Duration,
    /// How long a paused store stands still.
    pub pause: Duration,
    /// How long visits are to stay good after a fault that lasts; the service looks at its stores
    /// every second.
    pub aftermath: Duration,
    /// Whether the service is asked to stop during the fault, too.
    pub stop: bool,
    /// How many faults are tried at the same time.
    pub at_once: usize,
    /// How long a client pauses between two visits.
    pub visit_pause: Duration,
}

/// What came of a fault.
#[derive(Clone, Debug)]
pub struct Trial {
    /// Which it was.
    pub fault: Fault,
    /// How often it struck.
    pub repetitions: usize,
    /// The table beside the clients' numbers.
    pub verdict: Verdict,
    /// Visits that were answered 503.
    pub refused: usize,
    /// From each strike to the first visit that was not good, in seconds; none where there was none.
    pub first_errors: Vec<f64>,
    /// From when it worked again until every replica had made a good visit, in seconds, where there
    /// had been an error.
    pub recoveries: Vec<f64>,
    /// The worst latency of a visit that was acknowledged.
    pub worst_good: Duration,
    /// The worst latency of any answer.
    pub longest: Duration,
    /// How long the service took to stop in the midst of it.
    pub stopped_in: Option<Duration>,
    /// From its next start, when all worked again, to the first good visit.
    pub back_in: Option<Duration>,
    /// What the machine kept waiting meanwhile. Faults that are tried at the same time do not know.
    pub stalls: Option<Stalls>,
    /// What the fault does not excuse.
    pub complaints: Vec<String>,
}

/// `VISIT_TIMEOUT` and a tenth: nobody waits longer.
pub const LONGEST_ANSWER: Duration = Duration::from_millis(2200);
/// `SHUTDOWN_TIMEOUT` and a tenth.
pub const LONGEST_STOP: Duration = Duration::from_secs(11);

/// Visits that are made before anything breaks.
const WARM: usize = 200;
/// When to give up on good visits.
const PATIENCE: Duration = Duration::from_secs(30);
/// Between two kills, and before a stop.
const MOMENT: Duration = Duration::from_millis(300);
/// What is to be overcome lasts longer than it may take.
const OVERCOME: Duration = Duration::from_secs(3);
/// A strike comes after a random delay of up to this.
const RANDOM_DELAY: Duration = Duration::from_millis(60);

/// A fault that is being tried.
struct Attempt<'a> {
    fault: &'a Fault,
    ground: &'a Ground,
    services: Vec<Service>,
    ledger: Ledger,
    /// Visits of others than the ledger's clients.
    others: Vec<Visit>,
    stop: Option<Stop>,
    /// When services ended whose counters went with them.
    gaps: Vec<Range<Instant>>,
    /// When Redis was certainly down between two of its lives.
    redis_outages: Vec<Range<Instant>>,
    strikes: usize,
    first_errors: Vec<f64>,
    recoveries: Vec<f64>,
    complaints: Vec<String>,
}

/// A stop in the midst of a fault.
#[derive(Clone, Copy, Debug)]
struct Stop {
    asked: Instant,
    ended: Instant,
    /// When the service that was started again was good, or everything ended.
    back: Instant,
    back_in: Option<Duration>,
}

/// Why it cannot be tried here, if it cannot.
pub fn hindrance(fault: &Fault) -> Option<String> {
    obstacle(fault.needs())
}

/// Tries a fault.
pub fn run(fault: &Fault, effort: Effort) -> Result<Trial> {
    let ground = Ground::start(fault.needs())?;
    let watch = (effort.at_once == 1)
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
    let mut attempt = if fault.comes_first() {
        Attempt::broken(fault, &ground, services, effort)?
    } else {
        let mut attempt = Attempt::whole(fault, &ground, services, effort)?;
        for _ in 0..repetitions {
            attempt.strike(effort)?;
            if !attempt.complaints.is_empty() {
                break;
            }
        }
        attempt
    };
    if effort.stop && !fault.comes_first() {
        attempt.stop_in_its_midst(effort.aftermath)?;
    }
    let stalls = watch.map(StallWatch::stop);
    let trial = attempt.judge()?;
    Ok(Trial { stalls, ..trial })
}

impl<'a> Attempt<'a> {
    /// Everything works, and visits are made.
    fn whole(
        fault: &'a Fault,
        ground: &'a Ground,
        mut services: Vec<Service>,
        effort: Effort,
    ) -> Result<Self> {
        for service in &mut services {
            service.start()?;
            service.until_ready()?;
        }
        let attempt = Self::of(fault, ground, services, effort.visit_pause);
        let deadline = Instant::now() + PATIENCE;
        while attempt.ledger.made() < WARM && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(attempt)
    }

    /// The service starts while the fault is there already.
    fn broken(
        fault: &'a Fault,
        ground: &'a Ground,
        mut services: Vec<Service>,
        effort: Effort,
    ) -> Result<Self> {
        let injected = fault.inject(ground, &mut services)?;
        let began = Instant::now();
        for service in &mut services {
            service.start()?;
        }
        let mut attempt = Self::of(fault, ground, services, effort.visit_pause);
        attempt.strikes = 1;
        if fault.kind == Kind::MigrationLocked {
            std::thread::sleep(effort.hold);
            if effort.stop {
                attempt.stop()?;
                attempt.services[0].start()?;
                std::thread::sleep(MOMENT);
            }
            let mended = Instant::now();
            let healed = injected.heal(ground, &mut attempt.services)?;
            attempt.recover(0, began, began..mended, healed.at, effort.aftermath);
            attempt.mark_back(None);
        } else {
            if effort.stop {
                // One of them, as soon as it can be asked, while all of them start.
                attempt.services[0].until_it_answers()?;
                attempt.stop()?;
            }
            let stays = usize::from(effort.stop);
            for service in &mut attempt.services[stays..] {
                service.until_ready()?;
            }
            let ready = Instant::now();
            attempt.recoveries.push((ready - began).as_secs_f64());
            if effort.stop {
                attempt.services[0].start()?;
                let started = Instant::now();
                attempt.services[0].until_ready()?;
                attempt.mark_back(Some(started.elapsed()));
            }
            attempt.see_to_the_aftermath(0, Instant::now(), effort.aftermath);
        }
        Ok(attempt)
    }

    fn of(
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
            redis_outages: Vec::new(),
            strikes: 0,
            first_errors: Vec::new(),
            recoveries: Vec::new(),
            complaints: Vec::new(),
        }
    }

    /// One repetition.
    fn strike(&mut self, effort: Effort) -> Result<()> {
        self.strikes += 1;
        let from = self.ledger.made();
        std::thread::sleep(RANDOM_DELAY.mul_f64(chance::fraction()));
        let began = Instant::now();
        let injected = self.fault.inject(self.ground, &mut self.services)?;
        let whole = Instant::now();
        if self.fault.kind == Kind::KillService {
            self.gaps.push(began..whole);
        }
        // What is killed many times is away for a moment only, and soon killed again.
        let is_killed_again = self.fault.is_a_kill() && effort.kills > 1;
        let hold = match self.fault.kind {
            Kind::Pause(_) => effort.pause,
            _ if is_killed_again => effort.hold.min(MOMENT),
            _ if self.fault.is_overcome() => effort.hold.max(OVERCOME),
            _ => effort.hold,
        };
        std::thread::sleep(hold);
        if let Some(missing) = injected.missing_evidence(self.ground)? {
            self.complain(format!("it took no effect: {missing}"));
        }
        let mended = Instant::now();
        let Repair { at, others } = injected.heal(self.ground, &mut self.services)?;
        self.note_redis_outage(whole..mended);
        self.look_for_effects(from, &(whole..mended), &others);
        self.others.extend(others);
        let due = if self.fault.is_overcome() { began } else { at };
        let aftermath = if is_killed_again {
            MOMENT
        } else {
            effort.aftermath
        };
        self.recover(from, began, whole..mended, due, aftermath);
        Ok(())
    }

    /// A fault that harms no visit shows in how long visits take, or in what other clients did.
    fn look_for_effects(&mut self, from: usize, meanwhile: &Range<Instant>, others: &[Visit]) {
        let shortest = self.fault.shortest_visit();
        let visits = self.ledger.since(from);
        let mut visits = visits
            .iter()
            .filter(|visit| visit.sent > meanwhile.start && visit.ended < meanwhile.end)
            .peekable();
        if visits.peek().is_none() && self.fault.harm == Harm::Nothing {
            self.complain("no visit was made meanwhile".to_owned());
        }
        if let Some(quick) = visits.find(|visit| visit.took() < shortest) {
            let took = quick.took();
            self.complain(format!("it took no effect: a visit took {took:?}"));
        }
        let left = |visit: &Visit| visit.outcome == Outcome::Left;
        if self.fault.kind == Kind::Disconnects && !others.iter().any(left) {
            self.complain("it took no effect: no client left".to_owned());
        }
    }

    /// Redis has been killed and started again: its counter starts over.
    fn note_redis_outage(&mut self, down: Range<Instant>) {
        if self.fault.kind == Kind::Kill(Store::Redis) {
            self.redis_outages.push(down);
        }
    }

    /// Waits until every replica has made a good visit after `due`, and looks whether visits stay
    /// good. The fault has taken from `began` on to become `whole`.
    fn recover(
        &mut self,
        from: usize,
        began: Instant,
        whole: Range<Instant>,
        due: Instant,
        aftermath: Duration,
    ) {
        let mut errors = Vec::new();
        let mut recovered = due;
        for replica in 0..self.services.len() {
            let is_struck = self.fault.strikes(replica);
            let error = if is_struck {
                self.first_error(replica, from, began, &whole)
            } else {
                None
            };
            let since = error.map_or(due, |error| error.ended.max(due));
            let good = self.ledger.find(from, PATIENCE, |visit| {
                visit.replica == replica && visit.is_good() && visit.ended > since
            });
            let Some(good) = good else {
                self.complain(format!(
                    "no good visit to replica {replica} within {PATIENCE:?}"
                ));
                return;
            };
            recovered = recovered.max(good.ended);
            if let Some(error) = error {
                errors.push((error.ended - began, good.ended - due));
            }
        }
        let first_error = errors.iter().map(|(error, _)| error.as_secs_f64());
        if let Some(first_error) = first_error.min_by(f64::total_cmp) {
            self.first_errors.push(first_error);
            let recoveries = errors.iter().map(|(_, recovery)| recovery.as_secs_f64());
            self.recoveries.extend(recoveries.max_by(f64::total_cmp));
        }
        self.see_to_the_aftermath(from, recovered, aftermath);
    }

    /// The first visit to a replica that the fault has harmed. Complains if there is none, or if a
    /// later one was spared by a fault that spares none.
    fn first_error(
        &mut self,
        replica: usize,
        from: usize,
        began: Instant,
        whole: &Range<Instant>,
    ) -> Option<Visit> {
        let harm = self.fault.harm;
        let is_harmed = |visit: &Visit| match harm {
            Harm::Visits => !visit.is_recorded(),
            Harm::Nothing | Harm::Count => !visit.is_good(),
        };
        let error = self.ledger.find(from, Duration::ZERO, |visit| {
            visit.replica == replica && is_harmed(visit) && visit.ended > began
        });
        match error {
            Some(error) if self.fault.is_complete() => {
                let spared = self.ledger.find(from, Duration::ZERO, |visit| {
                    visit.replica == replica
                        && visit.sent > error.ended.max(whole.start)
                        && visit.ended < whole.end
                        && !is_harmed(visit)
                });
                if let Some(spared) = spared {
                    let after = spared.sent - began;
                    self.complain(format!("a visit {after:?} after it began was spared"));
                }
            }
            None if harm != Harm::Nothing => {
                self.complain(format!("no visit to replica {replica} noticed it"));
            }
            _ => {}
        }
        error
    }

    /// After `recovered` visits are to stay good.
    fn see_to_the_aftermath(&mut self, from: usize, recovered: Instant, aftermath: Duration) {
        std::thread::sleep(aftermath);
        let relapse = self.ledger.find(from, Duration::ZERO, |visit| {
            !visit.is_good() && visit.sent > recovered
        });
        if let Some(relapse) = relapse {
            self.complain(format!(
                "a visit {:?} after the recovery came to {:?}",
                relapse.sent - recovered,
                relapse.outcome
            ));
        }
    }

    /// Asks the service to stop while the fault is there, and starts it again after it.
    fn stop_in_its_midst(&mut self, aftermath: Duration) -> Result<()> {
        let from = self.ledger.made();
        let began = Instant::now();
        let injected = self.fault.inject(self.ground, &mut self.services)?;
        let whole = Instant::now();
        std::thread::sleep(MOMENT);
        if self.fault.kind == Kind::KillService {
            self.gaps.push(began..whole);
            // There is nobody to ask before it starts again.
            injected.heal(self.ground, &mut self.services)?;
            self.services[0].until_it_answers()?;
            self.stop()?;
        } else {
            self.stop()?;
            let mended = Instant::now();
            let healed = injected.heal(self.ground, &mut self.services)?;
            self.note_redis_outage(whole..mended);
            self.others.extend(healed.others);
        }
        self.services[0].start()?;
        let started = Instant::now();
        let mut recovered = started;
        for replica in 0..self.services.len() {
            let good = self.ledger.find(from, PATIENCE, |visit| {
                visit.replica == replica && visit.is_good() && visit.sent > started
            });
            let Some(good) = good else {
                self.complain(format!(
                    "no good visit to replica {replica} within {PATIENCE:?} after a stop"
                ));
                return Ok(());
            };
            if replica == 0 {
                self.mark_back(Some(good.ended - started));
            }
            recovered = recovered.max(good.ended);
        }
        self.see_to_the_aftermath(from, recovered, aftermath);
        self.services.iter_mut().try_for_each(Service::until_ready)
    }

    /// The service that was asked to stop works again.
    fn mark_back(&mut self, back_in: Option<Duration>) {
        if let Some(stop) = &mut self.stop {
            stop.back = Instant::now();
            stop.back_in = back_in;
        }
    }

    fn stop(&mut self) -> Result<()> {
        let counted = Instant::now();
        let asked = self.services[0].terminate()?;
        let ended = self.services[0].ended_within(LONGEST_STOP + Duration::from_secs(1))?;
        let took = asked.elapsed();
        match ended {
            None => self.complain("it did not stop, and was killed".to_owned()),
            Some(false) => self.complain("it stopped with a failure".to_owned()),
            Some(true) if took > LONGEST_STOP => self.complain(format!("it stopped in {took:?}")),
            Some(true) => {}
        }
        let ended = asked + took;
        self.gaps.push(counted..ended);
        self.stop = Some(Stop {
            asked,
            ended,
            back: ended + PATIENCE,
            back_in: None,
        });
        Ok(())
    }

    fn complain(&mut self, complaint: String) {
        self.complaints.push(complaint);
    }
}
