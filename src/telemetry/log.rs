//! The log: one line per event. A thread of its own writes the lines, so that a stalled reader of
//! stdout delays no caller.
//!
//! Must not know: what a line says.

use std::io::{self, IsTerminal as _, Write};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::Context as _;
use metrics::Counter;
use tracing::Subscriber;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::{EnvFilter, Layer};

use super::{panic, span};
use crate::config::{LogConfig, LogFormat};
use crate::metrics::catalog::LOG_LINES_DROPPED;

/// Maximum numbers of lines and bytes that wait to be written; a store's error can make a line
/// long. Lines that do not fit are dropped and counted.
const BUFFERED_LINES: usize = 8192;
const BUFFERED_BYTES: usize = 8 << 20;

/// The target of the notices that Postgres sends, in its own words and as often as it likes.
const NOTICES: &str = "sqlx::postgres::notice";

/// The thread that writes. Dropping this waits until every line is written, for at most `timeout`:
/// stdout's reader can stall.
pub(super) struct LogWriter {
    buffer: Arc<Buffer>,
    /// Disconnected once the thread has ended. The lock only makes it `Sync`; it is never
    /// contended.
    ended: Mutex<Receiver<()>>,
    timeout: Duration,
}

impl LogWriter {
    pub(super) fn start(timeout: Duration) -> anyhow::Result<Self> {
        let (buffer, lines) = Buffer::new();
        let buffer = Arc::new(buffer);
        let written = Arc::clone(&buffer);
        let (end, ended) = channel();
        std::thread::Builder::new()
            .name("log".to_owned())
            .spawn(move || {
                written.write_lines(&lines, io::stdout());
                drop(end);
            })
            .context("starting the log's thread")?;
        Ok(Self {
            buffer,
            ended: Mutex::new(ended),
            timeout,
        })
    }

    pub(super) fn buffer(&self) -> Arc<Buffer> {
        Arc::clone(&self.buffer)
    }
}

impl Drop for LogWriter {
    fn drop(&mut self) {
        self.buffer.close();
        if let Ok(ended) = self.ended.get_mut() {
            ended.recv_timeout(self.timeout).ok();
        }
    }
}

/// The lines that wait for the thread that writes them.
#[derive(Debug)]
pub(super) struct Buffer {
    lines: SyncSender<Vec<u8>>,
    /// The bytes of all lines that are not written yet.
    bytes: AtomicUsize,
    dropped: Counter,
    closed: AtomicBool,
}

impl Buffer {
    fn new() -> (Self, Receiver<Vec<u8>>) {
        let (sender, lines) = sync_channel(BUFFERED_LINES);
        let buffer = Self {
            lines: sender,
            bytes: AtomicUsize::new(0),
            dropped: LOG_LINES_DROPPED.with([]),
            closed: AtomicBool::new(false),
        };
        (buffer, lines)
    }

    /// Adds a line if there is room. Returns whether there was.
    fn push(&self, line: &[u8]) -> bool {
        let with_line = |bytes| Some(bytes + line.len()).filter(|&bytes| bytes <= BUFFERED_BYTES);
        let reserved = self
            .bytes
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, with_line);
        let fits = reserved.is_ok() && self.lines.try_send(line.to_vec()).is_ok();
        if reserved.is_ok() && !fits {
            self.bytes.fetch_sub(line.len(), Ordering::SeqCst);
        }
        fits
    }

    /// Writes lines until the buffer is closed and empty. Drops and counts a line that cannot be
    /// written.
    fn write_lines(&self, lines: &Receiver<Vec<u8>>, mut output: impl Write) {
        for line in lines {
            if output.write_all(&line).is_err() {
                self.dropped.increment(1);
            }
            let bytes = self.bytes.fetch_sub(line.len(), Ordering::SeqCst);
            if bytes == line.len() && self.closed.load(Ordering::SeqCst) {
                return;
            }
        }
    }

    /// Makes the thread end once every line is written.
    fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        // An empty line wakes the thread if it waits for a line; it does not wait if the channel is
        // full.
        self.lines.try_send(Vec::new()).ok();
    }
}

impl Write for &Buffer {
    /// Accepts a whole line, or drops it.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if !self.push(line) {
            self.dropped.increment(1);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Makes the layer that formats lines.
pub(super) fn layer<S>(
    config: &LogConfig,
    buffer: Arc<Buffer>,
) -> anyhow::Result<Box<dyn Layer<S> + Send + Sync>>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    // Spans are for the collector. In the log each would be formatted, although a line about a
    // request already has fields with the request's ids.
    let no_spans = format!("{}=off", span::TARGET).parse()?;
    let panics = format!("{}=error", panic::TARGET).parse()?;
    // What is wrong is logged where it is handled. RUST_LOG can turn the server's notices on.
    let filter = EnvFilter::try_new(format!("{NOTICES}=off,{}", config.rust_log))?
        .add_directive(no_spans)
        .add_directive(panics);
    let lines = tracing_subscriber::fmt::layer().with_writer(buffer);
    Ok(match config.log_format {
        LogFormat::Json => lines
            .json()
            .flatten_event(true)
            .with_current_span(false)
            .with_span_list(false)
            .with_filter(filter)
            .boxed(),
        LogFormat::Pretty => lines
            .compact()
            .with_ansi(io::stdout().is_terminal())
            .with_target(false)
            .with_filter(filter)
            .boxed(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffer_is_bounded_by_lines_and_by_bytes_until_they_are_written() {
        let ordinary = b"a line of an ordinary length\n".to_vec();
        for (line, sent, kept) in [
            (ordinary, 8193, 8192),
            (vec![b'x'; 1 << 20], 10, 8),
            (vec![b'x'; (8 << 20) + 1], 1, 0),
        ] {
            let (buffer, lines) = Buffer::new();
            for _ in 0..sent {
                (&buffer).write_all(&line).unwrap();
            }
            buffer.close();
            let mut written = Vec::new();
            buffer.write_lines(&lines, &mut written);
            assert_eq!(written.len() as u64, kept * line.len() as u64);
            assert!(buffer.push(b"there is room again"));
        }
    }
}
