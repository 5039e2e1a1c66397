//! One schedule: a service over two model stores, its clients, and what goes wrong meanwhile.
//!
//! All of it follows from the seed. The real recorder, pool, availability and watch run on a paused
//! clock, which moves to the next timer whenever every task waits.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use lab::history::{History, Outcome, Visit, judge};
use tokio::time::{Instant, sleep, timeout};

use super::chance::Chance;
use super::model::Model;
use super::server::{DB_TIMEOUT, Durations, Kind, REDIS_TIMEOUT, Server};
use super::signal::Signal;
use super::tally;
use super::timeline::{Event, Timeline};
use crate::rates::Rates;
use crate::recorder::{Recorder, Refusal, recorder};
use crate::store::watch::{self as monitor, Store as _};

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    /// The open connections are reset.
    Reset(Kind),
    /// The open connections fall silent.
    Silence(Kind),
    /// Nothing arrives for a while.
    BlackHole(Kind),
    /// The server ends, and starts again after a while.
    Crash(Kind),
    /// The server refuses what a visit needs.
    Refusals(Kind),
    /// The server refuses what no probe tries: more than one visit at a time.
    RefusalsOfSeveral(Kind),
    /// The connection of one call is reset instead of a reply.
    LostReply(Kind),
    /// Commits wait for their flush.
    Stall,
    /// Each visit of a batch takes long.
    Slowness,
    /// Postgres refuses what only a reading needs.
    RefusedReadings,
}

impl Fault {
    /// The store that has it.
    fn kind(self) -> Kind {
        match self {
            Self::Reset(kind)
            | Self::Silence(kind)
            | Self::BlackHole(kind)
            | Self::Crash(kind)
            | Self::Refusals(kind)
            | Self::RefusalsOfSeveral(kind)
            | Self::LostReply(kind) => kind,
            Self::Stall | Self::Slowness | Self::RefusedReadings => Kind::Postgres,
        }
    }
}

const FAULTS: [Fault; 17] = [
    Fault::Reset(Kind::Postgres),
    Fault::Reset(Kind::Redis),
    Fault::Silence(Kind::Postgres),
    Fault::Silence(Kind::Redis),
    Fault::BlackHole(Kind::Postgres),
    Fault::BlackHole(Kind::Redis),
    Fault::Crash(Kind::Postgres),
    Fault::Crash(Kind::Redis),
    Fault::Refusals(Kind::Postgres),
    Fault::Refusals(Kind::Redis),
    Fault::RefusalsOfSeveral(Kind::Postgres),
    Fault::RefusalsOfSeveral(Kind::Redis),
    Fault::LostReply(Kind::Postgres),
    Fault::LostReply(Kind::Redis),
    Fault::Stall,
    Fault::Slowness,
    Fault::RefusedReadings,
];

/// How the service ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ending {
    /// After the last reply.
    Idle,
    /// While visits wait.
    Stop,
    /// The writer is aborted while visits wait, as at the end of the drain timeout.
    Abort,
}

/// The reply to a visit, as its client knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reply {
    Recorded(i64, Option<i64>),
    Refused(Refusal),
    Left,
}

/// What the clients share.
struct World {
    visit_timeout: Duration,
    recorder: Recorder,
    postgres: Arc<Model>,
    redis: Arc<Model>,
    timeline: Timeline,
    visits: Mutex<Vec<(Visit, Reply)>>,
    sent: AtomicUsize,
    waiting: AtomicUsize,
    /// Whether the counter in Redis has started over.
    has_restarted: AtomicBool,
    /// Whether the fault has ended and both stores are up again.
    is_mended: AtomicBool,
    mended: Signal,
}

/// What a schedule was, and what became of it.
#[derive(Debug)]
pub(super) struct Report {
    pub(super) timeline: Timeline,
    pub(super) visits: usize,
    pub(super) batches: usize,
    /// The most batches that were with Postgres at once.
    pub(super) most_calls: usize,
    pub(super) is_far: bool,
}

/// What a client does.
#[derive(Debug, Clone, Copy)]
struct Habits {
    /// Visits until the fault has ended.
    visits: usize,
    /// The longest pause before a visit, in milliseconds.
    pause: u64,
    /// In how many visits of a hundred it disconnects early.
    leaving: u64,
}

