//! The way of a span to the collector: queued, batched, sent over OTLP as protobuf, and counted.
//!
//! The SDK does not report how many spans its queue drops, each attempt to export (an export makes
//! several, with a backoff), why there was no response, and how many spans the collector rejected.
//! Wrappers around its processor, its exporter and its HTTP client see all four.
//!
//! Must not know: what a span is about, and which requests are sampled.

use std::error::Error;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use http::{Request, Response};
use opentelemetry::trace::TracerProvider as _;
use opentelemetry::{Array, InstrumentationScope, KeyValue, StringValue, Value};
use opentelemetry_http::{Bytes, HttpClient, HttpError};
use opentelemetry_otlp::{Protocol, SpanExporter as OtlpExporter};
use opentelemetry_otlp::{WithExportConfig as _, WithHttpConfig as _};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceResponse;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::{OTelSdkError, OTelSdkResult};
use opentelemetry_sdk::trace::{
    BatchConfigBuilder, BatchSpanProcessor, Sampler, SdkTracer, SdkTracerProvider, Span, SpanData,
    SpanExporter, SpanLimits, SpanProcessor,
};
use prost::Message as _;
use reqwest::Certificate;
use tracing::warn;

use super::collector::Collector;
use super::sampler::DrawnIds;
use super::span::{cut, value_length_limit};
use crate::config::{Compression, ExporterConfig, TracesConfig};
use crate::metrics::{self, Spans};

/// The version of the semantic conventions that names and attributes follow.
const SCHEMA_URL: &str = "https://opentelemetry.io/schemas/1.44.0";

/// Makes spans and sends them.
#[derive(Debug)]
pub(super) struct Pipeline {
    provider: SdkTracerProvider,
    pub(super) collector: Arc<Collector>,
}

impl Pipeline {
    /// Must be called outside the runtime, since the exporter's HTTP client is a blocking one.
    pub(super) fn new(config: &TracesConfig, exporter: &ExporterConfig) -> anyhow::Result<Self> {
        let collector = Arc::new(Collector::default());
        let queued = Arc::new(AtomicUsize::new(0));
        let details = Details::default();
        let exporter = CountingExporter {
            exporter: otlp_exporter(
                exporter,
                InspectingClient {
                    http: http_client(exporter)?,
                    details: details.clone(),
                    collector: Arc::clone(&collector),
                },
            )?,
            details,
            queued: Arc::clone(&queued),
            collector: Arc::clone(&collector),
        };
        let batches = BatchConfigBuilder::default()
            .with_max_queue_size(config.max_queue_size)
            .with_max_export_batch_size(config.max_export_batch_size)
            .with_scheduled_delay(config.schedule_delay)
            .build();
        let processor = CountingProcessor {
            processor: BatchSpanProcessor::builder(exporter)
                .with_batch_config(batches)
                .build(),
            queued,
            collector: Arc::clone(&collector),
            capacity: config.max_queue_size,
        };
        let provider = SdkTracerProvider::builder()
            // A request is sampled before its span is made.
            .with_sampler(Sampler::AlwaysOn)
            .with_id_generator(DrawnIds::default())
            // Otherwise the SDK reads limits from variables that are not our settings.
            .with_span_limits(SpanLimits::default())
            .with_resource(resource(config))
            .with_span_processor(processor)
            .build();
        Ok(Self {
            provider,
            collector,
        })
    }

    pub(super) fn tracer(&self) -> SdkTracer {
        let scope = InstrumentationScope::builder(env!("CARGO_PKG_NAME"))
            .with_version(crate::VERSION)
            .with_schema_url(SCHEMA_URL)
            .build();
        self.provider.tracer_with_scope(scope)
    }

    /// Sends the remaining spans, for at most `timeout`, and logs how many were lost since the
    /// collector last took any. Blocks. A second call does nothing.
    pub(super) fn shut_down(&self, timeout: Duration) {
        let result = self.provider.shutdown_with_timeout(timeout);
        let lost = self.collector.lost();
        if lost > 0 && !matches!(result, Err(OTelSdkError::AlreadyShutdown)) {
            warn!(
                spans.lost = lost,
                error = result.err().map(|error| error.to_string()),
                "the last spans were not exported"
            );
        }
    }
}

