//! The log: a line an event, written by a thread of its own, so that nobody who logs waits for
//! whoever reads.

use std::collections::VecDeque;
use std::io::{self, IsTerminal as _, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use tracing::Subscriber;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::{EnvFilter, Layer};

use crate::config::{LogConfig, LogFormat};

/// Lines that may wait to be written, and their bytes: a line can be as long as what a store says.
/// What does not fit is dropped and counted.
const BUFFERED_LINES: usize = 8192;
const BUFFERED_BYTES: usize = 8 << 20;

/// The thread that writes. Dropping this waits until everything is written, though not for ever:
/// nobody may read.
pub(super) struct Writing {
    buffer: Arc<Buffer>,
    patience: Duration,
}

impl Writing {
    pub(super) fn start(patience: Duration) -> anyhow::Result<Self> {
        let buffer = Arc::new(Buffer::default());
        let emptied = Arc::clone(&buffer);
        std::thread::Builder::new()
            .name("log".to_owned())
            .spawn(move || emptied.write_to(io::stdout()))
            .context("starting the log's thread")?;
        Ok(Self { buffer, patience })
    }

    pub(super) fn buffer(&self) -> Arc<Buffer> {
        Arc::clone(&self.buffer)
    }

    pub(super) fn lines_dropped(&self) -> u64 {
        self.buffer.lines().dropped
    }
}

impl Drop for Writing {
    fn drop(&mut self) {
        let lines = self.buffer.lines();
        drop(
            self.buffer
                .emptied
                .wait_timeout_while(lines, self.patience, |lines| lines.unwritten()),
        );
    }
}

/// Lines between those who log and the thread that writes.
#[derive(Debug, Default)]
pub(super) struct Buffer {
    lines: Mutex<Lines>,
    filled: Condvar,
    emptied: Condvar,
}

#[derive(Debug, Default)]
struct Lines {
    waiting: VecDeque<Vec<u8>>,
    /// What those that wait have together.
    bytes: usize,
    /// Whether one more has been taken and is being written.
    writing: bool,
    dropped: u64,
}

impl Lines {
    /// Keeps a line, if there is room for it.
    fn push(&mut self, line: &[u8]) -> bool {
        let bytes = self.bytes + line.len();
        let fits = self.waiting.len() < BUFFERED_LINES && bytes <= BUFFERED_BYTES;
        if fits {
            self.waiting.push_back(line.to_vec());
            self.bytes = bytes;
        } else {
            self.dropped += 1;
        }
        fits
    }

    fn unwritten(&self) -> bool {
        self.writing || !self.waiting.is_empty()
    }
}

impl Buffer {
    /// Writes lines as they come, for ever. One that cannot be written is lost.
    fn write_to(&self, mut output: impl Write) {
        loop {
            let line = self.take();
            let written = output.write_all(&line);
            let mut lines = self.lines();
            lines.writing = false;
            lines.dropped += u64::from(written.is_err());
            if !lines.unwritten() {
                self.emptied.notify_all();
            }
        }
    }

    fn take(&self) -> Vec<u8> {
        let mut lines = self.lines();
        loop {
            if let Some(line) = lines.waiting.pop_front() {
                lines.bytes -= line.len();
                lines.writing = true;
                return line;
            }
            lines = self
                .filled
                .wait(lines)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The lock is never held while anything is written.
    fn lines(&self) -> MutexGuard<'_, Lines> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Write for &Buffer {
    /// Takes a whole line, or drops it.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if self.lines().push(line) {
            self.filled.notify_one();
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The layer that formats lines.
pub(super) fn layer<S>(
    config: &LogConfig,
    buffer: Arc<Buffer>,
) -> anyhow::Result<Box<dyn Layer<S> + Send + Sync>>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    // Spans are for the collector. Here each would be formatted, though whatever belongs to a
    // request says so in fields of its own.
    let no_spans = format!("{}=off", super::SPANS).parse()?;
    let panics = format!("{}=error", super::panic::TARGET).parse()?;
    let filter = EnvFilter::try_new(&config.rust_log)?
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
            .with_ansi(std::io::stdout().is_terminal())
            .with_target(false)
            .with_filter(filter)
            .boxed(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept_of(lines: usize, line: &[u8]) -> (usize, u64) {
        let buffer = Buffer::default();
        for _ in 0..lines {
            (&buffer).write_all(line).unwrap();
        }
        let lines = buffer.lines();
        (lines.waiting.len(), lines.dropped)
    }

    #[test]
    fn buffer_is_bounded_by_lines_and_by_bytes() {
        assert_eq!(kept_of(8193, b"a line of an ordinary length\n"), (8192, 1));
        assert_eq!(kept_of(10, &vec![b'x'; 1 << 20]), (8, 2));
        assert_eq!(kept_of(1, &vec![b'x'; (8 << 20) + 1]), (0, 1));
    }

    #[test]
    fn line_that_was_taken_makes_room() {
        let buffer = Buffer::default();
        for _ in 0..2 {
            (&buffer).write_all(&vec![b'x'; 8 << 20]).unwrap();
            assert_eq!(buffer.take().len(), 8 << 20);
        }
        assert_eq!(buffer.lines().dropped, 0);
    }
}
