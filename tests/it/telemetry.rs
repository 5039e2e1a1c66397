//! What the service tells about itself: spans, metrics and the log.

use std::io::{BufRead as _, BufReader};
use std::process::Stdio;
use std::time::Duration;

use http::{HeaderMap, Method};
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use opentelemetry_proto::tonic::trace::v1::status::StatusCode as SpanStatus;
use reqwest::StatusCode;
use serde_json::Value;

use crate::support::collector::{Collector, Exported, hex, named, text};
use crate::support::{Answer, HeldCount, SOON, Service, World, eventually, program};

const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
const UNSAMPLED: &str = "00-1af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00";

// --- spans ---

#[tokio::test(flavor = "multi_thread")]
async fn lone_visit_has_a_server_span_and_both_calls_beneath_it() {
    let (world, collector) = (World::new(), Collector::start().await);
    let service = traced(&world, &collector).await;
    let spans = collector.trace_of(&service.get("/").await, 3).await;
    let server = named(&spans, "GET /");
    assert_eq!(server.span.kind(), SpanKind::Server);
    assert_eq!(hex(&server.span.parent_span_id), "");
    for call in ["SELECT registrar_visitas", "INCRBY"] {
        let call = named(&spans, call);
        assert_eq!(call.span.kind(), SpanKind::Client);
        assert_eq!(call.span.parent_span_id, server.span.span_id);
    }
    assert_eq!(spans.len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn server_span_describes_the_request_and_not_its_client() {
    let (world, collector) = (World::new(), Collector::start().await);
    let service = traced(&world, &collector).await;
    let headers = [("user-agent", "curl/8"), ("x-request-id", "abc")];
    let answer = ask(&service, "/?secret=1", &headers).await;
    let spans = collector.trace_of(&answer, 3).await;
    let server = named(&spans, "GET /");
    let texts = [
        ("http.request.method", "GET"),
        ("http.route", "/"),
        ("url.path", "/"),
        ("url.scheme", "http"),
        ("network.protocol.version", "1.1"),
        ("user_agent.original", "curl/8"),
        ("visitas.request.id", "abc"),
    ];
    for (key, value) in texts {
        assert_eq!(server.text(key), Some(value), "{key}");
    }
    assert_eq!(server.integer("http.response.status_code"), Some(200));
    assert_eq!(server.keys().len(), texts.len() + 1, "{:?}", server.keys());
    assert_eq!(status(server), SpanStatus::Unset);
}

#[tokio::test(flavor = "multi_thread")]
async fn call_spans_say_what_was_asked_of_which_store() {
    let (world, collector) = (World::new(), Collector::start().await);
    let service = traced(&world, &collector).await;
    let spans = collector.trace_of(&service.get("/").await, 3).await;
    let postgres = named(&spans, "SELECT registrar_visitas");
    let namespace = format!("{}|public", world.database);
    let texts = [
        ("db.system.name", "postgresql"),
        ("db.namespace", namespace.as_str()),
        ("db.operation.name", "SELECT"),
        ("db.query.summary", "SELECT registrar_visitas"),
        ("db.query.text", "select public.registrar_visitas($1)"),
        ("db.stored_procedure.name", "registrar_visitas"),
        ("server.address", "127.0.0.1"),
    ];
    has(postgres, &texts, world.postgres.port());
    let redis = named(&spans, "INCRBY");
    let texts = [
        ("db.system.name", "redis"),
        ("db.namespace", "0"),
        ("db.operation.name", "INCRBY"),
        ("server.address", "127.0.0.1"),
    ];
    has(redis, &texts, world.redis.port());
}

#[tokio::test(flavor = "multi_thread")]
async fn failed_call_is_an_error_in_its_span_and_in_the_servers() {
    let (world, collector) = (World::new(), Collector::start().await);
    let service = traced(&world, &collector).await;
    let _count = HeldCount::of(&world).await;
    let spans = collector.trace_of(&service.get("/").await, 2).await;
    let call = named(&spans, "SELECT registrar_visitas");
    assert_eq!(status(call), SpanStatus::Error);
    assert_eq!(call.text("db.response.status_code"), Some("55P03"));
    assert_eq!(call.text("error.type"), Some("55P03"));
    let server = named(&spans, "GET /");
    assert_eq!(status(server), SpanStatus::Error);
    assert_eq!(server.integer("http.response.status_code"), Some(503));
    assert_eq!(server.text("error.type"), Some("503"));
}

#[tokio::test(flavor = "multi_thread")]
async fn resource_names_service_version_and_instance() {
    let (world, collector) = (World::new(), Collector::start().await);
    let service = traced(&world, &collector).await;
    let spans = collector.trace_of(&service.get("/").await, 1).await;
    let resource = &spans[0].resource;
    assert_eq!(text(resource, "service.name"), Some("visitas"));
    assert_eq!(text(resource, "service.version"), Some(visitas::VERSION));
    assert_eq!(text(resource, "service.instance.id").unwrap().len(), 36);
    let schema = "https://opentelemetry.io/schemas/1.44.0";
    assert_eq!(spans[0].schema_url, schema);
}

#[tokio::test(flavor = "multi_thread")]
async fn inbound_traceparent_is_the_parent() {
    let (world, collector) = (World::new(), Collector::start().await);
    let service = traced(&world, &collector).await;
    let answer = ask(&service, "/", &[("traceparent", PARENT)]).await;
    let spans = collector.trace_of(&answer, 3).await;
    let server = named(&spans, "GET /");
    assert_eq!(hex(&server.span.trace_id), PARENT[3..35]);
    assert_eq!(hex(&server.span.parent_span_id), PARENT[36..52]);
}

#[tokio::test(flavor = "multi_thread")]
async fn unsampled_traceparent_leaves_no_span() {
    let (world, collector) = (World::new(), Collector::start().await);
    let service = traced(&world, &collector).await;
    let unsampled = ask(&service, "/", &[("traceparent", UNSAMPLED)]).await;
    assert_eq!(unsampled.header("traceresponse"), "");
    collector.trace_of(&service.get("/").await, 3).await;
    assert_eq!(collector.spans().len(), 3, "of the second visit alone");
}

#[tokio::test(flavor = "multi_thread")]
async fn probes_and_scrapes_are_not_traced() {
    let (world, collector) = (World::new(), Collector::start().await);
    let service = traced(&world, &collector).await;
    for path in ["/health", "/health/ready", "/health/live", "/metrics"] {
        ask(&service, path, &[("traceparent", PARENT)]).await;
    }
    collector.trace_of(&service.get("/").await, 3).await;
    assert_eq!(collector.spans().len(), 3, "of the visit alone");
}

#[tokio::test(flavor = "multi_thread")]
async fn unmatched_request_is_named_by_its_method_alone() {
    let (world, collector) = (World::new(), Collector::start().await);
    let service = traced(&world, &collector).await;
    let spans = collector.trace_of(&service.get("/nothing").await, 1).await;
    assert_eq!(spans[0].span.name, "GET");
    assert_eq!(spans[0].text("http.route"), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn request_with_a_method_of_its_own_is_named_http() {
    let (world, collector) = (World::new(), Collector::start().await);
    let service = traced(&world, &collector).await;
    for (path, name) in [("/", "HTTP /"), ("/nothing", "HTTP")] {
        let method = Method::from_bytes(b"BREW").unwrap();
        let answer = service.ask(method, path, HeaderMap::new()).await;
        let spans = collector.trace_of(&answer, 1).await;
        assert_eq!(spans[0].span.name, name);
        assert_eq!(spans[0].text("http.request.method"), Some("_OTHER"));
        assert_eq!(status(&spans[0]), SpanStatus::Unset);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn visits_of_one_batch_link_to_the_calls_that_recorded_them() {
    let (world, collector) = (World::new(), Collector::start().await);
    let patient = [("DB_TIMEOUT", "8s"), ("VISIT_TIMEOUT", "9s")];
    let service = traced_with(&world, &collector, &patient).await;
    let mut count = HeldCount::of(&world).await;
    let alone = service.begin_visit();
    count.until_waited_for().await;
    let mut together = Vec::new();
    for queued in 1..=3 {
        together.push(service.begin_visit());
        service.until_queued(queued).await;
    }
    count.release().await;
    alone.await.unwrap();

    let mut traces = Vec::new();
    for visit in together {
        let spans = if traces.is_empty() { 3 } else { 2 };
        let trace = collector.trace_of(&visit.await.unwrap(), spans).await;
        assert_eq!(trace.len(), spans);
        traces.push(trace);
    }
    let calls = ["SELECT registrar_visitas", "INCRBY"].map(|call| named(&traces[0], call));
    assert_eq!(calls[0].integer("visitas.batch.size"), Some(3));
    for trace in &traces[1..] {
        let wait = named(trace, "record");
        assert_eq!(wait.span.kind(), SpanKind::Internal);
        let server = named(trace, "GET /");
        assert_eq!(wait.span.parent_span_id, server.span.span_id);
        let linked: Vec<_> = wait.span.links.iter().map(|link| &link.span_id).collect();
        assert_eq!(linked, calls.map(|call| &call.span.span_id));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_sampled_without_an_endpoint() {
    let world = World::new();
    let service = world.serve().await;
    let answer = ask(&service, "/", &[("traceparent", PARENT)]).await;
    assert_eq!(answer.status, StatusCode::OK);
    assert_eq!(answer.header("traceresponse"), "");
    assert_eq!(spans(&service, "processor", "").await, 0);
    assert_eq!(spans(&service, "exporter", "").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn last_span_is_flushed_at_the_stop() {
    let (world, collector) = (World::new(), Collector::start().await);
    let late = [("OTEL_BSP_SCHEDULE_DELAY", "600000")];
    let service = traced_with(&world, &collector, &late).await;
    let answer = service.get("/").await;
    assert!(collector.spans().is_empty());
    service.stop().await;
    assert_eq!(collector.trace_of(&answer, 3).await.len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn absent_collector_fails_no_request_and_is_one_line() {
    let world = World::new();
    let settings = [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1"),
        ("OTEL_BSP_SCHEDULE_DELAY", "20"),
    ];
    let service = world.serve_with(&settings).await;
    eventually("ten exports have failed", 2 * SOON, async || {
        let before = spans(&service, "exporter", "_OTHER").await;
        service.visit().await;
        before >= 12
    })
    .await;
    let warnings: Vec<_> = service
        .log()
        .into_iter()
        .filter(|line| line["level"] != "INFO")
        .collect();
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert_eq!(warnings[0]["message"], "the collector does not take spans");
}

#[tokio::test(flavor = "multi_thread")]
async fn collector_that_refuses_is_hardly_sampled_for_until_it_takes_spans() {
    let (world, collector) = (World::new(), Collector::start().await);
    let service = traced(&world, &collector).await;
    collector.refuse(true);
    eventually("visits are hardly sampled", SOON, async || {
        let sampled = sampled(&service, 20).await;
        sampled <= 2
    })
    .await;
    let lost = spans(&service, "exporter", "_OTHER").await;
    assert!(
        lost >= 9,
        "after three exports of a visit, not {lost} spans"
    );
    collector.refuse(false);
    eventually("all visits are sampled", SOON, async || {
        sampled(&service, 20).await == 20
    })
    .await;
    eventually("its return is logged", SOON, async || {
        service.logged("the collector takes spans again").len() == 1
    })
    .await;
    let down = service.logged("the collector does not take spans");
    assert_eq!(down.len(), 1);
    let up = &service.logged("the collector takes spans again")[0];
    assert!(up["down.seconds"].as_f64().unwrap() > 0.0);
    assert!(up["spans.lost"].as_u64().unwrap() >= lost);
}

// --- metrics ---

#[tokio::test(flavor = "multi_thread")]
async fn every_metric_exists_from_the_first_scrape() {
    let world = World::of_its_own();
    world.postgres.kill().unwrap();
    world.redis.kill().unwrap();
    let service = world.start(&[]).await;
    let text = service.get("/metrics").await.body;
    let missing: Vec<_> = METRICS
        .iter()
        .flat_map(|(kind, names)| names.split_whitespace().map(move |name| (kind, name)))
        .filter(|(kind, name)| !is_exported(&text, kind, name))
        .collect();
    assert!(missing.is_empty(), "{missing:?} in {text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn series_that_can_be_known_beforehand_exist_at_zero() {
    let world = World::of_its_own();
    world.postgres.kill().unwrap();
    world.redis.kill().unwrap();
    let service = world.start(&[]).await;
    let text = service.get("/metrics").await.body;
    for outcome in ["ok", "degraded", "failed", "shed", "in_doubt", "abandoned"] {
        let series = format!("visitas_visits_total{{outcome=\"{outcome}\"}} 0\n");
        assert!(text.contains(&series), "{series}");
    }
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
async fn histograms_have_the_buckets_that_are_promised() {
    let world = World::new();
    let service = world.serve().await;
    service.visit().await;
    let text = service.get("/metrics").await.body;
    let stores = "0.0005 0.001 0.0025 0.005 0.01 0.025 0.05 0.1 0.25 0.5 1 2.5 5 +Inf";
    let http =
        "0.0005 0.001 0.0025 0.005 0.01 0.025 0.05 0.075 0.1 0.25 0.5 0.75 1 2.5 5 7.5 10 +Inf";
    let batch = "1 2 4 8 16 32 64 128 256 512 1024 2048 4096 +Inf";
    for (name, expected) in [
        ("http_server_request_duration_seconds", http),
        ("db_client_operation_duration_seconds", stores),
        ("db_client_connection_wait_time_seconds", stores),
        ("visitas_queue_wait_seconds", stores),
        ("visitas_batch_size", batch),
    ] {
        assert_eq!(buckets(&text, name), expected, "{name}");
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
async fn refused_call_has_the_stores_code() {
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

// --- the log ---

#[tokio::test(flavor = "multi_thread")]
async fn access_line_has_the_ids_of_its_request() {
    let (world, collector) = (World::new(), Collector::start().await);
    let debug = [("RUST_LOG", "info,access=debug")];
    let service = traced_with(&world, &collector, &debug).await;
    let answer = ask(&service, "/", &[("x-request-id", "sampled")]).await;
    let line = access_line(&service, "sampled").await;
    let trace = answer.header("traceresponse");
    assert_eq!(line["level"], "DEBUG");
    assert_eq!(line["trace_id"], trace[3..35]);
    assert_eq!(line["span_id"], trace[36..52]);
    assert_eq!(line["http.response.status_code"], 200);
    assert_eq!(line["http.route"], "/");
    assert!(line["duration.seconds"].as_f64().unwrap() > 0.0);

    let headers = [("x-request-id", "unsampled"), ("traceparent", UNSAMPLED)];
    ask(&service, "/", &headers).await;
    let line = access_line(&service, "unsampled").await;
    assert_eq!(line["trace_id"], UNSAMPLED[3..35]);
    assert_eq!(line["span_id"], Value::Null);
}

#[tokio::test(flavor = "multi_thread")]
async fn ordinary_request_has_no_line_at_info() {
    let world = World::of_its_own();
    let service = world.serve().await;
    ask(&service, "/", &[("x-request-id", "ordinary")]).await;
    world.postgres.kill().unwrap();
    service.until_health("unavailable").await;
    ask(&service, "/", &[("x-request-id", "failed")]).await;
    eventually("a failure has a line", SOON, async || {
        let lines = service.logged("request");
        lines.iter().any(|line| line["http.route"] == "/")
    })
    .await;
    let lines = service.logged("request");
    assert!(lines.iter().all(|line| line["level"] == "INFO"));
    assert!(lines.iter().all(|line| line["request_id"] != "ordinary"));
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_request_has_a_line_at_info() {
    let world = World::new();
    let service = world
        .serve_with(&[("ACCESS_SLOW", "1s"), ("DB_TIMEOUT", "2s")])
        .await;
    let mut count = HeldCount::of(&world).await;
    let slow = service.begin_visit();
    count.until_waited_for().await;
    tokio::time::sleep(Duration::from_millis(1100)).await;
    count.release().await;
    assert_eq!(slow.await.unwrap().status, StatusCode::OK);
    eventually("it has a line", SOON, async || {
        let lines = service.logged("request");
        lines
            .iter()
            .any(|line| line["level"] == "INFO" && line["http.response.status_code"] == 200)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn failing_requests_have_at_most_ten_lines_a_second_and_the_rest_is_counted() {
    let world = World::of_its_own();
    let service = world.serve().await;
    world.postgres.kill().unwrap();
    service.until_health("unavailable").await;
    let (mut failed, mut told_of) = (0, 0);
    // The next line that is written counts those left out before it.
    eventually("all failures are told of", SOON, async || {
        service.get("/").await;
        failed = failures(&service).await;
        told_of = service.logged("request").len() as u64 + left_out(&service);
        failed > 100 && told_of == failed
    })
    .await;
    let lines = service.logged("request");
    let second = |line: &Value| line["timestamp"].as_str().unwrap()[..19].to_owned();
    for line in &lines {
        let same = lines.iter().filter(|other| second(other) == second(line));
        assert!(
            same.count() <= 2 * 10,
            "a second of ours begins at any moment"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pretty_log_is_for_people() {
    let world = World::new();
    let mut settings = world.settings();
    settings.push(("LOG_FORMAT".to_owned(), "pretty".to_owned()));
    settings.push(("BIND_ADDR".to_owned(), "127.0.0.1:0".to_owned()));
    let mut command = program(&["serve"], &settings);
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let output = BufReader::new(child.stdout.take().unwrap());
    let line = output.lines().map_while(Result::ok).next();
    child.kill().unwrap();
    child.wait().unwrap();
    let line = line.expect("a line");
    assert!(line.contains("INFO listening address="), "{line}");
    assert!(
        !line.contains('\u{1b}'),
        "no colours where nobody sees them"
    );
}

// --- wiring ---

/// Every metric of the service, by its type.
const METRICS: [(&str, &str); 3] = [
    (
        "histogram",
        "http_server_request_duration_seconds db_client_operation_duration_seconds \
         visitas_queue_wait_seconds visitas_batch_size db_client_connection_wait_time_seconds",
    ),
    (
        "gauge",
        "http_server_active_requests visitas_http_connections visitas_http_connections_max \
         visitas_queue_depth visitas_queue_capacity visitas_rows visitas_redis_visits \
         visitas_store_drift visitas_dependency_up db_client_connection_count \
         db_client_connection_max db_client_connection_pending_requests visitas_build_info \
         process_open_fds process_max_fds process_resident_memory_bytes \
         process_virtual_memory_bytes process_start_time_seconds process_threads \
         tokio_workers tokio_alive_tasks tokio_global_queue_depth",
    ),
    (
        "counter",
        "visitas_store_calls_total visitas_visits_total db_client_connection_timeouts_total \
         otel_sdk_exporter_span_exported_total otel_sdk_processor_span_processed_total \
         visitas_log_lines_dropped_total process_cpu_seconds_total tokio_busy_seconds_total",
    ),
];

/// Whether a metric has its type, a help text and a sample.
fn is_exported(text: &str, kind: &str, name: &str) -> bool {
    let sample = if kind == "histogram" {
        format!("{name}_count")
    } else {
        name.to_owned()
    };
    let has = |start: &str| text.lines().any(|line| line.starts_with(start));
    has(&format!("# HELP {name} "))
        && has(&format!("# TYPE {name} {kind}"))
        && (has(&format!("{sample} ")) || has(&format!("{sample}{{")))
}

/// The upper bounds of a histogram's first series.
fn buckets(text: &str, name: &str) -> String {
    let start = format!("{name}_bucket{{");
    let bound = |line: &str| {
        let (_, rest) = line.split_once("le=\"")?;
        rest.split_once('"').map(|(bound, _)| bound.to_owned())
    };
    let mut bounds: Vec<String> = Vec::new();
    for line in text.lines().filter(|line| line.starts_with(&start)) {
        bounds.extend(bound(line));
        if bounds.last().is_some_and(|bound| bound == "+Inf") {
            break;
        }
    }
    bounds.join(" ")
}

/// The series of a store's calls.
fn calls(store: &str, operation: &str, outcome: &str) -> String {
    format!(
        "visitas_store_calls_total{{db_system_name=\"{store}\",\
         db_operation_name=\"{operation}\",outcome=\"{outcome}\"}}"
    )
}

/// How many spans the exporter or the processor has counted, those with an error or those without.
async fn spans(service: &Service, component: &str, error: &str) -> u64 {
    let text = service.get("/metrics").await.body;
    let line = text
        .lines()
        .filter(|line| line.starts_with(&format!("otel_sdk_{component}_span_")))
        .find(|line| match error {
            "" => !line.contains("error_type"),
            error => line.contains(&format!("error_type=\"{error}\"")),
        })
        .expect("the series is there");
    let (_, count) = line.rsplit_once(' ').expect("a value");
    count.parse().expect("a number")
}

/// How many of so many visits are sampled.
async fn sampled(service: &Service, visits: u32) -> u32 {
    let mut sampled = 0;
    for _ in 0..visits {
        let answer = service.get("/").await;
        assert_eq!(answer.status, StatusCode::OK);
        sampled += u32::from(!answer.header("traceresponse").is_empty());
    }
    sampled
}

/// A service whose spans go to the collector at once.
async fn traced(world: &World, collector: &Collector) -> Service {
    traced_with(world, collector, &[]).await
}

async fn traced_with(world: &World, collector: &Collector, settings: &[(&str, &str)]) -> Service {
    let endpoint = collector.endpoint();
    let mut all = vec![
        ("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.as_str()),
        ("OTEL_BSP_SCHEDULE_DELAY", "20"),
    ];
    all.extend(settings);
    world.serve_with(&all).await
}

async fn ask(service: &Service, path: &str, headers: &[(&'static str, &str)]) -> Answer {
    let headers = headers
        .iter()
        .map(|&(name, value)| {
            let value = value.parse().expect("a header's value");
            (http::HeaderName::from_static(name), value)
        })
        .collect();
    service.ask(Method::GET, path, headers).await
}

fn status(exported: &Exported) -> SpanStatus {
    exported.span.status.clone().unwrap_or_default().code()
}

/// Whether a call's span has these attributes, one visit, this port and nothing else.
fn has(call: &Exported, texts: &[(&str, &str)], port: u16) {
    for &(key, value) in texts {
        assert_eq!(call.text(key), Some(value), "{key}");
    }
    assert_eq!(call.integer("server.port"), Some(i64::from(port)));
    assert_eq!(call.integer("visitas.batch.size"), Some(1));
    assert_eq!(call.keys().len(), texts.len() + 2, "{:?}", call.keys());
}

async fn access_line(service: &Service, request_id: &str) -> Value {
    let mut found = Value::Null;
    eventually("the request has a line", SOON, async || {
        let lines = service.logged("request");
        let line = lines.iter().find(|line| line["request_id"] == request_id);
        found = line.cloned().unwrap_or_default();
        !found.is_null()
    })
    .await;
    found
}

/// How many requests were answered 503.
async fn failures(service: &Service) -> u64 {
    let text = service.get("/metrics").await.body;
    text.lines()
        .filter(|line| line.starts_with("http_server_request_duration_seconds_count{"))
        .filter(|line| line.contains("error_type=\"503\""))
        .filter_map(|line| line.rsplit_once(' ')?.1.parse::<u64>().ok())
        .sum()
}

/// How many lines were left out, as the lines say that were written.
fn left_out(service: &Service) -> u64 {
    let lines = service.logged("request");
    lines
        .iter()
        .filter_map(|line| line["lines.left_out"].as_u64())
        .sum()
}
