//! Collectors that do not take spans: no visit notices them.

use reqwest::StatusCode;

use crate::support::collector::Collector;
use crate::support::traces::{spans, traced};
use crate::support::{SOON, Service, World, eventually};

#[tokio::test(flavor = "multi_thread")]
async fn absent_collector_fails_no_request_and_is_one_line() {
    let world = World::new();
    let settings = [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1"),
        ("OTEL_BSP_SCHEDULE_DELAY", "20"),
    ];
    let service = world.serve_with(&settings).await;
    eventually("ten exports have failed", 2 * SOON, async || {
        let before = spans(&service, "exporter", "_OTHER").await;
        service.visit().await;
        before >= 12
    })
    .await;
    let warnings: Vec<_> = service
        .log()
        .into_iter()
        .filter(|line| line["level"] != "INFO")
        .collect();
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert_eq!(warnings[0]["message"], "the collector does not take spans");
}

#[tokio::test(flavor = "multi_thread")]
async fn collector_that_refuses_is_hardly_sampled_for_until_it_takes_spans() {
    let (world, collector) = (World::new(), Collector::start().await);
    let service = traced(&world, &collector).await;
    collector.refuse(true);
    eventually("visits are hardly sampled", SOON, async || {
        let sampled = sampled(&service, 20).await;
        sampled <= 2
    })
    .await;
    let lost = spans(&service, "exporter", "_OTHER").await;
    assert!(
        lost >= 9,
        "after three exports of a visit, not {lost} spans"
    );
    collector.refuse(false);
    eventually("all visits are sampled", SOON, async || {
        sampled(&service, 20).await == 20
    })
    .await;
    eventually("its return is logged", SOON, async || {
        service.logged("the collector takes spans again").len() == 1
    })
    .await;
    let down = service.logged("the collector does not take spans");
    assert_eq!(down.len(), 1);
    let up = &service.logged("the collector takes spans again")[0];
    assert!(up["down.seconds"].as_f64().unwrap() > 0.0);
    assert!(up["spans.lost"].as_u64().unwrap() >= lost);
}

// --- wiring ---

/// How many of so many visits are sampled.
async fn sampled(service: &Service, visits: u32) -> u32 {
    let mut sampled = 0;
    for _ in 0..visits {
        let answer = service.get("/").await;
        assert_eq!(answer.status, StatusCode::OK);
        sampled += u32::from(!answer.header("traceresponse").is_empty());
    }
    sampled
}
