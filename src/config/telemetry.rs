//! The settings of logs, and the `OTEL_*` variables as OpenTelemetry defines them.
//!
//! Must not know: how anything is logged, sampled or exported.

use std::io::IsTerminal as _;
use std::time::Duration;

use clap::Args;
use http::{HeaderName, HeaderValue};
use tracing_subscriber::EnvFilter;
use url::Url;

use super::roots;
use super::sources::{Sources, invalid};
use super::value::{
    Accept, Certificates, Pairs, Secret, accept, durations, milliseconds, one_of, pairs, parsed,
    text, within,
};

/// Logs and traces.
#[derive(Args, Clone, Debug)]
pub struct TelemetryConfig {
    /// Logs.
    #[command(flatten)]
    pub log: LogConfig,
    #[command(flatten)]
    traces: TracesConfig,
}

impl TelemetryConfig {
    /// Traces; `None` if `OTEL_SDK_DISABLED` is true.
    #[must_use]
    pub fn traces(&self) -> Option<&TracesConfig> {
        Some(&self.traces).filter(|traces| !traces.otel_sdk_disabled)
    }

    /// Whether `OTEL_PROPAGATORS` has W3C's trace context. It applies without traces too: log lines
    /// have the caller's trace id.
    #[must_use]
    pub fn trace_context(&self) -> bool {
        self.traces.otel_propagators
    }

    /// Combines the `OTEL_*` variables, and refuses contradictions even if nothing is exported:
    /// otherwise a mistake would show only when tracing is turned on.
    pub(super) fn finish(&mut self, sources: &mut Sources<'_>) -> Result<(), clap::Error> {
        self.traces.finish(sources)
    }
}

/// Log format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// One JSON object per line.
    Json,
    /// For people.
    Pretty,
}

/// Logs.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Logs")]
pub struct LogConfig {
    /// Log format; without it json, or pretty on a terminal
    #[arg(long, env, default_value = format_for(std::io::stdout().is_terminal()), hide_default_value = true, value_parser = one_of(LOG_FORMATS))]
    pub log_format: LogFormat,
    /// Which lines are logged, in the directives of tracing-subscriber
    #[arg(long, env, default_value = "info", value_parser = accept("directives such as info or visitas=debug,warn", filter))]
    pub rust_log: String,
    /// Requests that take longer have an access line at level info, and a trace even if not sampled
    #[arg(long, env, default_value = "500ms", value_parser = durations("0s", "1h"))]
    pub access_slow: Duration,
}

const LOG_FORMATS: &[(&str, LogFormat)] =
    &[("json", LogFormat::Json), ("pretty", LogFormat::Pretty)];

/// Compression of exported spans.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// No compression.
    None,
    /// gzip (RFC 1952).
    Gzip,
}

const COMPRESSIONS: &[(&str, Compression)] =
    &[("none", Compression::None), ("gzip", Compression::Gzip)];

/// Which requests are traced.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampler {
    /// Whether a sampled or unsampled parent decides before `root` does.
    pub parent_based: bool,
    /// Decides when no parent does.
    pub root: Root,
}

/// The decision about a trace that starts here.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Root {
    /// Every trace.
    AlwaysOn,
    /// No trace.
    AlwaysOff,
    /// This share of the traces, from 0 to 1, by trace id.
    Ratio(f64),
}

const SAMPLERS: &[(&str, Sampler)] = &[
    ("always_on", sampler(false, Root::AlwaysOn)),
    ("always_off", sampler(false, Root::AlwaysOff)),
    ("traceidratio", sampler(false, Root::Ratio(1.0))),
    ("parentbased_always_on", sampler(true, Root::AlwaysOn)),
    ("parentbased_always_off", sampler(true, Root::AlwaysOff)),
    ("parentbased_traceidratio", sampler(true, Root::Ratio(1.0))),
];

const fn sampler(parent_based: bool, root: Root) -> Sampler {
    Sampler { parent_based, root }
}

const BOOLEANS: &[(&str, bool)] = &[("true", true), ("false", false)];
const EXPORTERS: &[(&str, bool)] = &[("otlp", true), ("none", false)];
const PROTOCOLS: &[(&str, Protocol)] = &[("http/protobuf", Protocol::HttpProtobuf)];

