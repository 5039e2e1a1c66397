//! Every metric the service exports: the one place that spells a name, a help text, a unit, a
//! label or a bucket.
//!
//! Handles are looked up once and kept, since looking one up costs more than using it. Nothing
//! here knows why a metric changes.

pub mod openmetrics;

use std::collections::HashSet;
use std::fmt::Write as _;
use std::sync::{LazyLock, PoisonError, RwLock};
use std::time::Duration;

use metrics::{Counter, Gauge, Histogram, Key, Label, Unit};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use opentelemetry::trace::SpanContext;

use self::openmetrics::{Exemplars, Format};

/// Names, units, help texts and buckets.
mod name {
    pub(super) const HTTP_DURATION: &str = "http_server_request_duration_seconds";
    pub(super) const HTTP_ACTIVE: &str = "http_server_active_requests";
    pub(super) const CONNECTIONS: &str = "visitas_http_connections";
    pub(super) const CONNECTIONS_MAX: &str = "visitas_http_connections_max";
    pub(super) const REJECTED: &str = "visitas_http_requests_rejected_total";
    pub(super) const CALL_DURATION: &str = "db_client_operation_duration_seconds";
    pub(super) const CALLS: &str = "visitas_store_calls_total";
    pub(super) const VISITS: &str = "visitas_visits_total";
    pub(super) const QUEUE_WAIT: &str = "visitas_queue_wait_seconds";
    pub(super) const BATCH_SIZE: &str = "visitas_batch_size";
    pub(super) const QUEUE_DEPTH: &str = "visitas_queue_depth";
    pub(super) const QUEUE_CAPACITY: &str = "visitas_queue_capacity";
    pub(super) const ROWS: &str = "visitas_rows";
    pub(super) const REDIS_VISITS: &str = "visitas_redis_visits";
    pub(super) const DRIFT: &str = "visitas_store_drift";
    pub(super) const RECOUNT_DUE: &str = "visitas_recount_due";
    pub(super) const DEPENDENCY_UP: &str = "visitas_dependency_up";
    pub(super) const POOL_COUNT: &str = "db_client_connection_count";
    pub(super) const POOL_MAX: &str = "db_client_connection_max";
    pub(super) const POOL_PENDING: &str = "db_client_connection_pending_requests";
    pub(super) const POOL_TIMEOUTS: &str = "db_client_connection_timeouts_total";
    pub(super) const POOL_WAIT: &str = "db_client_connection_wait_time_seconds";
    pub(super) const SPANS_EXPORTED: &str = "otel_sdk_exporter_span_exported_total";
    pub(super) const SPANS_PROCESSED: &str = "otel_sdk_processor_span_processed_total";
    pub(super) const PANICS: &str = "visitas_panics_total";
    pub(super) const LOG_LINES_DROPPED: &str = "visitas_log_lines_dropped_total";
    pub(super) const BUILD_INFO: &str = "visitas_build_info";
    pub(super) const CPU_SECONDS: &str = "process_cpu_seconds_total";
    pub(super) const OPEN_FDS: &str = "process_open_fds";
    pub(super) const MAX_FDS: &str = "process_max_fds";
    pub(super) const RESIDENT_MEMORY: &str = "process_resident_memory_bytes";
    pub(super) const VIRTUAL_MEMORY: &str = "process_virtual_memory_bytes";
    pub(super) const START_TIME: &str = "process_start_time_seconds";
    pub(super) const THREADS: &str = "process_threads";
    pub(super) const WORKERS: &str = "tokio_workers";
    pub(super) const ALIVE_TASKS: &str = "tokio_alive_tasks";
    pub(super) const GLOBAL_QUEUE_DEPTH: &str = "tokio_global_queue_depth";
    pub(super) const BUSY_SECONDS: &str = "tokio_busy_seconds_total";
}

const HTTP_BUCKETS: &[f64] = &[
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0,
    7.5, 10.0,
];
const STORE_BUCKETS: &[f64] = &[
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0,
];
const BATCH_BUCKETS: &[f64] = &[
    1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0,
];

