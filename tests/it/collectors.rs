//! Collectors that refuse spans, or fail in other ways: no visit suffers, and every lost span is
//! counted.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use reqwest::StatusCode;

use crate::support::collector::{Behaviour, Collector};
use crate::support::load::{Load, Visit, are_one_to_n, visits};
use crate::support::traces::traced_with;
use crate::support::{SOON, Service, World, client, eventually};

const DOWN: &str = "span export failing";
const UP: &str = "span export recovered";
const CLIENTS: usize = 64;

#[tokio::test(flavor = "multi_thread")]
#[ignore = "floods: make faults"]
async fn absent_collector_harms_nothing() {
    harms_nothing(Behaviour::Absent).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "floods: make faults"]
async fn refusing_collector_harms_nothing() {
    harms_nothing(Behaviour::Refuses(StatusCode::SERVICE_UNAVAILABLE)).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "floods: make faults"]
async fn collector_that_answers_bad_request_harms_nothing() {
    harms_nothing(Behaviour::Refuses(StatusCode::BAD_REQUEST)).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "floods: make faults"]
async fn silent_collector_harms_nothing() {
    harms_nothing(Behaviour::Silent).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "floods: make faults"]
async fn swallowed_packets_harm_nothing() {
    harms_nothing(Behaviour::Swallows).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "floods: make faults"]
async fn resetting_collector_harms_nothing() {
    harms_nothing(Behaviour::Resets).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "floods: make faults"]
