//! Brings the database to this version, one instance at a time.
//!
//! Every wait is bounded: for the lock, for each statement that should be quick, and for those
//! that take as long as the table is large by looking, beside them, whether the server still
//! works on them.

use std::borrow::Cow;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use sqlx::PgConnection;
use sqlx::migrate::{MigrateError, Migration, Migrator};

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
/// Whether everything is there that the migrations made.
static INSTALLED: Operation = Operation::query(
    "SELECT pg_proc",
    "select to_regclass('public.visitas_contagem') is not null \
        and to_regclass('public.visitas_ajustes') is not null \
        and 2 = (select count(*) from pg_attribute \
                  where attrelid = to_regclass('public.visitas') \
                    and attname in ('id', 'data') and not attisdropped) \
        and 3 = (select count(*) from pg_trigger \
                  where tgrelid = to_regclass('public.visitas') \
                    and tgfoid = to_regprocedure('public.anotar_ajuste()')) \
        and 15 = (select count(distinct proname) from pg_proc \
                   where pronamespace = to_regnamespace('public') \
                     and proname in ('travar_contagem', 'registrar_visitas', 'recusar_perda', \
                         'conferir_perda', 'base_da_contagem', 'faltas_da_base', \
                         'assumir_contagem', 'adotar_contagem', 'ensaiar_registro', \
                         'total_visitas', 'estado_da_contagem', 'refazer_contagem', \
                         'recontar_visitas', 'avancar_sequencia', 'esta_origem'))",
);
static IS_ADOPTED: Operation = Operation::query(
    "SELECT visitas_contagem",
    "select exists (select from public.visitas_contagem where origem = public.esta_origem())",
);
static ADOPT: Operation = Operation::procedure(
    "SELECT adotar_contagem",
    "adotar_contagem",
    "select public.adotar_contagem()",
);
static ATTEND: Operation = Operation::query(
    "SELECT pg_stat_activity",
    "select exists (select from pg_stat_activity \
                     where pid = $1 and state in ('active', 'disabled'))",
);
static OPEN: Operation = Operation::query("SELECT pg_backend_pid", "select pg_backend_pid()");
pub(super) static UNINSTALL_OBJECTS: Operation = Operation::command("DROP");
pub(super) static APPLY: Operation = Operation::command("MIGRATE");

const UNDEFINED_TABLE: &str = "42P01";
/// A table, function, column or other object is there already.
const DUPLICATES: [&str; 4] = ["42P07", "42723", "42701", "42710"];

/// Serialises migrations between instances; any constant that nothing else uses.
const MIGRATION_LOCK: i64 = 0x7669_7369_7461_7300;
/// How long to wait for another instance's migration before saying so and trying again.
const LOCK_WAIT: Duration = Duration::from_secs(10);
const LOCK_RETRY: Duration = Duration::from_millis(50);
/// Adopting a table with many rows, and counting them, takes as long as it takes, while the server
/// is seen to work.
const UNHURRIED_TIMEOUT: Duration = Duration::from_mins(30);
/// How often to look whether the server still works on a long statement, and how many looks in a
/// row that fail are its end.
const ATTEND_INTERVAL: Duration = Duration::from_secs(1);
const ATTEND_FAILURES: u32 = 10;

