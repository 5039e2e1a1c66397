//! What anonymous requests can make the service keep: samples of metrics, and spans that wait for a
//! collector.

use std::collections::BTreeSet;

use crate::support::collector::{Behaviour, Collector};
use crate::support::traces::{PARENT, traced, traced_with};
use crate::support::{HeldCount, SOON, Service, Wire, World, eventually};

/// Prometheus drops a target that has more samples than its `sample_limit`.
const SAMPLES: usize = 2000;

const METHODS: [&str; 13] = [
    "GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "CONNECT", "BREW", "get",
    "M-SEARCH", "PROPFIND",
];

/// Targets of every route, existing or planned, and of no route.
const TARGETS: [&str; 21] = [
    "/",
    "/?a=b",
    "//",
    "/health",
    "/health/ready",
    "/health/live",
    "/health/live/",
    "/metrics",
    "/visitas",
    "/visitas?lang=pt",
    "/visitas/stream",
    "/assets/app.js",
    "/favicon.ico",
    "/robots.txt",
    "/openapi.json",
    "/docs",
    "/nothing",
    "/%00",
    "*",
    "http://test/",
    "test:80",
];

const BODIES: [&str; 4] = [
    "\r\n",
    "content-length: 1\r\n\r\nx",
    "content-length: 100000\r\n\r\n",
    "transfer-encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n",
];

#[tokio::test(flavor = "multi_thread")]
#[ignore = "floods: make faults"]
async fn requests_of_every_kind_make_fewer_samples_than_the_sample_limit() {
    let world = World::of_its_own();
    let service = world.serve().await;
    ask_for_everything(&service).await;
    let mut count = HeldCount::of(&world).await;
    for version in ["1.0", "1.1"] {
        let mut leaving = Wire::open(&service).await;
        leaving.send(request("GET", "/", version, BODIES[0])).await;
        count.until_waited_for().await;
        leaving.reset();
    }
    drop(count);
    world.postgres.kill().unwrap();
    service.until_health("unavailable").await;
    ask_for_everything(&service).await;
    world.redis.kill().unwrap();
    ask_for_everything(&service).await;

    let exposition = service.get("/metrics").await.body;
    let count = samples(&exposition).len();
    println!("{count} samples");
    assert!(count < SAMPLES, "{count}");
    // The same requests again add no series.
    ask_for_everything(&service).await;
    let again = service.get("/metrics").await.body;
    assert_eq!(series_of_requests(&again), series_of_requests(&exposition));

    let methods = labels(&again, "http_request_method");
    assert_eq!(methods, ["GET", "HEAD", "_OTHER"].map(str::to_owned).into());
    for refused in ["404", "405"] {
        let label = format!("http_response_status_code=\"{refused}\"");
        let counts: Vec<_> = again
            .lines()
            .filter(|line| line.starts_with("http_server_request_duration_seconds_count"))
            .filter(|line| line.contains(&label))
            .collect();
        let [series] = counts[..] else {
            panic!("{counts:?}");
        };
        assert!(
            series.contains("http_request_method=\"_OTHER\""),
            "{series}"
        );
        assert!(
            series.contains("network_protocol_version=\"1.1\""),
            "{series}"
        );
        assert!(!series.contains("http_route"), "{series}");
    }
}

/// The samples that no other test bounds, and the sum of all bounds as in SECURITY.md.
#[tokio::test(flavor = "multi_thread")]
async fn samples_other_than_requests_and_store_calls_are_at_most_130() {
    let world = World::new();
    let service = world.serve().await;
    for (method, target) in [("HEAD", "/"), ("POST", "/")] {
        let mut wire = Wire::open(&service).await;
        wire.send(request(method, target, "1.1", BODIES[0])).await;
        wire.beginning().await;
    }
    let exposition = service.get("/metrics").await.body;
    let (mut others, mut outcomes) = (0, 0);
    for sample in samples(&exposition) {
        if sample.starts_with("visitas_store_calls_total{") {
            outcomes += 1;
        } else if !sample.starts_with("http_server_request_duration_seconds_")
            && !sample.starts_with("db_client_operation_duration_seconds_")
        {
            others += 1;
        }
    }
    assert!(others <= 130, "{others}");
    let operations = outcomes / 4;
    assert!(operations <= 10, "{operations}");
    let security = include_str!("../../SECURITY.md");
    let (_, table) = security.split_once("| samples at most | |").unwrap();
    let (table, _) = table.split_once("\n\n").unwrap();
    let bound = |row: &str| -> Option<usize> {
        let number = row.rsplit('|').nth(1)?.trim().replace(' ', "");
        number.parse().ok()
    };
    let bounds: Vec<_> = table.lines().filter_map(bound).collect();
    assert_eq!(bounds, [1160, 320, 10 * 36, 130]);
    assert!(bounds.iter().sum::<usize>() < SAMPLES, "{bounds:?}");
}

