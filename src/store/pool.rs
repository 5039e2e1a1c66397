//! The connections of one store, and every call that is made on them.
//!
//! A pool never hands out a connection known or suspected to be dead. Two things mark one: a call
//! on it that did not come to a definite end (it can still be in flight), and an outage of the
//! store since it was opened. Neither costs a round trip. It knows nothing of what is said over a
//! connection.

use std::fmt::Debug;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bb8_redis::bb8::{self, ManageConnection, PooledConnection, QueueStrategy, RunError};
use metrics::{Counter, Gauge, Histogram};

use super::availability::Availability;
use super::call::{Batch, Operation, Target, observe};
use super::error::{CallError, Cause, Error, System};
use crate::metrics::catalog::{POOL_COUNT, POOL_MAX, POOL_PENDING, POOL_TIMEOUTS, POOL_WAIT};

/// How to open a connection to a store and how to ask whether an old one still answers.
pub(super) trait Connect: Send + Sync + 'static {
    /// What a call is made on.
    type Connection: Send + 'static;

    /// What [`Self::ping`] is observed as.
    const PING: &'static Operation;

    /// Opens a connection that is ready for use.
    fn open(&self) -> impl Future<Output = Result<Self::Connection, Error>> + Send;

    /// One cheap round trip.
    fn ping(
        &self,
        connection: &mut Self::Connection,
    ) -> impl Future<Output = Result<(), Error>> + Send;
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

/// A connection outside a call, with what decides whether it can be used again.
pub(super) struct Link<T> {
    connection: T,
    outage: u64,
    in_doubt: bool,
    used: Instant,
}

/// Makes and judges connections for `bb8`.
pub(super) struct Manager<C> {
    connect: C,
    target: Arc<Target>,
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

/// A connection that has not been used for this long must answer a ping before it is used: a
/// firewall or a load balancer can have forgotten it without a word.
const TRUSTED_IDLE: Duration = Duration::from_secs(30);
/// How long such a ping can take.
const PING_TIMEOUT: Duration = Duration::from_millis(250);

impl<C: Connect> Pool<C> {
    /// A pool that opens connections when they are asked for. A call, its checkout included, takes
    /// no longer than `timeout`. The series of `operations` exist from here on; those with the same
    /// name share theirs.
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
            target: Arc::clone(&target),
            outages: Arc::clone(&outages),
            timeout,
        };
        let connections = bb8::Pool::builder()
            .max_size(size)
            .connection_timeout(timeout)
            .retry_connection(false)
            .test_on_check_out(true)
            // The oldest first, so that connections from before an outage are found and closed.
            .queue_strategy(QueueStrategy::Fifo)
            .max_lifetime(None)
            .idle_timeout(None)
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

    /// The longest that a call takes.
    pub(super) fn timeout(&self) -> Duration {
        self.timeout
    }

    /// Whether the store is up, as every call here tells it.
    pub(super) fn availability(&self) -> &Availability {
        &self.availability
    }

    /// A call that a visit needs: its outcome moves the availability, except for a failure that
    /// the caller repairs.
    pub(super) async fn call<R>(
        &self,
        operation: &Operation,
        batch: Option<&mut Batch>,
        work: impl AsyncFnOnce(&mut C::Connection) -> Result<R, Error>,
    ) -> Result<R, CallError> {
        let started = Instant::now();
        let sent = AtomicBool::new(false);
        let result = observe(&self.target, operation, batch, self.timeout, async {
            let mut link = self.check_out().await?;
            sent.store(true, Ordering::Relaxed);
            link.call(work).await
        })
        .await;
        match &result {
            Ok(_) => self.availability.succeeded(started.elapsed()),
            Err(error) if operation.repairs(error) => {}
            Err(error) => self.fail(error),
        }
        result.map_err(|error| CallError {
            error,
            sent: sent.into_inner(),
        })
    }

    /// Reads a count: it tells how fast the store is. A failure moves the availability only where
    /// no visit has succeeded since the reading began.
    pub(super) async fn read<R>(
        &self,
        operation: &Operation,
        work: impl AsyncFnOnce(&mut C::Connection) -> Result<R, Error>,
        count: impl FnOnce(&R) -> i64,
    ) -> Result<R, Error> {
        let started = Instant::now();
        let result = observe(&self.target, operation, None, self.timeout, async {
            self.check_out().await?.call(work).await
        })
        .await;
        match &result {
            Ok(read) => self.availability.read(count(read), started.elapsed()),
            Err(error) => {
                self.availability.reading_failed(started, error);
                if !self.availability.is_up() {
                    self.forget_all();
                }
            }
        }
        result
    }

    /// A call on a new connection outside the pool, so that the reason why none can be opened is
    /// known at once. It moves nothing: see [`Self::fail`] and [`Self::keep`].
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

    /// A further call on such a connection.
    pub(super) async fn call_on<R>(
        &self,
        link: &mut Link<C::Connection>,
        operation: &Operation,
        work: impl AsyncFnOnce(&mut C::Connection) -> Result<R, Error>,
    ) -> Result<R, Error> {
        observe(&self.target, operation, None, self.timeout, link.call(work)).await
    }

    /// Ends a probe that has succeeded within `took`: the store is up and has counted so many
    /// visits, and the connection goes into the pool, or is closed if there is no room.
    pub(super) fn keep(&self, link: Link<C::Connection>, took: Duration, count: Option<i64>) {
        // The error hands back the connection, which is closed by being dropped.
        drop(self.connections.add(link));
        if let Some(count) = count {
            self.availability.read(count, took);
        }
        self.availability.succeeded(took);
    }

    /// A visit would fail like this: the store is down, and its connections are as good as dead.
    pub(super) fn fail(&self, error: &Error) {
        // Order matters: a probe starts as soon as the store is down, and its connection must
        // survive.
        self.forget_all();
        self.availability.failed(error);
    }

    /// Observes a call that is made on a connection of another kind.
    pub(super) async fn observe<R>(
        &self,
        operation: &Operation,
        timeout: Duration,
        work: impl Future<Output = Result<R, Error>>,
    ) -> Result<R, Error> {
        observe(&self.target, operation, None, timeout, work).await
    }

    /// Publishes how many connections are in use and how many calls wait for one.
    pub(super) fn report(&self) {
        let state = self.connections.state();
        let idle = state.idle_connections;
        let used = state.connections.saturating_sub(idle);
        self.metrics.idle.set(f64::from(idle));
        self.metrics.used.set(f64::from(used));
        let pending = state.statistics.pending_gets();
        self.metrics.pending.set(pending as f64);
    }

    /// Takes a connection, opening one if none is idle.
    async fn check_out(&self) -> Result<PooledConnection<'_, Manager<C>>, Error> {
        let started = Instant::now();
        let taken = self.connections.get().await;
        self.metrics.wait.record(started.elapsed());
        taken.map_err(|error| match error {
            RunError::User(error) => error,
            RunError::TimedOut => {
                self.metrics.timeouts.increment(1);
                let failure = self.last_failure.since(started);
                failure.unwrap_or(Error::Timeout(self.timeout))
            }
        })
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
    /// Makes one call on the connection. Until it has come to a definite end, dropped futures
    /// and deadlines included, the connection counts as broken.
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
        // Read before the connection is opened: one that was opened while the store failed is
        // suspect too.
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
        if link.used.elapsed() < TRUSTED_IDLE {
            return Ok(());
        }
        let ping = link.call(async |connection| self.connect.ping(connection).await);
        observe(&self.target, C::PING, None, PING_TIMEOUT, ping).await
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
