//! A collector that keeps the spans that it receives and can misbehave on request: OTLP over HTTP,
//! encoded as protobuf.
//!
//! It stores requests undecoded and decodes them when a test reads them, because it shares the
//! processors with the service. It panics if the machine fails, as a test does.

use std::io::Read as _;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{Request, State};
use axum::http::header::{CONTENT_ENCODING, CONTENT_TYPE};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse as _, Response};
use flate2::read::GzDecoder;
use hyper::server::conn::http1;
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTracePartialSuccess, ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::KeyValue;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::Span;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use prost::Message as _;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;

use crate::wait::{SOON, eventually, locked};

/// A collector. It ends with the runtime that started it.
#[derive(Debug)]
pub struct Collector {
    /// Where it listens.
    pub address: SocketAddr,
    inbox: Arc<Inbox>,
    serving: Mutex<JoinHandle<()>>,
}

/// How a collector handles requests.
#[derive(Debug, Clone, Copy)]
pub enum Behaviour {
    /// Keeps the spans.
    Takes,
    /// Keeps the spans, and responds after a delay.
    Slow(Duration),
    /// Keeps the spans, and reports this many of each request as rejected.
    Rejects(i64),
    /// Responds with this status.
    Refuses(StatusCode),
    /// Reads the request and never responds.
    Silent,
    /// Drops connection attempts without a reply.
    Swallows,
    /// Resets each connection.
    Resets,
    /// Does not listen.
    Absent,
}

/// A span with its resource and scope.
#[derive(Clone, Debug)]
pub struct ExportedSpan {
    /// The span itself.
    pub span: Span,
    /// The attributes of its resource.
    pub resource: Arc<Vec<KeyValue>>,
    /// The schema of its scope.
    pub schema_url: String,
}

/// A request that the collector kept.
#[derive(Clone, Debug)]
pub struct Export {
    /// The path of the request.
    pub path: String,
    /// The headers of the request.
    pub headers: HeaderMap,
    /// The number of spans in the request.
    pub spans: usize,
}

#[derive(Debug)]
struct Inbox {
    behaviour: Mutex<Behaviour>,
    /// Requests that have not been decoded yet.
    unread: Mutex<Vec<(String, HeaderMap, Bytes)>>,
    read: Mutex<(Vec<Export>, Vec<ExportedSpan>)>,
}

impl Collector {
    /// Starts a collector that keeps spans, on a free port.
    pub async fn start() -> Self {
        let inbox = Arc::new(Inbox {
            behaviour: Mutex::new(Behaviour::Takes),
            unread: Mutex::default(),
            read: Mutex::default(),
        });
        // An address that nothing else uses, so that the port is still free after an absence.
        let listener = TcpListener::bind(("127.0.0.2", 0)).await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let serving = tokio::spawn(serve(listener, Arc::clone(&inbox)));
        Self {
            address,
            inbox,
            serving: Mutex::new(serving),
        }
    }

    /// The value of `OTEL_EXPORTER_OTLP_ENDPOINT`.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Closes all connections and changes the collector's behaviour.
    pub async fn change_to(&self, behaviour: Behaviour) {
        *locked(&self.inbox.behaviour) = behaviour;
        let nothing = tokio::spawn(std::future::ready(()));
        let served = std::mem::replace(&mut *locked(&self.serving), nothing);
        served.abort();
        served.await.ok();
        let serving = match behaviour {
            Behaviour::Absent => return,
            Behaviour::Swallows => tokio::spawn(swallow(bind_again(self.address).await)),
            _ => {
                let socket = bind_again(self.address).await;
                let listener = socket.listen(1024).expect("the port again");
                tokio::spawn(serve(listener, Arc::clone(&self.inbox)))
            }
        };
        *locked(&self.serving) = serving;
    }

    /// All requests that the collector has kept so far.
    pub fn exports(&self) -> Vec<Export> {
        self.inbox.read_all();
        locked(&self.inbox.read).0.clone()
    }

    /// All spans that have arrived so far.
    pub fn spans(&self) -> Vec<ExportedSpan> {
        self.inbox.read_all();
        locked(&self.inbox.read).1.clone()
    }

    /// Counts the server spans (one per visit) of the requests that no test has read, and discards
    /// all requests.
    pub fn take_server_spans(&self) -> usize {
        let unread = std::mem::take(&mut *locked(&self.inbox.unread));
        *locked(&self.inbox.read) = (Vec::new(), Vec::new());
        let exports = unread.into_iter();
        let spans = exports.flat_map(|(_, headers, body)| decode(&headers, body));
        spans
            .filter(|exported| exported.span.kind == SpanKind::Server as i32)
            .count()
    }
}

impl Inbox {
    fn read_all(&self) {
        let unread = std::mem::take(&mut *locked(&self.unread));
        for (path, headers, body) in unread {
            let (exports, all) = &mut *locked(&self.read);
            let before = all.len();
            all.extend(decode(&headers, body));
            exports.push(Export {
                path,
                headers,
                spans: all.len() - before,
            });
        }
    }
}

impl ExportedSpan {
    /// The value of a text attribute.
    pub fn text(&self, key: &str) -> Option<&str> {
        text(&self.span.attributes, key)
    }

    /// The value of an integer attribute.
    pub fn integer(&self, key: &str) -> Option<i64> {
        match value(&self.span.attributes, key)? {
            Value::IntValue(integer) => Some(*integer),
            _ => None,
        }
    }

    /// The names of its attributes, in order.
    pub fn keys(&self) -> Vec<&str> {
        let attributes = self.span.attributes.iter();
        let mut keys: Vec<_> = attributes.map(|attribute| &*attribute.key).collect();
        keys.sort_unstable();
        keys
    }
}

