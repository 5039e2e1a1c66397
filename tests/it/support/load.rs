//! Clients that visit at once, and what they were told.

use std::net::SocketAddr;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::{Duration, Instant};

use axum::body::Body;
use chaos::history::{self, History, Outcome, Verdict, judge};
use http::Request;
use http::header::{HOST, HeaderMap, RETRY_AFTER};
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use time::OffsetDateTime;
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use super::{Service, World};

/// One visit as its client saw it.
#[derive(Debug, Clone)]
pub(crate) struct Visit {
    /// Which client it was.
    pub(crate) client: usize,
    /// Which of the services was asked.
    replica: usize,
    /// When it was sent.
    pub(crate) sent: Instant,
    /// The same moment by the system's clock.
    sent_at: OffsetDateTime,
    /// How long the answer took.
    pub(crate) took: Duration,
    /// The status, or 0 if there was no answer.
    pub(crate) status: u16,
    /// Whether the answer names a trace.
    pub(crate) sampled: bool,
    /// Whether the answer asks the client to try again: the visit is certainly not recorded.
    retry_after: bool,
    /// The answer's fields.
    pub(crate) json: Value,
}

impl Visit {
    /// The number in Postgres of a visit that was acknowledged.
    pub(crate) fn total(&self) -> Option<i64> {
        self.json["total_registros_db"].as_i64()
    }

    /// The number in Redis, if there is one.
    pub(crate) fn redis(&self) -> Option<i64> {
        self.json["visitas_redis"].as_i64()
    }

    /// When its answer was read.
    pub(crate) fn answered(&self) -> Instant {
        self.sent + self.took
    }

    /// The same visit for the judge of histories.
    fn judged(&self) -> history::Visit {
        history::Visit {
            client: self.client,
            replica: self.replica,
            sent: self.sent,
            sent_at: microseconds(self.sent_at),
            ended: self.answered(),
            outcome: match self.status {
                200 => Outcome::Recorded,
                503 if self.retry_after => Outcome::Refused,
                503 => Outcome::InDoubt,
                0 => Outcome::Unanswered,
                status => Outcome::Wrong(status),
            },
            total: self.total(),
            redis: self.redis(),
        }
    }
}

/// What the judge of histories finds in all visits that were made in a world, in which Redis was
/// down between two lives at these times.
pub(crate) async fn verdict(
    world: &World,
    visits: &[Visit],
    redis_outages: &[Range<Instant>],
) -> Verdict {
    let moments = "select data from visitas order by id";
    let moments: Vec<OffsetDateTime> = sqlx::query_scalar(moments)
        .fetch_all(&mut world.session().await)
        .await
        .expect("the rows");
    let rows: Vec<_> = moments.into_iter().map(microseconds).collect();
    let visits: Vec<_> = visits.iter().map(Visit::judged).collect();
    judge(History {
        visits: &visits,
        rows: &rows,
        redis_outages,
    })
}

fn microseconds(moment: OffsetDateTime) -> i64 {
    i64::try_from(moment.unix_timestamp_nanos() / 1000).expect("a moment of this age")
}

/// Clients that go on visiting until they are stopped.
pub(crate) struct Load {
    going: Arc<AtomicBool>,
    clients: JoinSet<Vec<Visit>>,
}

impl Load {
    /// Starts clients, each of which keeps one connection and visits again once it is answered.
    pub(crate) fn start(services: &[&Service], clients: usize) -> Self {
        Self::start_until(services, clients, i64::MAX)
    }

    fn start_until(services: &[&Service], clients: usize, visits: i64) -> Self {
        let going = Arc::new(AtomicBool::new(true));
        let left = Arc::new(AtomicI64::new(visits));
        let mut set = JoinSet::new();
        for client in 0..clients {
            let replica = client % services.len();
            let mut visitor = Visitor::of(services[replica], replica);
            let (going, left) = (Arc::clone(&going), Arc::clone(&left));
            set.spawn(async move {
                let mut visits = Vec::new();
                while going.load(Ordering::Relaxed) && left.fetch_sub(1, Ordering::Relaxed) > 0 {
                    let visit = visitor.visit(client).await;
                    if visit.status != 200 {
                        // A refusal is quick; asking again at once would only heat the machine.
                        tokio::time::sleep(Duration::from_millis(20)).await;
                    }
                    visits.push(visit);
                }
                visits
            });
        }
        Self {
            going,
            clients: set,
        }
    }

    /// Lets every client finish its last visit and returns all of them.
    pub(crate) async fn stop(self) -> Vec<Visit> {
        self.going.store(false, Ordering::Relaxed);
        self.finish().await
    }

    async fn finish(mut self) -> Vec<Visit> {
        let mut visits = Vec::new();
        while let Some(client) = self.clients.join_next().await {
            visits.extend(client.expect("a client does not panic"));
        }
        visits
    }
}

/// Makes so many visits from so many clients and returns all of them.
pub(crate) async fn visits(services: &[&Service], clients: usize, count: i64) -> Vec<Visit> {
    Load::start_until(services, clients, count).finish().await
}

/// One client with one connection, which it opens again when it has ended. It is hyper's own: a
/// client with more comfort would be the slower half of a test.
struct Visitor {
    address: SocketAddr,
    replica: usize,
    connection: Option<SendRequest<Body>>,
}

impl Visitor {
    fn of(service: &Service, replica: usize) -> Self {
        Self {
            address: service.address,
            replica,
            connection: None,
        }
    }

    async fn visit(&mut self, client: usize) -> Visit {
        let (sent, sent_at) = (Instant::now(), OffsetDateTime::now_utc());
        let (status, headers, json) = self.ask().await.unwrap_or_else(|_| {
            self.connection = None;
            (0, HeaderMap::new(), Value::Null)
        });
        Visit {
            client,
            replica: self.replica,
            sent,
            sent_at,
            took: sent.elapsed(),
            status,
            sampled: headers.contains_key("traceresponse"),
            retry_after: headers.contains_key(RETRY_AFTER),
            json,
        }
    }

    async fn ask(&mut self) -> anyhow::Result<(u16, HeaderMap, Value)> {
        if self.connection.as_ref().is_none_or(SendRequest::is_closed) {
            let stream = TcpStream::connect(self.address).await?;
            stream.set_nodelay(true)?;
            let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
            tokio::spawn(connection);
            self.connection = Some(sender);
        }
        let connection = self.connection.as_mut().expect("opened above");
        let request = Request::get("/")
            .header(HOST, "visitas")
            .body(Body::empty())?;
        connection.ready().await?;
        let answer = connection.send_request(request).await?;
        let status = answer.status().as_u16();
        let headers = answer.headers().clone();
        let body = axum::body::to_bytes(Body::new(answer.into_body()), 1024).await?;
        Ok((status, headers, serde_json::from_slice(&body)?))
    }
}

/// Whether these are exactly the numbers from 1 to their count.
pub(crate) fn are_one_to_n(numbers: impl Iterator<Item = Option<i64>>) -> bool {
    let mut numbers: Vec<_> = numbers.collect();
    numbers.sort_unstable();
    (1..)
        .map(Some)
        .zip(&numbers)
        .all(|(expected, number)| expected == *number)
}
