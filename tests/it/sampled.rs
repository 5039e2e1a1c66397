//! Which requests are traced, and what their parent is. The others leave no span.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use axum::Router;
use axum::body::Body;
use http::{HeaderMap, Method, Request};
use opentelemetry::trace::{SpanKind, TraceId};
use opentelemetry_sdk::trace::{SamplingDecision, ShouldSample as _};
use reqwest::StatusCode;
use tower::Service as _;
use tracing::Span;
use tracing::span::{Attributes, Id};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::{Context, SubscriberExt as _};
use visitas::telemetry::request::{Observed, Observer};
use visitas::telemetry::sampler::Sampler;

use crate::http::PATHS;
use crate::support::collector::{Collector, hex, named};
use crate::support::load::visits;
use crate::support::traces::{PARENT, UNSAMPLED, ask, spans, traced, traced_with};
use crate::support::{SOON, World, eventually};

#[tokio::test(flavor = "multi_thread")]
async fn inbound_traceparent_is_the_parent() {
    let (world, collector) = (World::new(), Collector::start().await);
    let service = traced(&world, &collector).await;
    let response = ask(&service, "/", &[("traceparent", PARENT)]).await;
    let spans = collector.trace_of(&response, 3).await;
    let server = named(&spans, "GET /");
    assert_eq!(hex(&server.span.trace_id), PARENT[3..35]);
    assert_eq!(hex(&server.span.parent_span_id), PARENT[36..52]);
}

