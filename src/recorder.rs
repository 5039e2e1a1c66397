//! One bounded queue and one writer: one commit records the visits that wait together.
//!
//! The writer takes all visits that wait, does not wait for more, and replies to a visit only after
//! the commit that records it. So a batch holds the visits that arrived during the previous commit.
//! Must not know: HTTP.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, SystemTime};

use metrics::{Counter, Histogram};
use time::OffsetDateTime;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use tracing::warn;

use crate::metrics::catalog;
use crate::rates::Rates;
use crate::store::{Batch, Error, Parent, Postgres, Redis, Store as _};

/// A recorded visit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Recorded {
    /// The number of rows up to and including this visit's.
    pub total: i64,
    /// The counter in Redis at this visit; `None` if the visit was not counted there.
    pub redis: Option<i64>,
    /// Where its time went.
    pub timing: Timing,
    /// Visits that the same commit recorded, this one included.
    pub batch_size: usize,
}

/// Where a recorded visit's time went. The two calls are those of its batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timing {
    /// In the queue.
    pub queue: Duration,
    /// In the call that recorded it.
    pub postgres: Duration,
    /// In the call that counted it; hardly anything if Redis was skipped.
    pub redis: Duration,
}

/// Why a visit is not known to be recorded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The queue is full.
    #[error("the queue is full")]
    QueueFull,
    /// The writer has ended: by a bug, or because the drain timeout has passed.
    #[error("the service is stopping")]
    Stopping,
    /// Postgres certainly did not record the visit.
    #[error("postgres did not record the visit")]
    Failed,
    /// The visit was or can have been sent to Postgres, and it is not known whether it is recorded.
    #[error("the visit is in doubt")]
    InDoubt,
}

impl Refusal {
    /// Whether Postgres did not do what the visit needed.
    #[must_use]
    pub fn is_of_postgres(self) -> bool {
        matches!(self, Self::Failed | Self::InDoubt)
    }
}

/// How a visit ended, for the metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// Recorded in both stores.
    Ok,
    /// Recorded in Postgres, not counted in Redis.
    Degraded,
    /// Certainly not recorded: Postgres was down or refused, or its deadline passed in the queue.
    Failed,
    /// Refused before the queue: it was full, or the service was stopping.
    Shed,
    /// Its statement was sent, and the reply was lost or came after the visit's deadline.
    InDoubt,
    /// Its client disconnected before it was recorded.
    Abandoned,
}

static OUTCOMES: LazyLock<[Counter; 6]> =
    LazyLock::new(|| Outcome::ALL.map(|outcome| catalog::VISITS.with([outcome.label()])));
static QUEUE_WAIT: LazyLock<Histogram> = LazyLock::new(|| catalog::QUEUE_WAIT.with([]));
static BATCH_SIZE: LazyLock<Histogram> = LazyLock::new(|| catalog::BATCH_SIZE.with([]));

impl Outcome {
    const ALL: [Self; 6] = [
        Self::Ok,
        Self::Degraded,
        Self::Failed,
        Self::Shed,
        Self::InDoubt,
        Self::Abandoned,
    ];

    const fn label(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Degraded => "degraded",
            Self::Failed => "failed",
            Self::Shed => "shed",
            Self::InDoubt => "in_doubt",
            Self::Abandoned => "abandoned",
        }
    }

    fn count(self, visits: usize) {
        OUTCOMES[self as usize].increment(visits as u64);
    }
}

/// Hands visits to the writer. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Recorder {
    queue: mpsc::Sender<QueuedVisit>,
    deadline: Duration,
    progress: Arc<Progress>,
    rates: Arc<Rates>,
    stop: watch::Sender<bool>,
}

/// The task that records visits. It owns the queue's other end.
#[derive(Debug)]
pub struct Writer {
    queue: mpsc::Receiver<QueuedVisit>,
    progress: Arc<Progress>,
    rates: Arc<Rates>,
    stop: watch::Receiver<bool>,
    postgres: Arc<Postgres>,
    redis: Arc<Redis>,
    batch: Vec<QueuedVisit>,
    batch_limit: usize,
    arrivals: Vec<OffsetDateTime>,
    /// How long the visits of a batch took.
    durations: Vec<Duration>,
}

/// A visit in the queue.
#[derive(Debug)]
struct QueuedVisit {
    arrived: SystemTime,
    queued: Instant,
    deadline: Instant,
    /// Not the span itself, which must end with the response even if the visit still waits here.
    parent: Option<Parent>,
    reply: oneshot::Sender<Result<Recorded, Refusal>>,
}

/// A batch that was recorded: its totals, and when its calls began and ended.
#[derive(Debug)]
struct Batched {
    total: i64,
    redis: Option<i64>,
    began: Instant,
    committed: Instant,
    ended: Instant,
}

/// When the last visit that the writer took was queued. From it a request whose deadline passes
/// knows whether its visit certainly still waits: the queue is in order, and the writer publishes
/// its progress before it reads the clock to drop late visits.
#[derive(Debug)]
struct Progress {
    started: Instant,
    taken: AtomicU64,
}

