//! Connections of the program: the settings of its limits, and requests that reach no route. The
//! timeouts themselves are tested in [`crate::accept`].

use std::net::SocketAddr;
use std::process::Command;
use std::time::{Duration, Instant};

use lab::program::COVERAGE;

use crate::support::{SOON, Service, Wire, World, eventually, without_stores};

#[tokio::test]
async fn connection_with_half_sent_headers_is_closed_at_the_header_timeout() {
    let service = without_stores(&[("HEADER_TIMEOUT", "500ms")]).await;
    let mut wire = Wire::open(&service).await;
    wire.send("GET / HTTP/1.1\r\nhost: te").await;
    assert_eq!(wire.rest().await, "");
    assert_about(wire.age(), Duration::from_millis(500));
}

#[tokio::test]
async fn connection_that_never_sends_is_closed_at_the_idle_timeout() {
    let timeouts = [("HEADER_TIMEOUT", "100ms"), ("IDLE_TIMEOUT", "1200ms")];
    let service = without_stores(&timeouts).await;
    let mut wire = Wire::open(&service).await;
    assert_eq!(wire.rest().await, "");
    assert_about(wire.age(), Duration::from_millis(1200));
}

#[tokio::test]
async fn idle_connections_keep_no_client_out() {
    let world = World::new();
    let service = world.serve_with(&[("HTTP_MAX_CONNECTIONS", "8")]).await;
    let mut idle = Vec::new();
    for _ in 0..8 {
        let mut wire = Wire::open(&service).await;
        wire.get("/health/live").await;
        idle.push(wire);
    }
    for path in ["/health", "/metrics", "/"] {
        let began = Instant::now();
        let mut wire = Wire::open(&service).await;
        wire.get(path).await;
        idle.push(wire);
        let took = began.elapsed();
        assert!(took < Duration::from_secs(1), "{path}: {took:?}");
    }
    until_connections(&service, 8, 8).await;
    for (wire, is_open) in idle.iter_mut().zip([false; 4].into_iter().chain([true; 7])) {
        // One that is closed ends the wait at once.
        let pause = if is_open {
            Duration::from_millis(20)
        } else {
            SOON
        };
        assert_eq!(wire.is_open_after(pause).await, is_open);
    }
}

#[tokio::test]
async fn connections_are_counted_as_they_open_and_close() {
    let service = without_stores(&[]).await;
    let mut wires = Vec::new();
    for open in 2..5 {
        let mut wire = Wire::open(&service).await;
        wire.get("/health/live").await;
        wires.push(wire);
        // The connection of the scrape is one of them.
        until_connections(&service, open, 16384).await;
    }
    drop(wires);
    until_connections(&service, 1, 16384).await;
}

