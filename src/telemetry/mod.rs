//! Logs, traces and metrics: started first and flushed last.
//!
//! [`request`] wraps every request. It adds ids to the response's headers, and delays no response.
//!
//! Must not know: stores, and what a handler does.

mod collector;
mod exporter;
pub mod late;
mod log;
mod otlp;
mod panic;
mod propagation;
pub mod request;
mod request_metrics;
pub mod sampler;
pub(crate) mod span;

use std::sync::Arc;
use std::time::Duration;

use metrics_exporter_prometheus::PrometheusHandle;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

use self::exporter::Pipeline;
use self::log::LogWriter;
use self::sampler::Sampler;
use crate::config::{LogConfig, TracesConfig};
use crate::metrics::catalog::BUILD_INFO;
use crate::metrics::{self, Format};

/// Running telemetry. Dropping it writes the rest of the log.
pub struct Telemetry {
    /// Held for its `Drop`, which writes the rest of the log.
    _log: LogWriter,
    pipeline: Option<Pipeline>,
    sampler: Sampler,
    prometheus: PrometheusHandle,
}

impl Telemetry {
    /// Starts logs, metrics and, if `traces` has an exporter, traces. With `trace_context` a
    /// request's headers can name its parent span. From then on panics are logged. Dropping
    /// telemetry waits for the log for at most `log_timeout`. Must be called once, and outside the
    /// runtime.
    ///
    /// # Errors
    ///
    /// If a part cannot be built, or telemetry has been started before.
    pub fn start(
        log: &LogConfig,
        traces: Option<&TracesConfig>,
        trace_context: bool,
        log_timeout: Duration,
    ) -> anyhow::Result<Self> {
        // First, since a metric's handle made without a recorder records nothing.
        let prometheus = metrics::install()?;
        let build = [crate::VERSION, crate::REVISION, crate::RUSTC];
        BUILD_INFO.with(build).set(1.0);
        exporter::declare_metrics();
        let writer = LogWriter::start(log_timeout)?;
        let mut sampler = Sampler::off(trace_context);
        let mut pipeline = None;
        if let Some(traces) = traces
            && let Some(exporter) = &traces.exporter
        {
            let started = Pipeline::new(traces, exporter)?;
            let collector = Arc::clone(&started.collector);
            sampler = Sampler::new(traces.otel_traces_sampler, collector, trace_context);
            pipeline = Some(started);
        }
        tracing_subscriber::registry()
            .with(log::layer(log, writer.buffer())?)
            .with(span::layer())
            .try_init()?;
        panic::install_hook();
        Ok(Self {
            _log: writer,
            pipeline,
            sampler,
            prometheus,
        })
    }

    /// The sampler, which decides which requests are traced.
    #[must_use]
    pub fn sampler(&self) -> Sampler {
        self.sampler.clone()
    }

    /// Whether spans are being exported: a collector has accepted some, and has not stopped doing so.
    #[must_use]
    pub fn is_exporting(&self) -> bool {
        let pipeline = self.pipeline.as_ref();
        pipeline.is_some_and(|pipeline| pipeline.collector.accepts_spans())
    }

    /// A random id of this process. Its spans have it as `service.instance.id`.
    #[must_use]
    pub fn instance_id(&self) -> &'static str {
        exporter::instance_id()
    }

    /// Renders every metric.
    #[must_use]
    pub fn render_metrics(&self, format: Format) -> String {
        metrics::render(&self.prometheus, format)
    }

    /// Folds the samples recorded since the last call or scrape into the histograms. Until then
    /// each sample takes memory.
    pub fn upkeep(&self) {
        self.prometheus.run_upkeep();
    }

    /// Sends the remaining spans, for at most `timeout`. Blocks. A second call does nothing.
    pub fn flush(&self, timeout: Duration) {
        if let Some(pipeline) = &self.pipeline {
            pipeline.shut_down(timeout);
        }
    }
}