#[tokio::test(flavor = "multi_thread")]
async fn malformed_traceparent_is_no_parent() {
    let (world, collector) = (World::new(), Collector::start().await);
    let service = traced(&world, &collector).await;
    let of_zeros = format!("00-{}-b7ad6b7169203331-01", "0".repeat(32));
    let malformed = [
        "",
        "00",
        &PARENT[..54],
        &PARENT.replace("00-", "ff-"),
        &PARENT.replace("-01", "-+1"),
        &PARENT.replace("-01", "-01-"),
        &PARENT.replace("-01", "-01-more"),
        &PARENT.to_uppercase(),
        "00-1-1-01",
        &of_zeros,
    ];
    for malformed in malformed {
        let response = ask(&service, "/", &[("traceparent", malformed)]).await;
        let spans = collector.trace_of(&response, 3).await;
        let server = named(&spans, "GET /");
        assert_eq!(hex(&server.span.parent_span_id), "", "{malformed}");
        assert_ne!(hex(&server.span.trace_id), PARENT[3..35], "{malformed}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_traceparents_start_a_new_trace() {
    let (world, collector) = (World::new(), Collector::start().await);
    let service = traced(&world, &collector).await;
    for second in [
        &PARENT.replace("0af7", "1af7"),
        PARENT,
        UNSAMPLED,
        "malformed",
    ] {
        let mut headers = HeaderMap::new();
        for value in [PARENT, second] {
            headers.append("traceparent", value.parse().unwrap());
        }
        headers.append("tracestate", "vendor=1".parse().unwrap());
        let response = service.ask(Method::GET, "/", headers).await;
        let spans = collector.trace_of(&response, 3).await;
        let server = named(&spans, "GET /");
        assert_eq!(hex(&server.span.parent_span_id), "", "{second}");
        assert_ne!(hex(&server.span.trace_id), PARENT[3..35], "{second}");
        assert_eq!(server.span.trace_state, "", "{second}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn members_of_a_second_tracestate_are_appended_to_the_first() {
    let (world, collector) = (World::new(), Collector::start().await);
    let service = traced(&world, &collector).await;
    let mut headers = HeaderMap::new();
    headers.append("traceparent", PARENT.parse().unwrap());
    for value in ["b=1,c=2", "", "a=3"] {
        headers.append("tracestate", value.parse().unwrap());
    }
    let response = service.ask(Method::GET, "/", headers).await;
    for span in collector.trace_of(&response, 3).await {
        assert_eq!(span.span.trace_state, "b=1,c=2,a=3", "{}", span.span.name);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn propagators_without_tracecontext_ignore_trace_headers() {
    let (world, collector) = (World::new(), Collector::start().await);
    for propagators in ["none", "baggage"] {
        let settings = [
            ("OTEL_PROPAGATORS", propagators),
            ("RUST_LOG", "info,access=debug"),
        ];
        let service = traced_with(&world, &collector, &settings).await;
        for caller in [PARENT, UNSAMPLED] {
            let headers = [("traceparent", caller), ("tracestate", "a=1")];
            let response = ask(&service, "/", &headers).await;
            let spans = collector.trace_of(&response, 3).await;
            let server = named(&spans, "GET /");
            assert_eq!(hex(&server.span.parent_span_id), "", "{propagators}");
            assert_eq!(server.span.trace_state, "", "{propagators}");
            ask(&service, "/health/live", &headers).await;
        }
        service.stop().await;
        let log = service.printed();
        assert!(log.contains("/health/live"), "{log}");
        for caller in [PARENT, UNSAMPLED] {
            assert!(!log.contains(&caller[3..35]), "{log}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sampling_ratio_is_decided_by_the_trace_id() {
    let (world, collector) = (World::new(), Collector::start().await);
    for (sampler, ratio) in [
        ("traceidratio", 0.5),
        ("parentbased_traceidratio", 0.5),
        ("traceidratio", 0.1),
    ] {
        let argument = ratio.to_string();
        let settings = [
            ("OTEL_TRACES_SAMPLER", sampler),
            ("OTEL_TRACES_SAMPLER_ARG", argument.as_str()),
        ];
        let service = traced_with(&world, &collector, &settings).await;
        // The SDK's own sampler, as another service with the same ratio uses it.
        let reference = opentelemetry_sdk::trace::Sampler::TraceIdRatioBased(ratio);
        let mut sampled = BTreeSet::new();
        for _ in 0..200 {
            let response = service.get("/").await;
            let Some(trace) = response.header("traceresponse").get(3..35) else {
                continue;
            };
            let trace_id = TraceId::from_hex(trace).unwrap();
            let decided = reference.should_sample(None, trace_id, "", &SpanKind::Server, &[], &[]);
            assert_eq!(
                decided.decision,
                SamplingDecision::RecordAndSample,
                "{trace}"
            );
            sampled.insert(trace.to_owned());
        }
        eventually("every sampled trace is exported", SOON, async || {
            let exported = collector.spans();
            let exported = exported.iter().map(|exported| hex(&exported.span.trace_id));
            sampled.is_subset(&exported.collect())
        })
        .await;
        // Five standard deviations.
        let (expected, deviation) = (200.0 * ratio, (200.0 * ratio * (1.0 - ratio)).sqrt());
        let sampled = sampled.len();
        let distance = (sampled as f64 - expected).abs();
        assert!(distance < 5.0 * deviation, "{sampled} of 200 at {ratio}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn unsampled_visits_have_metrics_and_no_spans() {
    let (world, collector) = (World::new(), Collector::start().await);
    let off = [("OTEL_TRACES_SAMPLER", "always_off")];
    let service = traced_with(&world, &collector, &off).await;
    let visits = visits(&[&service], 16, 500).await;
    assert!(
        visits
            .iter()
            .all(|visit| visit.status == 200 && !visit.sampled)
    );
    for (component, error) in [
        ("processor", ""),
        ("processor", "queue_full"),
        ("exporter", ""),
    ] {
        assert_eq!(spans(&service, component, error).await, 0);
    }
    let calls = r#"db_system_name="postgresql",db_operation_name="SELECT",outcome="ok""#;
    let calls = format!("visitas_store_calls_total{{{calls}}}");
    assert_eq!(service.counted("ok").await, 500);
    assert!(service.metric(&calls).await >= service.metric("visitas_batch_size_count").await);
}

#[tokio::test]
async fn handler_of_an_unsampled_request_runs_in_no_span() {
    let made = Arc::new(AtomicUsize::new(0));
    let counting = tracing_subscriber::registry().with(Counting(Arc::clone(&made)));
    let _counting = tracing::subscriber::set_default(counting);
    let handler = || async { Span::current().is_none().to_string() };
    let observer = Observer::new(Sampler::off(true), SOON);
    let mut router = Router::new()
        .route("/", axum::routing::get(handler))
        .layer(observer.layer(|_route| Observed::Traced));
    let request = Request::get("/").header("traceparent", PARENT);
    let response = router.call(request.body(Body::empty()).unwrap()).await;
    let body = axum::body::to_bytes(response.unwrap().into_body(), 16).await;
    assert_eq!(body.unwrap(), "true");
    assert_eq!(made.load(Ordering::Relaxed), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn unsampled_traceparent_leaves_no_span() {
    let (world, collector) = (World::new(), Collector::start().await);
    let service = traced(&world, &collector).await;
    let unsampled = ask(&service, "/", &[("traceparent", UNSAMPLED)]).await;
    assert_eq!(unsampled.header("traceresponse"), "");
    collector.trace_of(&service.get("/").await, 3).await;
    assert_eq!(collector.spans().len(), 3, "only those of the second visit");
}

#[tokio::test(flavor = "multi_thread")]
async fn probes_and_scrapes_are_not_traced() {
    let (world, collector) = (World::new(), Collector::start().await);
    let service = traced(&world, &collector).await;
    for path in PATHS
        .into_iter()
        .filter(|path| !["/", "/visitas"].contains(path))
    {
        ask(&service, path, &[("traceparent", PARENT)]).await;
    }
    collector.trace_of(&service.get("/").await, 3).await;
    assert_eq!(collector.spans().len(), 3, "only those of the visit");
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_sampled_without_an_endpoint() {
    let world = World::new();
    let service = world.serve().await;
    let response = ask(&service, "/", &[("traceparent", PARENT)]).await;
    assert_eq!(response.status, StatusCode::OK);
    assert_eq!(response.header("traceresponse"), "");
    assert_eq!(spans(&service, "processor", "").await, 0);
    assert_eq!(spans(&service, "exporter", "").await, 0);
}

/// Counts all spans that are created.
struct Counting(Arc<AtomicUsize>);

impl<S: tracing::Subscriber> Layer<S> for Counting {
    fn on_new_span(&self, _: &Attributes<'_>, _: &Id, _: Context<'_, S>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}
