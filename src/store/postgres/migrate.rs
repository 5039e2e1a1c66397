//! Brings the database to this version, one instance at a time.
//!
//! Every wait is bounded: for the lock, for each statement that should be quick, and for those
//! that take as long as the table is large by looking, beside them, whether the server still
//! works on them.

use std::borrow::Cow;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use sqlx::migrate::{MigrateError, Migration, Migrator};
use sqlx::{Connection as _, PgConnection};

use super::session::failure;
use super::{Postgres, READ, REHEARSE, Rehearsal, execute, is_missing, read_count, rehearse};
use crate::store::Error;
use crate::store::call::Operation;
use crate::store::error::Cause;
use crate::store::pool::Link;

static MIGRATIONS: Migrator = sqlx::migrate!();
const UNINSTALL: &str = include_str!("uninstall.sql");

static LEDGER: Operation = Operation::query(
    "SELECT _sqlx_migrations",
    "select version, checksum from public._sqlx_migrations where success",
);
static TAKE_LOCK: Operation = Operation::query(
    "SELECT pg_try_advisory_lock",
    "select pg_try_advisory_lock($1)",
);
static ATTEND: Operation = Operation::query(
    "SELECT pg_stat_activity",
    "select exists (select from pg_stat_activity where pid = $1 and state = 'active')",
);
static BACKEND: Operation = Operation::query("SELECT pg_backend_pid", "select pg_backend_pid()");
pub(super) static UNINSTALL_OBJECTS: Operation = Operation::command("DROP");
pub(super) static APPLY: Operation = Operation::command("MIGRATE");

const UNDEFINED_TABLE: &str = "42P01";

/// Serialises migrations between instances; any constant that nothing else uses.
const MIGRATION_LOCK: i64 = 0x7669_7369_7461_7300;
/// How long to wait for another instance's migration before saying so and trying again.
const LOCK_WAIT: Duration = Duration::from_secs(10);
const LOCK_RETRY: Duration = Duration::from_millis(50);
/// Adopting a table with many rows rewrites it, which takes as long as it takes, while the server
/// is seen to work.
const MIGRATION_TIMEOUT: Duration = Duration::from_mins(30);
/// How often to look whether the server still works on a long statement, and how many looks in a
/// row that fail are its end.
const ATTEND_INTERVAL: Duration = Duration::from_secs(1);
const ATTEND_FAILURES: u32 = 10;

/// A migration that has been applied: its version and its checksum.
type Applied = (i64, Vec<u8>);

/// The version that this program needs the database to have.
pub(super) fn latest_version() -> i64 {
    MIGRATIONS
        .iter()
        .map(|migration| migration.version)
        .max()
        .unwrap_or_default()
}

impl Postgres {
    /// Brings the database to this version, under a lock that only one instance holds. Returns
    /// how many migrations were applied.
    ///
    /// # Errors
    ///
    /// Why it was not done. What had been applied stays; a migration is applied whole or not.
    pub async fn migrate(&self) -> Result<usize, Error> {
        let (_, applied) = self.migrate_and_rehearse().await?;
        Ok(applied)
    }

    /// Applies what is due, and does what a visit needs. Where that shows that something is
    /// missing although the ledger has every migration, they are applied again.
    pub(super) async fn migrate_and_rehearse(&self) -> Result<(Rehearsal, usize), Error> {
        let (mut link, ledger) = self.pool.call_on_new(&LEDGER, read_ledger).await?;
        let mut applied = 0;
        if pending(&ledger) > 0 {
            applied = Box::pin(self.apply(pending(&ledger))).await?;
        }
        let mut rehearsal = self.rehearse_on(&mut link).await;
        if rehearsal.as_ref().is_err_and(is_missing) {
            applied = Box::pin(self.apply(MIGRATIONS.iter().count())).await?;
            rehearsal = self.rehearse_on(&mut link).await;
        }
        self.migrated.store(true, Ordering::Release);
        self.migration_announced.store(false, Ordering::Relaxed);
        Ok(match rehearsal {
            Ok(()) => (Rehearsal::Passed(link), applied),
            Err(error) if is_missing(&error) => return Err(error),
            Err(error) => (Rehearsal::Failed(link, error), applied),
        })
    }