/// The resource attribute that has a variable of its own.
const SERVICE_NAME: &str = "service.name";

/// The service names that are accepted.
const SERVICE_NAMES: &str = "1 to 255 bytes without control characters";

fn service_name(name: &str) -> Option<String> {
    text(name, 255)
}

/// The one protocol that the exporter speaks.
#[derive(Clone, Copy, Debug)]
enum Protocol {
    HttpProtobuf,
}

/// Traces, by OpenTelemetry's variables. After `finish`, `exporter` has the effective ones.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "OpenTelemetry")]
pub struct TracesConfig {
    /// Base URL of an OTLP collector, to which /v1/traces is appended; without it no span is exported
    #[arg(long, env, value_parser = endpoint())]
    otel_exporter_otlp_endpoint: Option<String>,
    /// URL that spans are sent to, unchanged; overrides OTEL_EXPORTER_OTLP_ENDPOINT
    #[arg(long, env, value_parser = endpoint())]
    otel_exporter_otlp_traces_endpoint: Option<String>,
    /// Headers for the collector: name=value,name=value with other characters percent-encoded
    #[arg(long, env, hide = true)]
    otel_exporter_otlp_headers: Option<Secret>,
    /// Overrides OTEL_EXPORTER_OTLP_HEADERS for traces
    #[arg(long, env, hide = true)]
    otel_exporter_otlp_traces_headers: Option<Secret>,
    /// Timeout of one export, in milliseconds
    #[arg(long, env, default_value = "10000", value_parser = milliseconds("1", "600000"))]
    otel_exporter_otlp_timeout: Duration,
    /// Overrides OTEL_EXPORTER_OTLP_TIMEOUT for traces
    #[arg(long, env, value_parser = milliseconds("1", "600000"))]
    otel_exporter_otlp_traces_timeout: Option<Duration>,
    /// Compression of exports
    #[arg(long, env, default_value = "none", value_parser = one_of(COMPRESSIONS))]
    otel_exporter_otlp_compression: Compression,
    /// Overrides OTEL_EXPORTER_OTLP_COMPRESSION for traces
    #[arg(long, env, value_parser = one_of(COMPRESSIONS))]
    otel_exporter_otlp_traces_compression: Option<Compression>,
    /// Protocol spoken with the collector
    #[arg(long, env, default_value = "http/protobuf", value_parser = one_of(PROTOCOLS))]
    otel_exporter_otlp_protocol: Protocol,
    /// Overrides OTEL_EXPORTER_OTLP_PROTOCOL for traces
    #[arg(long, env, value_parser = one_of(PROTOCOLS))]
    otel_exporter_otlp_traces_protocol: Option<Protocol>,
    /// Turns tracing off
    #[arg(long, env, default_value = "false", action = clap::ArgAction::Set, value_parser = one_of(BOOLEANS))]
    otel_sdk_disabled: bool,
    /// Whether spans are exported to the endpoint
    #[arg(long, env, default_value = "otlp", action = clap::ArgAction::Set, value_parser = one_of(EXPORTERS))]
    otel_traces_exporter: bool,
    /// Which requests are traced
    #[arg(long, env, default_value = "parentbased_always_on", value_parser = one_of(SAMPLERS))]
    pub otel_traces_sampler: Sampler,
    /// Share of the traces that the two samplers with a ratio keep; slow and failed requests are added
    #[arg(long, env, default_value = "1", value_parser = within(parsed::<f64>, "0", "1"))]
    otel_traces_sampler_arg: f64,
    /// Headers that carry a caller's trace. Baggage is accepted and not used; none reads no header
    #[arg(long, env, default_value = "tracecontext,baggage", action = clap::ArgAction::Set, value_parser = accept("tracecontext, baggage, both with a comma between them, or none", propagators))]
    otel_propagators: bool,
    /// Maximum length of an attribute's value, in characters; longer values are cut
    #[arg(long, env, default_value = "512", value_parser = within(parsed::<usize>, "1", "4096"))]
    pub otel_attribute_value_length_limit: usize,
    /// Overrides OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT for spans
    #[arg(long, env, value_parser = within(parsed::<usize>, "1", "4096"))]
    otel_span_attribute_value_length_limit: Option<usize>,
    /// Resource attribute service.name
    #[arg(long, env, default_value = "visitas", value_parser = accept(SERVICE_NAMES, service_name))]
    pub otel_service_name: String,
    /// Further resource attributes: key=value,key=value with other characters percent-encoded
    #[arg(long, env, value_parser = pairs)]
    otel_resource_attributes: Option<Pairs>,
    /// Pause between two exports, in milliseconds
    #[arg(long, env, default_value = "5000", value_parser = milliseconds("1", "600000"))]
    pub otel_bsp_schedule_delay: Duration,
    /// Maximum number of spans that wait for export; further ones are dropped and counted
    #[arg(long, env, default_value = "2048", value_parser = within(parsed::<usize>, "1", "1000000"))]
    pub otel_bsp_max_queue_size: usize,
    /// Maximum number of spans in one export; at most OTEL_BSP_MAX_QUEUE_SIZE
    #[arg(long, env, default_value = "512", value_parser = within(parsed::<usize>, "1", "1000000"))]
    pub otel_bsp_max_export_batch_size: usize,
    /// Timeout of one export, in milliseconds; the shorter of it and OTEL_EXPORTER_OTLP_TIMEOUT applies
    #[arg(long, env, default_value = "30000", value_parser = milliseconds("1", "600000"))]
    otel_bsp_export_timeout: Duration,
    /// The exporter's settings; `None` without an endpoint, or if `OTEL_TRACES_EXPORTER` is none.
    #[arg(skip)]
    pub exporter: Option<ExporterConfig>,
}