const COUNTERS: &[(&str, &str)] = &[
    (
        name::CALLS,
        "Calls to a store, by how they ended; one call may record many visits.",
    ),
    (name::VISITS, "Visits, by what became of them."),
    (
        name::REJECTED,
        "Requests rejected before they reached a route, by reason.",
    ),
    (name::POOL_TIMEOUTS, "Connection checkouts that timed out."),
    (
        name::SPANS_EXPORTED,
        "Spans that the collector took, or that were lost on the way to it.",
    ),
    (
        name::SPANS_PROCESSED,
        "Spans handed to the exporter, or dropped because its queue was full.",
    ),
    (
        name::PANICS,
        "Panics; each is a bug, and a line of the log says where.",
    ),
    (
        name::LOG_LINES_DROPPED,
        "Log lines dropped because stdout was blocked or closed.",
    ),
];

const GAUGES: &[(&str, Unit, &str)] = &[
    (name::HTTP_ACTIVE, Unit::Count, "Requests being answered."),
    (name::CONNECTIONS, Unit::Count, "Open client connections."),
    (
        name::CONNECTIONS_MAX,
        Unit::Count,
        "Client connections that can be open at once, as far as the file limit allows.",
    ),
    (
        name::QUEUE_DEPTH,
        Unit::Count,
        "Visits waiting to be recorded.",
    ),
    (
        name::QUEUE_CAPACITY,
        Unit::Count,
        "Visits that may wait to be recorded.",
    ),
    (
        name::ROWS,
        Unit::Count,
        "Rows of the table visitas; NaN while unknown.",
    ),
    (
        name::REDIS_VISITS,
        Unit::Count,
        "Value of the Redis key visitas_home; NaN while unknown.",
    ),
    (
        name::DRIFT,
        Unit::Count,
        "Rows minus the value in Redis, as far as visits in flight cannot explain it; NaN while either is unknown.",
    ),
    (
        name::RECOUNT_DUE,
        Unit::Count,
        "Whether data was loaded in a way that can have led the count astray (1) or not (0).",
    ),
    (
        name::DEPENDENCY_UP,
        Unit::Count,
        "Whether a store does what a visit needs (1) or not (0).",
    ),
    (
        name::POOL_COUNT,
        Unit::Count,
        "Connections to a store, by state.",
    ),
    (
        name::POOL_MAX,
        Unit::Count,
        "Connections to a store that may be open at once.",
    ),
    (
        name::POOL_PENDING,
        Unit::Count,
        "Calls waiting for a connection.",
    ),
    (
        name::BUILD_INFO,
        Unit::Count,
        "Always 1; the labels say what is running.",
    ),
    (name::OPEN_FDS, Unit::Count, "Open file descriptors."),
    (
        name::MAX_FDS,
        Unit::Count,
        "File descriptors that may be open.",
    ),
    (name::RESIDENT_MEMORY, Unit::Bytes, "Resident memory."),
    (name::VIRTUAL_MEMORY, Unit::Bytes, "Virtual memory."),
    (
        name::START_TIME,
        Unit::Seconds,
        "When the process started, in seconds since the epoch.",
    ),
    (name::THREADS, Unit::Count, "Threads of the process."),
    (name::WORKERS, Unit::Count, "Worker threads of the runtime."),
    (
        name::ALIVE_TASKS,
        Unit::Count,
        "Tasks of the runtime that have not ended.",
    ),
    (
        name::GLOBAL_QUEUE_DEPTH,
        Unit::Count,
        "Tasks waiting in the runtime's global queue.",
    ),
];

const HISTOGRAMS: &[(&str, Unit, &str, &[f64])] = &[
    (
        name::HTTP_DURATION,
        Unit::Seconds,
        "Time from a request's head to its answer.",
        HTTP_BUCKETS,
    ),
    (
        name::CALL_DURATION,
        Unit::Seconds,
        "Time of a call to a store, the wait for a connection included.",
        STORE_BUCKETS,
    ),
    (
        name::QUEUE_WAIT,
        Unit::Seconds,
        "Time a visit waits before the batch that records it begins.",
        STORE_BUCKETS,
    ),
    (
        name::BATCH_SIZE,
        Unit::Count,
        "Visits recorded by one commit.",
        BATCH_BUCKETS,
    ),
    (
        name::POOL_WAIT,
        Unit::Seconds,
        "Time to obtain a connection.",
        STORE_BUCKETS,
    ),
];

/// A store, as the label `db_system_name` says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum System {
    /// `postgresql`
    Postgresql,
    /// `redis`
    Redis,
}

