//! Settings by variable: invalid ones end the program before it binds, empty ones are unset.
//! Secrets are tested in [`crate::canary`].

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::io::Write as _;
use std::net::TcpListener;
use std::os::unix::ffi::OsStrExt as _;

use crate::support::{Ended, program, settings};

/// Part of every secret here, so no output must contain it.
const CANARY: &str = "c4nary";

/// Every variable, with a value that is invalid.
const BAD: &[(&str, &str)] = &[
    ("DB_HOST", "two words"),
    ("DB_PORT", "0"),
    ("DB_USER", "bell\u{7}"),
    ("DB_PASSWORD", "c4nary\nand more"),
    ("DB_NAME", "a\tb"),
    ("DB_SSLMODE", "yes"),
    ("DATABASE_URL", "mysql://ana:c4nary@db/visitas"),
    ("REDIS_HOST", "http://cache"),
    ("REDIS_PORT", "65536"),
    ("REDIS_USERNAME", "bell\u{7}"),
    ("REDIS_PASSWORD", "c4nary\nand more"),
    ("REDIS_URL", "http://:c4nary@cache"),
    ("DB_SSLROOTCERT", "/nonexistent/ca.pem"),
    ("DB_SSLCERT", "/nonexistent/client.pem"),
    ("DB_SSLKEY", "/dev/null"),
    ("REDIS_TLS_CA", "/dev/null"),
    ("REDIS_TLS_CERT", "/nonexistent/client.pem"),
    ("REDIS_TLS_KEY", "/dev/null"),
    ("DB_PASSWORD_FILE", "/nonexistent/password"),
    ("DATABASE_URL_FILE", "/nonexistent/url"),
    ("REDIS_PASSWORD_FILE", "/"),
    ("REDIS_URL_FILE", "/dev/zero"),
    ("BIND_ADDR", "localhost"),
    ("PORT", "0"),
    ("METRICS_ADDR", ":9090"),
    ("DB_TIMEOUT", "1"),
    ("REDIS_TIMEOUT", "0s"),
    ("VISIT_TIMEOUT", "1h"),
    ("QUEUE_CAPACITY", "0"),
    ("HTTP_MAX_CONNECTIONS", "-1"),
    ("HEADER_TIMEOUT", "99ms"),
    ("IDLE_TIMEOUT", "forever"),
    ("SHUTDOWN_DELAY", "1.5s"),
    ("SHUTDOWN_TIMEOUT", "0s"),
    ("PAGE_STREAMS_MAX", "-1"),
    ("JAEGER_PUBLIC_URL", "localhost:16686"),
    ("GRAFANA_PUBLIC_URL", "ftp://grafana"),
    ("PROMETHEUS_PUBLIC_URL", "http://ana:c4nary@prometheus"),
    ("LOG_FORMAT", "logfmt"),
    ("RUST_LOG", "visitas=loud"),
    ("ACCESS_SLOW", "500"),
    ("OTEL_EXPORTER_OTLP_ENDPOINT", "collector:4318"),
    ("OTEL_EXPORTER_OTLP_HEADERS", "c4nary"),
    ("OTEL_EXPORTER_OTLP_TIMEOUT", "10s"),
    ("OTEL_EXPORTER_OTLP_COMPRESSION", "zstd"),
    ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
    ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "ftp://collector"),
    ("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "a=c4nary,a=c4nary"),
    ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "-1"),
    ("OTEL_EXPORTER_OTLP_TRACES_COMPRESSION", "on"),
    ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/json"),
    ("OTEL_SDK_DISABLED", "1"),
    ("OTEL_TRACES_EXPORTER", "console"),
    ("OTEL_TRACES_SAMPLER", "sometimes"),
    ("OTEL_TRACES_SAMPLER_ARG", "1.5"),
    ("OTEL_PROPAGATORS", "tracecontext,jaeger"),
    ("OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT", "-1"),
    ("OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT", "unlimited"),
    ("OTEL_SERVICE_NAME", "two\nlines"),
    ("OTEL_RESOURCE_ATTRIBUTES", "no equals sign"),
    ("OTEL_BSP_SCHEDULE_DELAY", "5s"),
    ("OTEL_BSP_MAX_QUEUE_SIZE", "0"),
    ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "x"),
    ("OTEL_BSP_EXPORT_TIMEOUT", "0"),
];

/// The names of all variables.
pub(crate) fn variables() -> BTreeSet<&'static str> {
    BAD.iter().map(|(variable, _)| *variable).collect()
}

#[tokio::test]
async fn bad_setting_ends_the_program_before_it_binds() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let taken = taken.local_addr().expect("an address").to_string();
    for &(variable, value) in BAD {
        // A program that got as far as binding would end with another status.
        let given = settings(&[("BIND_ADDR", &taken), (variable, value)]);
        let ended = Ended::of(&[], &given).await;
        assert_eq!(
            (ended.code, ended.output.as_str()),
            (Some(2), ""),
            "{ended:?}"
        );
        let error = ended.errors;
        assert!(error.starts_with("error: "), "{error}");
        assert!(error.contains(variable), "{error}");
        assert!(error.contains("expected "), "{error}");
        if value.contains(CANARY) {
            assert!(!error.contains(CANARY), "{error}");
        } else {
            let shown = format!("'{}' for ", value.escape_debug());
            assert!(error.contains(&shown), "{error}");
        }
    }
}