fn resource(config: &TracesConfig) -> Resource {
    let own = [
        KeyValue::new("service.version", crate::VERSION),
        KeyValue::new("service.instance.id", uuid::Uuid::new_v4().to_string()),
    ];
    // The operator's attributes come after ours, so that they win.
    let configured = config.resource_attributes.iter();
    let configured = configured.map(|(key, value)| KeyValue::new(key.clone(), value.clone()));
    Resource::builder_empty()
        .with_attributes(own.into_iter().chain(configured))
        .with_service_name(config.service_name.clone())
        .build()
}

fn http_client(config: &ExporterConfig) -> anyhow::Result<reqwest::blocking::Client> {
    let mut http = reqwest::blocking::Client::builder()
        .timeout(config.timeout)
        // The environment's proxies are not our settings.
        .no_proxy();
    if let Some(roots) = &config.roots {
        let roots =
            Certificate::from_pem_bundle(&roots.pem).context("reading root certificates")?;
        http = http.tls_certs_only(roots);
    }
    http.build().context("building the exporter's HTTP client")
}

fn otlp_exporter(
    config: &ExporterConfig,
    client: InspectingClient,
) -> anyhow::Result<OtlpExporter> {
    let headers = config.headers.iter();
    let headers = headers.map(|(name, value)| (name.clone(), value.expose().to_owned()));
    let mut builder = OtlpExporter::builder()
        .with_http()
        .with_http_client(client)
        .with_protocol(Protocol::HttpBinary)
        .with_endpoint(&config.endpoint)
        .with_timeout(config.timeout)
        .with_headers(headers.collect());
    if config.compression == Compression::Gzip {
        builder = builder.with_compression(opentelemetry_otlp::Compression::Gzip);
    }
    builder.build().context("building the OTLP exporter")
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
            metrics::spans(Spans::QueueFull, 1);
            return;
        }
        for attribute in &mut span.attributes {
            cut_value(&mut attribute.value, value_length_limit());
        }
        self.collector.queued();
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

/// Cuts the texts of an attribute's value. A span can wait in the queue for long, so it must not be
/// as large as what a client or a store sends.
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

/// Tells the collector's status how each export ended.
#[derive(Debug)]
struct CountingExporter {
    exporter: OtlpExporter,
    details: Details,
    queued: Arc<AtomicUsize>,
    collector: Arc<Collector>,
}

impl SpanExporter for CountingExporter {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let spans = batch.len();
        self.queued.fetch_sub(spans, Ordering::Relaxed);
        let result = self.exporter.export(batch).await;
        let details = std::mem::take(&mut *self.details.lock());
        match &result {
            Ok(()) => self.collector.exported(spans, details.rejected.min(spans)),
            Err(error) => {
                let error = details.error.unwrap_or_else(|| error.to_string());
                self.collector.failed(spans, &error);
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

/// What the SDK's result of an export omits.
#[derive(Debug, Default)]
struct ExportDetails {
    /// Spans that the collector rejected.
    rejected: usize,
    /// Why there was no response.
    error: Option<String>,
}

/// The details of the last attempt, shared by the client that sees them and the exporter.
#[derive(Debug, Clone, Default)]
struct Details(Arc<Mutex<ExportDetails>>);

impl Details {
    fn lock(&self) -> MutexGuard<'_, ExportDetails> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Sends a request and notes what the SDK's result omits.
#[derive(Debug)]
struct InspectingClient {
    http: reqwest::blocking::Client,
    details: Details,
    collector: Arc<Collector>,
}

impl HttpClient for InspectingClient {
    fn send_bytes<'client, 'sent>(
        &'client self,
        request: Request<Bytes>,
    ) -> Pin<Box<dyn Future<Output = Result<Response<Bytes>, HttpError>> + Send + 'sent>>
    where
        'client: 'sent,
        Self: 'sent,
    {
        Box::pin(async move {
            let result = self.http.send_bytes(request).await;
            let mut details = ExportDetails::default();
            match &result {
                Ok(response) if response.status().is_success() => {
                    details.rejected = rejected(response.body());
                }
                Ok(_) => self.collector.attempt_failed(),
                Err(error) => {
                    self.collector.attempt_failed();
                    details.error = Some(innermost_cause(&**error));
                }
            }
            *self.details.lock() = details;
            result
        })
    }
}

/// How many spans the collector rejected, by its response.
fn rejected(response: &[u8]) -> usize {
    ExportTraceServiceResponse::decode(response)
        .ok()
        .and_then(|response| usize::try_from(response.partial_success?.rejected_spans).ok())
        .unwrap_or(0)
}

/// The outer causes add nothing: they only say that the export failed.
fn innermost_cause(error: &(dyn Error + 'static)) -> String {
    let mut innermost = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    innermost.to_string()
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
