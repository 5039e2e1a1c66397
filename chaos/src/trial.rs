//! One fault: load, the fault, its end, how soon visits are good again, and a stop in the midst of
//! it. What became of what had been acknowledged is for `judge`.

mod judge;

use std::ops::Range;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::chance;
use crate::fault::{Fault, Harm, Healed, Kind};
use crate::ground::{Ground, obstacle};
use crate::ledger::Ledger;
use crate::service::Service;
use crate::verdict::Verdict;
use crate::visitor::Visit;

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
    /// From when it worked again to the first good visit, in seconds, where there had been an error.
    pub recoveries: Vec<f64>,
    /// The worst latency of a visit that was acknowledged.
    pub worst_good: Duration,
    /// The worst latency of any answer.
    pub longest: Duration,
    /// How long the service took to stop in the midst of it.
    pub stopped_in: Option<Duration>,
    /// From its next start, when all worked again, to the first good visit.
    pub back_in: Option<Duration>,
    /// What must not be.
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
/// A strike comes within this, at a moment that nobody has chosen.
const SOME_MOMENT: Duration = Duration::from_millis(60);

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
    strikes: usize,
    first_errors: Vec<f64>,
    recoveries: Vec<f64>,
    complaints: Vec<String>,
}

/// A stop in the midst of a fault.
#[derive(Clone, Copy, Debug)]
struct Stop {
    /// When it was asked what it had counted, just before.
    counted: Instant,
    asked: Instant,
    ended: Instant,
    /// When the service that was started again was good, or everything ended.
    back: Instant,
    back_in: Option<Duration>,
}

/// Why it cannot be tried here, if it cannot.
#[must_use]
pub fn hindrance(fault: &Fault) -> Option<String> {
    obstacle(fault.needs())
}

/// Tries a fault.
///
/// # Errors
///
/// If it cannot be tried; what is wrong with the service is no error, but in the trial.
pub fn run(fault: &Fault, effort: Effort) -> Result<Trial> {
    let ground = Ground::start(fault.needs())?;
    let services = (0..fault.instances())
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
        let mut attempt = Attempt::whole(fault, &ground, services)?;
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
    attempt.judge()
}

impl<'a> Attempt<'a> {
    /// Everything works, and visits are made.
    fn whole(fault: &'a Fault, ground: &'a Ground, mut services: Vec<Service>) -> Result<Self> {
        for service in &mut services {
            service.start()?;
            service.until_ready()?;
        }
        let attempt = Self::of(fault, ground, services);
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
        let mut attempt = Self::of(fault, ground, services);
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
            attempt.is_back(None);
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
                attempt.is_back(Some(started.elapsed()));
            }
            attempt.see_to_the_aftermath(0, Instant::now(), effort.aftermath);
        }
        Ok(attempt)
    }

    fn of(fault: &'a Fault, ground: &'a Ground, services: Vec<Service>) -> Self {
        let addresses: Vec<_> = services.iter().map(|service| service.address).collect();
        Self {
            fault,
            ground,
            services,
            ledger: Ledger::start(ground.runtime.handle(), &addresses),
            others: Vec::new(),
            stop: None,
            gaps: Vec::new(),
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
        std::thread::sleep(SOME_MOMENT.mul_f64(chance::fraction()));
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
        let mended = Instant::now();
        let Healed { at, others } = injected.heal(self.ground, &mut self.services)?;
        if !self.fault.shows(&self.ledger.since(from), &others) {
            self.complain("it did not show".to_owned());
        }
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

    /// Waits for the first good visit after `due`, and looks whether it stays at that. The fault
    /// has taken from `began` on to become `whole`.
    fn recover(
        &mut self,
        from: usize,
        began: Instant,
        whole: Range<Instant>,
        due: Instant,
        aftermath: Duration,
    ) {
        let harm = self.fault.harm;
        let broken = |visit: &Visit| {
            let harmed = match harm {
                Harm::Visits => visit.total().is_none(),
                _ => !visit.is_good(),
            };
            harmed && visit.answered() > began
        };
        let first_error = self.ledger.find(from, Duration::ZERO, broken);
        let since = first_error.map_or(due, |error| error.answered().max(due));
        let good = self.ledger.find(from, PATIENCE, |visit| {
            visit.is_good() && visit.answered() > since
        });
        let Some(good) = good else {
            self.complain(format!("no good visit within {PATIENCE:?}"));
            return;
        };
        match first_error {
            Some(error) if self.fault.is_complete() => {
                let spared = self.ledger.find(from, Duration::ZERO, |visit| {
                    visit.sent > error.answered().max(whole.start)
                        && visit.answered() < whole.end
                        && match harm {
                            Harm::Count => visit.is_good(),
                            _ => visit.total().is_some(),
                        }
                });
                if let Some(spared) = spared {
                    let after = spared.sent - began;
                    self.complain(format!("a visit {after:?} after it began was spared"));
                }
            }
            None if harm != Harm::Nothing => self.complain("nobody noticed".to_owned()),
            _ => {}
        }
        if let Some(error) = first_error {
            self.first_errors
                .push((error.answered() - began).as_secs_f64());
            self.recoveries.push((good.answered() - due).as_secs_f64());
        }
        self.see_to_the_aftermath(from, good.answered(), aftermath);
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
            let healed = injected.heal(self.ground, &mut self.services)?;
            self.others.extend(healed.others);
        }
        self.services[0].start()?;
        let started = Instant::now();
        let good = self.ledger.find(from, PATIENCE, |visit| {
            visit.is_good() && visit.sent > started
        });
        match good {
            Some(good) => {
                self.is_back(Some(good.answered() - started));
                self.see_to_the_aftermath(from, good.answered(), aftermath);
            }
            None => self.complain(format!("no good visit within {PATIENCE:?} after a stop")),
        }
        self.services[0].until_ready()
    }

    /// The service that was asked to stop works again.
    fn is_back(&mut self, back_in: Option<Duration>) {
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
            counted,
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