#[tokio::test]
async fn malformed_headers_are_400_and_the_connection_closes() {
    let service = without_stores(&[]).await;
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
async fn headers_that_are_too_large_are_431() {
    let service = without_stores(&[]).await;
    let head = |fields: String| format!("GET /health/live HTTP/1.1\r\nhost: a\r\n{fields}\r\n");
    let long = |bytes| head(format!("x: {}\r\n", "x".repeat(bytes)));
    let many = |fields| head("x: y\r\n".repeat(fields));
    assert_refused(&service, &long(256 * 1024), "HTTP/1.1 431 ").await;
    assert_refused(&service, &many(100), "HTTP/1.1 431 ").await;
    // Headers that never end are refused at the same size.
    let half = format!("GET / HTTP/1.1\r\nx: {}", "x".repeat(33 * 1024));
    assert_refused(&service, &half, "HTTP/1.1 431 ").await;
    for accepted in [long(31 * 1024), many(99)] {
        let mut wire = Wire::open(&service).await;
        wire.send(accepted).await;
        let response = wire.response_within(SOON).await.expect("a response");
        assert!(response.starts_with("HTTP/1.1 200 "), "{response}");
    }
}

#[tokio::test]
async fn http_2_is_disconnected_and_an_upgrade_request_is_served_in_http_1() {
    let service = without_stores(&[]).await;
    assert_refused(&service, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "").await;
    let mut wire = Wire::open(&service).await;
    let upgrade = "connection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAMA\r\n";
    wire.send(format!(
        "GET /health/live HTTP/1.1\r\nhost: a\r\n{upgrade}\r\n"
    ))
    .await;
    let response = wire.response_within(SOON).await.expect("a response");
    assert!(response.starts_with("HTTP/1.1 200 "), "{response}");
}

#[tokio::test]
async fn file_limit_is_raised_to_fit_the_connections() {
    let world = World::new();
    let mut command = Command::new("/bin/sh");
    command
        .args(["-c", "ulimit -S -n 128 && exec \"$0\" serve"])
        .arg(env!("CARGO_BIN_EXE_visitas"))
        .env_clear()
        .envs(COVERAGE)
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

#[tokio::test]
async fn both_listeners_together_stay_below_a_file_limit_that_cannot_be_raised() {
    let world = World::new();
    let mut command = Command::new("/bin/sh");
    command
        .args(["-c", "ulimit -n 200 && exec \"$0\" serve"])
        .arg(env!("CARGO_BIN_EXE_visitas"))
        .env_clear()
        .envs(COVERAGE)
        .envs(world.settings())
        .env("METRICS_ADDR", "127.0.0.1:0");
    let service = Service::spawn(command).await;
    service.until_ready().await;
    let scrapes = service.logged("listening")[0]["metrics.address"].clone();
    let scrapes: SocketAddr = serde_json::from_value(scrapes).expect("an address");
    let scrape = async |series: &str| {
        let text = service
            .client
            .get(format!("http://{scrapes}/metrics"))
            .send();
        let text = text
            .await
            .expect("a response")
            .text()
            .await
            .expect("a body");
        let value = text
            .lines()
            .find_map(|line| line.strip_prefix(series)?.trim().parse::<u32>().ok());
        value.unwrap_or_else(|| panic!("{series} in {text}"))
    };
    // Of 200 files, 64 are for other purposes, and a quarter of the rest is for scrapers.
    assert_eq!(scrape("visitas_http_connections_max ").await, 102);
    let mut wires = Vec::new();
    for connection in 0..300 {
        let address = if connection % 2 == 0 {
            service.address
        } else {
            scrapes
        };
        let mut wire = Wire::open_at(address).await;
        wire.get("/nope").await;
        wires.push(wire);
    }
    assert!(scrape("process_open_fds ").await < 200);
    eventually("the limit is reached", SOON, async || {
        scrape("visitas_http_connections ").await == 102
    })
    .await;
    service.visit().await;
    assert!(service.logged("cannot accept connections").is_empty());
    assert_eq!(
        service
            .logged("the limit on open files is below HTTP_MAX_CONNECTIONS")
            .len(),
        1
    );
}

#[tokio::test]
async fn requests_that_reach_no_route_are_counted_by_reason_and_logged_once_a_second() {
    let service = without_stores(&[("HEADER_TIMEOUT", "300ms")]).await;
    let rejected = async |reason: &str| {
        let series = format!("visitas_http_requests_rejected_total{{reason=\"{reason}\"}}");
        service.metric(&series).await
    };
    let long = format!("GET / HTTP/1.1\r\nx: {}", "x".repeat(64 * 1024));
    let many = format!("GET / HTTP/1.1\r\n{}\r\n", "x: y\r\n".repeat(101));
    let reasons: [(&str, &[&[u8]]); 6] = [
        ("malformed", &[
            b"nonsense\r\n\r\n",
            b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
            b"GET / HTTP/2.0\r\n\r\n",
            b"GET / HTTP/1.1\r\nhost: a\r\ncontent-length: -1\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"\x15\x03\x01",
            b"PROXYTCP4\r\n\r\n",
        ]),
        ("headers_too_large", &[long.as_bytes(), many.as_bytes()]),
        ("header_timeout", &[b"G", b"GET / HTTP/1.1\r\nhost: a\r\n", b"PROXY"]),
        ("tls", &[
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
            b"\x16\x03\x03",
            b"\x16",
        ]),
        ("proxy_protocol", &[
            b"PROXY TCP4 10.0.0.1 10.0.0.2 56324 5000\r\nGET / HTTP/1.1\r\nhost: a\r\n\r\n",
            b"PROXY TCP6 ::1 ::1 56324 5000\r\n",
            b"PROXY UNKNOWN\r\n",
                b"PROXY TCP4 10.0",
            b"\r\n\r\n\0\r\nQUIT\n\x21\x11\x00\x0c\x0a\x00\x00\x01\x0a\x00\x00\x02\xdc\x04\x13\x88",
            b"\r\n\r\n\0\r\nQUIT\n\x20\x00\x00\x00GET / HTTP/1.1\r\nhost: a\r\n\r\n",
        ]),
        ("host", &[b"GET / HTTP/1.1\r\n\r\n"]),
    ];
    for (reason, _) in reasons {
        assert_eq!(rejected(reason).await, Some(0.0), "{reason}");
    }
    let mut sent = 0;
    for (reason, requests) in reasons {
        for (times, request) in (1_u32..).zip(requests) {
            let mut wire = Wire::open(&service).await;
            wire.send(request).await;
            let response = wire.rest().await;
            assert_eq!(
                response.is_empty(),
                reason == "header_timeout" || request.starts_with(b"PRI"),
                "{response}"
            );
            eventually(reason, SOON, async || {
                rejected(reason).await == Some(f64::from(times))
            })
            .await;
            sent += 1;
        }
    }
    // Clients that close before or during their headers are not counted.
    for said in ["", "GET / HT"] {
        let mut wire = Wire::open(&service).await;
        wire.send(said).await;
        wire.end_sending().await;
        wire.rest().await;
    }
    let message = "requests rejected before they reached a route";
    let logged = || -> u64 {
        let lines = service.logged(message);
        lines
            .iter()
            .map(|line| line["requests"].as_u64().expect("a count"))
            .sum()
    };
    eventually("all are logged", SOON, async || logged() == sent).await;
    for (reason, requests) in reasons {
        let lines = service.logged(message);
        let counts = lines.iter().filter_map(|line| line[reason].as_u64());
        assert_eq!(counts.sum::<u64>(), requests.len() as u64, "{reason}");
    }
    // A flood of requests is logged once a second.
    let (before, began) = (service.logged(message).len(), Instant::now());
    for _ in 0..500 {
        let mut wire = Wire::open(&service).await;
        wire.send("\r\n\r\n\0\r\nQUIT\n").await;
        wire.rest().await;
        sent += 1;
    }
    eventually("the flood is logged", SOON, async || logged() == sent).await;
    let lines = service.logged(message).len() - before;
    assert!(
        lines as u64 <= began.elapsed().as_secs() + 1,
        "{lines} lines"
    );
}

/// Covers responses to requests that hyper does not read to the end, or not at all.
#[tokio::test]
async fn client_whose_request_is_refused_can_read_the_response() {
    let service = without_stores(&[]).await;
    let filling = "x".repeat(1 << 20);
    for (request, status) in [
        (format!("nonsense\r\n\r\n{filling}"), 400),
        (format!("GET / HTTP/1.1\r\n\r\n{filling}"), 400),
        (format!("GET / HTTP/1.1\r\nx: {filling}"), 431),
        (
            format!("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 2000000\r\n\r\n{filling}"),
            405,
        ),
    ] {
        for _ in 0..10 {
            let mut wire = Wire::open(&service).await;
            wire.send(&request).await;
            let response = wire.rest().await;
            assert!(
                response.starts_with(&format!("HTTP/1.1 {status} ")),
                "{response}"
            );
        }
    }
}

/// Sends a request that is refused with this status, or without a response if `status` is empty, and
/// expects that other clients are still served.
async fn assert_refused(service: &Service, request: &str, status: &str) {
    let mut wire = Wire::open(service).await;
    wire.send(request).await;
    let response = wire.rest().await;
    assert!(
        response.starts_with(status),
        "{response:?} to {request:.200}"
    );
    assert_eq!(response.is_empty(), status.is_empty(), "{response:?}");
    Wire::open(service).await.get("/health/live").await;
}

/// Expects an age of at least the limit, and at most a second more.
fn assert_about(age: Duration, limit: Duration) {
    assert!(
        limit <= age && age < limit + Duration::from_secs(1),
        "{age:?}"
    );
}

/// Waits until the metrics show this many open connections, and this limit.
async fn until_connections(service: &Service, open: u32, max: u32) {
    let what = format!("{open} of {max} connections are open");
    eventually(&what, SOON, async || {
        service.metric("visitas_http_connections").await == Some(open.into())
            && service.metric("visitas_http_connections_max").await == Some(max.into())
    })
    .await;
}
