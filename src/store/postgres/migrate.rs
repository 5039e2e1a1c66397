//! Brings the database to this version, one instance at a time.
//!
//! Every wait has a limit: for the lock, for each quick statement, and, in `long_session`, for
//! statements whose time grows with the table. Must not know: when the service probes a store.

use std::borrow::Cow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use sqlx::migrate::{Migrate as _, MigrateError, Migration, Migrator};
use sqlx::{PgConnection, SqlSafeStr as _};

use super::attempts::Attempts;
use super::error::failure;
use super::long_session::LongSession;
use super::session::Session;
use super::statements::{
    ADOPT, AppliedMigration, INSPECT, INSTALLED, INSUFFICIENT_PRIVILEGE, IS_ADOPTED, Inspection,
    LEDGER, READ, REHEARSE, TAKE_LOCK, WRONG_OBJECT_TYPE, adopt, execute, inspect, is_adopted,
    is_denied, is_installed, is_missing, read_count, read_ledger, rehearse, take_lock,
};
use crate::metrics::catalog::RECOUNT_DUE;
use crate::store::call::Operation;
use crate::store::error::{Cause, Error};
use crate::store::pool::{Link, Pool};

static MIGRATIONS: Migrator = sqlx::migrate!();
/// The table that says which migrations the database has. The driver's default is one table for
/// all programs that use the driver, where the numbers of other programs' migrations collide.
const LEDGER_TABLE: &str = "public.visitas_migracoes";
/// The migration whose text [`ADOPTION`] replaces. Its checksum stays, so that a database counts as
/// migrated whichever text it was migrated by.
const ADOPTION_VERSION: i64 = 2;
const ADOPTION: &str = include_str!("adoption.sql");
const UNINSTALL: &str = include_str!("uninstall.sql");

pub(super) static UNINSTALL_OBJECTS: Operation = Operation::command("DROP");
pub(super) static APPLY: Operation = Operation::command("MIGRATE");

const TOO_MANY_CONNECTIONS: &str = "53300";
/// The class of SQLSTATEs of a statement that does not fit the database's objects, or whose role
/// has no right to them.
const ACCESS_RULE_VIOLATION: &str = "42";
/// The SQLSTATEs of an object that exists already: a table, function, column or other object.
const DUPLICATES: [&str; 4] = ["42P07", "42723", "42701", "42710"];
/// What a limit on sessions must leave room for. Serving takes the pool's four, a probe's, and the
/// two of a long call.
const SESSIONS: &str = "migrating takes 2 sessions at once, serving up to 7";
/// The advisory lock that serialises migrations between instances; an arbitrary constant.
const MIGRATION_LOCK: i64 = 0x7669_7369_7461_7300;
/// How long to wait for another instance's migration before the attempt fails.
const LOCK_WAIT: Duration = Duration::from_secs(10);
const LOCK_RETRY: Duration = Duration::from_millis(50);

/// The objects that the migrations create in the database, and whether they are up to date.
#[derive(Debug)]
pub(super) struct Schema {
    pool: Arc<Pool<Session>>,
    session: Session,
    migrated: AtomicBool,
    migration_announced: AtomicBool,
    attempts: Attempts,
    recount_due: AtomicBool,
}

/// How a rehearsal ended. The connection is usable after a refusal.
pub(super) enum Rehearsal {
    Passed(Link<PgConnection>, Option<i64>),
    Failed(Link<PgConnection>, Error),
}

impl Schema {
    pub(super) fn new(pool: Arc<Pool<Session>>, session: Session) -> Self {
        RECOUNT_DUE.with([]).set(0.0);
        Self {
            pool,
            session,
            migrated: AtomicBool::new(false),
            migration_announced: AtomicBool::new(false),
            attempts: Attempts::default(),
            recount_due: AtomicBool::new(false),
        }
    }

    /// Whether the database had every migration of this version at the last check.
    pub(super) fn is_migrated(&self) -> bool {
        self.migrated.load(Ordering::Acquire)
    }

    /// Notes that an object of the migrations is missing.
    pub(super) fn note_missing(&self) {
        self.migrated.store(false, Ordering::Release);
    }

    /// Whether loaded data can have made the count wrong.
    pub(super) fn is_recount_due(&self) -> bool {
        self.recount_due.load(Ordering::Relaxed)
    }

    pub(super) fn note_recount_due(&self, due: bool) {
        RECOUNT_DUE.with([]).set(f64::from(due));
        self.recount_due.store(due, Ordering::Relaxed);
    }

