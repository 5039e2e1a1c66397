//! A collector that keeps the spans it is sent: OTLP over HTTP, encoded as protobuf.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::routing::post;
use http::StatusCode;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::KeyValue;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message as _;
use tokio::net::TcpListener;

use super::{Answer, SOON, eventually};

/// A collector, which ends with the test.
pub(crate) struct Collector {
    address: SocketAddr,
    received: Arc<Received>,
}

/// A span with what it was sent beneath.
#[derive(Clone, Debug)]
pub(crate) struct Exported {
    pub(crate) span: Span,
    pub(crate) resource: Vec<KeyValue>,
    pub(crate) schema_url: String,
}

#[derive(Default)]
struct Received {
    spans: Mutex<Vec<Exported>>,
    refusing: AtomicBool,
}

impl Collector {
    /// Starts one on a free port.
    pub(crate) async fn start() -> Self {
        let received = Arc::new(Received::default());
        let router = Router::new()
            .route("/v1/traces", post(receive))
            .with_state(Arc::clone(&received));
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a port");
        let address = listener.local_addr().expect("an address");
        tokio::spawn(async move { axum::serve(listener, router).await });
        Self { address, received }
    }

    /// The value of `OTEL_EXPORTER_OTLP_ENDPOINT`.
    pub(crate) fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Answers 503 from now on, or takes spans again.
    pub(crate) fn refuse(&self, refusing: bool) {
        self.received.refusing.store(refusing, Ordering::Relaxed);
    }

    /// Everything that has come so far.
    pub(crate) fn spans(&self) -> Vec<Exported> {
        let spans = self.received.spans.lock();
        spans.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The spans of an answer's trace, once there are so many.
    pub(crate) async fn trace_of(&self, answer: &Answer, spans: usize) -> Vec<Exported> {
        let trace = answer.header("traceresponse").get(3..35);
        let trace = trace.expect("the answer names its trace").to_owned();
        let mut found = Vec::new();
        eventually("the trace is exported", SOON, async || {
            found = self.spans();
            found.retain(|exported| hex(&exported.span.trace_id) == trace);
            found.len() >= spans
        })
        .await;
        found
    }
}

impl Exported {
    /// An attribute that is a text.
    pub(crate) fn text(&self, key: &str) -> Option<&str> {
        text(&self.span.attributes, key)
    }

    /// An attribute that is an integer.
    pub(crate) fn integer(&self, key: &str) -> Option<i64> {
        match value(&self.span.attributes, key)? {
            Value::IntValue(integer) => Some(*integer),
            _ => None,
        }
    }

    /// The names of its attributes, in order.
    pub(crate) fn keys(&self) -> Vec<&str> {
        let mut keys: Vec<_> = self
            .span
            .attributes
            .iter()
            .map(|attribute| attribute.key.as_str())
            .collect();
        keys.sort_unstable();
        keys
    }
}

/// The one span with this name.
pub(crate) fn named<'a>(spans: &'a [Exported], name: &str) -> &'a Exported {
    let mut found = spans.iter().filter(|exported| exported.span.name == name);
    match (found.next(), found.next()) {
        (Some(one), None) => one,
        _ => panic!("not one {name:?} in {spans:?}"),
    }
}

/// An attribute that is a text.
pub(crate) fn text<'a>(attributes: &'a [KeyValue], key: &str) -> Option<&'a str> {
    match value(attributes, key)? {
        Value::StringValue(text) => Some(text),
        _ => None,
    }
}

/// An id as it is written.
pub(crate) fn hex(id: &[u8]) -> String {
    id.iter()
        .fold(String::new(), |hex, byte| format!("{hex}{byte:02x}"))
}

fn value<'a>(attributes: &'a [KeyValue], key: &str) -> Option<&'a Value> {
    let attribute = attributes.iter().find(|attribute| attribute.key == key)?;
    attribute.value.as_ref()?.value.as_ref()
}

async fn receive(State(received): State<Arc<Received>>, body: Bytes) -> StatusCode {
    if received.refusing.load(Ordering::Relaxed) {
        return StatusCode::SERVICE_UNAVAILABLE;
    }
    let request = ExportTraceServiceRequest::decode(body).expect("spans in protobuf");
    let spans = request.resource_spans.into_iter().flat_map(|of_resource| {
        let resource = of_resource.resource.unwrap_or_default().attributes;
        of_resource.scope_spans.into_iter().flat_map(move |scope| {
            let resource = resource.clone();
            scope.spans.into_iter().map(move |span| Exported {
                span,
                resource: resource.clone(),
                schema_url: scope.schema_url.clone(),
            })
        })
    });
    let mut kept = received.spans.lock();
    kept.as_mut().expect("nothing panics here").extend(spans);
    StatusCode::OK
}