/// A session without a limit on how long a statement may run, and the server's process of it.
pub(super) struct Unhurried {
    connection: PgConnection,
    backend: i32,
}

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
        if rehearsal.as_ref().is_err_and(is_missing)
            && !self
                .pool
                .call_on(&mut link, &INSTALLED, is_installed)
                .await?
        {
            applied = Box::pin(self.apply(MIGRATIONS.iter().count())).await?;
            rehearsal = self.rehearse_on(&mut link).await;
        }
        self.migrated.store(true, Ordering::Release);
        self.migration_announced.store(false, Ordering::Relaxed);
        Ok(match rehearsal {
            Ok(total) => (Rehearsal::Passed(link, total), applied),
            Err(error) => (Rehearsal::Failed(link, error), applied),
        })
    }

    /// Does what a visit needs, and what the readings need, which is not all the same. Returns the
    /// total, where it could be read.
    async fn rehearse_on(&self, link: &mut Link<PgConnection>) -> Result<Option<i64>, Error> {
        if !self
            .pool
            .call_on(link, &IS_ADOPTED, async |connection| {
                answer(connection, IS_ADOPTED.text()).await
            })
            .await?
        {
            self.adopt_count().await?;
        }
        self.pool.call_on(link, &REHEARSE, rehearse).await?;
        let read = async |connection: &mut PgConnection| read_count(connection, true).await;
        match self.pool.call_on(link, &READ, read).await {
            Ok(reading) => {
                self.note_recount_due(reading.recount_due);
                Ok(Some(reading.total))
            }
            Err(error) if is_missing(&error) => Err(error),
            // Visits can be recorded, which is what counts.
            Err(_) => Ok(None),
        }
    }

    /// Makes this server's first entry of the count: what another one wrote is adopted, or the rows
    /// of a copy are counted, which can take longer than a visit may.
    async fn adopt_count(&self) -> Result<(), Error> {
        let mut session = self.open_unhurried().await?;
        Box::pin(
            self.call_attended(&mut session, &ADOPT, async |connection| {
                answer(connection, ADOPT.text()).await
            }),
        )
        .await
        .map(drop)
    }

    async fn apply(&self, pending: usize) -> Result<usize, Error> {
        self.migrated.store(false, Ordering::Release);
        // Said once: what keeps it from succeeding is said by the store's availability.
        if !self.migration_announced.swap(true, Ordering::Relaxed) {
            tracing::info!(migrations.pending = pending, "migrating the database");
        }
        let started = Instant::now();
        // The end of the session gives the lock back.
        let mut session = self.open_unhurried().await?;
        self.take_lock(&mut session.connection).await?;
        let applied = self.apply_locked(&mut session).await?;
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

    /// Applies what another instance has not applied meanwhile. Where the ledger and what is there
    /// do not agree, everything but the visits is made again.
    async fn apply_locked(&self, session: &mut Unhurried) -> Result<usize, Error> {
        let reading = read_ledger(&mut session.connection);
        let ledger = self.pool.observe(&LEDGER, self.timeout, reading).await?;
        let due = pending(&ledger);
        if due > 0 {
            match self.run_migrations(session).await {
                Err(error) if is_duplicate(&error) => {}
                result => return result.map(|()| due),
            }
        } else {
            let looking = is_installed(&mut session.connection);
            if self.pool.observe(&INSTALLED, self.timeout, looking).await? {
                return Ok(0);
            }
        }
        let reading = read_ledger(&mut session.connection);
        let ledger = self.pool.observe(&LEDGER, self.timeout, reading).await?;
        self.call_attended(session, &UNINSTALL_OBJECTS, async |connection| {
            uninstall(connection, &ledger).await
        })
        .await?;
        self.run_migrations(session).await?;
        Ok(MIGRATIONS.iter().count())
    }

    async fn run_migrations(&self, session: &mut Unhurried) -> Result<(), Error> {
        let migrator = Migrator {
            migrations: Cow::Borrowed(&MIGRATIONS.migrations),
            // A newer version may have migrated further; what it added is its own business.
            ignore_missing: true,
            // sqlx's own lock waits without limit; ours is held already.
            locking: false,
            ..Migrator::DEFAULT
        };
        self.call_attended(session, &APPLY, async |connection| {
            migrator
                .run_direct(None, connection, false)
                .await
                .map_err(migration_failure)
        })
        .await
    }

    /// Opens a session for what can take longer than a visit may.
    pub(super) async fn open_unhurried(&self) -> Result<Unhurried, Error> {
        let opening = async {
            let mut connection = self.session.open_unhurried().await?;
            let backend = sqlx::query_scalar(OPEN.text())
                .fetch_one(&mut connection)
                .await
                .map_err(failure)?;
            Ok(Unhurried {
                connection,
                backend,
            })
        };
        self.pool.observe(&OPEN, self.timeout, opening).await
    }

    /// A call that takes as long as it takes, while the server is seen to work on it. A host that
    /// vanishes says nothing, so another session looks.
    pub(super) async fn call_attended<R>(
        &self,
        session: &mut Unhurried,
        operation: &Operation,
        work: impl AsyncFnOnce(&mut PgConnection) -> Result<R, Error>,
    ) -> Result<R, Error> {
        let Unhurried {
            connection,
            backend,
        } = session;
        let work = async {
            tokio::select! {
                result = work(connection) => result,
                error = Box::pin(self.until_unattended(*backend)) => Err(error),
            }
        };
        self.pool.observe(operation, UNHURRIED_TIMEOUT, work).await
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

async fn is_installed(connection: &mut PgConnection) -> Result<bool, Error> {
    answer(connection, INSTALLED.text()).await
}

fn is_duplicate(error: &Error) -> bool {
    error.code().is_some_and(|code| DUPLICATES.contains(&code))
}

async fn answer(connection: &mut PgConnection, question: &'static str) -> Result<bool, Error> {
    sqlx::query_scalar(question)
        .fetch_one(connection)
        .await
        .map_err(failure)
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
