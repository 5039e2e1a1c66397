//! A model of a store's server and of the network to it: the seam that takes the place of a driver's
//! connection under the pool.
//!
//! A call that has reached the server goes on although its client has gone, as in Postgres and in
//! Redis. Must not know: the recorder, the pool and the availability.

use std::collections::{HashMap, HashSet};
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::chance::Chance;
use super::signal::Signal;
use super::timeline::{Event, Timeline};
use crate::store::call::Operation;
use crate::store::error::{Cause, Error};
use crate::store::pool::Connect;

/// Which store a server is a model of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Postgres,
    Redis,
}

/// How long things take, in milliseconds.
#[derive(Debug, Clone)]
pub(super) struct Durations {
    /// A message on its way, in one direction.
    pub(super) travel: RangeInclusive<u64>,
    /// What a call does in the server.
    pub(super) work: RangeInclusive<u64>,
    /// The flush of a commit.
    pub(super) flush: RangeInclusive<u64>,
}

/// What goes wrong at the moment.
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is independent of the others"
)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Trouble {
    /// Connections are refused.
    pub(super) is_down: bool,
    /// Nothing arrives, in either direction.
    pub(super) is_silent: bool,
    /// Nothing arrives over connections with a lower number.
    pub(super) silent_below: u64,
    /// Calls that record more visits than this are refused; all are if it is zero.
    pub(super) refuses_above: Option<usize>,
    /// Readings are refused.
    pub(super) refuses_readings: bool,
    /// The connection of the next call that records visits is reset instead of a reply.
    pub(super) loses_reply: bool,
    /// Each visit of a batch takes so much longer.
    pub(super) slow: Duration,
}

#[derive(Debug)]
pub(super) struct Server {
    kind: Kind,
    durations: Durations,
    timeline: Timeline,
    /// The count's lock, until the commit is flushed.
    lock: tokio::sync::Mutex<()>,
    /// Sent when `reset_below` or `stalls` has changed.
    changed: Signal,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    chance: Chance,
    trouble: Trouble,
    connections: u64,
    /// Connections with a lower number are reset.
    reset_below: u64,
    /// Whether commits wait for their flush.
    stalls: bool,
    /// How often the server has crashed.
    crashes: u64,
    /// The times of the rows, in the order of their ids.
    rows: Vec<i64>,
    counter: i64,
    /// When the batch of each visit began.
    begun: HashMap<i64, Instant>,
    /// When each visit was handed to a connection.
    sent: HashMap<i64, Instant>,
    /// The visits of batches that were certainly refused.
    refused: HashSet<i64>,
    calls: usize,
    most_calls: usize,
}

/// How to connect to a server.
#[derive(Debug)]
pub(super) struct Network(pub(super) Arc<Server>);

/// A connection.
#[derive(Debug)]
pub(super) struct Session {
    server: Arc<Server>,
    number: u64,
    is_busy: bool,
}

pub(super) static RECORD: Operation = Operation::command("RECORD").that_records_visits();
pub(super) static REHEARSE: Operation = Operation::command("REHEARSE");
pub(super) static READ: Operation = Operation::command("READ");
static PING: Operation = Operation::command("PING");

pub(super) const DB_TIMEOUT: Duration = Duration::from_secs(1);
pub(super) const REDIS_TIMEOUT: Duration = Duration::from_millis(250);
const LOCK_TIMEOUT: Duration = Duration::from_millis(700);
const STATEMENT_TIMEOUT: Duration = Duration::from_millis(850);

impl Server {
    pub(super) fn new(
        kind: Kind,
        durations: Durations,
        timeline: Timeline,
        seed: u64,
    ) -> Arc<Self> {
        Arc::new(Self {
            kind,
            durations,
            timeline,
            lock: tokio::sync::Mutex::default(),
            changed: Signal::default(),
            state: Mutex::new(State {
                chance: Chance::new(seed),
                trouble: Trouble::default(),
                connections: 0,
                reset_below: 0,
                stalls: false,
                crashes: 0,
                rows: Vec::new(),
                counter: 0,
                begun: HashMap::new(),
                sent: HashMap::new(),
                refused: HashSet::new(),
                calls: 0,
                most_calls: 0,
            }),
        })
    }

    /// The mean time of a message and its reply on the network.
    pub(super) fn round_trip(&self) -> Duration {
        let travel = &self.durations.travel;
        Duration::from_millis(travel.start() + travel.end())
    }

    pub(super) fn trouble(&self, change: impl FnOnce(&mut Trouble)) {
        change(&mut self.state().trouble);
    }

    /// Resets the open connections. What has reached the server goes on.
    pub(super) fn reset(&self) {
        {
            let mut state = self.state();
            state.reset_below = state.connections;
        }
        self.changed.send();
    }

