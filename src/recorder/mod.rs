//! One bounded queue and one writer: one commit records the visits that wait together.
//!
//! The writer takes all visits that wait, does not wait for more, and replies to a visit only after
//! the commit that records it. Near the stores one batch is in flight at a time, so a batch holds
//! the visits that arrived during the previous one. Where the network takes most of a call, the
//! next batch leaves while others are in flight: see `pace`. Must not know: HTTP.

mod pace;
mod timer;
mod turns;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, SystemTime};

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use metrics::Histogram;
use time::OffsetDateTime;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use tracing::warn;

use self::pace::{Pace, Turn};
use self::timer::Timer;
use self::turns::{Ticket, Turns};
use crate::metrics::catalog;
use crate::rates::Rates;
use crate::store::{Batch, CallError, Counter, Error, Ledger, Parent};

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
    /// In the call that counted it and in the wait for its turn; hardly anything if Redis was skipped.
    pub redis: Duration,
}

impl Timing {
    /// From the queue to the end of the batch.
    #[must_use]
    pub fn total(&self) -> Duration {
        self.queue + self.postgres + self.redis
    }
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

static OUTCOMES: LazyLock<[metrics::Counter; 6]> =
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
pub struct Writer<L, C> {
    queue: mpsc::Receiver<QueuedVisit>,
    progress: Arc<Progress>,
    rates: Arc<Rates>,
    stop: watch::Receiver<bool>,
    postgres: Arc<L>,
    redis: Arc<C>,
    pace: Pace,
    /// The order in which Redis counts the batches.
    turns: Arc<Turns>,
    /// The visits of the next batch.
    next: Visits,
    /// Empty ones, to be used again.
    spare: Vec<Visits>,
    batch_limit: usize,
    /// How long the visits of a batch took.
    durations: Vec<Duration>,
}

/// The visits of a batch.
#[derive(Debug, Default)]
struct Visits {
    queued: Vec<QueuedVisit>,
    arrivals: Vec<OffsetDateTime>,
    /// The first sampled visit, whose trace has the batch's calls.
    sampled: Option<usize>,
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

/// A batch whose calls have ended: its totals unless Postgres did not acknowledge it, and when its
/// calls began and ended.
#[derive(Debug)]
struct Ended {
    visits: Visits,
    calls: Batch,
    total: Result<i64, CallError>,
    redis: Option<i64>,
    /// How long the call to Redis took, without the wait for its turn.
    counting: Option<Duration>,
    began: Instant,
    committed: Instant,
    counted: Instant,
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
/// Timers of the runtime end at whole milliseconds. The timeout of a call to Redis, which marks the
/// store as down, must end before the recorder drops the call.
const TIMER_STEP: Duration = Duration::from_millis(2);
/// The share of that timeout for which a batch waits at most to be in line, and again for its turn.
const LONGEST_WAIT: f64 = 0.2;
/// The SQLSTATE of a statement that ran into `statement_timeout`.
const QUERY_CANCELED: &str = "57014";

/// Makes a queue for `capacity` visits, each of which gets a reply within `deadline`, and its
/// writer. Both add to `rates`.
#[must_use]
pub fn recorder<L: Ledger, C: Counter>(
    postgres: Arc<L>,
    redis: Arc<C>,
    rates: &Arc<Rates>,
    capacity: usize,
    deadline: Duration,
) -> (Recorder, Writer<L, C>) {
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
        pace: Pace::new(),
        turns: Arc::new(Turns::new()),
        next: Visits::default(),
        spare: Vec::new(),
        batch_limit: BATCH_LIMIT,
        durations: Vec::new(),
    };
    (recorder, writer)
}

impl Recorder {
    /// Records a visit that arrived at this moment. The current span is its trace.
    ///
    /// # Errors
    ///
    /// Why the visit is not known to be recorded. Unless it is [`Refusal::InDoubt`], the visit is
    /// certainly not recorded.
    pub async fn record(&self, arrived: SystemTime) -> Result<Recorded, Refusal> {
        let (reply, replied) = oneshot::channel();
        let queued = Instant::now();
        let deadline = queued + self.deadline;
        let visit = QueuedVisit {
            arrived,
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
            // The writer has ended, and the batches in flight are in doubt.
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

impl<L: Ledger, C: Counter> Writer<L, C> {
    /// Records visits until the recorder is stopped and the queue is empty.
    pub async fn run(mut self) {
        let timer = Timer::new();
        // Owned by this task, so that they end with it.
        let mut in_flight = FuturesUnordered::new();
        let mut is_queue_open = true;
        while is_queue_open || !in_flight.is_empty() {
            let turn = self.turn(in_flight.len());
            tokio::select! {
                biased;
                Some(ended) = in_flight.next() => self.end(ended),
                taken = self.queue.recv_many(&mut self.next.queued, self.batch_limit),
                    if is_queue_open && turn.is_open =>
                {
                    is_queue_open = taken > 0;
                    if let Some(visits) = self.begin() {
                        let (postgres, redis) =
                            (Arc::clone(&self.postgres), Arc::clone(&self.redis));
                        let turn = (Arc::clone(&self.turns), self.turns.leave());
                        in_flight.push(record(postgres, redis, turn, visits));
                    }
                }
                () = timer.wait_until(turn.changes), if is_queue_open => {}
                () = until_stopped(&mut self.stop), if !self.queue.is_closed() => {
                    self.queue.close();
                }
            }
        }
    }

    /// Whether the visits that wait are taken now.
    fn turn(&self, in_flight: usize) -> Turn {
        if self.postgres.availability().is_up() {
            let round_trip = self.postgres.round_trip();
            self.pace.turn(Instant::now(), in_flight, round_trip)
        } else {
            // They are refused, so they need not wait for a batch whose call has not ended.
            Turn::OPEN
        }
    }

    /// Makes a batch of the visits that were taken, if some are to be sent.
    fn begin(&mut self) -> Option<Visits> {
        let mut batch = std::mem::replace(&mut self.next, self.spare.pop().unwrap_or_default());
        self.drop_abandoned_and_late(&mut batch.queued);
        if !self.postgres.availability().is_up() {
            // While Postgres is down a visit must not wait for another timeout.
            self.refuse(&mut batch, Outcome::Failed, Refusal::Failed);
        }
        if batch.queued.is_empty() {
            self.spare.push(batch);
            return None;
        }
        batch.arrivals.clear();
        let arrivals = batch
            .queued
            .iter()
            .map(|visit| OffsetDateTime::from(visit.arrived));
        batch.arrivals.extend(arrivals);
        batch.sampled = batch.queued.iter().position(|visit| visit.parent.is_some());
        self.pace.leave(Instant::now());
        Some(batch)
    }

    /// Replies to each visit of a batch whose calls have ended.
    fn end(&mut self, mut batch: Ended) {
        batch.link_waits();
        let visits = batch.visits.queued.len();
        match &batch.total {
            Ok(total) => {
                let total = *total;
                BATCH_SIZE.record(visits as f64);
                if visits >= self.batch_limit {
                    self.batch_limit = (2 * self.batch_limit).min(BATCH_LIMIT);
                }
                let postgres = batch.committed - batch.began;
                let both = batch.counted - batch.began;
                self.pace.arrive(postgres, batch.counting, both);
                // Both at once: between two batches the counts differ only if the stores do.
                let postgres = self.postgres.availability();
                postgres.record_count(total, batch.began);
                if let Some(count) = batch.redis {
                    let redis = self.redis.availability();
                    redis.record_count(count, batch.committed);
                }
                self.acknowledge(&mut batch, total);
            }
            Err(failure) => {
                if is_timeout(&failure.error) {
                    self.batch_limit = self.batch_limit.min((visits / 2).max(1));
                }
                let (outcome, refusal) = if failure.is_in_doubt() {
                    warn!(
                        visits,
                        error = failure.error.chain(),
                        "visits in doubt: statement sent, result unknown"
                    );
                    (Outcome::InDoubt, Refusal::InDoubt)
                } else {
                    (Outcome::Failed, Refusal::Failed)
                };
                self.refuse(&mut batch.visits, outcome, refusal);
            }
        }
        self.spare.push(batch.visits);
    }

    /// Drops the visits whose client has disconnected, and the visits whose deadline has passed.
    /// Nearly all clients of those have their response already.
    fn drop_abandoned_and_late(&self, batch: &mut Vec<QueuedVisit>) {
        if let Some(last) = batch.iter().map(|visit| visit.queued).max() {
            self.progress.take(last);
        }
        let now = Instant::now();
        let mut late = 0;
        let is_over = |visit: &mut QueuedVisit| visit.deadline <= now || visit.reply.is_closed();
        for visit in batch.extract_if(.., is_over) {
            if visit.deadline <= now {
                late += 1;
                Outcome::Failed.count(1);
                // Its request's timer can be later than this clock.
                visit.reply.send(Err(Refusal::Failed)).ok();
            } else {
                Outcome::Abandoned.count(1);
            }
        }
        self.rates.add_failures(late);
    }

    /// Replies to each visit. The last visit gets the batch's totals; the others count down from
    /// them.
    fn acknowledge(&mut self, batch: &mut Ended, total: i64) {
        let outcome = if batch.redis.is_some() {
            Outcome::Ok
        } else {
            Outcome::Degraded
        };
        let batch_size = batch.visits.queued.len();
        let mut late = 0;
        for (before, visit) in (0_i64..).zip(batch.visits.queued.drain(..).rev()) {
            let recorded = Recorded {
                total: total - before,
                redis: batch.redis.map(|redis| redis - before),
                timing: Timing {
                    queue: batch.began - visit.queued,
                    postgres: batch.committed - batch.began,
                    redis: batch.counted - batch.committed,
                },
                batch_size,
            };
            let delivered = visit.reply.send(Ok(recorded)).is_ok();
            if !delivered && visit.deadline <= Instant::now() {
                late += 1;
            } else {
                self.durations.push(batch.counted - visit.queued);
            }
        }
        outcome.count(batch_size - late);
        Outcome::InDoubt.count(late);
        self.rates.add(self.durations.drain(..));
        self.rates.add_failures(late);
    }

    fn refuse(&self, batch: &mut Visits, outcome: Outcome, refusal: Refusal) {
        let visits = batch.queued.len();
        self.rates.add_failures(visits);
        let mut late = 0;
        for visit in batch.queued.drain(..) {
            let delivered = visit.reply.send(Err(refusal)).is_ok();
            late += usize::from(!delivered && visit.deadline <= Instant::now());
        }
        outcome.count(visits - late);
        // These clients got the response "in doubt" when their deadline passed.
        Outcome::InDoubt.count(late);
    }
}

/// Waits until the recorder is stopped, or gone.
async fn until_stopped(stop: &mut watch::Receiver<bool>) {
    stop.wait_for(|stop| *stop).await.ok();
}

/// Makes the calls of a batch: records it in Postgres, and then counts it in Redis.
async fn record<L: Ledger, C: Counter>(
    postgres: Arc<L>,
    redis: Arc<C>,
    (turns, ticket): (Arc<Turns>, Ticket),
    visits: Visits,
) -> Ended {
    let size = visits.queued.len();
    let first = visits.sampled.map(|first| &visits.queued[first]);
    let mut calls = Batch::new(size, first.and_then(|visit| visit.parent.clone()));
    let began = Instant::now();
    let total = postgres.record(&visits.arrivals, &mut calls).await;
    turns.reply(ticket);
    let committed = Instant::now();
    if total.as_ref().map_or_else(|failure| failure.sent, |_| true) {
        for visit in &visits.queued {
            QUEUE_WAIT.record(began - visit.queued);
        }
    }
    let (mut count, mut counting) = (None, None);
    if let Ok(total) = total
        && redis.availability().is_up()
    {
        // One after another, in the order of Postgres, so that both stores usually number visits
        // alike. The wait is part of the call's time, and `settle_time` relies on it.
        let timeout = redis.timeout();
        let limit = timeout.mul_f64(LONGEST_WAIT);
        let deadline = committed + timeout + TIMER_STEP;
        let before = total.saturating_sub_unsigned(size as u64);
        let counted = async {
            let _turn = turns.wait(ticket, before, total, limit).await;
            let began = Instant::now();
            // With less time left the increment could be cut off in flight, and count visits whose
            // response says that they are not counted.
            let has_time = began + timeout / 2 < deadline;
            if has_time && redis.availability().is_up() {
                count = redis.increment(size, &mut calls).await.ok();
                counting = count.map(|_| began.elapsed());
            }
        };
        tokio::time::timeout_at(deadline, counted).await.ok();
    }
    Ended {
        visits,
        calls,
        total,
        redis: count,
        counting,
        began,
        committed,
        counted: Instant::now(),
    }
}

impl Ended {
    /// Links the other sampled visits to the calls, which are children of the first sampled visit.
    fn link_waits(&self) {
        let Some(first) = self.visits.sampled else {
            return;
        };
        for visit in &self.visits.queued[first + 1..] {
            if let Some(parent) = &visit.parent {
                self.calls.link_wait(parent, visit.arrived);
            }
        }
    }
}

/// Whether a batch can have failed because of its size.
fn is_timeout(error: &Error) -> bool {
    matches!(error, Error::Timeout(_)) || error.code() == Some(QUERY_CANCELED)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn visits_wait_until_the_writer_has_taken_them_or_a_later_one() {
        let progress = Progress::new();
        let first = progress.started;
        let (second, third) = (
            first + Duration::from_nanos(1),
            first + Duration::from_secs(1),
        );
        assert!(progress.still_waits(first));
        progress.take(first);
        assert!(!progress.still_waits(first));
        assert!(progress.still_waits(second));
        progress.take(third);
        progress.take(second);
        for taken in [first, second, third] {
            assert!(!progress.still_waits(taken));
        }
    }
    #[test]
    fn only_a_timeout_here_or_in_the_server_blames_the_size_of_a_batch() {
        let refused = |code: &str| Error::Refused {
            code: code.to_owned(),
            source: "refused".into(),
        };
        assert!(is_timeout(&Error::Timeout(Duration::from_secs(1))));
        assert!(is_timeout(&refused(QUERY_CANCELED)));
        assert!(!is_timeout(&refused("53100")));
        assert!(!is_timeout(&Error::Connection("reset".into())));
    }
}
