//! Spans on their way to a collector: batched, exported over OTLP, counted, and given up on for
//! a while when nobody takes them.
//!
//! A collector that is absent must cost nothing: after a few failed attempts hardly anything is
//! sampled until an export succeeds. Nothing here knows what a span is about.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use opentelemetry::trace::TracerProvider as _;
use opentelemetry::{Array, InstrumentationScope, KeyValue, StringValue, Value};
use opentelemetry_otlp::SpanExporter as OtlpExporter;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{
    BatchConfigBuilder, BatchSpanProcessor, Sampler, SdkTracer, SdkTracerProvider, Span, SpanData,
    SpanExporter, SpanLimits, SpanProcessor,
};
use tracing::{info, warn};

use super::exporter::{self, Meetings};
use super::sampler::DrawnIds;
use crate::config::{ExporterConfig, TracesConfig};
use crate::metrics::{self, Spans};

/// The version of the semantic conventions that names and attributes follow.
const SCHEMA_URL: &str = "https://opentelemetry.io/schemas/1.44.0";

/// What makes spans and sends them.
#[derive(Debug)]
pub(super) struct Pipeline {
    provider: SdkTracerProvider,
    pub(super) tracer: SdkTracer,
    pub(super) breaker: Arc<Breaker>,
    pub(super) value_length_limit: usize,
}

impl Pipeline {
    /// Must be called outside the runtime, since the exporter's HTTP client is a blocking one.
    pub(super) fn new(config: &TracesConfig, exporter: &ExporterConfig) -> anyhow::Result<Self> {
        let breaker = Arc::new(Breaker::default());
        let queued = Arc::new(AtomicUsize::new(0));
        let meetings = Meetings::default();
        let exporter = Counted {
            exporter: exporter::exporter(exporter, meetings.clone(), Arc::clone(&breaker))?,
            meetings,
            queued: Arc::clone(&queued),
            breaker: Arc::clone(&breaker),
        };
        let batches = BatchConfigBuilder::default()
            .with_max_queue_size(config.otel_bsp_max_queue_size)
            .with_max_export_batch_size(config.otel_bsp_max_export_batch_size)
            .with_scheduled_delay(config.otel_bsp_schedule_delay)
            .build();
        let processor = Bounded {
            processor: BatchSpanProcessor::builder(exporter)
                .with_batch_config(batches)
                .build(),
            queued,
            breaker: Arc::clone(&breaker),
            capacity: config.otel_bsp_max_queue_size,
            value_length_limit: config.value_length_limit(),
        };
        let provider = SdkTracerProvider::builder()
            // What is sampled has been decided before a span is made.
            .with_sampler(Sampler::AlwaysOn)
            .with_id_generator(DrawnIds::default())
            // Otherwise the SDK takes limits from variables that are no settings of ours.
            .with_span_limits(SpanLimits::default())
            .with_resource(resource(config))
            .with_span_processor(processor)
            .build();
        let scope = InstrumentationScope::builder(env!("CARGO_PKG_NAME"))
            .with_version(crate::VERSION)
            .with_schema_url(SCHEMA_URL)
            .build();
        let tracer = provider.tracer_with_scope(scope);
        Ok(Self {
            provider,
            tracer,
            breaker,
            value_length_limit: config.value_length_limit(),
        })
    }

    /// Sends the spans that are left, for at most `timeout`, and says how many were lost since the
    /// collector last took any.
    pub(super) fn end(&self, timeout: Duration) {
        let ended = self.provider.shutdown_with_timeout(timeout);
        let lost = self.breaker.lost();
        if lost > 0 {
            warn!(
                spans.lost = lost,
                error = ended.err().map(|error| error.to_string()),
                "the last spans were not exported"
            );
        }
    }
}

