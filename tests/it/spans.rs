//! The spans of a request and of the store calls that it causes, field by field.

use http::{HeaderMap, Method};
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use opentelemetry_proto::tonic::trace::v1::status::StatusCode as SpanStatus;
use reqwest::StatusCode;

use crate::support::collector::{Collector, Exported, hex, named, text};
use crate::support::traces::{PARENT, UNSAMPLED, ask, spans, traced, traced_with};
use crate::support::{HeldCount, World};

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

// --- wiring ---

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
