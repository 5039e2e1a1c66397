//! A log whose reader stalls or leaves: it delays no response and no stop.

use std::time::{Duration, Instant};

use crate::support::load::Load;
use crate::support::{Reader, SOON, Service, Wire, World, eventually, program, settings};

#[tokio::test(flavor = "multi_thread")]
#[ignore = "floods: make faults"]
async fn full_pipe_delays_no_response_and_no_stop() {
    let world = World::of_its_own();
    let service = verbose(&world, Reader::Stalls, &[]).await;
    let load = Load::start(&[&service], 64);
    until_lines_are_dropped(&service, 1.0).await;
    world.postgres.kill().unwrap();
    service.until_health("unavailable").await;
    let before = lines_dropped(&service).await;
    until_lines_are_dropped(&service, before + 10.0).await;

    let stopped = Instant::now();
    service.signal("TERM");
    let visits = load.stop().await;
    assert!(service.ended(SOON).await.success());
    let took = stopped.elapsed();
    assert!(took < Duration::from_secs(4), "{took:?}");
    for visit in &visits {
        let is_response = matches!(visit.status, 200 | 503);
        assert!(is_response || visit.answered() > stopped, "{visit:?}");
        assert!(visit.took < Duration::from_secs(2), "{visit:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "reads a clock: make faults"]
async fn stop_is_in_time_while_log_collector_and_client_all_stall() {
    let world = World::of_its_own();
    let silent = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let endpoint = format!("http://{}", silent.local_addr().unwrap());
    let limit = Duration::from_secs(4);
    let more = [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.as_str()),
        ("SHUTDOWN_TIMEOUT", "4s"),
        ("HEADER_TIMEOUT", "1m"),
    ];
    let service = verbose(&world, Reader::Stalls, &more).await;
    let load = Load::start(&[&service], 16);
    until_lines_are_dropped(&service, 1.0).await;
    load.stop().await;
    let mut half = Wire::open(&service).await;
    half.send("GET / HTTP/1.1\r\nhost:").await;
    eventually("the connection is open", SOON, async || {
        service.metric("visitas_http_connections").await >= Some(2.0)
    })
    .await;
    let stopped = Instant::now();
    service.signal("TERM");
    let status = service.ended(SOON).await;
    let took = stopped.elapsed();
    assert!(status.success(), "{status}");
    assert!(took < limit, "{took:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn closed_pipe_stops_nothing_and_dropped_lines_are_counted() {
    let world = World::new();
    let service = verbose(&world, Reader::Leaves, &[]).await;
    until_lines_are_dropped(&service, 1.0).await;
    service.visit().await;
    service.stop().await;
    assert_eq!(service.printed().matches("panicked").count(), 0);
}

/// A service that logs every request.
async fn verbose(world: &World, reader: Reader, more: &[(&str, &str)]) -> Service {
    let mut all = world.settings();
    all.extend(settings(&[("RUST_LOG", "debug"), ("LOG_FORMAT", "json")]));
    all.extend(settings(more));
    let service = Service::read_by(reader, program(&["serve"], &all)).await;
    service.until_ready().await;
    service
}

/// Waits until this many lines have been dropped. Each scrape logs a line.
async fn until_lines_are_dropped(service: &Service, lines: f64) {
    eventually("lines are dropped", 3 * SOON, async || {
        lines_dropped(service).await >= lines
    })
    .await;
}

async fn lines_dropped(service: &Service) -> f64 {
    let dropped = service.metric("visitas_log_lines_dropped_total").await;
    dropped.expect("the series is there")
}
