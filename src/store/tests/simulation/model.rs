//! The two stores as the recorder and the watch see them: the real pool and the real availability,
//! over connections to a model of a server.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use time::OffsetDateTime;
use tokio::time::Instant;

use super::server::{Kind, Network, READ, RECORD, REHEARSE, Server, Session};
use super::timeline::{Event, Timeline};
use crate::store::availability::Availability;
use crate::store::call::{Batch, Target};
use crate::store::error::{CallError, Error, System};
use crate::store::pool::Pool;
use crate::store::recording::{Counter, Ledger};
use crate::store::watch::Store;

/// A store of the model.
#[derive(Debug)]
pub(super) struct Model {
    pub(super) server: Arc<Server>,
    kind: Kind,
    pool: Pool<Network>,
    /// Calls for batches in flight, checkout included.
    active: AtomicUsize,
    /// The most of them at once.
    most_active: AtomicUsize,
    timeline: Timeline,
}

/// Counts a call for a batch until it is dropped.
struct Active<'a>(&'a AtomicUsize);

impl<'a> Active<'a> {
    fn of(active: &'a AtomicUsize) -> Self {
        active.fetch_add(1, Ordering::Relaxed);
        Self(active)
    }
}

impl Drop for Active<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// As for the real stores.
const POOL_SIZE: u32 = 4;

impl Model {
    pub(super) fn new(
        server: &Arc<Server>,
        kind: Kind,
        timeout: Duration,
        timeline: &Timeline,
    ) -> Arc<Self> {
        let system = match kind {
            Kind::Postgres => System::Postgresql,
            Kind::Redis => System::Redis,
        };
        let target = Target {
            system,
            namespace: String::new(),
            address: String::new(),
            port: 0,
        };
        let network = Network(Arc::clone(server));
        Arc::new(Self {
            server: Arc::clone(server),
            kind,
            pool: Pool::new(network, POOL_SIZE, timeout, target, &[]),
            active: AtomicUsize::new(0),
            most_active: AtomicUsize::new(0),
            timeline: timeline.clone(),
        })
    }

    /// Whether a call for a batch is in flight.
    pub(super) fn is_active(&self) -> bool {
        self.active.load(Ordering::Relaxed) > 0
    }

    /// The most batches that were counted at once.
    pub(super) fn most_active(&self) -> usize {
        self.most_active.load(Ordering::Relaxed)
    }

    async fn rehearse(session: &mut Session, kind: Kind) -> Result<i64, Error> {
        match kind {
            Kind::Postgres => session.rehearse().await,
            Kind::Redis => session.increment(0).await,
        }
    }

    async fn read(session: &mut Session, kind: Kind) -> Result<i64, Error> {
        match kind {
            Kind::Postgres => session.read_rows().await,
            Kind::Redis => session.increment(0).await,
        }
    }

    /// Notes each change of the availability, for as long as the future is polled.
    pub(super) async fn note_changes(&self) {
        let mut changes = self.availability().changes();
        while changes.changed().await.is_ok() {
            let store = self.kind;
            self.timeline.add(if self.availability().is_up() {
                Event::Up { store }
            } else {
                Event::Down { store }
            });
        }
    }
}

impl Store for Model {
    fn availability(&self) -> &Availability {
        self.pool.availability()
    }

    fn timeout(&self) -> Duration {
        self.pool.timeout()
    }

    async fn probe(&self) -> Result<(), Error> {
        let (began, kind) = (Instant::now(), self.kind);
        let rehearsed = self
            .pool
            .call_on_new(&REHEARSE, async move |session: &mut Session| {
                Self::rehearse(session, kind).await
            });
        match rehearsed.await {
            Ok((link, count)) => {
                self.pool.keep(link, began, Some(count));
                Ok(())
            }
            Err(error) => {
                self.pool.fail(began, &error);
                Err(error)
            }
        }
    }

    async fn total(&self) -> Result<i64, Error> {
        let kind = self.kind;
        let read = async move |session: &mut Session| Self::read(session, kind).await;
        self.pool.read(&READ, read, |count| *count).await
    }

    fn report(&self) {}
}

impl Ledger for Model {
    async fn record(
        &self,
        arrivals: &[OffsetDateTime],
        batch: &mut Batch,
    ) -> Result<i64, CallError> {
        self.timeline.check(self.availability().is_up(), || {
            "a batch is sent to Postgres while it is down".to_owned()
        });
        let _active = Active::of(&self.active);
        let micros: Vec<_> = arrivals.iter().map(micros).collect();
        self.server.begin(&micros);
        self.pool
            .call(&RECORD, Some(batch), async |session: &mut Session| {
                session.record(&micros).await
            })
            .await
    }

    fn round_trip(&self) -> Duration {
        self.server.round_trip()
    }
}

impl Counter for Model {
    async fn increment(&self, visits: usize, batch: &mut Batch) -> Result<i64, CallError> {
        self.timeline.check(self.availability().is_up(), || {
            "a batch is counted in Redis while it is down".to_owned()
        });
        let _active = Active::of(&self.active);
        let active = self.active.load(Ordering::Relaxed);
        self.most_active.fetch_max(active, Ordering::Relaxed);
        let by = i64::try_from(visits).expect("few visits");
        self.pool
            .call(&RECORD, Some(batch), async |session: &mut Session| {
                session.increment(by).await
            })
            .await
    }
}

/// The microseconds since 1970.
fn micros(time: &OffsetDateTime) -> i64 {
    i64::try_from(time.unix_timestamp_nanos() / 1000).expect("a year of the simulation")
}
