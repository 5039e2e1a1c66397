//! A database that is emptied, replaced or restored while the service runs is used again without a
//! restart.

use std::time::{Duration, Instant};

use reqwest::StatusCode;

use crate::support::load::{Load, Visit};
use crate::support::{Ended, SOON, Service, World, eventually};

/// How soon the service uses a database that is back.
const RECOVERY: Duration = Duration::from_secs(1);

#[tokio::test(flavor = "multi_thread")]
#[ignore = "reads a clock: make faults"]
async fn emptied_database_is_migrated_again_within_a_second() {
    let world = World::of_its_own();
    let service = world.serve().await;
    service.visit().await;
    world.sql("drop schema public cascade").await;
    eventually("the migrations are pending", SOON, async || {
        is_pending(&service).await
    })
    .await;
    assert_eq!(
        service.get("/").await.status,
        StatusCode::SERVICE_UNAVAILABLE
    );
    world.sql("create schema public").await;
    assert!(until_visit(&service).await < RECOVERY);
    assert_eq!(world.rows().await, service.visit().await.0 - 1);
    service.until_ready().await;
    let health = service.get("/health").await.json();
    assert_eq!(health["checks"]["migrations"]["status"], "ok");
}

#[tokio::test(flavor = "multi_thread")]
async fn missing_object_is_created_again_and_the_rows_are_counted() {
    for loss in [
        "drop function registrar_visitas(timestamptz[])",
        "drop function travar_contagem()",
        "drop function total_visitas()",
        "drop function anotar_ajuste() cascade",
        "drop function esta_origem() cascade",
        "drop table visitas_contagem cascade",
        "drop table visitas_ajustes cascade",
        "drop table visitas cascade",
        "drop table visitas_migracoes",
        "delete from visitas_migracoes where version = 3",
    ] {
        let world = World::new();
        let service = world.serve().await;
        service.visit().await;
        world.sql(loss).await;
        // The loss of a table or function that only a visit needs shows at the next visit.
        service.get("/").await;
        eventually(
            &format!(
                "everything is there again after {loss}: {}",
                service.printed()
            ),
            SOON,
            async || service.logged("the database is migrated").len() == 2,
        )
        .await;
        until_visit(&service).await;
        world.sql("insert into visitas default values").await;
        let total = service.visit().await.0;
        assert_eq!(total, world.rows().await, "after {loss}");
        service.until_ready().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn database_of_an_older_version_is_migrated_without_a_visit() {
    let world = World::new();
    let service = world.serve().await;
    service.visit().await;
    world
        .sql("drop schema public cascade; create schema public")
        .await;
    let mut older = sqlx::migrate!("./migrations");
    older.migrations.to_mut().truncate(2);
    older.dangerous_set_table_name("visitas_migracoes");
    older
        .run(&mut world.session().await)
        .await
        .expect("the older version's migrations");
    world
        .sql("insert into visitas select from generate_series(1, 5)")
        .await;
    eventually("all migrations are there", SOON, async || {
        world
            .number("select max(version) from visitas_migracoes")
            .await
            > 2
    })
    .await;
    service.until_ready().await;
    assert_eq!(service.visit().await.0, 6);
}

#[tokio::test(flavor = "multi_thread")]
async fn older_ledger_with_newer_objects_is_migrated() {
    for loss in [
        "delete from visitas_migracoes where version = 3",
        "delete from visitas_migracoes where version = 1",
        "truncate visitas_migracoes",
    ] {
        let world = World::new();
        let service = world.serve().await;
        service.visit().await;
        world.sql(loss).await;
        let service = world.serve().await;
        assert_eq!(service.visit().await.0, 2, "after {loss}");
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "reads a clock: make faults"]
async fn database_that_replaces_another_is_used_within_a_second() {
    let world = World::of_its_own();
    let service = world.serve().await;
    service.visit().await;
    let other = format!("{}_other", world.database);
    world.postgres.create_database(&other).unwrap();
    let elsewhere = world.settings_but("DB_NAME", &[("DB_NAME", &other)]);
    assert_eq!(Ended::of(&["migrate"], &elsewhere).await.code, Some(0));
    world
        .postgres
        .sql(
            &other,
            "insert into visitas select from generate_series(1, 41)",
        )
        .unwrap();

    let database = &world.database;
    let terminate = format!(
        "select pg_terminate_backend(pid) from pg_stat_activity where datname = '{database}'"
    );
    let postgres = |statement: &str| world.postgres.sql("postgres", statement);
    // The service opens sessions all the time, which can prevent the renaming.
    eventually("the database is out of the way", SOON, async || {
        postgres(&terminate).unwrap();
        postgres(&format!(
            "alter database {database} rename to {database}_old"
        ))
        .is_ok()
    })
    .await;
    postgres(&format!("alter database {other} rename to {database}")).unwrap();
    assert!(until_visit(&service).await < RECOVERY);
    assert_eq!(service.visit().await.0, world.rows().await);
    assert!(world.rows().await > 42);
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_migrate_an_emptied_database_under_load_once() {
    let world = World::new();
    let (one, two, three) = tokio::join!(world.serve(), world.serve(), world.serve());
    let load = Load::start(&[&one, &two, &three], 12);
    eventually("visits are made", SOON, async || world.rows().await > 200).await;
    world
        .sql("set lock_timeout = '5s'; drop schema public cascade; create schema public")
        .await;
    // Until a visit or the monitor has noticed, the replicas call themselves ready.
    eventually("the table is there again", SOON, async || {
        world.number("select count(to_regclass('visitas'))").await == 1
    })
    .await;
    for service in [&one, &two, &three] {
        service.until_ready().await;
    }
    eventually("visits are made again", SOON, async || {
        world.rows().await > 200
    })
    .await;
    let visits = load.stop().await;
    let last_failure = visits
        .iter()
        .filter(|visit| visit.status != 200)
        .map(Visit::answered)
        .max()
        .expect("a failure");
    let after = visits.iter().filter(|visit| visit.sent > last_failure);
    let mut numbers: Vec<_> = after.filter_map(Visit::total).collect();
    numbers.sort_unstable();
    assert!(numbers.windows(2).all(|pair| pair[0] < pair[1]));
    assert_eq!(one.visit().await.0, world.rows().await);
    assert_eq!(two.visit().await.0, world.rows().await);
}

async fn is_pending(service: &Service) -> bool {
    let health = service.get("/health").await;
    health.status == StatusCode::SERVICE_UNAVAILABLE
        && health.json()["checks"]["migrations"]["status"] == "pending"
}

/// Visits until a visit succeeds, and returns how long that took.
async fn until_visit(service: &Service) -> Duration {
    let began = Instant::now();
    eventually("a visit succeeds", SOON, async || {
        service.get("/").await.status == StatusCode::OK
    })
    .await;
    began.elapsed()
}