/// Visits one after another, since the first batches do not overlap.
const FIRST_VISITS: usize = 8;
/// Each client's visits after the fault.
const VISITS_AFTERWARDS: usize = 3;
/// `VISIT_TIMEOUT`: long enough for any fault, or so short that visits pass their deadline in the queue
/// and in flight.
const VISIT_TIMEOUTS: [Duration; 3] = [
    Duration::from_secs(2),
    Duration::from_secs(2),
    Duration::from_millis(250),
];
/// How long the writer takes at most to end.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(2);
/// How long both stores have to be up again after a fault: a probe that hangs takes its timeout, and
/// the pause of a store that relapses is 2 s at most.
const RECOVERY: Duration = Duration::from_secs(5);
/// As many batches as can be in flight, so as can be in doubt by one outage.
const MOST_IN_FLIGHT: usize = 4;
/// The wall clock at the start of a schedule, in microseconds since 1970.
const START: i64 = 1_700_000_000_000_000;
/// Visits have arrived at microseconds that are multiples of this number, plus their own number.
const MILLISECOND: i64 = 1000;

/// The number of the visit that arrived at this time.
pub(super) fn number_of(arrival: i64) -> usize {
    usize::try_from(arrival % MILLISECOND).expect("a number")
}

/// Runs the schedule of a seed.
pub(super) fn run(seed: u64) -> Report {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime");
    runtime.block_on(play(seed))
}

#[expect(clippy::too_many_lines, reason = "the phases of a schedule, in order")]
async fn play(seed: u64) -> Report {
    tally::take();
    let mut chance = Chance::new(seed);
    let timeline = Timeline::new();
    let is_far = chance.percent(70);
    let durations = durations(&mut chance, is_far);
    let server = |kind, durations, seed| Server::new(kind, durations, timeline.clone(), seed);
    let ledger = server(Kind::Postgres, durations.0, chance.within(0..=u64::MAX - 1));
    let counter = server(Kind::Redis, durations.1, chance.within(0..=u64::MAX - 1));
    let postgres = Model::new(&ledger, Kind::Postgres, DB_TIMEOUT, &timeline);
    let redis = Model::new(&counter, Kind::Redis, REDIS_TIMEOUT, &timeline);
    let visit_timeout = chance.one_of(&VISIT_TIMEOUTS);
    let rates = Arc::new(Rates::new().expect("constant bounds"));
    let (recorder, writer) = recorder(
        Arc::clone(&postgres),
        Arc::clone(&redis),
        &rates,
        100,
        visit_timeout,
    );
    for store in [&postgres, &redis] {
        let store = Arc::clone(store);
        tokio::spawn(async move { store.note_changes().await });
    }
    tokio::spawn(monitor::watch(Arc::clone(&postgres), Arc::clone(&redis)));
    let world = Arc::new(World {
        visit_timeout,
        recorder,
        postgres,
        redis,
        timeline: timeline.clone(),
        visits: Mutex::default(),
        sent: AtomicUsize::new(0),
        waiting: AtomicUsize::new(0),
        has_restarted: AtomicBool::new(false),
        is_mended: AtomicBool::new(false),
        mended: Signal::default(),
    });
    world.until_up(RECOVERY).await;
    let writer = tokio::spawn(writer.run());

    let ending = chance.one_of(&[Ending::Idle, Ending::Idle, Ending::Stop, Ending::Abort]);
    let fault = chance.one_of(&FAULTS);
    let clients = usize::try_from(chance.within(3..=8)).expect("a few");
    let visits = 30 / clients + 1;
    let habits = Habits {
        visits,
        pause: chance.one_of(&[0, 3, 20, 60]),
        leaving: chance.one_of(&[0, 0, 10]),
    };
    for _ in 0..FIRST_VISITS {
        world.visit(clients, None).await;
    }
    let mut tasks = Vec::new();
    for client in 0..clients {
        let chance = Chance::new(chance.within(0..=u64::MAX - 1));
        tasks.push(tokio::spawn(
            Arc::clone(&world).client(client, habits, chance),
        ));
    }
    // Some client has the reply to its first visit.
    let before = usize::try_from(chance.within(1..=9)).expect("a few");
    world.until_sent(clients + before).await;
    let outages = world.break_and_mend(fault, &mut chance).await;
    world.until_up(RECOVERY).await;
    world.is_mended.store(true, Ordering::Relaxed);
    world.mended.send();
    let writer = if ending == Ending::Abort {
        // Some client has the replies to two visits since.
        world.until_sent(clients * visits + 2 * clients + 1).await;
        sleep(chance.millis(0..=10)).await;
        timeline.add(Event::Abort);
        writer.abort();
        None
    } else {
        Some(writer)
    };
    if ending == Ending::Stop {
        world
            .until_sent(clients * (visits + VISITS_AFTERWARDS))
            .await;
        world.stop();
    }
    for task in tasks {
        task.await.expect("a client");
    }
    if ending == Ending::Idle {
        // The watch has read both counts since.
        sleep(Duration::from_secs(2)).await;
        world.until_up(RECOVERY).await;
        world.last_visit().await;
        world.stop();
    }
    if let Some(writer) = writer {
        let ended = timeout(DRAIN_TIMEOUT, writer).await;
        timeline.check(matches!(ended, Ok(Ok(()))), || {
            format!("the writer has not ended: {ended:?}")
        });
    }
    // Every call has reached its server, and every commit its end.
    sleep(Duration::from_secs(2)).await;
    world.check(fault, ending, &outages);
    let visits = world.visits();
    Report {
        visits: visits.len(),
        batches: timeline.count(|event| matches!(event, Event::Commit { .. })),
        most_calls: world.postgres.server.most_calls(),
        is_far,
        timeline,
    }
}

