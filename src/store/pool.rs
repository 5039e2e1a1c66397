//! The connections of one store, and every call on them.
//!
//! A pool discards two kinds of connections: those with a call that did not end definitely (it can
//! still be in flight), and those opened before the store's last outage. Neither check costs a
//! round trip. Must not know: statements and commands.

use std::fmt::Debug;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bb8_redis::bb8::{self, ManageConnection, PooledConnection, QueueStrategy, RunError};
use metrics::{Counter, Gauge, Histogram};
use tokio::time::Instant;

use super::availability::Availability;
use super::call::{Batch, Operation, Target, observe};
use super::error::{CallError, Cause, Error, System};
use crate::metrics::catalog::{POOL_COUNT, POOL_MAX, POOL_PENDING, POOL_TIMEOUTS, POOL_WAIT};

/// Opens connections to a store, and checks whether an old one still works.
pub(super) trait Connect: Send + Sync + 'static {
    /// A driver's connection.
    type Connection: Send + 'static;

    /// The operation that [`Self::ping`] is observed as.
    const PING: &'static Operation;

    /// Opens a connection that is ready for use.
    fn open(&self) -> impl Future<Output = Result<Self::Connection, Error>> + Send;

    /// Makes one cheap round trip.
    fn ping(connection: &mut Self::Connection) -> impl Future<Output = Result<(), Error>> + Send;
}

/// The connections of one store, at most `size` of them, and whether the store is up.
pub(super) struct Pool<C: Connect> {
    connections: bb8::Pool<Manager<C>>,
    target: Arc<Target>,
    availability: Availability,
    outages: Arc<AtomicU64>,
    last_failure: LastFailure,
    metrics: PoolMetrics,
    timeout: Duration,
}

/// A connection between calls, with the facts that decide whether it can be used again.
pub(super) struct Link<T> {
    connection: T,
    outage: u64,
    in_doubt: bool,
    used: Instant,
}

/// Opens and checks connections for `bb8`.
pub(super) struct Manager<C> {
    connect: C,
    outages: Arc<AtomicU64>,
    timeout: Duration,
}

/// The last connect error, returned when a checkout times out.
#[derive(Debug, Clone, Default)]
struct LastFailure(Arc<Mutex<Option<(Instant, Error)>>>);

/// The handles of a pool's metrics.
struct PoolMetrics {
    idle: Gauge,
    used: Gauge,
    pending: Gauge,
    timeouts: Counter,
    wait: Histogram,
}

/// A visit's call pings a connection that was idle for this long before it is sent: the store can
/// have closed it, or a firewall dropped it, and the call would be in doubt. No store restarts
/// within this time. The extra round trip is paid only where calls are rare.
const TRUSTED_IDLE: Duration = Duration::from_millis(50);
/// Timeout of that ping.
const PING_TIMEOUT: Duration = Duration::from_millis(250);
/// A connection that no call has used for this long is closed, within half as long again.
const IDLE_TIMEOUT: Duration = Duration::from_secs(20);