    /// Does what a visit needs, and what the readings need, which is not all the same.
    async fn rehearse_on(&self, link: &mut Link<PgConnection>) -> Result<(), Error> {
        self.pool.call_on(link, &REHEARSE, rehearse).await?;
        match self.pool.call_on(link, &READ, read_count).await {
            Ok(reading) => {
                self.note_recount_due(reading.recount_due);
                Ok(())
            }
            Err(error) if is_missing(&error) => Err(error),
            // Visits can be recorded, which is what counts.
            Err(_) => Ok(()),
        }
    }

    async fn apply(&self, pending: usize) -> Result<usize, Error> {
        self.migrated.store(false, Ordering::Release);
        // Said once: what keeps it from succeeding is said by the store's availability.
        if !self.migration_announced.swap(true, Ordering::Relaxed) {
            tracing::info!(migrations.pending = pending, "migrating the database");
        }
        let started = Instant::now();
        let mut connection = self.session.open_unhurried().await?;
        self.take_lock(&mut connection).await?;
        let applied = self.apply_locked(&mut connection).await?;
        // The session's end gives the lock back; nothing is left to say if it ends badly.
        connection.close().await.ok();
        tracing::info!(
            migrations.applied = applied,
            duration.seconds = started.elapsed().as_secs_f64(),
            "the database is migrated"
        );
        Ok(applied)
    }

    async fn take_lock(&self, connection: &mut PgConnection) -> Result<(), Error> {
        let started = Instant::now();
        loop {
            let attempt = async {
                sqlx::query_scalar::<_, bool>(TAKE_LOCK.text())
                    .bind(MIGRATION_LOCK)
                    .fetch_one(&mut *connection)
                    .await
                    .map_err(failure)
            };
            if self.pool.observe(&TAKE_LOCK, self.timeout, attempt).await? {
                return Ok(());
            }
            if started.elapsed() > LOCK_WAIT {
                return Err(Error::Unexpected(Cause::from(
                    "another session holds the migration lock",
                )));
            }
            tokio::time::sleep(LOCK_RETRY).await;
        }
    }

    /// Applies what another instance has not applied meanwhile.
    async fn apply_locked(&self, connection: &mut PgConnection) -> Result<usize, Error> {
        let reading = read_ledger(connection);
        let ledger = self.pool.observe(&LEDGER, self.timeout, reading).await?;
        let mut due = pending(&ledger);
        // The first migration makes everything, so it can neither be missing from the ledger of
        // a database that has those things, nor be there without them.
        let is_first_due = MIGRATIONS
            .iter()
            .next()
            .is_some_and(|first| !ledger.iter().any(|(version, _)| *version == first.version));
        let is_something_missing = due == 0 && {
            let rehearsal = async {
                rehearse(connection).await?;
                read_count(connection).await
            };
            let rehearsal = self.pool.observe(&REHEARSE, self.timeout, rehearsal).await;
            rehearsal.is_err_and(|error| is_missing(&error))
        };
        if is_first_due || is_something_missing {
            self.pool
                .observe(
                    &UNINSTALL_OBJECTS,
                    self.timeout,
                    uninstall(connection, &ledger),
                )
                .await?;
            due = MIGRATIONS.iter().count();
        }
        let migrator = Migrator {
            migrations: Cow::Borrowed(&MIGRATIONS.migrations),
            // A newer version may have migrated further; what it added is its own business.
            ignore_missing: true,
            // sqlx's own lock waits without limit; ours is held already.
            locking: false,
            ..Migrator::DEFAULT
        };
        self.call_attended(connection, &APPLY, MIGRATION_TIMEOUT, async |connection| {
            migrator
                .run_direct(None, connection, false)
                .await
                .map_err(migration_failure)
        })
        .await?;
        Ok(due)
    }