impl System {
    /// The well-known value of `db.system.name`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Postgresql => "postgresql",
            Self::Redis => "redis",
        }
    }

    const fn pool_name(self) -> &'static str {
        match self {
            Self::Postgresql => "postgres",
            Self::Redis => "redis",
        }
    }
}

/// Stands for everything that has no name or no series of its own.
const OTHER: &str = "_OTHER";

/// At most so many series of a kind: the first ones that come.
struct Limit {
    series: usize,
    known: RwLock<HashSet<Key>>,
}

impl Limit {
    fn new(series: usize) -> Self {
        Self {
            series,
            known: RwLock::default(),
        }
    }

    /// Whether a series is one of those that there may be.
    fn admits(&self, series: &Key) -> bool {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        if known.contains(series) || known.len() >= self.series {
            return known.contains(series);
        }
        drop(known);
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        known.len() < self.series && known.insert(series.clone()) || known.contains(series)
    }
}

/// What became of a visit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// In both stores.
    Ok,
    /// In Postgres, not counted in Redis.
    Degraded,
    /// Certainly not recorded: Postgres was down or refused, or its deadline passed in the queue.
    Failed,
    /// Not taken: the queue was full or the service stops.
    Shed,
    /// Its statement was sent, and its reply was not read or came too late for its client.
    InDoubt,
    /// Its client left before it was recorded.
    Abandoned,
}

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
}

/// Why a request was refused before it reached a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rejection {
    /// It is no HTTP/1.
    Malformed,
    /// Its headers are longer, or more, than the service reads.
    HeadersTooLarge,
    /// Its headers did not arrive in time.
    HeaderTimeout,
    /// A TLS handshake, where none is spoken.
    Tls,
    /// A preface of the PROXY protocol, which is not spoken.
    ProxyProtocol,
    /// It does not name its host as HTTP demands.
    Host,
}

impl Rejection {
    /// Every reason.
    pub const ALL: [Self; 6] = [
        Self::Malformed,
        Self::HeadersTooLarge,
        Self::HeaderTimeout,
        Self::Tls,
        Self::ProxyProtocol,
        Self::Host,
    ];

    const fn label(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::HeadersTooLarge => "headers_too_large",
            Self::HeaderTimeout => "header_timeout",
            Self::Tls => "tls",
            Self::ProxyProtocol => "proxy_protocol",
            Self::Host => "host",
        }
    }
}

/// How a call to a store ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CallOutcome {
    /// The store answered as asked.
    Ok,
    /// The store refused, or the connection failed.
    Error,
    /// The deadline passed.
    Timeout,
    /// The caller went away before the answer.
    Cancelled,
}

impl CallOutcome {
    const ALL: [Self; 4] = [Self::Ok, Self::Error, Self::Timeout, Self::Cancelled];

    const fn label(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Error => "error",
            Self::Timeout => "timeout",
            Self::Cancelled => "cancelled",
        }
    }
}

/// Installs the recorder behind the `metrics` macros and returns what renders it.
///
/// # Errors
///
/// If a recorder has been installed already.
pub fn install() -> anyhow::Result<PrometheusHandle> {
    let mut builder = PrometheusBuilder::new().with_recommended_naming(true);
    for &(name, _, _, buckets) in HISTOGRAMS {
        builder = builder.set_buckets_for_metric(Matcher::Full(name.to_owned()), buckets)?;
    }
    let recorder = builder.build_recorder();
    let handle = recorder.handle();
    metrics::set_global_recorder(recorder)
        .map_err(|error| anyhow::anyhow!("installing the metrics recorder: {error}"))?;
    for &(name, help) in COUNTERS {
        metrics::describe_counter!(name, Unit::Count, help);
    }
    for &(name, unit, help) in GAUGES {
        metrics::describe_gauge!(name, unit, help);
    }
    for &(name, unit, help, _) in HISTOGRAMS {
        metrics::describe_histogram!(name, unit, help);
    }
    LazyLock::force(&VISITS);
    LazyLock::force(&HTTP_ACTIVE);
    LazyLock::force(&ROOT_OK);
    LazyLock::force(&ROOT_UNAVAILABLE);
    LazyLock::force(&REJECTED);
    LazyLock::force(&QUEUE_WAIT);
    LazyLock::force(&BATCH_SIZE);
    LazyLock::force(&QUEUE_DEPTH);
    LazyLock::force(&SPANS);
    rows(None, None, None);
    recount_due(false);
    metrics::counter!(name::LOG_LINES_DROPPED).absolute(0);
    metrics::counter!(name::PANICS).absolute(0);
    metrics::gauge!(
        name::BUILD_INFO,
        "version" => crate::VERSION, "revision" => crate::REVISION, "rustc" => crate::RUSTC,
    )
    .set(1.0);
    Ok(handle)
}

