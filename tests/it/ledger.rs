//! The ledger of migrations, next to `_sqlx_migrations`: the table that programs with sqlx share by
//! default, and that earlier versions of this one used.

use std::fmt::Write as _;

use sqlx::SqlSafeStr as _;
use sqlx::migrate::{Migrate as _, Migration, MigrationType, Migrator};

use crate::support::{Ended, PATIENT, SOON, Service, World, eventually};

/// The released migrations. Their checksums are in every database.
const RELEASED: [(i64, &str); 3] = [
    (
        1,
        "113887dd4d661401ca66864b22b67e91ae9f088982545a7beacfb03158178b9d\
         8a3574442a8cfbeb1b0348fd042d7cdc",
    ),
    (
        2,
        "242085f74090780bb2fd05085d7d7d32a026fab49c6918265f8edf044abc7133\
         3ac4d7a143ccdb202f652d5bb2d5beaa",
    ),
    (
        3,
        "b4e527c4731f6442b2074ebf2e333406d06df43eb2e18c7ecb1c7eff52f819b0\
         5bf2a4f509b31e3d2eb0f03a293a10c6",
    ),
];

#[test]
fn released_migrations_are_unchanged() {
    let migrations = sqlx::migrate!("./migrations");
    let checksums: Vec<_> = migrations
        .iter()
        .map(|migration| (migration.version, hex(&migration.checksum)))
        .collect();
    for (version, checksum) in RELEASED {
        assert!(
            checksums.contains(&(version, checksum.to_owned())),
            "{version}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn database_of_the_release_before_is_not_migrated_again() {
    let world = World::new();
    migrate_as_the_release_before(&world, 3).await;
    world
        .sql("insert into visitas select from generate_series(1, 5)")
        .await;
    let objects = "select string_agg(oid::text, ',' order by oid) from pg_proc \
                   where pronamespace = 'public'::regnamespace";
    let (before,): (String,) = world.row(objects).await;
    let ended = Ended::of(&["migrate"], &world.settings()).await;
    assert!(
        ended.output.ends_with("the database is up to date\n"),
        "{ended:?}"
    );
    let (after,): (String,) = world.row(objects).await;
    assert_eq!(after, before);
    assert_eq!(copied_rows(&world).await, 3);
    assert_eq!(world.serve().await.visit().await.0, 6);
}

#[tokio::test(flavor = "multi_thread")]
async fn release_before_still_starts_next_to_this_one() {
    let world = World::new();
    migrate_as_the_release_before(&world, 3).await;
    let service = world.serve_with(&PATIENT).await;
    // What the release before does first; it fails if a row is missing or changed.
    migrate_as_the_release_before(&world, 3).await;
    let reading = "select max(version) from _sqlx_migrations where success";
    assert_eq!(world.number(reading).await, 3);
    assert_eq!(service.visit().await.0, 1);
    assert!(service.logged("store is down").is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn migration_of_the_release_before_is_continued() {
    for applied in [1, 2] {
        let world = World::new();
        migrate_as_the_release_before(&world, applied).await;
        let ended = Ended::of(&["migrate"], &world.settings()).await;
        let said = format!("{}", 3 - applied);
        assert!(ended.output.contains(&said), "{ended:?}");
        assert_eq!(world.serve().await.visit().await.0, 1, "after {applied}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn dropped_ledger_is_copied_again() {
    let world = World::new();
    migrate_as_the_release_before(&world, 3).await;
    let service = world.serve().await;
    service.visit().await;
    world.sql("drop table visitas_migracoes").await;
    eventually("the ledger is back", SOON, async || {
        let exists = "select count(*) from pg_class where relname = 'visitas_migracoes'";
        world.number(exists).await == 1 && copied_rows(&world).await == 3
    })
    .await;
    service.until_ready().await;
    assert_eq!(service.visit().await.0, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn ledger_of_the_release_before_without_its_objects_is_not_believed() {
    for loss in [
        "drop function registrar_visitas(timestamptz[])",
        "drop table visitas_contagem cascade",
        "drop table visitas cascade",
    ] {
        let world = World::new();
        migrate_as_the_release_before(&world, 3).await;
        world.sql(loss).await;
        let service = world.serve().await;
        assert_eq!(service.visit().await.0, 1, "after {loss}");
        // A restart finds nothing to do.
        let ended = Ended::of(&["migrate"], &world.settings()).await;
        assert_eq!(ended.output, "the database is up to date\n", "after {loss}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn migrations_of_another_program_stop_nothing_and_stay() {
    const TABLE: &str = "create table _sqlx_migrations (version bigint primary key, \
        description text not null, installed_on timestamptz not null default now(), \
        success boolean not null, checksum bytea not null, execution_time bigint not null);";
    let with = |rows: &str| {
        format!(
            "{TABLE} insert into _sqlx_migrations (version, description, success, checksum, execution_time) values {rows}"
        )
    };
    for theirs in [
        with("(1, 'users', true, 'a', 1), (2, 'posts', true, 'b', 1)"),
        with("(2, 'posts', false, 'b', -1)"),
        with("(20240101000000, 'users', false, 'a', -1)"),
        "create table _sqlx_migrations (id int, name text)".to_owned(),
        "create table _sqlx_migrations (version text, description text, installed_on text, \
         success text, checksum text, execution_time text)"
            .to_owned(),
        "create view _sqlx_migrations as select 1 as version".to_owned(),
        "create type _sqlx_migrations as (version bigint)".to_owned(),
    ] {
        let world = World::new();
        world.sql(&theirs).await;
        // It fails where no rows can be read.
        let content = || {
            world
                .postgres
                .sql(&world.database, "select * from _sqlx_migrations")
                .ok()
        };
        let before = content();
        let service = world.serve_with(&PATIENT).await;
        assert_eq!(service.visit().await.0, 1, "{theirs}");
        assert!(service.logged("store is down").is_empty(), "{theirs}");
        assert_eq!(content(), before, "{theirs}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn own_rows_are_copied_from_among_those_of_another_program() {
    let world = World::new();
    migrate_as_the_release_before(&world, 3).await;
    world
        .sql(
            "insert into _sqlx_migrations (version, description, success, checksum, execution_time) \
             values (4, 'theirs', true, 'a', 1), (5, 'theirs', false, 'b', -1)",
        )
        .await;
    let service = world.serve().await;
    assert_eq!(service.visit().await.0, 1);
    assert_eq!(copied_rows(&world).await, 3);
    assert_eq!(
        world.number("select count(*) from visitas_migracoes").await,
        3
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn another_program_can_migrate_in_the_same_schema() {
    let world = World::new();
    // The driver's lock, which their migration holds for as long as it runs.
    let mut migrating = world.session().await;
    migrating.lock().await.expect("the lock is free");
    let service = world.serve().await;
    migrating.unlock().await.expect("the lock is held");
    let theirs = Migration::new(
        1,
        "theirs".into(),
        MigrationType::Simple,
        "create table theirs (id int)".into_sql_str(),
        false,
    );
    Migrator::with_migrations(vec![theirs])
        .run(&mut world.session().await)
        .await
        .expect("their migration");
    assert_eq!(service.visit().await.0, 1);
    drop(service);
    assert_eq!(world.serve().await.visit().await.0, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn failed_row_in_the_ledger_is_reported_by_its_name() {
    let world = World::new();
    drop(world.serve().await);
    world
        .sql("update visitas_migracoes set success = false where version = 3")
        .await;
    let ended = Ended::of(&["migrate"], &world.settings()).await;
    assert_eq!(ended.code, Some(1), "{ended:?}");
    let said = "visitas_migracoes says that migration 3 has failed";
    assert!(ended.errors.contains(said), "{ended:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn migration_with_another_text_is_reported() {
    let world = World::new();
    drop(world.serve().await);
    world
        .sql("update visitas_migracoes set checksum = 'another' where version = 3")
        .await;
    let ended = Ended::of(&["migrate"], &world.settings()).await;
    assert_eq!(ended.code, Some(1), "{ended:?}");
    let said = "migration 3 was previously applied but has been modified";
    assert!(ended.errors.contains(said), "{ended:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn locked_ledger_of_the_release_before_is_read_once_it_is_free() {
    let world = World::new();
    migrate_as_the_release_before(&world, 3).await;
    let lock = world.transaction("lock _sqlx_migrations").await;
    let service = world.start(&PATIENT).await;
    until_down_because(&service, "55P03").await;
    drop(lock);
    service.until_ready().await;
    assert_eq!(copied_rows(&world).await, 3);
}

/// What another program has, how the error names it, and how it gets out of the way.
const OF_ANOTHER_PROGRAM: [(&str, &str, &str); 20] = [
    (
        "create table visitas_contagem (id bigint primary key, total bigint); \
             insert into visitas_contagem values (1, 7)",
        "index visitas_contagem_pkey, table visitas_contagem",
        "do $$ begin if 7 <> (select total from visitas_contagem) then raise 'lost'; end if; end $$; \
             alter table visitas_contagem rename to deles; \
             alter index visitas_contagem_pkey rename to deles_pkey",
    ),
    (
        "create table visitas_ajustes (nota text)",
        "table visitas_ajustes",
        "drop table visitas_ajustes",
    ),
    (
        "create table visitas_migracoes (id serial primary key, nome text)",
        "table visitas_migracoes",
        "drop table visitas_migracoes",
    ),
    (
        "create table visitas_migracoes (version text, description text, installed_on text, \
                 success boolean, checksum bytea, execution_time bigint); \
             insert into visitas_migracoes values ('1', 'a', '', true, '', 1)",
        "table visitas_migracoes",
        "drop table visitas_migracoes",
    ),
    (
        "create table visitas_ajustes (id int) partition by range (id)",
        "table visitas_ajustes",
        "drop table visitas_ajustes",
    ),
    (
        "create view visitas_contagem as select 1 as total",
        "view visitas_contagem",
        "drop view visitas_contagem",
    ),
    (
        "create materialized view visitas_ajustes as select 1 as total",
        "materialized view visitas_ajustes",
        "drop materialized view visitas_ajustes",
    ),
    (
        "create view visitas_migracoes as select 1 as version",
        "view visitas_migracoes",
        "drop view visitas_migracoes",
    ),
    (
        "create sequence visitas_contagem",
        "sequence visitas_contagem",
        "drop sequence visitas_contagem",
    ),
    (
        "create table outra (id int); create index visitas_ajustes on outra (id)",
        "index visitas_ajustes",
        "drop index visitas_ajustes",
    ),
    (
        "create table outra (id int constraint visitas_ajustes_pkey primary key)",
        "index visitas_ajustes_pkey",
        "drop table outra",
    ),
    (
        "create type visitas_contagem as (total int)",
        "composite type visitas_contagem",
        "drop type visitas_contagem",
    ),
    (
        "create type visitas_migracoes as (version int)",
        "composite type visitas_migracoes",
        "drop type visitas_migracoes",
    ),
    (
        "create type visitas as enum ('sim')",
        "type visitas",
        "drop type visitas",
    ),
    (
        "create domain visitas_ajustes as int",
        "type visitas_ajustes",
        "drop domain visitas_ajustes",
    ),
    (
        "create function total_visitas() returns int language sql as 'select 7'",
        "function total_visitas()",
        "drop function total_visitas()",
    ),
    (
        "create function esta_origem() returns text language sql set search_path = public as 'select null'",
        "function esta_origem()",
        "drop function esta_origem()",
    ),
    (
        "create procedure travar_contagem() language sql as ''",
        "function travar_contagem()",
        "drop procedure travar_contagem()",
    ),
    (
        "create function anotar_ajuste() returns trigger language plpgsql as 'begin return null; end'; \
             create table visitas (id serial primary key); \
             create trigger deles after insert on visitas execute function anotar_ajuste()",
        "function anotar_ajuste()",
        "drop trigger deles on visitas; drop function anotar_ajuste()",
    ),
    (
        "create function deles() returns trigger language plpgsql as 'begin return null; end'; \
             create table visitas (id serial primary key); \
             create trigger visitas_anota_remocao after delete on visitas execute function deles()",
        "trigger visitas_anota_remocao on table visitas",
        "drop trigger visitas_anota_remocao on visitas",
    ),
];

#[tokio::test(flavor = "multi_thread")]
async fn objects_of_another_program_are_named_and_kept() {
    for (create, named, remove) in OF_ANOTHER_PROGRAM {
        let world = World::new();
        world.sql(create).await;
        let service = world.start(&PATIENT).await;
        until_down_because(
            &service,
            &format!("objects of the same names: {named}; rename"),
        )
        .await;
        let ended = Ended::of(&["migrate"], &world.settings()).await;
        assert_eq!(ended.code, Some(1), "{create}: {ended:?}");
        assert!(ended.error().contains(named), "{create}: {ended:?}");
        let health = service.get("/health").await.json();
        assert_eq!(health["checks"]["migrations"]["status"], "pending");
        // It is still there.
        world.sql(remove).await;
        eventually(
            &format!("{remove}: {}", service.printed()),
            SOON,
            async || service.get("/health").await.json()["status"] == "ok",
        )
        .await;
        assert_eq!(service.visit().await.0, 1, "{create}");
        assert_eq!(service.logged("store is down").len(), 1, "{create}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn object_of_another_program_in_place_of_a_lost_one_is_named_and_kept() {
    for (replace, named, remove) in [
        (
            "drop table visitas_contagem cascade; create table visitas_contagem (nota text)",
            "table visitas_contagem",
            "drop table visitas_contagem",
        ),
        (
            "drop table visitas_migracoes; create table visitas_migracoes (nota text)",
            "table visitas_migracoes",
            "drop table visitas_migracoes",
        ),
        (
            "drop function total_visitas(); \
             create function total_visitas() returns bigint language sql as 'select absent()::bigint'; \
             drop function registrar_visitas(timestamptz[])",
            "function total_visitas()",
            "drop function total_visitas()",
        ),
    ] {
        let world = World::new();
        let service = world.serve().await;
        service.visit().await;
        world
            .sql(&format!("set check_function_bodies = off; {replace}"))
            .await;
        service.get("/").await;
        until_down_because(
            &service,
            &format!("objects of the same names: {named}; rename"),
        )
        .await;
        world.sql(remove).await;
        service.until_ready().await;
        eventually("a visit is recorded", SOON, async || {
            service.get("/").await.status == 200
        })
        .await;
        assert_eq!(service.visit().await.0, world.rows().await, "{replace}");
    }
}

async fn until_down_because(service: &Service, why: &str) {
    let said = || {
        ["store is down", "store is still down"]
            .into_iter()
            .flat_map(|message| service.logged(message))
            .any(|line| {
                line["error"]
                    .as_str()
                    .is_some_and(|error| error.contains(why))
            })
    };
    eventually(&format!("{why}: {}", service.printed()), SOON, async || {
        said()
    })
    .await;
}

/// Applies this many migrations as the release did that kept its ledger in sqlx's default table.
async fn migrate_as_the_release_before(world: &World, count: usize) {
    let mut migrations = sqlx::migrate!("./migrations");
    migrations.migrations.to_mut().truncate(count);
    migrations
        .run(&mut world.session().await)
        .await
        .expect("the migrations of the release before");
}

/// How many rows are the same in both tables, in every column.
async fn copied_rows(world: &World) -> i64 {
    world
        .number("select count(*) from _sqlx_migrations natural join visitas_migracoes")
        .await
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("a string grows");
        text
    })
}
