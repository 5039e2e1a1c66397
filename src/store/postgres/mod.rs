//! Postgres: the visits and their exact count.
//!
//! Each statement is a single one, committed by itself; none is ever repeated after it can have
//! taken effect. The counting itself is in `migrations/`. It knows nothing of HTTP or of Redis.

mod migrate;
mod session;
mod trust;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use sqlx::PgConnection;
use time::OffsetDateTime;

use self::session::{Session, failure};
use super::call::{Operation, Target};
use super::error::Cause;
use super::pool::{Link, Pool};
use super::{Availability, Batch, CallError, Error, Store};
use crate::config::PostgresConfig;
use crate::metrics::{self, System};

/// The database of visits.
#[derive(Debug)]
pub struct Postgres {
    pool: Pool<Session>,
    session: Session,
    timeout: Duration,
    migrated: AtomicBool,
    migration_announced: AtomicBool,
    recount_due: AtomicBool,
    readings: AtomicU64,
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
)
.that_records_visits()
.that_repairs(UNIQUE_VIOLATION);
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
/// The count, whether it can be trusted, and how far the database is migrated: one snapshot.
static READ: Operation = Operation::procedure(
    "SELECT estado_da_contagem",
    "estado_da_contagem",
    "select e.total, e.recontagem, \
            (select max(m.version) from public._sqlx_migrations as m where m.success) \
       from public.estado_da_contagem($1) as e",
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
static BEGIN: Operation = Operation::command("BEGIN");
static ROLLBACK: Operation = Operation::command("ROLLBACK");
static PING: Operation = Operation::command("PING");

/// What [`REHEARSE`] raises once everything that a visit needs has worked.
const REHEARSED: &str = "VS001";
const UNIQUE_VIOLATION: &str = "23505";
/// A table, column, function, type or schema is not there. It can be one of ours, in a database
/// that was emptied or replaced, or one that a trigger of another program needs.
const MISSING: [&str; 5] = ["42P01", "42703", "42883", "42704", "3F000"];

/// Every so many readings look for all that can make a recount due.
const THOROUGH_READING: u64 = 5;

/// The writer takes one connection and the monitor one; the others leave room for what an outage
/// left behind.
const POOL_SIZE: u32 = 4;

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
        let operations = [&RECORD, &migrate::APPLY, &migrate::UNINSTALL_OBJECTS];
        Self {
            pool: Pool::new(
                session.clone(),
                POOL_SIZE,
                config.timeout,
                target,
                &operations,
            ),
            session,
            timeout: config.timeout,
            migrated: AtomicBool::new(false),
            migration_announced: AtomicBool::new(false),
            recount_due: AtomicBool::new(false),
            readings: AtomicU64::new(0),
        }
    }

    /// Whether the database had every migration of this version when it was last looked at.
    #[must_use]
    pub fn is_migrated(&self) -> bool {
        self.migrated.load(Ordering::Acquire)
    }

    /// Whether data was loaded into the database in a way that can have led the count astray.
    #[must_use]
    pub fn is_recount_due(&self) -> bool {
        self.recount_due.load(Ordering::Relaxed)
    }

    /// Records visits that arrived at these moments, in this order, and returns the number of
    /// rows after the last of them. When it returns, they are committed and flushed.
    ///
    /// # Errors
    ///
    /// Why they were not acknowledged, and whether they can be recorded all the same.
    pub async fn record(
        &self,
        arrivals: &[OffsetDateTime],
        batch: &mut Batch,
    ) -> Result<i64, CallError> {
        match self.try_record(arrivals, batch).await {
            Err(failure) if RECORD.repairs(&failure.error) => {
                // An id written by hand is in the sequence's way. The batch has been rolled back
                // for certain, so it may be repeated, once.
                self.pool
                    .call(&MOVE_SEQUENCE, Some(batch), move_sequence)
                    .await
                    .map_err(|failure| CallError {
                        sent: false,
                        ..failure
                    })?;
                self.try_record(arrivals, batch)
                    .await
                    .inspect_err(|failure| {
                        if RECORD.repairs(&failure.error) {
                            self.pool.fail(&failure.error);
                        }
                    })
            }
            result => result,
        }
    }

    async fn try_record(
        &self,
        arrivals: &[OffsetDateTime],
        batch: &mut Batch,
    ) -> Result<i64, CallError> {
        self.pool
            .call(&RECORD, Some(batch), async |connection| {
                sqlx::query_scalar::<_, i64>(RECORD.text())
                    .bind(arrivals)
                    .fetch_one(connection)
                    .await
                    .map_err(failure)
            })
            .await
    }

    /// Counts the rows, drops what was adjusted and starts the ledger again. Visits wait
    /// meanwhile.
    ///
    /// # Errors
    ///
    /// Why it was not done; nothing has changed then.
    pub async fn recount(&self) -> Result<Recount, Error> {
        let mut session = self.open_unhurried().await?;
        self.call_attended(&mut session, &RECOUNT, async |connection| {
            let (before, after) = sqlx::query_as::<_, (i64, i64)>(RECOUNT.text())
                .fetch_one(connection)
                .await
                .map_err(failure)?;
            Ok(Recount { before, after })
        })
        .await
    }

    /// Runs `work` while no visit can be counted, handing it the total. The lock is given back
    /// when it ends, however it ends.
    ///
    /// # Errors
    ///
    /// Why the lock or the total could not be had, or the error of `work`.
    pub async fn with_count_locked<R>(
        &self,
        settle: Duration,
        work: impl AsyncFnOnce(i64) -> Result<R, Error>,
    ) -> Result<R, Error> {
        // Dropped at any point, the link closes its session, which ends the transaction.
        let (mut link, ()) = self.pool.call_on_new(&BEGIN, begin).await?;
        self.pool
            .call_on(&mut link, &LOCK_COUNT, async |connection| {
                execute(connection, LOCK_COUNT.text()).await
            })
            .await?;
        tokio::time::sleep(settle).await;
        let reading = self
            .pool
            .call_on(&mut link, &READ, async |connection| {
                read_count(connection, true).await
            })
            .await?;
        if reading.recount_due {
            return Err(Error::Unexpected(Cause::from(
                "a recount is due, so the total is not certain: run `visitas recount` first",
            )));
        }
        let result = work(reading.total).await;
        self.pool.call_on(&mut link, &ROLLBACK, roll_back).await?;
        result
    }

    /// Migrates where that is due, then does what a visit needs. Returns the connection, and the
    /// total where it could be read.
    async fn rehearse(&self) -> Result<(Link<PgConnection>, Option<i64>), Error> {
        let (link, _) = self.migrate_and_rehearse().await?;
        let mut link = match link {
            Rehearsal::Passed(link, total) => return Ok((link, total)),
            Rehearsal::Failed(link, error) if error.code() == Some(UNIQUE_VIOLATION) => link,
            Rehearsal::Failed(_, error) => return Err(error),
        };
        // As for a visit: an id written by hand is in the way.
        self.pool
            .call_on(&mut link, &MOVE_SEQUENCE, move_sequence)
            .await?;
        self.pool.call_on(&mut link, &REHEARSE, rehearse).await?;
        Ok((link, None))
    }

    fn note_recount_due(&self, due: bool) {
        metrics::recount_due(due);
        self.recount_due.store(due, Ordering::Relaxed);
    }
}

