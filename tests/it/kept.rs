//! Triggers and rules that others put on the table: no visit is acknowledged whose row is not kept,
//! and the count is that of the rows that are kept.

use std::time::{Duration, Instant};

use reqwest::StatusCode;

use crate::support::load::visits;
use crate::support::{SOON, Service, World, eventually};

/// Statements that keep a visit's row out of the table without an error, each with the statement
/// that removes it.
const LOSSES: [(&str, &str); 6] = [
    (
        "create function public.drops() returns trigger language plpgsql as $$ begin return null; end $$; \
         create trigger drops before insert on visitas for each row execute function public.drops()",
        "drop trigger drops on visitas",
    ),
    (
        "create function public.drops() returns trigger language plpgsql as $$ begin if new.id % 2 = 0 then return null; end if; return new; end $$; \
         create trigger drops before insert on visitas for each row execute function public.drops()",
        "drop trigger drops on visitas",
    ),
    (
        "create rule drops as on insert to visitas do instead nothing",
        "drop rule drops on visitas",
    ),
    (
        "create table public.others (data timestamptz); \
         create rule drops as on insert to visitas do instead insert into others values (new.data)",
        "drop rule drops on visitas",
    ),
    (
        "create function public.drops() returns trigger language plpgsql as $$ begin delete from visitas where id = new.id; return null; end $$; \
         create trigger drops after insert on visitas for each row execute function public.drops()",
        "drop trigger drops on visitas",
    ),
    (
        "create function public.drops() returns trigger language plpgsql as $$ begin delete from visitas where id = new.id; return null; end $$; \
         create constraint trigger drops after insert on visitas deferrable initially deferred for each row execute function public.drops()",
        "drop trigger drops on visitas",
    ),
];

/// Keeps the table at three rows.
const KEEP_THREE: &str = "create function public.keep_three() returns trigger language plpgsql as $$ begin \
       delete from visitas where id not in (select id from visitas order by id desc limit 3); \
       return null; end $$; \
     create trigger keep_three after insert on visitas for each statement \
       execute function public.keep_three()";

