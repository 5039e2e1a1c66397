//! Panics: each test runs this program again as a process that panics, and reads its output.

use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::routing::get;
use http::{Request, StatusCode};
use serde_json::Value;
use tower::ServiceExt as _;
use visitas::config::{LogConfig, LogFormat};
use visitas::metrics::Format;
use visitas::routes;
use visitas::telemetry::Telemetry;
use visitas::telemetry::request::Observer;

/// The variable that makes the second process panic; its value is the `RUST_LOG` to use.
const PANICS: &str = "TEST_PANICS";

#[test]
fn panic_is_one_line_of_the_log_and_counted() {
    let printed = panicking("info");
    let lines = panics(&printed);
    let [in_request, in_task, in_thread] = &lines[..] else {
        panic!("{printed}")
    };
    assert_eq!(
        in_request["message"],
        "panicked: in a request\nof two lines"
    );
    assert_eq!(in_request["request_id"], "the-id");
    assert_eq!(in_request["trace_id"], "0af7651916cd43dd8448eb211c80319c");
    assert_eq!(in_task["message"], "panicked: in a task");
    assert_eq!(in_task["request_id"], Value::Null);
    assert_eq!(in_thread["message"], "panicked: in a thread");
    assert_eq!(in_thread["thread"], "named");
    for line in lines {
        assert_eq!(line["level"], "ERROR");
        let location = line["location"].as_str().expect("a location");
        assert!(location.starts_with("tests/panics.rs:"), "{location}");
    }
}

#[test]
fn panic_is_logged_with_every_filter() {
    for filter in ["off", "warn", "access=debug"] {
        let printed = panicking(filter);
        assert_eq!(panics(&printed).len(), 3, "{filter}: {printed}");
    }
}

/// The output of a process that panics. The process itself checks the counter and the response.
fn panicking(filter: &str) -> String {
    let output = Command::new(std::env::current_exe().expect("the test's path"))
        .args(["--exact", "process_that_panics", "--nocapture"])
        .env(PANICS, filter)
        .env_remove("RUST_BACKTRACE")
        .output()
        .expect("the process starts");
    let text = |bytes| String::from_utf8(bytes).expect("text");
    let (output, errors) = (output.status, [text(output.stdout), text(output.stderr)]);
    assert!(output.success(), "{errors:?}");
    let [output, errors] = errors;
    assert!(!errors.contains("panicked"), "{errors}");
    output
}

/// The lines that report a panic.
fn panics(printed: &str) -> Vec<Value> {
    let lines = printed.lines().filter(|line| line.contains("panicked"));
    lines
        .map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("not JSON: {line}")))
        .collect()
}

/// Does nothing unless another test runs it as a second process.
#[test]
#[expect(
    clippy::disallowed_methods,
    reason = "the parent process sets this variable"
)]
fn process_that_panics() {
    let Ok(filter) = std::env::var(PANICS) else {
        return;
    };
    let log = LogConfig {
        log_format: LogFormat::Json,
        rust_log: filter,
        access_slow: Duration::from_secs(1),
    };
    let telemetry = Telemetry::start(&log, None, true, Duration::from_secs(5)).expect("telemetry");
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(async {
        assert_eq!(counted(&telemetry), "0");
        let observer = Observer::new(telemetry.sampler(), Duration::from_secs(1));
        let router = Router::new().route("/", get(panic_in_a_request));
        let request = Request::get("/")
            .header("x-request-id", "the-id")
            .header(
                "traceparent",
                "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            )
            .body(Body::empty())
            .expect("a request");
        let response = routes::layered(router, Arc::clone(&observer))
            .oneshot(request)
            .await
            .expect("a response");
        assert_eq!(response.status(), StatusCode::INTERNAL_SERVER_ERROR);
        assert_eq!(
            response.headers()["content-type"],
            "application/problem+json"
        );
        assert_eq!(response.headers()["cache-control"], "no-store");
        assert_eq!(response.headers()["x-request-id"], "the-id");
        let task = tokio::spawn(async { panic!("in a task") });
        assert!(task.await.is_err_and(|error| error.is_panic()));
        assert_eq!(counted(&telemetry), "2");
    });
    let thread = std::thread::Builder::new()
        .name("named".to_owned())
        .spawn(|| panic!("in a thread"))
        .expect("a thread");
    assert!(thread.join().is_err());
    assert_eq!(runtime.block_on(async { counted(&telemetry) }), "3");
}

async fn panic_in_a_request() {
    tokio::task::yield_now().await;
    panic!("in a request\nof two lines");
}

fn counted(telemetry: &Telemetry) -> String {
    let text = telemetry.render_metrics(Format::Text);
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("visitas_panics_total "));
    line.expect("the series").to_owned()
}