    /// A call that takes as long as it takes, while the server is seen to work on it. A host that
    /// vanishes says nothing, so another session looks.
    pub(super) async fn call_attended<R>(
        &self,
        connection: &mut PgConnection,
        operation: &Operation,
        timeout: Duration,
        work: impl AsyncFnOnce(&mut PgConnection) -> Result<R, Error>,
    ) -> Result<R, Error> {
        let backend = async {
            sqlx::query_scalar::<_, i32>(BACKEND.text())
                .fetch_one(&mut *connection)
                .await
                .map_err(failure)
        };
        let backend = self.pool.observe(&BACKEND, self.timeout, backend).await?;
        let work = async {
            tokio::select! {
                result = work(connection) => result,
                error = Box::pin(self.until_unattended(backend)) => Err(error),
            }
        };
        self.pool.observe(operation, timeout, work).await
    }

    /// Returns once the server has not answered several times, or does nothing for that session.
    async fn until_unattended(&self, backend: i32) -> Error {
        let mut failures = 0;
        let mut watcher = None;
        loop {
            tokio::time::sleep(ATTEND_INTERVAL).await;
            match self.is_active(backend, &mut watcher).await {
                Ok(true) => failures = 0,
                // No further session is to be had, so the server is there.
                Err(error) if error.is_definite() => failures = 0,
                Ok(false) | Err(_) => failures += 1,
            }
            if failures == ATTEND_FAILURES {
                return Error::Connection(Cause::from(
                    "the server has not been seen to work on it for several seconds",
                ));
            }
        }
    }

    /// Whether the server works on that session's statement, asked on the `watcher`, which is opened
    /// where needed.
    async fn is_active(
        &self,
        backend: i32,
        watcher: &mut Option<Link<PgConnection>>,
    ) -> Result<bool, Error> {
        let look = async |connection: &mut PgConnection| {
            sqlx::query_scalar::<_, bool>(ATTEND.text())
                .bind(backend)
                .fetch_one(connection)
                .await
                .map_err(failure)
        };
        let (link, is_active) = match watcher.take() {
            Some(mut link) => {
                let is_active = self.pool.call_on(&mut link, &ATTEND, look).await?;
                (link, is_active)
            }
            None => self.pool.call_on_new(&ATTEND, look).await?,
        };
        *watcher = Some(link);
        Ok(is_active)
    }
}

/// How many migrations of this version the database lacks.
fn pending(ledger: &[Applied]) -> usize {
    MIGRATIONS
        .iter()
        .filter(|migration| !is_applied(ledger, migration))
        .count()
}

fn is_applied(ledger: &[Applied], migration: &Migration) -> bool {
    ledger.iter().any(|(version, checksum)| {
        *version == migration.version && *checksum == *migration.checksum
    })
}

/// Reads the ledger without a lock, so that a database in order is ready at once, whichever
/// session holds the migration lock.
async fn read_ledger(connection: &mut PgConnection) -> Result<Vec<Applied>, Error> {
    let ledger = sqlx::query_as(LEDGER.text())
        .fetch_all(connection)
        .await
        .map_err(failure);
    match ledger {
        Err(error) if error.code() == Some(UNDEFINED_TABLE) => Ok(Vec::new()),
        ledger => ledger,
    }
}

/// Takes everything away that the migrations made, but not the visits.
async fn uninstall(connection: &mut PgConnection, ledger: &[Applied]) -> Result<(), Error> {
    execute(connection, "begin").await?;
    sqlx::raw_sql(UNINSTALL)
        .execute(&mut *connection)
        .await
        .map_err(failure)?;
    // Never another program's, which can have the same numbers.
    let ours: Vec<i64> = MIGRATIONS
        .iter()
        .filter(|migration| is_applied(ledger, migration))
        .map(|migration| migration.version)
        .collect();
    if !ours.is_empty() {
        sqlx::query("delete from public._sqlx_migrations where version = any ($1)")
            .bind(ours)
            .execute(&mut *connection)
            .await
            .map_err(failure)?;
    }
    execute(connection, "commit").await
}

fn migration_failure(error: MigrateError) -> Error {
    match error {
        MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _) => failure(error),
        other => Error::Unexpected(other.into()),
    }
}
