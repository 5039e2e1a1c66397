//! A collector that keeps the spans it is sent, and can be told to behave badly: OTLP over HTTP,
//! encoded as protobuf.

use std::io::Read as _;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{Request, State};
use axum::response::{IntoResponse as _, Response};
use http::{HeaderMap, StatusCode};
use hyper::server::conn::http1;
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTracePartialSuccess, ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::KeyValue;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message as _;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;

use super::{Answer, SOON, eventually, locked};

/// A collector, which ends with the test.
pub(crate) struct Collector {
    address: SocketAddr,
    received: Arc<Received>,
    serving: Mutex<JoinHandle<()>>,
}

/// What a collector does with what it is sent.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Manner {
    /// Keeps it.
    Takes,
    /// Keeps it, and says so after a while.
    Slow(Duration),
    /// Keeps it, and says that it has thrown away so many spans of each request.
    Rejects(i64),
    /// Answers with this status.
    Refuses(StatusCode),
    /// Reads it and never answers.
    Silent,
    /// Lets nobody connect, without saying so.
    Swallows,
    /// Resets each connection.
    Resets,
    /// Does not listen.
    Absent,
}

/// A span with what it was sent beneath.
#[derive(Clone, Debug)]
pub(crate) struct Exported {
    pub(crate) span: Span,
    pub(crate) resource: Vec<KeyValue>,
    pub(crate) schema_url: String,
}

/// A request that was taken.
#[derive(Clone, Debug)]
pub(crate) struct Export {
    pub(crate) path: String,
    pub(crate) headers: HeaderMap,
    pub(crate) spans: usize,
}

struct Received {
    manner: Mutex<Manner>,
    spans: Mutex<Vec<Exported>>,
    exports: Mutex<Vec<Export>>,
}

impl Collector {
    /// Starts one that takes spans, on a free port.
    pub(crate) async fn start() -> Self {
        let received = Arc::new(Received {
            manner: Mutex::new(Manner::Takes),
            spans: Mutex::default(),
            exports: Mutex::default(),
        });
        // An address that nobody else uses, so that the port is still free after an absence.
        let listener = TcpListener::bind(("127.0.0.2", 0)).await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let serving = tokio::spawn(serve(listener, Arc::clone(&received)));
        Self {
            address,
            received,
            serving: Mutex::new(serving),
        }
    }

    /// The value of `OTEL_EXPORTER_OTLP_ENDPOINT`.
    pub(crate) fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Closes all connections and behaves like this from now on.
    pub(crate) async fn becomes(&self, manner: Manner) {
        let end = |serving: JoinHandle<()>| async move {
            serving.abort();
            serving.await.ok();
        };
        *locked(&self.received.manner) = manner;
        let nothing = tokio::spawn(std::future::ready(()));
        let served = std::mem::replace(&mut *locked(&self.serving), nothing);
        end(served).await;
        let serving = match manner {
            Manner::Absent => return,
            Manner::Swallows => tokio::spawn(swallow(bound(self.address).await)),
            _ => {
                let socket = bound(self.address).await;
                let listener = socket.listen(1024).expect("the port again");
                tokio::spawn(serve(listener, Arc::clone(&self.received)))
            }
        };
        *locked(&self.serving) = serving;
    }

    /// Every request that was taken so far.
    pub(crate) fn exports(&self) -> Vec<Export> {
        locked(&self.received.exports).clone()
    }

    /// Everything that has come so far.
    pub(crate) fn spans(&self) -> Vec<Exported> {
        locked(&self.received.spans).clone()
    }

    /// The spans of an answer's trace, once there are so many.
    pub(crate) async fn trace_of(&self, answer: &Answer, spans: usize) -> Vec<Exported> {
        let trace = answer.header("traceresponse").get(3..35);
        let trace = trace.expect("the answer names its trace").to_owned();
        self.trace(&trace, spans).await
    }

    /// The spans of a trace, once there are so many.
    pub(crate) async fn trace(&self, trace: &str, spans: usize) -> Vec<Exported> {
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

/// Takes the port again, once no process that is just starting has a copy of the listener.
async fn bound(address: SocketAddr) -> TcpSocket {
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.set_reuseaddr(true).expect("a socket's option");
    eventually("the port is free", SOON, async || {
        socket.bind(address).is_ok()
    })
    .await;
    socket
}

/// Serves until it is aborted, and then closes every connection.
async fn serve(listener: TcpListener, received: Arc<Received>) {
    let router = Router::new()
        .fallback(receive)
        .with_state(Arc::clone(&received));
    let mut connections = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        if matches!(*locked(&received.manner), Manner::Resets) {
            stream.set_zero_linger().expect("a socket's option");
            continue;
        }
        let service = TowerToHyperService::new(router.clone());
        connections.spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service));
    }
}

/// Fills the queue of those who wait to be accepted, which nobody is. Whoever comes then has no
/// answer to its first packet.
async fn swallow(socket: TcpSocket) {
    let full = socket.listen(0).expect("a queue");
    let address = full.local_addr().expect("an address");
    let mut waiting = Vec::new();
    while let Ok(connected) = timeout(Duration::from_millis(200), TcpStream::connect(address)).await
    {
        waiting.push(connected.expect("a place in the queue"));
    }
    std::future::pending::<()>().await;
    drop((full, waiting));
}

async fn receive(State(received): State<Arc<Received>>, request: Request) -> Response {
    let manner = *locked(&received.manner);
    match manner {
        Manner::Silent => std::future::pending().await,
        Manner::Refuses(status) => return status.into_response(),
        _ => {}
    }
    let (head, body) = request.into_parts();
    let body = axum::body::to_bytes(body, usize::MAX).await;
    let body = decoded(&head.headers, body.expect("a body"));
    let spans = spans(ExportTraceServiceRequest::decode(body).expect("spans in protobuf"));
    let export = Export {
        path: head.uri.path().to_owned(),
        headers: head.headers,
        spans: spans.len(),
    };
    locked(&received.exports).push(export);
    locked(&received.spans).extend(spans);
    match manner {
        Manner::Slow(pause) => tokio::time::sleep(pause).await,
        Manner::Rejects(rejected_spans) => {
            let partial_success = Some(ExportTracePartialSuccess {
                rejected_spans,
                error_message: "too many".to_owned(),
            });
            let answer = ExportTraceServiceResponse { partial_success };
            return answer.encode_to_vec().into_response();
        }
        _ => {}
    }
    StatusCode::OK.into_response()
}

fn decoded(headers: &HeaderMap, body: Bytes) -> Bytes {
    if headers
        .get("content-encoding")
        .is_none_or(|encoding| encoding != "gzip")
    {
        return body;
    }
    let mut plain = Vec::new();
    let read = flate2::read::GzDecoder::new(&body[..]).read_to_end(&mut plain);
    read.expect("gzip");
    plain.into()
}

fn spans(request: ExportTraceServiceRequest) -> Vec<Exported> {
    let of_resources = request.resource_spans.into_iter();
    let spans = of_resources.flat_map(|of_resource| {
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
    spans.collect()
}
