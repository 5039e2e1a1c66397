//! Installs the recorder behind every metric's handle, and renders every metric.
//!
//! Must not know: when or why a metric changes.

pub mod catalog;
pub mod limit;
pub mod openmetrics;
mod process;

use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};

use self::catalog::Kind;
use self::openmetrics::EXEMPLARS;

/// A format that a scraper can ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// The Prometheus text format 0.0.4.
    Text,
    /// OpenMetrics 1.0.
    OpenMetrics,
}

/// Installs the recorder and returns the handle that renders it. A metric's handle made before this
/// call records nothing.
///
/// # Errors
///
/// If a recorder has been installed already.
pub fn install() -> anyhow::Result<PrometheusHandle> {
    let mut builder = PrometheusBuilder::new().with_recommended_naming(true);
    for metric in catalog::ALL {
        if let Kind::Histogram(buckets) = metric.kind {
            let name = Matcher::Full(metric.name.to_owned());
            builder = builder.set_buckets_for_metric(name, buckets)?;
        }
    }
    let recorder = builder.build_recorder();
    let handle = recorder.handle();
    metrics::set_global_recorder(recorder)
        .map_err(|error| anyhow::anyhow!("installing the metrics recorder: {error}"))?;
    for metric in catalog::ALL {
        let (name, unit, help) = (metric.name, metric.unit, metric.help);
        match metric.kind {
            Kind::Counter => metrics::describe_counter!(name, unit, help),
            Kind::Gauge => metrics::describe_gauge!(name, unit, help),
            Kind::Histogram(_) => metrics::describe_histogram!(name, unit, help),
        }
    }
    Ok(handle)
}

/// Every metric, in any order. Must be called inside the runtime.
#[must_use]
pub fn render(handle: &PrometheusHandle, format: Format) -> String {
    let fractions = process::read();
    // Exemplars are read first, so that the bucket of each has already counted it.
    let exemplars = EXEMPLARS.suffixes();
    let text = handle.render() + &fractions;
    match format {
        Format::Text => text,
        Format::OpenMetrics => openmetrics::from_text(&text, &exemplars),
    }
}
