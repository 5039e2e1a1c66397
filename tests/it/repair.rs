//! The commands that correct the numbers after manual changes, and the gauges that show a drift.

use std::time::Duration;

use crate::support::load::Load;
use crate::support::{Ended, SOON, Service, Way, World, eventually, settings};

#[tokio::test(flavor = "multi_thread")]
async fn recount_counts_rows_that_no_trigger_saw() {
    for (off, on) in [
        (
            "alter table visitas disable trigger user",
            "alter table visitas enable trigger user",
        ),
        (
            "set session_replication_role = replica",
            "reset session_replication_role",
        ),
    ] {
        let world = World::new();
        let service = world.serve().await;
        service.visit().await;
        let unseen = "insert into visitas select from generate_series(1, 7)";
        world.sql(&format!("{off}; {unseen}; {on}")).await;
        assert_eq!(service.visit().await.0, 2, "after {off}");

        let ended = Ended::of(&["recount"], &world.settings()).await;
        assert_eq!(ended.output, "counted 9 rows; the total was 2\n");
        assert_eq!(ended.code, Some(0));
        assert_eq!(service.visit().await.0, 10);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn recount_under_load_is_exact() {
    let world = World::new();
    let service = world.serve_with(&PATIENT).await;
    let load = Load::start(&[&service], 16);
    for _ in 0..3 {
        until_more_visits(&world).await;
        world
            .sql("set session_replication_role = replica; insert into visitas select from generate_series(1, 7)")
            .await;
        world.sql("insert into visitas default values").await;
        let ended = Ended::of(&["recount"], &world.settings()).await;
        assert_eq!(ended.code, Some(0), "{ended:?}");
    }
    let visits = load.stop().await;
    assert!(visits.iter().all(|visit| visit.status == 200));
    let rows = i64::try_from(visits.len()).unwrap() + 24;
    assert_eq!(world.rows().await, rows);
    assert_eq!(service.visit().await.0, rows + 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn reconcile_under_load_corrects_nothing() {
    let world = World::new();
    // Redis is slow, so nearly always an increment is in flight whose batch is committed.
    let slow = Way::with_delay(world.redis.port(), Duration::from_millis(100)).await;
    let way = slow.port.to_string();
    let way = [("REDIS_PORT", way.as_str())];
    let service = world.serve_with(&[&PATIENT[..], &way].concat()).await;
    let load = Load::start(&[&service], 32);
    for _ in 0..4 {
        until_more_visits(&world).await;
        let settings = [world.settings(), settings(&PATIENT)].concat();
        let ended = Ended::of(&["reconcile"], &settings).await;
        assert!(ended.output.starts_with("both stores count"), "{ended:?}");
        assert!(!ended.output.contains("off by"), "{ended:?}");
    }
    let visits = load.stop().await;
    assert!(visits.iter().all(|visit| visit.redis().is_some()));
    assert!(visits.iter().all(|visit| visit.total() == visit.redis()));
}

#[tokio::test(flavor = "multi_thread")]
async fn reconcile_closes_a_drift_of_either_sign() {
    let world = World::new();
    let service = world.serve().await;
    service.visit().await;
    for (change, count, off) in [
        (&["INCRBY", "visitas_home", "5"][..], 1, 5),
        (&["DECRBY", "visitas_home", "3"], 2, -3),
        (&["DEL", "visitas_home"], 3, -3),
    ] {
        let _: i64 = world.redis_says(change).await;
        let ended = Ended::of(&["reconcile"], &world.settings()).await;
        assert_eq!(
            ended.output,
            format!("both stores count {count}; Redis was off by {off}\n")
        );
        assert_eq!(ended.code, Some(0));
        assert_eq!(service.visit().await, (count + 1, count + 1));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn reconcile_follows_a_manual_insert() {
    let world = World::new();
    let service = world.serve().await;
    service.visit().await;
    world
        .sql("insert into visitas select from generate_series(1, 4)")
        .await;
    let ended = Ended::of(&["reconcile"], &world.settings()).await;
    assert_eq!(ended.output, "both stores count 5; Redis was off by -4\n");
    assert_eq!(service.visit().await, (6, 6));
}

#[tokio::test(flavor = "multi_thread")]
async fn gauges_follow_both_stores_and_their_difference() {
    let world = World::new();
    let service = world.serve().await;
    service.visit().await;
    until_gauges(&service, [1.0, 1.0, 0.0]).await;
    world
        .sql("insert into visitas select from generate_series(1, 5)")
        .await;
    until_gauges(&service, [6.0, 1.0, 5.0]).await;
    let _: i64 = world.redis_says(&["INCRBY", "visitas_home", "9"]).await;
    until_gauges(&service, [6.0, 10.0, -4.0]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn gauges_are_nan_while_their_store_is_unknown() {
    let world = World::of_its_own();
    let service = world.serve().await;
    service.visit().await;
    world.redis.kill().unwrap();
    until_gauges(&service, [1.0, f64::NAN, f64::NAN]).await;
    world.postgres.kill().unwrap();
    until_gauges(&service, [f64::NAN, f64::NAN, f64::NAN]).await;
    world.redis.start_again().unwrap();
    until_gauges(&service, [f64::NAN, 0.0, f64::NAN]).await;
    world.postgres.start_again().unwrap();
    until_gauges(&service, [1.0, 0.0, 1.0]).await;
}

/// Refuses every reading.
const DAMAGED: &str = "create or replace function public.estado_da_contagem( \
         completo boolean, out total bigint, out recontagem boolean) \
       language plpgsql stable as $$ begin \
         raise exception 'invalid page in block 0' using errcode = 'XX001'; end $$";

#[tokio::test(flavor = "multi_thread")]
async fn reading_that_fails_from_the_start_does_not_stop_visits() {
    let world = World::new();
    let migrated = Ended::of(&["migrate"], &world.settings()).await;
    assert_eq!(migrated.code, Some(0), "{migrated:?}");
    world.sql(DAMAGED).await;
    let service = world.start(&[]).await;
    eventually("a visit is recorded", SOON, async || {
        service.get("/").await.status == 200
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn postgres_that_refuses_readings_only_stays_up() {
    let world = World::new();
    let service = world.serve().await;
    service.visit().await;
    let (intact,): (String,) = world
        .row("select pg_get_functiondef('public.estado_da_contagem'::regproc)")
        .await;
    world.sql(DAMAGED).await;
    let unread = || service.logged("count cannot be read, visits are recorded");
    eventually("the log says so", SOON, async || !unread().is_empty()).await;
    until_gauges(&service, [f64::NAN, 1.0, f64::NAN]).await;
    // Without visits: only the readings could have found the store down.
    assert!(service.logged("store is down").is_empty());
    assert_eq!(service.get("/health").await.status, 200);
    service.visit().await;
    world.sql(&intact).await;
    until_gauges(&service, [2.0, 2.0, 0.0]).await;
    assert!(service.logged("store is down").is_empty());
    let lines = unread();
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert_eq!(lines[0]["store"], "postgresql");
    assert!(lines[0]["error"].to_string().contains("XX001"), "{lines:?}");
}

/// Timeouts long enough for a busy machine: no visit is refused or missing in Redis. `reconcile`
/// waits for one `REDIS_TIMEOUT`.
const PATIENT: [(&str, &str); 3] = [
    ("DB_TIMEOUT", "10s"),
    ("REDIS_TIMEOUT", "1s"),
    ("VISIT_TIMEOUT", "20s"),
];

async fn until_more_visits(world: &World) {
    let before = world.redis_visits().await;
    eventually("visits are made", SOON, async || {
        world.redis_visits().await > before + 50
    })
    .await;
}

/// Waits for `visitas_rows`, `visitas_redis_visits` and `visitas_store_drift`.
async fn until_gauges(service: &Service, expected: [f64; 3]) {
    eventually(&format!("the gauges are {expected:?}"), SOON, async || {
        let text = service.get("/metrics").await.body;
        let value = |name: &str| -> f64 {
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            line.expect("the gauge is there").trim().parse().unwrap()
        };
        let gauges = [
            "visitas_rows ",
            "visitas_redis_visits ",
            "visitas_store_drift ",
        ]
        .map(value);
        // `total_cmp`: NaN equals NaN.
        gauges
            .iter()
            .zip(expected)
            .all(|(gauge, expected)| gauge.total_cmp(&expected).is_eq())
    })
    .await;
}
