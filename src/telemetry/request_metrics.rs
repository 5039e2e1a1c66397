//! Metrics of requests: the number in flight, their durations, and a limit on the number of series.
//!
//! A client chooses the method and the protocol version, so the number of their combinations with
//! routes and statuses needs a limit. Must not know: headers, bodies and clients.

use std::sync::LazyLock;
use std::time::Duration;

use http::StatusCode;
use metrics::{Gauge, Histogram, Key};
use opentelemetry::trace::SpanContext;

use crate::metrics::catalog::{HTTP_ACTIVE, HTTP_DURATION};
use crate::metrics::limit::{OTHER, SeriesLimit};
use crate::metrics::openmetrics::EXEMPLARS;

static ACTIVE_GET: LazyLock<Gauge> = LazyLock::new(|| HTTP_ACTIVE.with(["GET", "http"]));
static VISIT_OK: LazyLock<Series> = LazyLock::new(|| Series::new(Kind::visit(StatusCode::OK)));
static VISIT_UNAVAILABLE: LazyLock<Series> =
    LazyLock::new(|| Series::new(Kind::visit(StatusCode::SERVICE_UNAVAILABLE)));
static LIMITS: LazyLock<Limits> = LazyLock::new(|| Limits::new(OTHER_SERIES));

/// Maximum number of series of `GET`s with status 200 or 503: two for each of eleven routes.
const EXPECTED_SERIES: usize = 22;
/// Maximum number of series of all other requests, plus one shared series for each status.
const OTHER_SERIES: usize = 14;

/// The properties of a request that distinguish its series.
#[derive(Debug, Clone, Copy)]
pub(super) struct Kind<'a> {
    /// One of a fixed set of names.
    pub(super) method: &'static str,
    /// The route that the request matched.
    pub(super) route: Option<&'a str>,
    /// Absent if the client disconnected before there was a response.
    pub(super) status: Option<StatusCode>,
    /// One of a fixed set of names.
    pub(super) version: &'static str,
}

/// One series of requests.
struct Series {
    key: Key,
    durations: Histogram,
}

/// Limits the series. Expected series have a limit of their own, so that a client cannot displace
/// them.
struct Limits {
    expected: SeriesLimit,
    others: SeriesLimit,
}

/// Creates the series that are known beforehand.
pub(super) fn declare() {
    LazyLock::force(&ACTIVE_GET);
    LazyLock::force(&VISIT_OK);
    LazyLock::force(&VISIT_UNAVAILABLE);
}

/// Adds to the number of requests in flight. Routes have no methods other than `GET` and `HEAD`.
pub(super) fn add_active(method: &'static str, change: f64) {
    match method {
        "GET" => ACTIVE_GET.increment(change),
        "HEAD" => HTTP_ACTIVE.with(["HEAD", "http"]).increment(change),
        _ => HTTP_ACTIVE.with([OTHER, "http"]).increment(change),
    }
}

/// Records a request's duration and, if it was sampled, its span.
pub(super) fn record(kind: Kind<'_>, took: Duration, span: Option<&SpanContext>) {
    let status = kind.status.as_ref().map(StatusCode::as_u16);
    match (kind.method, kind.route, status, kind.version) {
        ("GET", Some("/"), Some(200), "1.1") => VISIT_OK.record(took, span),
        ("GET", Some("/"), Some(503), "1.1") => VISIT_UNAVAILABLE.record(took, span),
        _ => Series::new(kind.bounded(&LIMITS)).record(took, span),
    }
}

impl Limits {
    fn new(others: usize) -> Self {
        Self {
            expected: SeriesLimit::new(EXPECTED_SERIES),
            others: SeriesLimit::new(others),
        }
    }
}

impl Kind<'_> {
    const fn visit(status: StatusCode) -> Self {
        Self {
            method: "GET",
            route: Some("/"),
            status: Some(status),
            version: "1.1",
        }
    }

    /// The kind that a request is counted as. Client errors, and requests whose series would exceed
    /// the limit, share one series for each status. A visit always has its own series.
    fn bounded(self, limits: &Limits) -> Self {
        let is_refused = self.status.is_some_and(|status| status.is_client_error());
        let is_visit = self.method == "GET" && self.route == Some("/");
        let status = self.status.as_ref().map(StatusCode::as_u16);
        let is_expected = self.method == "GET"
            && self.route.is_some()
            && self.version == "1.1"
            && matches!(status, Some(200 | 503));
        let limit = if is_expected {
            &limits.expected
        } else {
            &limits.others
        };
        if !is_refused && (is_visit || limit.admits(&HTTP_DURATION.key(self.labels()))) {
            return self;
        }
        Self {
            method: OTHER,
            route: None,
            status: self.status,
            version: "1.1",
        }
    }

    fn labels(&self) -> [&str; 6] {
        let status = self.status.as_ref().map_or("", StatusCode::as_str);
        let is_error = self.status.is_some_and(|status| status.is_server_error());
        let error_type = if is_error { status } else { "" };
        let route = self.route.unwrap_or("");
        [self.method, "http", self.version, route, status, error_type]
    }
}

impl Series {
    fn new(kind: Kind<'_>) -> Self {
        Self {
            key: HTTP_DURATION.key(kind.labels()),
            durations: HTTP_DURATION.with(kind.labels()),
        }
    }

    fn record(&self, took: Duration, span: Option<&SpanContext>) {
        self.durations.record(took);
        if let Some(span) = span {
            EXEMPLARS.keep(&self.key, HTTP_DURATION.buckets(), took.as_secs_f64(), span);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    /// A bucket for each bound and one for the rest, a sum and a count.
    const SAMPLES_OF_A_SERIES: usize = HTTP_DURATION.buckets().len() + 3;

    /// Every possible kind of request, with far more routes than the service has.
    fn kinds(routes: &[String]) -> Vec<Kind<'_>> {
        let mut kinds = Vec::new();
        let statuses = [200, 204, 304, 400, 404, 405, 431, 500, 503];
        let statuses = statuses.map(|status| StatusCode::from_u16(status).ok());
        for version in ["1.0", "1.1"] {
            for route in routes
                .iter()
                .map(|route| Some(route.as_str()))
                .chain([None])
            {
                for status in statuses.into_iter().chain([None]) {
                    kinds.extend(["GET", "HEAD", "POST", "TRACE", OTHER].map(|method| Kind {
                        method,
                        route,
                        status,
                        version,
                    }));
                }
            }
        }
        kinds
    }

    #[test]
    fn requests_of_all_kinds_have_at_most_1160_samples() {
        let mut routes: Vec<_> = (0..40).map(|number| format!("/{number}")).collect();
        routes.push("/".to_owned());
        let limits = Limits::new(OTHER_SERIES);
        let series = |kinds: &[Kind<'_>]| {
            let counted = kinds
                .iter()
                .map(|kind| HTTP_DURATION.key(kind.bounded(&limits).labels()));
            counted.collect::<HashSet<_>>()
        };
        let kinds = kinds(&routes);
        let first = series(&kinds);
        assert_eq!(series(&kinds), first, "a kind keeps its series");
        let samples = first.len() * SAMPLES_OF_A_SERIES;
        assert!(samples <= 1160, "{samples}");
    }

    #[test]
    fn visit_has_a_series_of_its_own_when_all_others_are_taken() {
        let limits = Limits::new(0);
        for (method, own) in [("GET", true), ("HEAD", false)] {
            let kind = Kind {
                method,
                version: "1.0",
                ..Kind::visit(StatusCode::INTERNAL_SERVER_ERROR)
            };
            assert_eq!(kind.bounded(&limits).route.is_some(), own, "{method}");
        }
    }
}
