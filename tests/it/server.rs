//! Connections: how many there are, how long each may take, and what is no HTTP/1.

use std::process::Command;
use std::time::Duration;

use crate::support::{SOON, Service, Wire, World, eventually};

#[tokio::test]
async fn half_sent_head_is_cut_at_the_header_timeout() {
    let world = World::new();
    let service = world.start(&[("HEADER_TIMEOUT", "500ms")]).await;
    let mut wire = Wire::open(&service).await;
    wire.send("GET / HTTP/1.1\r\nhost: te").await;
    assert_eq!(wire.rest().await, "");
    assert_about(wire.age(), Duration::from_millis(500));
}

#[tokio::test]
async fn head_that_drips_gains_no_time() {
    let world = World::new();
    let service = world.start(&[("HEADER_TIMEOUT", "500ms")]).await;
    let mut wire = Wire::open(&service).await;
    wire.send("GET / HTTP/1.1\r\nx: ").await;
    while wire.is_open_after(Duration::from_millis(50)).await {
        wire.send("x").await;
        assert!(wire.age() < SOON, "it is still open");
    }
    assert_about(wire.age(), Duration::from_millis(500));
}

#[tokio::test]
async fn connection_that_never_sends_is_cut_at_the_header_timeout() {
    let world = World::new();
    let service = world.start(&[("HEADER_TIMEOUT", "500ms")]).await;
    let mut wire = Wire::open(&service).await;
    assert_eq!(wire.rest().await, "");
    assert_about(wire.age(), Duration::from_millis(500));
}

#[tokio::test]
async fn idle_connection_outlives_the_header_timeout_and_ends_at_its_own() {
    let world = World::new();
    let timeouts = [("HEADER_TIMEOUT", "100ms"), ("IDLE_TIMEOUT", "1200ms")];
    let service = world.start(&timeouts).await;
    let mut wire = Wire::open(&service).await;
    wire.get("/health/live").await;
    assert_eq!(wire.rest().await, "");
    assert_about(wire.age(), Duration::from_millis(1200));
}

#[tokio::test]
async fn later_head_has_a_header_timeout_of_its_own() {
    let world = World::new();
    let service = world.start(&[("HEADER_TIMEOUT", "500ms")]).await;
    let mut wire = Wire::open(&service).await;
    wire.get("/health/live").await;
    wire.send("GET /health/live").await;
    assert_eq!(wire.rest().await, "");
    assert_about(wire.age(), Duration::from_millis(500));
}

#[tokio::test]
async fn connection_above_the_limit_is_served_once_another_closes() {
    let world = World::new();
    let service = world.start(&[("HTTP_MAX_CONNECTIONS", "3")]).await;
    let (mut first, mut second) = (Wire::open(&service).await, Wire::open(&service).await);
    first.get("/health/live").await;
    second.get("/health/live").await;
    until_connections(&service, 3, 3).await;
    let mut third = Wire::open(&service).await;
    third.send("GET /health/live HTTP/1.1\r\n\r\n").await;
    let patience = Duration::from_millis(200);
    assert_eq!(third.answer_within(patience).await, None);
    until_connections(&service, 3, 3).await;
    drop(first);
    let answer = third.answer_within(SOON).await.expect("an answer");
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
}

#[tokio::test]
async fn connections_are_counted_as_they_open_and_close() {
    let world = World::new();
    let service = world.start(&[]).await;
    let mut wires = Vec::new();
    for open in 2..5 {
        let mut wire = Wire::open(&service).await;
        wire.get("/health/live").await;
        wires.push(wire);
        // The client's own is one of them.
        until_connections(&service, open, 16384).await;
    }
    drop(wires);
    until_connections(&service, 1, 16384).await;
}