/// How spans are exported, by OTLP over HTTP.
#[derive(Clone, Debug)]
pub struct ExporterConfig {
    /// The whole URL, `/v1/traces` included.
    pub endpoint: String,
    /// Valid header names and values, decoded.
    pub headers: Vec<(String, Secret)>,
    /// The timeout of one export.
    pub timeout: Duration,
    /// The compression of exports.
    pub compression: Compression,
    /// The system's root certificates, if the exporter cannot find them.
    pub roots: Option<Certificates>,
}

impl TracesConfig {
    /// Maximum length of an attribute's value, in characters.
    #[must_use]
    pub fn value_length_limit(&self) -> usize {
        self.otel_span_attribute_value_length_limit
            .unwrap_or(self.otel_attribute_value_length_limit)
    }

    /// Resource attributes other than the service's name, decoded.
    pub fn resource_attributes(&self) -> impl Iterator<Item = &(String, String)> {
        let attributes = self.otel_resource_attributes.iter().flatten();
        attributes.filter(|(key, _)| key != SERVICE_NAME)
    }

    fn finish(&mut self, sources: &mut Sources<'_>) -> Result<(), clap::Error> {
        let exporter = self.exporter(sources)?;
        self.exporter = exporter.filter(|_| self.otel_traces_exporter);
        self.otel_traces_sampler = self.sampler(sources)?;
        let mut attributes = self.otel_resource_attributes.iter().flatten();
        // An empty name is none, as an empty variable is.
        let name = attributes.find(|(key, name)| key == SERVICE_NAME && !name.is_empty());
        if sources.is_default("OTEL_SERVICE_NAME")
            && let Some((_, name)) = name
        {
            self.otel_service_name = service_name(name).ok_or_else(|| {
                invalid(format!(
                    "OTEL_RESOURCE_ATTRIBUTES: service.name must be {SERVICE_NAMES}"
                ))
            })?;
            sources.derive("OTEL_SERVICE_NAME", name, "OTEL_RESOURCE_ATTRIBUTES");
        }
        if self.otel_bsp_max_export_batch_size > self.otel_bsp_max_queue_size {
            return Err(invalid(format!(
                "OTEL_BSP_MAX_EXPORT_BATCH_SIZE ({}) must be at most OTEL_BSP_MAX_QUEUE_SIZE ({})",
                self.otel_bsp_max_export_batch_size, self.otel_bsp_max_queue_size,
            )));
        }
        Ok(())
    }

