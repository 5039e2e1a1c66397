//! The pipeline of spans to the collector: queues, batches, exports and counts them.
//!
//! The SDK does not report how many spans its queue drops, nor how each export ends. Wrappers
//! around its processor and its exporter count both.
//!
//! Must not know: what a span is about, and which requests are sampled.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use metrics::Counter;
use opentelemetry::trace::TracerProvider as _;
use opentelemetry::{Array, InstrumentationScope, KeyValue, StringValue, Value};
use opentelemetry_otlp::SpanExporter as OtlpExporter;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::{OTelSdkError, OTelSdkResult};
use opentelemetry_sdk::trace::{
    BatchConfigBuilder, BatchSpanProcessor, Sampler, SdkTracerProvider, Span, SpanData,
    SpanExporter, SpanLimits, SpanProcessor,
};
use tracing::warn;

use super::collector::{self, Collector};
use super::sampler::TraceIdGenerator;
use super::{otlp, span};
use crate::config::{ExporterConfig, TracesConfig};
use crate::metrics::catalog::SPANS_PROCESSED;

/// The version of the semantic conventions that names and attributes follow.
const SCHEMA_URL: &str = "https://opentelemetry.io/schemas/1.44.0";

static QUEUED: LazyLock<Counter> = LazyLock::new(|| spans_processed(""));
static QUEUE_FULL: LazyLock<Counter> = LazyLock::new(|| spans_processed("queue_full"));

fn spans_processed(error_type: &str) -> Counter {
    let component = "batching_span_processor";
    SPANS_PROCESSED.with([&format!("{component}/0"), component, error_type])
}

/// Creates the series of spans, even without an exporter.
pub(super) fn declare_metrics() {
    LazyLock::force(&QUEUED);
    LazyLock::force(&QUEUE_FULL);
    collector::declare_metrics();
}

/// Timeout of the last export to a collector that is down: enough for one that has just come back,
/// and too little for the retries of one that has not.
const LAST_ATTEMPT: Duration = Duration::from_millis(100);

/// The SDK's tracer provider, and the state of the collector that it exports to.
#[derive(Debug)]
pub(super) struct Pipeline {
    provider: SdkTracerProvider,
    pub(super) collector: Arc<Collector>,
}

impl Pipeline {
    /// Must be called outside the runtime, since the exporter's HTTP client is blocking.
    pub(super) fn new(config: &TracesConfig, exporter: &ExporterConfig) -> anyhow::Result<Self> {
        let collector = Arc::new(Collector::new(config.otel_bsp_max_queue_size));
        let queued = Arc::new(AtomicUsize::new(0));
        let exporter = CountingExporter {
            exporter: otlp::exporter(exporter, Arc::clone(&collector))?,
            queued: Arc::clone(&queued),
            collector: Arc::clone(&collector),
        };
        let batches = BatchConfigBuilder::default()
            .with_max_queue_size(config.otel_bsp_max_queue_size)
            .with_max_export_batch_size(config.otel_bsp_max_export_batch_size)
            .with_scheduled_delay(config.otel_bsp_schedule_delay)
            .build();
        let processor = CountingProcessor {
            processor: BatchSpanProcessor::builder(exporter)
                .with_batch_config(batches)
                .build(),
            queued,
            collector: Arc::clone(&collector),
            capacity: config.otel_bsp_max_queue_size,
        };
        let provider = SdkTracerProvider::builder()
            // Our sampler has decided before a span is made.
            .with_sampler(Sampler::AlwaysOn)
            .with_id_generator(TraceIdGenerator::default())
            // Without this the SDK reads limits from variables that are not our settings.
            .with_span_limits(SpanLimits::default())
            .with_resource(resource(config))
            .with_span_processor(processor)
            .build();
        let scope = InstrumentationScope::builder(env!("CARGO_PKG_NAME"))
            .with_version(crate::VERSION)
            .with_schema_url(SCHEMA_URL)
            .build();
        let tracer = provider.tracer_with_scope(scope);
        span::set_tracer(tracer, config.value_length_limit());
        Ok(Self {
            provider,
            collector,
        })
    }

