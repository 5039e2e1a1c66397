//! Late traces: those of requests that were not sampled, and turned out slow or failed.

use std::time::{Duration, SystemTime};

use lab::metrics::whole;
use opentelemetry_proto::tonic::trace::v1::Status;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use opentelemetry_proto::tonic::trace::v1::status::StatusCode as SpanStatus;
use reqwest::StatusCode;

use crate::support::collector::{Collector, ExportedSpan, hex, named};
use crate::support::load::Load;
use crate::support::traces::{PARENT, UNSAMPLED, ask, spans, traced_with};
use crate::support::{
    HeldCount, PATIENT, Response, SOON, Service, Wire, World, eventually, without_stores,
};

/// No request is sampled, and a visit is slow after 50 ms. It may take long on a busy machine.
const LATE: [(&str, &str); 6] = [
    ("OTEL_TRACES_SAMPLER", "parentbased_traceidratio"),
    ("OTEL_TRACES_SAMPLER_ARG", "0"),
    ("ACCESS_SLOW", "50ms"),
    PATIENT[0],
    PATIENT[1],
    PATIENT[2],
];
/// How long a visit is held that must be slow: longer than `ACCESS_SLOW`, and less than twice as long.
const HELD: Duration = Duration::from_millis(75);

#[tokio::test(flavor = "multi_thread")]
async fn slow_visit_that_was_not_sampled_has_a_trace_with_its_times() {
    let (world, collector) = (World::new(), Collector::start().await);
    let service = traced_with(&world, &collector, &LATE).await;
    let response = held_visit(&world, &service).await;
    let after = nanoseconds(SystemTime::now());
    let spans = collector.trace_of(&response, 4).await;
    assert_eq!(spans.len(), 4);
    let server = named(&spans, "GET /");
    assert_eq!(server.span.kind(), SpanKind::Server);
    assert_eq!(hex(&server.span.parent_span_id), "");
    assert_eq!(
        hex(&server.span.span_id),
        response.header("traceresponse")[36..52]
    );
    assert_eq!(server.integer("http.response.status_code"), Some(200));
    assert_eq!(status(server), SpanStatus::Unset);
    let held = u64::try_from(HELD.as_nanos()).unwrap();
    let (began, ended) = times(server);
    assert!(began + held <= ended && ended <= after);
    let parts = ["queue", "postgres", "redis"].map(|part| named(&spans, part));
    let mut began = began;
    for part in parts {
        assert_eq!(part.span.kind(), SpanKind::Internal);
        assert_eq!(part.span.parent_span_id, server.span.span_id);
        assert!(began <= times(part).0, "one after another");
        began = times(part).1;
    }
    assert!(began <= ended);
    let (began, ended) = times(parts[1]);
    assert!(ended - began >= held, "Postgres held it");
}

#[tokio::test(flavor = "multi_thread")]
async fn failed_visit_that_was_not_sampled_has_a_trace() {
    let (world, collector) = (World::new(), Collector::start().await);
    let service = traced_with(&world, &collector, &never_slow()).await;
    let _count = HeldCount::of(&world).await;
    let response = service.get("/").await;
    assert_eq!(response.status, StatusCode::SERVICE_UNAVAILABLE);
    let spans = collector.trace_of(&response, 1).await;
    let server = named(&spans, "GET /");
    assert_eq!(server.integer("http.response.status_code"), Some(503));
    assert_eq!(server.text("error.type"), Some("503"));
    assert_eq!(status(server), SpanStatus::Error);
}

#[tokio::test(flavor = "multi_thread")]
async fn late_server_span_has_the_attributes_of_a_sampled_one() {
    let (world, collector) = (World::new(), Collector::start().await);
    let service = traced_with(&world, &collector, &never_slow()).await;
    let _count = HeldCount::of(&world).await;
    let mut servers = Vec::new();
    for (parent, spans) in [(PARENT, 2), (UNSAMPLED, 1)] {
        let headers = [("user-agent", "curl/8"), ("traceparent", parent)];
        let response = ask(&service, "/?secret=1", &headers).await;
        let trace = collector.trace_of(&response, spans).await;
        servers.push(named(&trace, "GET /").clone());
    }
    let (sampled, late) = (&servers[0], &servers[1]);
    assert_eq!(late.keys(), sampled.keys());
    for key in sampled.keys() {
        let is_id = key == "visitas.request.id";
        assert!(is_id || late.text(key) == sampled.text(key), "{key}");
    }
    assert_eq!(late.span.flags, sampled.span.flags);
    assert_eq!(late.span.kind, sampled.span.kind);
    assert_eq!(late.schema_url, sampled.schema_url);
    assert_eq!(late.resource, sampled.resource);
}

