//! The log: the lines of requests, and the lines of stores that go down.

use std::collections::HashSet;
use std::io::{BufRead as _, BufReader};
use std::process::Stdio;
use std::time::Duration;

use reqwest::StatusCode;
use serde_json::Value;
use time::{Date, Month};

use crate::support::collector::Collector;
use crate::support::traces::{PARENT, UNSAMPLED, ask, traced_with};
use crate::support::{Ended, HeldCount, SOON, Service, World, eventually, program};

#[tokio::test(flavor = "multi_thread")]
async fn access_line_has_the_ids_of_its_request() {
    let (world, collector) = (World::new(), Collector::start().await);
    let debug = [("RUST_LOG", "info,access=debug")];
    let service = traced_with(&world, &collector, &debug).await;
    let response = ask(&service, "/", &[("x-request-id", "sampled")]).await;
    let line = access_line(&service, "sampled").await;
    let trace = response.header("traceresponse");
    assert_eq!(line["level"], "DEBUG");
    assert_eq!(line["trace_id"], trace[3..35]);
    assert_eq!(line["span_id"], trace[36..52]);
    assert_eq!(line["http.response.status_code"], 200);
    assert_eq!(line["http.route"], "/");
    assert!(line["duration.seconds"].as_f64().unwrap() > 0.0);

    let headers = [("x-request-id", "unsampled"), ("traceparent", UNSAMPLED)];
    ask(&service, "/", &headers).await;
    let line = access_line(&service, "unsampled").await;
    assert_eq!(line["trace_id"], UNSAMPLED[3..35]);
    assert_eq!(line["span_id"], Value::Null);

    let headers = [("x-request-id", "probe"), ("traceparent", PARENT)];
    ask(&service, "/health/live", &headers).await;
    let line = access_line(&service, "probe").await;
    assert_eq!(line["trace_id"], PARENT[3..35]);
    assert_eq!(line["span_id"], Value::Null);
}

