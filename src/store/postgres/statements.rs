//! Every statement that the service sends to Postgres: its operation, and the function that sends
//! it and reads the response. `migrations/` has the statements of the migrations.
//!
//! Must not know: when a statement is sent, and how the caller handles a failure.

use sqlx::PgConnection;
use time::OffsetDateTime;

use super::error::failure;
use crate::store::call::Operation;
use crate::store::error::{Cause, Error};

pub(super) static RECORD: Operation = Operation::procedure(
    "SELECT registrar_visitas",
    "registrar_visitas",
    "select public.registrar_visitas($1)",
)
.that_records_visits()
.that_repairs(UNIQUE_VIOLATION);
pub(super) static REHEARSE: Operation = Operation::procedure(
    "SELECT ensaiar_registro",
    "ensaiar_registro",
    "select public.ensaiar_registro()",
);
pub(super) static MOVE_SEQUENCE: Operation = Operation::procedure(
    "SELECT avancar_sequencia",
    "avancar_sequencia",
    "select public.avancar_sequencia()",
);
/// The count, whether a recount is due, and the latest migration, in one snapshot.
pub(super) static READ: Operation = Operation::procedure(
    "SELECT estado_da_contagem",
    "estado_da_contagem",
    "select e.total, e.recontagem, \
            (select max(m.version) from public.visitas_migracoes as m where m.success) \
       from public.estado_da_contagem($1) as e",
);
pub(super) static LOCK_COUNT: Operation = Operation::procedure(
    "SELECT travar_contagem",
    "travar_contagem",
    "select public.travar_contagem()",
);
pub(super) static RECOUNT: Operation = Operation::procedure(
    "SELECT recontar_visitas",
    "recontar_visitas",
    "select antes, depois from public.recontar_visitas()",
);
pub(super) static BEGIN: Operation = Operation::command("BEGIN");
pub(super) static ROLLBACK: Operation = Operation::command("ROLLBACK");
/// The migrations that the database has.
pub(super) static LEDGER: Operation = Operation::query(
    "SELECT visitas_migracoes",
    "select version, checksum from public.visitas_migracoes where success",
);
/// What the session's role lacks to migrate, or null. Ownership counts as Postgres counts it: a
/// member that inherits nothing has to become the owner (`set role`) first.
pub(super) static MISSING_RIGHT: Operation = Operation::query(
    "SELECT has_schema_privilege",
    "select case \
            when not has_schema_privilege(to_regnamespace('public'), 'create') \
            then format('role %I has no CREATE on schema public', current_user) \
            else (select format('role %I does not own table %s, which role %I owns', \
                                current_user, c.oid::regclass, pg_get_userbyid(c.relowner)) \
                    from pg_class as c \
                   where c.oid in (to_regclass('public.visitas'), \
                                   to_regclass('public.visitas_contagem'), \
                                   to_regclass('public.visitas_ajustes'), \
                                   to_regclass('public.visitas_migracoes')) \
                     and not pg_has_role(c.relowner, 'usage') \
                   order by c.relname \
                   limit 1) \
            end",
);
pub(super) static TAKE_LOCK: Operation = Operation::query(
    "SELECT pg_try_advisory_lock",
    "select pg_try_advisory_lock($1)",
);
/// Whether every object of the migrations exists.
pub(super) static INSTALLED: Operation = Operation::query(
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
/// Whether this server has an entry in the count's ledger.
pub(super) static IS_ADOPTED: Operation = Operation::query(
    "SELECT visitas_contagem",
    "select exists (select from public.visitas_contagem where origem = public.esta_origem())",
);
pub(super) static ADOPT: Operation = Operation::procedure(
    "SELECT adotar_contagem",
    "adotar_contagem",
    "select public.adotar_contagem()",
);
/// The id of the server's process for a session.
pub(super) static BACKEND: Operation =
    Operation::query("SELECT pg_backend_pid", "select pg_backend_pid()");
/// Whether the server is running a session's statement.
pub(super) static IS_ACTIVE: Operation = Operation::query(
    "SELECT pg_stat_activity",
    "select exists (select from pg_stat_activity \
                     where pid = $1 and state in ('active', 'disabled'))",
);

/// The SQLSTATE that [`REHEARSE`] raises after the rehearsal has succeeded.
const REHEARSED: &str = "VS001";
pub(super) const UNIQUE_VIOLATION: &str = "23505";
const UNDEFINED_TABLE: &str = "42P01";
/// The SQLSTATEs of a missing table, column, function, type or schema. It can be ours, in a
/// database that was emptied or replaced, or one that another program's trigger needs.
const MISSING: [&str; 5] = [UNDEFINED_TABLE, "42703", "42883", "42704", "3F000"];

/// A migration that the database has: its version and its checksum.
pub(super) type AppliedMigration = (i64, Vec<u8>);

/// The result of [`READ`].
pub(super) struct Reading {
    pub(super) total: i64,
    pub(super) recount_due: bool,
    /// The latest migration that the database has.
    pub(super) version: Option<i64>,
}

pub(super) fn is_missing(error: &Error) -> bool {
    error.code().is_some_and(|code| MISSING.contains(&code))
}

/// Records visits that arrived at these moments and returns the number of rows after them.
pub(super) async fn record(
    connection: &mut PgConnection,
    arrivals: &[OffsetDateTime],
) -> Result<i64, Error> {
    sqlx::query_scalar(RECORD.text())
        .bind(arrivals)
        .fetch_one(connection)
        .await
        .map_err(failure)
}

/// Rehearses a visit: the function records one and raises our own error, which undoes it.
pub(super) async fn rehearse(connection: &mut PgConnection) -> Result<(), Error> {
    match execute(connection, REHEARSE.text()).await {
        Err(Error::Refused { code, .. }) if code == REHEARSED => Ok(()),
        Err(error) => Err(error),
        Ok(()) => Err(Error::Unexpected(Cause::from("the rehearsal was kept"))),
    }
}

pub(super) async fn move_sequence(connection: &mut PgConnection) -> Result<(), Error> {
    execute(connection, MOVE_SEQUENCE.text()).await
}

/// Reads the count. A thorough reading checks everything that can make a recount due.
pub(super) async fn read_count(
    connection: &mut PgConnection,
    is_thorough: bool,
) -> Result<Reading, Error> {
    let (total, recount_due, version) = sqlx::query_as(READ.text())
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

pub(super) async fn lock_count(connection: &mut PgConnection) -> Result<(), Error> {
    execute(connection, LOCK_COUNT.text()).await
}

/// Counts the rows and returns the total before and after.
pub(super) async fn recount(connection: &mut PgConnection) -> Result<(i64, i64), Error> {
    sqlx::query_as(RECOUNT.text())
        .fetch_one(connection)
        .await
        .map_err(failure)
}

/// Reads the ledger without a lock, so that an up-to-date database is ready at once even while
/// another session holds the migration lock.
pub(super) async fn read_ledger(
    connection: &mut PgConnection,
) -> Result<Vec<AppliedMigration>, Error> {
    let ledger = sqlx::query_as(LEDGER.text())
        .fetch_all(connection)
        .await
        .map_err(failure);
    match ledger {
        Err(error) if error.code() == Some(UNDEFINED_TABLE) => Ok(Vec::new()),
        ledger => ledger,
    }
}

/// Reads what the session's role lacks to migrate.
pub(super) async fn missing_right(connection: &mut PgConnection) -> Result<Option<String>, Error> {
    sqlx::query_scalar(MISSING_RIGHT.text())
        .fetch_one(connection)
        .await
        .map_err(failure)
}

/// Tries to take a session's advisory lock.
pub(super) async fn take_lock(connection: &mut PgConnection, lock: i64) -> Result<bool, Error> {
    sqlx::query_scalar(TAKE_LOCK.text())
        .bind(lock)
        .fetch_one(connection)
        .await
        .map_err(failure)
}

pub(super) async fn is_installed(connection: &mut PgConnection) -> Result<bool, Error> {
    fetch_bool(connection, INSTALLED.text()).await
}

pub(super) async fn is_adopted(connection: &mut PgConnection) -> Result<bool, Error> {
    fetch_bool(connection, IS_ADOPTED.text()).await
}

/// Makes this server's first entry in the count's ledger.
pub(super) async fn adopt(connection: &mut PgConnection) -> Result<(), Error> {
    execute(connection, ADOPT.text()).await
}

pub(super) async fn backend(connection: &mut PgConnection) -> Result<i32, Error> {
    sqlx::query_scalar(BACKEND.text())
        .fetch_one(connection)
        .await
        .map_err(failure)
}

pub(super) async fn is_active(connection: &mut PgConnection, backend: i32) -> Result<bool, Error> {
    sqlx::query_scalar(IS_ACTIVE.text())
        .bind(backend)
        .fetch_one(connection)
        .await
        .map_err(failure)
}

pub(super) async fn execute(
    connection: &mut PgConnection,
    statement: &'static str,
) -> Result<(), Error> {
    sqlx::query(statement)
        .execute(connection)
        .await
        .map_err(failure)?;
    Ok(())
}

async fn fetch_bool(connection: &mut PgConnection, query: &'static str) -> Result<bool, Error> {
    sqlx::query_scalar(query)
        .fetch_one(connection)
        .await
        .map_err(failure)
}
