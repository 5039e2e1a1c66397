//! Postgres: the visits and their exact count.
//!
//! Each statement is committed by itself, and is never repeated once it can have taken effect.
//! `migrations/` has the functions that count. Must not know: HTTP and Redis.

mod attempts;
mod error;
mod login;
mod long_session;
mod migrate;
mod route;
mod session;
mod statements;
mod trust;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use sqlx::PgConnection;
use time::OffsetDateTime;
use tokio::time::Instant;

use self::long_session::LongSession;
use self::migrate::{Rehearsal, Schema};
use self::session::Session;
use self::statements::{
    BEGIN, LOCK_COUNT, MEASURE, MOVE_SEQUENCE, READ, RECORD, RECOUNT, REHEARSE, ROLLBACK, Reading,
    UNIQUE_VIOLATION, execute, is_denied, is_missing, lock_count, measure, move_sequence,
    read_count, record, recount, rehearse,
};
use super::availability::Availability;
use super::call::{Batch, Target};
use super::error::{CallError, Cause, Error, System};
use super::pool::{Link, Pool};
use super::recording::Ledger;
use super::watch::Store;
use crate::config::PostgresConfig;
use crate::metrics::catalog::DATABASE_SIZE;

/// The database of visits.
#[derive(Debug)]
pub struct Postgres {
    pool: Arc<Pool<Session>>,
    session: Session,
    schema: Schema,
    readings: AtomicU64,
}

/// The result of [`Postgres::recount`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Recount {
    /// The total by the ledger.
    pub before: i64,
    /// The number of rows.
    pub after: i64,
}

/// One in this many readings checks everything that can make a recount due.
const THOROUGH_READING: u64 = 5;

/// One in this many readings, which are a second apart, also reads the size of the database.
const MEASURING_READING: u64 = 60;

/// Each batch in flight has one connection at most, to this store or to Redis. The monitor shares
/// them: its reading waits if four batches are in this store.
const POOL_SIZE: u32 = 4;

impl Postgres {
    /// Prepares the connections; none is opened yet.
    #[must_use]
    pub fn new(config: &PostgresConfig) -> Self {
        let session = Session::new(config);
        let target = Target {
            system: System::Postgresql,
            namespace: format!("{}|public", config.db_name),
            address: config.db_host.clone(),
            port: config.db_port,
        };
        let pool = Arc::new(Pool::new(
            session.clone(),
            POOL_SIZE,
            config.db_timeout,
            target,
            &[&RECORD, &migrate::APPLY, &migrate::UNINSTALL_OBJECTS],
        ));
        DATABASE_SIZE.with([]).set(f64::NAN);
        Self {
            schema: Schema::new(Arc::clone(&pool), session.clone()),
            pool,
            session,
            readings: AtomicU64::new(0),
        }
    }

    /// Whether the database had every migration of this version at the last check.
    #[must_use]
    pub fn is_migrated(&self) -> bool {
        self.schema.is_migrated()
    }

    /// Whether loaded data can have made the count wrong.
    #[must_use]
    pub fn is_recount_due(&self) -> bool {
        self.schema.is_recount_due()
    }

    async fn try_record(
        &self,
        arrivals: &[OffsetDateTime],
        batch: &mut Batch,
    ) -> Result<i64, CallError> {
        self.pool
            .call(&RECORD, Some(batch), async |connection| {
                record(connection, arrivals).await
            })
            .await
    }

    /// Brings the database to this version, under a lock that only one instance holds. Returns
    /// how many migrations were applied.
    ///
    /// # Errors
    ///
    /// Why a migration failed. Those applied before it stay; a migration is applied entirely or not
    /// at all.
    pub async fn migrate(&self) -> Result<usize, Error> {
        let (_, applied) = self.schema.migrate_and_rehearse().await?;
        Ok(applied)
    }

    /// Counts the rows, drops the adjustments and starts the ledger again. Visits wait meanwhile.
    ///
    /// # Errors
    ///
    /// Why the recount failed; nothing has changed then.
    pub async fn recount(&self) -> Result<Recount, Error> {
        let mut session = LongSession::open(&self.pool, &self.session).await?;
        let (before, after) = session.call(&RECOUNT, recount).await?;
        Ok(Recount { before, after })
    }

    /// Runs `work` with the total while no visit can be counted. The lock is released when `work`
    /// ends or is dropped.
    ///
    /// # Errors
    ///
    /// Why the lock could not be taken or the total not read, or the error of `work`.
    pub async fn with_count_locked<R>(
        &self,
        settle: Duration,
        work: impl AsyncFnOnce(i64) -> Result<R, Error>,
    ) -> Result<R, Error> {
        // If this future is dropped, the link closes its session, which ends the transaction.
        let begin = async |connection: &mut PgConnection| execute(connection, "begin").await;
        let (mut link, ()) = self.pool.call_on_new(&BEGIN, begin).await?;
        self.pool
            .call_on(&mut link, &LOCK_COUNT, lock_count)
            .await?;
        tokio::time::sleep(settle).await;
        let read = async move |connection: &mut PgConnection| read_count(connection, true).await;
        let reading = self.pool.call_on(&mut link, &READ, read).await?;
        if reading.recount_due {
            return Err(Error::Unexpected(Cause::from(
                "a recount is due, so the total is not certain: run `visitas recount` first",
            )));
        }
        let result = work(reading.total).await;
        let roll_back = async |connection: &mut PgConnection| execute(connection, "rollback").await;
        self.pool.call_on(&mut link, &ROLLBACK, roll_back).await?;
        result
    }