#[tokio::test(flavor = "multi_thread")]
async fn ordinary_request_has_no_line_at_info() {
    let world = World::of_its_own();
    let service = world.serve().await;
    ask(&service, "/", &[("x-request-id", "ordinary")]).await;
    world.postgres.kill().unwrap();
    service.until_health("unavailable").await;
    eventually("a failure has a line", SOON, async || {
        ask(&service, "/", &[("x-request-id", "failed")]).await;
        let lines = service.logged("request");
        lines.iter().any(|line| line["http.route"] == "/")
    })
    .await;
    let lines = service.logged("request");
    assert!(lines.iter().all(|line| line["level"] == "INFO"));
    assert!(lines.iter().all(|line| line["request_id"] != "ordinary"));
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_request_has_a_line_at_info() {
    let world = World::new();
    let service = world
        .serve_with(&[
            ("ACCESS_SLOW", "1s"),
            ("DB_TIMEOUT", "2s"),
            ("VISIT_TIMEOUT", "3s"),
        ])
        .await;
    let mut count = HeldCount::of(&world).await;
    let slow = service.begin_visit();
    count.until_waited_for().await;
    // Longer than ACCESS_SLOW, which is what makes a request slow.
    tokio::time::sleep(Duration::from_millis(1100)).await;
    count.release().await;
    assert_eq!(slow.await.unwrap().status, StatusCode::OK);
    eventually("it has a line", SOON, async || {
        let lines = service.logged("request");
        lines
            .iter()
            .any(|line| line["level"] == "INFO" && line["http.response.status_code"] == 200)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "reads a clock: make faults"]
async fn failing_requests_have_at_most_ten_lines_a_second_and_suppressed_lines_are_counted() {
    let (_world, service) = without_postgres().await;
    let mut failed = 0;
    // A line says how many lines were suppressed before it.
    eventually("every failure is reported", SOON, async || {
        service.get("/").await;
        failed = failures(&service).await;
        failed > 100 && service.logged("request").len() > 60 && reported(&service) == failed
    })
    .await;
    let down = service.logged("store is down");
    let of_postgres = down.iter().filter(|line| line["store"] == "postgresql");
    assert_eq!(of_postgres.count(), 1, "never suppressed");
    let lines = service.logged("request");
    let mut moments: Vec<_> = lines.iter().map(moment).collect();
    moments.sort_unstable();
    let lasted = moments[moments.len() - 1] - moments[0];
    assert!(
        lasted > 4000,
        "the limit was reached in each of many seconds"
    );
    assert!(
        (0..1000).any(|phase| most_in_a_second(&moments, phase) <= 10),
        "more than ten lines in a second, wherever seconds begin: {moments:?}"
    );
}

/// The timestamp of a line, in milliseconds.
fn moment(line: &Value) -> i64 {
    let text = line["timestamp"].as_str().expect("a moment");
    let number = |range: std::ops::Range<usize>| text[range].parse::<i64>().expect("digits");
    let month = u8::try_from(number(5..7))
        .ok()
        .and_then(|month| Month::try_from(month).ok());
    let (year, day) = (
        text[..4].parse().expect("a year"),
        text[8..10].parse().expect("a day"),
    );
    let date = Date::from_calendar_date(year, month.expect("a month"), day).expect("a date");
    let hours = i64::from(date.to_julian_day()) * 24 + number(11..13);
    let minutes = hours * 60 + number(14..16);
    (minutes * 60 + number(17..19)) * 1000 + number(20..23)
}

/// The most timestamps in one second, where seconds begin `phase` milliseconds after the clock's.
fn most_in_a_second(moments: &[i64], phase: i64) -> usize {
    let second = |moment: &i64| (moment - phase) / 1000;
    let seconds = moments.chunk_by(|one, other| second(one) == second(other));
    seconds.map(<[_]>::len).max().unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn suppressed_lines_are_reported_when_no_line_follows() {
    let (_world, service) = without_postgres().await;
    for _ in 0..60 {
        service.get("/").await;
    }
    let failed = failures(&service).await;
    assert!(reported(&service) < failed, "some have no line yet");
    eventually("the suppressed lines are reported", SOON, async || {
        reported(&service) == failed
    })
    .await;

    for _ in 0..60 {
        service.get("/").await;
    }
    let failed = failures(&service).await;
    service.stop().await;
    eventually("the stop reports the rest", SOON, async || {
        reported(&service) == failed
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pretty_log_is_text_without_colours_in_a_pipe() {
    let world = World::new();
    let mut settings = world.settings();
    settings.push(("LOG_FORMAT".to_owned(), "pretty".to_owned()));
    settings.push(("BIND_ADDR".to_owned(), "127.0.0.1:0".to_owned()));
    let mut command = program(&["serve"], &settings);
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let output = BufReader::new(child.stdout.take().unwrap());
    let line = output.lines().map_while(Result::ok).next();
    child.kill().unwrap();
    child.wait().unwrap();
    let line = line.expect("a line");
    assert!(line.contains("INFO listening address="), "{line}");
    assert!(!line.contains('\u{1b}'), "colours in a pipe");
}

// --- wiring ---

const IN_DOUBT: &str = "visits in doubt: statement sent, result unknown";

async fn until_both_are_down(service: &Service) {
    eventually("both stores are down", SOON, async || {
        service.logged("store is down").len() == 2
    })
    .await;
}

/// Expects that no field of a line has a text twice.
fn assert_no_line_repeats(service: &Service) {
    for line in service.log() {
        for (_, value) in line.as_object().expect("an object") {
            let text = value.as_str().unwrap_or_default();
            assert_eq!(repeated(text), None, "{line}");
        }
    }
}

/// A part of an error's text that occurs twice.
fn repeated(text: &str) -> Option<&str> {
    let mut parts = HashSet::new();
    text.split(": ")
        .map(str::trim)
        .filter(|part| part.len() > 3)
        .find(|part| !parts.insert(*part))
}

/// A service that refuses every visit.
async fn without_postgres() -> (World, Service) {
    let world = World::of_its_own();
    let service = world.serve().await;
    world.postgres.kill().unwrap();
    service.until_health("unavailable").await;
    (world, service)
}

async fn access_line(service: &Service, request_id: &str) -> Value {
    let mut found = Value::Null;
    eventually("the request has a line", SOON, async || {
        let lines = service.logged("request");
        let line = lines.iter().find(|line| line["request_id"] == request_id);
        found = line.cloned().unwrap_or_default();
        !found.is_null()
    })
    .await;
    found
}

/// How many requests were answered 503.
async fn failures(service: &Service) -> u64 {
    let text = service.get("/metrics").await.body;
    text.lines()
        .filter(|line| line.starts_with("http_server_request_duration_seconds_count{"))
        .filter(|line| line.contains("error_type=\"503\""))
        .filter_map(|line| line.rsplit_once(' ')?.1.parse::<u64>().ok())
        .sum()
}

/// How many failed requests the log reports, including those whose line was suppressed.
fn reported(service: &Service) -> u64 {
    service.logged("request").len() as u64 + suppressed(service)
}

/// How many lines were suppressed, by the lines that were written.
fn suppressed(service: &Service) -> u64 {
    service
        .log()
        .iter()
        .filter_map(|line| line["lines.suppressed"].as_u64())
        .sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn line_about_a_store_has_each_text_once() {
    let world = World::of_its_own();
    for (fault, word) in [
        ([("DB_PORT", "1"), ("REDIS_PORT", "1")], "refused"),
        (
            [
                ("DB_HOST", "nowhere.invalid"),
                ("REDIS_HOST", "nowhere.invalid"),
            ],
            "",
        ),
        (
            [("DB_USER", "stranger"), ("REDIS_PASSWORD", "wrong")],
            "refused with",
        ),
    ] {
        let settings = [("RUST_LOG", "debug"), fault[0], fault[1]];
        let service = world.start(&settings).await;
        until_both_are_down(&service).await;
        for line in service.logged("store is down") {
            let error = line["error"].as_str().unwrap();
            assert!(error.contains(word), "{error}");
        }
        assert_no_line_repeats(&service);
        for command in ["migrate", "reconcile"] {
            let ended = Ended::of(&[command], &world.settings_but("RUST_LOG", &settings)).await;
            assert_eq!(repeated(ended.error()), None, "{}", ended.errors);
        }
    }

    let service = world.serve().await;
    service.visit().await;
    world.postgres.pause().unwrap();
    world.redis.pause().unwrap();
    assert_eq!(
        service.get("/").await.status,
        StatusCode::SERVICE_UNAVAILABLE
    );
    until_both_are_down(&service).await;
    assert!(service.logged(IN_DOUBT).len() <= 1);
    assert_no_line_repeats(&service);
    world.postgres.kill().unwrap();
    world.redis.kill().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn reason_of_an_outage_that_changes_is_logged() {
    let world = World::of_its_own();
    world
        .sql("create role rotates login superuser password 'old'")
        .await;
    let rotates = [("DB_USER", "rotates"), ("DB_PASSWORD", "old")];
    let service = Service::start(&world.settings_but("DB_PASSWORD", &rotates)).await;
    service.until_ready().await;
    world.sql("alter role rotates password 'new'").await;
    world
        .sql("select pg_terminate_backend(pid) from pg_stat_activity where usename = 'rotates'")
        .await;
    let reasons = || {
        let mut lines = service.logged("store is down");
        lines.extend(service.logged("store is still down"));
        lines
    };
    eventually("the new reason is logged", SOON, async || {
        reasons()
            .iter()
            .any(|line| line["error"].to_string().contains("28P01"))
    })
    .await;
    assert!(reasons().len() <= 3, "{:?}", reasons());
    world.sql("alter role rotates password 'old'").await;
    service.until_ready().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn refused_migration_is_one_line_with_the_hint_of_the_server() {
    let world = World::new();
    world.sql("create view visitas as select 1 as id").await;
    let service = world.start(&[]).await;
    let attempts = r#"visitas_store_calls_total{db_system_name="postgresql",db_operation_name="MIGRATE",outcome="error"}"#;
    eventually("several attempts have failed", SOON, async || {
        service.metric(attempts).await >= Some(4.0)
    })
    .await;
    let down = service.logged("store is down");
    assert_eq!(down.len(), 1);
    let error = down[0]["error"].as_str().unwrap();
    assert!(
        error.ends_with("(hint: Rename it, then migrate again.)"),
        "{error}"
    );
    assert!(!error.contains("at line"), "{error}");
    let notices = service.log();
    let notices: Vec<_> = notices
        .iter()
        .filter(|line| line["target"].to_string().contains("sqlx"))
        .collect();
    assert!(notices.is_empty(), "{notices:?}");
}