    /// Sends the remaining spans, for at most `timeout`, and logs how many are lost. Hardly waits
    /// for a collector that is down. Blocks. A second call does nothing.
    pub(super) fn shut_down(&self, timeout: Duration) {
        let down = self.collector.is_down();
        let timeout = if down {
            timeout.min(LAST_ATTEMPT)
        } else {
            timeout
        };
        let result = self.provider.shutdown_with_timeout(timeout);
        let lost = self.collector.lost_spans();
        if lost > 0 && !matches!(result, Err(OTelSdkError::AlreadyShutdown)) {
            warn!(
                spans.lost = lost,
                // The log has had the reason of an outage.
                error = result
                    .err()
                    .filter(|_| !down)
                    .map(|error| error.to_string()),
                "the last spans were not exported"
            );
        }
    }
}

/// A random id of this process.
pub(super) fn instance_id() -> &'static str {
    static ID: LazyLock<String> = LazyLock::new(|| uuid::Uuid::new_v4().to_string());
    &ID
}

fn resource(config: &TracesConfig) -> Resource {
    let own = [
        KeyValue::new("service.version", crate::VERSION),
        KeyValue::new("service.instance.id", instance_id()),
    ];
    // The operator's attributes come after ours, so that they win.
    let configured = config.resource_attributes();
    let configured = configured.map(|(key, value)| KeyValue::new(key.clone(), value.clone()));
    Resource::builder_empty()
        .with_attributes(own.into_iter().chain(configured))
        .with_service_name(config.otel_service_name.clone())
        .build()
}

/// Counts queued and dropped spans; the SDK exposes neither.
#[derive(Debug)]
struct CountingProcessor {
    processor: BatchSpanProcessor,
    /// Spans that the exporter has not taken from the queue yet.
    queued: Arc<AtomicUsize>,
    collector: Arc<Collector>,
    capacity: usize,
}

impl SpanProcessor for CountingProcessor {
    fn on_start(&self, span: &mut Span, context: &opentelemetry::Context) {
        self.processor.on_start(span, context);
    }

    fn on_end(&self, mut span: SpanData) {
        if self.queued.fetch_add(1, Ordering::Relaxed) >= self.capacity {
            self.queued.fetch_sub(1, Ordering::Relaxed);
            QUEUE_FULL.increment(1);
            return;
        }
        for attribute in &mut span.attributes {
            cut_value(&mut attribute.value, span::value_length_limit());
        }
        self.collector.count_queued();
        QUEUED.increment(1);
        self.processor.on_end(span);
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.processor.force_flush()
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.processor.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.processor.set_resource(resource);
    }
}

/// Cuts the texts of an attribute's value. A span can stay in the queue for seconds, and a client
/// or a store can send long texts.
fn cut_value(value: &mut Value, limit: usize) {
    let cut_text = |text: &mut StringValue| {
        let short = span::cut(text.as_str(), limit);
        if short.len() < text.as_str().len() {
            *text = StringValue::from(short.to_owned());
        }
    };
    match value {
        Value::String(text) => cut_text(text),
        Value::Array(Array::String(texts)) => texts.iter_mut().for_each(cut_text),
        _ => {}
    }
}

/// Counts exports, and records how each one ended.
#[derive(Debug)]
struct CountingExporter {
    exporter: OtlpExporter,
    queued: Arc<AtomicUsize>,
    collector: Arc<Collector>,
}

impl SpanExporter for CountingExporter {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let spans = batch.len();
        self.queued.fetch_sub(spans, Ordering::Relaxed);
        let result = self.exporter.export(batch).await;
        match &result {
            Ok(()) => self.collector.record_export(spans),
            Err(error) => self.collector.record_export_failure(spans, error),
        }
        result
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn value_is_cut_between_characters() {
        let cut_to = |limit, value: Value| {
            let mut value = value;
            cut_value(&mut value, limit);
            value
        };
        for (limit, text, expected) in [
            (3, "", ""),
            (3, "abc", "abc"),
            (3, "abcd", "abc"),
            (3, "çãé", "çãé"),
            (2, "çãé", "çã"),
            (1, "\u{1f600}\u{1f600}", "\u{1f600}"),
        ] {
            assert_eq!(cut_to(limit, Value::from(text)), Value::from(expected));
            let array = |text: &str| Value::Array(Array::String(vec![text.to_owned().into(); 2]));
            assert_eq!(cut_to(limit, array(text)), array(expected));
        }
        assert_eq!(cut_to(1, Value::from(12)), Value::from(12));
    }
}
