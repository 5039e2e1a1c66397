//! The spans of a request and of its store calls, field by field.

use http::{HeaderMap, Method};
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use opentelemetry_proto::tonic::trace::v1::status::StatusCode as SpanStatus;
use prost::Message as _;
use reqwest::StatusCode;
use tokio::task::JoinHandle;

use crate::support::collector::{Collector, ExportedSpan, hex, named, text};
use crate::support::traces::{PARENT, UNSAMPLED, ask, traced, traced_with};
use crate::support::{HeldCount, Response, SOON, Service, Wire, World, eventually};

#[tokio::test(flavor = "multi_thread")]
async fn single_visit_has_a_server_span_with_both_calls_as_children() {
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
    let response = ask(&service, "/?secret=1", &headers).await;
    let spans = collector.trace_of(&response, 3).await;
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
async fn call_spans_describe_the_call_and_the_store() {
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
    assert_call(postgres, &texts, world.postgres.port());
    let redis = named(&spans, "INCRBY");
    let texts = [
        ("db.system.name", "redis"),
        ("db.namespace", "0"),
        ("db.operation.name", "INCRBY"),
        ("server.address", "127.0.0.1"),
    ];
    assert_call(redis, &texts, world.redis.port());
}

#[tokio::test(flavor = "multi_thread")]
async fn failed_call_is_an_error_in_its_span_and_in_the_server_span() {
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
#[ignore = "reads a clock: make faults"]
async fn call_without_a_reply_has_no_error_code_of_the_store() {
    type Break = fn(&World);
    let breaks: [(&str, Break); 2] = [
        ("timeout", |world| world.redis.pause().unwrap()),
        ("connection", |world| world.redis.kill().unwrap()),
    ];
    for (error, break_it) in breaks {
        let (world, collector) = (World::new(), Collector::start().await);
        let service = traced(&world, &collector).await;
        service.visit().await;
        after_a_reading_of_redis(&service).await;
        break_it(&world);
        let spans = collector.trace_of(&service.get("/").await, 3).await;
        let call = named(&spans, "INCRBY");
        assert_eq!(status(call), SpanStatus::Error);
        assert_eq!(call.text("error.type"), Some(error));
        assert_eq!(call.text("db.response.status_code"), None);
        let server = named(&spans, "GET /");
        assert_eq!(status(server), SpanStatus::Unset, "the visit is recorded");
    }
}

/// Waits until the monitor has read Redis twice. The next reading, which could discover a fault before
/// a visit does, is then at least a quarter of a second away.
async fn after_a_reading_of_redis(service: &Service) {
    let calls = async || {
        let series = "visitas_store_calls_total{db_system_name=\"redis\",\
            db_operation_name=\"INCRBY\",outcome=\"ok\"}";
        service.metric(series).await.unwrap_or_default()
    };
    let before = calls().await;
    eventually("the monitor reads Redis", SOON, async || {
        calls().await >= before + 2.0
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn error_of_redis_is_named_by_its_prefix() {
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
async fn client_error_is_not_an_error_of_the_server_span() {
    let (world, collector) = (World::new(), Collector::start().await);
    let service = traced(&world, &collector).await;
    for (method, path, name, code) in [
        (Method::HEAD, "/", "HEAD /", 200),
        (Method::POST, "/", "POST /", 405),
        (Method::GET, "/nothing", "GET", 404),
    ] {
        let response = service.ask(method, path, HeaderMap::new()).await;
        let spans = collector.trace_of(&response, 1).await;
        let server = named(&spans, name);
        assert_eq!(server.integer("http.response.status_code"), Some(code));
        assert_eq!(server.text("error.type"), None);
        assert_eq!(status(server), SpanStatus::Unset);
        assert_eq!(spans.len(), 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn older_protocol_version_is_recorded() {
    let (world, collector) = (World::new(), Collector::start().await);
    let service = traced(&world, &collector).await;
    let mut wire = Wire::open(&service).await;
    wire.send("GET /nothing HTTP/1.0\r\n\r\n").await;
    wire.rest().await;
    eventually("the span is exported", SOON, async || {
        collector.spans().len() == 1
    })
    .await;
    let version = "network.protocol.version";
    assert_eq!(collector.spans()[0].text(version), Some("1.0"));
}

#[tokio::test(flavor = "multi_thread")]
async fn client_address_query_and_body_are_never_recorded() {
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
    let response = Response::read(visit.send().await.unwrap()).await.unwrap();
    let spans = format!("{:?}", collector.trace_of(&response, 3).await);
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
async fn span_of_an_unmatched_request_is_named_by_its_method_alone() {
    let (world, collector) = (World::new(), Collector::start().await);
    let service = traced(&world, &collector).await;
    let spans = collector.trace_of(&service.get("/nothing").await, 1).await;
    assert_eq!(spans[0].span.name, "GET");
    assert_eq!(spans[0].text("http.route"), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn span_of_a_request_with_an_unknown_method_is_named_http() {
    let (world, collector) = (World::new(), Collector::start().await);
    let service = traced(&world, &collector).await;
    for (path, name) in [("/", "HTTP /"), ("/nothing", "HTTP")] {
        let method = Method::from_bytes(b"BREW").unwrap();
        let response = service.ask(method, path, HeaderMap::new()).await;
        let spans = collector.trace_of(&response, 1).await;
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
async fn calls_are_children_of_the_first_sampled_visit_of_their_batch() {
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
    assert_eq!(
        collector.spans().len(),
        3 + 3,
        "none of the unsampled visit"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn server_span_ends_when_the_client_of_a_queued_visit_disconnects() {
    let (world, collector) = (World::new(), Collector::start().await);
    let (service, count, alone) = with_a_visit_waiting(&world, &collector).await;
    let mut leaving = Wire::open(&service).await;
    leaving.send(visit_of(PARENT)).await;
    service.until_queued(1).await;
    leaving.reset();
    // The count is still held, so the visit is still in the queue.
    let server = collector.trace(&PARENT[3..35], 1).await.remove(0);
    assert_eq!(server.span.name, "GET /");
    assert_eq!(server.integer("http.response.status_code"), None);
    assert_eq!(service.metric("visitas_queue_depth").await, Some(1.0));
    count.release().await;
    alone.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn server_span_ends_when_its_client_disconnects_during_the_call() {
    let (world, collector) = (World::new(), Collector::start().await);
    let service = traced_with(&world, &collector, &PATIENT).await;
    let mut count = HeldCount::of(&world).await;
    let mut leaving = Wire::open(&service).await;
    leaving.send(visit_of(PARENT)).await;
    count.until_waited_for().await;
    leaving.reset();
    let server = collector.trace(&PARENT[3..35], 1).await.remove(0);
    assert_eq!(server.span.name, "GET /");
    count.release().await;
    // Spans that end after it are still its children.
    let spans = collector.trace(&PARENT[3..35], 3).await;
    for call in ["SELECT registrar_visitas", "INCRBY"] {
        let call = named(&spans, call);
        assert_eq!(call.span.parent_span_id, server.span.span_id);
    }
}

/// Each call takes 2.4 s, so the second visit times out during its own call.
#[tokio::test(flavor = "multi_thread")]
async fn server_span_ends_with_its_503_and_not_with_its_batch() {
    let (world, collector) = (World::new(), Collector::start().await);
    let timeouts = [
        ("DB_TIMEOUT", "4s"),
        ("REDIS_TIMEOUT", "100ms"),
        ("VISIT_TIMEOUT", "4100ms"),
    ];
    let service = traced_with(&world, &collector, &timeouts).await;
    world
        .sql(
            "create function demorar() returns trigger language plpgsql \
             as 'begin perform pg_sleep(2.4); return null; end'; \
             create trigger demora before insert on visitas execute function demorar()",
        )
        .await;
    let mut count = HeldCount::of(&world).await;
    let first = service.begin_visit();
    count.until_waited_for().await;
    let second = service.begin_visit();
    service.until_queued(1).await;
    count.release().await;
    assert_eq!(first.await.unwrap().status, StatusCode::OK);
    let second = second.await.unwrap();
    assert_eq!(second.status, StatusCode::SERVICE_UNAVAILABLE);
    let spans = collector.trace_of(&second, 3).await;
    // In the order in which they ended.
    let names: Vec<_> = spans.iter().map(|exported| &exported.span.name).collect();
    assert_eq!(names, ["GET /", "SELECT registrar_visitas", "INCRBY"]);
    for call in &spans[1..] {
        assert_eq!(call.span.parent_span_id, spans[0].span.span_id);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn repair_of_the_sequence_is_a_child_of_the_visit() {
    let (world, collector) = (World::new(), Collector::start().await);
    let service = traced(&world, &collector).await;
    service.visit().await;
    let insert = "insert into visitas (id) select last_value + 1 from visitas_id_seq";
    world.sql(insert).await;
    let response = service.get("/").await;
    assert_eq!(response.status, StatusCode::OK, "{}", response.body);
    let mut spans = collector.trace_of(&response, 5).await;
    spans.sort_by_key(|exported| exported.span.start_time_unix_nano);
    let names: Vec<_> = spans.iter().map(|exported| &*exported.span.name).collect();
    let record = "SELECT registrar_visitas";
    assert_eq!(
        names,
        [
            "GET /",
            record,
            "SELECT avancar_sequencia",
            record,
            "INCRBY"
        ]
    );
    for call in &spans[1..] {
        assert_eq!(call.span.kind(), SpanKind::Client);
        assert_eq!(call.span.parent_span_id, spans[0].span.span_id);
    }
    assert_eq!(spans[1].text("error.type"), Some("23505"));
    assert_eq!(status(&spans[2]), SpanStatus::Unset);
    let procedure = spans[2].text("db.stored_procedure.name");
    assert_eq!(procedure, Some("avancar_sequencia"));
    assert_eq!(
        spans[2].integer("visitas.batch.size"),
        None,
        "it records no visit"
    );
}

// --- how large a span is ---

#[tokio::test(flavor = "multi_thread")]
async fn attribute_values_are_truncated_and_the_span_is_small() {
    let (world, collector) = (World::new(), Collector::start().await);
    let service = traced(&world, &collector).await;
    let (path, agent) = (format!("/{}", "p".repeat(15_000)), "a".repeat(15_000));
    let state = (0..400).map(|number| format!("k{number}={}", "v".repeat(30)));
    let state = state.collect::<Vec<_>>().join(",");
    let id = "i".repeat(128);
    let headers = [
        ("user-agent", agent.as_str()),
        ("traceparent", PARENT),
        ("tracestate", &state),
        ("x-request-id", &id),
    ];
    let response = ask(&service, &path, &headers).await;
    let server = &collector.trace_of(&response, 1).await[0];
    assert_eq!(server.text("url.path"), path.get(..512));
    assert_eq!(server.text("user_agent.original"), agent.get(..512));
    assert_eq!(server.text("visitas.request.id"), Some(id.as_str()));
    assert_eq!(
        server.span.trace_state,
        state[..state[..513].rfind(',').unwrap()]
    );
    let size = server.span.encoded_len();
    assert!(size < 2500, "{size} bytes");
}

#[tokio::test(flavor = "multi_thread")]
async fn attribute_value_limit_is_configurable_in_characters() {
    let (world, collector) = (World::new(), Collector::start().await);
    let limits = [
        ("OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT", "3"),
        ("OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT", "10"),
        // The service ignores these settings of the SDK.
        ("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "1"),
        ("OTEL_SPAN_LINK_COUNT_LIMIT", "0"),
    ];
    let service = traced_with(&world, &collector, &limits).await;
    let mut wire = Wire::open(&service).await;
    let path = "/ç㐀\u{1f600}67890123";
    let request = format!("GET {path} HTTP/1.1\r\nhost: test\r\nuser-agent: 0123456789abc\r\n\r\n");
    wire.send(request).await;
    eventually("its span is exported", SOON, async || {
        !collector.spans().is_empty()
    })
    .await;
    let server = &collector.spans()[0];
    assert_eq!(server.text("url.path"), Some("/ç㐀\u{1f600}678901"));
    assert_eq!(server.text("user_agent.original"), Some("0123456789"));
    assert_eq!(server.integer("http.response.status_code"), Some(404));
    assert_eq!(server.span.dropped_attributes_count, 0);
    // The limit also applies to the spans of calls.
    let spans = collector.trace_of(&service.get("/").await, 3).await;
    let call = named(&spans, "SELECT registrar_visitas");
    assert_eq!(call.text("db.query.text"), Some("select pub"));
}

#[tokio::test(flavor = "multi_thread")]
async fn span_has_a_tracestate_and_its_links_have_none() {
    let (world, collector) = (World::new(), Collector::start().await);
    let (service, count, alone) = with_a_visit_waiting(&world, &collector).await;
    let mut together = Vec::new();
    for (queued, trace) in [(1, "a"), (2, "b")] {
        let parent = format!("00-{}-b7ad6b7169203331-01", trace.repeat(32));
        let request = service.client.get(service.url("/"));
        let request = request
            .header("traceparent", parent)
            .header("tracestate", "vendor=1");
        together.push(tokio::spawn(request.send()));
        service.until_queued(queued).await;
    }
    count.release().await;
    alone.await.unwrap();
    for visit in together {
        visit.await.unwrap().unwrap();
    }
    let spans = collector.trace(&"b".repeat(32), 2).await;
    let wait = named(&spans, "record");
    assert_eq!(wait.span.trace_state, "vendor=1");
    assert_eq!(wait.span.links.len(), 2);
    assert!(
        wait.span
            .links
            .iter()
            .all(|link| link.trace_state.is_empty())
    );
    for span in collector.trace(&"a".repeat(32), 3).await {
        assert_eq!(span.span.trace_state, "vendor=1", "{}", span.span.name);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn last_span_is_flushed_at_the_stop() {
    let (world, collector) = (World::new(), Collector::start().await);
    let late = [("OTEL_BSP_SCHEDULE_DELAY", "600000")];
    let service = traced_with(&world, &collector, &late).await;
    let response = service.get("/").await;
    assert!(collector.spans().is_empty());
    service.stop().await;
    assert_eq!(collector.trace_of(&response, 3).await.len(), 3);
}

// --- wiring ---

/// Timeouts that leave a test enough time to hold the count's lock.
const PATIENT: [(&str, &str); 2] = [("DB_TIMEOUT", "8s"), ("VISIT_TIMEOUT", "9s")];

/// The bytes of a visit with this `traceparent`.
fn visit_of(traceparent: &str) -> String {
    format!("GET / HTTP/1.1\r\nhost: test\r\ntraceparent: {traceparent}\r\n\r\n")
}

/// A service whose writer waits with one visit, so that the visits after it form one batch.
async fn with_a_visit_waiting(
    world: &World,
    collector: &Collector,
) -> (Service, HeldCount, JoinHandle<Response>) {
    let service = traced_with(world, collector, &PATIENT).await;
    let mut count = HeldCount::of(world).await;
    let alone = service.begin_visit();
    count.until_waited_for().await;
    (service, count, alone)
}

fn status(exported: &ExportedSpan) -> SpanStatus {
    exported.span.status.clone().unwrap_or_default().code()
}

/// Expects that a call's span has these attributes, this port, a batch of one, and nothing else.
fn assert_call(call: &ExportedSpan, texts: &[(&str, &str)], port: u16) {
    for &(key, value) in texts {
        assert_eq!(call.text(key), Some(value), "{key}");
    }
    assert_eq!(call.integer("server.port"), Some(i64::from(port)));
    assert_eq!(call.integer("visitas.batch.size"), Some(1));
    assert_eq!(call.keys().len(), texts.len() + 2, "{:?}", call.keys());
}
