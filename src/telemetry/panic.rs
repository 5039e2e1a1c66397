//! Counts every panic and logs it in one line, with the ids of the request that the thread was
//! working on, if any.
//!
//! Must not know: what happens to the task that panicked.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::cell::RefCell;
use std::panic::PanicHookInfo;
use std::sync::LazyLock;
use std::thread;

use http::HeaderValue;
use metrics::Counter;
use opentelemetry::{SpanId, TraceId};

use crate::metrics::catalog;

/// The target of a panic's line. The log writes it at any `RUST_LOG`.
pub(super) const TARGET: &str = "visitas::panic";

static PANICS: LazyLock<Counter> = LazyLock::new(|| catalog::PANICS.with([]));

/// The ids of a request in the log.
#[derive(Debug, Clone)]
pub(super) struct RequestIds {
    pub(super) request: HeaderValue,
    pub(super) trace: Option<TraceId>,
    pub(super) span: Option<SpanId>,
}

thread_local! {
    static CURRENT: RefCell<Option<RequestIds>> = const { RefCell::new(None) };
}

/// Marks the thread as working on a request until this is dropped.
pub(super) struct RequestScope;

impl RequestScope {
    pub(super) fn enter(ids: RequestIds) -> Self {
        CURRENT.set(Some(ids));
        Self
    }
}

impl Drop for RequestScope {
    fn drop(&mut self) {
        CURRENT.set(None);
    }
}

/// From now on a panic is logged and counted instead of being printed on stderr.
pub(super) fn install_hook() {
    LazyLock::force(&PANICS);
    std::panic::set_hook(Box::new(report));
}

fn report(panic: &PanicHookInfo<'_>) {
    PANICS.increment(1);
    // A panic in this hook would abort the process. The ids can be borrowed mutably, hence
    // `try_borrow`, and the thread can be ending, hence `try_with`.
    let ids = CURRENT
        .try_with(|ids| ids.try_borrow().ok()?.clone())
        .ok()
        .flatten();
    let text = panic.payload_as_str().unwrap_or("(not a text)");
    // Present if RUST_BACKTRACE asks for one.
    let backtrace = Backtrace::capture();
    let backtrace = (backtrace.status() == BacktraceStatus::Captured).then_some(backtrace);
    tracing::error!(
        target: TARGET,
        location = panic.location().map(display),
        thread = thread::current().name(),
        request_id = ids.as_ref().and_then(|ids| ids.request.to_str().ok()),
        trace_id = ids.as_ref().and_then(|ids| ids.trace).map(display),
        span_id = ids.as_ref().and_then(|ids| ids.span).map(display),
        backtrace = backtrace.map(display),
        "panicked: {text}"
    );
}
