//! The table of settings: each variable, its help, its default and what it accepts, spelled once.
//!
//! A setting's flag is its variable in kebab case. This file knows neither where values come from
//! nor how they depend on each other.

use std::time::Duration;

use super::kind::{
    Address, Choice, Count, Durations, FilePath, Filter, Headers, Host, Kind, Milliseconds, Pairs,
    Password, Pem, Port, Propagators, Ratio, Text,
};
use super::url::{Endpoint, PostgresUrl, RedisUrl};
use super::value::{Compression, LogFormat, Root, Sampler, SslMode};

/// A setting whose value is of the kind `K`.
#[derive(Debug)]
pub(super) struct Setting<K> {
    pub(super) about: About,
    pub(super) kind: K,
}

/// What is to be said about a setting of any kind.
#[derive(Debug)]
pub(super) struct About {
    pub(super) variable: &'static str,
    pub(super) heading: &'static str,
    pub(super) help: &'static str,
    pub(super) fallback: Fallback,
    pub(super) value_name: &'static str,
    /// A secret has no flag, and its value is never shown.
    pub(super) secret: bool,
}

/// What holds when neither a flag nor a variable says otherwise.
#[derive(Debug)]
pub(super) enum Fallback {
    /// A value, as one would write it.
    Value(&'static str),
    /// No value; the text says what that means.
    Absent(&'static str),
}

impl About {
    /// The flag, without its two hyphens.
    pub(super) fn flag(&self) -> String {
        self.variable.to_ascii_lowercase().replace('_', "-")
    }
}

/// A setting a line: what would be its doc comment is its help.
macro_rules! settings {
    ($($heading:literal {
        $($(#[doc = $help:literal])+ $name:ident: $kind:ty = $value:expr, $fallback:ident $text:literal;)+
    })+) => {
        $($(
            pub(super) static $name: Setting<$kind> = Setting {
                about: About {
                    variable: stringify!($name),
                    heading: $heading,
                    help: concat!($($help),+),
                    fallback: Fallback::$fallback($text),
                    value_name: <$kind as Kind>::VALUE_NAME,
                    secret: <$kind as Kind>::SECRET,
                },
                kind: $value,
            };
        )+)+

        /// Every setting in the order of the help, with what it accepts.
        pub(super) fn all() -> Vec<(&'static About, String)> {
            vec![$($((&$name.about, $name.kind.accepts())),+),+]
        }
    };
}

settings! {
    "Postgres" {
        /// Host name or address, or the directory of a Unix socket.
        DB_HOST: Host = Host { sockets: true }, Value "localhost";
        /// TCP port.
        DB_PORT: Port = Port, Value "5432";
        /// Role to log in as.
        DB_USER: Text = Text { max_bytes: 63 }, Value "usuario";
        /// Database.
        DB_NAME: Text = Text { max_bytes: 63 }, Value "desafio3db";
        /// Whether the connection is encrypted and the server's certificate verified.
        DB_SSLMODE: Choice<SslMode> = Choice(&[
            ("disable", SslMode::Disable),
            ("allow", SslMode::Allow),
            ("prefer", SslMode::Prefer),
            ("require", SslMode::Require),
            ("verify-ca", SslMode::VerifyCa),
            ("verify-full", SslMode::VerifyFull),
        ]), Value "prefer";
        /// Certificates to trust instead of the system's, for the two verifying modes of TLS; the file is read for each session.
        DB_SSLROOTCERT: Pem = Pem, Absent "system roots";
        /// Deadline of one call; the server gives up a lock at 70 % and a statement at 85 % of it.
        DB_TIMEOUT: Durations = Durations {
            min: Duration::from_millis(10),
            max: Duration::from_mins(1),
        }, Value "1s";
    }
    "Redis" {
        /// Host name or address.
        REDIS_HOST: Host = Host { sockets: false }, Value "localhost";
        /// TCP port.
        REDIS_PORT: Port = Port, Value "6379";
        /// Certificates to trust instead of the system's, for a rediss:// URL.
        REDIS_TLS_CA: Pem = Pem, Absent "system roots";
        /// Deadline of one call, below 70 % of the one for Postgres.
        REDIS_TIMEOUT: Durations = Durations {
            min: Duration::from_millis(1),
            max: Duration::from_secs(30),
        }, Value "250ms";
    }
    "HTTP" {
        /// Address to serve on.
        BIND_ADDR: Address = Address, Value "0.0.0.0:5000";
        /// Address to serve /metrics on, and there only.
        METRICS_ADDR: Address = Address, Absent "unset, /metrics is on BIND_ADDR";
        /// Maximum number of open client connections; beyond it the one idle longest is closed. Raises the open-file limit to match.
        HTTP_MAX_CONNECTIONS: Count = Count { min: 1, max: 1_000_000 }, Value "16384";
        /// Maximum time to receive a request's headers, from their first byte.
        HEADER_TIMEOUT: Durations = Durations {
            min: Duration::from_millis(100),
            max: Duration::from_mins(5),
        }, Value "5s";
        /// Maximum time that a connection, a new one included, stays open without a request.
        IDLE_TIMEOUT: Durations = Durations {
            min: Duration::from_millis(100),
            max: Duration::from_hours(1),
        }, Value "75s";
    }
    "Visits" {
        /// Deadline of one visit, its wait in the queue included; at least `DB_TIMEOUT` + `REDIS_TIMEOUT`.
        VISIT_TIMEOUT: Durations = Durations {
            min: Duration::from_millis(10),
            max: Duration::from_mins(2),
        }, Value "2s";
        /// Visits that may wait to be recorded; further ones are refused at once.
        QUEUE_CAPACITY: Count = Count { min: 1, max: 1_000_000 }, Value "8192";
    }
    "Shutdown" {
        /// Time after SIGTERM, SIGINT or SIGHUP during which everything is still served, for load balancers to notice.
        SHUTDOWN_DELAY: Durations = Durations {
            min: Duration::ZERO,
            max: Duration::from_mins(10),
        }, Value "0s";
        /// Time to finish in after the delay.
        SHUTDOWN_TIMEOUT: Durations = Durations {
            min: Duration::from_millis(100),
            max: Duration::from_mins(10),
        }, Value "10s";
    }
    "Logs" {
        /// How a line is written.
        LOG_FORMAT: Choice<LogFormat> = Choice(&[
            ("json", LogFormat::Json),
            ("pretty", LogFormat::Pretty),
        ]), Absent "json, pretty on a terminal";
        /// Which lines are written, in the directives of tracing-subscriber.
        RUST_LOG: Filter = Filter, Value "info";
        /// Requests that take longer have an access line at level info.
        ACCESS_SLOW: Durations = Durations {
            min: Duration::ZERO,
            max: Duration::from_hours(1),
        }, Value "500ms";
    }
    "Telemetry" {
        /// Base URL of an OTLP collector; /v1/traces is appended.
        OTEL_EXPORTER_OTLP_ENDPOINT: Endpoint = Endpoint, Absent "unset, spans are not exported";
        /// URL that spans are sent to, as it is.
        OTEL_EXPORTER_OTLP_TRACES_ENDPOINT: Endpoint = Endpoint, Absent "as without TRACES_";
        /// Deadline of one export.
        OTEL_EXPORTER_OTLP_TIMEOUT: Milliseconds = Milliseconds { max: 600_000 }, Value "10000";
        /// The same for spans.
        OTEL_EXPORTER_OTLP_TRACES_TIMEOUT: Milliseconds = Milliseconds { max: 600_000 }, Absent "as without TRACES_";
        /// Compression of what is exported.
        OTEL_EXPORTER_OTLP_COMPRESSION: Choice<Compression> = Choice(&[
            ("none", Compression::None),
            ("gzip", Compression::Gzip),
        ]), Value "none";
        /// The same for spans.
        OTEL_EXPORTER_OTLP_TRACES_COMPRESSION: Choice<Compression> = Choice(&[
            ("none", Compression::None),
            ("gzip", Compression::Gzip),
        ]), Absent "as without TRACES_";
        /// Protocol spoken with the collector.
        OTEL_EXPORTER_OTLP_PROTOCOL: Choice<()> = Choice(&[("http/protobuf", ())]), Value "http/protobuf";
        /// The same for spans.
        OTEL_EXPORTER_OTLP_TRACES_PROTOCOL: Choice<()> = Choice(&[("http/protobuf", ())]), Absent "as without TRACES_";
        /// Turns tracing off altogether.
        OTEL_SDK_DISABLED: Choice<bool> = Choice(&[("true", true), ("false", false)]), Value "false";
        /// Where spans go: to the endpoint, or nowhere.
        OTEL_TRACES_EXPORTER: Choice<bool> = Choice(&[("otlp", true), ("none", false)]), Value "otlp";
        /// Which requests are traced.
        OTEL_TRACES_SAMPLER: Choice<Sampler> = Choice(&[
            ("always_on", Sampler { parent_based: false, root: Root::AlwaysOn }),
            ("always_off", Sampler { parent_based: false, root: Root::AlwaysOff }),
            ("traceidratio", Sampler { parent_based: false, root: Root::Ratio(1.0) }),
            ("parentbased_always_on", Sampler { parent_based: true, root: Root::AlwaysOn }),
            ("parentbased_always_off", Sampler { parent_based: true, root: Root::AlwaysOff }),
            ("parentbased_traceidratio", Sampler { parent_based: true, root: Root::Ratio(1.0) }),
        ]), Value "parentbased_always_on";
        /// The ratio, for the two samplers that take one.
        OTEL_TRACES_SAMPLER_ARG: Ratio = Ratio, Absent "1";
        /// Headers to take a request's trace from. Baggage is accepted and not used; none uses no header.
        OTEL_PROPAGATORS: Propagators = Propagators, Value "tracecontext,baggage";
        /// Maximum length of an attribute's value, in characters. Longer values are cut.
        OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT: Count = Count { min: 1, max: 4096 }, Value "512";
        /// Overrides OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT for the attributes of spans.
        OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT: Count = Count { min: 1, max: 4096 }, Absent "OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT";
        /// Resource attribute service.name.
        OTEL_SERVICE_NAME: Text = Text { max_bytes: 255 }, Value "visitas";
        /// Further resource attributes.
        OTEL_RESOURCE_ATTRIBUTES: Pairs = Pairs, Absent "none";
        /// Pause between two exports.
        OTEL_BSP_SCHEDULE_DELAY: Milliseconds = Milliseconds { max: 600_000 }, Value "5000";
        /// Spans that may wait for export; further ones are dropped and counted.
        OTEL_BSP_MAX_QUEUE_SIZE: Count = Count { min: 1, max: 1_000_000 }, Value "2048";
        /// Spans of one export, at most the queue's size.
        OTEL_BSP_MAX_EXPORT_BATCH_SIZE: Count = Count { min: 1, max: 1_000_000 }, Value "512";
        /// Deadline of one export; the shorter of the two holds.
        OTEL_BSP_EXPORT_TIMEOUT: Milliseconds = Milliseconds { max: 600_000 }, Value "30000";
    }
    "Files that hold a secret" {
        /// Holds DB_PASSWORD.
        DB_PASSWORD_FILE: FilePath = FilePath, Absent "none";
        /// Holds DATABASE_URL.
        DATABASE_URL_FILE: FilePath = FilePath, Absent "none";
        /// Holds REDIS_PASSWORD.
        REDIS_PASSWORD_FILE: FilePath = FilePath, Absent "none";
        /// Holds REDIS_URL.
        REDIS_URL_FILE: FilePath = FilePath, Absent "none";
    }
    "Secrets, by environment only" {
        /// Password of the role.
        DB_PASSWORD: Password = Password, Absent "none";
        /// Instead of DB_HOST, DB_PORT, DB_USER, DB_PASSWORD, DB_NAME and DB_SSLMODE.
        DATABASE_URL: PostgresUrl = PostgresUrl, Absent "none";
        /// Password of Redis.
        REDIS_PASSWORD: Password = Password, Absent "none";
        /// Instead of REDIS_HOST, REDIS_PORT and REDIS_PASSWORD.
        REDIS_URL: RedisUrl = RedisUrl, Absent "none";
        /// Headers for the collector.
        OTEL_EXPORTER_OTLP_HEADERS: Headers = Headers, Absent "none";
        /// The same for spans.
        OTEL_EXPORTER_OTLP_TRACES_HEADERS: Headers = Headers, Absent "as without TRACES_";
    }
}

/// Variables that the Postgres driver reads by itself and cannot be told to ignore, each with what
/// to do instead. The driver's other `PG*` variables are overridden by the settings above.
pub(super) const OBEYED_BY_THE_DRIVER: [(&str, &str); 4] = [
    ("PGOPTIONS", "unset it, session options are not supported"),
    ("PGSSLROOTCERT", "unset it and set DB_SSLROOTCERT"),
    (
        "PGSSLCERT",
        "unset it, client certificates are not supported",
    ),
    (
        "PGSSLKEY",
        "unset it, client certificates are not supported",
    ),
];
