//! Services whose spans are exported, requests with headers, and the counters of spans.

use http::{HeaderMap, HeaderName, Method};
use lab::metrics::whole;

use super::collector::Collector;
use super::{Response, Service, World};

/// A caller that is sampled.
pub(crate) const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
/// A caller that is not.
pub(crate) const UNSAMPLED: &str = "00-1af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00";

/// A service whose spans go to the collector at once.
pub(crate) async fn traced(world: &World, collector: &Collector) -> Service {
    traced_with(world, collector, &[]).await
}

pub(crate) async fn traced_with(
    world: &World,
    collector: &Collector,
    settings: &[(&str, &str)],
) -> Service {
    let endpoint = collector.endpoint();
    let mut all = vec![
        ("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.as_str()),
        ("OTEL_BSP_SCHEDULE_DELAY", "20"),
        // On a loaded machine a visit that is not sampled would otherwise get a late trace.
        ("ACCESS_SLOW", "1h"),
    ];
    all.extend(settings);
    world.serve_with(&all).await
}

pub(crate) async fn ask(
    service: &Service,
    path: &str,
    headers: &[(&'static str, &str)],
) -> Response {
    service.ask(Method::GET, path, with_headers(headers)).await
}

/// A request's headers.
pub(crate) fn with_headers(headers: &[(&'static str, &str)]) -> HeaderMap {
    let header = |&(name, value): &(&'static str, &str)| {
        let value = value.parse().expect("a header's value");
        (HeaderName::from_static(name), value)
    };
    headers.iter().map(header).collect()
}

/// How many spans the exporter or the processor has counted, those with an error or those without.
pub(crate) async fn spans(service: &Service, component: &str, error: &str) -> u64 {
    let metrics = service.metrics().await;
    let (_, count) = metrics
        .series(&format!("otel_sdk_{component}_span_"))
        .find(|(series, _)| match error {
            "" => !series.contains("error_type"),
            error => series.contains(&format!("error_type=\"{error}\"")),
        })
        .expect("the series is there");
    whole(count).expect("a number")
}
