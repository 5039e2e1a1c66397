//! Databases that an earlier version, a newer version or another program has left.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::{Duration, Instant};

use time::OffsetDateTime;
use tokio::task::JoinHandle;

use crate::support::load::visits;
use crate::support::{Ended, SOON, Service, Way, World, eventually, execute};

/// The table as the challenge's Flask program creates it.
const FLASK: &str =
    "create table visitas (id serial primary key, data_hora timestamp default now())";

#[tokio::test(flavor = "multi_thread")]
async fn rows_of_the_flask_version_are_kept_and_counted() {
    let rows =
        "insert into visitas (data_hora) values ('2024-05-06 07:08:09.123456'), ('2025-01-01')";
    let (world, service) = adopt(&[FLASK, rows]).await;
    assert_eq!(service.visit().await.0, 3);
    assert_eq!(world.rows().await, 3);
    assert_eq!(ids(&world).await[..2], [1, 2]);
    let moved = "select count(*) from visitas where data = data_hora::timestamptz";
    assert_eq!(world.number(moved).await, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn adopted_table_has_the_columns_of_a_new_one() {
    let new = columns(&adopt(&[]).await.0).await;
    for table in [
        FLASK,
        "create table visitas (id serial primary key, data timestamp)",
        "create table visitas (id int generated always as identity primary key, data date not null)",
        "create table visitas (data timestamptz)",
    ] {
        let adopted = columns(&adopt(&[table]).await.0).await;
        assert_eq!(adopted, new, "{table}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_without_a_timestamp_get_that_of_the_migration() {
    let table = "create table visitas (id serial primary key)";
    let before = OffsetDateTime::now_utc();
    let (world, service) = adopt(&[
        table,
        "insert into visitas select from generate_series(1, 3)",
    ])
    .await;
    let (first, last): (OffsetDateTime, OffsetDateTime) =
        world.row("select min(data), max(data) from visitas").await;
    assert!(before <= first && first == last && last <= OffsetDateTime::now_utc());
    assert_eq!(service.visit().await.0, 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn required_timestamp_column_is_copied_to_data_and_becomes_optional() {
    let table = "create table visitas (id serial primary key, momento timestamptz not null)";
    let rows = "insert into visitas (momento) values ('2024-05-06 07:08:09+03')";
    let (world, service) = adopt(&[table, rows]).await;
    assert_eq!(service.visit().await.0, 2);
    let moved =
        "select count(*) from visitas where data = '2024-05-06 04:08:09+00' and momento = data";
    assert_eq!(world.number(moved).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn other_required_column_does_not_stop_visits() {
    let table = "create table visitas (id serial primary key, ip text not null, agente text not null default '-')";
    let (world, service) = adopt(&[table, "insert into visitas (ip) values ('192.0.2.1')"]).await;
    assert_eq!(service.visit().await.0, 2);
    let kept = "select count(*) from visitas where ip = '192.0.2.1' and agente = '-'";
    assert_eq!(world.number(kept).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn timestamps_without_a_time_zone_are_read_in_the_time_zone_of_the_server() {
    let world = World::of_its_own();
    world
        .sql("alter system set timezone = 'America/Sao_Paulo'")
        .await;
    world.sql("select pg_reload_conf()").await;
    world
        .sql("create table visitas (id serial primary key, data timestamp default now())")
        .await;
    world
        .sql("insert into visitas (data) values ('2024-05-06 07:08:09.123456')")
        .await;
    assert_eq!(world.serve().await.visit().await.0, 2);
    let meant = "select count(*) from visitas where data = '2024-05-06 10:08:09.123456+00'";
    assert_eq!(world.number(meant).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn unlogged_table_becomes_logged_and_a_crash_loses_no_visit() {
    let world = World::of_its_own();
    world
        .sql("create unlogged table visitas (id serial primary key, data timestamptz)")
        .await;
    world.sql("insert into visitas default values").await;
    let service = world.serve().await;
    assert_eq!(service.visit().await.0, 2);
    world.postgres.kill().unwrap();
    world.postgres.start_again().unwrap();
    // The first visit can meet a broken connection.
    eventually("a visit is recorded", SOON, async || {
        service.get("/").await.status == 200
    })
    .await;
    assert_eq!(world.rows().await, 3);
    service.until_ready().await;
    assert_eq!(service.visit().await.0, 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn another_primary_key_is_replaced_by_id() {
    for (table, row) in [
        (
            "create table visitas (id serial, ip text primary key)",
            "insert into visitas (ip) values ('192.0.2.1')",
        ),
        (
            "create table visitas (id serial, data date, primary key (data, id))",
            "insert into visitas (data) values ('2024-05-06')",
        ),
        (
            "create table visitas (ip text primary key)",
            "insert into visitas (ip) values ('192.0.2.1')",
        ),
    ] {
        let (world, service) = adopt(&[table, row]).await;
        // The column that was the key is null in both visits.
        assert_eq!(service.visit().await.0, 2, "{table}");
        assert_eq!(service.visit().await.0, 3, "{table}");
        assert_eq!(ids(&world).await[0], 1, "{table}");
        let keys: Vec<_> = columns(&world).await;
        let keys: Vec<_> = keys.iter().map(|row| row.0.as_str()).collect();
        assert_eq!(keys, ["PRIMARY KEY (id)", "data", "id"], "{table}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn text_column_with_a_timestamp_in_every_row_is_converted() {
    for kind in ["text", "varchar(40)", "char(40)"] {
        let table = format!("create table visitas (id serial primary key, data {kind})");
        let rows = "insert into visitas (data) \
                    values ('2024-05-06 07:08:09+03'), (null), (' 2024-5-6T04:08:09Z')";
        let (world, service) = adopt(&[&table, rows]).await;
        assert_eq!(service.visit().await.0, 4, "{kind}");
        let moved = "select count(*) from visitas where data = '2024-05-06 04:08:09+00'";
        assert_eq!(world.number(moved).await, 2, "{kind}");
        assert_eq!(columns_named(&world, "data_anterior").await, 0, "{kind}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn data_column_without_timestamps_is_kept_next_to_the_new_one() {
    for (kind, value) in [
        ("text", "'06/05/2024'"),
        ("text", "'ontem'"),
        ("text", "'2024-13-45'"),
        ("bigint", "1714979289"),
        ("jsonb", "'{}'"),
    ] {
        let table = format!(
            "create table visitas (id serial primary key, data {kind} not null, quando timestamptz)"
        );
        let row = format!(
            "insert into visitas (data, quando) values ({value}, '2024-05-06 04:08:09+00')"
        );
        let (world, service) = adopt(&[&table, &row]).await;
        assert_eq!(service.visit().await.0, 2, "{kind} {value}");
        let kept = format!(
            "select count(*) from visitas where data_anterior::text = {value}::{kind}::text \
             and data = '2024-05-06 04:08:09+00'"
        );
        let kept: i64 = sqlx::query_scalar(sqlx::AssertSqlSafe(kept))
            .fetch_one(&mut world.session().await)
            .await
            .unwrap();
        assert_eq!(kept, 1, "{kind} {value}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn neither_of_two_timestamp_columns_is_taken_for_the_time_of_the_visit() {
    let table = "create table visitas \
                 (id serial primary key, criada timestamp, alterada timestamptz not null)";
    let row = "insert into visitas (criada, alterada) values ('2024-05-06', '2025-05-06')";
    let before = OffsetDateTime::now_utc();
    let (world, service) = adopt(&[table, row]).await;
    let (moment,): (OffsetDateTime,) = world.row("select data from visitas").await;
    assert!(
        before <= moment && moment <= OffsetDateTime::now_utc(),
        "{moment}"
    );
    assert_eq!(service.visit().await.0, 2);
    let kept =
        "select count(*) from visitas where criada = '2024-05-06' and alterada = '2025-05-06'";
    assert_eq!(world.number(kept).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_without_an_id_are_numbered_after_the_others() {
    for kind in ["smallint", "int", "bigint"] {
        let table = format!("create table visitas (id {kind}, data timestamptz)");
        let rows = "insert into visitas (id) values (7), (null), (3), (null)";
        let (world, service) = adopt(&[&table, rows]).await;
        assert_eq!(ids(&world).await, [3, 7, 8, 9], "{kind}");
        assert_eq!(service.visit().await.0, 5, "{kind}");
        assert!(ids(&world).await[4] > 9, "{kind}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sequence_continues_where_the_old_one_was() {
    let rows = "insert into visitas select from generate_series(1, 9)";
    let (world, service) = adopt(&[FLASK, rows, "delete from visitas where id > 2"]).await;
    assert_eq!(service.visit().await.0, 3);
    let ids = ids(&world).await;
    assert_eq!(ids[..2], [1, 2]);
    // A probe has taken an id, too.
    assert!((10..20).contains(&ids[2]), "{ids:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn table_that_cannot_be_adopted_is_reported_and_left_unchanged() {
    for (table, why) in [
        (
            "create table visitas (id text primary key)",
            "public.visitas.id is of type text, not an integer",
        ),
        (
            "create table visitas (id int, data timestamptz) partition by range (id)",
            "public.visitas exists and is not an ordinary table",
        ),
        (
            "create table mae (id int); create table visitas () inherits (mae)",
            "public.visitas exists and is not an ordinary table",
        ),
        (
            "create table visitas (id serial primary key, ip text, check (ip is not null))",
            "violates check constraint",
        ),
    ] {
        let world = World::new();
        world.sql(table).await;
        let described = "select string_agg(attname || ' ' || atttypid::regtype, ', ' order by attnum) \
                         from pg_attribute where attrelid = 'visitas'::regclass and attnum > 0";
        let (before,): (String,) = world.row(described).await;
        let service = world.start(&[]).await;
        eventually("the log says why it does not migrate", SOON, async || {
            why_down(&service).contains(why)
        })
        .await;
        assert_eq!(service.get("/").await.status, 503, "{table}");
        assert_eq!(
            service.get("/health").await.json()["checks"]["migrations"]["status"],
            "pending"
        );
        let (after,): (String,) = world.row(described).await;
        assert_eq!(after, before, "{table}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn program_that_inserts_during_the_migration_continues_and_its_rows_are_counted() {
    let world = World::new();
    world.sql(FLASK).await;
    world
        .sql("insert into visitas select from generate_series(1, 100000)")
        .await;
    let old = OldProgram::start(&world).await;
    old.until_it_has_inserted(20).await;
    let service = world.serve().await;
    old.until_it_has_inserted(20).await;
    visits(&[&service], 4, 50).await;
    let inserted = old.stop().await;
    assert_eq!(service.visit().await.0, 100_000 + inserted + 51);
    assert_eq!(world.rows().await, 100_000 + inserted + 51);
}

#[tokio::test(flavor = "multi_thread")]
async fn database_that_a_newer_version_has_migrated_is_accepted() {
    let world = World::new();
    drop(world.serve().await);
    let newer = "insert into visitas_migracoes (version, description, success, checksum, execution_time) \
                 values (9999, 'newer', true, '', 0)";
    world.sql(newer).await;
    assert_eq!(world.serve().await.visit().await.0, 1);
    let ended = Ended::of(&["migrate"], &world.settings()).await;
    assert_eq!(ended.output, "the database is up to date\n");
    assert_eq!(ended.code, Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn migration_that_a_newer_version_skipped_is_applied() {
    let world = World::new();
    drop(world.serve().await);
    world
        .sql("update visitas_migracoes set version = 9999 where version = 2")
        .await;
    world
        .sql(
            "drop trigger visitas_anota_insercao on visitas; \
               drop trigger visitas_anota_remocao on visitas; \
               drop trigger visitas_anota_truncamento on visitas",
        )
        .await;
    assert_eq!(world.serve().await.visit().await.0, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn held_migration_lock_does_not_delay_a_database_that_is_up_to_date() {
    let world = World::new();
    drop(world.serve().await);
    let _lock = world.transaction(MIGRATION_LOCK).await;
    let asked = Instant::now();
    let ended = Ended::of(&["migrate"], &world.settings()).await;
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(asked.elapsed() < LOCK_WAIT);
    assert_eq!(world.serve().await.visit().await.0, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn service_migrates_once_the_migration_lock_is_free() {
    let world = World::new();
    let lock = world.transaction(MIGRATION_LOCK).await;
    let service = world.start(&[]).await;
    let waiting = "select count(*) from pg_stat_activity \
                   where datname = current_database() and query like '%pg_try_advisory_lock%' \
                   and pid <> pg_backend_pid()";
    eventually("it waits for the lock", SOON, async || {
        world.number(waiting).await == 1
    })
    .await;
    assert_eq!(service.get("/health/ready").await.status, 503);
    assert_eq!(service.get("/").await.status, 503);
    drop(lock);
    service.until_ready().await;
    assert_eq!(service.visit().await, (1, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn wait_for_the_migration_lock_is_bounded() {
    let world = World::new();
    let _lock = world.transaction(MIGRATION_LOCK).await;
    let service = world.start(&[]).await;
    eventually("the log says that it waits", 2 * LOCK_WAIT, async || {
        why_down(&service).contains("another session holds the migration lock")
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn view_in_place_of_the_table_is_reported_and_can_be_removed() {
    let world = World::new();
    world.sql("create view visitas as select 1 as id").await;
    let service = world.start(&[]).await;
    eventually("the log says why it does not migrate", SOON, async || {
        why_down(&service).contains("public.visitas exists and is not an ordinary table")
    })
    .await;
    assert_eq!(service.get("/health/ready").await.status, 503);
    assert_eq!(service.get("/").await.status, 503);
    until_attempts(&service, 5).await;
    world.sql("drop view visitas").await;
    service.until_ready().await;
    assert_eq!(service.visit().await, (1, 1));
    // The log has a writer of its own, so its last line can come after the response.
    eventually("the log says that Postgres is up", SOON, async || {
        !service.logged("store is up again").is_empty()
    })
    .await;
    for logged_once in [
        "store is down",
        "migrating the database",
        "store is up again",
    ] {
        assert_eq!(service.logged(logged_once).len(), 1, "{logged_once}");
    }
}

/// The lock that serialises migrations, and how long the service waits for it.
const MIGRATION_LOCK: &str = "select pg_advisory_xact_lock(x'7669736974617300'::bigint)";
const LOCK_WAIT: Duration = Duration::from_secs(10);

/// A database in which these statements have run, and a service that has adopted it.
async fn adopt(statements: &[&str]) -> (World, Service) {
    let world = World::new();
    for statement in statements {
        world.sql(statement).await;
    }
    let service = world.serve().await;
    (world, service)
}

async fn ids(world: &World) -> Vec<i64> {
    sqlx::query_scalar("select id from visitas order by id")
        .fetch_all(&mut world.session().await)
        .await
        .unwrap()
}

/// How many columns of the table have this name.
async fn columns_named(world: &World, name: &str) -> i64 {
    sqlx::query_scalar(
        "select count(*) from information_schema.columns \
         where table_name = 'visitas' and column_name = $1",
    )
    .bind(name)
    .fetch_one(&mut world.session().await)
    .await
    .unwrap()
}

/// The columns that visits fill and the primary key, as SQL describes them.
async fn columns(world: &World) -> Vec<(String, String, String, Option<String>, String)> {
    sqlx::query_as(
        "select column_name::text, data_type::text, is_nullable::text, column_default::text, \
                coalesce(identity_generation::text, '-') \
           from information_schema.columns \
          where table_name = 'visitas' \
            and column_name in ('id', 'data') \
         union all \
         select pg_get_constraintdef(oid), '', '', '', '' \
           from pg_constraint \
          where conrelid = 'visitas'::regclass \
          order by 1",
    )
    .fetch_all(&mut world.session().await)
    .await
    .unwrap()
}

/// The reasons that the log gives for stores that are down.
fn why_down(service: &Service) -> String {
    service
        .logged("store is down")
        .iter()
        .map(|line| line["error"].to_string())
        .collect()
}

/// Waits until the service has checked this many times whether it can migrate.
async fn until_attempts(service: &Service, times: u32) {
    let calls = r#"visitas_store_calls_total{db_system_name="postgresql",db_operation_name="SELECT",outcome="ok"}"#;
    eventually("it tries again", SOON, async || {
        service.metric(calls).await >= Some(times.into())
    })
    .await;
}

/// A program that does not know the count, and inserts rows all the time.
struct OldProgram {
    inserted: Arc<AtomicI64>,
    going: Arc<AtomicBool>,
    task: JoinHandle<()>,
}

impl OldProgram {
    async fn start(world: &World) -> Self {
        let inserted = Arc::new(AtomicI64::new(0));
        let going = Arc::new(AtomicBool::new(true));
        let mut session = world.session().await;
        let task = tokio::spawn({
            let (inserted, going) = (Arc::clone(&inserted), Arc::clone(&going));
            async move {
                while going.load(Ordering::Relaxed) {
                    let insert = "insert into visitas (data_hora) values (now())";
                    execute(&mut session, insert).await.unwrap();
                    inserted.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        Self {
            inserted,
            going,
            task,
        }
    }

    async fn until_it_has_inserted(&self, more: i64) {
        let before = self.inserted.load(Ordering::Relaxed);
        eventually("the old program inserts", SOON, async || {
            self.inserted.load(Ordering::Relaxed) >= before + more
        })
        .await;
    }

    /// Returns how many rows it has inserted.
    async fn stop(self) -> i64 {
        self.going.store(false, Ordering::Relaxed);
        self.task.await.unwrap();
        self.inserted.load(Ordering::Relaxed)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn migration_whose_connection_falls_silent_does_not_stop_probes() {
    let world = World::new();
    // Rewriting the table takes three seconds, so the connection falls silent during the migration.
    world
        .sql(
            "create function public.slow(id bigint) returns boolean language plpgsql as $$ begin \
               perform pg_sleep(0.05); return true; end $$; \
             create table visitas (id serial primary key, data_hora timestamp default now()); \
             insert into visitas select from generate_series(1, 60); \
             alter table visitas add check (slow(id))",
        )
        .await;
    let way = Way::to(world.postgres.port()).await;
    let service = world.start(&[("DB_PORT", &way.port.to_string())]).await;
    let migrating = "select count(*) from pg_stat_activity \
                     where datname = current_database() and query like '%adopted from an earlier version%' \
                     and pid <> pg_backend_pid()";
    eventually("it migrates", SOON, async || {
        world.number(migrating).await > 0
    })
    .await;
    way.fall_silent();
    let what = || format!("visits are recorded: {}", service.printed());
    eventually(&what(), 4 * SOON, async || {
        service.get("/").await.status == 200
    })
    .await;
    assert_eq!(service.visit().await.0, world.rows().await);
}
