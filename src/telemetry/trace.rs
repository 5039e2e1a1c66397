//! Spans on their way to a collector: batched, exported over OTLP, counted, and given up on for
//! a while when nobody takes them.
//!
//! A collector that is absent must cost nothing: after a few failed exports hardly anything is
//! sampled until one succeeds. Nothing here knows what a span is about.

use std::collections::HashMap;
use std::fmt::Debug;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use opentelemetry::trace::TracerProvider as _;
use opentelemetry::{InstrumentationScope, KeyValue};
use opentelemetry_otlp::{
    Protocol, SpanExporter as OtlpExporter, WithExportConfig as _, WithHttpConfig as _,
};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{
    BatchConfigBuilder, BatchSpanProcessor, Sampler, SdkTracer, SdkTracerProvider, Span, SpanData,
    SpanExporter, SpanProcessor,
};
use tracing::{info, warn};

use super::metric::{self, Spans};
use crate::config::{Compression, ExporterConfig, TracesConfig};

/// The version of the semantic conventions that names and attributes follow.
const SCHEMA_URL: &str = "https://opentelemetry.io/schemas/1.44.0";

/// What makes spans and sends them.
#[derive(Debug)]
pub(super) struct Pipeline {
    pub(super) provider: SdkTracerProvider,
    pub(super) tracer: SdkTracer,
    pub(super) breaker: Arc<Breaker>,
}

impl Pipeline {
    /// Must be called outside the runtime, since the exporter's HTTP client is a blocking one.
    pub(super) fn new(config: &TracesConfig, exporter: &ExporterConfig) -> anyhow::Result<Self> {
        let breaker = Arc::new(Breaker::default());
        let queued = Arc::new(AtomicUsize::new(0));
        let exporter = Counted {
            exporter: otlp_exporter(exporter)?,
            queued: Arc::clone(&queued),
            breaker: Arc::clone(&breaker),
        };
        let batches = BatchConfigBuilder::default()
            .with_max_queue_size(config.max_queue_size)
            .with_max_export_batch_size(config.max_export_batch_size)
            .with_scheduled_delay(config.schedule_delay)
            .build();
        let processor = Bounded {
            processor: BatchSpanProcessor::builder(exporter)
                .with_batch_config(batches)
                .build(),
            queued,
            capacity: config.max_queue_size,
        };
        let provider = SdkTracerProvider::builder()
            // What is sampled has been decided before a span is made.
            .with_sampler(Sampler::AlwaysOn)
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
        })
    }
}

fn otlp_exporter(config: &ExporterConfig) -> anyhow::Result<OtlpExporter> {
    let client = reqwest::blocking::Client::builder()
        .timeout(config.timeout)
        // What the environment says of proxies is no setting of ours.
        .no_proxy()
        .build()
        .context("building the exporter's HTTP client")?;
    let headers: HashMap<_, _> = config
        .headers
        .iter()
        .map(|(name, value)| (name.clone(), value.expose().to_owned()))
        .collect();
    let mut builder = OtlpExporter::builder()
        .with_http()
        .with_http_client(client)
        .with_protocol(Protocol::HttpBinary)
        .with_endpoint(&config.endpoint)
        .with_timeout(config.timeout)
        .with_headers(headers);
    if config.compression == Compression::Gzip {
        builder = builder.with_compression(opentelemetry_otlp::Compression::Gzip);
    }
    builder.build().context("building the OTLP exporter")
}

fn resource(config: &TracesConfig) -> Resource {
    let mut attributes = vec![
        KeyValue::new("service.version", crate::VERSION),
        KeyValue::new("service.instance.id", uuid::Uuid::new_v4().to_string()),
    ];
    // What the operator says comes last, so that it wins.
    attributes.extend(
        config
            .resource_attributes
            .iter()
            .map(|(key, value)| KeyValue::new(key.clone(), value.clone())),
    );
    attributes.push(KeyValue::new("service.name", config.service_name.clone()));
    Resource::builder_empty()
        .with_attributes(attributes)
        .build()
}

/// Opens after a few failed exports in a row: then at most one request a second is sampled, so
/// that there is something to try again with, until an export succeeds.
#[derive(Debug)]
pub(super) struct Breaker {
    began: Instant,
    failures: AtomicUsize,
    /// The second since `began` in which a request was last let through, plus one.
    admitted: AtomicU64,
    outage: Mutex<Option<Outage>>,
}

/// Exports that have failed in a row.
#[derive(Debug)]
struct Outage {
    since: Instant,
    lost: usize,
}

impl Breaker {
    const FAILURES: usize = 3;

    /// Whether a request that is to be sampled may be.
    pub(super) fn admits(&self) -> bool {
        if self.failures.load(Ordering::Relaxed) < Self::FAILURES {
            return true;
        }
        let second = self.began.elapsed().as_secs() + 1;
        self.admitted.swap(second, Ordering::Relaxed) != second
    }

    fn exported(&self, spans: usize) {
        metric::spans(Spans::Exported, spans);
        self.failures.store(0, Ordering::Relaxed);
        if let Some(outage) = self.outage().take() {
            info!(
                down.seconds = outage.since.elapsed().as_secs_f64(),
                spans.lost = outage.lost,
                "the collector takes spans again"
            );
        }
    }

    fn failed(&self, spans: usize, error: &dyn std::error::Error) {
        metric::spans(Spans::NotExported, spans);
        self.failures.fetch_add(1, Ordering::Relaxed);
        let mut outage = self.outage();
        if outage.is_none() {
            warn!(
                error = error.to_string(),
                "the collector does not take spans"
            );
        }
        outage
            .get_or_insert(Outage {
                since: Instant::now(),
                lost: 0,
            })
            .lost += spans;
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
        }
    }
}

/// Counts what the batch processor takes and what it would drop: it says neither itself.
#[derive(Debug)]
struct Bounded {
    processor: BatchSpanProcessor,
    /// Spans handed over that the exporter has not taken yet.
    queued: Arc<AtomicUsize>,
    capacity: usize,
}

impl SpanProcessor for Bounded {
    fn on_start(&self, span: &mut Span, context: &opentelemetry::Context) {
        self.processor.on_start(span, context);
    }

    fn on_end(&self, span: SpanData) {
        if self.queued.fetch_add(1, Ordering::Relaxed) >= self.capacity {
            self.queued.fetch_sub(1, Ordering::Relaxed);
            metric::spans(Spans::QueueFull, 1);
            return;
        }
        metric::spans(Spans::Queued, 1);
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

/// Counts what the collector takes and what it does not.
#[derive(Debug)]
struct Counted {
    exporter: OtlpExporter,
    queued: Arc<AtomicUsize>,
    breaker: Arc<Breaker>,
}

impl SpanExporter for Counted {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let spans = batch.len();
        self.queued.fetch_sub(spans, Ordering::Relaxed);
        let result = self.exporter.export(batch).await;
        match &result {
            Ok(()) => self.breaker.exported(spans),
            Err(error) => self.breaker.failed(spans, error),
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