// --- visits ---

static VISITS: LazyLock<[Counter; 6]> = LazyLock::new(|| {
    Outcome::ALL.map(|outcome| metrics::counter!(name::VISITS, "outcome" => outcome.label()))
});
static QUEUE_WAIT: LazyLock<Histogram> = LazyLock::new(|| metrics::histogram!(name::QUEUE_WAIT));
static BATCH_SIZE: LazyLock<Histogram> = LazyLock::new(|| metrics::histogram!(name::BATCH_SIZE));
static QUEUE_DEPTH: LazyLock<Gauge> = LazyLock::new(|| metrics::gauge!(name::QUEUE_DEPTH));

/// Counts visits of one outcome.
pub fn visits(outcome: Outcome, visits: usize) {
    VISITS[outcome as usize].increment(visits as u64);
}

/// Records how long a visit waited for the batch that was sent with it.
pub fn queue_wait(wait: Duration) {
    QUEUE_WAIT.record(wait);
}

/// Records how many visits one commit took.
pub fn batch_size(visits: usize) {
    BATCH_SIZE.record(visits as f64);
}

/// Says how many visits wait.
pub fn queue_depth(visits: usize) {
    QUEUE_DEPTH.set(visits as f64);
}

/// Says how many visits may wait.
pub fn queue_capacity(visits: usize) {
    metrics::gauge!(name::QUEUE_CAPACITY).set(visits as f64);
}

/// Says what the stores have counted, and by how much Postgres has more, as far as is known.
pub fn rows(rows: Option<i64>, redis: Option<i64>, drift: Option<i64>) {
    let value = |count: Option<i64>| count.map_or(f64::NAN, |count| count as f64);
    metrics::gauge!(name::ROWS).set(value(rows));
    metrics::gauge!(name::REDIS_VISITS).set(value(redis));
    metrics::gauge!(name::DRIFT).set(value(drift));
}

/// Says whether the count can have been led astray.
pub fn recount_due(due: bool) {
    metrics::gauge!(name::RECOUNT_DUE).set(f64::from(u8::from(due)));
}

/// Says whether a store does what a visit needs.
pub fn dependency_up(system: System, up: bool) {
    metrics::gauge!(name::DEPENDENCY_UP, "db_system_name" => system.name())
        .set(f64::from(u8::from(up)));
}

// --- HTTP ---

static HTTP_ACTIVE: LazyLock<Gauge> = LazyLock::new(|| active_requests("GET"));
static ROOT_OK: LazyLock<Requests> = LazyLock::new(|| Requests::new(Kind::visit(200)));
static ROOT_UNAVAILABLE: LazyLock<Requests> = LazyLock::new(|| Requests::new(Kind::visit(503)));
static REQUEST_EXEMPLARS: LazyLock<Exemplars> = LazyLock::new(|| Exemplars::new(HTTP_BUCKETS));

/// Series of requests with a method, a route and a version of their own, except those of a `GET`
/// of a route that succeeds or is unavailable. A stranger chooses the method and the version, so
/// their product with all routes and statuses has to end somewhere.
const REQUEST_SERIES: usize = 14;
static KNOWN_REQUESTS: LazyLock<RequestLimits> =
    LazyLock::new(|| RequestLimits::new(REQUEST_SERIES));

/// Series of a `GET` of a route that succeeds or is unavailable: two for each of eleven routes.
const EXPECTED_SERIES: usize = 22;

/// What bounds the series of requests. The expected ones have a limit of their own, so that a
/// stranger cannot crowd them out.
struct RequestLimits {
    expected: Limit,
    others: Limit,
}

impl RequestLimits {
    fn new(others: usize) -> Self {
        Self {
            expected: Limit::new(EXPECTED_SERIES),
            others: Limit::new(others),
        }
    }
}