    /// Nothing arrives any more over the open connections.
    pub(super) fn silence(&self) {
        let mut state = self.state();
        state.trouble.silent_below = state.connections;
    }

    /// Ends the server, with all that was not committed. Redis forgets its counter.
    pub(super) fn crash(&self) {
        {
            let mut state = self.state();
            state.trouble.is_down = true;
            state.crashes += 1;
            state.counter = 0;
        }
        self.reset();
    }

    /// Lets commits wait for their flush, or lets them go on.
    pub(super) fn stall(&self, stalls: bool) {
        self.state().stalls = stalls;
        self.changed.send();
    }

    pub(super) fn rows(&self) -> Vec<i64> {
        self.state().rows.clone()
    }

    pub(super) fn counter(&self) -> i64 {
        self.state().counter
    }

    /// Notes that the batch of these visits begins.
    pub(super) fn begin(&self, arrivals: &[i64]) {
        let now = Instant::now();
        let begun = arrivals.iter().map(|arrival| (*arrival, now));
        self.state().begun.extend(begun);
    }

    /// When the batch of a visit began.
    pub(super) fn begun(&self, arrival: i64) -> Option<Instant> {
        self.state().begun.get(&arrival).copied()
    }

    /// When a visit was handed to a connection.
    pub(super) fn sent(&self, arrival: i64) -> Option<Instant> {
        self.state().sent.get(&arrival).copied()
    }

    pub(super) fn has_refused(&self, arrival: i64) -> bool {
        self.state().refused.contains(&arrival)
    }

    /// The most calls that recorded visits at once.
    pub(super) fn most_calls(&self) -> usize {
        self.state().most_calls
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn millis(&self, range: &RangeInclusive<u64>) -> Duration {
        self.state().chance.millis(range.clone())
    }

    async fn pass(&self, time: Duration) {
        // A sleep of no time can take a millisecond.
        if !time.is_zero() {
            sleep(time).await;
        }
    }

    /// Carries a message over a connection in one direction. What is lost never arrives.
    async fn carry(&self, connection: u64) {
        let time = self.millis(&self.durations.travel);
        self.pass(time).await;
        let trouble = self.state().trouble;
        let is_reset = connection < self.state().reset_below;
        if trouble.is_silent || connection < trouble.silent_below || is_reset {
            std::future::pending::<()>().await;
        }
    }

    async fn until_reset(&self, connection: u64) {
        let is_reset = || connection < self.state().reset_below;
        self.changed.until(is_reset).await;
    }

    fn refuse<T>(&self, code: &'static str) -> Result<T, Error> {
        let store = self.kind;
        self.timeline.add(Event::Refusal { store, code });
        Err(Error::Refused {
            code: code.to_owned(),
            source: Cause::from("as the schedule has it"),
        })
    }

    fn refuses(&self, visits: usize) -> bool {
        let limit = self.state().trouble.refuses_above;
        limit.is_some_and(|limit| limit == 0 || visits > limit)
    }

    /// Records visits as `registrar_visitas` does, or does all but the commit for a rehearsal.
    async fn record(&self, arrivals: &[i64], commits: bool) -> Result<i64, Error> {
        let (crashes, slow) = {
            let state = self.state();
            (state.crashes, state.trouble.slow)
        };
        let deadline = Instant::now() + STATEMENT_TIMEOUT;
        let Ok(lock) = timeout(LOCK_TIMEOUT, self.lock.lock()).await else {
            return self.refuse("55P03");
        };
        let visits = u32::try_from(arrivals.len()).expect("a small batch");
        let work = self.millis(&self.durations.work) + slow * visits;
        if timeout_at(deadline, self.pass(work)).await.is_err() {
            return self.refuse("57014");
        }
        if self.refuses(arrivals.len()) {
            return self.refuse("P0001");
        }
        if !commits {
            let total = self.state().rows.len();
            return Ok(i64::try_from(total).expect("few rows"));
        }
        let flush = self.millis(&self.durations.flush);
        self.pass(flush).await;
        self.changed.until(|| !self.state().stalls).await;
        let Some(total) = self.commit(arrivals, crashes) else {
            drop(lock);
            return std::future::pending().await;
        };
        self.timeline.add(Event::Commit { total });
        Ok(i64::try_from(total).expect("few rows"))
    }

    /// Adds the rows, unless the server has crashed since the statement began.
    fn commit(&self, arrivals: &[i64], crashes: u64) -> Option<usize> {
        let mut state = self.state();
        if state.crashes != crashes {
            return None;
        }
        state.rows.extend_from_slice(arrivals);
        Some(state.rows.len())
    }

    /// Adds to the counter as `INCRBY` does.
    async fn increment(&self, by: i64) -> Result<i64, Error> {
        let work = self.millis(&self.durations.work);
        self.pass(work).await;
        if self.refuses(usize::try_from(by).expect("a number of visits")) {
            return self.refuse("OOM");
        }
        if self.state().trouble.is_down {
            return std::future::pending().await;
        }
        let value = self.add(by);
        if by > 0 {
            self.timeline.add(Event::Increment { by, value });
        }
        Ok(value)
    }

    fn add(&self, by: i64) -> i64 {
        let mut state = self.state();
        state.counter += by;
        state.counter
    }
}

impl Session {
    /// Makes one call.
    async fn call<R: Send + 'static>(
        &mut self,
        is_of_visits: bool,
        work: impl Future<Output = Result<R, Error>> + Send + 'static,
    ) -> Result<R, Error> {
        let server = Arc::clone(&self.server);
        let timeline = &server.timeline;
        timeline.check(!self.is_busy, || {
            "a connection is used again although its last call has not ended".to_owned()
        });
        self.is_busy = true;
        let (reply, replied) = oneshot::channel();
        let (number, at_server) = (self.number, Arc::clone(&server));
        tokio::spawn(async move {
            at_server.carry(number).await;
            let result = work.await;
            if is_of_visits && std::mem::take(&mut at_server.state().trouble.loses_reply) {
                return;
            }
            at_server.carry(number).await;
            reply.send(result).ok();
        });
        let result = tokio::select! {
            biased;
            () = server.until_reset(number) => Err(reset()),
            replied = replied => replied.unwrap_or_else(|_lost| Err(reset())),
        };
        self.is_busy = result.as_ref().is_err_and(|error| !error.is_definite());
        result
    }

