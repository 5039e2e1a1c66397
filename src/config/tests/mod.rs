//! Facts about the settings. Command lines and environments are passed in: no test touches the
//! process's own.

mod cli;
mod property;
mod stores;
mod telemetry;

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::net::SocketAddr;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::time::Duration;

use super::setting::{Fallback, all};
use super::source::displayed;
use super::{Command, Compression, Config, ConfigError, LogFormat, Root, Sampler, SslMode, parse};

/// Is part of every secret in these tests, so nothing that is shown may contain it.
const CANARY: &str = "c4nary";

/// A value for every setting that is not accepted.
const BAD: &[(&str, &str)] = &[
    ("DB_HOST", "two words"),
    ("DB_PORT", "65536"),
    ("DB_USER", "bell\u{7}"),
    (
        "DB_NAME",
        "0123456789012345678901234567890123456789012345678901234567890123",
    ),
    ("DB_SSLMODE", "on"),
    ("DB_SSLROOTCERT", "/nonexistent/ca.pem"),
    ("DB_TIMEOUT", "9ms"),
    ("REDIS_HOST", "/run/redis.sock"),
    ("REDIS_PORT", "0"),
    ("REDIS_TLS_CA", "/dev/null"),
    ("REDIS_TIMEOUT", "250"),
    ("BIND_ADDR", "localhost:5000"),
    ("METRICS_ADDR", "9000"),
    ("HTTP_MAX_CONNECTIONS", "0"),
    ("HEADER_TIMEOUT", "6m"),
    ("IDLE_TIMEOUT", "1.5s"),
    ("VISIT_TIMEOUT", "3 s"),
    ("QUEUE_CAPACITY", "1000001"),
    ("SHUTDOWN_DELAY", "-1s"),
    ("SHUTDOWN_TIMEOUT", "0s"),
    ("LOG_FORMAT", "xml"),
    ("RUST_LOG", "visitas=loud"),
    ("ACCESS_SLOW", "99999999999999999999h"),
    ("OTEL_EXPORTER_OTLP_ENDPOINT", "localhost:4317"),
    ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://jaeger/?a=b"),
    ("OTEL_EXPORTER_OTLP_TIMEOUT", "10s"),
    ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "0"),
    ("OTEL_EXPORTER_OTLP_COMPRESSION", "zstd"),
    ("OTEL_EXPORTER_OTLP_TRACES_COMPRESSION", "true"),
    ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
    ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/json"),
    ("OTEL_SDK_DISABLED", "yes"),
    ("OTEL_TRACES_EXPORTER", "zipkin"),
    ("OTEL_TRACES_SAMPLER", "jaeger_remote"),
    ("OTEL_TRACES_SAMPLER_ARG", "1.01"),
    ("OTEL_PROPAGATORS", "b3"),
    ("OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT", "0"),
    ("OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT", "4097"),
    ("OTEL_SERVICE_NAME", "two\nlines"),
    ("OTEL_RESOURCE_ATTRIBUTES", "deployment"),
    ("OTEL_BSP_SCHEDULE_DELAY", "5s"),
    ("OTEL_BSP_MAX_QUEUE_SIZE", "many"),
    ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "0"),
    ("OTEL_BSP_EXPORT_TIMEOUT", "-1"),
    ("DB_PASSWORD_FILE", "/nonexistent/password"),
    ("DATABASE_URL_FILE", "/dev/null"),
    ("REDIS_PASSWORD_FILE", "/dev/zero"),
    ("REDIS_URL_FILE", "/"),
    ("DB_PASSWORD", "c4nary\nand more"),
    ("DATABASE_URL", "mysql://ana:c4nary@db/visitas"),
    ("REDIS_PASSWORD", "c4nary\rand more"),
    ("REDIS_URL", "redis://:c4nary@cache/zero"),
    ("OTEL_EXPORTER_OTLP_HEADERS", "authorization: c4nary"),
    (
        "OTEL_EXPORTER_OTLP_TRACES_HEADERS",
        "authorization=c4nary%0A",
    ),
];

#[test]
fn every_setting_has_a_bad_value_in_these_tests() {
    let tested: BTreeSet<&str> = BAD.iter().map(|(variable, _)| *variable).collect();
    assert_eq!(tested, variables());
}