/// How long calls to the two stores take.
fn durations(chance: &mut Chance, is_far: bool) -> (Durations, Durations) {
    let travel = if is_far { 4..=6 } else { 0..=0 };
    let flush = chance.one_of(&[(0, 1), (1, 3), (8, 12)]);
    let postgres = Durations {
        travel: travel.clone(),
        work: 1..=2,
        flush: flush.0..=flush.1,
    };
    let redis = Durations {
        travel,
        // A call to a near Redis takes hardly longer than the network.
        work: 0..=u64::from(is_far),
        flush: 0..=0,
    };
    (postgres, redis)
}

impl World {
    /// Makes visits before, during and after the fault.
    async fn client(self: Arc<Self>, client: usize, habits: Habits, mut chance: Chance) {
        for visit in 0..habits.visits + VISITS_AFTERWARDS {
            let mut shortest = 0;
            if visit >= habits.visits {
                let is_mended = || self.is_mended.load(Ordering::Relaxed);
                self.mended.until(is_mended).await;
                self.until_up(RECOVERY).await;
                shortest = 5;
            }
            sleep(chance.millis(shortest..=shortest + habits.pause)).await;
            let patience = chance
                .percent(habits.leaving)
                .then(|| chance.millis(0..=30));
            self.visit(client, patience).await;
        }
    }

    /// Makes a visit, and leaves after `patience`.
    async fn visit(&self, client: usize, patience: Option<Duration>) {
        let visit = self.sent.fetch_add(1, Ordering::Relaxed);
        let is_alone = self.waiting.fetch_add(1, Ordering::Relaxed) == 0
            && !self.postgres.is_active()
            && !self.redis.is_active();
        let is_up = self.postgres.availability().is_up();
        self.timeline.add(Event::Sends { client, visit });
        let sent = Instant::now();
        let sent_at = self.wall_clock(sent) + i64::try_from(visit).expect("a few");
        let arrived = UNIX_EPOCH + Duration::from_micros(sent_at.unsigned_abs());
        let leaves = async {
            match patience {
                Some(patience) => sleep(patience).await,
                None => std::future::pending().await,
            }
        };
        let reply = tokio::select! {
            biased;
            recorded = self.record(arrived, is_alone && is_up) => recorded,
            () = leaves => Reply::Left,
        };
        let ended = Instant::now();
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        self.timeline.add(match reply {
            Reply::Left => Event::Leaves { visit },
            reply => Event::Replied { visit, reply },
        });
        // Or it came up in the same millisecond.
        let up = Event::Up {
            store: Kind::Postgres,
        };
        let was_up = is_up || self.timeline.has(sent, up);
        self.check_reply(visit, reply, ended - sent, was_up);
        let (outcome, total, redis) = match reply {
            Reply::Recorded(total, redis) => (Outcome::Recorded, Some(total), redis),
            Reply::Refused(Refusal::InDoubt) => (Outcome::InDoubt, None, None),
            Reply::Refused(_) => (Outcome::Refused, None, None),
            Reply::Left => (Outcome::Left, None, None),
        };
        let made = Visit {
            client,
            replica: 0,
            sent: sent.into_std(),
            sent_at,
            ended: ended.into_std(),
            outcome,
            total,
            redis,
        };
        let mut visits = self.visits.lock().unwrap_or_else(PoisonError::into_inner);
        visits.push((made, reply));
    }

