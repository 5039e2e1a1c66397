//! The metrics: their names, types, buckets and what is counted.

use crate::support::{HeldCount, World};

#[tokio::test(flavor = "multi_thread")]
async fn every_metric_exists_from_the_first_scrape() {
    let world = World::of_its_own();
    world.postgres.kill().unwrap();
    world.redis.kill().unwrap();
    let service = world.start(&[]).await;
    let text = service.get("/metrics").await.body;
    let missing: Vec<_> = METRICS
        .iter()
        .flat_map(|(kind, names)| names.split_whitespace().map(move |name| (kind, name)))
        .filter(|(kind, name)| !is_exported(&text, kind, name))
        .collect();
    assert!(missing.is_empty(), "{missing:?} in {text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn series_that_can_be_known_beforehand_exist_at_zero() {
    let world = World::of_its_own();
    world.postgres.kill().unwrap();
    world.redis.kill().unwrap();
    let service = world.start(&[]).await;
    let text = service.get("/metrics").await.body;
    for outcome in ["ok", "degraded", "failed", "shed", "in_doubt", "abandoned"] {
        let series = format!("visitas_visits_total{{outcome=\"{outcome}\"}} 0\n");
        assert!(text.contains(&series), "{series}");
    }
    for (store, operation) in [("postgresql", "SELECT"), ("redis", "INCRBY")] {
        for outcome in ["ok", "error", "timeout", "cancelled"] {
            let series = calls(store, operation, outcome);
            assert!(text.contains(&format!("\n{series} ")), "{series}");
        }
    }
    for status in ["200", "503"] {
        let label = format!("http_response_status_code=\"{status}\"");
        assert!(text.lines().any(|line| {
            line.starts_with("http_server_request_duration_seconds_count{")
                && line.contains("http_route=\"/\"")
                && line.contains(&label)
                && line.ends_with(" 0")
        }));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn histograms_have_the_buckets_that_are_promised() {
    let world = World::new();
    let service = world.serve().await;
    service.visit().await;
    let text = service.get("/metrics").await.body;
    let stores = "0.0005 0.001 0.0025 0.005 0.01 0.025 0.05 0.1 0.25 0.5 1 2.5 5 +Inf";
    let http =
        "0.0005 0.001 0.0025 0.005 0.01 0.025 0.05 0.075 0.1 0.25 0.5 0.75 1 2.5 5 7.5 10 +Inf";
    let batch = "1 2 4 8 16 32 64 128 256 512 1024 2048 4096 +Inf";
    for (name, expected) in [
        ("http_server_request_duration_seconds", http),
        ("db_client_operation_duration_seconds", stores),
        ("db_client_connection_wait_time_seconds", stores),
        ("visitas_queue_wait_seconds", stores),
        ("visitas_batch_size", batch),
    ] {
        assert_eq!(buckets(&text, name), expected, "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn call_that_times_out_is_counted_with_its_time() {
    let world = World::new();
    let service = world.serve().await;
    let timeouts = calls("redis", "INCRBY", "timeout");
    assert_eq!(service.metric(&timeouts).await, Some(0.0));
    world.redis.pause().unwrap();
    service.get("/").await;
    assert!(service.metric(&timeouts).await >= Some(1.0));
    let text = service.get("/metrics").await.body;
    let duration = text.lines().find(|line| {
        line.starts_with("db_client_operation_duration_seconds_count{")
            && line.contains("error_type=\"timeout\"")
    });
    assert!(duration.is_some(), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn refused_call_has_the_stores_code() {
    let world = World::new();
    let service = world.serve().await;
    let _count = HeldCount::of(&world).await;
    service.get("/").await;
    let refused = calls("postgresql", "SELECT", "error");
    assert!(service.metric(&refused).await >= Some(1.0));
    let text = service.get("/metrics").await.body;
    let duration = text
        .lines()
        .find(|line| line.contains("error_type=\"55P03\""))
        .expect("a series with the code");
    assert!(duration.contains("db_response_status_code=\"55P03\""));
}

// --- wiring ---

/// Every metric of the service, by its type.
const METRICS: [(&str, &str); 3] = [
    (
        "histogram",
        "http_server_request_duration_seconds db_client_operation_duration_seconds \
         visitas_queue_wait_seconds visitas_batch_size db_client_connection_wait_time_seconds",
    ),
    (
        "gauge",
        "http_server_active_requests visitas_http_connections visitas_http_connections_max \
         visitas_queue_depth visitas_queue_capacity visitas_rows visitas_redis_visits \
         visitas_store_drift visitas_dependency_up db_client_connection_count \
         db_client_connection_max db_client_connection_pending_requests visitas_build_info \
         process_open_fds process_max_fds process_resident_memory_bytes \
         process_virtual_memory_bytes process_start_time_seconds process_threads \
         tokio_workers tokio_alive_tasks tokio_global_queue_depth",
    ),
    (
        "counter",
        "visitas_store_calls_total visitas_visits_total db_client_connection_timeouts_total \
         otel_sdk_exporter_span_exported_total otel_sdk_processor_span_processed_total \
         visitas_log_lines_dropped_total process_cpu_seconds_total tokio_busy_seconds_total",
    ),
];

/// Whether a metric has its type, a help text and a sample.
fn is_exported(text: &str, kind: &str, name: &str) -> bool {
    let sample = if kind == "histogram" {
        format!("{name}_count")
    } else {
        name.to_owned()
    };
    let has = |start: &str| text.lines().any(|line| line.starts_with(start));
    has(&format!("# HELP {name} "))
        && has(&format!("# TYPE {name} {kind}"))
        && (has(&format!("{sample} ")) || has(&format!("{sample}{{")))
}

/// The upper bounds of a histogram's first series.
fn buckets(text: &str, name: &str) -> String {
    let start = format!("{name}_bucket{{");
    let bound = |line: &str| {
        let (_, rest) = line.split_once("le=\"")?;
        rest.split_once('"').map(|(bound, _)| bound.to_owned())
    };
    let mut bounds: Vec<String> = Vec::new();
    for line in text.lines().filter(|line| line.starts_with(&start)) {
        bounds.extend(bound(line));
        if bounds.last().is_some_and(|bound| bound == "+Inf") {
            break;
        }
    }
    bounds.join(" ")
}

/// The series of a store's calls.
fn calls(store: &str, operation: &str, outcome: &str) -> String {
    format!(
        "visitas_store_calls_total{{db_system_name=\"{store}\",\
         db_operation_name=\"{operation}\",outcome=\"{outcome}\"}}"
    )
}