/// A setting that is missing in `docker-compose.yml` cannot be set in `.env`. `tests/e2e.sh` asks
/// Compose itself.
#[test]
fn every_variable_reaches_the_container() {
    let compose = std::fs::read_to_string("docker-compose.yml").expect("a file");
    for variable in variables() {
        let line = format!("      - {variable}=${{{variable}");
        assert!(compose.contains(&line), "docker-compose.yml lacks {line}");
    }
}

#[tokio::test]
async fn empty_variable_is_unset() {
    let empty: Vec<_> = variables().into_iter().map(|name| (name, "")).collect();
    let with = Ended::of(&["config"], &settings(&empty)).await;
    let without = Ended::of(&["config"], &[]).await;
    assert_eq!((with.code, with.errors.as_str()), (Some(0), ""));
    assert_eq!(with.output, without.output);
    let help = Ended::of(&["serve", "--help"], &settings(&empty)).await;
    assert!(help.output.contains("[env: DB_HOST]"), "{}", help.output);
}

#[test]
fn variable_that_is_not_text_is_exit_2_and_named() {
    for variable in variables() {
        let ended = program(&["config"], &[])
            .env(variable, OsStr::from_bytes(&[0xff]))
            .output()
            .expect("the program starts");
        assert_eq!(ended.status.code(), Some(2), "{variable}");
        let error = String::from_utf8(ended.stderr).expect("text");
        assert!(error.contains(variable), "{error}");
    }
}

#[tokio::test]
async fn contradicting_settings_are_exit_2_and_both_are_named() {
    let database = ("DATABASE_URL", "postgres://ana:c4nary@db/visitas");
    let cache = ("REDIS_URL", "redis://:c4nary@cache");
    let file = secret_file(CANARY);
    let path = file.path().to_str().expect("a path of ASCII");
    for given in [
        [database, ("DB_HOST", "db")],
        [database, ("DB_PORT", "5432")],
        [database, ("DB_USER", "ana")],
        [database, ("DB_PASSWORD", CANARY)],
        [database, ("DB_PASSWORD_FILE", path)],
        [database, ("DB_NAME", "visitas")],
        [database, ("DB_SSLMODE", "require")],
        [cache, ("REDIS_HOST", "cache")],
        [cache, ("REDIS_PORT", "6379")],
        [cache, ("REDIS_USERNAME", "ana")],
        [cache, ("REDIS_PASSWORD", CANARY)],
        [cache, ("REDIS_PASSWORD_FILE", path)],
        [database, ("DATABASE_URL_FILE", path)],
        [cache, ("REDIS_URL_FILE", path)],
        [("DB_PASSWORD", CANARY), ("DB_PASSWORD_FILE", path)],
        [("REDIS_PASSWORD", CANARY), ("REDIS_PASSWORD_FILE", path)],
        [("REDIS_TIMEOUT", "700ms"), ("DB_TIMEOUT", "1s")],
        [("VISIT_TIMEOUT", "1s"), ("DB_TIMEOUT", "2s")],
        [("VISIT_TIMEOUT", "1249ms"), ("DB_TIMEOUT", "1s")],
        [("VISIT_TIMEOUT", "1599ms"), ("REDIS_TIMEOUT", "600ms")],
        [("DB_TIMEOUT", "1751ms"), ("REDIS_TIMEOUT", "250ms")],
        [("METRICS_ADDR", "0.0.0.0:9"), ("BIND_ADDR", "0.0.0.0:9")],
    ] {
        let ended = Ended::of(&[], &settings(&given)).await;
        assert_eq!(
            (ended.code, ended.output.as_str()),
            (Some(2), ""),
            "{ended:?}"
        );
        let error = ended.errors;
        let names = given.map(|(variable, _)| error.contains(variable));
        assert_eq!(names, [true, true], "{error}");
        assert!(!error.contains(CANARY), "{error}");
    }
}

#[tokio::test]
async fn unreadable_secret_file_is_exit_2_with_variable_path_and_user() {
    let uid = rustix::process::geteuid().as_raw();
    for variable in [
        "DB_PASSWORD_FILE",
        "DATABASE_URL_FILE",
        "REDIS_PASSWORD_FILE",
        "REDIS_URL_FILE",
    ] {
        let ended = Ended::of(&[], &settings(&[(variable, "/nonexistent/secret")])).await;
        assert_eq!(ended.code, Some(2), "{ended:?}");
        let error = ended.errors;
        for part in [
            variable,
            "'/nonexistent/secret'",
            &format!("by uid {uid}: "),
        ] {
            assert!(error.contains(part), "{part} in {error}");
        }
    }
}

#[tokio::test]
async fn help_shows_no_value_from_the_environment() {
    let secrets: Vec<_> = BAD
        .iter()
        .filter(|(_, value)| value.contains(CANARY))
        .copied()
        .collect();
    let ended = Ended::of(&["--help"], &settings(&secrets)).await;
    assert_eq!(ended.code, Some(0));
    assert!(!ended.output.contains(CANARY), "{}", ended.output);
}

/// A file that contains a secret and a newline.
pub(crate) fn secret_file(secret: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
    writeln!(file, "{secret}").expect("a secret on the disk");
    file
}
