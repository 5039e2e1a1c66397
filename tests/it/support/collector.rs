//! A collector for the service's spans, and the traces in it.

use std::ops::Deref;

pub(crate) use lab::collector::{Behaviour, Export, ExportedSpan, hex, named, text};

use super::{Response, SOON, eventually};

/// A collector, which ends with the test.
pub(crate) struct Collector(lab::collector::Collector);

impl Collector {
    /// Starts one that takes spans, on a free port.
    pub(crate) async fn start() -> Self {
        Self(lab::collector::Collector::start().await)
    }

    /// The spans of a response's trace, once there are so many.
    pub(crate) async fn trace_of(&self, response: &Response, spans: usize) -> Vec<ExportedSpan> {
        let trace = response.header("traceresponse").get(3..35);
        let trace = trace.expect("the response names its trace").to_owned();
        self.trace(&trace, spans).await
    }

    /// The spans of a trace, once there are so many.
    pub(crate) async fn trace(&self, trace: &str, spans: usize) -> Vec<ExportedSpan> {
        let mut found = Vec::new();
        eventually("the trace is exported", SOON, async || {
            found = self.spans();
            found.retain(|exported| hex(&exported.span.trace_id) == trace);
            found.len() >= spans
        })
        .await;
        found
    }
}

impl Deref for Collector {
    type Target = lab::collector::Collector;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}