impl<C: Connect> Pool<C> {
    /// A pool that opens connections on demand. `timeout` limits a call, its checkout included.
    /// This creates the series of `operations`; operations of the same name share their series.
    pub(super) fn new(
        connect: C,
        size: u32,
        timeout: Duration,
        target: Target,
        operations: &[&'static Operation],
    ) -> Self {
        for operation in operations.iter().chain([&C::PING]) {
            operation.declare(&target);
        }
        let target = Arc::new(target);
        let outages = Arc::new(AtomicU64::new(0));
        let last_failure = LastFailure::default();
        let manager = Manager {
            connect,
            outages: Arc::clone(&outages),
            timeout,
        };
        let connections = bb8::Pool::builder()
            .max_size(size)
            // Before the call's own timeout, so that a checkout that times out is counted as one.
            .connection_timeout(timeout.mul_f64(0.98))
            .retry_connection(false)
            .test_on_check_out(true)
            // The last used first: it needs no ping, and its session has what it needs at hand.
            .queue_strategy(QueueStrategy::Lifo)
            .max_lifetime(None)
            // Of those that only a peak needs, and those from before an outage.
            .idle_timeout(Some(IDLE_TIMEOUT))
            .reaper_rate(IDLE_TIMEOUT / 2)
            .error_sink(Box::new(last_failure.clone()))
            .build_unchecked(manager);
        Self {
            connections,
            availability: Availability::new(target.system),
            metrics: PoolMetrics::new(target.system, size),
            target,
            outages,
            last_failure,
            timeout,
        }
    }

    /// The timeout of a call.
    pub(super) fn timeout(&self) -> Duration {
        self.timeout
    }

    /// Whether the store is up, by the outcome of the calls here.
    pub(super) fn availability(&self) -> &Availability {
        &self.availability
    }

    /// Makes a visit's call. Its outcome changes the availability, unless it is a failure that the
    /// caller repairs.
    pub(super) async fn call<R>(
        &self,
        operation: &Operation,
        batch: Option<&mut Batch>,
        work: impl AsyncFnOnce(&mut C::Connection) -> Result<R, Error>,
    ) -> Result<R, CallError> {
        let started = Instant::now();
        let sent = AtomicBool::new(false);
        let result = observe(&self.target, operation, batch, self.timeout, async {
            let mut link = self.check_out_open().await?;
            sent.store(true, Ordering::Relaxed);
            link.call(work).await
        })
        .await;
        match &result {
            Ok(_) => self.availability.record_success(started),
            Err(error) if operation.repairs(error) => {}
            Err(error) => self.fail(started, error),
        }
        result.map_err(|error| CallError {
            error,
            sent: sent.into_inner(),
        })
    }

    /// Reads a count, and measures the store's latency. A failure changes the availability only if
    /// no visit has succeeded since the reading started, and one that is a refusal only if a probe
    /// fails, too. If a session that was idle turns out to have ended, the count is read on a new
    /// one.
    pub(super) async fn read<R>(
        &self,
        operation: &Operation,
        work: impl AsyncFn(&mut C::Connection) -> Result<R, Error>,
        count: impl FnOnce(&R) -> i64,
    ) -> Result<R, Error> {
        let started = Instant::now();
        let result = observe(&self.target, operation, None, self.timeout, async {
            let mut link = self.check_out().await?;
            let was_idle = link.used.elapsed() >= TRUSTED_IDLE;
            let result = link.call(&work).await;
            if !was_idle || !result.as_ref().is_err_and(Error::ends_session) {
                return result;
            }
            // The store works, if a new session does: one that was idle can have ended long ago.
            drop(link);
            self.forget_all();
            self.check_out().await?.call(&work).await
        })
        .await;
        match &result {
            Ok(read) => self
                .availability
                .record_reading(count(read), started.elapsed()),
            Err(error) if error.is_definite() => {
                let needs_probe = !self.availability.has_succeeded_since(started);
                if needs_probe {
                    // Before the probe, whose connection must survive.
                    self.forget_all();
                }
                self.availability.record_refused_reading(error, needs_probe);
            }
            Err(error) => {
                self.availability.record_reading_failure(started, error);
                if !self.availability.is_up() {
                    self.forget_all();
                }
            }
        }
        result
    }

    /// Makes a call that no visit needs: its outcome does not change the availability.
    pub(super) async fn ask<R>(
        &self,
        operation: &Operation,
        work: impl AsyncFnOnce(&mut C::Connection) -> Result<R, Error>,
    ) -> Result<R, Error> {
        observe(&self.target, operation, None, self.timeout, async {
            self.check_out().await?.call(work).await
        })
        .await
    }

    /// Makes a call on a new connection outside the pool, so that a connect error is returned at
    /// once. This does not change the availability: see [`Self::fail`] and [`Self::keep`].
    pub(super) async fn call_on_new<R>(
        &self,
        operation: &Operation,
        work: impl AsyncFnOnce(&mut C::Connection) -> Result<R, Error>,
    ) -> Result<(Link<C::Connection>, R), Error> {
        observe(&self.target, operation, None, self.timeout, async {
            let mut link = self.connections.dedicated_connection().await?;
            let result = link.call(work).await?;
            Ok((link, result))
        })
        .await
    }

    /// Makes a further call on a connection of [`Self::call_on_new`].
    pub(super) async fn call_on<R>(
        &self,
        link: &mut Link<C::Connection>,
        operation: &Operation,
        work: impl AsyncFnOnce(&mut C::Connection) -> Result<R, Error>,
    ) -> Result<R, Error> {
        observe(&self.target, operation, None, self.timeout, link.call(work)).await
    }

    /// Ends a probe that has succeeded: marks the store up, unless it has failed meanwhile, notes its
    /// count, and puts the connection into the pool, or closes it if there is no room.
    pub(super) fn keep(&self, link: Link<C::Connection>, began: Instant, count: Option<i64>) {
        // The error returns the connection, and dropping it closes it.
        drop(self.connections.add(link));
        if self.availability.is_outdated(began) {
            return;
        }
        if let Some(count) = count {
            self.availability.record_reading(count, began.elapsed());
        }
        self.availability.record_success(began);
    }

    /// Marks the store down, since a visit would fail as the call did that began at this moment,
    /// and discards its connections.
    pub(super) fn fail(&self, began: Instant, error: &Error) {
        if self.availability.is_outdated(began) {
            return;
        }
        // Order matters: a probe starts as soon as the store is down, and its connection must
        // survive.
        self.forget_all();
        self.availability.record_failure(error);
    }

    /// Observes a call on a connection that does not belong to the pool.
    pub(super) async fn observe<R>(
        &self,
        operation: &Operation,
        timeout: Duration,
        work: impl Future<Output = Result<R, Error>>,
    ) -> Result<R, Error> {
        observe(&self.target, operation, None, timeout, work).await
    }

    /// Publishes how many connections are in use, and how many calls wait for a connection.
    pub(super) fn report(&self) {
        let state = self.connections.state();
        let idle = state.idle_connections;
        let used = state.connections.saturating_sub(idle);
        self.metrics.idle.set(f64::from(idle));
        self.metrics.used.set(f64::from(used));
        let pending = state.statistics.pending_gets();
        self.metrics.pending.set(pending as f64);
    }

    /// Takes a connection, and opens one if none is idle.
    async fn check_out(&self) -> Result<PooledConnection<'_, Manager<C>>, Error> {
        let started = Instant::now();
        let taken = self.connections.get().await;
        self.metrics.wait.record(started.elapsed());
        taken.map_err(|error| match error {
            RunError::User(error) => {
                if matches!(error, Error::NoSession(..)) {
                    self.metrics.timeouts.increment(1);
                }
                error
            }
            RunError::TimedOut => {
                self.metrics.timeouts.increment(1);
                let failure = self.last_failure.since(started);
                failure.unwrap_or(Error::Timeout(self.timeout))
            }
        })
    }

