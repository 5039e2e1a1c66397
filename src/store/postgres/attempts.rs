//! Spaces attempts to migrate that fail for the same reason: each locks the table of visits.
//!
//! Must not know: what an attempt does.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::causes;
use crate::store::error::Error;

/// The pause after the first failure. It doubles with each further one.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// The last attempt that failed, if no other has succeeded since.
#[derive(Debug, Default)]
pub(super) struct Attempts(Mutex<Option<Failure>>);

#[derive(Debug)]
struct Failure {
    /// The database as the attempt met it.
    state: String,
    /// The error's SQLSTATE and text.
    error: (Option<String>, String),
    pause: Duration,
    at: Instant,
}

impl Attempts {
    /// The error of the last attempt, if the next one has to wait. In a database in another state
    /// it never does.
    pub(super) fn last_failure(&self, state: &str) -> Option<Error> {
        let last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let last = last.as_ref()?;
        let waits = last.state == state && last.at.elapsed() < last.pause;
        waits.then(|| match last.error.clone() {
            (Some(code), why) => Error::Refused {
                code,
                source: why.into(),
            },
            (None, why) => Error::Unexpected(why.into()),
        })
    }

    /// Notes how an attempt ended that began in this state of the database.
    pub(super) fn note(&self, state: String, error: Option<&Error>) {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let error = match error {
            Some(Error::Refused { code, source }) => (Some(code.clone()), causes::line(&**source)),
            Some(Error::Unexpected(source)) => (None, causes::line(&**source)),
            // It has succeeded, or the connection has failed, which says nothing about the next.
            _ => {
                *last = None;
                return;
            }
        };
        let pause = match &*last {
            Some(last) if last.state == state && last.error == error => {
                (last.pause * 2).min(LONGEST_PAUSE)
            }
            _ => FIRST_PAUSE,
        };
        *last = Some(Failure {
            state,
            error,
            pause,
            at: Instant::now(),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(why: &'static str) -> Error {
        Error::Refused {
            code: "0A000".to_owned(),
            source: why.into(),
        }
    }

    fn pause(attempts: &Attempts) -> Duration {
        attempts.0.lock().unwrap().as_ref().unwrap().pause
    }

    #[test]
    fn pause_grows_while_the_failure_is_the_same() {
        let attempts = Attempts::default();
        let mut pauses = Vec::new();
        for _ in 0..9 {
            attempts.note("a".to_owned(), Some(&refused("a view")));
            pauses.push(pause(&attempts).as_millis());
        }
        assert_eq!(pauses, [100, 200, 400, 800, 1600, 3200, 5000, 5000, 5000]);
        let repeated = attempts.last_failure("a").expect("a pause");
        assert_eq!(repeated.chain(), refused("a view").chain());
        assert!(attempts.last_failure("b").is_none());
        attempts.note("a".to_owned(), Some(&refused("another view")));
        assert_eq!(pause(&attempts), FIRST_PAUSE);
        attempts.note("b".to_owned(), Some(&refused("another view")));
        assert_eq!(pause(&attempts), FIRST_PAUSE);
    }

    #[test]
    fn table_that_cannot_be_adopted_asks_for_a_pause_although_no_statement_failed() {
        let attempts = Attempts::default();
        attempts.note("a".to_owned(), Some(&Error::Unexpected("a view".into())));
        let repeated = attempts.last_failure("a").expect("a pause");
        assert!(matches!(repeated, Error::Unexpected(_)), "{repeated:?}");
        assert!(repeated.chain().contains("a view"), "{repeated:?}");
    }

    #[test]
    fn failed_connection_asks_for_no_pause() {
        let attempts = Attempts::default();
        attempts.note("a".to_owned(), Some(&refused("a view")));
        let reset = Error::Connection("reset".into());
        attempts.note("a".to_owned(), Some(&reset));
        assert!(attempts.last_failure("a").is_none());
    }
}
