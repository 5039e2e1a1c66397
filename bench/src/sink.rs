//! A collector that counts: it takes what OTLP exporters send over HTTP.
//!
//! It only keeps what arrives, and decodes it when asked, after the measurement: its work would be
//! the service's loss, on the same processors. That takes some hundred megabytes.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Result;
use axum::Router;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use axum::routing::post;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use prost::Message as _;
use tokio::net::TcpListener;
use tokio::runtime::{Builder, Runtime};

/// A running collector.
pub struct Sink {
    /// Where it listens.
    pub address: SocketAddr,
    bodies: Bodies,
    _runtime: Runtime,
}

/// What it has taken since it was last asked.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Taken {
    /// All of them.
    pub spans: u64,
    /// Those of requests: one a visit.
    pub servers: u64,
}

type Bodies = Arc<Mutex<Vec<Bytes>>>;

impl Sink {
    /// Starts one on a free port.
    ///
    /// # Errors
    ///
    /// What the system says.
    pub fn start() -> Result<Self> {
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        let bodies = Bodies::default();
        let router = Router::new()
            .route("/v1/traces", post(take))
            .layer(DefaultBodyLimit::disable())
            .with_state(Arc::clone(&bodies));
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0"))?;
        let address = listener.local_addr()?;
        runtime.spawn(async move { axum::serve(listener, router).await });
        Ok(Self {
            address,
            bodies,
            _runtime: runtime,
        })
    }

    /// Counts what has arrived, and forgets it.
    ///
    /// # Errors
    ///
    /// If something else than spans has arrived.
    pub fn take(&self) -> Result<Taken> {
        let bodies = std::mem::take(&mut *lock(&self.bodies));
        let mut taken = Taken::default();
        for body in bodies {
            taken.add(&ExportTraceServiceRequest::decode(body)?);
        }
        Ok(taken)
    }
}

impl Taken {
    fn add(&mut self, request: &ExportTraceServiceRequest) {
        let spans = request
            .resource_spans
            .iter()
            .flat_map(|resource| &resource.scope_spans)
            .flat_map(|scope| &scope.spans);
        for span in spans {
            self.spans += 1;
            self.servers += u64::from(span.kind == SpanKind::Server as i32);
        }
    }
}

async fn take(State(bodies): State<Bodies>, body: Bytes) -> impl IntoResponse {
    lock(&bodies).push(body);
    // An empty message says that all was taken.
    [(CONTENT_TYPE, "application/x-protobuf")]
}

fn lock(bodies: &Bodies) -> std::sync::MutexGuard<'_, Vec<Bytes>> {
    bodies.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::TcpStream;

    use opentelemetry_proto::tonic::trace::v1::{ResourceSpans, ScopeSpans, Span};

    use super::*;

    #[test]
    fn spans_that_arrive_are_counted_once() {
        let span = |kind: SpanKind| Span {
            kind: kind as i32,
            ..Span::default()
        };
        let scope = ScopeSpans {
            spans: vec![
                span(SpanKind::Server),
                span(SpanKind::Client),
                span(SpanKind::Server),
            ],
            ..ScopeSpans::default()
        };
        let request = ExportTraceServiceRequest {
            resource_spans: vec![ResourceSpans {
                scope_spans: vec![scope],
                ..ResourceSpans::default()
            }],
        };
        let sink = Sink::start().unwrap();
        let body = request.encode_to_vec();
        let mut stream = TcpStream::connect(sink.address).unwrap();
        let length = body.len();
        write!(stream, "POST /v1/traces HTTP/1.1\r\nhost: sink\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n").unwrap();
        stream.write_all(&body).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");

        let expected = Taken {
            spans: 3,
            servers: 2,
        };
        assert_eq!(sink.take().unwrap(), expected);
        assert_eq!(sink.take().unwrap(), Taken::default());
    }
}