    async fn record(&self, arrived: SystemTime, waits_for_none: bool) -> Reply {
        match self.recorder.record(arrived).await {
            Ok(recorded) => {
                self.timeline
                    .check(!waits_for_none || recorded.timing.queue.is_zero(), || {
                        format!("a lone visit waits: {recorded:?}")
                    });
                Reply::Recorded(recorded.total, recorded.redis)
            }
            Err(refusal) => Reply::Refused(refusal),
        }
    }

    /// What holds for each reply at the moment when it comes.
    fn check_reply(&self, visit: usize, reply: Reply, took: Duration, was_up: bool) {
        let check = |holds: bool, what: &str| {
            self.timeline
                .check(holds, || format!("visit {visit}: {what}"));
        };
        check(
            took <= self.visit_timeout + Duration::from_millis(1),
            "its reply comes after its deadline",
        );
        check(
            was_up || took.is_zero() || reply == Reply::Left,
            "it waits although Postgres is down",
        );
        let count = |model: &Model| model.availability().count().unwrap_or(i64::MAX);
        if let Reply::Recorded(total, redis) = reply {
            check(
                count(&self.postgres) >= total,
                "the count of Postgres lacks it",
            );
            let has_restarted = self.has_restarted.load(Ordering::Relaxed);
            check(
                has_restarted || redis.is_none_or(|redis| count(&self.redis) >= redis),
                "the count of Redis lacks it",
            );
        }
    }

    /// The last visit is recorded in both stores, and has the number of all rows.
    async fn last_visit(&self) {
        self.visit(usize::MAX, None).await;
        let last = self.visits().last().map(|(_, reply)| *reply);
        let rows = i64::try_from(self.postgres.server.rows().len()).expect("few rows");
        let expected = Reply::Recorded(rows, Some(self.redis.server.counter()));
        self.timeline.check(last == Some(expected), || {
            format!("the last visit is {last:?}, expected {expected:?}")
        });
    }

    fn stop(&self) {
        self.timeline.add(Event::Stop);
        self.recorder.stop();
    }

    /// Makes the fault, and ends it. Returns when Redis had lost its counter.
    async fn break_and_mend(&self, fault: Fault, chance: &mut Chance) -> Vec<Range<Instant>> {
        let began = Instant::now();
        self.timeline.add(Event::Begins { fault });
        let (postgres, redis) = (&self.postgres.server, &self.redis.server);
        let server = |kind: Kind| match kind {
            Kind::Postgres => postgres,
            Kind::Redis => redis,
        };
        let mut restarts = Vec::new();
        match fault {
            Fault::Reset(kind) => server(kind).reset(),
            Fault::Silence(kind) => server(kind).silence(),
            Fault::LostReply(kind) => server(kind).trouble(|trouble| trouble.loses_reply = true),
            Fault::BlackHole(kind) => {
                server(kind).trouble(|trouble| trouble.is_silent = true);
                sleep(chance.millis(20..=1500)).await;
                server(kind).trouble(|trouble| trouble.is_silent = false);
            }
            Fault::Crash(kind) => {
                let restarts_counter = kind == Kind::Redis;
                self.has_restarted
                    .store(restarts_counter, Ordering::Relaxed);
                server(kind).crash();
                sleep(chance.millis(20..=500)).await;
                server(kind).trouble(|trouble| trouble.is_down = false);
                if restarts_counter {
                    restarts.push(began..Instant::now());
                }
            }
            Fault::Refusals(kind) | Fault::RefusalsOfSeveral(kind) => {
                let most = usize::from(fault == Fault::RefusalsOfSeveral(kind));
                server(kind).trouble(|trouble| trouble.refuses_above = Some(most));
                sleep(chance.millis(20..=1500)).await;
                server(kind).trouble(|trouble| trouble.refuses_above = None);
            }
            Fault::Stall => {
                postgres.stall(true);
                sleep(chance.millis(20..=1500)).await;
                postgres.stall(false);
            }
            Fault::Slowness => {
                let slow = chance.millis(50..=400);
                postgres.trouble(|trouble| trouble.slow = slow);
                sleep(chance.millis(20..=1500)).await;
                postgres.trouble(|trouble| trouble.slow = Duration::ZERO);
            }
            Fault::RefusedReadings => {
                postgres.trouble(|trouble| trouble.refuses_readings = true);
                sleep(chance.millis(20..=3000)).await;
                postgres.trouble(|trouble| trouble.refuses_readings = false);
            }
        }
        self.timeline.add(Event::Ends { fault });
        restarts
    }