    /// Applies the pending migrations, under a lock that only one instance holds, and rehearses a
    /// visit. If the rehearsal finds an object missing although the ledger has every migration, all
    /// are applied again. Returns how many were applied.
    pub(super) async fn migrate_and_rehearse(&self) -> Result<(Rehearsal, usize), Error> {
        let (mut link, ledger) = self.pool.call_on_new(&LEDGER, read_ledger).await?;
        let mut applied = 0;
        if pending(&ledger) > 0 {
            applied = Box::pin(self.apply(&mut link, pending(&ledger))).await?;
        }
        let mut rehearsal = self.rehearse_on(&mut link).await;
        if rehearsal.as_ref().is_err_and(is_missing) && !self.is_installed(&mut link).await? {
            applied = Box::pin(self.apply(&mut link, MIGRATIONS.iter().count())).await?;
            rehearsal = self.rehearse_on(&mut link).await;
        }
        self.migrated.store(true, Ordering::Release);
        self.migration_announced.store(false, Ordering::Relaxed);
        Ok(match rehearsal {
            Ok(total) => (Rehearsal::Passed(link, total), applied),
            Err(error) => (Rehearsal::Failed(link, error), applied),
        })
    }

    /// Whether every object of the migrations is there, and none of another program in its place.
    async fn is_installed(&self, link: &mut Link<PgConnection>) -> Result<bool, Error> {
        let inspection = self.pool.call_on(link, &INSPECT, inspect).await?;
        Ok(inspection.foreign.is_none()
            && self.pool.call_on(link, &INSTALLED, is_installed).await?)
    }

    /// Rehearses a visit, and a reading, which needs other objects. Returns the total if it could
    /// be read.
    async fn rehearse_on(&self, link: &mut Link<PgConnection>) -> Result<Option<i64>, Error> {
        if !self.pool.call_on(link, &IS_ADOPTED, is_adopted).await? {
            // Adopting another server's rows, or counting the rows of a copy, can exceed the
            // timeout of a visit's call.
            let mut session = self.open_long().await?;
            Box::pin(session.call(&ADOPT, adopt)).await?;
        }
        self.pool.call_on(link, &REHEARSE, rehearse).await?;
        let read = async |connection: &mut PgConnection| read_count(connection, true).await;
        match self.pool.call_on(link, &READ, read).await {
            Ok(reading) => {
                self.note_recount_due(reading.recount_due);
                Ok(Some(reading.total))
            }
            // Without a right that only the reading needs, nothing could tell whether the count is
            // exact.
            Err(error) if is_missing(&error) || is_denied(&error) => Err(error),
            // Another failed reading does not keep visits from being recorded.
            Err(_) => Ok(None),
        }
    }

    async fn apply(&self, link: &mut Link<PgConnection>, pending: usize) -> Result<usize, Error> {
        self.note_missing();
        let inspection = self.pool.call_on(link, &INSPECT, inspect).await?;
        check_obstacles(&inspection)?;
        if let Some(error) = self.attempts.last_failure(&inspection.state) {
            return Err(error);
        }
        // Logged once: the store's availability logs why the migration does not succeed.
        if !self.migration_announced.swap(true, Ordering::Relaxed) {
            tracing::info!(migrations.pending = pending, "migrating the database");
        }
        let started = Instant::now();
        // The lock is released when the session ends.
        let mut session = self.open_long().await?;
        take_migration_lock(&mut session).await?;
        let applied = apply_locked(&mut session).await;
        self.attempts.note(inspection.state, applied.as_ref().err());
        let applied = applied?;
        tracing::info!(
            migrations.applied = applied,
            duration.seconds = started.elapsed().as_secs_f64(),
            "the database is migrated"
        );
        Ok(applied)
    }

    /// Opens a session next to the probe's.
    async fn open_long(&self) -> Result<LongSession<'_>, Error> {
        let opened = LongSession::open(&self.pool, &self.session).await;
        opened.map_err(|error| match error {
            Error::Refused { code, source } if code == TOO_MANY_CONNECTIONS => Error::Refused {
                code,
                source: format!("{source} ({SESSIONS})").into(),
            },
            other => other,
        })
    }
}

/// The version that this program needs the database to have.
pub(super) fn latest_version() -> i64 {
    MIGRATIONS
        .iter()
        .map(|migration| migration.version)
        .max()
        .unwrap_or_default()
}

/// Fails if an attempt to migrate could not succeed.
fn check_obstacles(inspection: &Inspection) -> Result<(), Error> {
    let refused = |code: &str, why: String| {
        Err(Error::Refused {
            code: code.to_owned(),
            source: why.into(),
        })
    };
    // If objects and the ledger disagree, the objects are dropped and created again. Those of
    // another program must never be.
    if let Some(foreign) = &inspection.foreign {
        return refused(
            WRONG_OBJECT_TYPE,
            format!(
                "the database needs migrations, and another program has objects of the same names: \
                 {foreign}; rename them, or give this program a database of its own"
            ),
        );
    }
    // A role that stopped halfway would own a part of the objects, and no other role could
    // finish. So nothing is begun that this role cannot finish.
    if let Some(missing) = &inspection.missing_right {
        return refused(
            INSUFFICIENT_PRIVILEGE,
            format!(
                "the database needs migrations, and {missing}: run `visitas migrate` as a role \
                 that can, then grant this role its rights on what that created"
            ),
        );
    }
    Ok(())
}