#[test]
fn bad_variable_is_one_line_with_its_name_and_value() {
    for (about, accepts) in all() {
        let value = bad_value(about.variable);
        let line = error("", &[(about.variable, value)]);
        assert!(line.starts_with(about.variable), "{line}");
        assert!(line.ends_with(&format!("expected {accepts}")), "{line}");
        assert!(!line.contains('\n'), "{line}");
        assert_eq!(line.contains(&displayed(value)), !about.secret, "{line}");
    }
}

#[test]
fn bad_flag_is_one_line_with_both_names_and_the_value() {
    for (about, accepts) in all().into_iter().filter(|(about, _)| !about.secret) {
        let value = bad_value(about.variable);
        let flag = format!("--{}={value}", about.flag());
        let line = error_of(&["visitas", &flag], &[]);
        let (flag, variable, value) = (about.flag(), about.variable, displayed(value));
        assert!(
            line.starts_with(&format!("--{flag}={value} ({variable}): ")),
            "{line}"
        );
        assert!(line.ends_with(&format!("expected {accepts}")), "{line}");
    }
}

#[test]
fn variable_that_is_not_utf8_is_an_error_that_names_it() {
    for variable in variables() {
        let environment = |name: &str| (name == variable).then(|| OsString::from_vec(vec![0xff]));
        let line = parse([OsString::from("visitas")], &environment, false)
            .expect_err(variable)
            .to_string();
        assert!(line.starts_with(variable), "{line}");
    }
}

#[test]
fn empty_variable_is_unset() {
    let environment = |_: &str| Some(OsString::new());
    let command = parse([OsString::from("visitas")], &environment, false);
    let expected = serve("", &[]);
    assert!(
        matches!(command, Ok(Command::Serve(config)) if format!("{config:?}") == format!("{expected:?}"))
    );
}

#[test]
fn empty_flag_is_an_error() {
    assert!(error("--metrics-addr=", &[]).starts_with("--metrics-addr=\"\""));
}

#[test]
fn defaults_are_those_of_the_table() {
    let config = serve("", &[]);
    assert_eq!(config.postgres.host, "localhost");
    assert_eq!(config.postgres.user, "usuario");
    assert_eq!(config.postgres.database, "desafio3db");
    assert_eq!(config.postgres.ssl_mode, SslMode::Prefer);
    assert_eq!(config.postgres.password, None);
    assert_eq!(config.redis.port, 6379);
    assert_eq!(
        config.http.bind_addr,
        SocketAddr::from(([0, 0, 0, 0], 5000))
    );
    assert_eq!(config.http.metrics_addr, None);
    assert_eq!(config.visit.queue_capacity, 8192);
    assert_eq!(config.shutdown.delay, Duration::ZERO);
    assert_eq!(config.telemetry.log.filter, "info");
}

#[test]
fn every_default_is_accepted() {
    for (about, _) in all() {
        if let Fallback::Value(text) = about.fallback {
            let flag = format!("--{}={text}", about.flag());
            let result = parse_of(&["visitas", &flag], &[]);
            assert!(result.is_ok(), "{result:?}");
        }
    }
}

#[test]
fn durations_have_units_and_reach_their_bounds() {
    let timeout = |text: &str| {
        serve(&format!("--idle-timeout={text}"), &[])
            .http
            .idle_timeout
    };
    assert_eq!(timeout("100ms"), Duration::from_millis(100));
    assert_eq!(timeout("1500ms"), Duration::from_millis(1500));
    assert_eq!(timeout("2m"), Duration::from_mins(2));
    assert_eq!(timeout("1h"), Duration::from_hours(1));
    for text in ["99ms", "3600001ms", "1", "s", "1S", "1d", "1m30s"] {
        error(&format!("--idle-timeout={text}"), &[]);
    }
}

#[test]
fn visit_must_have_time_for_one_call_to_each_store() {
    let line = error("--db-timeout=1751ms", &[]);
    assert!(line.contains("VISIT_TIMEOUT=\"2s\" (default)"), "{line}");
    assert!(
        line.contains("--db-timeout=\"1751ms\" (DB_TIMEOUT)"),
        "{line}"
    );
    assert!(line.contains("REDIS_TIMEOUT=\"250ms\" (default)"), "{line}");
    assert!(line.ends_with("expected at least 2001ms"), "{line}");
    error("--visit-timeout=1249ms", &[]);
    error("--redis-timeout=600ms --db-timeout=1401ms", &[]);
    serve("--db-timeout=1750ms", &[]);
    serve("--visit-timeout=1250ms", &[]);
}

