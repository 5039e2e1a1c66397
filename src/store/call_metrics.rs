//! Metrics of store calls: outcomes, durations, and a limit on the series of failures.
//!
//! Must not know: how a call is made.

use std::sync::LazyLock;
use std::time::Duration;

use metrics::{Counter, Histogram};

use super::error::System;
use crate::metrics::catalog::{CALL_DURATION, CALLS};
use crate::metrics::limit::{OTHER, SeriesLimit};

/// Maximum number of series of failed calls, of all operations together, plus one shared series for
/// each operation. The codes come from a store.
const FAILURE_SERIES: usize = 20;
static FAILURES: LazyLock<SeriesLimit> = LazyLock::new(|| SeriesLimit::new(FAILURE_SERIES));

/// How a call to a store ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CallOutcome {
    /// The store replied as asked.
    Ok,
    /// The store refused, or the connection failed.
    Error,
    /// The deadline passed.
    Timeout,
    /// The caller dropped the call before the reply.
    Cancelled,
}

impl CallOutcome {
    const ALL: [Self; 4] = [Self::Ok, Self::Error, Self::Timeout, Self::Cancelled];

    const fn label(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Error => "error",
            Self::Timeout => "timeout",
            Self::Cancelled => "cancelled",
        }
    }
}

/// The handles of one operation of one store.
#[derive(Debug)]
pub(super) struct CallMetrics {
    system: System,
    namespace: String,
    operation: &'static str,
    succeeded: Histogram,
    counts: [Counter; 4],
}

impl CallMetrics {
    /// Creates every series that does not depend on an error's code.
    pub(super) fn new(system: System, namespace: &str, operation: &'static str) -> Self {
        let succeeded = [system.name(), namespace, operation, "", ""];
        let count = |outcome: CallOutcome| CALLS.with([system.name(), operation, outcome.label()]);
        Self {
            system,
            namespace: namespace.to_owned(),
            operation,
            succeeded: CALL_DURATION.with(succeeded),
            counts: CallOutcome::ALL.map(count),
        }
    }

    /// Records a call that succeeded.
    pub(super) fn record_success(&self, took: Duration) {
        self.counts[CallOutcome::Ok as usize].increment(1);
        self.succeeded.record(took);
    }

    /// Records a call that failed, with its `error.type` and the store's code if it sent one.
    pub(super) fn record_failure(
        &self,
        outcome: CallOutcome,
        took: Duration,
        error_type: &str,
        code: Option<&str>,
    ) {
        self.counts[outcome as usize].increment(1);
        let labels = self.failure_labels(error_type, code, &FAILURES);
        CALL_DURATION.with(labels).record(took);
    }

    /// The labels of a failure. A failure whose code is malformed, or whose series would exceed the
    /// limit, shares a series with all others of its operation.
    fn failure_labels<'a>(
        &'a self,
        error_type: &'a str,
        code: Option<&'a str>,
        limit: &SeriesLimit,
    ) -> [&'a str; 5] {
        let (system, namespace, operation) = (self.system.name(), &self.namespace, self.operation);
        let labels = [system, namespace, operation, error_type, code.unwrap_or("")];
        let is_admitted = || error_type == OTHER || limit.admits(&CALL_DURATION.key(labels));
        if code.is_none_or(is_code) && is_admitted() {
            labels
        } else {
            [system, namespace, operation, OTHER, ""]
        }
    }
}

/// Whether a text looks like a SQLSTATE or the first word of a Redis error.
fn is_code(text: &str) -> bool {
    let is_of_a_code =
        |byte: u8| byte.is_ascii_uppercase() || byte.is_ascii_digit() || byte == b'_';
    (1..=32).contains(&text.len()) && text.bytes().all(is_of_a_code)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn calls(operation: &'static str) -> CallMetrics {
        CallMetrics::new(System::Postgresql, "d", operation)
    }

    #[test]
    fn store_that_sends_hundreds_of_codes_makes_a_bounded_number_of_series() {
        let limit = SeriesLimit::new(FAILURE_SERIES);
        let operations = ["SELECT", "BEGIN"].map(calls);
        let codes: Vec<_> = (0..500).map(|code| format!("X{code:04}")).collect();
        let mut series = HashSet::new();
        for code in &codes {
            for calls in &operations {
                series.insert(calls.failure_labels(code, Some(code), &limit));
            }
        }
        assert_eq!(series.len(), FAILURE_SERIES + operations.len());
        // A bucket for each bound and one for the rest, a sum and a count.
        let samples = series.len() * (CALL_DURATION.buckets().len() + 3);
        assert!(samples <= 352, "{samples}");
        let [_, _, _, early @ ..] =
            operations[0].failure_labels(&codes[0], Some(&codes[0]), &limit);
        assert_eq!(early, ["X0000", "X0000"]);
        let [_, _, _, late @ ..] =
            operations[0].failure_labels(&codes[499], Some(&codes[499]), &limit);
        assert_eq!(late, [OTHER, ""]);
    }

    #[test]
    fn malformed_code_is_no_label() {
        let (limit, calls) = (SeriesLimit::new(FAILURE_SERIES), calls("SELECT"));
        let long = "X".repeat(33);
        for code in ["", "no code", "wrongtype", "\u{e9}", &long] {
            let [_, _, _, labels @ ..] = calls.failure_labels(code, Some(code), &limit);
            assert_eq!(labels, [OTHER, ""], "{code}");
        }
        for code in ["57P01", "WRONGTYPE"] {
            assert_eq!(calls.failure_labels(code, Some(code), &limit)[4], code);
        }
    }
}
