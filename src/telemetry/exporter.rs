//! The way to the collector: OTLP over HTTP, encoded as protobuf.
//!
//! The exporter of the SDK keeps three things to itself, which the client here looks at: each
//! attempt that failed (it makes several, a while apart), why nothing came back, and how many
//! spans the collector took only to throw them away.

use std::collections::HashMap;
use std::error::Error;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::Context as _;
use http::{Request, Response};
use opentelemetry_http::{Bytes, HttpClient, HttpError};
use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig as _, WithHttpConfig as _};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceResponse;
use prost::Message as _;
use reqwest::Certificate;

use super::trace::Breaker;
use crate::config::{Compression, ExporterConfig};

/// What the last export met that its result does not say.
#[derive(Debug, Default)]
pub(super) struct Met {
    /// Spans that the collector took and threw away.
    pub(super) rejected: usize,
    /// Why there was no answer.
    pub(super) failure: Option<String>,
}

/// Where the client leaves what it met, for whoever asked for the export.
#[derive(Debug, Clone, Default)]
pub(super) struct Meetings(Arc<Mutex<Met>>);

impl Meetings {
    /// What was met since this was asked last.
    pub(super) fn take(&self) -> Met {
        std::mem::take(&mut *self.met())
    }

    fn met(&self) -> MutexGuard<'_, Met> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Must be called outside the runtime, since the HTTP client is a blocking one.
pub(super) fn exporter(
    config: &ExporterConfig,
    meetings: Meetings,
    breaker: Arc<Breaker>,
) -> anyhow::Result<SpanExporter> {
    let mut http = reqwest::blocking::Client::builder()
        .timeout(config.timeout)
        // What the environment says of proxies is no setting of ours.
        .no_proxy();
    if let Some(roots) = &config.roots {
        let roots =
            Certificate::from_pem_bundle(&roots.pem).context("reading root certificates")?;
        http = http.tls_certs_only(roots);
    }
    let http = http
        .build()
        .context("building the exporter's HTTP client")?;
    let headers: HashMap<_, _> = config
        .headers
        .iter()
        .map(|(name, value)| (name.clone(), value.expose().to_owned()))
        .collect();
    let mut builder = SpanExporter::builder()
        .with_http()
        .with_http_client(Client {
            http,
            meetings,
            breaker,
        })
        .with_protocol(Protocol::HttpBinary)
        .with_endpoint(&config.endpoint)
        .with_timeout(config.timeout)
        .with_headers(headers);
    if config.compression == Compression::Gzip {
        builder = builder.with_compression(opentelemetry_otlp::Compression::Gzip);
    }
    builder.build().context("building the OTLP exporter")
}

#[derive(Debug)]
struct Client {
    http: reqwest::blocking::Client,
    meetings: Meetings,
    breaker: Arc<Breaker>,
}

impl HttpClient for Client {
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
            if !result
                .as_ref()
                .is_ok_and(|response| response.status().is_success())
            {
                self.breaker.refused();
            }
            let mut met = self.meetings.met();
            *met = match &result {
                Ok(response) => Met {
                    rejected: rejected(response),
                    failure: None,
                },
                Err(error) => Met {
                    rejected: 0,
                    failure: Some(cause(&**error)),
                },
            };
            result
        })
    }
}

/// How many spans a collector says that it threw away.
fn rejected(response: &Response<Bytes>) -> usize {
    if !response.status().is_success() {
        return 0;
    }
    ExportTraceServiceResponse::decode(&response.body()[..])
        .ok()
        .and_then(|answer| usize::try_from(answer.partial_success?.rejected_spans).ok())
        .unwrap_or(0)
}

/// The innermost cause alone: the outer ones say no more than that the export failed.
fn cause(error: &(dyn Error + 'static)) -> String {
    let mut innermost = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    innermost.to_string()
}
