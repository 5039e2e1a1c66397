//! The log: a line an event, written by a thread of its own, so that nobody who logs waits for
//! whoever reads.

use std::io::IsTerminal as _;

use tracing::Subscriber;
use tracing_appender::non_blocking::{ErrorCounter, NonBlocking, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::{EnvFilter, Layer};

use crate::config::{LogConfig, LogFormat};

/// Lines that may wait to be written. What does not fit is dropped and counted.
const BUFFERED_LINES: usize = 8192;

/// The thread that writes, flushed when this is dropped.
pub(super) struct Writing {
    _thread: WorkerGuard,
    dropped: ErrorCounter,
}

impl Writing {
    pub(super) fn start() -> (NonBlocking, Self) {
        let (writer, thread) = NonBlockingBuilder::default()
            .lossy(true)
            .buffered_lines_limit(BUFFERED_LINES)
            .thread_name("log")
            .finish(std::io::stdout());
        let dropped = writer.error_counter();
        let writing = Self {
            _thread: thread,
            dropped,
        };
        (writer, writing)
    }

    pub(super) fn lines_dropped(&self) -> u64 {
        self.dropped.dropped_lines() as u64
    }
}

/// The layer that formats lines.
pub(super) fn layer<S>(
    config: &LogConfig,
    writer: NonBlocking,
) -> anyhow::Result<Box<dyn Layer<S> + Send + Sync>>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    let filter = EnvFilter::try_new(&config.filter)?;
    let lines = tracing_subscriber::fmt::layer().with_writer(writer);
    Ok(match config.format {
        LogFormat::Json => lines
            .json()
            .flatten_event(true)
            // Whatever belongs to a request says so in fields of its own.
            .with_current_span(false)
            .with_span_list(false)
            .with_filter(filter)
            .boxed(),
        LogFormat::Pretty => lines
            .compact()
            .with_ansi(std::io::stdout().is_terminal())
            .with_target(false)
            .with_filter(filter)
            .boxed(),
    })
}