/// Records a request's duration. The method and the protocol version are names from fixed sets;
/// the status is absent when the client left before there was one, the span when the request was
/// not sampled.
pub fn request(
    method: &'static str,
    route: Option<&str>,
    status: Option<u16>,
    version: &'static str,
    took: Duration,
    span: Option<&SpanContext>,
) {
    match (method, route, status, version) {
        ("GET", Some("/"), Some(200), "1.1") => ROOT_OK.record(took, span),
        ("GET", Some("/"), Some(503), "1.1") => ROOT_UNAVAILABLE.record(took, span),
        _ => {
            let kind = Kind {
                method,
                route,
                status,
                version,
            };
            Requests::new(kind.bounded(&KNOWN_REQUESTS)).record(took, span);
        }
    }
}

/// What tells the series of requests apart.
#[derive(Debug, Clone, Copy)]
struct Kind<'a> {
    method: &'static str,
    route: Option<&'a str>,
    status: Option<u16>,
    version: &'static str,
}

impl Kind<'_> {
    /// A visit that had this status.
    const fn visit(status: u16) -> Self {
        Self {
            method: "GET",
            route: Some("/"),
            status: Some(status),
            version: "1.1",
        }
    }

    /// The kind that a request is counted as. What the service refuses has one kind for each
    /// status, and so has what would be one kind too many.
    fn bounded(self, limits: &RequestLimits) -> Self {
        let is_refused = matches!(self.status, Some(400..=499));
        let is_visit = self.method == "GET" && self.route == Some("/");
        let is_expected = self.method == "GET"
            && self.route.is_some()
            && self.version == "1.1"
            && matches!(self.status, Some(200 | 503));
        let limit = if is_expected {
            &limits.expected
        } else {
            &limits.others
        };
        if !is_refused && (is_visit || limit.admits(&self.series())) {
            return self;
        }
        Self {
            method: OTHER,
            route: None,
            status: self.status,
            version: "1.1",
        }
    }

    fn series(&self) -> Key {
        let mut labels = vec![
            Label::from_static_parts("http_request_method", self.method),
            Label::from_static_parts("url_scheme", "http"),
            Label::from_static_parts("network_protocol_version", self.version),
        ];
        if let Some(route) = self.route {
            labels.push(Label::new("http_route", route.to_owned()));
        }
        if let Some(status) = self.status {
            labels.push(Label::new("http_response_status_code", status.to_string()));
            if status >= 500 {
                labels.push(Label::new("error_type", status.to_string()));
            }
        }
        Key::from_parts(name::HTTP_DURATION, labels)
    }
}

/// The requests of one series.
struct Requests {
    series: Key,
    durations: Histogram,
}

impl Requests {
    fn new(kind: Kind<'_>) -> Self {
        let series = kind.series();
        let labels: Vec<_> = series.labels().cloned().collect();
        Self {
            durations: metrics::histogram!(name::HTTP_DURATION, labels),
            series,
        }
    }

    fn record(&self, took: Duration, span: Option<&SpanContext>) {
        self.durations.record(took);
        if let Some(span) = span {
            REQUEST_EXEMPLARS.keep(&self.series, took.as_secs_f64(), span);
        }
    }
}

/// Adds to the number of requests being answered, or takes from it. No route has another method
/// than these two.
pub fn request_active(method: &'static str, change: f64) {
    match method {
        "GET" => HTTP_ACTIVE.increment(change),
        "HEAD" => active_requests("HEAD").increment(change),
        _ => active_requests(OTHER).increment(change),
    }
}

fn active_requests(method: &'static str) -> Gauge {
    metrics::gauge!(name::HTTP_ACTIVE, "http_request_method" => method, "url_scheme" => "http")
}

/// Says how many client connections are open.
pub fn connections(open: usize) {
    static CONNECTIONS: LazyLock<Gauge> = LazyLock::new(|| metrics::gauge!(name::CONNECTIONS));
    CONNECTIONS.set(open as f64);
}

static REJECTED: LazyLock<[Counter; 6]> = LazyLock::new(|| {
    Rejection::ALL.map(|reason| metrics::counter!(name::REJECTED, "reason" => reason.label()))
});

/// Counts a request that was refused before it reached a route.
pub fn rejected(reason: Rejection) {
    REJECTED[reason as usize].increment(1);
}

/// Says how many client connections can be open at once.
pub fn connections_max(limit: usize) {
    metrics::gauge!(name::CONNECTIONS_MAX).set(limit as f64);
}

