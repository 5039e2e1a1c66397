//! A `bb8` pool for either store that never hands out a connection known or suspected to be dead.
//!
//! Two things mark a connection: a call on it that did not come to a definite end (it may still
//! be in flight), and an outage of the store since it was opened. Neither costs a round trip.
//! It knows nothing of what is said over a connection.

use std::fmt::Debug;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bb8_redis::bb8::{self, ManageConnection, PooledConnection, QueueStrategy, RunError};

use super::{Cause, Error};
use crate::telemetry::metric::{self, PoolMetrics, System};

/// How to open a connection to a store and how to ask whether an old one still answers.
pub(super) trait Connect: Send + Sync + 'static {
    /// What a call is made on.
    type Connection: Send + 'static;

    /// Opens a connection that is ready for use.
    fn open(&self) -> impl Future<Output = Result<Self::Connection, Error>> + Send;

    /// One cheap round trip.
    fn ping(
        &self,
        connection: &mut Self::Connection,
    ) -> impl Future<Output = Result<(), Error>> + Send;
}

/// Connections of one store, at most `size` of them.
pub(super) struct Pool<C: Connect> {
    connections: bb8::Pool<Manager<C>>,
    outages: Arc<AtomicU64>,
    last_failure: LastFailure,
    metrics: PoolMetrics,
    patience: Duration,
}

/// A pooled connection with what decides whether it may be used again.
pub(super) struct Link<T> {
    connection: T,
    outage: u64,
    in_doubt: bool,
    used: Instant,
}

/// Makes and judges connections for `bb8`.
pub(super) struct Manager<C> {
    connect: C,
    outages: Arc<AtomicU64>,
    patience: Duration,
}

/// The last reason why a connection could not be opened, for whoever waited for it in vain.
#[derive(Debug, Clone, Default)]
struct LastFailure(Arc<Mutex<Option<(Instant, Error)>>>);

/// A connection that has not been used for this long must answer a ping before it is used: a
/// firewall or a load balancer may have forgotten it without a word.
const TRUSTED_IDLE: Duration = Duration::from_secs(30);
/// How long such a ping may take.
const PING_TIMEOUT: Duration = Duration::from_millis(250);

impl<C: Connect> Pool<C> {
    /// A pool that opens connections when they are asked for; opening one, and waiting for one,
    /// take no longer than `patience` each.
    pub(super) fn new(connect: C, size: u32, patience: Duration, system: System) -> Self {
        let outages = Arc::new(AtomicU64::new(0));
        let last_failure = LastFailure::default();
        let manager = Manager {
            connect,
            outages: Arc::clone(&outages),
            patience,
        };
        let connections = bb8::Pool::builder()
            .max_size(size)
            .connection_timeout(patience)
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
            outages,
            last_failure,
            metrics: metric::pool(system, size),
            patience,
        }
    }

    /// Takes a connection, opening one if none is idle.
    pub(super) async fn take(&self) -> Result<PooledConnection<'_, Manager<C>>, Error> {
        let started = Instant::now();
        let taken = self.connections.get().await;
        self.metrics.waited(started.elapsed());
        taken.map_err(|error| match error {
            RunError::User(error) => error,
            RunError::TimedOut => {
                self.metrics.timed_out();
                let failure = self.last_failure.since(started);
                failure.unwrap_or(Error::Timeout(self.patience))
            }
        })
    }

    /// Opens a connection outside the pool, so that the reason why it fails is known at once.
    pub(super) async fn open(&self) -> Result<Link<C::Connection>, Error> {
        self.connections.dedicated_connection().await
    }

    /// Puts a connection made by [`Self::open`] into the pool, or closes it if there is no room.
    pub(super) fn offer(&self, link: Link<C::Connection>) {
        // The error hands back the connection, which is closed by being dropped.
        drop(self.connections.add(link));
    }

    /// Forgets every connection there is: the store has failed, so they are as good as dead.
    pub(super) fn forget_all(&self) {
        self.outages.fetch_add(1, Ordering::AcqRel);
    }

    /// Publishes how many connections are in use and how many calls wait for one.
    pub(super) fn report(&self) {
        let state = self.connections.state();
        let pending = state.statistics.pending_gets();
        self.metrics
            .report(state.connections, state.idle_connections, pending);
    }
}

impl<T> Link<T> {
    /// Makes one call on the connection. Until it has come to a definite end, dropped futures
    /// and deadlines included, the connection counts as broken.
    pub(super) async fn call<R>(
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
        let opening = tokio::time::timeout(self.patience, self.connect.open());
        Ok(Link {
            connection: opening
                .await
                .unwrap_or(Err(Error::Timeout(self.patience)))?,
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
        tokio::time::timeout(PING_TIMEOUT, ping)
            .await
            .unwrap_or(Err(Error::Timeout(PING_TIMEOUT)))
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