/// Of 4000 requests of 30 KB, 2560 wait for the collector; without truncation they would take 80 MiB.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "floods: make faults"]
async fn spans_waiting_for_a_silent_collector_take_little_memory() {
    let (world, collector) = (World::new(), Collector::start().await);
    let service = traced(&world, &collector).await;
    // Memory that the first requests allocate is used again by later ones.
    send_long_requests(&service, 50).await;
    eventually("the spans are exported", SOON, async || {
        collector.spans().len() >= 50 * CLIENTS
    })
    .await;
    collector.change_to(Behaviour::Silent).await;
    let before = memory(&service).await;
    send_long_requests(&service, 500).await;
    let dropped = service
        .metric("otel_sdk_processor_span_processed_total{otel_component_name=\"batching_span_processor/0\",otel_component_type=\"batching_span_processor\",error_type=\"queue_full\"}")
        .await;
    assert!(dropped > Some(0.0), "the queue is full");
    let grown = (memory(&service).await - before) / f64::from(1 << 20);
    println!("{grown} MiB");
    assert!(grown < 32.0, "{grown} MiB");
}

#[tokio::test(flavor = "multi_thread")]
async fn log_line_of_a_long_request_is_short() {
    let (world, collector) = (World::new(), Collector::start().await);
    let service = traced_with(&world, &collector, &[("RUST_LOG", "debug")]).await;
    send_long_requests(&service, 2).await;
    service.stop().await;
    let lines = service.printed();
    assert!(lines.contains("\"message\":\"request\""), "{lines}");
    let longest = lines.lines().map(str::len).max();
    assert!(longest < Some(2000), "{longest:?}");
    // Longer than an id, which can contain a few of these letters in a row.
    assert!(!lines.contains(&"a".repeat(33)), "{lines}");
}

// --- wiring ---

fn request(method: &str, target: &str, version: &str, body: &str) -> String {
    format!("{method} {target} HTTP/{version}\r\nhost: test\r\nconnection: close\r\n{body}")
}

/// Sends every method for every target, in both versions, with every body.
async fn ask_for_everything(service: &Service) {
    for method in METHODS {
        for target in TARGETS {
            for version in ["1.0", "1.1"] {
                for body in BODIES {
                    let mut wire = Wire::open(service).await;
                    wire.send(request(method, target, version, body)).await;
                    // The service can linger before it closes the connection.
                    wire.beginning().await;
                }
            }
        }
    }
}

fn samples(exposition: &str) -> Vec<&str> {
    let is_sample = |line: &&str| !line.is_empty() && !line.starts_with('#');
    exposition.lines().filter(is_sample).collect()
}

/// The series of requests without their values. Series of stores can appear at any time.
fn series_of_requests(exposition: &str) -> BTreeSet<&str> {
    samples(exposition)
        .into_iter()
        .filter(|sample| sample.starts_with("http_server_"))
        .filter_map(|sample| Some(sample.rsplit_once(' ')?.0))
        .collect()
}

/// The values of a label.
fn labels(exposition: &str, label: &str) -> BTreeSet<String> {
    let value = |line: &str| {
        let (_, rest) = line.split_once(&format!("{label}=\""))?;
        Some(rest.split_once('"')?.0.to_owned())
    };
    exposition.lines().filter_map(value).collect()
}

const CLIENTS: usize = 8;

/// Makes this many requests from each client, each with a path and a user agent of 15 KB (the path in
/// characters of four bytes) and a `tracestate` with more members than are kept.
async fn send_long_requests(service: &Service, requests: usize) {
    let (path, agent) = ("\u{1f600}".repeat(3750), "a".repeat(15_000));
    let state = (0..50).map(|number| format!("key{number:02}=012345678"));
    let state = state.collect::<Vec<_>>().join(",");
    let request = format!(
        "GET /{path} HTTP/1.1\r\nhost: test\r\nuser-agent: {agent}\r\n\
         traceparent: {PARENT}\r\ntracestate: {state}\r\n\r\n"
    );
    let mut clients = Vec::new();
    for _ in 0..CLIENTS {
        clients.push(Wire::open(service).await);
    }
    for _ in 0..requests {
        for client in &mut clients {
            client.send(&request).await;
        }
        for client in &mut clients {
            client.response_within(SOON).await.expect("a response");
        }
    }
}

async fn memory(service: &Service) -> f64 {
    let resident = service.metric("process_resident_memory_bytes").await;
    resident.expect("the process's memory")
}