// --- store calls ---

/// Series of failed calls with a code or a word of their own, of all operations together. The codes
/// are the stores' to choose.
const FAILURE_SERIES: usize = 20;
static KNOWN_FAILURES: LazyLock<Limit> = LazyLock::new(|| Limit::new(FAILURE_SERIES));

/// The handles of one operation of one store.
#[derive(Debug)]
pub struct CallMetrics {
    labels: [Label; 3],
    succeeded: Histogram,
    counts: [Counter; 4],
}

impl CallMetrics {
    /// Every series that does not depend on what goes wrong exists from here on.
    #[must_use]
    pub fn new(system: System, namespace: &str, operation: &'static str) -> Self {
        let labels = [
            Label::from_static_parts("db_system_name", system.name()),
            Label::new("db_namespace", namespace.to_owned()),
            Label::from_static_parts("db_operation_name", operation),
        ];
        let count = |outcome: CallOutcome| {
            metrics::counter!(
                name::CALLS,
                "db_system_name" => system.name(),
                "db_operation_name" => operation,
                "outcome" => outcome.label(),
            )
        };
        Self {
            succeeded: metrics::histogram!(name::CALL_DURATION, labels.to_vec()),
            counts: CallOutcome::ALL.map(count),
            labels,
        }
    }

    /// Records one call. A failure has its `error.type`, and the store's code if it sent one.
    pub fn record(
        &self,
        outcome: CallOutcome,
        took: Duration,
        error_type: Option<&str>,
        code: Option<&str>,
    ) {
        self.counts[outcome as usize].increment(1);
        let Some(error_type) = error_type else {
            self.succeeded.record(took);
            return;
        };
        let labels = self.failure(error_type, code, &KNOWN_FAILURES);
        metrics::histogram!(name::CALL_DURATION, labels).record(took);
    }

    /// The labels of a failure; those of any other one where it would be one series too many, or
    /// where the store's code is none.
    fn failure(&self, error_type: &str, code: Option<&str>, limit: &Limit) -> Vec<Label> {
        let labelled = |error_type: &str, code: Option<&str>| {
            let mut labels = self.labels.to_vec();
            labels.push(Label::new("error_type", error_type.to_owned()));
            if let Some(code) = code {
                labels.push(Label::new("db_response_status_code", code.to_owned()));
            }
            labels
        };
        if code.is_none_or(is_code) {
            let labels = labelled(error_type, code);
            let series = Key::from_parts(name::CALL_DURATION, labels.clone());
            if error_type == OTHER || limit.admits(&series) {
                return labels;
            }
        }
        labelled(OTHER, None)
    }
}

/// Whether a text looks like a SQLSTATE or the first word of an error of Redis's.
fn is_code(text: &str) -> bool {
    let is_of_a_code =
        |byte: u8| byte.is_ascii_uppercase() || byte.is_ascii_digit() || byte == b'_';
    (1..=32).contains(&text.len()) && text.bytes().all(is_of_a_code)
}

/// The handles of one store's connection pool.
#[derive(Debug)]
pub struct PoolMetrics {
    idle: Gauge,
    used: Gauge,
    pending: Gauge,
    timeouts: Counter,
    wait: Histogram,
}

/// The metrics of a store's pool, which may hold `max` connections.
#[must_use]
pub fn pool(system: System, max: u32) -> PoolMetrics {
    const POOL: &str = "db_client_connection_pool_name";
    let name = system.pool_name();
    metrics::gauge!(name::POOL_MAX, POOL => name).set(f64::from(max));
    PoolMetrics {
        idle: metrics::gauge!(name::POOL_COUNT, POOL => name, "db_client_connection_state" => "idle"),
        used: metrics::gauge!(name::POOL_COUNT, POOL => name, "db_client_connection_state" => "used"),
        pending: metrics::gauge!(name::POOL_PENDING, POOL => name),
        timeouts: metrics::counter!(name::POOL_TIMEOUTS, POOL => name),
        wait: metrics::histogram!(name::POOL_WAIT, POOL => name),
    }
}

impl PoolMetrics {
    /// Records how long a call waited for a connection.
    pub fn waited(&self, wait: Duration) {
        self.wait.record(wait);
    }

    /// Counts a checkout that timed out.
    pub fn timed_out(&self) {
        self.timeouts.increment(1);
    }

