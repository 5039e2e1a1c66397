//! The spans of a request and of the store calls that it causes, field by field.

use http::{HeaderMap, Method};
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use opentelemetry_proto::tonic::trace::v1::status::StatusCode as SpanStatus;
use reqwest::StatusCode;
use tokio::task::JoinHandle;

use crate::support::collector::{Collector, Exported, hex, named, text};
use crate::support::traces::{UNSAMPLED, ask, traced, traced_with};
use crate::support::{Answer, HeldCount, SOON, Service, Wire, World, eventually};

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
async fn call_without_an_answer_has_no_code_of_the_store() {
    type Break = fn(&World);
    let breaks: [(&str, Break); 2] = [
        ("timeout", |world| world.redis.pause().unwrap()),
        ("connection", |world| world.redis.kill().unwrap()),
    ];
    for (error, break_it) in breaks {
        let (world, collector) = (World::new(), Collector::start().await);
        let service = traced(&world, &collector).await;
        // After a call the next probe, which could find it out first, is a second away.
        service.visit().await;
        break_it(&world);
        let spans = collector.trace_of(&service.get("/").await, 3).await;
        let call = named(&spans, "INCRBY");
        assert_eq!(status(call), SpanStatus::Error);
        assert_eq!(call.text("error.type"), Some(error));
        assert_eq!(call.text("db.response.status_code"), None);
        let server = named(&spans, "GET /");
        assert_eq!(status(server), SpanStatus::Unset, "the visit is counted");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn refusal_by_redis_has_its_prefix() {
    let (world, collector) = (World::new(), Collector::start().await);
    let service = traced(&world, &collector).await;
    service.visit().await;
    world.redis_says::<()>(&["DEL", "visitas_home"]).await;
    world
        .redis_says::<()>(&["LPUSH", "visitas_home", "1"])
        .await;
    let spans = collector.trace_of(&service.get("/").await, 3).await;
    let call = named(&spans, "INCRBY");
    assert_eq!(status(call), SpanStatus::Error);
    assert_eq!(call.text("error.type"), Some("WRONGTYPE"));
    assert_eq!(call.text("db.response.status_code"), Some("WRONGTYPE"));
}

#[tokio::test(flavor = "multi_thread")]
async fn mistake_of_the_client_is_no_error_of_the_server() {
    let (world, collector) = (World::new(), Collector::start().await);
    let service = traced(&world, &collector).await;
    for (method, path, name, code) in [
        (Method::HEAD, "/", "HEAD /", 200),
        (Method::POST, "/", "POST /", 405),
        (Method::GET, "/nothing", "GET", 404),
    ] {
        let answer = service.ask(method, path, HeaderMap::new()).await;
        let spans = collector.trace_of(&answer, 1).await;
        let server = named(&spans, name);
        assert_eq!(server.integer("http.response.status_code"), Some(code));
        assert_eq!(server.text("error.type"), None);
        assert_eq!(status(server), SpanStatus::Unset);
        assert_eq!(spans.len(), 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn older_protocol_is_named() {
    let (world, collector) = (World::new(), Collector::start().await);
    let service = traced(&world, &collector).await;
    let mut wire = Wire::open(&service).await;
    wire.send("GET /nothing HTTP/1.0\r\n\r\n").await;
    wire.rest().await;
    eventually("its span is exported", SOON, async || {
        collector.spans().len() == 1
    })
    .await;
    let version = "network.protocol.version";
    assert_eq!(collector.spans()[0].text(version), Some("1.0"));
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_address_query_and_body_are_recorded_nowhere() {
    let (world, collector) = (World::new(), Collector::start().await);
    let service = traced_with(&world, &collector, &[("RUST_LOG", "debug")]).await;
    let address = "127.0.0.77";
    let client = reqwest::Client::builder()
        .no_proxy()
        .local_address(Some(address.parse().unwrap()))
        .build()
        .unwrap();
    let visit = client
        .get(service.url("/?a=query-of-it"))
        .body("body-of-it");
    let answer = Answer::of(visit.send().await.unwrap()).await.unwrap();
    let spans = format!("{:?}", collector.trace_of(&answer, 3).await);
    let metrics = service.get("/metrics").await.body;
    service.stop().await;
    for record in [spans, metrics, service.printed()] {
        for secret in [address, "query-of-it", "body-of-it"] {
            assert!(!record.contains(secret), "{secret} in {record}");
        }
    }
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
    let (service, count, alone) = with_a_visit_waiting(&world, &collector).await;
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
        let (wait, server) = (&wait.span, &server.span);
        assert!(wait.start_time_unix_nano >= server.start_time_unix_nano);
        assert!(wait.end_time_unix_nano <= server.end_time_unix_nano);
        for call in calls {
            assert!(wait.end_time_unix_nano >= call.span.end_time_unix_nano);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_belong_to_the_first_visit_of_their_batch_that_is_sampled() {
    let (world, collector) = (World::new(), Collector::start().await);
    let (service, count, alone) = with_a_visit_waiting(&world, &collector).await;
    let unsampled = service.client.get(service.url("/"));
    let unsampled = tokio::spawn(unsampled.header("traceparent", UNSAMPLED).send());
    service.until_queued(1).await;
    let sampled = service.begin_visit();
    service.until_queued(2).await;
    count.release().await;
    alone.await.unwrap();

    let spans = collector.trace_of(&sampled.await.unwrap(), 3).await;
    let server = named(&spans, "GET /");
    for call in ["SELECT registrar_visitas", "INCRBY"] {
        let call = named(&spans, call);
        assert_eq!(call.span.parent_span_id, server.span.span_id);
        assert_eq!(call.integer("visitas.batch.size"), Some(2));
    }
    assert_eq!(unsampled.await.unwrap().unwrap().status(), StatusCode::OK);
    assert_eq!(collector.spans().len(), 3 + 3, "none of the unsampled one");
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

/// A service whose writer is busy with one visit, so that those which follow form one batch.
async fn with_a_visit_waiting(
    world: &World,
    collector: &Collector,
) -> (Service, HeldCount, JoinHandle<Answer>) {
    let patient = [("DB_TIMEOUT", "8s"), ("VISIT_TIMEOUT", "9s")];
    let service = traced_with(world, collector, &patient).await;
    let mut count = HeldCount::of(world).await;
    let alone = service.begin_visit();
    count.until_waited_for().await;
    (service, count, alone)
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
