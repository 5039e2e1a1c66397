//! Databases that an earlier version, a newer version or another program has left.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::{Duration, Instant};

use time::OffsetDateTime;
use tokio::task::JoinHandle;

use crate::support::load::visits;
use crate::support::{Ended, PATIENT, SOON, Service, Way, World, eventually, execute};

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
        (
            "create table visitas (id int primary key, data timestamptz); \
             insert into visitas values (1, null); \
             create view resumo as select data from visitas; \
             create rule nada as on update to visitas do instead nothing",
            "public.visitas.data is null in some rows",
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
        let dropped = r#"visitas_store_calls_total{db_system_name="postgresql",db_operation_name="DROP",outcome="ok"}"#;
        assert!(service.metric(dropped).await.unwrap_or_default() < 1.0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn relative_of_a_table_that_cannot_be_adopted_is_named() {
    let world = World::new();
    world
        .sql("create table visitas (id int); create table filha () inherits (visitas)")
        .await;
    let ended = Ended::of(&["migrate"], &world.settings()).await;
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.error().contains("(filha)"), "{ended:?}");
}

/// Everything that Postgres does not alter together with the columns that it uses.
const DEPENDANTS: &str = "
    create view resumo as select id, data from visitas;
    create materialized view resumo_guardado as select id, data from visitas;
    create policy leitura on visitas using (id > 0 and data is not null);
    alter table visitas add dia date generated always as ((data at time zone 'UTC')::date) stored;
    alter table visitas add dobro bigint generated always as (id * 2) stored;
    create function nada() returns trigger language plpgsql as 'begin return new; end';
    create trigger nada before insert on visitas for each row
        when (new.id > 0 or new.data is not null) execute function nada();
    create table detalhes (visita bigint references visitas);
    create table removidas (id bigint);
    create rule guarda as on delete to visitas do also insert into removidas values (old.id);
    create index on visitas ((id % 10), (data at time zone 'UTC'));
    create index on visitas (id) where data > '2020-01-01 00:00:00+00';
    alter table visitas add check (id > 0 and data > '2000-01-01 00:00:00+00');
    create function ultima() returns timestamptz language sql
        begin atomic select max(data) from visitas; end;
    create table guardadas (visita visitas);
    create table outra (numero bigint default nextval('visitas_id_seq'));
    create publication linhas for table visitas;";

#[tokio::test(flavor = "multi_thread")]
async fn what_uses_columns_that_are_right_does_not_stop_the_adoption() {
    for id in [
        "bigserial primary key",
        "bigint generated by default as identity primary key",
        "bigint generated always as identity primary key",
    ] {
        let table = format!("create table visitas (id {id}, data timestamptz)");
        let rows = "insert into visitas (data) values ('2024-05-06 07:08:09+00'), (null); \
                    insert into detalhes select id from visitas";
        let (world, service) = adopt(&[&table, DEPENDANTS, rows]).await;
        assert_eq!(service.visit().await.0, 3, "{id}");
        for (query, expected) in [
            ("select count(*) from resumo where data is not null", 3),
            ("select count(*) from visitas where dobro = id * 2", 3),
            (
                "select count(*) from visitas join detalhes on id = visita",
                2,
            ),
            (
                "select count(*) from visitas where data = '2024-05-06 07:08:09+00'",
                1,
            ),
        ] {
            assert_eq!(world.number(query).await, expected, "{id}: {query}");
        }
        // Both tables still take different numbers.
        world.sql("insert into outra default values").await;
        assert_eq!(service.visit().await.0, 4, "{id}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn columns_of_a_publication_do_not_stop_the_adoption() {
    let world = World::new();
    let version = "select current_setting('server_version_num')::bigint";
    if world.number(version).await < 150_000 {
        eprintln!("PostgreSQL 14 publishes no single columns");
        return;
    }
    world
        .sql(
            "create table visitas (id bigserial primary key, data timestamptz); \
             create publication colunas for table visitas (id, data) where (id > 0)",
        )
        .await;
    assert_eq!(world.serve().await.visit().await.0, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_uses_other_columns_does_not_stop_the_adoption() {
    let view = "create view dias as select data_hora from visitas";
    let (world, service) = adopt(&[FLASK, view, "insert into visitas default values"]).await;
    assert_eq!(service.visit().await.0, 2);
    assert_eq!(world.number("select count(*) from dias").await, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn domains_are_kept_where_they_hold_what_a_visit_writes() {
    let table = "create domain instante as timestamptz; \
                 create domain momento as instante check (value > '2000-01-01 00:00:00+00'); \
                 create domain inteiro as int; \
                 create domain numero as inteiro check (value > 0); \
                 create table visitas (id numero primary key, data momento); \
                 create view momentos as select data from visitas; \
                 insert into visitas values (7, '2024-05-06 07:08:09+00')";
    let (world, service) = adopt(&[table]).await;
    assert_eq!(service.visit().await.0, 2);
    assert_eq!(
        world
            .number("select count(*) from momentos where data is not null")
            .await,
        2
    );
    assert_eq!(columns_named(&world, "data_anterior").await, 0);
    assert_eq!(ids(&world).await[0], 7);
}

#[tokio::test(flavor = "multi_thread")]
async fn trigger_that_inserts_rows_does_not_stop_the_adoption() {
    let statements = [
        "create table visitas (id serial primary key, data timestamptz)",
        "create function mais_uma() returns trigger language plpgsql as $$ begin \
         if pg_trigger_depth() = 1 then insert into visitas default values; end if; \
         return null; end $$",
        "create trigger mais_uma after insert on visitas \
         for each row execute function mais_uma()",
    ];
    let (world, service) = adopt(&statements).await;
    service.visit().await;
    service.visit().await;
    assert_eq!(world.number("select count(*) from visitas").await, 4);
    service.visit().await;
    let (total, _) = service.visit().await;
    assert_eq!(total, 8);
}

#[tokio::test(flavor = "multi_thread")]
async fn generated_columns_become_ordinary_ones() {
    let table = "create table visitas (criada timestamptz, \
                 id bigint generated always as (extract(epoch from criada at time zone 'UTC')::bigint) stored, \
                 data timestamptz generated always as (criada) stored); \
                 insert into visitas values ('1970-01-01 00:00:42+00')";
    let (world, service) = adopt(&[table]).await;
    assert_eq!(service.visit().await.0, 2);
    assert_eq!(ids(&world).await[0], 42);
    let kept = "select count(*) from visitas where data = criada";
    assert_eq!(world.number(kept).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn identity_keeps_its_sequence_and_the_privileges_on_it() {
    let table = "create table visitas (id int generated always as identity \
                     (start with -5 increment by -3 minvalue -100 cycle cache 9) primary key, data timestamptz); \
                 grant usage on sequence visitas_id_seq to public; \
                 insert into visitas default values; \
                 insert into visitas overriding system value values (40)";
    let (world, service) = adopt(&[table]).await;
    assert_eq!(service.visit().await.0, 3);
    assert_eq!(service.visit().await.0, 4);
    let ids = ids(&world).await;
    assert_eq!(ids[..2], [-5, 40]);
    assert!(ids[2] > 40 && ids[3] == ids[2] + 1, "{ids:?}");
    let sequence = "select count(*) from pg_sequence \
                     where seqrelid = 'visitas_id_seq'::regclass and seqmax = 9223372036854775807 \
                       and seqmin = 1 and seqincrement = 1 and seqcache = 1 and not seqcycle";
    assert_eq!(world.number(sequence).await, 1);
    let granted = "select count(*) from pg_class \
                    where relname = 'visitas_id_seq' and relacl::text like '%{=U/%'";
    let granted_too = "select count(*) from pg_class \
                    where relname = 'visitas_id_seq' and relacl::text like '%,=U/%'";
    assert_eq!(
        world.number(granted).await + world.number(granted_too).await,
        1
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn key_that_other_tables_refer_to_stays_if_a_visit_can_fill_it() {
    for (table, detail) in [
        (
            "create table visitas (id serial, chave uuid primary key default gen_random_uuid())",
            "create table detalhes (visita uuid references visitas)",
        ),
        (
            "create table visitas (id serial primary key, data timestamptz)",
            "create table detalhes (visita int references visitas)",
        ),
    ] {
        let rows = "insert into visitas default values; insert into detalhes select null";
        let (world, service) = adopt(&[table, detail, rows]).await;
        assert_eq!(service.visit().await.0, 2, "{table}");
        let keys = "select count(*) from pg_constraint \
                     where conrelid = 'detalhes'::regclass and contype = 'f' and convalidated";
        assert_eq!(world.number(keys).await, 1, "{table}");
        // An id that is taken moves the sequence, as always.
        world
            .sql("insert into visitas (id) select max(id) + 1 from visitas")
            .await;
        let total = service.visit().await.0;
        assert_eq!(total, 4, "{table}");
        let twice = "select count(*) - count(distinct id) from visitas";
        assert_eq!(world.number(twice).await, 0, "{table}");
    }
}

/// What is in the way of the adoption of [`IN_THE_WAY_OF`], how the error names it, and how it is
/// dropped.
const IN_THE_WAY: [(&str, &str, &str); 13] = [
    (
        "create view resumo as select id from visitas; \
         create view resumo_2 as select data from visitas",
        "public.visitas needs id of type bigint and data of type timestamptz: cannot alter type \
         of a column used by a view or rule: view resumo, view resumo_2",
        "drop view resumo; drop view resumo_2",
    ),
    (
        "create materialized view resumo as select data from visitas",
        "materialized view resumo",
        "drop materialized view resumo",
    ),
    (
        "create policy leitura on visitas using (id > 0)",
        "policy leitura on table visitas",
        "drop policy leitura on visitas",
    ),
    (
        "alter table visitas add dobro int generated always as (id * 2) stored",
        "generated column dobro",
        "alter table visitas drop dobro",
    ),
    (
        "create function nada() returns trigger language plpgsql as 'begin return new; end'; \
         create trigger nada before insert on visitas for each row when (new.id > 0) \
         execute function nada()",
        "trigger nada on table visitas",
        "drop trigger nada on visitas; drop function nada()",
    ),
    (
        "create rule guarda as on delete to visitas do also \
         select old.id",
        "rule guarda on table visitas",
        "drop rule guarda on visitas",
    ),
    (
        "create function ultima() returns timestamp language sql \
         begin atomic select max(data) from visitas; end",
        "function ultima()",
        "drop function ultima()",
    ),
    (
        "create index quando on visitas (date_trunc('day', data))",
        "index quando",
        "drop index quando",
    ),
    (
        // A check need not be immutable.
        "create index quando on visitas (date_trunc('day', data)); \
         alter table visitas add constraint antiga check (data > '2000-01-01')",
        "must be marked IMMUTABLE: index quando",
        "drop index quando",
    ),
    (
        "alter table visitas add check (data > '2000-01-01'); \
         create table guardadas (visita visitas)",
        "column \"guardadas.visita\" uses its row type (hint: Drop what is in the way",
        "drop table guardadas",
    ),
    (
        "alter table visitas drop constraint visitas_pkey, add chave uuid primary key; \
         create table detalhes (visita uuid references visitas)",
        "foreign keys refer to that key: constraint detalhes_visita_fkey on table detalhes",
        "drop table detalhes; alter table visitas drop constraint visitas_pkey, \
         add primary key (id), drop column chave",
    ),
    (
        "alter table visitas drop constraint visitas_pkey, add ip text primary key, add unique (id); \
         create view por_ip as select ip, data from visitas group by ip",
        "the primary key of public.visitas has to be id alone: cannot drop constraint visitas_pkey \
         on table visitas because other objects depend on it: view por_ip depends on",
        "drop view por_ip; alter table visitas drop column ip, add primary key (id)",
    ),
    (
        "alter table visitas add ip text not null; \
         create unique index copia on visitas (ip); \
         alter table visitas replica identity using index copia",
        "public.visitas.ip has to be optional, since a visit leaves it empty: \
         column \"ip\" is in index used as replica identity",
        "alter table visitas replica identity default; alter table visitas drop column ip",
    ),
];
const IN_THE_WAY_OF: &str =
    "create table visitas (id serial primary key, data timestamp not null default now())";

#[tokio::test(flavor = "multi_thread")]
async fn what_is_in_the_way_of_the_adoption_is_named_once_and_can_be_created_again() {
    for (create, named, drop) in IN_THE_WAY {
        let world = World::new();
        world.sql(IN_THE_WAY_OF).await;
        world.sql(create).await;
        let service = world.start(&PATIENT).await;
        eventually(
            &format!("{named}: {}", service.printed()),
            SOON,
            async || !why_down(&service).is_empty(),
        )
        .await;
        let named = named.replace('"', "\\\"");
        let why = why_down(&service);
        assert!(why.contains(&named), "{named}: {why}");
        let health = service.get("/health").await.json();
        assert_eq!(health["checks"]["migrations"]["status"], "pending");
        until_attempts(&service, 5).await;
        world.sql(drop).await;
        service.until_ready().await;
        if create.starts_with("create view") {
            world.sql(create).await;
        }
        assert_eq!(service.visit().await.0, 1, "{create}");
        for logged_once in ["store is down", "migrating the database"] {
            assert_eq!(service.logged(logged_once).len(), 1, "{create}");
        }
        assert!(service.logged("store is still down").is_empty(), "{create}");
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes long: make faults"]
async fn migration_that_fails_is_tried_less_and_less_often() {
    let world = World::new();
    let service = start_with_a_view_in_the_way(&world).await;
    until_attempts(&service, 70).await;
    // By now one attempt at each probe would be 14.
    let attempts = failed_migrations(&service).await;
    assert!((4.0..=9.0).contains(&attempts), "{attempts}");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "reads a clock: make faults"]
async fn database_that_can_be_used_ends_the_pause_of_failed_migrations() {
    for how in ["another program migrates", "the table is gone"] {
        let world = World::new();
        let service = start_with_a_view_in_the_way(&world).await;
        // The pause is more than three seconds.
        eventually("the pause has grown", SOON, async || {
            failed_migrations(&service).await >= 7.0
        })
        .await;
        if how == "the table is gone" {
            world.sql("drop table visitas cascade").await;
        } else {
            world.sql("drop view resumo").await;
            let ended = Ended::of(&["migrate"], &world.settings()).await;
            assert_eq!(ended.code, Some(0), "{ended:?}");
        }
        let began = Instant::now();
        eventually("a visit is recorded", SOON, async || {
            service.get("/").await.status == 200
        })
        .await;
        assert!(began.elapsed() < Duration::from_secs(1), "{how}");
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
    let free = async {
        eventually("both wait for the lock", SOON, async || {
            world.number(waiting).await == 2
        })
        .await;
        assert_eq!(service.get("/health/ready").await.status, 503);
        assert_eq!(service.get("/").await.status, 503);
        assert_eq!(service.logged("migrating the database").len(), 1);
        drop(lock);
    };
    let settings = world.settings();
    let (ended, ()) = tokio::join!(Ended::of(&["migrate"], &settings), free);
    assert_eq!(ended.code, Some(0), "{ended:?}");
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

/// The columns that visits fill and the primary key, as SQL describes them. Since Postgres 18,
/// NOT NULL is a constraint, too.
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
            and contype <> 'n' \
          order by 1",
    )
    .fetch_all(&mut world.session().await)
    .await
    .unwrap()
}

async fn start_with_a_view_in_the_way(world: &World) -> Service {
    world
        .sql("create table visitas (id serial primary key); create view resumo as select id from visitas")
        .await;
    world.start(&PATIENT).await
}

/// How often a migration has failed.
async fn failed_migrations(service: &Service) -> f64 {
    let calls = r#"visitas_store_calls_total{db_system_name="postgresql",db_operation_name="MIGRATE",outcome="error"}"#;
    service.metric(calls).await.unwrap_or_default()
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

/// A table whose adoption takes that many seconds, since it checks each row.
async fn with_a_slow_adoption(world: &World, seconds: u32) {
    let rows = 20 * seconds;
    world
        .sql(&format!(
            "create function public.passes(id bigint) returns boolean language sql as 'select true'; \
             create table visitas (id serial primary key, data_hora timestamp default now(), \
               check (passes(id))); \
             insert into visitas select from generate_series(1, {rows}); \
             create or replace function public.passes(id bigint) returns boolean language sql \
               as 'select true from pg_sleep(0.05)'"
        ))
        .await;
}

async fn until_it_migrates(world: &World) {
    let migrating = "select count(*) from pg_stat_activity \
                     where datname = current_database() and query like '%adopted from an earlier version%' \
                     and pid <> pg_backend_pid()";
    eventually("it migrates", SOON, async || {
        world.number(migrating).await > 0
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn migration_whose_connection_falls_silent_does_not_stop_probes() {
    let world = World::new();
    with_a_slow_adoption(&world, 3).await;
    let way = Way::to(world.postgres.port()).await;
    let service = world.start(&[("DB_PORT", &way.port.to_string())]).await;
    until_it_migrates(&world).await;
    way.hold();
    eventually("visits are recorded", 4 * SOON, async || {
        service.get("/").await.status == 200
    })
    .await;
    assert_eq!(service.visit().await.0, world.rows().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn migration_whose_host_falls_silent_ends_and_is_tried_again() {
    let world = World::new();
    with_a_slow_adoption(&world, 3).await;
    let way = Way::to(world.postgres.port()).await;
    let service = world
        .start(&[
            ("DB_PORT", &way.port.to_string()),
            ("DB_TIMEOUT", "300ms"),
            ("REDIS_TIMEOUT", "100ms"),
        ])
        .await;
    until_it_migrates(&world).await;
    way.hold_all();
    eventually("the migration ends", 4 * SOON, async || {
        why_down(&service).contains("has not been seen to work on it")
    })
    .await;
    way.release();
    service.until_ready().await;
    assert_eq!(service.visit().await.0, world.rows().await);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes long: make faults"]
async fn migration_that_takes_long_is_left_alone_while_the_server_works_on_it() {
    // With two sessions, the probe's and the migration's, the server refuses the one that watches.
    for limit in [-1, 2] {
        let world = World::new();
        with_a_slow_adoption(&world, 14).await;
        let role = format!("lento_{}", world.database);
        world
            .sql(&format!(
                "create role {role} login password 's' connection limit {limit}; \
                 grant create, usage on schema public to {role}; \
                 alter table visitas owner to {role}"
            ))
            .await;
        let settings =
            world.settings_but("DB_PASSWORD", &[("DB_USER", &role), ("DB_PASSWORD", "s")]);
        let service = Service::start(&settings).await;
        eventually("it is migrated", 3 * SOON, async || {
            !service.logged("the database is migrated").is_empty()
        })
        .await;
        assert_eq!(service.logged("store is down").len(), 0);
        drop(service);
        world
            .sql(&format!("drop owned by {role}; drop role {role}"))
            .await;
    }
}
