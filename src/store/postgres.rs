//! Postgres: the visits and their exact count.
//!
//! Each statement is a single one, committed by itself; none is ever repeated after it may have
//! taken effect. The counting itself is in `migrations/`. It knows nothing of HTTP or of Redis.

mod migration;
mod session;
mod trust;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use sqlx::{Connection as _, PgConnection};
use time::OffsetDateTime;

use self::migration::APPLIED;
use self::session::{Session, failure};
use super::pool::Pool;
use super::{Cause, Error, State, Store};
use crate::config::PostgresConfig;
use crate::telemetry::call::{Operation, Target, Trace, call};
use crate::telemetry::metric::System;

/// The database of visits.
#[derive(Debug)]
pub struct Postgres {
    pool: Pool<Session>,
    session: Session,
    state: State,
    target: Target,
    deadline: Duration,
    migrated: AtomicBool,
    migration_announced: AtomicBool,
}

/// Why a batch of visits was not acknowledged.
#[derive(Debug)]
pub struct RecordError {
    /// What the store or the network said.
    pub error: Error,
    /// Whether the batch may be in the table all the same.
    pub in_doubt: bool,
}

/// What [`Postgres::recount`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Recount {
    /// The total that the ledger said.
    pub before: i64,
    /// The number of rows.
    pub after: i64,
}

static RECORD: Operation = Operation::procedure(
    "SELECT registrar_visitas",
    "registrar_visitas",
    "select public.registrar_visitas($1)",
);
static REHEARSE: Operation = Operation::procedure(
    "SELECT ensaiar_registro",
    "ensaiar_registro",
    "select public.ensaiar_registro()",
);
static MOVE_SEQUENCE: Operation = Operation::procedure(
    "SELECT avancar_sequencia",
    "avancar_sequencia",
    "select public.avancar_sequencia()",
);
static TOTAL: Operation = Operation::procedure(
    "SELECT total_visitas",
    "total_visitas",
    "select public.total_visitas()",
);
static LOCK_COUNT: Operation = Operation::procedure(
    "SELECT travar_contagem",
    "travar_contagem",
    "select public.travar_contagem()",
);
static RECOUNT: Operation = Operation::procedure(
    "SELECT recontar_visitas",
    "recontar_visitas",
    "select antes, depois from public.recontar_visitas()",
);
/// What [`REHEARSE`] raises once everything that a visit needs has worked.
const REHEARSED: &str = "VS001";
const UNIQUE_VIOLATION: &str = "23505";

/// The writer takes one connection and the health monitor one; the others leave room for what an
/// outage left behind.
const POOL_SIZE: u32 = 4;

/// Counting takes as long as it takes; this is only the end of waiting for a server that has gone.
const RECOUNT_DEADLINE: Duration = Duration::from_mins(30);

impl Postgres {
    /// Prepares the connections; none is opened yet.
    #[must_use]
    pub fn new(config: &PostgresConfig) -> Self {
        let session = Session::new(config);
        let target = Target {
            system: System::Postgresql,
            namespace: format!("{}|public", config.database),
            address: config.host.clone(),
            port: config.port,
        };
        for operation in [&RECORD, &REHEARSE, &MOVE_SEQUENCE, &TOTAL, &APPLIED] {
            operation.declare(&target);
        }
        Self {
            pool: Pool::new(
                session.clone(),
                POOL_SIZE,
                config.timeout,
                System::Postgresql,
            ),
            session,
            state: State::new(System::Postgresql),
            target,
            deadline: config.timeout,
            migrated: AtomicBool::new(false),
            migration_announced: AtomicBool::new(false),
        }
    }

    /// Whether every migration of this version has been seen in the database.
    #[must_use]
    pub fn is_migrated(&self) -> bool {
        self.migrated.load(Ordering::Acquire)
    }

    /// Records visits that arrived at these moments, in this order, and returns the number of
    /// rows after the last of them. When it returns, they are committed and flushed.
    ///
    /// # Errors
    ///
    /// Whatever kept them from being acknowledged; it says whether they may be recorded even so.
    pub async fn record(
        &self,
        arrivals: &[OffsetDateTime],
        trace: &mut Trace<'_>,
    ) -> Result<i64, RecordError> {
        match self.try_record(arrivals, trace).await {
            Err(failure) if failure.error.code() == Some(UNIQUE_VIOLATION) => {
                // An id written by hand is in the sequence's way. The batch has been rolled back
                // for certain, so it may be repeated, once.
                match self.move_sequence().await {
                    Ok(()) => self.try_record(arrivals, trace).await,
                    Err(error) => Err(RecordError {
                        error,
                        in_doubt: false,
                    }),
                }
            }
            result => result,
        }
        .inspect_err(|failure| self.failed(&failure.error))
    }

    async fn try_record(
        &self,
        arrivals: &[OffsetDateTime],
        trace: &mut Trace<'_>,
    ) -> Result<i64, RecordError> {
        let started = Instant::now();
        let sent = AtomicBool::new(false);
        let work = async {
            let mut link = self.pool.take().await?;
            sent.store(true, Ordering::Relaxed);
            link.call(async |connection| {
                sqlx::query_scalar::<_, i64>(RECORD.text())
                    .bind(arrivals)
                    .fetch_one(connection)
                    .await
                    .map_err(failure)
            })
            .await
        };
        let result = call(
            &self.target,
            &RECORD,
            Some(arrivals.len()),
            trace,
            self.deadline,
            work,
        )
        .await;
        match result {
            Ok(total) => {
                self.state.succeeded(started.elapsed());
                Ok(total)
            }
            Err(error) => Err(RecordError {
                in_doubt: sent.load(Ordering::Relaxed) && !error.is_definite(),
                error,
            }),
        }
    }

