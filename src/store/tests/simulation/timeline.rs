//! What happens in a schedule, and when. Clones share it.

use std::fmt::{self, Display};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::time::Instant;

use super::server::Kind;
use super::world::{Fault, Reply};

/// The events and the violations so far.
#[derive(Debug, Clone)]
pub(super) struct Timeline {
    began: Instant,
    log: Arc<Mutex<Log>>,
}

#[derive(Debug, Default)]
struct Log {
    events: Vec<(Instant, Event)>,
    violations: Vec<(Instant, String)>,
}

/// Visits have numbers from 0, in the order in which they are sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Event {
    /// A client sends a visit.
    Sends {
        client: usize,
        visit: usize,
    },
    /// A client disconnects before the reply to its visit.
    Leaves {
        visit: usize,
    },
    Replied {
        visit: usize,
        reply: Reply,
    },
    /// A batch is handed to a connection; `first` is its first visit.
    Statement {
        first: usize,
        visits: usize,
    },
    Commit {
        total: usize,
    },
    Increment {
        by: i64,
        value: i64,
    },
    /// A store refuses a call, or a call times out in it.
    Refusal {
        store: Kind,
        code: &'static str,
    },
    Begins {
        fault: Fault,
    },
    Ends {
        fault: Fault,
    },
    Up {
        store: Kind,
    },
    Down {
        store: Kind,
    },
    Stop,
    Abort,
}

impl Timeline {
    /// Must be called inside the runtime.
    pub(super) fn new() -> Self {
        Self {
            began: Instant::now(),
            log: Arc::default(),
        }
    }

    pub(super) fn began(&self) -> Instant {
        self.began
    }

    pub(super) fn add(&self, event: Event) {
        self.log().events.push((Instant::now(), event));
    }

    /// Notes that something happened that must not.
    pub(super) fn violate(&self, what: impl Into<String>) {
        self.log().violations.push((Instant::now(), what.into()));
    }

    pub(super) fn check(&self, holds: bool, what: impl FnOnce() -> String) {
        if !holds {
            self.violate(what());
        }
    }

    pub(super) fn is_violated(&self) -> bool {
        !self.log().violations.is_empty()
    }

    /// Whether this happened at this moment.
    pub(super) fn has(&self, moment: Instant, event: Event) -> bool {
        self.log().events.contains(&(moment, event))
    }

    pub(super) fn count(&self, is_meant: impl Fn(&Event) -> bool) -> usize {
        let log = self.log();
        log.events
            .iter()
            .filter(|(_, event)| is_meant(event))
            .count()
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Display for Timeline {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let log = self.log();
        let millis = |at: &Instant| (*at - self.began).as_secs_f64() * 1e3;
        for (at, event) in &log.events {
            writeln!(formatter, "{:10.3} {event:?}", millis(at))?;
        }
        for (at, what) in &log.violations {
            writeln!(formatter, "{:10.3} VIOLATION: {what}", millis(at))?;
        }
        Ok(())
    }
}
