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
/// The size of the database in bytes. Postgres looks at each of its files.
pub(super) static MEASURE: Operation = Operation::query(
    "SELECT pg_database_size",
    "select pg_database_size(current_database())",
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
/// What an attempt to migrate would meet: see [`Inspection`].
pub(super) static INSPECT: Operation =
    Operation::query("SELECT pg_class", include_str!("inspect.sql"));
/// The rights that the session's role lacks; no row if it lacks none.
pub(super) static MISSING_RIGHTS: Operation = Operation::query(
    "SELECT has_function_privilege",
    include_str!("missing_rights.sql"),
);
/// The triggers and rules of other programs that a row for a visit meets; null if there are none.
static OTHERS: Operation = Operation::query(
    "SELECT pg_trigger",
    "select string_agg(o.name, ', ' order by o.name) \
       from (select format('trigger %I', t.tgname) as name \
               from pg_trigger as t \
              where t.tgrelid = to_regclass('public.visitas') \
                and not t.tgisinternal \
                and t.tgenabled <> 'D' \
                and t.tgtype & 4 <> 0 \
                and t.tgfoid is distinct from to_regprocedure('public.anotar_ajuste()') \
              union all \
             select format('rule %I', r.rulename) \
               from pg_rewrite as r \
              where r.ev_class = to_regclass('public.visitas') \
                and r.ev_enabled <> 'D' \
                and r.ev_type = '3') as o",
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
pub(super) const INSUFFICIENT_PRIVILEGE: &str = "42501";
pub(super) const WRONG_OBJECT_TYPE: &str = "42809";
const UNDEFINED_TABLE: &str = "42P01";
/// The SQLSTATEs of a missing table, column, function, type or schema. It can be ours, in a
/// database that was emptied or replaced, or one that another program's trigger needs.
const MISSING: [&str; 5] = [UNDEFINED_TABLE, "42703", "42883", "42704", "3F000"];

/// A migration that the database has: its version and its checksum.
pub(super) type AppliedMigration = (i64, Vec<u8>);

/// The result of [`INSPECT`].
#[derive(sqlx::FromRow)]
pub(super) struct Inspection {
    /// Objects of another program that have names of the migrations.
    pub(super) foreign: Option<String>,
    /// What the session's role lacks to migrate. Ownership counts as Postgres counts it: a member
    /// that inherits nothing has to become the owner (`set role`) first.
    pub(super) missing_right: Option<String>,
    /// Changes when the server, the database, its schema or a table of the migrations is another one.
    pub(super) state: String,
}

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

/// Whether the session's role lacks a right.
pub(super) fn is_denied(error: &Error) -> bool {
    error.code() == Some(INSUFFICIENT_PRIVILEGE)
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
        Err(error) => {
            let error = name_rights(connection, false, error).await;
            Err(name_others(connection, error).await)
        }
        Ok(()) => Err(Error::Unexpected(Cause::from("the rehearsal was kept"))),
    }
}

pub(super) async fn move_sequence(connection: &mut PgConnection) -> Result<(), Error> {
    match execute(connection, MOVE_SEQUENCE.text()).await {
        Err(error) => Err(name_rights(connection, false, error).await),
        moved => moved,
    }
}

/// Reads the count. A thorough reading checks everything that can make a recount due.
pub(super) async fn read_count(
    connection: &mut PgConnection,
    is_thorough: bool,
) -> Result<Reading, Error> {
    let reading = sqlx::query_as(READ.text())
        .bind(is_thorough)
        .fetch_one(&mut *connection)
        .await
        .map_err(failure);
    match reading {
        Ok((total, recount_due, version)) => Ok(Reading {
            total,
            recount_due,
            version,
        }),
        Err(error) => Err(name_rights(connection, false, error).await),
    }
}

/// Reads the size of the database in bytes.
pub(super) async fn measure(connection: &mut PgConnection) -> Result<i64, Error> {
    sqlx::query_scalar(MEASURE.text())
        .fetch_one(connection)
        .await
        .map_err(failure)
}

/// Adds to a refusal the rights that the session's role lacks, if that is the reason. The server
/// names one object at a time.
async fn name_rights(connection: &mut PgConnection, recounts: bool, error: Error) -> Error {
    let (code, source) = match error {
        Error::Refused { code, source } if code == INSUFFICIENT_PRIVILEGE => (code, source),
        other => return other,
    };
    let missing: Result<Option<String>, Error> = sqlx::query_scalar(MISSING_RIGHTS.text())
        .bind(recounts)
        .fetch_optional(connection)
        .await
        .map_err(failure);
    match missing {
        Ok(Some(missing)) => Error::Refused {
            code,
            source: format!("{source}; {missing}: grant it as docs/connecting.md shows").into(),
        },
        // It lacks a right to something else, or the transaction has failed.
        Ok(None) | Err(Error::Refused { .. }) => Error::Refused { code, source },
        Err(broken) => broken,
    }
}

/// Adds to the refusal of a rehearsal the triggers and rules of other programs, which can be the
/// reason: their errors do not say on which table they are.
async fn name_others(connection: &mut PgConnection, error: Error) -> Error {
    let (code, source) = match error {
        // VS003 names them itself, and the others say that the server or a lock is the reason.
        Error::Refused { code, source }
            if !code.starts_with("VS") && !["25006", "40P01", "55P03"].contains(&&*code) =>
        {
            (code, source)
        }
        other => return other,
    };
    let others: Result<Option<String>, Error> = sqlx::query_scalar(OTHERS.text())
        .fetch_one(connection)
        .await
        .map_err(failure);
    match others {
        Ok(Some(others)) => Error::Refused {
            code,
            source: format!(
                "{source}; that was a trial insert into public.visitas, which runs {others} of \
                 another program: check whether they fail"
            )
            .into(),
        },
        Ok(None) | Err(Error::Refused { .. }) => Error::Refused { code, source },
        Err(broken) => broken,
    }
}

pub(super) async fn lock_count(connection: &mut PgConnection) -> Result<(), Error> {
    execute(connection, LOCK_COUNT.text()).await
}

/// Counts the rows and returns the total before and after.
pub(super) async fn recount(connection: &mut PgConnection) -> Result<(i64, i64), Error> {
    let recounted = sqlx::query_as(RECOUNT.text())
        .fetch_one(&mut *connection)
        .await
        .map_err(failure);
    match recounted {
        Err(error) => Err(name_rights(connection, true, error).await),
        recounted => recounted,
    }
}

/// Reads the ledger without a lock, so that an up-to-date database is ready at once even while
/// another session holds the migration lock.
pub(super) async fn read_ledger(
    connection: &mut PgConnection,
) -> Result<Vec<AppliedMigration>, Error> {
    let ledger = sqlx::query_as(LEDGER.text())
        .fetch_all(&mut *connection)
        .await
        .map_err(failure);
    match ledger {
        // There is none, or what has its name is another program's.
        Err(error)
            if is_missing(&error)
                || error.code() == Some(WRONG_OBJECT_TYPE)
                || matches!(error, Error::Unexpected(_)) =>
        {
            Ok(Vec::new())
        }
        Err(error) => Err(name_rights(connection, false, error).await),
        ledger => ledger,
    }
}

pub(super) async fn inspect(connection: &mut PgConnection) -> Result<Inspection, Error> {
    sqlx::query_as(INSPECT.text())
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
    match fetch_bool(connection, IS_ADOPTED.text()).await {
        Err(error) => Err(name_rights(connection, false, error).await),
        is_adopted => is_adopted,
    }
}

/// Makes this server's first entry in the count's ledger.
pub(super) async fn adopt(connection: &mut PgConnection) -> Result<(), Error> {
    match execute(connection, ADOPT.text()).await {
        Err(error) => Err(name_rights(connection, false, error).await),
        adopted => adopted,
    }
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
