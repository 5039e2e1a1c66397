//! What the service tells about itself: logs, traces and metrics, started once and flushed last.
//!
//! Telemetry never changes an answer: whoever logs, counts or traces does not wait for whoever
//! reads. [`call`] wraps every store call, [`http`] every request, [`metric`] spells every name.

pub mod call;
pub mod exposition;
pub mod http;
mod log;
pub mod metric;
mod otlp;
pub mod rejections;
pub mod sampling;
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

use self::exposition::Format;
use self::log::Writing;
use self::sampling::Sampler;
use self::trace::Pipeline;
use crate::config::{LogConfig, TracesConfig};

/// The target of the spans that are exported. No library's span has it, so none is exported; the
/// exporter's own requests are not traced.
const SPANS: &str = "visitas::span";

static TRACER: OnceLock<SdkTracer> = OnceLock::new();

/// Running telemetry. Dropping it writes what is left of the log.
pub struct Telemetry {
    writing: Writing,
    pipeline: Option<Pipeline>,
    prometheus: PrometheusHandle,
    traces: Option<TracesConfig>,
    flushed: AtomicBool,
}

impl Telemetry {
    /// Starts logs, metrics and, where there is an exporter, traces. Must be called once, and
    /// outside the runtime. The end of the log is waited for no longer than `patience`.
    ///
    /// # Errors
    ///
    /// If a part cannot be built, or telemetry has been started before.
    pub fn start(
        log: &LogConfig,
        traces: Option<&TracesConfig>,
        patience: Duration,
    ) -> anyhow::Result<Self> {
        let writing = Writing::start(patience)?;
        let pipeline = traces
            .and_then(|traces| Some((traces, traces.exporter.as_ref()?)))
            .map(|(traces, exporter)| Pipeline::new(traces, exporter))
            .transpose()?;
        let spans = pipeline.as_ref().map(|pipeline| {
            let exported = TRACER.get_or_init(|| pipeline.tracer.clone());
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
        Ok(Self {
            writing,
            pipeline,
            prometheus: metric::install()?,
            traces: traces.cloned(),
            flushed: AtomicBool::new(false),
        })
    }

    /// Decides which requests are traced.
    #[must_use]
    pub fn sampler(&self) -> Sampler {
        match (&self.pipeline, &self.traces) {
            (Some(pipeline), Some(traces)) => {
                Sampler::new(traces.sampler, std::sync::Arc::clone(&pipeline.breaker))
            }
            _ => Sampler::off(),
        }
    }

    /// Every metric, in a format that a scraper reads.
    #[must_use]
    pub fn render_metrics(&self, format: Format) -> String {
        metric::render(&self.prometheus, self.writing.lines_dropped(), format)
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
fn tracer() -> Option<&'static SdkTracer> {
    TRACER.get()
}