/// How a rehearsal ended. The connection is usable after a refusal.
enum Rehearsal {
    Passed(Link<PgConnection>, Option<i64>),
    Failed(Link<PgConnection>, Error),
}

impl Store for Postgres {
    fn availability(&self) -> &Availability {
        self.pool.availability()
    }

    /// Migrates first, where that is due.
    async fn probe(&self) -> Result<(), Error> {
        let started = Instant::now();
        match self.rehearse().await {
            Ok((link, total)) => {
                self.pool.keep(link, started.elapsed(), total);
                Ok(())
            }
            Err(error) => {
                self.pool.fail(&error);
                Err(error)
            }
        }
    }

    /// The number of rows, as the ledger and the adjustments that are not folded yet say.
    async fn total(&self) -> Result<i64, Error> {
        let turn = self.readings.fetch_add(1, Ordering::Relaxed);
        let is_thorough = self.is_recount_due() || turn.is_multiple_of(THOROUGH_READING);
        let read = async |connection: &mut PgConnection| read_count(connection, is_thorough).await;
        let result = self
            .pool
            .read(&READ, read, |reading| reading.total)
            .await
            .and_then(|reading| {
                if is_thorough || reading.recount_due {
                    self.note_recount_due(reading.recount_due);
                }
                reading.check_version()?;
                Ok(reading.total)
            });
        if let Err(error) = &result
            && is_missing(error)
        {
            // A visit can still succeed, since it does not need what is missing. The probe makes it
            // again.
            self.migrated.store(false, Ordering::Release);
            self.pool.fail(error);
        }
        result
    }

    fn report(&self) {
        self.pool.report();
    }
}

/// What [`READ`] returns.
struct Reading {
    total: i64,
    recount_due: bool,
    version: Option<i64>,
}

impl Reading {
    fn check_version(&self) -> Result<(), Error> {
        let wanted = migrate::latest_version();
        if self.version >= Some(wanted) {
            return Ok(());
        }
        let version = self.version.unwrap_or_default();
        Err(Error::Refused {
            code: "42704".to_owned(),
            source: format!("the database is at migration {version}, this version needs {wanted}")
                .into(),
        })
    }
}

fn is_missing(error: &Error) -> bool {
    error.code().is_some_and(|code| MISSING.contains(&code))
}

async fn read_count(connection: &mut PgConnection, is_thorough: bool) -> Result<Reading, Error> {
    let (total, recount_due, version) = sqlx::query_as::<_, (i64, bool, Option<i64>)>(READ.text())
        .bind(is_thorough)
        .fetch_one(connection)
        .await
        .map_err(failure)?;
    Ok(Reading {
        total,
        recount_due,
        version,
    })
}

/// Does what a visit needs and undoes it, which shows as an error of our own.
async fn rehearse(connection: &mut PgConnection) -> Result<(), Error> {
    match execute(connection, REHEARSE.text()).await {
        Err(Error::Refused { code, .. }) if code == REHEARSED => Ok(()),
        Err(error) => Err(error),
        Ok(()) => Err(Error::Unexpected(Cause::from("the rehearsal was kept"))),
    }
}

async fn move_sequence(connection: &mut PgConnection) -> Result<(), Error> {
    execute(connection, MOVE_SEQUENCE.text()).await
}

async fn begin(connection: &mut PgConnection) -> Result<(), Error> {
    execute(connection, "begin").await
}

async fn roll_back(connection: &mut PgConnection) -> Result<(), Error> {
    execute(connection, "rollback").await
}

async fn execute(connection: &mut PgConnection, statement: &'static str) -> Result<(), Error> {
    sqlx::query(statement)
        .execute(connection)
        .await
        .map_err(failure)?;
    Ok(())
}
