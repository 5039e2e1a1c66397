//! Observes store calls. Each gets a deadline, a span, a duration and a count, even if it times out
//! or its caller disconnects.
//!
//! Must not know: what a call is for.

use std::borrow::Cow;
use std::sync::OnceLock;
use std::time::{Duration, SystemTime};

use opentelemetry::Context;
use opentelemetry::trace::{
    Link, SpanBuilder, SpanContext, SpanKind, TraceContextExt as _, TraceState, Tracer as _,
};
use tokio::time::Instant;
use tracing::{Span, field};
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

use super::call_metrics::{CallMetrics, CallOutcome};
use super::error::{Error, System};
use crate::telemetry::span;

/// A kind of store call, named by OpenTelemetry's conventions for databases.
#[derive(Debug)]
pub(super) struct Operation {
    name: &'static str,
    summary: &'static str,
    text: Option<&'static str>,
    procedure: Option<&'static str>,
    records_visits: bool,
    repairable: Option<&'static str>,
    metrics: OnceLock<CallMetrics>,
}

/// Where a store is.
#[derive(Debug)]
pub(super) struct Target {
    /// Which of the two stores.
    pub(super) system: System,
    /// `database|schema`, or the number of the Redis database.
    pub(super) namespace: String,
    /// A host name or an address.
    pub(super) address: String,
    /// A TCP port.
    pub(super) port: u16,
}

/// The context of a sampled request's span, for child spans. Unlike the span itself it lets the
/// span end: a visit can be in the queue for longer than its request is in flight.
#[derive(Debug, Clone)]
pub struct Parent(Context);

impl Parent {
    /// The current span, if it is sampled.
    #[must_use]
    pub fn current() -> Option<Self> {
        let span = Span::current();
        (!span.is_none()).then(|| Self(span.context()))
    }
}

/// The visits that calls are made for. If a visit is sampled, the calls have spans in its trace.
#[derive(Debug)]
pub struct Batch {
    visits: usize,
    parent: Option<Parent>,
    calls: Vec<SpanContext>,
}

impl Operation {
    /// A Redis command, or a command of a Postgres session such as BEGIN.
    pub(super) const fn command(name: &'static str) -> Self {
        Self {
            name,
            summary: name,
            text: None,
            procedure: None,
            records_visits: false,
            repairable: None,
            metrics: OnceLock::new(),
        }
    }

    /// A `SELECT`.
    pub(super) const fn query(summary: &'static str, text: &'static str) -> Self {
        let mut operation = Self::command("SELECT");
        operation.summary = summary;
        operation.text = Some(text);
        operation
    }

    /// A `SELECT` of one function of the database.
    pub(super) const fn procedure(
        summary: &'static str,
        procedure: &'static str,
        text: &'static str,
    ) -> Self {
        let mut operation = Self::query(summary, text);
        operation.procedure = Some(procedure);
        operation
    }

    /// Marks the operation as one that records the visits of its batch.
    pub(super) const fn that_records_visits(mut self) -> Self {
        self.records_visits = true;
        self
    }

    /// Marks failures with this code as ones that the caller repairs, so they do not affect the
    /// store's availability.
    pub(super) const fn that_repairs(mut self, code: &'static str) -> Self {
        self.repairable = Some(code);
        self
    }

    /// The statement.
    pub(super) fn text(&self) -> &'static str {
        self.text.unwrap_or_default()
    }

    /// Whether the caller repairs this failure.
    pub(super) fn repairs(&self, error: &Error) -> bool {
        self.repairable.is_some() && self.repairable == error.code()
    }

    /// Creates the operation's series before its first call.
    pub(super) fn declare(&self, target: &Target) -> &CallMetrics {
        self.metrics
            .get_or_init(|| CallMetrics::new(target.system, &target.namespace, self.name))
    }

    fn span(&self, target: &Target, batch: &Batch) -> Span {
        let Some(parent) = &batch.parent else {
            return Span::none();
        };
        let visits = self.records_visits.then_some(batch.visits);
        let span = tracing::info_span!(
            target: span::TARGET,
            parent: None,
            "call",
            otel.name = self.summary,
            otel.kind = "client",
            otel.status_code = field::Empty,
            db.system.name = target.system.name(),
            db.namespace = target.namespace,
            db.operation.name = self.name,
            db.query.text = self.text,
            db.query.summary = self.text.map(|_text| self.summary),
            db.stored_procedure.name = self.procedure,
            visitas.batch.size = visits.and_then(|visits| i64::try_from(visits).ok()),
            server.address = target.address,
            server.port = i64::from(target.port),
            db.response.status_code = field::Empty,
            error.type = field::Empty,
        );
        // This fails only after the span has started, and it has not started yet.
        span.set_parent(parent.0.clone()).ok();
        span
    }
}