#[test]
fn metrics_need_an_address_of_their_own() {
    let line = error("--metrics-addr=0.0.0.0:5000", &[]);
    assert!(
        line.contains("METRICS_ADDR") && line.contains("BIND_ADDR"),
        "{line}"
    );
    serve("--metrics-addr=0.0.0.0:0 --bind-addr=0.0.0.0:0", &[]);
}

#[test]
fn long_value_is_cut_in_the_error() {
    let line = error("", &[("DB_PORT", &"9".repeat(100_000))]);
    assert!(line.len() < 300, "{} bytes", line.len());
}

fn variables() -> BTreeSet<&'static str> {
    all().iter().map(|(about, _)| about.variable).collect()
}

fn bad_value(variable: &str) -> &'static str {
    let found = BAD.iter().find(|(name, _)| *name == variable);
    found.unwrap_or_else(|| panic!("{variable} is missing")).1
}

fn lookup(environment: &[(&str, &str)]) -> impl Fn(&str) -> Option<OsString> {
    let environment: Vec<(String, OsString)> = environment
        .iter()
        .map(|(variable, value)| ((*variable).to_owned(), OsString::from(value)))
        .collect();
    move |name| {
        let found = environment.iter().find(|(variable, _)| variable == name);
        found.map(|(_, value)| value.clone())
    }
}

fn parse_of(arguments: &[&str], environment: &[(&str, &str)]) -> Result<Command, ConfigError> {
    parse(
        arguments.iter().map(OsString::from),
        &lookup(environment),
        false,
    )
}

/// Parses arguments that are separated by spaces.
fn run(arguments: &str, environment: &[(&str, &str)]) -> Result<Command, ConfigError> {
    let arguments: Vec<&str> = ["visitas"]
        .into_iter()
        .chain(arguments.split_whitespace())
        .collect();
    parse_of(&arguments, environment)
}

fn serve(arguments: &str, environment: &[(&str, &str)]) -> Config {
    match run(arguments, environment) {
        Ok(Command::Serve(config)) => *config,
        other => panic!("{other:?}"),
    }
}

fn exporter(environment: &[(&str, &str)]) -> super::ExporterConfig {
    let endpoint = [("OTEL_EXPORTER_OTLP_ENDPOINT", "http://jaeger:4318")];
    let environment: Vec<_> = environment.iter().chain(&endpoint).copied().collect();
    let traces = serve("", &environment).telemetry.traces;
    traces
        .and_then(|traces| traces.exporter)
        .expect("an exporter")
}

fn printed(arguments: &str, environment: &[(&str, &str)]) -> String {
    match run(arguments, environment) {
        Ok(Command::Print(text)) => text,
        other => panic!("{other:?}"),
    }
}

fn error(arguments: &str, environment: &[(&str, &str)]) -> String {
    let arguments: Vec<&str> = ["visitas"]
        .into_iter()
        .chain(arguments.split_whitespace())
        .collect();
    error_of(&arguments, environment)
}

/// The error, in which no secret may be seen, neither displayed nor debugged.
fn error_of(arguments: &[&str], environment: &[(&str, &str)]) -> String {
    let error = parse_of(arguments, environment).expect_err("a bad setting");
    assert!(!format!("{error} {error:?}").contains(CANARY), "{error}");
    error.to_string()
}

fn assert_lines(listing: &str, expected: &[&str]) {
    let lines: Vec<String> = listing
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
        .collect();
    for line in expected {
        assert!(
            lines.iter().any(|listed| listed == line),
            "{line} in {listing}"
        );
    }
}

/// A file that is removed at the end of the test.
struct TemporaryFile(PathBuf);

impl TemporaryFile {
    fn path(&self) -> &str {
        self.0.to_str().expect("a path of ASCII")
    }
}

impl Drop for TemporaryFile {
    fn drop(&mut self) {
        // Nothing depends on it.
        let _ = fs::remove_file(&self.0);
    }
}

fn file(name: &str, contents: impl AsRef<[u8]>) -> TemporaryFile {
    let name = format!("visitas-config-{}-{name}", std::process::id());
    let path = std::env::temp_dir().join(name);
    fs::write(&path, contents).expect("a writable temporary directory");
    TemporaryFile(path)
}

fn certificate(name: &str) -> TemporaryFile {
    file(name, include_str!("ca.pem"))
}