#[tokio::test]
async fn malformed_head_is_400_and_the_connection_ends() {
    let world = World::new();
    let service = world.start(&[]).await;
    for head in [
        "nonsense\r\n\r\n",
        "GET / HTTP/1.1\r\nno colon\r\n\r\n",
        "GET / HTTP/1.1\r\nspace : before\r\n\r\n",
        "GET / HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
        "GET / HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
        "\u{16}\u{3}\u{1}\u{2}\u{0}\u{1}",
    ] {
        assert_refused(&service, head, "HTTP/1.1 400 ").await;
    }
}

#[tokio::test]
async fn head_that_is_too_large_is_431() {
    let world = World::new();
    let service = world.start(&[]).await;
    let head = |fields: String| format!("GET /health/live HTTP/1.1\r\n{fields}\r\n");
    let long = |bytes| head(format!("x: {}\r\n", "x".repeat(bytes)));
    let many = |fields| head("x: y\r\n".repeat(fields));
    assert_refused(&service, &long(256 * 1024), "HTTP/1.1 431 ").await;
    assert_refused(&service, &many(101), "HTTP/1.1 431 ").await;
    // Of one that never ends no more is kept than that.
    let half = format!("GET / HTTP/1.1\r\nx: {}", "x".repeat(33 * 1024));
    assert_refused(&service, &half, "HTTP/1.1 431 ").await;
    for accepted in [long(31 * 1024), many(100)] {
        let mut wire = Wire::open(&service).await;
        wire.send(accepted).await;
        let answer = wire.answer_within(SOON).await.expect("an answer");
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    }
}

#[tokio::test]
async fn http_2_is_hung_up_on_and_a_request_to_upgrade_is_served_in_http_1() {
    let world = World::new();
    let service = world.start(&[]).await;
    assert_refused(&service, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "").await;
    let mut wire = Wire::open(&service).await;
    let upgrade = "connection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAMA\r\n";
    wire.send(format!("GET /health/live HTTP/1.1\r\n{upgrade}\r\n"))
        .await;
    let answer = wire.answer_within(SOON).await.expect("an answer");
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
}

#[tokio::test]
async fn file_limit_is_raised_to_fit_the_connections() {
    let world = World::new();
    let mut command = Command::new("/bin/sh");
    command
        .args(["-c", "ulimit -S -n 128 && exec \"$0\" serve"])
        .arg(env!("CARGO_BIN_EXE_visitas"))
        .env_clear()
        .envs(world.settings())
        .env("HTTP_MAX_CONNECTIONS", "300");
    let service = Service::spawn(command).await;
    let mut wires = Vec::new();
    for _ in 0..250 {
        let mut wire = Wire::open(&service).await;
        wire.get("/health/live").await;
        wires.push(wire);
    }
    until_connections(&service, 251, 300).await;
    let limit = service.metric("process_max_fds").await;
    assert!(limit.is_some_and(|limit| limit > 300.0), "{limit:?}");
}

/// Sends what is refused with a status, or without an answer, and sees that others are still
/// served.
async fn assert_refused(service: &Service, request: &str, status: &str) {
    let mut wire = Wire::open(service).await;
    wire.send(request).await;
    let answer = wire.rest().await;
    assert!(answer.starts_with(status), "{answer:?} to {request:.200}");
    assert_eq!(answer.is_empty(), status.is_empty(), "{answer:?}");
    Wire::open(service).await.get("/health/live").await;
}

/// Not before the limit, and not long after it on a machine that is busy with other tests.
fn assert_about(age: Duration, limit: Duration) {
    assert!(
        limit <= age && age < limit + Duration::from_secs(1),
        "{age:?}"
    );
}

/// Waits until so many connections are counted, of so many that there may be.
async fn until_connections(service: &Service, open: u32, max: u32) {
    let what = format!("{open} of {max} connections are open");
    eventually(&what, SOON, async || {
        service.metric("visitas_http_connections").await == Some(open.into())
            && service.metric("visitas_http_connections_max").await == Some(max.into())
    })
    .await;
}