impl Progress {
    fn new() -> Self {
        Self {
            started: Instant::now(),
            taken: AtomicU64::new(0),
        }
    }

    fn take(&self, queued: Instant) {
        self.taken.fetch_max(self.time(queued), Ordering::SeqCst);
    }

    fn still_waits(&self, queued: Instant) -> bool {
        self.time(queued) > self.taken.load(Ordering::SeqCst)
    }

    /// Nanoseconds since the recorder was made, plus 1.
    fn time(&self, moment: Instant) -> u64 {
        let nanoseconds = (moment - self.started).as_nanos();
        u64::try_from(nanoseconds).map_or(u64::MAX, |time| time.saturating_add(1))
    }
}

/// Maximum number of visits in a batch: large enough that it never limits throughput. A batch that
/// times out halves the limit for the next ones, and each full batch that is recorded doubles it.
const BATCH_LIMIT: usize = 4096;
/// The SQLSTATE of a statement that ran into `statement_timeout`.
const QUERY_CANCELED: &str = "57014";

/// Makes a queue for `capacity` visits, each of which gets a reply within `deadline`, and its
/// writer. Both add to `rates`.
#[must_use]
pub fn recorder(
    postgres: Arc<Postgres>,
    redis: Arc<Redis>,
    rates: &Arc<Rates>,
    capacity: usize,
    deadline: Duration,
) -> (Recorder, Writer) {
    LazyLock::force(&OUTCOMES);
    LazyLock::force(&QUEUE_WAIT);
    LazyLock::force(&BATCH_SIZE);
    catalog::QUEUE_CAPACITY.with([]).set(capacity as f64);
    let (sender, receiver) = mpsc::channel(capacity);
    let (stop, stopped) = watch::channel(false);
    let progress = Arc::new(Progress::new());
    let recorder = Recorder {
        queue: sender,
        deadline,
        progress: Arc::clone(&progress),
        rates: Arc::clone(rates),
        stop,
    };
    let writer = Writer {
        queue: receiver,
        progress,
        rates: Arc::clone(rates),
        stop: stopped,
        postgres,
        redis,
        batch: Vec::new(),
        batch_limit: BATCH_LIMIT,
        arrivals: Vec::new(),
        durations: Vec::new(),
    };
    (recorder, writer)
}

impl Recorder {
    /// Records a visit that arrives now. The current span is its trace.
    ///
    /// # Errors
    ///
    /// Why the visit is not known to be recorded. Unless it is [`Refusal::InDoubt`], the visit is
    /// certainly not recorded.
    pub async fn record(&self) -> Result<Recorded, Refusal> {
        let (reply, replied) = oneshot::channel();
        let queued = Instant::now();
        let deadline = queued + self.deadline;
        let visit = QueuedVisit {
            arrived: SystemTime::now(),
            queued,
            deadline,
            parent: Parent::current(),
            reply,
        };
        self.queue.try_send(visit).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => self.shed(Refusal::QueueFull),
            mpsc::error::TrySendError::Closed(_) => self.shed(Refusal::Stopping),
        })?;
        match tokio::time::timeout_at(deadline, replied).await {
            Ok(Ok(reply)) => reply,
            // The writer has ended, and the batch that it was recording is in doubt.
            Ok(Err(_)) if self.progress.still_waits(queued) => Err(self.shed(Refusal::Stopping)),
            Ok(Err(_)) => {
                Outcome::InDoubt.count(1);
                self.rates.add_failures(1);
                Err(Refusal::InDoubt)
            }
            // The writer will drop the visit and count it.
            Err(_) if self.progress.still_waits(queued) => Err(Refusal::Failed),
            // Its batch is in flight.
            Err(_) => Err(Refusal::InDoubt),
        }
    }

    /// Closes the queue. The writer still records the visits that wait, and then ends. Must be
    /// called once no request can add another visit.
    pub fn stop(&self) {
        self.stop.send_replace(true);
    }

    /// Publishes how many visits wait.
    pub fn report(&self) {
        let depth = self.queue.max_capacity() - self.queue.capacity();
        catalog::QUEUE_DEPTH.with([]).set(depth as f64);
    }

    /// Counts a visit that was refused before the queue.
    fn shed(&self, refusal: Refusal) -> Refusal {
        Outcome::Shed.count(1);
        self.rates.add_failures(1);
        refusal
    }
}