/// The only span with this name.
pub fn named<'a>(spans: &'a [ExportedSpan], name: &str) -> &'a ExportedSpan {
    let mut found = spans.iter().filter(|exported| exported.span.name == name);
    match (found.next(), found.next()) {
        (Some(one), None) => one,
        _ => panic!("not exactly one {name:?} in {spans:?}"),
    }
}

/// The value of a text attribute.
pub fn text<'a>(attributes: &'a [KeyValue], key: &str) -> Option<&'a str> {
    match value(attributes, key)? {
        Value::StringValue(text) => Some(text),
        _ => None,
    }
}

/// An id in hexadecimal.
pub fn hex(id: &[u8]) -> String {
    id.iter()
        .fold(String::new(), |hex, byte| format!("{hex}{byte:02x}"))
}

fn value<'a>(attributes: &'a [KeyValue], key: &str) -> Option<&'a Value> {
    let attribute = attributes.iter().find(|attribute| attribute.key == key)?;
    attribute.value.as_ref()?.value.as_ref()
}

/// Binds the port again. A process that is just starting can hold a copy of the old listener for a
/// moment.
async fn bind_again(address: SocketAddr) -> TcpSocket {
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.set_reuseaddr(true).expect("a socket's option");
    eventually("the port is free", SOON, async || {
        socket.bind(address).is_ok()
    })
    .await;
    socket
}

/// Serves until the task is aborted, which closes every connection.
async fn serve(listener: TcpListener, inbox: Arc<Inbox>) {
    let router = Router::new()
        .fallback(receive)
        .with_state(Arc::clone(&inbox));
    let mut connections = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        if matches!(*locked(&inbox.behaviour), Behaviour::Resets) {
            stream.set_zero_linger().expect("a socket's option");
            continue;
        }
        let service = TowerToHyperService::new(router.clone());
        connections.spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service));
    }
}

/// Fills the accept queue and accepts no connection. A later client gets no reply to its SYN.
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

async fn receive(State(inbox): State<Arc<Inbox>>, request: Request) -> Response {
    let behaviour = *locked(&inbox.behaviour);
    match behaviour {
        Behaviour::Silent => std::future::pending().await,
        Behaviour::Refuses(status) => return status.into_response(),
        _ => {}
    }
    let (parts, body) = request.into_parts();
    let body = axum::body::to_bytes(body, usize::MAX).await;
    let export = (
        parts.uri.path().to_owned(),
        parts.headers,
        body.expect("a body"),
    );
    locked(&inbox.unread).push(export);
    let mut response = ExportTraceServiceResponse::default();
    match behaviour {
        Behaviour::Slow(pause) => tokio::time::sleep(pause).await,
        Behaviour::Rejects(rejected_spans) => {
            response.partial_success = Some(ExportTracePartialSuccess {
                rejected_spans,
                error_message: "too many".to_owned(),
            });
        }
        _ => {}
    }
    // An empty message acknowledges all spans.
    let content_type = [(CONTENT_TYPE, "application/x-protobuf")];
    (content_type, response.encode_to_vec()).into_response()
}

/// The spans of a request.
fn decode(headers: &HeaderMap, body: Bytes) -> impl Iterator<Item = ExportedSpan> + use<> {
    let encoding = headers.get(CONTENT_ENCODING);
    let body = if encoding.is_some_and(|encoding| encoding == "gzip") {
        let mut plain = Vec::new();
        let read = GzDecoder::new(&body[..]).read_to_end(&mut plain);
        read.expect("gzip");
        plain.into()
    } else {
        body
    };
    let request = ExportTraceServiceRequest::decode(body).expect("spans in protobuf");
    let resource_spans = request.resource_spans.into_iter();
    resource_spans.flat_map(|group| {
        let resource = Arc::new(group.resource.unwrap_or_default().attributes);
        group.scope_spans.into_iter().flat_map(move |scope| {
            let resource = Arc::clone(&resource);
            scope.spans.into_iter().map(move |span| ExportedSpan {
                span,
                resource: Arc::clone(&resource),
                schema_url: scope.schema_url.clone(),
            })
        })
    })
}

#[cfg(test)]
mod tests {
    use opentelemetry_proto::tonic::trace::v1::{ResourceSpans, ScopeSpans};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    #[tokio::test]
    async fn server_spans_that_arrive_are_counted_once() {
        let span = |kind: SpanKind| Span {
            kind: kind as i32,
            ..Span::default()
        };
        let kinds = [SpanKind::Server, SpanKind::Client, SpanKind::Server];
        let scope = ScopeSpans {
            spans: kinds.map(span).to_vec(),
            ..ScopeSpans::default()
        };
        let request = ExportTraceServiceRequest {
            resource_spans: vec![ResourceSpans {
                scope_spans: vec![scope],
                ..ResourceSpans::default()
            }],
        };
        let collector = Collector::start().await;
        let body = request.encode_to_vec();
        let mut stream = TcpStream::connect(collector.address).await.unwrap();
        let request_headers = format!(
            "POST /v1/traces HTTP/1.1\r\nhost: lab\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        let request = [request_headers.as_bytes(), &body].concat();
        stream.write_all(&request).await.unwrap();
        let mut response = String::new();
        stream.read_to_string(&mut response).await.unwrap();
        assert!(response.starts_with("HTTP/1.1 200"), "{response}");

        assert_eq!(collector.take_server_spans(), 2);
        assert_eq!(collector.take_server_spans(), 0);
    }
}
