//! What a scraper reads: every name, type, unit, help text, label and bucket, in both formats,
//! and the exemplars that lead to traces.
//!
//! The two expositions in the folder next to this file are what dashboards and rules rely on.
//! `UPDATE_EXPECT=1 cargo test --test it exposition` rewrites them.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use expect_test::expect_file;
use http::{HeaderMap, Method};

use crate::support::collector::{Collector, hex};
use crate::support::exposition::{Exemplar, Exposition, Family};
use crate::support::prometheus::Prometheus;
use crate::support::traces::{UNSAMPLED, ask, traced, traced_with};
use crate::support::{HeldCount, SOON, Service, World, eventually, without_stores};

#[tokio::test(flavor = "multi_thread")]
async fn first_scrape_has_every_series_in_the_text_format() {
    let service = without_stores(&[]).await;
    let exposition = Exposition::text(&service).await;
    expect_file!["exposition/text.txt"].assert_eq(&skeleton(&exposition));
    let content_type = "text/plain; version=0.0.4; charset=utf-8";
    assert_eq!(exposition.content_type, content_type);
}

#[tokio::test(flavor = "multi_thread")]
async fn first_scrape_has_every_series_in_openmetrics() {
    let service = without_stores(&[]).await;
    let exposition = Exposition::openmetrics(&service).await;
    expect_file!["exposition/openmetrics.txt"].assert_eq(&skeleton(&exposition));
    let content_type = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    assert_eq!(exposition.content_type, content_type);
}