    /// Records visits.
    pub(super) async fn record(&mut self, arrivals: &[i64]) -> Result<i64, Error> {
        let server = Arc::clone(&self.server);
        let in_flight = InFlight::begin(&server, arrivals);
        let (at_server, visits) = (Arc::clone(&server), arrivals.to_vec());
        let work = async move { at_server.record(&visits, true).await };
        let result = self.call(true, work).await;
        if result.as_ref().is_err_and(Error::is_definite) {
            server.state().refused.extend(arrivals);
        }
        drop(in_flight);
        result
    }

    pub(super) async fn rehearse(&mut self) -> Result<i64, Error> {
        let server = Arc::clone(&self.server);
        self.call(false, async move { server.record(&[0], false).await })
            .await
    }

    pub(super) async fn read_rows(&mut self) -> Result<i64, Error> {
        let server = Arc::clone(&self.server);
        self.call(false, async move {
            if server.state().trouble.refuses_readings {
                return server.refuse("XX001");
            }
            let rows = server.state().rows.len();
            Ok(i64::try_from(rows).expect("few rows"))
        })
        .await
    }

    /// Adds to the counter; adding zero reads it.
    pub(super) async fn increment(&mut self, by: i64) -> Result<i64, Error> {
        let server = Arc::clone(&self.server);
        self.call(by > 0, async move { server.increment(by).await })
            .await
    }
}

/// A call that records visits, as long as its client waits for it.
struct InFlight<'a>(&'a Server);

impl<'a> InFlight<'a> {
    fn begin(server: &'a Server, arrivals: &[i64]) -> Self {
        let now = Instant::now();
        let mut state = server.state();
        let mut is_repeated = false;
        for arrival in arrivals {
            is_repeated |= state.sent.insert(*arrival, now).is_some();
        }
        state.calls += 1;
        state.most_calls = state.most_calls.max(state.calls);
        drop(state);
        let timeline = &server.timeline;
        timeline.add(Event::Statement {
            first: super::world::number_of(arrivals[0]),
            visits: arrivals.len(),
        });
        timeline.check(!is_repeated, || "a visit is sent twice".to_owned());
        Self(server)
    }
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.state().calls -= 1;
    }
}

fn reset() -> Error {
    Error::Connection(Cause::from("reset"))
}

impl Connect for Network {
    type Connection = Session;

    const PING: &'static Operation = &PING;

    async fn open(&self) -> Result<Session, Error> {
        let server = Arc::clone(&self.0);
        let number = {
            let mut state = server.state();
            state.connections += 1;
            state.connections - 1
        };
        let opens = async {
            server.carry(number).await;
            if server.state().trouble.is_down {
                return Err(Error::Connection(Cause::from("refused")));
            }
            server.carry(number).await;
            Ok(())
        };
        tokio::select! {
            biased;
            () = server.until_reset(number) => return Err(reset()),
            opened = opens => opened?,
        }
        Ok(Session {
            server,
            number,
            is_busy: false,
        })
    }

    async fn ping(session: &mut Session) -> Result<(), Error> {
        session.call(false, async { Ok(()) }).await
    }
}