    fn exporter(&self, sources: &mut Sources<'_>) -> Result<Option<ExporterConfig>, clap::Error> {
        let mut headers = Vec::new();
        for (variable, secret) in [
            (
                "OTEL_EXPORTER_OTLP_HEADERS",
                &self.otel_exporter_otlp_headers,
            ),
            (
                "OTEL_EXPORTER_OTLP_TRACES_HEADERS",
                &self.otel_exporter_otlp_traces_headers,
            ),
        ] {
            if let Some(secret) = secret {
                headers =
                    headers_in(secret.expose()).map_err(|why| sources.refuse(variable, &why))?;
            }
        }
        let endpoint = self.otel_exporter_otlp_traces_endpoint.clone().or_else(|| {
            let base = self.otel_exporter_otlp_endpoint.as_ref()?;
            let endpoint = format!("{}/v1/traces", base.trim_end_matches('/'));
            let from = "OTEL_EXPORTER_OTLP_ENDPOINT";
            sources.derive("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", &endpoint, from);
            Some(endpoint)
        });
        let timeout = self
            .otel_exporter_otlp_traces_timeout
            .unwrap_or(self.otel_exporter_otlp_timeout);
        Ok(endpoint.map(|endpoint| ExporterConfig {
            endpoint,
            headers,
            timeout: timeout.min(self.otel_bsp_export_timeout),
            compression: self
                .otel_exporter_otlp_traces_compression
                .unwrap_or(self.otel_exporter_otlp_compression),
            roots: roots::load_system_roots(sources.environment),
        }))
    }

    fn sampler(&self, sources: &Sources<'_>) -> Result<Sampler, clap::Error> {
        let Sampler { parent_based, root } = self.otel_traces_sampler;
        match root {
            Root::Ratio(_) => Ok(sampler(
                parent_based,
                Root::Ratio(self.otel_traces_sampler_arg),
            )),
            root if sources.is_default("OTEL_TRACES_SAMPLER_ARG") => {
                Ok(sampler(parent_based, root))
            }
            _ => Err(invalid(format!(
                "OTEL_TRACES_SAMPLER_ARG ({}) has no effect while OTEL_TRACES_SAMPLER is {}: \
                 expected traceidratio or parentbased_traceidratio",
                self.otel_traces_sampler_arg,
                sources.shown("OTEL_TRACES_SAMPLER"),
            ))),
        }
    }
}

pub(super) fn format_for(terminal: bool) -> &'static str {
    if terminal { "pretty" } else { "json" }
}

fn filter(text: &str) -> Option<String> {
    // The parser miscounts whitespace before a directive, and can panic.
    let directives: Vec<&str> = text.split(',').map(str::trim).collect();
    let filter = directives.join(",");
    (!filter.is_empty() && EnvFilter::try_new(&filter).is_ok()).then_some(filter)
}

/// Accepts a collector's URL. Credentials and tokens belong in the headers, which are secret.
fn endpoint() -> Accept<String> {
    const ACCEPTED: &str = "an http:// or https:// URL without user, query and fragment";
    accept(ACCEPTED, |text| {
        let url = text.parse::<Url>().ok()?;
        let is_plain = url.username().is_empty()
            && url.password().is_none()
            && url.query().is_none()
            && url.fragment().is_none();
        // The exporter takes the text as it is, and its parser is stricter than a browser's.
        let uri: http::Uri = text.parse().ok()?;
        let accepted = matches!(url.scheme(), "http" | "https") && is_plain;
        (accepted && uri.host().is_some()).then(|| text.to_owned())
    })
}

/// Whether W3C's trace context is in a list of propagators.
fn propagators(text: &str) -> Option<bool> {
    let mut words: Vec<_> = text
        .split(',')
        .map(|word| word.trim().to_ascii_lowercase())
        .collect();
    words.sort_unstable();
    words.dedup();
    let is_known = |word: &String| matches!(word.as_str(), "tracecontext" | "baggage");
    let accepted = words == ["none"] || words.iter().all(is_known);
    accepted.then(|| words.iter().any(|word| word == "tracecontext"))
}

pub(super) fn headers_in(text: &str) -> Result<Vec<(String, Secret)>, String> {
    let headers = pairs(text)?;
    let valid = headers.iter().all(|(name, value)| {
        HeaderName::from_bytes(name.as_bytes()).is_ok() && HeaderValue::from_str(value).is_ok()
    });
    if !valid {
        return Err("expected names and values of HTTP headers".to_owned());
    }
    let secret = |(name, value)| (name, Secret::from(value));
    Ok(headers.into_iter().map(secret).collect())
}