    /// Takes a connection that the store has not closed. After one that does not answer, all are
    /// suspect: to ping them one by one could use up the call's time. So the next is a new one.
    async fn check_out_open(&self) -> Result<PooledConnection<'_, Manager<C>>, Error> {
        loop {
            let mut link = self.check_out().await?;
            if link.used.elapsed() < TRUSTED_IDLE {
                return Ok(link);
            }
            let ping = link.call(C::ping);
            let pinged = observe(&self.target, C::PING, None, PING_TIMEOUT, ping).await;
            if pinged.is_ok() {
                return Ok(link);
            }
            self.forget_all();
        }
    }

    fn forget_all(&self) {
        self.outages.fetch_add(1, Ordering::AcqRel);
    }
}

impl PoolMetrics {
    fn new(system: System, size: u32) -> Self {
        let pool = match system {
            System::Postgresql => "postgres",
            System::Redis => "redis",
        };
        POOL_MAX.with([pool]).set(f64::from(size));
        Self {
            idle: POOL_COUNT.with([pool, "idle"]),
            used: POOL_COUNT.with([pool, "used"]),
            pending: POOL_PENDING.with([pool]),
            timeouts: POOL_TIMEOUTS.with([pool]),
            wait: POOL_WAIT.with([pool]),
        }
    }
}

impl<T> Link<T> {
    /// Makes one call on the connection. The connection counts as broken until the call has ended
    /// definitely, so also if its future is dropped or times out.
    async fn call<R>(
        &mut self,
        work: impl AsyncFnOnce(&mut T) -> Result<R, Error>,
    ) -> Result<R, Error> {
        self.in_doubt = true;
        let result = work(&mut self.connection).await;
        self.in_doubt = result
            .as_ref()
            .is_err_and(|error| !error.leaves_connection_usable());
        self.used = Instant::now();
        result
    }
}

