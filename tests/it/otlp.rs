//! The settings of the exporter, and their effect on what the collector receives.

use reqwest::StatusCode;

use crate::support::collector::{Collector, Export, text};
use crate::support::traces::{traced, traced_with};
use crate::support::{Ended, Service, World, settings};

#[tokio::test(flavor = "multi_thread")]
async fn spans_are_sent_to_the_traces_path_of_the_endpoint() {
    let (world, collector) = (World::new(), Collector::start().await);
    let service = traced(&world, &collector).await;
    let export = first_export(&service, &collector).await;
    assert_eq!(export.path, "/v1/traces");
    assert_eq!(export.headers["content-type"], "application/x-protobuf");
    assert!(!export.headers.contains_key("content-encoding"));
    assert!(!export.headers.contains_key("traceparent"));
}

#[tokio::test(flavor = "multi_thread")]
async fn traces_endpoint_is_used_unchanged() {
    let (world, collector) = (World::new(), Collector::start().await);
    let endpoint = format!("{}/as/it/is", collector.endpoint());
    let settings = [("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", endpoint.as_str())];
    let service = traced_with(&world, &collector, &settings).await;
    let export = first_export(&service, &collector).await;
    assert_eq!(export.path, "/as/it/is");
}

/// Docker gives containers such variables. No proxy listens at the address.
#[tokio::test(flavor = "multi_thread")]
async fn proxies_of_the_environment_take_no_part_in_exports_and_health_checks() {
    let (world, collector) = (World::new(), Collector::start().await);
    let proxies = [
        "http_proxy",
        "HTTP_PROXY",
        "https_proxy",
        "all_proxy",
        "ALL_PROXY",
    ];
    let proxies = proxies.map(|name| (name, "http://127.0.0.1:1"));
    let service = traced_with(&world, &collector, &proxies).await;
    first_export(&service, &collector).await;
    let check = ["healthcheck", "--url", &service.url("/health")];
    let ended = Ended::of(&check, &settings(&proxies)).await;
    assert_eq!(ended.code, Some(0), "{}", ended.errors);
}

#[tokio::test(flavor = "multi_thread")]
async fn headers_are_sent_with_each_export() {
    let (world, collector) = (World::new(), Collector::start().await);
    let headers = "authorization=Basic%20secret%3D,x-scope=a";
    let settings = [("OTEL_EXPORTER_OTLP_HEADERS", headers)];
    let service = traced_with(&world, &collector, &settings).await;
    let export = first_export(&service, &collector).await;
    assert_eq!(export.headers["authorization"], "Basic secret=");
    assert_eq!(export.headers["x-scope"], "a");
    assert!(!service.printed().contains("secret"), "in the log");
}

#[tokio::test(flavor = "multi_thread")]
async fn spans_are_compressed_when_configured() {
    let (world, collector) = (World::new(), Collector::start().await);
    let settings = [("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")];
    let service = traced_with(&world, &collector, &settings).await;
    let export = first_export(&service, &collector).await;
    assert_eq!(export.headers["content-encoding"], "gzip");
}

#[tokio::test(flavor = "multi_thread")]
async fn export_has_no_more_spans_than_the_batch_size() {
    let (world, collector) = (World::new(), Collector::start().await);
    let settings = [
        ("OTEL_BSP_SCHEDULE_DELAY", "600000"),
        ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "4"),
    ];
    let service = traced_with(&world, &collector, &settings).await;
    for _ in 0..3 {
        service.visit().await;
    }
    service.stop().await;
    assert_eq!(collector.spans().len(), 9);
    let exports = collector.exports();
    assert!(
        exports.iter().all(|export| export.spans <= 4),
        "{exports:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn resource_has_the_attributes_that_the_operator_sets() {
    let (world, collector) = (World::new(), Collector::start().await);
    let settings = [
        ("OTEL_SERVICE_NAME", "shop"),
        (
            "OTEL_RESOURCE_ATTRIBUTES",
            "service.name=other,service.version=9,deployment.environment.name=a%2Cb",
        ),
    ];
    let service = traced_with(&world, &collector, &settings).await;
    let spans = collector.trace_of(&service.get("/").await, 3).await;
    let resource = &spans[0].resource;
    assert_eq!(text(resource, "service.name"), Some("shop"));
    assert_eq!(text(resource, "service.version"), Some("9"));
    assert_eq!(text(resource, "deployment.environment.name"), Some("a,b"));
    let mut keys: Vec<_> = resource.iter().map(|attribute| &attribute.key).collect();
    keys.dedup();
    assert_eq!(keys.len(), 4, "each once: {keys:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_sampled_where_traces_are_switched_off() {
    let (world, collector) = (World::new(), Collector::start().await);
    for off in [
        ("OTEL_SDK_DISABLED", "true"),
        ("OTEL_TRACES_EXPORTER", "none"),
        ("OTEL_TRACES_SAMPLER", "always_off"),
    ] {
        let service = traced_with(&world, &collector, &[off]).await;
        let response = service.get("/").await;
        assert_eq!(response.status, StatusCode::OK);
        assert_eq!(response.header("traceresponse"), "", "{off:?}");
        service.stop().await;
    }
    assert!(collector.exports().is_empty());
}

async fn first_export(service: &Service, collector: &Collector) -> Export {
    collector.trace_of(&service.get("/").await, 3).await;
    collector.exports().remove(0)
}
