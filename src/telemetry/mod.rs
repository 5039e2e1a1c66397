//! What the service tells about itself: logs, traces and metrics, started once and flushed last.
//!
//! Telemetry never changes an answer: whoever logs, counts or traces does not wait for whoever
//! reads. [`request`] wraps every request, [`metric`] spells every name.

mod exporter;
mod log;
mod panic;
pub mod request;
pub mod sampler;
mod trace;

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use metrics_exporter_prometheus::PrometheusHandle;
use opentelemetry_sdk::trace::SdkTracer;
use tracing_subscriber::Layer as _;
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

use self::log::Writing;
use self::sampler::Sampler;
use self::trace::Pipeline;
use crate::config::{LogConfig, TracesConfig};
use crate::metrics::openmetrics::Format;

/// The target of the spans that are exported. No library's span has it, so none is exported; the
/// exporter's own requests are not traced.
pub(crate) const SPANS: &str = "visitas::span";

static TRACER: OnceLock<SdkTracer> = OnceLock::new();
static VALUE_LENGTH_LIMIT: OnceLock<usize> = OnceLock::new();

/// Running telemetry. Dropping it writes what is left of the log.
pub struct Telemetry {
    writing: Writing,
    pipeline: Option<Pipeline>,
    prometheus: PrometheusHandle,
    traces: Option<TracesConfig>,
    trace_context: bool,
    flushed: AtomicBool,
}

impl Telemetry {
    /// Starts logs, metrics and, where there is an exporter, traces; with `trace_context` a
    /// request's headers say whose child it is. From then on a panic is a line of the log. Must be
    /// called once, and outside the runtime. The end of the log is waited for no longer than
    /// `patience`.
    ///
    /// # Errors
    ///
    /// If a part cannot be built, or telemetry has been started before.
    pub fn start(
        log: &LogConfig,
        traces: Option<&TracesConfig>,
        trace_context: bool,
        patience: Duration,
    ) -> anyhow::Result<Self> {
        let writing = Writing::start(patience)?;
        let pipeline = traces
            .and_then(|traces| Some((traces, traces.exporter.as_ref()?)))
            .map(|(traces, exporter)| Pipeline::new(traces, exporter))
            .transpose()?;
        let spans = pipeline.as_ref().map(|pipeline| {
            let exported = TRACER.get_or_init(|| pipeline.tracer.clone());
            VALUE_LENGTH_LIMIT.get_or_init(|| pipeline.value_length_limit);
            tracing_opentelemetry::layer()
                .with_tracer(exported.clone())
                .with_location(false)
                .with_threads(false)
                .with_tracked_inactivity(false)
                .with_target(false)
                .with_level(false)
                // Parents are named, never taken from the thread.
                .with_context_activation(false)
                .with_filter(filter_fn(|metadata| {
                    metadata.is_span() && metadata.target() == SPANS
                }))
        });
        tracing_subscriber::registry()
            .with(log::layer(log, writing.buffer())?)
            .with(spans)
            .try_init()?;
        let prometheus = crate::metrics::install()?;
        panic::install_hook();
        Ok(Self {
            writing,
            pipeline,
            prometheus,
            traces: traces.cloned(),
            trace_context,
            flushed: AtomicBool::new(false),
        })
    }

    /// Decides which requests are traced.
    #[must_use]
    pub fn sampler(&self) -> Sampler {
        match (&self.pipeline, &self.traces) {
            (Some(pipeline), Some(traces)) => {
                let breaker = std::sync::Arc::clone(&pipeline.breaker);
                Sampler::new(traces.otel_traces_sampler, breaker, self.trace_context)
            }
            _ => Sampler::off(self.trace_context),
        }
    }

    /// Every metric, in a format that a scraper reads.
    #[must_use]
    pub fn render_metrics(&self, format: Format) -> String {
        crate::metrics::render(&self.prometheus, self.writing.lines_dropped(), format)
    }

    /// Moves samples from where they are recorded to where they are kept. Between two calls, or
    /// scrapes, memory grows with each sample.
    pub fn upkeep(&self) {
        self.prometheus.run_upkeep();
    }

    /// Sends the spans that are left, for at most `timeout`. Blocks; a second time does nothing.
    pub fn flush(&self, timeout: Duration) {
        let Some(pipeline) = &self.pipeline else {
            return;
        };
        if self.flushed.swap(true, Ordering::AcqRel) {
            return;
        }
        pipeline.end(timeout);
    }
}

/// The tracer, where spans are exported.
pub(crate) fn tracer() -> Option<&'static SdkTracer> {
    TRACER.get()
}

/// The most characters of an attribute's value. Without an exporter there are no attributes.
fn value_length_limit() -> usize {
    VALUE_LENGTH_LIMIT.get().copied().unwrap_or(0)
}
