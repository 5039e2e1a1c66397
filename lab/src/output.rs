//! Reads a process's output line by line; the reader can stall or leave.

use std::io::{BufRead as _, BufReader, Read};
use std::sync::{Arc, Mutex};

use crate::wait::locked;

/// The behaviour of a log's reader once the service listens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reader {
    /// Continues to read.
    Stays,
    /// Keeps the pipe and reads no more.
    Stalls,
    /// Closes the pipe.
    Leaves,
}

/// The lines that a process has printed to one pipe.
#[derive(Clone, Default)]
pub struct Output(Arc<Lines>);

#[derive(Default)]
struct Lines {
    lines: Mutex<Vec<String>>,
    /// The pipe, once its reader has stalled.
    unread: Mutex<Option<Box<dyn Read + Send>>>,
}

impl Output {
    /// Starts to read a pipe.
    pub fn read(pipe: impl Read + Send + 'static, reader: Reader) -> Self {
        let output = Self::default();
        let read = output.clone();
        std::thread::spawn(move || {
            let mut pipe = BufReader::new(pipe);
            for line in pipe.by_ref().lines().map_while(Result::ok) {
                let is_last = reader != Reader::Stays && line.contains("\"listening\"");
                locked(&read.0.lines).push(line);
                if is_last {
                    break;
                }
            }
            if reader == Reader::Stalls {
                *locked(&read.0.unread) = Some(Box::new(pipe));
            }
        });
        output
    }

    /// The lines so far.
    pub fn lines(&self) -> Vec<String> {
        locked(&self.0.lines).clone()
    }
}