#[tokio::test(flavor = "multi_thread")]
async fn both_formats_have_the_same_samples() {
    let (_world, _collector, service) = after_requests_of_all_kinds().await;
    let series = |families: &[Family]| samples(families).into_keys().collect::<Vec<_>>();
    let (mut text, mut openmetrics) = (Vec::new(), Vec::new());
    // A call that fails for a new reason between the two scrapes adds a series.
    eventually("both formats have the same series", SOON, async || {
        text = Exposition::text(&service).await.families();
        openmetrics = Exposition::openmetrics(&service).await.families();
        series(&text) == series(&openmetrics)
    })
    .await;
    let described = |families: &[Family]| {
        let of = |family: &Family| {
            (
                family.name.clone(),
                family.kind.clone(),
                family.help.clone(),
            )
        };
        families.iter().map(of).collect::<Vec<_>>()
    };
    assert_eq!(described(&text), described(&openmetrics));
    let (text, openmetrics) = (samples(&text), samples(&openmetrics));
    let is_at_rest = |(name, labels): &Series| {
        name == "visitas_visits_total" || labels.get("http_route").is_some_and(|route| route == "/")
    };
    let at_rest: Vec<_> = text.keys().filter(|series| is_at_rest(series)).collect();
    assert!(at_rest.len() > 60, "{at_rest:?}");
    for series in at_rest {
        assert_eq!(text[series], openmetrics[series], "{series:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn units_match_the_names() {
    let service = without_stores(&[]).await;
    for family in Exposition::openmetrics(&service).await.families() {
        let unit = ["seconds", "bytes"]
            .into_iter()
            .find(|unit| family.name.ends_with(unit));
        assert_eq!(family.unit, unit.unwrap_or(""), "{}", family.name);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn promtool_reports_one_known_complaint() {
    let (_world, _collector, service) = after_requests_of_all_kinds().await;
    let known = "db_client_connection_count non-histogram and non-summary metrics should not \
                 have \"_count\" suffix";
    assert_eq!(Exposition::text(&service).await.complaints(), [known]);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "floods: make faults"]
async fn ten_thousand_paths_and_methods_add_no_series() {
    let world = World::new();
    let service = world.serve().await;
    let strange = async |number: usize| {
        let method = Method::from_bytes(format!("M{number}").as_bytes()).unwrap();
        let path = format!("/{number}?query={number}");
        service.ask(method, &path, HeaderMap::new()).await;
    };
    strange(0).await;
    let before = Exposition::text(&service).await.families();
    for number in 1..=10_000 {
        strange(number).await;
    }
    let after = Exposition::text(&service).await.families();
    let series = |families: &[Family]| samples(families).into_keys().collect::<Vec<_>>();
    // The first scrape has been counted since.
    let mut known = series(&before);
    known.extend(series(&after).into_iter().filter(|series| {
        series
            .1
            .get("http_route")
            .is_some_and(|route| route == "/metrics")
    }));
    known.sort_unstable();
    assert_eq!(series(&after), known);
}

#[tokio::test(flavor = "multi_thread")]
async fn document_has_a_row_for_every_metric_with_its_type_and_labels() {
    let service = without_stores(&[]).await;
    let text = Exposition::text(&service).await;
    let rows: Vec<_> = include_str!("../../docs/metrics.md")
        .lines()
        .filter(|line| line.starts_with("| `"))
        .collect();
    let mut named: Vec<_> = rows.iter().flat_map(|row| words(row, 1)).collect();
    for family in text.families() {
        let total = if family.kind == "counter" {
            "_total"
        } else {
            ""
        };
        let name = format!("{}{total}", family.name);
        let row = rows
            .iter()
            .find(|row| words(row, 1).contains(&name.as_str()));
        let row = row.unwrap_or_else(|| panic!("no row for {name}"));
        assert_eq!(row.split('|').nth(2).unwrap().trim(), family.kind, "{name}");
        let labels = family
            .samples
            .iter()
            .flat_map(|sample| sample.labels.keys());
        let unknown: Vec<_> = labels
            .filter(|label| *label != "le" && !words(row, 3).contains(&label.as_str()))
            .collect();
        assert!(unknown.is_empty(), "{name}: {unknown:?}");
        named.retain(|other| *other != name);
    }
    assert!(named.is_empty(), "not exported: {named:?}");
}

// --- exemplars ---

#[tokio::test(flavor = "multi_thread")]
async fn bucket_has_the_trace_and_span_of_its_last_sampled_request() {
    let (world, collector) = (World::new(), Collector::start().await);
    let service = traced(&world, &collector).await;
    let (fast, slow) = (service.get("/").await, slow_visit(&world, &service).await);
    let exemplars = exemplars(&service).await;
    assert_eq!(exemplars.len(), 2, "{exemplars:?}");
    for (response, (bounds, exemplar)) in [fast, slow].iter().zip(&exemplars) {
        let ids = &response.header("traceresponse")[3..52];
        let (trace, span) = (&exemplar.labels["trace_id"], &exemplar.labels["span_id"]);
        assert_eq!(format!("{trace}-{span}"), ids);
        assert!(bounds.contains(&exemplar.value), "{bounds:?} {exemplar:?}");
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let age = now.as_secs_f64() - exemplar.timestamp;
        assert!((0.0..60.0).contains(&age), "{age} s old");
        let spans = collector.trace_of(response, 3).await;
        let server = spans.iter().find(|exported| exported.span.name == "GET /");
        assert_eq!(&hex(&server.unwrap().span.span_id), span);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn request_that_is_not_sampled_leaves_no_exemplar() {
    let (world, collector) = (World::new(), Collector::start().await);
    let service = traced(&world, &collector).await;
    ask(&service, "/", &[("traceparent", UNSAMPLED)]).await;
    assert!(exemplars(&service).await.is_empty());
    service.visit().await;
    assert_eq!(exemplars(&service).await.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn text_format_has_no_exemplars() {
    let (world, collector) = (World::new(), Collector::start().await);
    let service = traced(&world, &collector).await;
    service.visit().await;
    let text = Exposition::text(&service).await;
    assert!(!text.body.contains("trace_id"), "{}", text.body);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "reads a clock: make faults"]
async fn prometheus_keeps_exemplars_that_lead_to_traces() {
    let (world, collector) = (World::new(), Collector::start().await);
    let service = traced(&world, &collector).await;
    let prometheus = Prometheus::start(&[service.address]).await;
    let visit = slow_visit(&world, &service).await;
    let slow = "http_server_request_duration_seconds_bucket{http_route=\"/\",le=\"0.5\"}";
    let always = [("query", slow), ("start", "0"), ("end", "32503680000")];
    eventually("the exemplar is stored", SOON, async || {
        let response = prometheus.api("query_exemplars", &always).await;
        let labels = &response["data"][0]["exemplars"][0]["labels"];
        labels["trace_id"] == visit.header("traceresponse")[3..35]
            && labels["span_id"] == visit.header("traceresponse")[36..52]
    })
    .await;
}

// --- wiring ---

type Series = (String, BTreeMap<String, String>);
type Samples = BTreeMap<Series, String>;

/// A service that has answered, refused and failed requests, all of them sampled.
async fn after_requests_of_all_kinds() -> (World, Collector, Service) {
    let (world, collector) = (World::new(), Collector::start().await);
    let service = traced_with(&world, &collector, &[]).await;
    service.visit().await;
    slow_visit(&world, &service).await;
    for (method, path) in [
        (Method::HEAD, "/"),
        (Method::POST, "/"),
        (Method::GET, "/nothing"),
    ] {
        service.ask(method, path, HeaderMap::new()).await;
    }
    // So that a scrape has been counted before the first that is compared.
    Exposition::text(&service).await;
    let held = HeldCount::of(&world).await;
    service.get("/").await;
    held.release().await;
    service.until_ready().await;
    (world, collector, service)
}

/// A visit that waits for the count's lock long enough to fall into the bucket up to 0.5 s.
async fn slow_visit(world: &World, service: &Service) -> crate::support::Response {
    let mut held = HeldCount::of(world).await;
    let visit = service.begin_visit();
    held.until_waited_for().await;
    // The duration is what is looked at.
    tokio::time::sleep(Duration::from_millis(300)).await;
    held.release().await;
    visit.await.unwrap()
}

/// An exposition without what differs from run to run: values, and the calls that have failed.
fn skeleton(exposition: &Exposition) -> String {
    let mut lines = Vec::new();
    let body = exposition.sorted();
    for line in body.lines() {
        let value = line.rfind(' ').filter(|_| !line.starts_with('#'));
        let line = value.map_or(line, |value| &line[..value]);
        if line.starts_with("visitas_build_info") {
            let labels = line.split('"').step_by(2).collect::<Vec<_>>();
            lines.push(labels.join("\"…\""));
        } else if !line.contains("error_type=\"connection\"") {
            lines.push(line.to_owned());
        }
    }
    lines.join("\n") + "\n"
}

/// The code spans of a table cell.
fn words(row: &'static str, cell: usize) -> Vec<&'static str> {
    let cell = row.split('|').nth(cell).unwrap_or("");
    cell.split('`').skip(1).step_by(2).collect()
}

fn samples(families: &[Family]) -> Samples {
    let samples = families.iter().flat_map(|family| &family.samples);
    let of = |sample: &crate::support::exposition::Sample| {
        let series = (sample.name.clone(), sample.labels.clone());
        (series, sample.value.clone())
    };
    samples.map(of).collect()
}

/// The exemplars of visits that succeeded, each with the range of its bucket, in the order of the
/// buckets.
async fn exemplars(service: &Service) -> Vec<(std::ops::RangeInclusive<f64>, Exemplar)> {
    let mut below = 0.0;
    let mut exemplars = Vec::new();
    for family in Exposition::openmetrics(service).await.families() {
        for sample in family.samples {
            let Some(bound) = sample.labels.get("le") else {
                assert!(sample.exemplar.is_none(), "{sample:?}");
                continue;
            };
            let bound = bound.parse().unwrap_or(f64::INFINITY);
            let bounds = below..=bound;
            below = if bound.is_finite() { bound } else { 0.0 };
            if let Some(exemplar) = sample.exemplar {
                assert_eq!(sample.name, "http_server_request_duration_seconds_bucket");
                exemplars.push((bounds, exemplar));
            }
        }
    }
    exemplars
}