fn resource(config: &TracesConfig) -> Resource {
    let mut attributes = vec![
        KeyValue::new("service.version", crate::VERSION),
        KeyValue::new("service.instance.id", uuid::Uuid::new_v4().to_string()),
    ];
    // What the operator says comes last, so that it wins.
    attributes.extend(
        config
            .resource_attributes()
            .map(|(key, value)| KeyValue::new(key.clone(), value.clone())),
    );
    attributes.push(KeyValue::new(
        "service.name",
        config.otel_service_name.clone(),
    ));
    Resource::builder_empty()
        .with_attributes(attributes)
        .build()
}

/// Opens after a few failed attempts to export in a row: then at most one request a second is
/// sampled, so that there is something to try again with, until an export succeeds.
#[derive(Debug)]
pub(super) struct Breaker {
    began: Instant,
    failures: AtomicUsize,
    /// The second since `began`, from 1, in which a request was last let through.
    admitted: AtomicU64,
    outage: Mutex<Option<Outage>>,
    /// Spans that wait for their export or are in it. It falls under the outage's lock, so that no
    /// span counts twice.
    unexported: AtomicUsize,
    rejections: Mutex<Rejections>,
}

/// Exports that have failed in a row.
#[derive(Debug)]
struct Outage {
    since: Instant,
    lost: usize,
    /// The reason that the log has, and since when.
    reason: (String, Instant),
}

/// Spans that the collector took and threw away.
#[derive(Debug, Default)]
struct Rejections {
    told: Option<Instant>,
    untold: usize,
}

impl Breaker {
    const FAILURES: usize = 3;
    const REASON_INTERVAL: Duration = Duration::from_secs(1);
    const REJECTIONS_TOLD_EVERY: Duration = Duration::from_mins(1);

    /// Whether a request that is to be sampled may be.
    pub(super) fn admits(&self) -> bool {
        if self.failures.load(Ordering::Relaxed) < Self::FAILURES {
            return true;
        }
        self.admits_in(self.began.elapsed().as_secs() + 1)
    }

    fn admits_in(&self, second: u64) -> bool {
        // The first look is for all those who come later in that second. A late one must not move
        // the second back.
        self.admitted.load(Ordering::Relaxed) < second
            && self.admitted.fetch_max(second, Ordering::Relaxed) < second
    }

    /// An attempt to export has failed. To wait until all that belong to an export have takes the
    /// better part of a second, three times over.
    pub(super) fn refused(&self) {
        self.failures.fetch_add(1, Ordering::Relaxed);
    }

    /// The collector has taken so many spans, some of them only to throw them away: that is its
    /// will, so it counts as being there.
    fn exported(&self, spans: usize, rejected: usize) {
        metrics::spans(Spans::Exported, spans - rejected);
        metrics::spans(Spans::NotExported, rejected);
        self.failures.store(0, Ordering::Relaxed);
        self.rejected(rejected);
        let mut outage = self.outage();
        self.unexported.fetch_sub(spans, Ordering::AcqRel);
        if let Some(outage) = outage.take() {
            info!(
                down.seconds = outage.since.elapsed().as_secs_f64(),
                spans.lost = outage.lost,
                "the collector takes spans again"
            );
        }
    }

    fn failed(&self, spans: usize, error: &str) {
        metrics::spans(Spans::NotExported, spans);
        let mut outage = self.outage();
        self.unexported.fetch_sub(spans, Ordering::AcqRel);
        let now = Instant::now();
        let reason = || (error.to_owned(), now);
        let Some(outage) = outage.as_mut() else {
            warn!(error, "the collector does not take spans");
            *outage = Some(Outage {
                since: now,
                lost: spans,
                reason: reason(),
            });
            return;
        };
        outage.lost += spans;
        let (logged, since) = &outage.reason;
        if logged != error && now - *since >= Self::REASON_INTERVAL {
            warn!(error, "the collector still does not take spans");
            outage.reason = reason();
        }
    }