async fn slow_collector_harms_nothing_and_dropped_spans_are_counted() {
    let (world, collector) = (World::new(), Collector::start().await);
    let slow = Behaviour::Slow(Duration::from_secs(1));
    collector.change_to(slow).await;
    let service = exporting(&world, &collector, "10000").await;
    let load = Load::start(&[&service], CLIENTS);
    eventually("the queue of spans is full", SOON, async || {
        Spans::of(&service).await.overflowed > 0
    })
    .await;
    let visits = load.stop().await;
    are_recorded(&world, &visits).await;
    let spans = at_rest(&service).await;
    // A visit has two spans, its own and its wait; the first of a batch has its own and two calls.
    assert!(visits.iter().all(|visit| visit.sampled));
    assert_eq!(spans.made(), 2 * spans.visits + spans.batches);
    assert_eq!(kept(&collector), spans.exported);
    assert_eq!(spans.lost, 0);
    assert_eq!(service.logged(DOWN).len(), 0);
    stops_under_load(&service).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn log_says_why_spans_are_not_taken() {
    let bad = Behaviour::Refuses(StatusCode::BAD_REQUEST);
    for (behaviour, why) in [(Behaviour::Absent, "Connection refused"), (bad, "400")] {
        let (world, collector) = (World::new(), Collector::start().await);
        collector.change_to(behaviour).await;
        let service = exporting(&world, &collector, "1000").await;
        service.visit().await;
        eventually("it is logged", SOON, async || {
            !service.logged(DOWN).is_empty()
        })
        .await;
        let error = service.logged(DOWN)[0]["error"].clone();
        assert!(error.as_str().unwrap().contains(why), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn spans_that_the_collector_rejects_are_counted_as_lost() {
    let (world, collector) = (World::new(), Collector::start().await);
    collector.change_to(Behaviour::Rejects(1)).await;
    let service = exporting(&world, &collector, "10000").await;
    service.visit().await;
    let spans = at_rest(&service).await;
    assert_eq!(spans.made(), 3);
    assert_eq!(spans.lost, collector.exports().len() as u64);
    eventually("it is logged", SOON, async || {
        service.logged("collector rejected spans").len() == 1
    })
    .await;
    for _ in 0..5 {
        service.visit().await;
        at_rest(&service).await;
    }
    let lines = service.logged("collector rejected spans");
    assert_eq!(lines.len(), 1, "at most one a minute: {lines:?}");
    assert_eq!(service.logged(DOWN).len(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn spans_lost_by_a_stop_are_logged() {
    for behaviour in [
        Behaviour::Refuses(StatusCode::BAD_GATEWAY),
        Behaviour::Silent,
    ] {
        let (world, collector) = (World::new(), Collector::start().await);
        collector.change_to(behaviour).await;
        let late = [("OTEL_BSP_SCHEDULE_DELAY", "600000")];
        let service = traced_with(&world, &collector, &late).await;
        for _ in 0..4 {
            service.visit().await;
        }
        service.stop().await;
        eventually("the loss is logged", SOON, async || {
            service.logged("the last spans were not exported").len() == 1
        })
        .await;
        let line = &service.logged("the last spans were not exported")[0];
        assert_eq!(line["spans.lost"], 4 * 3);
    }
}

/// An export to an absent collector takes 0.8 s: four attempts, with pauses.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "reads a clock: make faults"]
async fn stop_does_not_wait_for_a_collector_that_is_down() {
    let (world, collector) = (World::of_its_own(), Collector::start().await);
    collector.change_to(Behaviour::Absent).await;
    let mut service = traced_with(&world, &collector, &[]).await;
    service.visit().await;
    eventually("the breaker is open", SOON, async || {
        !service.logged(DOWN).is_empty()
    })
    .await;
    let exported = Spans::of(&service).await.lost;
    // Further spans, one visit a second, are waiting or being exported.
    eventually("a visit is sampled", SOON, async || {
        service.get("/").await;
        Spans::of(&service).await.queued > exported
    })
    .await;
    // An idle connection would stay open for one second.
    service.client = client();
    let stopped = Instant::now();
    service.stop().await;
    let took = stopped.elapsed();
    assert!(took < Duration::from_millis(500), "{took:?}");
    let line = &service.logged("the last spans were not exported")[0];
    assert!(line["spans.lost"].as_u64() > Some(exported), "{line}");
    assert!(line["error"].is_null(), "{line}");
}

/// A service that samples every visit takes 1.8 times as long as one that samples none.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "reads a clock: make faults"]
async fn absent_collector_costs_no_throughput() {
    let (world, collector) = (World::of_its_own(), Collector::start().await);
    collector.change_to(Behaviour::Absent).await;
    let without = world.serve().await;
    let with = exporting(&world, &collector, "1000").await;
    let load = Load::start(&[&with, &without], CLIENTS);
    until_sampled(&with, "hardly a visit", |share| share <= 0.1).await;
    load.stop().await;

    let mut ratios = Vec::new();
    for _ in 0..11 {
        // The two take turns at going first, so that a change of the machine's speed harms both alike.
        let (none, absent) = (
            time_for_visits(&without).await,
            time_for_visits(&with).await,
        );
        ratios.push(absent / none);
        let (absent, none) = (
            time_for_visits(&with).await,
            time_for_visits(&without).await,
        );
        ratios.push(absent / none);
    }
    ratios.sort_by(f64::total_cmp);
    assert!(ratios[ratios.len() / 2] < 1.25, "{ratios:?}");
}

/// Load while the collector fails and recovers, then a stop while it fails.
async fn harms_nothing(behaviour: Behaviour) {
    let (world, collector) = (World::new(), Collector::start().await);
    let service = exporting(&world, &collector, "1000").await;
    let load = Load::start(&[&service], CLIENTS);
    until_sampled(&service, "every visit", |share| share >= 1.5).await;
    collector.change_to(behaviour).await;
    until_sampled(&service, "hardly a visit", |share| share <= 0.1).await;
    // It is logged once all attempts to export a batch have failed.
    eventually("it is logged", SOON, async || {
        !service.logged(DOWN).is_empty()
    })
    .await;
    collector.change_to(Behaviour::Takes).await;
    until_sampled(&service, "every visit again", |share| share >= 1.5).await;

    let visits = load.stop().await;
    are_recorded(&world, &visits).await;
    let spans = at_rest(&service).await;
    let sampled = visits.iter().filter(|visit| visit.sampled).count() as u64;
    assert!((2 * sampled..=3 * sampled).contains(&spans.made()));
    assert!((spans.exported..=spans.exported + spans.lost).contains(&kept(&collector)));
    let (down, up) = (service.logged(DOWN), service.logged(UP));
    assert_eq!((down.len(), up.len()), (1, 1));
    assert!(up[0]["down.seconds"].as_f64().unwrap() > 0.0);
    assert_eq!(up[0]["spans.lost"], spans.lost);

    collector.change_to(behaviour).await;
    stops_under_load(&service).await;
}

// --- wiring ---

/// A service whose exports time out after this many milliseconds.
async fn exporting(world: &World, collector: &Collector, timeout: &str) -> Service {
    let settings = [
        ("OTEL_EXPORTER_OTLP_TIMEOUT", timeout),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "1024"),
        ("SHUTDOWN_TIMEOUT", "5s"),
        // Long enough for a busy machine under load.
        ("DB_TIMEOUT", "10s"),
        ("REDIS_TIMEOUT", "5s"),
        ("VISIT_TIMEOUT", "20s"),
    ];
    traced_with(world, collector, &settings).await
}

/// The counters of spans, from one scrape.
#[derive(Debug, Clone, Copy)]
struct Spans {
    visits: u64,
    batches: u64,
    queued: u64,
    overflowed: u64,
    exported: u64,
    lost: u64,
}

impl Spans {
    async fn of(service: &Service) -> Self {
        let text = service.get("/metrics").await.body;
        Self {
            visits: sum(&text, "visitas_visits_total", |_| true),
            batches: sum(&text, "visitas_batch_size_count", |_| true),
            queued: sum(&text, "otel_sdk_processor_span", |line| {
                !line.contains("error_type")
            }),
            overflowed: sum(&text, "otel_sdk_processor_span", |line| {
                line.contains("queue_full")
            }),
            exported: sum(&text, "otel_sdk_exporter_span", |line| {
                !line.contains("error_type")
            }),
            lost: sum(&text, "otel_sdk_exporter_span", |line| {
                line.contains("error_type")
            }),
        }
    }

    /// All spans that were created.
    fn made(&self) -> u64 {
        self.queued + self.overflowed
    }
}

fn sum(text: &str, name: &str, is_meant: impl Fn(&str) -> bool) -> u64 {
    text.lines()
        .filter(|line| line.starts_with(name) && is_meant(line))
        .map(|line| line.rsplit_once(' ').expect("a value").1)
        .map(|value| value.parse::<u64>().expect("a count"))
        .sum()
}

/// Waits until `is_so` accepts the number of spans per visit, averaged over 500 visits under load.
/// It is at least two where every visit is sampled.
async fn until_sampled(service: &Service, what: &str, is_so: impl Fn(f64) -> bool) {
    eventually(&format!("{what} is sampled"), 3 * SOON, async || {
        let before = Spans::of(service).await;
        let mut after = before;
        eventually("visits are made", SOON, async || {
            after = Spans::of(service).await;
            after.visits >= before.visits + 500
        })
        .await;
        let (spans, visits) = (after.made() - before.made(), after.visits - before.visits);
        is_so(spans as f64 / visits as f64)
    })
    .await;
}

/// Waits until every span is exported or lost.
async fn at_rest(service: &Service) -> Spans {
    let mut spans = Spans::of(service).await;
    eventually("every span is exported or lost", SOON, async || {
        spans = Spans::of(service).await;
        spans.queued > 0 && spans.queued == spans.exported + spans.lost
    })
    .await;
    spans
}

/// How many different spans a collector has.
fn kept(collector: &Collector) -> u64 {
    let ids = collector.spans().into_iter().map(|kept| kept.span.span_id);
    ids.collect::<HashSet<_>>().len() as u64
}

/// Expects that none of these visits failed, and that they are numbered from 1 without gaps.
async fn are_recorded(world: &World, visits: &[Visit]) {
    assert!(visits.iter().all(|visit| visit.status == 200));
    assert!(are_one_to_n(visits.iter().map(Visit::total)));
    assert!(are_one_to_n(visits.iter().map(Visit::redis)));
    assert_eq!(world.rows().await, i64::try_from(visits.len()).unwrap());
}

async fn time_for_visits(service: &Service) -> f64 {
    let began = Instant::now();
    visits(&[service], CLIENTS, 2_000).await;
    began.elapsed().as_secs_f64()
}

async fn stops_under_load(service: &Service) {
    let before = Spans::of(service).await.visits;
    let load = Load::start(&[service], CLIENTS);
    eventually("visits are made", SOON, async || {
        Spans::of(service).await.visits > before + 500
    })
    .await;
    let stopped = Instant::now();
    service.stop().await;
    let took = stopped.elapsed();
    assert!(took < Duration::from_secs(5), "{took:?}");
    for visit in load.stop().await {
        assert!(
            visit.status == 200 || visit.answered() > stopped,
            "{visit:?}"
        );
    }
}
