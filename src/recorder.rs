//! One bounded queue and one writer: visits that wait together are recorded by one commit.
//!
//! The writer takes whatever waits, never waits for more, and answers a visit only after the
//! commit that holds it. Batches therefore grow exactly as the disk needs them to. It knows the
//! two stores and no HTTP.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use time::OffsetDateTime;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use tracing::{Span, warn};

use crate::store::{Postgres, Redis, Store as _};
use crate::telemetry::call::Trace;
use crate::telemetry::metric::{self, Outcome};

/// What a visit is told once it is recorded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Recorded {
    /// The number of rows, this visit's included, none that came after it.
    pub total: i64,
    /// The counter in Redis, likewise; `None` where the visit was not counted there.
    pub redis: Option<i64>,
}

/// Why a visit is not known to be recorded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// As many visits as may wait are waiting.
    #[error("the queue is full")]
    QueueFull,
    /// The writer has ended: by a bug, or because the time to drain is over.
    #[error("the service is stopping")]
    Stopping,
    /// Postgres did not take it, or not within its deadline.
    #[error("postgres did not record the visit")]
    Failed,
    /// Its deadline passed before it was known what became of it.
    #[error("the visit's deadline passed")]
    Late,
}

/// Hands visits to the writer. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Recorder {
    queue: mpsc::Sender<Waiting>,
    deadline: Duration,
    stop: watch::Sender<bool>,
}

/// The task that records visits. It owns the queue's other end.
#[derive(Debug)]
pub struct Writer {
    queue: mpsc::Receiver<Waiting>,
    stop: watch::Receiver<bool>,
    postgres: Arc<Postgres>,
    redis: Arc<Redis>,
    batch: Vec<Waiting>,
    arrivals: Vec<OffsetDateTime>,
}

/// A visit in the queue.
#[derive(Debug)]
struct Waiting {
    arrived: SystemTime,
    queued: Instant,
    deadline: Instant,
    span: Span,
    answer: oneshot::Sender<Result<Recorded, Refusal>>,
}

/// The most visits that one commit takes: enough that no disk is the slower for it, and few
/// enough that its statement stays well within its deadline.
const BATCH_LIMIT: usize = 4096;

/// A queue for `capacity` visits, each of which is answered within `deadline`, and its writer.
#[must_use]
pub fn recorder(
    postgres: Arc<Postgres>,
    redis: Arc<Redis>,
    capacity: usize,
    deadline: Duration,
) -> (Recorder, Writer) {
    metric::queue_capacity(capacity);
    let (sender, receiver) = mpsc::channel(capacity);
    let (stop, stopped) = watch::channel(false);
    let recorder = Recorder {
        queue: sender,
        deadline,
        stop,
    };
    let writer = Writer {
        queue: receiver,
        stop: stopped,
        postgres,
        redis,
        batch: Vec::new(),
        arrivals: Vec::new(),
    };
    (recorder, writer)
}

impl Recorder {
    /// Records a visit that arrives now. The current span is its trace.
    ///
    /// # Errors
    ///
    /// Why the visit is not known to be recorded. After a full queue, a stop or a refusal by
    /// Postgres it certainly is not.
    pub async fn record(&self) -> Result<Recorded, Refusal> {
        let (answer, answered) = oneshot::channel();
        let queued = Instant::now();
        let deadline = queued + self.deadline;
        let visit = Waiting {
            arrived: SystemTime::now(),
            queued,
            deadline,
            span: Span::current(),
            answer,
        };
        self.queue.try_send(visit).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => shed(Refusal::QueueFull),
            mpsc::error::TrySendError::Closed(_) => shed(Refusal::Stopping),
        })?;
        match tokio::time::timeout_at(deadline, answered).await {
            Ok(Ok(answer)) => answer,
            // The writer has ended with the visit in its hands, so nothing is known of it.
            Ok(Err(_)) => {
                metric::visits(Outcome::InDoubt, 1);
                Err(Refusal::Late)
            }
            Err(_) => Err(Refusal::Late),
        }
    }

    /// Closes the queue, once no request can bring another visit. Those that wait are still
    /// recorded; then the writer ends.
    pub fn stop(&self) {
        self.stop.send_replace(true);
    }

    /// How many visits wait.
    #[must_use]
    pub fn depth(&self) -> usize {
        self.queue.max_capacity() - self.queue.capacity()
    }
}