async fn take_migration_lock(session: &mut LongSession<'_>) -> Result<(), Error> {
    let started = Instant::now();
    loop {
        let attempt =
            async |connection: &mut PgConnection| take_lock(connection, MIGRATION_LOCK).await;
        if session.call_briefly(&TAKE_LOCK, attempt).await? {
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

/// Applies the migrations that no other instance has applied meanwhile. If the ledger and the
/// database's objects disagree, all objects except the visits are created again.
async fn apply_locked(session: &mut LongSession<'_>) -> Result<usize, Error> {
    session.call_briefly(&APPLY, prepare_ledger).await?;
    let due = pending(&session.call_briefly(&LEDGER, read_ledger).await?);
    if due > 0 {
        match run_migrations(session).await {
            Err(error) if is_duplicate(&error) => {}
            result => return result.map(|()| due),
        }
    } else if session.call_briefly(&INSTALLED, is_installed).await? {
        return Ok(0);
    }
    let ledger = session.call_briefly(&LEDGER, read_ledger).await?;
    session
        .call(&UNINSTALL_OBJECTS, async |connection| {
            uninstall(connection, &ledger).await
        })
        .await?;
    run_migrations(session).await?;
    Ok(MIGRATIONS.iter().count())
}

/// Creates the ledger. If it is empty, copies into it what an earlier version wrote to the driver's
/// default table. That table is left unchanged, so that the earlier version still starts.
async fn prepare_ledger(connection: &mut PgConnection) -> Result<(), Error> {
    connection
        .ensure_migrations_table(LEDGER_TABLE)
        .await
        .map_err(migration_failure)?;
    let (versions, checksums): (Vec<_>, Vec<_>) = MIGRATIONS
        .iter()
        .map(|migration| (migration.version, &*migration.checksum))
        .unzip();
    // By checksum: another program's migrations can have the same numbers.
    let copied = sqlx::query(
        "insert into public.visitas_migracoes \
             (version, description, installed_on, success, checksum, execution_time) \
         select m.version, m.description, m.installed_on, m.success, m.checksum, m.execution_time \
           from public._sqlx_migrations as m \
           join unnest($1, $2) as o (version, checksum) \
             on o.version = m.version \
            and o.checksum = m.checksum \
          where m.success \
            and not exists (select from public.visitas_migracoes)",
    )
    .bind(versions)
    .bind(checksums)
    .execute(connection)
    .await
    .map_err(failure);
    let is_not_ours = |code: &str| code.starts_with(ACCESS_RULE_VIOLATION);
    match copied {
        // The table does not exist, has other columns, or belongs to a role that keeps it to
        // itself: it is not ours.
        Err(error) if error.code().is_some_and(is_not_ours) => Ok(()),
        copied => copied.map(drop),
    }
}

async fn run_migrations(session: &mut LongSession<'_>) -> Result<(), Error> {
    let migrations = MIGRATIONS.iter().cloned().map(|mut migration| {
        if migration.version == ADOPTION_VERSION {
            migration.sql = ADOPTION.into_sql_str();
        }
        migration
    });
    let migrator = Migrator {
        migrations: migrations.collect(),
        table_name: Cow::Borrowed(LEDGER_TABLE),
        // A newer version can have migrated further; its additions do not concern this version.
        ignore_missing: true,
        // sqlx's own lock waits without limit; ours is held already.
        locking: false,
        ..Migrator::DEFAULT
    };
    session
        .call(&APPLY, async |connection| {
            migrator
                .run_direct(None, connection, false)
                .await
                .map_err(migration_failure)
        })
        .await
}

/// How many migrations of this version the database lacks.
fn pending(ledger: &[AppliedMigration]) -> usize {
    MIGRATIONS
        .iter()
        .filter(|migration| !is_applied(ledger, migration))
        .count()
}

fn is_applied(ledger: &[AppliedMigration], migration: &Migration) -> bool {
    ledger.iter().any(|(version, checksum)| {
        *version == migration.version && *checksum == *migration.checksum
    })
}

fn is_duplicate(error: &Error) -> bool {
    error.code().is_some_and(|code| DUPLICATES.contains(&code))
}

/// Drops every object of the migrations, except the visits.
async fn uninstall(
    connection: &mut PgConnection,
    ledger: &[AppliedMigration],
) -> Result<(), Error> {
    execute(connection, "begin").await?;
    sqlx::raw_sql(UNINSTALL)
        .execute(&mut *connection)
        .await
        .map_err(failure)?;
    // Those of a newer version stay.
    let ours: Vec<i64> = MIGRATIONS
        .iter()
        .filter(|migration| is_applied(ledger, migration))
        .map(|migration| migration.version)
        .collect();
    if !ours.is_empty() {
        sqlx::query("delete from public.visitas_migracoes where version = any ($1)")
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
        // The driver's own message names its default table.
        MigrateError::Dirty(version) => Error::Unexpected(Cause::from(format!(
            "{LEDGER_TABLE} says that migration {version} has failed: delete its row"
        ))),
        other => Error::Unexpected(other.into()),
    }
}
