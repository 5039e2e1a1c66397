//! Stopping: what is still answered after a signal, and how long the stop takes.

use std::net::TcpListener;
use std::time::{Duration, Instant};

use devstack::Server;
use reqwest::header::HeaderMap;
use reqwest::{Method, StatusCode};
use tokio::task::JoinSet;

use crate::support::{HeldCount, SOON, Service, Wire, World, eventually, until_refused};

const VISIT: &str = "GET / HTTP/1.1\r\nhost: test\r\n\r\n";

#[tokio::test(flavor = "multi_thread")]
#[ignore = "reads a clock: make faults"]
async fn stop_under_load_answers_every_request_and_keeps_every_visit() {
    let world = World::of_its_own();
    let service = world.serve().await;
    let mut clients = JoinSet::new();
    for _ in 0..32 {
        clients.spawn(visit_until_closed(Wire::open(&service).await));
    }
    eventually("visits are made", SOON, async || world.rows().await > 200).await;
    let stopped = Instant::now();
    service.signal("TERM");

    let mut acknowledged = 0;
    for client in clients.join_all().await {
        assert_eq!(client.unanswered, 0);
        acknowledged += client.acknowledged;
    }
    assert!(service.ended(SOON).await.success());
    assert!(stopped.elapsed() < Duration::from_secs(2));
    assert_eq!(world.rows().await, acknowledged);
    assert_eq!(world.redis_visits().await, acknowledged);
}