    /// Checks the whole history.
    fn check(&self, fault: Fault, ending: Ending, redis_outages: &[Range<Instant>]) {
        let timeline = &self.timeline;
        let (visits, rows) = (self.visits(), self.postgres.server.rows());
        let redis_outages: Vec<_> = redis_outages
            .iter()
            .map(|outage| outage.start.into_std()..outage.end.into_std())
            .collect();
        let history: Vec<_> = visits.iter().map(|(visit, _)| *visit).collect();
        let verdict = judge(History {
            visits: &history,
            rows: &rows,
            redis_outages: &redis_outages,
        });
        timeline.check(verdict.violations() == 0, || format!("{verdict:?}"));
        self.check_each(&visits, &rows, ending);
        self.check_tally(&visits, fault, ending);
        timeline.check(visits.len() >= 20, || format!("{} visits", visits.len()));
        let batches = timeline.count(|event| matches!(event, Event::Statement { .. }));
        timeline.check(batches >= 3, || format!("{batches} batches"));
        let most = self.postgres.server.most_calls();
        timeline.check(most <= MOST_IN_FLIGHT, || format!("{most} in flight"));
        // A batch waits for its turn, but not for a call that hangs.
        let most = self.redis.most_active();
        timeline.check(most <= 1 || fault.kind() == Kind::Redis, || {
            format!("{most} batches are counted in Redis at once")
        });
    }

    /// Checks each visit against the row that it has or has not, which the arrival identifies.
    fn check_each(&self, visits: &[(Visit, Reply)], rows: &[i64], ending: Ending) {
        let server = &self.postgres.server;
        let places: HashMap<_, _> = (1..).zip(rows).map(|(place, row)| (*row, place)).collect();
        let is_repeated = places.len() != rows.len();
        let timeline = &self.timeline;
        timeline.check(!is_repeated, || "a visit has two rows".to_owned());
        for (visit, reply) in visits {
            let (arrival, place) = (visit.sent_at, places.get(&visit.sent_at).copied());
            let (sent, was_refused) = (server.sent(arrival), server.has_refused(arrival));
            let begun = server.begun(arrival);
            // Its client does not know how its batch ends.
            let is_late = visit.took() >= self.visit_timeout;
            let can_be_begun = begun.is_some() || has_twin(visit, visits);
            let is_cut_off = is_late || (ending == Ending::Abort && can_be_begun);
            let is_right = match reply {
                Reply::Recorded(total, _) => place == Some(*total),
                Reply::Refused(Refusal::InDoubt) => is_cut_off || (sent.is_some() && !was_refused),
                Reply::Refused(Refusal::Failed) => sent.is_none() || was_refused,
                Reply::Refused(Refusal::QueueFull | Refusal::Stopping) => sent.is_none(),
                // A visit whose client has left is sent only if its batch had begun before.
                Reply::Left => begun.is_none_or(|begun| begun.into_std() <= visit.ended),
            };
            let deadline = visit.sent + self.visit_timeout;
            timeline.check(
                begun.is_none_or(|begun| begun.into_std() < deadline),
                || {
                    let visit = number_of(arrival);
                    format!("the batch of visit {visit} begins after its deadline")
                },
            );
            let is_certain = place.is_none()
                || !matches!(reply, Reply::Refused(refusal) if *refusal != Refusal::InDoubt);
            timeline.check(is_right && is_certain, || {
                let (visit, sent) = (number_of(arrival), sent.is_some());
                format!(
                    "visit {visit} is {reply:?}, its row {place:?}, sent: {sent}, refused: \
                     {was_refused}"
                )
            });
        }
    }