impl<C: Connect> ManageConnection for Manager<C> {
    type Connection = Link<C::Connection>;
    type Error = Error;

    async fn connect(&self) -> Result<Self::Connection, Error> {
        // Read before the connection is opened, so that a connection opened while the store failed
        // is discarded too.
        let outage = self.outages.load(Ordering::Acquire);
        let opening = tokio::time::timeout(self.timeout, self.connect.open());
        Ok(Link {
            connection: opening.await.unwrap_or(Err(Error::Timeout(self.timeout)))?,
            outage,
            in_doubt: false,
            used: Instant::now(),
        })
    }

    async fn is_valid(&self, link: &mut Self::Connection) -> Result<(), Error> {
        if link.outage != self.outages.load(Ordering::Acquire) {
            return Err(Error::Connection(Cause::from("opened before an outage")));
        }
        Ok(())
    }

    fn has_broken(&self, link: &mut Self::Connection) -> bool {
        link.in_doubt || link.outage != self.outages.load(Ordering::Acquire)
    }
}

impl LastFailure {
    fn since(&self, started: Instant) -> Option<Error> {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        last.take_if(|(at, _)| *at >= started)
            .map(|(_, error)| error)
    }
}

impl bb8::ErrorSink<Error> for LastFailure {
    fn sink(&self, error: Error) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some((Instant::now(), error));
    }

    fn boxed_clone(&self) -> Box<dyn bb8::ErrorSink<Error>> {
        Box::new(self.clone())
    }
}