#[tokio::test(flavor = "multi_thread")]
async fn visits_that_are_queued_or_arrive_while_the_service_drains_are_recorded() {
    let world = World::new();
    let patient = [("DB_TIMEOUT", "8s"), ("VISIT_TIMEOUT", "9s")];
    let service = world.serve_with(&patient).await;
    let mut count = HeldCount::of(&world).await;
    let first = service.begin_visit();
    count.until_waited_for().await;
    let queued: JoinSet<_> = (0..10).map(|_| service.begin_visit()).collect();
    let (begun, rest) = VISIT.split_at(20);
    let mut late = Wire::open(&service).await;
    late.send(begun).await;
    let mut idle = Wire::open(&service).await;
    service.until_queued(10).await;

    service.signal("TERM");
    until_logged(&service, "stopping").await;
    idle.send(VISIT).await;
    until_refused(service.address).await;
    late.send(rest).await;
    count.release().await;
    for mut wire in [late, idle] {
        let response = wire.rest().await;
        assert!(response.starts_with("HTTP/1.1 200 "), "{response}");
        assert!(response.contains("\r\nconnection: close\r\n"), "{response}");
    }
    assert_eq!(first.await.unwrap().status, StatusCode::OK);
    for response in queued.join_all().await {
        assert_eq!(response.unwrap().status, StatusCode::OK);
    }
    assert!(service.ended(SOON).await.success());
    assert_eq!(world.rows().await, 13);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_response_after_the_signal_says_close_and_scrapes_continue() {
    let world = World::new();
    let settings = [("SHUTDOWN_DELAY", "5m"), ("METRICS_ADDR", "127.0.0.1:0")];
    let service = world.serve_with(&settings).await;
    let mut kept = Wire::open(&service).await;
    kept.get("/").await;
    service.signal("TERM");
    service.until_health("unavailable").await;
    let response = kept.get("/").await;
    assert!(response.contains("\r\nconnection: close\r\n"), "{response}");
    assert_eq!(kept.rest().await, "");
    for path in ["/", "/health", "/health/ready", "/health/live", "/nope"] {
        for method in [Method::GET, Method::HEAD, Method::POST] {
            let response = service.ask(method.clone(), path, HeaderMap::new()).await;
            assert_eq!(response.header("connection"), "close", "{method} {path}");
        }
    }
    let address = service.logged("listening")[0]["metrics.address"].clone();
    let address = serde_json::from_value(address).unwrap();
    for _ in 0..2 {
        let mut scraper = Wire::open_at(address).await;
        let response = scraper.get("/metrics").await;
        assert!(response.starts_with("HTTP/1.1 200 "), "{response:.500}");
        assert!(
            response.contains("\r\nconnection: close\r\n"),
            "{response:.500}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "reads a clock: make faults"]
async fn visit_in_flight_is_answered_before_the_shutdown_timeout() {
    let world = World::of_its_own();
    let patient = [
        ("DB_TIMEOUT", "30s"),
        ("VISIT_TIMEOUT", "60s"),
        ("SHUTDOWN_TIMEOUT", "2s"),
    ];
    let service = world.serve_with(&patient).await;
    world.postgres.pause().unwrap();
    let waiting: JoinSet<_> = (0..5).map(|_| service.begin_visit()).collect();
    until_in_flight(&service, 5.0).await;
    ends_within(&service, Duration::from_secs(2)).await;
    for response in waiting.join_all().await {
        let response = response.unwrap();
        assert_eq!(response.status, StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(response.header("connection"), "close");
        assert_eq!(
            response.json()["total_registros_db"],
            serde_json::Value::Null
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn during_the_stop_delay_visits_are_recorded_and_readiness_is_503() {
    let world = World::new();
    let delay = Duration::from_secs(2);
    let service = world.serve_with(&[("SHUTDOWN_DELAY", "2s")]).await;
    let stopped = Instant::now();
    stop(&service).await;
    let ready = service.get("/health/ready").await;
    assert_eq!(ready.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(ready.json()["status"], "unavailable");
    assert_eq!(service.get("/health/live").await.status, StatusCode::OK);
    let mut visits = 0;
    while stopped.elapsed() < delay * 3 / 4 {
        visits += 1;
        assert_eq!(service.visit().await, (visits, visits));
    }
    assert!(service.ended(SOON).await.success());
    assert!(stopped.elapsed() >= delay);
    assert_eq!(world.rows().await, visits);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "reads a clock: make faults"]
async fn half_sent_request_does_not_delay_a_stop_beyond_the_shutdown_timeout() {
    let world = World::of_its_own();
    let service = world
        .serve_with(&[
            ("SHUTDOWN_DELAY", "200ms"),
            ("SHUTDOWN_TIMEOUT", "1s"),
            ("HEADER_TIMEOUT", "1m"),
        ])
        .await;
    let mut half = Wire::open(&service).await;
    half.send("GET / HTTP/1.1\r\nhost:").await;
    eventually("the connection is open", SOON, async || {
        service.metric("visitas_http_connections").await >= Some(2.0)
    })
    .await;
    ends_within(&service, Duration::from_millis(1200)).await;
    assert_eq!(half.rest().await, "");
}

#[tokio::test(flavor = "multi_thread")]
async fn second_signal_ends_the_program_at_once() {
    let world = World::new();
    for second in ["TERM", "INT", "HUP"] {
        let service = world.serve_with(&[("SHUTDOWN_DELAY", "1m")]).await;
        stop(&service).await;
        service.signal(second);
        let status = service.ended(Duration::from_secs(1)).await;
        assert_eq!(status.code(), Some(1));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn interrupt_and_hangup_stop_like_a_termination() {
    let world = World::new();
    for (visits, signal) in [(1, "INT"), (2, "HUP")] {
        let service = world.serve_with(&[("SHUTDOWN_DELAY", "300ms")]).await;
        let stopped = Instant::now();
        service.signal(signal);
        service.until_health("unavailable").await;
        assert_eq!(service.visit().await, (visits, visits));
        assert!(service.ended(SOON).await.success());
        assert!(stopped.elapsed() >= Duration::from_millis(300));
        until_logged(&service, "stopped").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "reads a clock: make faults"]
async fn stop_is_in_time_while_postgres_is_paused() {
    let world = World::of_its_own();
    let service = world.serve().await;
    world.postgres.pause().unwrap();
    let visit = service.begin_visit();
    until_in_flight(&service, 1.0).await;
    ends_within(&service, Duration::from_secs(3)).await;
    assert_eq!(visit.await.unwrap().status, StatusCode::SERVICE_UNAVAILABLE);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "reads a clock: make faults"]
async fn stop_is_in_time_while_redis_is_paused() {
    let world = World::new();
    let service = world.serve_with(&[("REDIS_TIMEOUT", "600ms")]).await;
    world.redis.pause().unwrap();
    let visit = service.begin_visit();
    until_in_flight(&service, 1.0).await;
    ends_within(&service, Duration::from_secs(4)).await;
    assert_eq!(visit.await.unwrap().status, StatusCode::OK);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "reads a clock: make faults"]
async fn stop_is_in_time_while_both_stores_are_down() {
    let world = World::of_its_own();
    let service = world.serve().await;
    for store in [&**world.postgres as &Server, &world.redis] {
        store.kill().unwrap();
    }
    service.until_health("unavailable").await;
    ends_within(&service, Duration::from_secs(2)).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "reads a clock: make faults"]
async fn stop_is_in_time_while_the_collector_never_responds() {
    let world = World::of_its_own();
    let silent = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let endpoint = format!("http://{}", silent.local_addr().unwrap());
    let settings = [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.as_str()),
        ("SHUTDOWN_TIMEOUT", "2s"),
    ];
    let service = world.serve_with(&settings).await;
    assert!(!service.get("/").await.header("traceresponse").is_empty());
    ends_within(&service, Duration::from_secs(2)).await;
    until_logged(&service, "the last spans were not exported").await;
}

/// The responses that one client has received.
struct Tally {
    acknowledged: i64,
    unanswered: u32,
}

async fn visit_until_closed(mut wire: Wire) -> Tally {
    let mut acknowledged = 0;
    loop {
        wire.send(VISIT).await;
        let Some(response) = wire.response_within(SOON).await else {
            let unanswered = 1;
            return Tally {
                acknowledged,
                unanswered,
            };
        };
        acknowledged += i64::from(response.starts_with("HTTP/1.1 200 "));
        if response
            .to_lowercase()
            .contains("\r\nconnection: close\r\n")
        {
            return Tally {
                acknowledged,
                unanswered: 0,
            };
        }
    }
}

/// Sends SIGTERM and waits until the service logs it.
async fn stop(service: &Service) {
    service.signal("TERM");
    until_logged(service, "stopping").await;
}

async fn until_logged(service: &Service, message: &str) {
    eventually(message, SOON, async || service.logged(message).len() == 1).await;
}

async fn ends_within(service: &Service, limit: Duration) {
    let stopped = Instant::now();
    service.signal("TERM");
    let status = service.ended(SOON).await;
    let took = stopped.elapsed();
    assert!(status.success(), "{status}: {}", service.printed());
    assert!(took < limit, "{took:?}");
}

/// Waits until this many visits are in flight, not counting the scrape itself.
async fn until_in_flight(service: &Service, visits: f64) {
    let series = r#"http_server_active_requests{http_request_method="GET",url_scheme="http"}"#;
    eventually("visits are in flight", SOON, async || {
        service.metric(series).await == Some(visits + 1.0)
    })
    .await;
}