    /// Says what the pool holds.
    pub fn report(&self, connections: u32, idle: u32, pending: u64) {
        self.idle.set(f64::from(idle));
        self.used.set(f64::from(connections.saturating_sub(idle)));
        self.pending.set(pending as f64);
    }
}

// --- telemetry about telemetry ---

/// What became of spans on their way to a collector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Spans {
    /// The collector took them.
    Exported,
    /// The collector did not take them.
    NotExported,
    /// The exporter's queue took them.
    Queued,
    /// The exporter's queue was full.
    QueueFull,
}

static SPANS: LazyLock<[Counter; 4]> = LazyLock::new(|| {
    const NAME: &str = "otel_component_name";
    const TYPE: &str = "otel_component_type";
    let exporter = [
        Label::from_static_parts(NAME, "otlp_http_span_exporter/0"),
        Label::from_static_parts(TYPE, "otlp_http_span_exporter"),
    ];
    let processor = [
        Label::from_static_parts(NAME, "batching_span_processor/0"),
        Label::from_static_parts(TYPE, "batching_span_processor"),
    ];
    let lost = |labels: &[Label; 2], error_type| {
        let mut labels = labels.to_vec();
        labels.push(Label::from_static_parts("error_type", error_type));
        labels
    };
    [
        metrics::counter!(name::SPANS_EXPORTED, exporter.to_vec()),
        metrics::counter!(name::SPANS_EXPORTED, lost(&exporter, "_OTHER")),
        metrics::counter!(name::SPANS_PROCESSED, processor.to_vec()),
        metrics::counter!(name::SPANS_PROCESSED, lost(&processor, "queue_full")),
    ]
});

/// Counts spans by what became of them.
pub fn spans(fate: Spans, spans: usize) {
    SPANS[fate as usize].increment(spans as u64);
}

/// Counts a panic.
pub fn panicked() {
    metrics::counter!(name::PANICS).increment(1);
}

// --- the process, read when somebody scrapes ---

