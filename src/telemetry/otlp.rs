//! Sends spans over OTLP: HTTP with protobuf.
//!
//! The SDK's exporter does not report each attempt (an export makes several, with a backoff), why
//! there was no response, and how many spans the collector rejected. The HTTP client here records
//! all three.
//!
//! Must not know: what a span is about.

use std::error::Error;
use std::pin::Pin;
use std::sync::Arc;

use anyhow::Context as _;
use http::{Request, Response};
use opentelemetry_http::{Bytes, HttpClient, HttpError};
use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig as _, WithHttpConfig as _};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceResponse;
use prost::Message as _;
use reqwest::Certificate;

use super::collector::Collector;
use crate::config::{Compression, ExporterConfig};

/// Makes the SDK's exporter, with a client that inspects each attempt. Must be called outside the
/// runtime, since the client is blocking.
pub(super) fn exporter(
    config: &ExporterConfig,
    collector: Arc<Collector>,
) -> anyhow::Result<SpanExporter> {
    let client = InspectingClient {
        http: http_client(config)?,
        collector,
    };
    let headers = config.headers.iter();
    let headers = headers.map(|(name, value)| (name.clone(), value.expose().to_owned()));
    let mut builder = SpanExporter::builder()
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

/// Sends requests, and records how each attempt ended.
#[derive(Debug)]
struct InspectingClient {
    http: reqwest::blocking::Client,
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
            match &result {
                Ok(response) if response.status().is_success() => {
                    self.collector
                        .record_attempt_success(rejected_spans(response.body()));
                }
                Ok(_) => self.collector.record_attempt_failure(None),
                Err(error) => self
                    .collector
                    .record_attempt_failure(Some(innermost_cause(&**error))),
            }
            result
        })
    }
}

/// How many spans the collector rejected, by its response.
fn rejected_spans(response: &[u8]) -> usize {
    ExportTraceServiceResponse::decode(response)
        .ok()
        .and_then(|response| usize::try_from(response.partial_success?.rejected_spans).ok())
        .unwrap_or(0)
}

/// The innermost cause. The outer ones only say that the export failed.
fn innermost_cause(error: &(dyn Error + 'static)) -> String {
    let mut innermost = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    innermost.to_string()
}