impl Batch {
    /// A batch of `visits` visits; `parent` is the span of the first sampled one.
    #[must_use]
    pub fn new(visits: usize, parent: Option<Parent>) -> Self {
        Self {
            visits,
            parent,
            calls: Vec::new(),
        }
    }

    /// Adds a span to the trace of another sampled visit: how long the visit waited, with links to
    /// the calls that recorded it.
    pub fn link_wait(&self, visit: &Parent, arrived: SystemTime) {
        let Some(tracer) = span::tracer() else {
            return;
        };
        let links = self
            .calls
            .iter()
            .map(|call| Link::with_context(without_state(call)))
            .collect();
        let wait = SpanBuilder::from_name(Cow::Borrowed("record"))
            .with_kind(SpanKind::Internal)
            .with_start_time(arrived)
            .with_links(links);
        // A span that is dropped ends now.
        drop(tracer.build_with_context(wait, &visit.0));
    }
}

/// Drops the `tracestate`: a link needs only the ids, and each visit of a batch would keep a copy
/// of another client's `tracestate` for each call.
fn without_state(call: &SpanContext) -> SpanContext {
    SpanContext::new(
        call.trace_id(),
        call.span_id(),
        call.trace_flags(),
        call.is_remote(),
        TraceState::NONE,
    )
}

/// Observes one call to a store, and ends it after `timeout`. Only a call for a batch has a span.
///
/// # Errors
///
/// The error of `work`, or [`Error::Timeout`].
pub(super) async fn observe<T>(
    target: &Target,
    operation: &Operation,
    batch: Option<&mut Batch>,
    timeout: Duration,
    work: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    let mut span = Span::none();
    if let Some(batch) = batch {
        span = operation.span(target, batch);
        if !span.is_none() {
            batch
                .calls
                .push(span.context().span().span_context().clone());
        }
    }
    let call = ActiveCall {
        metrics: operation.declare(target),
        span,
        started: Instant::now(),
        ended: false,
    };
    let result = tokio::time::timeout(timeout, work)
        .await
        .unwrap_or(Err(Error::Timeout(timeout)));
    call.end(&result);
    result
}

/// A call in flight. It counts as cancelled if it is dropped before its end.
struct ActiveCall<'a> {
    metrics: &'a CallMetrics,
    span: Span,
    started: Instant,
    ended: bool,
}

impl ActiveCall<'_> {
    fn end<T>(mut self, result: &Result<T, Error>) {
        self.ended = true;
        match result {
            Ok(_) => self.metrics.record_success(self.started.elapsed()),
            Err(error @ (Error::Timeout(_) | Error::NoSession(..))) => {
                self.fail(CallOutcome::Timeout, error.kind(), error.code());
            }
            Err(error) => self.fail(CallOutcome::Error, error.kind(), error.code()),
        }
    }

    fn fail(&self, outcome: CallOutcome, error_type: &str, code: Option<&str>) {
        let took = self.started.elapsed();
        self.metrics.record_failure(outcome, took, error_type, code);
        self.span.record("otel.status_code", "ERROR");
        self.span.record("error.type", error_type);
        if let Some(code) = code {
            self.span.record("db.response.status_code", code);
        }
    }
}

impl Drop for ActiveCall<'_> {
    fn drop(&mut self) {
        if !self.ended {
            self.fail(CallOutcome::Cancelled, "cancelled", None);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::task::{Context, Waker};

    use metrics_exporter_prometheus::PrometheusBuilder;

    use super::*;

    #[test]
    fn call_that_is_dropped_is_counted() {
        let recorder = PrometheusBuilder::new().build_recorder();
        let target = Target {
            system: System::Redis,
            namespace: "0".to_owned(),
            address: "localhost".to_owned(),
            port: 6379,
        };
        let operation = Operation::command("INCRBY");
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .unwrap();
        let _entered = runtime.enter();
        metrics::with_local_recorder(&recorder, || {
            let never = std::future::pending::<Result<(), Error>>();
            let timeout = Duration::from_secs(1);
            let mut call = Box::pin(observe(&target, &operation, None, timeout, never));
            let mut context = Context::from_waker(Waker::noop());
            assert!(call.as_mut().poll(&mut context).is_pending());
        });
        let text = recorder.handle().render();
        assert!(text.contains("outcome=\"cancelled\"} 1"), "{text}");
        assert!(text.contains("error_type=\"cancelled\""), "{text}");
    }
}