/// Renders everything, the process's own figures read now.
#[must_use]
pub fn render(handle: &PrometheusHandle, log_lines_dropped: u64, format: Format) -> String {
    metrics::counter!(name::LOG_LINES_DROPPED).absolute(log_lines_dropped);
    let process = metrics_process::collector::collect();
    let gauges = [
        (name::OPEN_FDS, process.open_fds),
        (name::MAX_FDS, process.max_fds),
        (name::RESIDENT_MEMORY, process.resident_memory_bytes),
        (name::VIRTUAL_MEMORY, process.virtual_memory_bytes),
        (name::START_TIME, process.start_time_seconds),
        (name::THREADS, process.threads),
    ];
    for (name, value) in gauges {
        if let Some(value) = value {
            metrics::gauge!(name).set(value as f64);
        }
    }
    let runtime = tokio::runtime::Handle::current().metrics();
    let workers = runtime.num_workers();
    metrics::gauge!(name::WORKERS).set(workers as f64);
    metrics::gauge!(name::ALIVE_TASKS).set(runtime.num_alive_tasks() as f64);
    metrics::gauge!(name::GLOBAL_QUEUE_DEPTH).set(runtime.global_queue_depth() as f64);
    let busy: Duration = (0..workers)
        .map(|worker| runtime.worker_total_busy_duration(worker))
        .sum();

    let exemplars = REQUEST_EXEMPLARS.suffixes();
    let mut text = handle.render();
    // The exporter's counters are whole numbers, so fractional ones are written beside its output.
    let mut fraction = |name, help, value| {
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "# HELP {name} {help}\n# TYPE {name} counter\n{name} {value}\n"
        );
    };
    fraction(
        name::BUSY_SECONDS,
        "Time the runtime's workers have been busy.",
        busy.as_secs_f64(),
    );
    if let Some(cpu) = process.cpu_seconds_total {
        fraction(
            name::CPU_SECONDS,
            "CPU time of the process, user and system.",
            cpu,
        );
    }
    openmetrics::write(&text, format, &exemplars)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Samples of one series of requests: a bucket for each bound and one for the rest, a sum and a
    /// count.
    const SAMPLES_OF_REQUESTS: usize = HTTP_BUCKETS.len() + 3;
    /// The same of one series of calls.
    const SAMPLES_OF_CALLS: usize = STORE_BUCKETS.len() + 3;

    /// Every kind of request that there can be, with far more routes than there are.
    fn kinds(routes: &[String]) -> Vec<Kind<'_>> {
        let mut kinds = Vec::new();
        let statuses = [200, 204, 304, 400, 404, 405, 431, 500, 503].map(Some);
        for version in ["1.0", "1.1"] {
            for route in routes
                .iter()
                .map(|route| Some(route.as_str()))
                .chain([None])
            {
                for status in statuses.into_iter().chain([None]) {
                    kinds.extend(["GET", "HEAD", "POST", "TRACE", OTHER].map(|method| Kind {
                        method,
                        route,
                        status,
                        version,
                    }));
                }
            }
        }
        kinds
    }

    #[test]
    fn requests_of_all_kinds_have_at_most_1160_samples() {
        let mut routes: Vec<_> = (0..40).map(|number| format!("/{number}")).collect();
        routes.push("/".to_owned());
        let limit = RequestLimits::new(REQUEST_SERIES);
        let series = |kinds: &[Kind<'_>]| {
            let counted = kinds.iter().map(|kind| kind.bounded(&limit).series());
            counted.collect::<HashSet<_>>()
        };
        let kinds = kinds(&routes);
        let first = series(&kinds);
        assert_eq!(series(&kinds), first, "a kind keeps its series");
        let samples = first.len() * SAMPLES_OF_REQUESTS;
        assert!(samples <= 1160, "{samples}");
    }

    #[test]
    fn refused_request_has_neither_method_nor_route() {
        let limit = RequestLimits::new(REQUEST_SERIES);
        for status in [404, 405, 431] {
            let refused = Kind {
                method: "HEAD",
                route: Some("/"),
                status: Some(status),
                version: "1.0",
            };
            let counted = refused.bounded(&limit);
            assert_eq!(
                (
                    counted.method,
                    counted.route,
                    counted.status,
                    counted.version
                ),
                (OTHER, None, Some(status), "1.1")
            );
        }
    }

    #[test]
    fn visit_has_a_series_of_its_own_when_all_others_are_taken() {
        let limit = RequestLimits::new(0);
        for (method, own) in [("GET", true), ("HEAD", false)] {
            let kind = Kind {
                method,
                version: "1.0",
                ..Kind::visit(500)
            };
            assert_eq!(kind.bounded(&limit).route.is_some(), own, "{method}");
        }
    }

    #[test]
    fn store_that_sends_hundreds_of_codes_makes_a_bounded_number_of_series() {
        let limit = Limit::new(FAILURE_SERIES);
        let calls = metrics::with_local_recorder(&metrics::NoopRecorder, || {
            ["SELECT", "BEGIN"]
                .map(|operation| CallMetrics::new(System::Postgresql, "d", operation))
        });
        let mut series = HashSet::new();
        for code in 0..500 {
            for calls in &calls {
                let code = format!("X{code:04}");
                series.insert(calls.failure(&code, Some(&code), &limit));
            }
        }
        assert_eq!(series.len(), FAILURE_SERIES + calls.len());
        assert!(series.len() * SAMPLES_OF_CALLS <= 352);
        let known = calls[0].failure("X0000", Some("X0000"), &limit);
        assert!(series.contains(&known) && known.len() == 5, "{known:?}");
        let late = calls[0].failure("X0499", Some("X0499"), &limit);
        assert!(
            late[3..].iter().all(|label| label.value() == OTHER),
            "{late:?}"
        );
        assert_eq!(late.len(), 4, "no code: {late:?}");
    }

    #[test]
    fn code_that_is_none_is_no_label() {
        let limit = Limit::new(FAILURE_SERIES);
        let calls = metrics::with_local_recorder(&metrics::NoopRecorder, || {
            CallMetrics::new(System::Redis, "0", "INCRBY")
        });
        let long = "X".repeat(33);
        for code in ["", "no code", "wrongtype", "\u{e9}", &long] {
            let labels = calls.failure(code, Some(code), &limit);
            assert_eq!(labels[3].value(), OTHER, "{code}");
            assert_eq!(labels.len(), 4, "{code}");
        }
        for code in ["57P01", "WRONGTYPE"] {
            assert_eq!(calls.failure(code, Some(code), &limit)[4].value(), code);
        }
    }
}
