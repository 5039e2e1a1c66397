//! The metrics: what is counted, and when. Their names are tested in `exposition`.

use std::time::{Duration, Instant};

use crate::support::load::Load;
use crate::support::{HeldCount, SOON, Way, World, eventually, without_stores};

#[tokio::test(flavor = "multi_thread")]
async fn series_with_known_labels_exist_at_zero() {
    let service = without_stores(&[]).await;
    let text = service.get("/metrics").await.body;
    for outcome in ["ok", "degraded", "failed", "shed", "in_doubt", "abandoned"] {
        let series = format!("visitas_visits_total{{outcome=\"{outcome}\"}} 0\n");
        assert!(text.contains(&series), "{series}");
    }
    assert!(text.contains("\nvisitas_panics_total 0\n"), "{text}");
    for (store, operation) in [("postgresql", "SELECT"), ("redis", "INCRBY")] {
        for outcome in ["ok", "error", "timeout", "cancelled"] {
            let series = calls(store, operation, outcome);
            assert!(text.contains(&format!("\n{series} ")), "{series}");
        }
    }
    for status in ["200", "503"] {
        let label = format!("http_response_status_code=\"{status}\"");
        assert!(text.lines().any(|line| {
            line.starts_with("http_server_request_duration_seconds_count{")
                && line.contains("http_route=\"/\"")
                && line.contains(&label)
                && line.ends_with(" 0")
        }));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn call_that_times_out_is_counted_with_its_time() {
    let world = World::new();
    let service = world.serve().await;
    let timeouts = calls("redis", "INCRBY", "timeout");
    assert_eq!(service.metric(&timeouts).await, Some(0.0));
    world.redis.pause().unwrap();
    service.get("/").await;
    assert!(service.metric(&timeouts).await >= Some(1.0));
    let text = service.get("/metrics").await.body;
    let duration = text.lines().find(|line| {
        line.starts_with("db_client_operation_duration_seconds_count{")
            && line.contains("error_type=\"timeout\"")
    });
    assert!(duration.is_some(), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn refused_call_has_the_error_code_of_the_store() {
    let world = World::new();
    let service = world.serve().await;
    let _count = HeldCount::of(&world).await;
    service.get("/").await;
    let refused = calls("postgresql", "SELECT", "error");
    assert!(service.metric(&refused).await >= Some(1.0));
    let text = service.get("/metrics").await.body;
    let duration = text
        .lines()
        .find(|line| line.contains("error_type=\"55P03\""))
        .expect("a series with the code");
    assert!(duration.contains("db_response_status_code=\"55P03\""));
}

// --- wiring ---

/// The series of a store's calls.
fn calls(store: &str, operation: &str, outcome: &str) -> String {
    format!(
        "visitas_store_calls_total{{db_system_name=\"{store}\",\
         db_operation_name=\"{operation}\",outcome=\"{outcome}\"}}"
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn visits_that_are_not_sent_have_no_queue_wait_and_no_batch() {
    let world = World::of_its_own();
    let service = world.serve().await;
    service.visit().await;
    world.postgres.kill().unwrap();
    service.until_health("unavailable").await;
    for _ in 0..20 {
        assert_eq!(service.get("/").await.status, 503);
    }
    let sent = service.counted("ok").await + service.counted("in_doubt").await;
    let waits = service.metric("visitas_queue_wait_seconds_count").await;
    assert_eq!(waits, Some(sent as f64));
    assert_eq!(service.metric("visitas_batch_size_count").await, Some(1.0));
}

#[tokio::test(flavor = "multi_thread")]
async fn visits_in_flight_are_not_drift() {
    let world = World::new();
    let slow = Way::with_delay(world.redis.port(), Duration::from_millis(100)).await;
    let service = world
        .serve_with(&[
            ("REDIS_PORT", &slow.port.to_string()),
            ("REDIS_TIMEOUT", "600ms"),
        ])
        .await;
    let load = Load::start(&[&service], 32);
    let until = Instant::now() + Duration::from_secs(3);
    let mut known = 0;
    while Instant::now() < until {
        let drift = service.metric("visitas_store_drift").await.unwrap();
        assert!(drift.is_nan() || drift == 0.0, "{drift}");
        known += u32::from(!drift.is_nan());
    }
    assert!(known > 0);
    load.stop().await;
    world
        .redis_says::<i64>(&["DECRBY", "visitas_home", "5"])
        .await;
    eventually("the drift is seen", SOON, async || {
        service.metric("visitas_store_drift").await == Some(5.0)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "reads a clock: make faults"]
async fn counts_are_known_as_soon_as_the_stores_are_up() {
    let world = World::of_its_own();
    drop(world.serve().await);
    world
        .redis_says::<i64>(&["INCRBY", "visitas_home", "7"])
        .await;
    world.postgres.kill().unwrap();
    let service = world.start(&[]).await;
    // Within 900 ms only the first probe has read Redis: readings are a second apart.
    eventually(
        "a refusal has the counter of Redis",
        Duration::from_millis(900),
        async || service.get("/").await.json()["visitas_redis"] == 7,
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn size_of_the_database_is_known_once_postgres_is_up_and_stays_while_it_is_down() {
    let world = World::of_its_own();
    let service = world.start(&[]).await;
    let size = async || service.metric("visitas_database_size_bytes").await;
    eventually("the size is read", SOON, async || {
        size().await.is_some_and(|bytes| !bytes.is_nan())
    })
    .await;
    let read = size().await.unwrap();
    let template = "select pg_database_size('template1')";
    assert!(read > world.number(template).await as f64, "{read}");
    let now = "select pg_database_size(current_database())";
    assert!(read <= world.number(now).await as f64, "{read}");
    world.postgres.kill().unwrap();
    service.until_health("unavailable").await;
    assert_eq!(size().await, Some(read));
}

#[tokio::test(flavor = "multi_thread")]
async fn size_of_the_database_is_unknown_before_postgres_is_up() {
    let service = without_stores(&[]).await;
    let size = service.metric("visitas_database_size_bytes").await;
    assert!(size.is_some_and(f64::is_nan), "{size:?}");
}