/// Counts a visit that was not taken.
fn shed(refusal: Refusal) -> Refusal {
    metric::visits(Outcome::Shed, 1);
    refusal
}

impl Writer {
    /// Records visits until the recorder is stopped and the queue is empty.
    pub async fn run(mut self) {
        loop {
            let taken = tokio::select! {
                biased;
                taken = self.queue.recv_many(&mut self.batch, BATCH_LIMIT) => taken,
                _ = self.stop.wait_for(|stop| *stop), if !self.queue.is_closed() => {
                    self.queue.close();
                    continue;
                }
            };
            if taken == 0 {
                return;
            }
            self.flush().await;
        }
    }

    /// Records the batch and answers each of its visits.
    async fn flush(&mut self) {
        self.drop_abandoned_and_late();
        if self.batch.is_empty() {
            return;
        }
        if !self.postgres.state().is_up() {
            // A visit that finds Postgres down does not wait for what the last one waited for.
            return self.refuse(Outcome::Failed);
        }
        let visits = self.batch.len();
        self.arrivals.clear();
        self.arrivals.extend(
            self.batch
                .iter()
                .map(|visit| OffsetDateTime::from(visit.arrived)),
        );
        metric::batch_size(visits);
        let sampled = self.batch.iter().position(|visit| !visit.span.is_none());
        let parent = sampled.map(|first| self.batch[first].span.clone());
        let mut trace = Trace::of(parent.as_ref());

        let total = match self.postgres.record(&self.arrivals, &mut trace).await {
            Ok(total) => total,
            Err(failure) => {
                self.link_waits(sampled, &trace);
                return if failure.in_doubt {
                    warn!(
                        visits,
                        error = failure.error.chain(),
                        "visits are in doubt: their statement was sent and its end is not known"
                    );
                    self.refuse(Outcome::InDoubt);
                } else {
                    self.refuse(Outcome::Failed);
                };
            }
        };
        let redis = if self.redis.state().is_up() {
            self.redis.increment(visits, &mut trace).await.ok()
        } else {
            None
        };
        self.link_waits(sampled, &trace);
        drop(parent);
        self.acknowledge(total, redis);
    }

    /// A client that has gone does not want its visit; one whose deadline has passed has been
    /// told that it has none.
    fn drop_abandoned_and_late(&mut self) {
        let now = Instant::now();
        self.batch.retain(|visit| {
            let outcome = if visit.deadline <= now {
                Outcome::Failed
            } else if visit.answer.is_closed() {
                Outcome::Abandoned
            } else {
                metric::queue_wait(now - visit.queued);
                return true;
            };
            metric::visits(outcome, 1);
            false
        });
    }

    /// The last visit has the batch's totals; the others count down from them.
    fn acknowledge(&mut self, total: i64, redis: Option<i64>) {
        let outcome = if redis.is_some() {
            Outcome::Ok
        } else {
            Outcome::Degraded
        };
        let visits = self.batch.len();
        let mut late = 0;
        for (before, visit) in (0_i64..).zip(self.batch.drain(..).rev()) {
            // The span ends with the answer, so it must not be held beyond it.
            drop(visit.span);
            let recorded = Recorded {
                total: total - before,
                redis: redis.map(|redis| redis - before),
            };
            let told = visit.answer.send(Ok(recorded)).is_ok();
            if !told && visit.deadline <= Instant::now() {
                late += 1;
            }
        }
        metric::visits(outcome, visits - late);
        metric::visits(Outcome::InDoubt, late);
    }

    fn refuse(&mut self, outcome: Outcome) {
        metric::visits(outcome, self.batch.len());
        for visit in self.batch.drain(..) {
            drop(visit.span);
            // A client that has gone is not told.
            visit.answer.send(Err(Refusal::Failed)).ok();
        }
    }

    /// The calls are children of the first sampled visit; the others point to them.
    fn link_waits(&self, first: Option<usize>, trace: &Trace<'_>) {
        let Some(first) = first else { return };
        for visit in &self.batch[first + 1..] {
            if !visit.span.is_none() {
                trace.link_wait(&visit.span, visit.arrived);
            }
        }
    }
}
