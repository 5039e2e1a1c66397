//! Every metric, declared once: its help text, name, type, unit, buckets and labels.
//!
//! Handles are in the file that changes the metric. Must not know: when or why a metric changes.

#![expect(clippy::doc_markdown, reason = "a help text is plain text")]

use std::marker::PhantomData;

use metrics::{Counter, Gauge, Histogram, Key, Label, Unit};

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

/// Declares metrics: a doc comment, which is the help text, and `NAME: Type(Unit, BUCKETS)["label"]
/// = "name"`. Without a unit the metric is a count.
macro_rules! metrics {
    ($(
        $(#[doc = $help:literal])+
        $metric:ident: $type:ident $(($unit:ident $(, $buckets:ident)?))? $([$($label:literal),+])?
            = $name:literal;
    )+) => {
        $(
            $(#[doc = $help])+
            pub const $metric: Metric<$type, { <[&str]>::len(&[$($($label),+)?]) }> = Metric {
                description: Description {
                    name: $name,
                    help: concat!($($help),+).trim_ascii(),
                    unit: metrics!(@unit $($unit)?),
                    kind: Kind::$type $($(($buckets))?)?,
                },
                labels: [$($($label),+)?],
                handle: PhantomData,
            };
        )+

        /// Every metric.
        pub(super) const ALL: &[Description] = &[$($metric.description),+];
    };
    (@unit) => { Unit::Count };
    (@unit $unit:ident) => { Unit::$unit };
}

metrics! {
    /// Time from a request's headers to its response.
    HTTP_DURATION: Histogram(Seconds, HTTP_BUCKETS)[
        "http_request_method", "url_scheme", "network_protocol_version", "http_route",
        "http_response_status_code", "error_type"
    ] = "http_server_request_duration_seconds";
    /// Requests in flight.
    HTTP_ACTIVE: Gauge["http_request_method", "url_scheme"] = "http_server_active_requests";
    /// Open client connections.
    CONNECTIONS: Gauge = "visitas_http_connections";
    /// Maximum number of open client connections, within the open-file limit.
    CONNECTIONS_MAX: Gauge = "visitas_http_connections_max";
    /// Requests rejected before they reached a route, by reason.
    REJECTED: Counter["reason"] = "visitas_http_requests_rejected_total";
    /// Open streams of /visitas/stream.
    PAGE_STREAMS: Gauge = "visitas_page_streams";

    /// Visits by outcome.
    VISITS: Counter["outcome"] = "visitas_visits_total";
    /// Time a visit waits in the queue before its batch is sent.
    QUEUE_WAIT: Histogram(Seconds, STORE_BUCKETS) = "visitas_queue_wait_seconds";
    /// Visits recorded by one commit.
    BATCH_SIZE: Histogram(Count, BATCH_BUCKETS) = "visitas_batch_size";
    /// Visits waiting to be recorded.
    QUEUE_DEPTH: Gauge = "visitas_queue_depth";
    /// Maximum number of visits waiting to be recorded.
    QUEUE_CAPACITY: Gauge = "visitas_queue_capacity";

    /// Duration of a store call, including the connection checkout.
    CALL_DURATION: Histogram(Seconds, STORE_BUCKETS)[
        "db_system_name", "db_namespace", "db_operation_name", "error_type",
        "db_response_status_code"
    ] = "db_client_operation_duration_seconds";
    /// Store calls by outcome; one call can record many visits.
    CALLS: Counter["db_system_name", "db_operation_name", "outcome"] = "visitas_store_calls_total";
    /// Connections to a store, by state.
    POOL_COUNT: Gauge["db_client_connection_pool_name", "db_client_connection_state"]
        = "db_client_connection_count";
    /// Maximum number of open connections to a store.
    POOL_MAX: Gauge["db_client_connection_pool_name"] = "db_client_connection_max";
    /// Calls waiting for a connection.
    POOL_PENDING: Gauge["db_client_connection_pool_name"] = "db_client_connection_pending_requests";
    /// Connection checkouts that timed out.
    POOL_TIMEOUTS: Counter["db_client_connection_pool_name"] = "db_client_connection_timeouts_total";
    /// Time to obtain a connection.
    POOL_WAIT: Histogram(Seconds, STORE_BUCKETS)["db_client_connection_pool_name"]
        = "db_client_connection_wait_time_seconds";
    /// 1 if a store can do what a visit needs, otherwise 0.
    DEPENDENCY_UP: Gauge["db_system_name"] = "visitas_dependency_up";
    /// Rows of the table visitas; NaN while unknown.
    ROWS: Gauge = "visitas_rows";
    /// Value of the Redis key visitas_home; NaN while unknown.
    REDIS_VISITS: Gauge = "visitas_redis_visits";
    /// Rows minus the value in Redis, as far as visits in flight cannot explain it; NaN while
    /// either is unknown.
    DRIFT: Gauge = "visitas_store_drift";
    /// Size of the database on disk, without the write-ahead log; NaN before the first reading.
    DATABASE_SIZE: Gauge(Bytes) = "visitas_database_size_bytes";
    /// 1 if loaded data can have made the count wrong, otherwise 0.
    RECOUNT_DUE: Gauge = "visitas_recount_due";

    /// Spans exported to the collector, or lost on the way.
    SPANS_EXPORTED: Counter["otel_component_name", "otel_component_type", "error_type"]
        = "otel_sdk_exporter_span_exported_total";
    /// Spans handed to the exporter, or dropped because its queue was full.
    SPANS_PROCESSED: Counter["otel_component_name", "otel_component_type", "error_type"]
        = "otel_sdk_processor_span_processed_total";
    /// Panics; each is a bug, and a line of the log says where.
    PANICS: Counter = "visitas_panics_total";
    /// Log lines dropped because stdout was blocked or closed.
    LOG_LINES_DROPPED: Counter = "visitas_log_lines_dropped_total";
    /// Always 1; the labels say what is running.
    BUILD_INFO: Gauge["version", "revision", "rustc"] = "visitas_build_info";

    /// CPU time of the process, user and system.
    CPU_SECONDS: Counter(Seconds) = "process_cpu_seconds_total";
    /// Open file descriptors.
    OPEN_FDS: Gauge = "process_open_fds";
    /// Maximum number of open file descriptors.
    MAX_FDS: Gauge = "process_max_fds";
    /// Resident memory.
    RESIDENT_MEMORY: Gauge(Bytes) = "process_resident_memory_bytes";
    /// Virtual memory.
    VIRTUAL_MEMORY: Gauge(Bytes) = "process_virtual_memory_bytes";
    /// When the process started, in seconds since the epoch.
    START_TIME: Gauge(Seconds) = "process_start_time_seconds";
    /// Threads of the process.
    THREADS: Gauge = "process_threads";
    /// Worker threads of the runtime.
    WORKERS: Gauge = "tokio_workers";
    /// Tasks of the runtime that are alive.
    ALIVE_TASKS: Gauge = "tokio_alive_tasks";
    /// Tasks waiting in the runtime's global queue.
    GLOBAL_QUEUE_DEPTH: Gauge = "tokio_global_queue_depth";
    /// Busy time of the runtime's workers.
    BUSY_SECONDS: Counter(Seconds) = "tokio_busy_seconds_total";
}

/// A metric of type `H`. Each of its series has a value for each label.
#[derive(Debug)]
pub struct Metric<H, const LABELS: usize> {
    pub(super) description: Description,
    labels: [&'static str; LABELS],
    handle: PhantomData<H>,
}

/// A metric's name, help text, unit and type, as a scraper reads them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Description {
    pub(super) name: &'static str,
    pub(super) help: &'static str,
    pub(super) unit: Unit,
    pub(super) kind: Kind,
}

/// A metric's type. A histogram has the upper bounds of its buckets.
#[derive(Debug, Clone, Copy)]
pub(super) enum Kind {
    Counter,
    Gauge,
    Histogram(&'static [f64]),
}

impl<H, const LABELS: usize> Metric<H, LABELS> {
    /// Omits labels without a value, which Prometheus treats as absent.
    fn labels(&self, values: [&str; LABELS]) -> Vec<Label> {
        let labels = self.labels.into_iter().zip(values);
        labels
            .filter(|(_, value)| !value.is_empty())
            .map(|(label, value)| Label::new(label, value.to_owned()))
            .collect()
    }
}

impl<const LABELS: usize> Metric<Counter, LABELS> {
    /// Creates a series and returns its handle. The value "" omits a label.
    pub fn with(&self, values: [&str; LABELS]) -> Counter {
        metrics::counter!(self.description.name, self.labels(values))
    }
}

impl<const LABELS: usize> Metric<Gauge, LABELS> {
    /// Creates a series and returns its handle. The value "" omits a label.
    pub fn with(&self, values: [&str; LABELS]) -> Gauge {
        metrics::gauge!(self.description.name, self.labels(values))
    }
}

impl<const LABELS: usize> Metric<Histogram, LABELS> {
    /// Creates a series and returns its handle. The value "" omits a label.
    pub fn with(&self, values: [&str; LABELS]) -> Histogram {
        metrics::histogram!(self.description.name, self.labels(values))
    }

    /// The key that identifies a series.
    #[must_use]
    pub fn key(&self, values: [&str; LABELS]) -> Key {
        Key::from_parts(self.description.name, self.labels(values))
    }

    /// The upper bounds of the buckets.
    #[must_use]
    pub const fn buckets(&self) -> &'static [f64] {
        match self.description.kind {
            Kind::Histogram(buckets) => buckets,
            Kind::Counter | Kind::Gauge => &[],
        }
    }
}