    async fn rehearse(&self) -> Result<(), Error> {
        if !self.is_migrated() {
            self.migrate().await?;
        }
        let started = Instant::now();
        let trace = &mut Trace::none();
        let work = async {
            let mut link = self.pool.open().await?;
            link.call(rehearsal).await?;
            Ok(link)
        };
        let link = match call(&self.target, &REHEARSE, None, trace, self.deadline, work).await {
            Err(error) if error.code() == Some(UNIQUE_VIOLATION) => {
                // As for a visit: an id written by hand is in the way.
                let work = async {
                    let mut link = self.pool.open().await?;
                    link.call(sequence_move).await?;
                    link.call(rehearsal).await?;
                    Ok(link)
                };
                call(
                    &self.target,
                    &MOVE_SEQUENCE,
                    None,
                    trace,
                    self.deadline,
                    work,
                )
                .await?
            }
            result => result?,
        };
        self.pool.offer(link);
        self.state.succeeded(started.elapsed());
        Ok(())
    }

    /// Counts the rows, drops what was adjusted and starts the ledger anew. Visits wait meanwhile.
    ///
    /// # Errors
    ///
    /// Why it was not done; nothing has changed then.
    pub async fn recount(&self) -> Result<Recount, Error> {
        let work = async {
            // Counting may take longer than a visit may, so this is not a session for visits.
            let mut connection = self.session.open_unhurried().await?;
            let (before, after) = sqlx::query_as::<_, (i64, i64)>(RECOUNT.text())
                .fetch_one(&mut connection)
                .await
                .map_err(failure)?;
            connection.close().await.ok();
            Ok(Recount { before, after })
        };
        call(
            &self.target,
            &RECOUNT,
            None,
            &mut Trace::none(),
            RECOUNT_DEADLINE,
            work,
        )
        .await
    }

    /// Runs `work` while nobody else can count, handing it the total. The lock is given back when
    /// it ends, however it ends.
    ///
    /// # Errors
    ///
    /// Why the lock or the total could not be had, or whatever `work` failed with.
    pub async fn with_count_locked<R>(
        &self,
        settle: Duration,
        work: impl AsyncFnOnce(i64) -> Result<R, Error>,
    ) -> Result<R, Error> {
        let mut link = self.pool.take().await?;
        link.call(async |connection| {
            let mut transaction = connection.begin().await.map_err(failure)?;
            let lock = async {
                sqlx::query(LOCK_COUNT.text())
                    .execute(&mut *transaction)
                    .await
                    .map_err(failure)
            };
            let trace = &mut Trace::none();
            call(&self.target, &LOCK_COUNT, None, trace, self.deadline, lock).await?;
            tokio::time::sleep(settle).await;
            let total = async {
                sqlx::query_scalar::<_, i64>(TOTAL.text())
                    .fetch_one(&mut *transaction)
                    .await
                    .map_err(failure)
            };
            let total = call(&self.target, &TOTAL, None, trace, self.deadline, total).await?;
            let result = work(total).await;
            transaction.rollback().await.map_err(failure)?;
            result
        })
        .await
    }

    async fn move_sequence(&self) -> Result<(), Error> {
        let work = async {
            let mut link = self.pool.take().await?;
            link.call(sequence_move).await
        };
        let trace = &mut Trace::none();
        call(
            &self.target,
            &MOVE_SEQUENCE,
            None,
            trace,
            self.deadline,
            work,
        )
        .await
    }

    fn failed(&self, error: &Error) {
        // In this order: what a probe opens as soon as the state is down is not to be forgotten.
        self.pool.forget_all();
        self.state.failed(error);
    }

    fn reading_failed(&self, began: Instant, error: &Error) {
        self.state.reading_failed(began, error);
        if !self.state.is_up() {
            self.pool.forget_all();
        }
    }
}

impl Store for Postgres {
    fn state(&self) -> &State {
        &self.state
    }

    /// Migrates first, where that has not happened.
    async fn probe(&self) -> Result<(), Error> {
        let result = self.rehearse().await;
        if let Err(error) = &result {
            self.failed(error);
        }
        result
    }

    /// The number of rows, as the ledger and the adjustments that are not folded yet say.
    async fn total(&self) -> Result<i64, Error> {
        let started = Instant::now();
        let work = async {
            let mut link = self.pool.take().await?;
            link.call(async |connection| {
                sqlx::query_scalar(TOTAL.text())
                    .fetch_one(connection)
                    .await
                    .map_err(failure)
            })
            .await
        };
        let trace = &mut Trace::none();
        let total = call(&self.target, &TOTAL, None, trace, self.deadline, work).await;
        match &total {
            Ok(count) => self.state.read(*count, started.elapsed()),
            Err(error) => self.reading_failed(started, error),
        }
        total
    }

    fn report(&self) {
        self.pool.report();
    }
}

/// Does what a visit needs and undoes it, which shows as an error of our own.
async fn rehearsal(connection: &mut PgConnection) -> Result<(), Error> {
    match sqlx::query(REHEARSE.text())
        .execute(connection)
        .await
        .map_err(failure)
    {
        Err(Error::Refused { code, .. }) if code == REHEARSED => Ok(()),
        Err(error) => Err(error),
        Ok(_) => Err(Error::Unexpected(Cause::from("the rehearsal was kept"))),
    }
}

async fn sequence_move(connection: &mut PgConnection) -> Result<(), Error> {
    sqlx::query(MOVE_SEQUENCE.text())
        .execute(connection)
        .await
        .map_err(failure)?;
    Ok(())
}