#[tokio::test(flavor = "multi_thread")]
async fn caller_that_is_not_sampled_is_the_parent_of_a_late_trace() {
    let (world, collector) = (World::new(), Collector::start().await);
    let service = traced_with(&world, &collector, &LATE).await;
    let mut count = HeldCount::of(&world).await;
    let slow = service.client.get(service.url("/"));
    let slow = tokio::spawn(slow.header("traceparent", UNSAMPLED).send());
    count.until_waited_for().await;
    tokio::time::sleep(HELD).await;
    count.release().await;
    assert_eq!(slow.await.unwrap().unwrap().status(), StatusCode::OK);
    let spans = collector.trace(&UNSAMPLED[3..35], 4).await;
    let server = named(&spans, "GET /");
    assert_eq!(hex(&server.span.parent_span_id), UNSAMPLED[36..52]);
}

#[tokio::test(flavor = "multi_thread")]
async fn late_trace_is_named_by_the_access_line_and_the_exemplar() {
    let (world, collector) = (World::new(), Collector::start().await);
    let service = traced_with(&world, &collector, &LATE).await;
    // The probes of a slow start can have used up the lines of this second.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let response = held_visit(&world, &service).await;
    let header = response.header("traceresponse").to_owned();
    let (trace, span) = (&header[3..35], &header[36..52]);
    eventually("the access line names it", SOON, async || {
        let lines = service.logged("request");
        lines
            .iter()
            .any(|line| line["trace_id"] == trace && line["span_id"] == span)
    })
    .await;
    let accept = "application/openmetrics-text; version=1.0.0";
    let metrics = ask(&service, "/metrics", &[("accept", accept)]).await.body;
    assert!(
        metrics.contains(&format!("trace_id=\"{trace}\"")),
        "{metrics}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn fast_visit_that_was_not_sampled_has_no_trace() {
    let (world, collector) = (World::new(), Collector::start().await);
    let service = traced_with(&world, &collector, &never_slow()).await;
    for _ in 0..100 {
        assert_eq!(service.get("/").await.header("traceresponse"), "");
    }
    assert_eq!(spans(&service, "processor", "").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_visit_has_no_trace_where_the_sampler_is_always_off() {
    let (world, collector) = (World::new(), Collector::start().await);
    for off in ["always_off", "parentbased_always_off"] {
        let settings = [("OTEL_TRACES_SAMPLER", off), ("ACCESS_SLOW", "0s")];
        let service = traced_with(&world, &collector, &settings).await;
        assert_eq!(service.get("/").await.header("traceresponse"), "");
        assert_eq!(spans(&service, "processor", "").await, 0, "{off}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_probe_has_no_trace() {
    let (world, collector) = (World::new(), Collector::start().await);
    let settings = [LATE[0], LATE[1], ("ACCESS_SLOW", "0s")];
    let service = traced_with(&world, &collector, &settings).await;
    for path in ["/health", "/metrics", "/robots.txt"] {
        let response = service.get(path).await;
        assert_eq!(response.header("traceresponse"), "", "{path}");
    }
    collector.trace_of(&service.get("/").await, 4).await;
    assert_eq!(collector.spans().len(), 4, "only those of the visit");
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_visit_whose_client_disconnects_has_a_trace_without_a_status() {
    let (world, collector) = (World::new(), Collector::start().await);
    let service = traced_with(&world, &collector, &LATE).await;
    let mut count = HeldCount::of(&world).await;
    let mut leaving = Wire::open(&service).await;
    leaving.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
    count.until_waited_for().await;
    tokio::time::sleep(HELD).await;
    leaving.reset();
    eventually("the span is exported", SOON, async || {
        collector.spans().len() == 1
    })
    .await;
    let spans = collector.spans();
    let server = named(&spans, "GET /");
    assert_eq!(server.integer("http.response.status_code"), None);
    assert_eq!(status(server), SpanStatus::Unset);
    count.release().await;
}

/// A lock delays all visits in bursts while clients go on visiting, with one visit in a hundred
/// sampled. So few clients fail less often than late traces are limited to. `LATE=whole`: 10 000 slow
/// visits among a million, without a failure (`make late`).
#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes long: make faults"]
async fn every_slow_or_failed_visit_among_many_is_found_at_the_collector() {
    const SLOW: Duration = Duration::from_millis(600);
    // Longer than DB_TIMEOUT, so that visits fail.
    const FAILS: Duration = Duration::from_millis(1500);
    let is_whole = is_whole();
    let (clients, bursts, last) = if is_whole {
        (256, 45, SLOW)
    } else {
        (16, 4, FAILS)
    };
    let (min_visits, min_slow) = if is_whole {
        (1_000_000, 10_000)
    } else {
        (0, 4 * 8)
    };
    let (world, collector) = (World::new(), Collector::start().await);
    let settings = [
        LATE[0],
        ("OTEL_TRACES_SAMPLER_ARG", "0.01"),
        ("ACCESS_SLOW", "500ms"),
    ];
    let service = traced_with(&world, &collector, &settings).await;
    let load = Load::start(&[&service], clients);
    let mut held = 0;
    let mut durations = Durations::read(&service).await;
    while held < bursts || durations.all < min_visits {
        tokio::time::sleep(Duration::from_secs(1)).await;
        if held < bursts {
            hold(&world, SLOW).await;
            held += 1;
        }
        durations = Durations::read(&service).await;
    }
    hold(&world, last).await;
    let visits = load.stop().await;
    let Durations { slow, failed, .. } = Durations::read(&service).await;
    assert!(slow >= min_slow, "{slow} of {}", visits.len());
    assert_eq!(failed >= 1, !is_whole, "{failed} of {}", visits.len());
    let late = |exported: &&ExportedSpan| {
        let (began, ended) = times(exported);
        let code = exported.integer("http.response.status_code");
        exported.span.name == "GET /" && (code == Some(503) || ended - began > 500_000_000)
    };
    let mut found = 0_u64;
    eventually("all of them are at the collector", SOON, async || {
        found = collector.spans().iter().filter(late).count() as u64;
        found >= slow + failed
    })
    .await;
    let of = visits.len();
    assert_eq!(found, slow + failed, "of {of} visits");
    println!("{found} traces of {slow} slow and {failed} failed visits, of {of}");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "floods: make faults"]
async fn late_traces_are_limited_and_the_log_counts_the_others() {
    let collector = Collector::start().await;
    let endpoint = collector.endpoint();
    let endpoint = ("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.as_str());
    let service = without_stores(&[endpoint, LATE[0], LATE[1]]).await;
    let load = Load::start(&[&service], 256);
    let message = "slow or failed requests without a trace";
    eventually("the limit is reached", SOON, async || {
        !service.logged(message).is_empty()
    })
    .await;
    let visits = load.stop().await.len() as u64;
    let exported = spans(&service, "processor", "").await;
    let full = spans(&service, "processor", "queue_full").await;
    service.stop().await;
    let lines = service.logged(message);
    let suppressed: u64 = lines
        .iter()
        .map(|line| line["traces.suppressed"].as_u64().unwrap())
        .sum();
    assert_eq!(exported + full + suppressed, visits);
}

/// The settings of [`LATE`] for a service in which no visit is slow.
fn never_slow() -> [(&'static str, &'static str); 3] {
    [LATE[0], LATE[1], ("ACCESS_SLOW", "1h")]
}

/// The visits so far, by the histogram of request durations.
struct Durations {
    all: u64,
    /// Recorded, in more than half a second.
    slow: u64,
    failed: u64,
}

impl Durations {
    async fn read(service: &Service) -> Self {
        let metrics = service.metrics().await;
        let sum = |start: &str, bound: &str| -> u64 {
            let series = metrics.series(start);
            let wanted =
                series.filter(|(name, _)| name.contains("route=\"/\"") && name.contains(bound));
            wanted.map(|(_, value)| whole(value).unwrap()).sum()
        };
        let recorded = sum("http_server_request_duration_seconds_count", "\"200\"");
        let fast = sum(
            "http_server_request_duration_seconds_bucket",
            "code=\"200\",le=\"0.5\"",
        );
        let failed = sum("http_server_request_duration_seconds_count", "\"503\"");
        Self {
            all: recorded + failed,
            slow: recorded - fast,
            failed,
        }
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "the person who runs the test chooses how many visits are made"
)]
fn is_whole() -> bool {
    std::env::var("LATE").is_ok_and(|late| late == "whole")
}

/// Holds the count for so long.
async fn hold(world: &World, held: Duration) {
    let count = HeldCount::of(world).await;
    tokio::time::sleep(held).await;
    count.release().await;
}

/// Makes a visit that takes at least [`HELD`] in Postgres.
async fn held_visit(world: &World, service: &Service) -> Response {
    let mut count = HeldCount::of(world).await;
    let visit = service.begin_visit();
    count.until_waited_for().await;
    tokio::time::sleep(HELD).await;
    count.release().await;
    let response = visit.await.unwrap();
    assert_eq!(response.status, StatusCode::OK, "{}", response.body);
    response
}

fn times(exported: &ExportedSpan) -> (u64, u64) {
    let span = &exported.span;
    (span.start_time_unix_nano, span.end_time_unix_nano)
}

fn status(exported: &ExportedSpan) -> SpanStatus {
    let status = exported.span.status.as_ref();
    status.map_or(SpanStatus::Unset, Status::code)
}

fn nanoseconds(moment: SystemTime) -> u64 {
    let since = moment.duration_since(SystemTime::UNIX_EPOCH).unwrap();
    u64::try_from(since.as_nanos()).unwrap()
}