    /// Publishes the database's size. On failure the last one stays: while a full disk keeps
    /// Postgres down, it says why.
    async fn publish_size(&self) {
        if let Ok(bytes) = self.pool.ask(&MEASURE, measure).await {
            DATABASE_SIZE.with([]).set(bytes as f64);
        }
    }

    /// Applies pending migrations, then rehearses a visit. Returns the connection, and the total if
    /// it could be read.
    async fn rehearse(&self) -> Result<(Link<PgConnection>, Option<i64>), Error> {
        let (rehearsal, _) = self.schema.migrate_and_rehearse().await?;
        let mut link = match rehearsal {
            Rehearsal::Passed(link, total) => return Ok((link, total)),
            Rehearsal::Failed(link, error) if error.code() == Some(UNIQUE_VIOLATION) => link,
            Rehearsal::Failed(_, error) => return Err(error),
        };
        // As for a visit: a row inserted by hand has the sequence's next id.
        self.pool
            .call_on(&mut link, &MOVE_SEQUENCE, move_sequence)
            .await?;
        self.pool.call_on(&mut link, &REHEARSE, rehearse).await?;
        Ok((link, None))
    }
}

impl Ledger for Postgres {
    async fn record(
        &self,
        arrivals: &[OffsetDateTime],
        batch: &mut Batch,
    ) -> Result<i64, CallError> {
        match self.try_record(arrivals, batch).await {
            Err(failure) if RECORD.repairs(&failure.error) => {
                // A row inserted by hand has the sequence's next id. The batch has certainly been
                // rolled back, so it is repeated once.
                self.pool
                    .call(&MOVE_SEQUENCE, Some(batch), move_sequence)
                    .await
                    .map_err(|failure| CallError {
                        sent: false,
                        ..failure
                    })?;
                let began = Instant::now();
                self.try_record(arrivals, batch)
                    .await
                    .inspect_err(|failure| {
                        if RECORD.repairs(&failure.error) {
                            self.pool.fail(began, &failure.error);
                        }
                    })
            }
            result => result,
        }
    }

    fn round_trip(&self) -> Duration {
        self.session.round_trip()
    }
}

impl Store for Postgres {
    fn availability(&self) -> &Availability {
        self.pool.availability()
    }

    fn timeout(&self) -> Duration {
        self.pool.timeout()
    }

    /// Applies pending migrations first.
    async fn probe(&self) -> Result<(), Error> {
        let started = Instant::now();
        match self.rehearse().await {
            Ok((link, total)) => {
                self.pool.keep(link, started, total);
                Ok(())
            }
            Err(error) => {
                self.pool.fail(started, &error);
                Err(error)
            }
        }
    }

    /// The number of rows, by the ledger and the adjustments that are not folded into it yet.
    async fn total(&self) -> Result<i64, Error> {
        let began = Instant::now();
        let turn = self.readings.fetch_add(1, Ordering::Relaxed);
        let is_thorough = self.is_recount_due() || turn.is_multiple_of(THOROUGH_READING);
        let read =
            async move |connection: &mut PgConnection| read_count(connection, is_thorough).await;
        let result = self
            .pool
            .read(&READ, read, |reading| reading.total)
            .await
            .and_then(|reading| {
                if is_thorough || reading.recount_due {
                    self.schema.note_recount_due(reading.recount_due);
                }
                check_version(&reading)?;
                Ok(reading.total)
            });
        if result.is_ok() && turn.is_multiple_of(MEASURING_READING) {
            self.publish_size().await;
        }
        if let Err(error) = &result {
            // A visit can still succeed without what a reading needs. The probe creates a missing
            // object again, and fails for as long as a right is missing.
            if is_missing(error) {
                self.schema.note_missing();
            }
            if is_missing(error) || is_denied(error) {
                self.pool.fail(began, error);
            }
        }
        result
    }

    fn report(&self) {
        self.pool.report();
    }
}

/// Fails if the database lacks a migration of this version, with the error of a missing object.
fn check_version(reading: &Reading) -> Result<(), Error> {
    let wanted = migrate::latest_version();
    if reading.version >= Some(wanted) {
        return Ok(());
    }
    let version = reading.version.unwrap_or_default();
    Err(Error::Refused {
        code: "42704".to_owned(),
        source: format!("the database is at migration {version}, this version needs {wanted}")
            .into(),
    })
}