impl Writer {
    /// Records visits until the recorder is stopped and the queue is empty.
    pub async fn run(mut self) {
        loop {
            let taken = tokio::select! {
                biased;
                taken = self.queue.recv_many(&mut self.batch, self.batch_limit) => taken,
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

    /// Records the batch and replies to each of its visits.
    async fn flush(&mut self) {
        self.drop_abandoned_and_late();
        if self.batch.is_empty() {
            return;
        }
        if !self.postgres.availability().is_up() {
            // While Postgres is down a visit must not wait for another timeout.
            return self.refuse(Outcome::Failed, Refusal::Failed);
        }
        let visits = self.batch.len();
        self.arrivals.clear();
        self.arrivals.extend(
            self.batch
                .iter()
                .map(|visit| OffsetDateTime::from(visit.arrived)),
        );
        let sampled = self.batch.iter().position(|visit| visit.parent.is_some());
        let parent = sampled.and_then(|first| self.batch[first].parent.clone());
        let mut calls = Batch::new(visits, parent);

        let began = Instant::now();
        let recorded = self.postgres.record(&self.arrivals, &mut calls).await;
        let committed = Instant::now();
        if recorded
            .as_ref()
            .map_or_else(|failure| failure.sent, |_| true)
        {
            for visit in &self.batch {
                QUEUE_WAIT.record(began - visit.queued);
            }
        }
        let total = match recorded {
            Ok(total) => total,
            Err(failure) => {
                self.link_waits(sampled, &calls);
                if is_timeout(&failure.error) {
                    self.batch_limit = (visits / 2).max(1);
                }
                return if failure.is_in_doubt() {
                    warn!(
                        visits,
                        error = failure.error.chain(),
                        "visits in doubt: statement sent, result unknown"
                    );
                    self.refuse(Outcome::InDoubt, Refusal::InDoubt);
                } else {
                    self.refuse(Outcome::Failed, Refusal::Failed);
                };
            }
        };
        BATCH_SIZE.record(visits as f64);
        if visits == self.batch_limit {
            self.batch_limit = (2 * self.batch_limit).min(BATCH_LIMIT);
        }
        let redis = if self.redis.availability().is_up() {
            self.redis.increment(visits, &mut calls).await.ok()
        } else {
            None
        };
        self.link_waits(sampled, &calls);
        // Both at once: between two batches the counts differ only if the stores do.
        self.postgres.availability().record_count(total);
        if let Some(redis) = redis {
            self.redis.availability().record_count(redis);
        }
        self.acknowledge(&Batched {
            total,
            redis,
            began,
            committed,
            ended: Instant::now(),
        });
    }

    /// Drops the visits whose client has disconnected, and the visits whose deadline has passed,
    /// whose clients have their response already.
    fn drop_abandoned_and_late(&mut self) {
        if let Some(last) = self.batch.iter().map(|visit| visit.queued).max() {
            self.progress.take(last);
        }
        let now = Instant::now();
        let mut late = 0;
        self.batch.retain(|visit| {
            let outcome = if visit.deadline <= now {
                late += 1;
                Outcome::Failed
            } else if visit.reply.is_closed() {
                Outcome::Abandoned
            } else {
                return true;
            };
            outcome.count(1);
            false
        });
        self.rates.add_failures(late);
    }

    /// Replies to each visit. The last visit gets the batch's totals; the others count down from
    /// them.
    fn acknowledge(&mut self, batch: &Batched) {
        let outcome = if batch.redis.is_some() {
            Outcome::Ok
        } else {
            Outcome::Degraded
        };
        let batch_size = self.batch.len();
        let mut late = 0;
        for (before, visit) in (0_i64..).zip(self.batch.drain(..).rev()) {
            let recorded = Recorded {
                total: batch.total - before,
                redis: batch.redis.map(|redis| redis - before),
                timing: Timing {
                    queue: batch.began - visit.queued,
                    postgres: batch.committed - batch.began,
                    redis: batch.ended - batch.committed,
                },
                batch_size,
            };
            let delivered = visit.reply.send(Ok(recorded)).is_ok();
            if !delivered && visit.deadline <= Instant::now() {
                late += 1;
            } else {
                self.durations.push(batch.ended - visit.queued);
            }
        }
        outcome.count(batch_size - late);
        Outcome::InDoubt.count(late);
        self.rates.add(self.durations.drain(..));
        self.rates.add_failures(late);
    }

    fn refuse(&mut self, outcome: Outcome, refusal: Refusal) {
        let visits = self.batch.len();
        self.rates.add_failures(visits);
        let mut late = 0;
        for visit in self.batch.drain(..) {
            let delivered = visit.reply.send(Err(refusal)).is_ok();
            late += usize::from(!delivered && visit.deadline <= Instant::now());
        }
        outcome.count(visits - late);
        // These clients got the response "in doubt" when their deadline passed.
        Outcome::InDoubt.count(late);
    }

    /// Links the other sampled visits to the calls, which are children of the first sampled visit.
    fn link_waits(&self, first: Option<usize>, calls: &Batch) {
        let Some(first) = first else { return };
        for visit in &self.batch[first + 1..] {
            if let Some(parent) = &visit.parent {
                calls.link_wait(parent, visit.arrived);
            }
        }
    }
}

/// Whether a batch can have failed because of its size.
fn is_timeout(error: &Error) -> bool {
    matches!(error, Error::Timeout(_)) || error.code() == Some(QUERY_CANCELED)
}