    /// Checks what the service has counted.
    fn check_tally(&self, visits: &[(Visit, Reply)], fault: Fault, ending: Ending) {
        let timeline = &self.timeline;
        let ([ok, degraded, failed, shed, in_doubt, abandoned], down) = tally::take();
        let replies = |is_meant: fn(&Reply) -> bool| {
            let meant = visits.iter().filter(|(_, reply)| is_meant(reply));
            meant.count() as u64
        };
        let left = replies(|reply| *reply == Reply::Left);
        // A visit whose client has left counts once as well, unless the writer was aborted.
        let counted = ok + degraded + failed + shed + in_doubt + abandoned;
        let all = visits.len() as u64;
        let late: Vec<_> = visits
            .iter()
            .filter(|(visit, _)| visit.took() >= self.visit_timeout)
            .collect();
        let has_twin = |late: &&(Visit, Reply)| has_twin(&late.0, visits);
        let ambiguous = late.iter().copied().filter(has_twin).count() as u64;
        let lost = match ending {
            Ending::Abort => left + late.len() as u64,
            Ending::Idle | Ending::Stop => 0,
        };
        timeline.check(counted <= all && counted + lost >= all, || {
            format!("{counted} visits are counted of {all}")
        });
        for (name, outcome, replies) in [
            (
                "ok",
                ok,
                replies(|reply| matches!(reply, Reply::Recorded(_, Some(_)))),
            ),
            (
                "degraded",
                degraded,
                replies(|reply| matches!(reply, Reply::Recorded(_, None))),
            ),
            (
                "failed",
                failed,
                replies(|reply| *reply == Reply::Refused(Refusal::Failed)),
            ),
            (
                "shed",
                shed,
                replies(|reply| {
                    matches!(
                        reply,
                        Reply::Refused(Refusal::QueueFull | Refusal::Stopping)
                    )
                }),
            ),
            (
                "in doubt",
                in_doubt,
                replies(|reply| *reply == Reply::Refused(Refusal::InDoubt)),
            ),
        ] {
            let ambiguous = match name {
                "failed" | "in doubt" => ambiguous,
                _ => 0,
            };
            let bounds = replies.saturating_sub(lost + ambiguous)..=replies + left + ambiguous;
            let is_exact = bounds.contains(&outcome);
            timeline.check(is_exact, || {
                format!("{outcome} visits are counted as {name}, {replies} were")
            });
        }
        timeline.check(abandoned <= left, || {
            format!("{abandoned} abandoned of {left}")
        });
        self.check_outages(fault, down);
    }

    /// A fault is one outage of its store, unless it is one that no probe sees.
    fn check_outages(&self, fault: Fault, down: [u64; 2]) {
        // Each store is down until its first probe.
        let [postgres, redis] = down.map(|times| times - 1);
        let most = match fault {
            Fault::Reset(kind)
            | Fault::Silence(kind)
            | Fault::Crash(kind)
            | Fault::LostReply(kind) => {
                [kind == Kind::Postgres, kind == Kind::Redis].map(u64::from)
            }
            // At first, and after pauses of 0.2, 0.4, 0.8 and 1.6 s.
            Fault::RefusalsOfSeveral(kind) => {
                [kind == Kind::Postgres, kind == Kind::Redis].map(|is_it| 6 * u64::from(is_it))
            }
            // A probe can meet the end of the fault or its beginning.
            Fault::BlackHole(kind) | Fault::Refusals(kind) => {
                [kind == Kind::Postgres, kind == Kind::Redis].map(|is_it| 2 * u64::from(is_it))
            }
            Fault::Stall => [3, 0],
            Fault::Slowness => [8, 0],
            Fault::RefusedReadings => [0, 0],
        };
        self.timeline
            .check(postgres <= most[0] && redis <= most[1], || {
                format!("{postgres} outages of Postgres and {redis} of Redis by {fault:?}")
            });
    }

    /// Waits until both stores are up, in steps of some milliseconds.
    async fn until_up(&self, within: Duration) {
        let deadline = Instant::now() + within;
        let is_up = |model: &Model| model.availability().is_up();
        while !(is_up(&self.postgres) && is_up(&self.redis)) {
            if Instant::now() >= deadline {
                self.timeline.violate("a store does not come up again");
                return;
            }
            sleep(Duration::from_millis(5)).await;
        }
    }

    /// Waits until the clients have sent so many visits after the first, in steps of a millisecond.
    async fn until_sent(&self, visits: usize) {
        while self.sent.load(Ordering::Relaxed) < FIRST_VISITS + visits {
            sleep(Duration::from_millis(1)).await;
        }
    }

    fn visits(&self) -> Vec<(Visit, Reply)> {
        let visits = self.visits.lock().unwrap_or_else(PoisonError::into_inner);
        visits.clone()
    }

    /// The wall clock, which moves with the paused clock, in microseconds.
    fn wall_clock(&self, now: Instant) -> i64 {
        let since = (now - self.timeline.began()).as_millis();
        START + MILLISECOND * i64::try_from(since).expect("a short schedule")
    }
}

/// Whether another visit was queued at the same moment. The recorder tells visits apart by it, so one
/// that waits is in doubt if its twin is in flight. Outside of paused time no two moments are the same.
fn has_twin(visit: &Visit, visits: &[(Visit, Reply)]) -> bool {
    let twins = visits.iter().filter(|other| other.0.sent == visit.sent);
    twins.count() > 1
}