impl<C: Connect> Debug for Pool<C> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Pool").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use super::*;

    /// A store that answers on a new connection, and never to a ping.
    #[derive(Default)]
    struct SilentWhenIdle {
        opened: Arc<AtomicU32>,
    }

    impl Connect for SilentWhenIdle {
        type Connection = ();

        const PING: &'static Operation = &PING;

        async fn open(&self) -> Result<(), Error> {
            self.opened.fetch_add(1, Ordering::Relaxed);
            Ok(())
        }

        async fn ping((): &mut ()) -> Result<(), Error> {
            std::future::pending().await
        }
    }

    static PING: Operation = Operation::command("PING");
    static CALL: Operation = Operation::command("CALL");

    #[tokio::test]
    async fn one_silent_connection_makes_all_suspect() {
        const SIZE: u32 = 4;
        let store = SilentWhenIdle::default();
        let opened = Arc::clone(&store.opened);
        let pool = pool(store, SIZE);
        let mut taken = Vec::new();
        for _ in 0..SIZE {
            taken.push(pool.check_out().await.expect("a connection"));
        }
        drop(taken);
        assert_eq!(opened.load(Ordering::Relaxed), SIZE);
        tokio::time::sleep(2 * TRUSTED_IDLE).await;
        let called = pool.call(&CALL, None, async |()| Ok(())).await;
        called.expect("the call is made on a new connection");
        assert_eq!(opened.load(Ordering::Relaxed), SIZE + 1);
    }
    #[tokio::test(start_paused = true)]
    async fn reading_on_an_idle_session_that_has_ended_is_made_on_a_new_one() {
        let store = SilentWhenIdle::default();
        let opened = Arc::clone(&store.opened);
        let pool = pool(store, 1);
        let reads = AtomicU32::new(0);
        let ends_first = async |(): &mut ()| match reads.fetch_add(1, Ordering::Relaxed) {
            0 => Err(Error::Connection("reset".into())),
            _ => Ok(7),
        };
        assert_eq!(read(&pool, async |()| Ok(1)).await, Some(1));
        // It was used just now, so the store itself fails.
        assert_eq!(read(&pool, &ends_first).await, None);
        assert_eq!(reads.load(Ordering::Relaxed), 1);

        assert_eq!(read(&pool, async |()| Ok(1)).await, Some(1));
        tokio::time::sleep(2 * TRUSTED_IDLE).await;
        reads.store(0, Ordering::Relaxed);
        let before = opened.load(Ordering::Relaxed);
        assert_eq!(read(&pool, &ends_first).await, Some(7));
        assert_eq!(opened.load(Ordering::Relaxed), before + 1);

        // A refusal says that the session works.
        tokio::time::sleep(2 * TRUSTED_IDLE).await;
        reads.store(0, Ordering::Relaxed);
        let refused = read(&pool, async |()| {
            reads.fetch_add(1, Ordering::Relaxed);
            Err(refused("42501"))
        });
        assert_eq!(refused.await, None);
        assert_eq!(reads.load(Ordering::Relaxed), 1);
    }

    #[tokio::test]
    async fn failure_that_the_caller_repairs_does_not_mark_the_store_down() {
        static REPAIRED: Operation = Operation::command("REPAIRED").that_repairs("23505");
        let pool = pool(SilentWhenIdle::default(), 1);
        for (code, is_up) in [("23505", true), ("53100", false)] {
            pool.availability.record_success(Instant::now());
            let called = pool.call(&REPAIRED, None, async |()| Err::<(), _>(refused(code)));
            assert!(called.await.is_err());
            assert_eq!(pool.availability.is_up(), is_up, "{code}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn connection_is_used_again_after_a_refusal_and_after_no_other_failure() {
        let store = SilentWhenIdle::default();
        let opened = Arc::clone(&store.opened);
        let pool = pool(store, 1);
        for (error, opens) in [
            (refused("42501"), 1),
            (Error::Connection("reset".into()), 2),
            (Error::Unexpected("no number".into()), 3),
        ] {
            let asked = pool.ask(&CALL, async |()| Err::<(), _>(error)).await;
            assert!(asked.is_err());
            pool.ask(&CALL, async |()| Ok(())).await.expect("an answer");
            assert_eq!(opened.load(Ordering::Relaxed), opens, "{asked:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn reading_that_marks_the_store_down_discards_the_connections() {
        let store = SilentWhenIdle::default();
        let opened = Arc::clone(&store.opened);
        let pool = pool(store, 2);
        let ask = || {
            pool.ask(&CALL, async |()| {
                tokio::time::sleep(Duration::from_millis(1)).await;
                Ok(())
            })
        };
        let (first, second) = tokio::join!(ask(), ask());
        first.and(second).expect("two connections");
        pool.availability.record_success(Instant::now());
        tokio::time::advance(Duration::from_millis(1)).await;
        let silent = async |(): &mut ()| Err(Error::Timeout(Duration::ZERO));
        assert_eq!(read(&pool, silent).await, None);
        assert!(!pool.availability.is_up());
        assert_eq!(read(&pool, async |()| Ok(1)).await, Some(1));
        assert_eq!(opened.load(Ordering::Relaxed), 3);
    }

    #[tokio::test(start_paused = true)]
    async fn refused_reading_leaves_the_store_up_and_its_count_unknown() {
        let pool = pool(SilentWhenIdle::default(), 1);
        pool.availability.record_success(Instant::now());
        assert_eq!(read(&pool, async |()| Ok(7)).await, Some(7));
        tokio::time::advance(Duration::from_millis(1)).await;
        assert_eq!(read(&pool, async |()| Err(refused("XX001"))).await, None);
        assert!(pool.availability.is_up());
        assert_eq!(pool.availability.count(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn wait_for_a_connection_is_explained_by_a_failure_since_it_began() {
        let last = LastFailure::default();
        let began = Instant::now();
        bb8::ErrorSink::sink(&last, refused("28P01"));
        tokio::time::advance(Duration::from_millis(1)).await;
        assert!(last.since(Instant::now()).is_none());
        let failure = last.since(began);
        assert_eq!(failure.as_ref().and_then(Error::code), Some("28P01"));
        assert!(last.since(began).is_none(), "one wait has it already");
    }

    fn pool(store: SilentWhenIdle, size: u32) -> Pool<SilentWhenIdle> {
        let target = Target {
            system: System::Postgresql,
            namespace: String::new(),
            address: String::new(),
            port: 0,
        };
        // As long as three pings take.
        Pool::new(store, size, 3 * PING_TIMEOUT, target, &[&CALL])
    }

    async fn read(
        pool: &Pool<SilentWhenIdle>,
        work: impl AsyncFn(&mut ()) -> Result<i64, Error>,
    ) -> Option<i64> {
        pool.read(&CALL, work, |count| *count).await.ok()
    }

    fn refused(code: &str) -> Error {
        Error::Refused {
            code: code.to_owned(),
            source: "refused".into(),
        }
    }
}