#[tokio::test(flavor = "multi_thread")]
async fn visit_whose_row_a_trigger_or_rule_drops_is_not_acknowledged() {
    for (loss, mend) in LOSSES {
        let world = World::new();
        let service = world.serve().await;
        service.visit().await;
        world.sql(loss).await;
        let mut acknowledged = 1;
        // One batch at a time, so that a trigger that drops every other row drops some and keeps some.
        for _ in 0..4 {
            let response = service.get("/").await;
            if response.status == StatusCode::OK {
                acknowledged += 1;
                continue;
            }
            assert_eq!(response.status, StatusCode::SERVICE_UNAVAILABLE, "{loss}");
            assert_eq!(response.json()["db_status"], "erro", "{loss}");
            assert_eq!(
                response.json()["total_registros_db"],
                serde_json::Value::Null
            );
        }
        assert_eq!(world.rows().await, acknowledged, "{loss}");
        assert_eq!(world.redis_visits().await, acknowledged, "{loss}");
        eventually("the log names it", SOON, async || is_named(&service)).await;

        world.sql(mend).await;
        service.until_ready().await;
        assert_eq!(service.visit().await.0, acknowledged + 1, "after {mend}");
        assert_eq!(world.rows().await, acknowledged + 1, "after {mend}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn batch_that_loses_a_row_to_a_trigger_fails_as_a_whole() {
    let world = World::new();
    let service = world.serve().await;
    world.sql(LOSSES[1].0).await;
    let visits = visits(&[&service], 32, 200).await;
    let acknowledged = visits.iter().filter(|visit| visit.status == 200).count();
    assert_eq!(world.rows().await, i64::try_from(acknowledged).unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn first_visit_after_a_restart_of_postgres_is_not_acknowledged_without_its_row() {
    for (loss, mend) in [LOSSES[4], LOSSES[5]] {
        let world = World::of_its_own();
        let service = world.serve().await;
        service.visit().await;
        world.sql(loss).await;
        world.postgres.kill().unwrap();
        world.postgres.start_again().unwrap();
        let until = Instant::now() + Duration::from_secs(1);
        while Instant::now() < until {
            let visit = service.get("/").await;
            assert_eq!(visit.status, StatusCode::SERVICE_UNAVAILABLE, "{loss}");
        }
        assert_eq!(world.rows().await, 1, "{loss}");
        world.sql(mend).await;
        service.until_ready().await;
        assert_eq!(service.visit().await.0, 2, "after {mend}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn table_that_keeps_the_newest_rows_is_adopted() {
    let world = World::new();
    world
        .sql(
            "create table visitas (id serial primary key, data timestamptz default now()); \
             insert into visitas select from generate_series(1, 3)",
        )
        .await;
    world.sql(KEEP_THREE).await;
    let service = world.serve().await;
    for _ in 0..3 {
        assert_eq!(service.visit().await.0, 3);
    }
    // These rows have higher ids than the next visit, so the trigger takes them for newer ones.
    world
        .sql("insert into visitas (id) select generate_series(1000001, 1002000)")
        .await;
    assert_eq!(
        service.get("/").await.status,
        StatusCode::SERVICE_UNAVAILABLE
    );
    world.sql("truncate visitas").await;
    service.until_ready().await;
    assert_eq!(service.visit().await.0, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn trigger_that_misses_a_table_is_not_taken_for_an_emptied_database() {
    let world = World::new();
    let service = world.serve().await;
    service.visit().await;
    world
        .sql(
            "create function public.audits() returns trigger language plpgsql as $$ begin \
               insert into absent values (now()); return null; end $$; \
             create trigger audits after insert on visitas for each row execute function public.audits()",
        )
        .await;
    assert_eq!(
        service.get("/").await.status,
        StatusCode::SERVICE_UNAVAILABLE
    );
    let attempts = r#"visitas_store_calls_total{db_system_name="postgresql",db_operation_name="SELECT",outcome="error"}"#;
    let before = service.metric(attempts).await.unwrap();
    eventually("Postgres has been probed", SOON, async || {
        service.metric(attempts).await > Some(before + 4.0)
    })
    .await;
    let health = service.get("/health").await.json();
    assert_eq!(health["checks"]["migrations"]["status"], "ok");
    assert_eq!(service.logged("the database is migrated").len(), 1);
    world
        .sql("create table public.absent (at timestamptz)")
        .await;
    service.until_ready().await;
    assert_eq!(service.visit().await.0, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn trigger_that_drops_the_row_of_the_rehearsal_is_named_once() {
    let world = World::new();
    drop(world.serve().await);
    world.sql(LOSSES[0].0).await;
    let service = world.start(&[]).await;
    eventually("the log names it", SOON, async || is_named(&service)).await;
    let log = service.printed();
    assert_eq!(log.matches("trigger drops").count(), 1, "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn table_that_drops_visits_is_not_adopted() {
    for (loss, mend) in [LOSSES[0], LOSSES[2], LOSSES[4]] {
        let world = World::new();
        world
            .sql("create table visitas (id serial primary key, data_hora timestamp default now(), data timestamptz)")
            .await;
        world.sql("insert into visitas default values").await;
        world.sql(loss).await;
        let service = world.start(&[]).await;
        eventually("the log names it", SOON, async || is_named(&service)).await;
        let health = service.get("/health").await;
        assert_eq!(health.status, StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(health.json()["checks"]["migrations"]["status"], "pending");

        world.sql(mend).await;
        service.until_ready().await;
        assert_eq!(service.visit().await.0, 2, "after {mend}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn trigger_or_rule_that_fails_the_trial_insert_is_named() {
    let failing = "create function public.fails() returns trigger language plpgsql as $$ begin \
           raise exception 'secret nope'; end $$; \
         create trigger fails before insert on visitas for each row \
           execute function public.fails()";
    let dividing = "create table public.others (n int); \
         create rule fails as on insert to visitas do also \
           insert into others values (1 / 0)";
    for (create, code, named) in [
        (failing, "P0001: ", "trigger fails"),
        (dividing, "22012: ", "rule fails"),
    ] {
        for is_adoption in [true, false] {
            let world = World::new();
            if is_adoption {
                world
                    .sql("create table visitas (id bigserial primary key, data timestamptz)")
                    .await;
            } else {
                world.serve().await.stop().await;
            }
            world.sql(create).await;
            let service = world.start(&[]).await;
            let down = async || service.logged("store is down").pop();
            eventually("the store is down", SOON, async || down().await.is_some()).await;
            let why = down().await.unwrap()["error"].to_string();
            for part in [code, named, "a trial insert into public.visitas"] {
                assert!(why.contains(part), "{part} in {why}");
            }
            let end = if named.starts_with("rule") {
                "drop rule fails on visitas"
            } else {
                "drop trigger fails on visitas"
            };
            world.sql(end).await;
            service.until_ready().await;
            assert_eq!(service.visit().await.0, 1, "{create}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn table_that_keeps_the_newest_rows_accepts_visits_and_is_counted() {
    let world = World::new();
    let service = world.serve().await;
    world.sql(KEEP_THREE).await;
    for total in [1, 2, 3, 3, 3, 3] {
        assert_eq!(service.visit().await.0, total);
        assert_eq!(world.rows().await, total);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_that_a_trigger_adds_to_a_visit_are_counted() {
    let world = World::new();
    let service = world.serve().await;
    world
        .sql(
            "create function public.double() returns trigger language plpgsql as $$ begin \
               if pg_trigger_depth() = 1 then insert into visitas default values; end if; \
               return null; end $$; \
             create trigger double after insert on visitas for each row \
               execute function public.double()",
        )
        .await;
    for total in [2, 4, 6] {
        assert_eq!(service.visit().await.0, total);
        assert_eq!(world.rows().await, total);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rule_that_also_inserts_elsewhere_stops_no_visit() {
    let world = World::new();
    let service = world.serve().await;
    world
        .sql(
            "create table public.others (at timestamptz); \
             create rule also as on insert to visitas do also insert into others values (now())",
        )
        .await;
    assert_eq!(service.visit().await.0, 1);
    assert_eq!(service.visit().await.0, 2);
    assert_eq!(world.number("select count(*) from others").await, 2);
}

/// Whether the log says that visits were dropped, and names the trigger or rule.
fn is_named(service: &Service) -> bool {
    let log = service.printed();
    log.contains("VS003") && (log.contains("trigger drops") || log.contains("rule drops"))
}
