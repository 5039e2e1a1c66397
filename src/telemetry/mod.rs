//! What the service reports about itself: logs, traces and metrics, started once and flushed last.
//!
//! Telemetry changes no response and delays none. [`request`] wraps every request.
//!
//! Must not know: routes and stores.

mod collector;
mod exporter;
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
    /// Writes the rest of the log when it is dropped.
    _log: LogWriter,
    pipeline: Option<Pipeline>,
    sampler: Sampler,
    prometheus: PrometheusHandle,
}

impl Telemetry {
    /// Starts logs, metrics and, if `traces` has an exporter, traces. With `trace_context` a
    /// request's headers say whose child it is. From then on a panic is a line of the log, and the
    /// end waits for the log's reader for at most `log_timeout`. Must be called once, and outside
    /// the runtime.
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
        // First, since a handle that is made without a recorder changes nothing.
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

    /// Decides which requests are traced.
    #[must_use]
    pub fn sampler(&self) -> Sampler {
        self.sampler.clone()
    }

    /// Every metric, in a format that a scraper reads.
    #[must_use]
    pub fn render_metrics(&self, format: Format) -> String {
        metrics::render(&self.prometheus, format)
    }

    /// Moves samples from where they are recorded to where they are kept. Until the next call or
    /// scrape each sample takes memory.
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