    /// Rejections have a line at most once a minute, with all since the last one.
    fn rejected(&self, spans: usize) {
        if spans == 0 {
            return;
        }
        let mut rejections = self
            .rejections
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        rejections.untold += spans;
        let told = rejections.told;
        if told.is_none_or(|told| told.elapsed() >= Self::REJECTIONS_TOLD_EVERY) {
            warn!(
                spans.lost = rejections.untold,
                "the collector rejects spans"
            );
            *rejections = Rejections {
                told: Some(Instant::now()),
                untold: 0,
            };
        }
    }

    /// How many spans are lost since the collector last took any, if it takes no more.
    fn lost(&self) -> usize {
        let outage = self.outage();
        let lost = outage.as_ref().map_or(0, |outage| outage.lost);
        lost + self.unexported.load(Ordering::Acquire)
    }

    fn outage(&self) -> std::sync::MutexGuard<'_, Option<Outage>> {
        self.outage.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for Breaker {
    fn default() -> Self {
        Self {
            began: Instant::now(),
            failures: AtomicUsize::new(0),
            admitted: AtomicU64::new(0),
            outage: Mutex::new(None),
            unexported: AtomicUsize::new(0),
            rejections: Mutex::default(),
        }
    }
}

/// Counts what the batch processor takes and what it would drop: it says neither itself.
#[derive(Debug)]
struct Bounded {
    processor: BatchSpanProcessor,
    /// Spans handed over that the exporter has not taken yet.
    queued: Arc<AtomicUsize>,
    breaker: Arc<Breaker>,
    capacity: usize,
    value_length_limit: usize,
}

impl SpanProcessor for Bounded {
    fn on_start(&self, span: &mut Span, context: &opentelemetry::Context) {
        self.processor.on_start(span, context);
    }

    fn on_end(&self, mut span: SpanData) {
        if self.queued.fetch_add(1, Ordering::Relaxed) >= self.capacity {
            self.queued.fetch_sub(1, Ordering::Relaxed);
            metrics::spans(Spans::QueueFull, 1);
            return;
        }
        for attribute in &mut span.attributes {
            cut_value(&mut attribute.value, self.value_length_limit);
        }
        self.breaker.unexported.fetch_add(1, Ordering::AcqRel);
        metrics::spans(Spans::Queued, 1);
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

/// The beginning of a text, at most so many characters.
pub(super) fn cut(text: &str, limit: usize) -> &str {
    // No character is shorter than a byte.
    if text.len() <= limit {
        return text;
    }
    text.char_indices()
        .nth(limit)
        .and_then(|(end, _)| text.get(..end))
        .unwrap_or(text)
}

/// Cuts the texts of an attribute's value. A span may wait for long, so it must not be as large as
/// what a caller or a store sends.
fn cut_value(value: &mut Value, limit: usize) {
    let cut_text = |text: &mut StringValue| {
        let short = cut(text.as_str(), limit);
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

/// Counts what the collector takes and what it does not.
#[derive(Debug)]
struct Counted {
    exporter: OtlpExporter,
    meetings: Meetings,
    queued: Arc<AtomicUsize>,
    breaker: Arc<Breaker>,
}

impl SpanExporter for Counted {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let spans = batch.len();
        self.queued.fetch_sub(spans, Ordering::Relaxed);
        let result = self.exporter.export(batch).await;
        let met = self.meetings.take();
        match &result {
            Ok(()) => self.breaker.exported(spans, met.rejected.min(spans)),
            Err(error) => {
                let why = met.failure.unwrap_or_else(|| error.to_string());
                self.breaker.failed(spans, &why);
            }
        }
        result
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.exporter.force_flush()
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

    #[test]
    fn open_breaker_admits_one_request_a_second() {
        let breaker = Breaker::default();
        assert!(breaker.admits_in(5));
        assert!(!breaker.admits_in(5));
        assert!(breaker.admits_in(6));
        assert!(!breaker.admits_in(5), "a second that is over");
        assert!(!breaker.admits_in(6));
    }
}
