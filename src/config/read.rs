//! Puts the settings together, and finds those that contradict each other.
//!
//! Knows how settings depend on each other, but neither what one accepts nor where it comes from.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use http::Uri;

use super::kind::in_words;
#[cfg_attr(
    not(test),
    expect(
        clippy::wildcard_imports,
        reason = "the table is nothing but names, nearly all used here"
    )
)]
use super::setting::*;
use super::source::{ConfigError, Reader, displayed};
use super::value::{Compression, LogFormat, Root, Sampler};
use super::{
    Config, ExporterConfig, HttpConfig, LogConfig, PostgresConfig, RedisConfig, ShutdownConfig,
    TelemetryConfig, TracesConfig, VisitConfig, cli,
};

pub(super) fn service(reader: &mut Reader<'_>, terminal: bool) -> Result<Config, ConfigError> {
    let (postgres, redis) = stores(reader)?;
    let http = http(reader)?;
    let visit = VisitConfig {
        timeout: reader.required(&VISIT_TIMEOUT)?,
        queue_capacity: reader.required(&QUEUE_CAPACITY)?,
    };
    // A visit waits for one call to each store, one after the other.
    let calls = postgres.timeout + redis.timeout;
    if visit.timeout < calls {
        return Err(ConfigError::new(&format!(
            "{}: is less than {} + {}; expected at least {}",
            reader.name(&VISIT_TIMEOUT.about),
            reader.name(&DB_TIMEOUT.about),
            reader.name(&REDIS_TIMEOUT.about),
            in_words(calls),
        )));
    }
    Ok(Config {
        postgres,
        redis,
        http,
        visit,
        shutdown: ShutdownConfig {
            delay: reader.required(&SHUTDOWN_DELAY)?,
            timeout: reader.required(&SHUTDOWN_TIMEOUT)?,
        },
        telemetry: TelemetryConfig {
            log: log(reader, terminal)?,
            traces: traces(reader)?,
            trace_context: reader.required(&OTEL_PROPAGATORS)?,
        },
    })
}

/// Both stores. A Redis call must end before a lock of Postgres is given up: `reconcile` waits for
/// the calls in flight while it holds one.
pub(super) fn stores(
    reader: &mut Reader<'_>,
) -> Result<(PostgresConfig, RedisConfig), ConfigError> {
    let (postgres, redis) = (postgres(reader)?, redis(reader)?);
    if redis.timeout >= postgres.lock_timeout() {
        return Err(ConfigError::new(&format!(
            "{}: is too long for {}; expected less than 70 % of that, {}",
            reader.name(&REDIS_TIMEOUT.about),
            reader.name(&DB_TIMEOUT.about),
            in_words(postgres.lock_timeout()),
        )));
    }
    Ok((postgres, redis))
}

pub(super) fn postgres(reader: &mut Reader<'_>) -> Result<PostgresConfig, ConfigError> {
    reader.refuse_driver_variables()?;
    let url = &DATABASE_URL.about;
    if let Some(database) = reader.secret(&DATABASE_URL, &DATABASE_URL_FILE)? {
        reader.refuse_together(
            url,
            &[
                &DB_HOST.about,
                &DB_PORT.about,
                &DB_USER.about,
                &DB_PASSWORD.about,
                &DB_PASSWORD_FILE.about,
                &DB_NAME.about,
                &DB_SSLMODE.about,
            ],
        )?;
        if database.names_root_cert() {
            reader.refuse_together(url, &[&DB_SSLROOTCERT.about])?;
        }
        reader.unpack(url, database.parts);
    }
    let config = PostgresConfig {
        host: reader.required(&DB_HOST)?,
        port: reader.required(&DB_PORT)?,
        user: reader.required(&DB_USER)?,
        password: reader.secret(&DB_PASSWORD, &DB_PASSWORD_FILE)?,
        database: reader.required(&DB_NAME)?,
        ssl_mode: reader.required(&DB_SSLMODE)?,
        ssl_root_cert: reader
            .optional(&DB_SSLROOTCERT)?
            .map(|certificates| certificates.path),
        timeout: reader.required(&DB_TIMEOUT)?,
    };
    // The other modes take any certificate, so that naming one's own would only look safe.
    if config.ssl_root_cert.is_some() && !config.ssl_mode.verifies() {
        return Err(ConfigError::new(&format!(
            "{}: has no effect with {}; expected verify-ca or verify-full there",
            reader.name(&DB_SSLROOTCERT.about),
            reader.name(&DB_SSLMODE.about),
        )));
    }
    Ok(config)
}

fn redis(reader: &mut Reader<'_>) -> Result<RedisConfig, ConfigError> {
    let url = &REDIS_URL.about;
    let (mut tls, mut username, mut database) = (false, None, 0);
    if let Some(cache) = reader.secret(&REDIS_URL, &REDIS_URL_FILE)? {
        reader.refuse_together(
            url,
            &[
                &REDIS_HOST.about,
                &REDIS_PORT.about,
                &REDIS_PASSWORD.about,
                &REDIS_PASSWORD_FILE.about,
            ],
        )?;
        reader.unpack(url, cache.parts);
        (tls, username, database) = (cache.tls, cache.username, cache.database);
    }
    let mut config = RedisConfig {
        host: reader.required(&REDIS_HOST)?,
        port: reader.required(&REDIS_PORT)?,
        tls,
        username,
        password: reader.secret(&REDIS_PASSWORD, &REDIS_PASSWORD_FILE)?,
        database,
        tls_ca: reader.optional(&REDIS_TLS_CA)?,
        timeout: reader.required(&REDIS_TIMEOUT)?,
    };
    if config.tls_ca.is_some() && !config.tls {
        return Err(ConfigError::new(&format!(
            "{}: has no effect without TLS; expected {} to be a rediss:// URL",
            reader.name(&REDIS_TLS_CA.about),
            url.variable,
        )));
    }
    if config.tls && config.tls_ca.is_none() {
        config.tls_ca = reader.system_roots();
    }
    Ok(config)
}

fn http(reader: &mut Reader<'_>) -> Result<HttpConfig, ConfigError> {
    let config = HttpConfig {
        bind_addr: reader.required(&BIND_ADDR)?,
        metrics_addr: reader.optional(&METRICS_ADDR)?,
        max_connections: reader.required(&HTTP_MAX_CONNECTIONS)?,
        header_timeout: reader.required(&HEADER_TIMEOUT)?,
        idle_timeout: reader.required(&IDLE_TIMEOUT)?,
    };
    if config.bind_addr.port() != 0 && config.metrics_addr == Some(config.bind_addr) {
        return Err(ConfigError::new(&format!(
            "{}: is the same as {}; expected another address or port",
            reader.name(&METRICS_ADDR.about),
            reader.name(&BIND_ADDR.about),
        )));
    }
    Ok(config)
}

pub(super) fn log(reader: &mut Reader<'_>, terminal: bool) -> Result<LogConfig, ConfigError> {
    let format = match reader.optional(&LOG_FORMAT)? {
        Some(format) => format,
        None if terminal => LogFormat::Pretty,
        None => LogFormat::Json,
    };
    let word = LOG_FORMAT.kind.word(format).unwrap_or_default();
    reader.derive(&LOG_FORMAT.about, word, &LOG_FORMAT.about);
    Ok(LogConfig {
        format,
        filter: reader.required(&RUST_LOG)?,
        access_slow: reader.required(&ACCESS_SLOW)?,
    })
}

/// Traces. Everything is checked even if nothing is exported, or a mistake would come to light only
/// when somebody turns tracing on.
fn traces(reader: &mut Reader<'_>) -> Result<Option<TracesConfig>, ConfigError> {
    let disabled = reader.required(&OTEL_SDK_DISABLED)?;
    let exports = reader.required(&OTEL_TRACES_EXPORTER)?;
    let exporter = exporter(reader)?;
    let sampler = sampler(reader)?;
    let general_limit = reader.required(&OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT)?;
    let span_limit = reader.specific(
        &OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT,
        &OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT,
    )?;
    let mut resource_attributes = reader
        .optional(&OTEL_RESOURCE_ATTRIBUTES)?
        .unwrap_or_default();
    let mut service_name = reader.required(&OTEL_SERVICE_NAME)?;
    let named = resource_attributes
        .extract_if(.., |(key, _)| key == "service.name")
        .next();
    if let Some((_, name)) = named
        && reader.is_default(&OTEL_SERVICE_NAME.about)
    {
        let from = &OTEL_RESOURCE_ATTRIBUTES.about;
        reader.derive(&OTEL_SERVICE_NAME.about, &name, from);
        service_name = name;
    }
    let config = TracesConfig {
        exporter: exporter.filter(|_| exports),
        sampler,
        service_name,
        resource_attributes,
        value_length_limit: span_limit.unwrap_or(general_limit),
        schedule_delay: reader.required(&OTEL_BSP_SCHEDULE_DELAY)?,
        max_queue_size: reader.required(&OTEL_BSP_MAX_QUEUE_SIZE)?,
        max_export_batch_size: reader.required(&OTEL_BSP_MAX_EXPORT_BATCH_SIZE)?,
    };
    if config.max_export_batch_size > config.max_queue_size {
        return Err(ConfigError::new(&format!(
            "{}: is more than {}; expected at most that",
            reader.name(&OTEL_BSP_MAX_EXPORT_BATCH_SIZE.about),
            reader.name(&OTEL_BSP_MAX_QUEUE_SIZE.about),
        )));
    }
    Ok((!disabled).then_some(config))
}

fn exporter(reader: &mut Reader<'_>) -> Result<Option<ExporterConfig>, ConfigError> {
    let base = reader.optional(&OTEL_EXPORTER_OTLP_ENDPOINT)?;
    let endpoint = match (reader.optional(&OTEL_EXPORTER_OTLP_TRACES_ENDPOINT)?, base) {
        (None, Some(base)) => {
            let endpoint = format!("{}/v1/traces", base.trim_end_matches('/'));
            let from = &OTEL_EXPORTER_OTLP_ENDPOINT.about;
            reader.derive(&OTEL_EXPORTER_OTLP_TRACES_ENDPOINT.about, &endpoint, from);
            Some(endpoint)
        }
        (endpoint, _) => endpoint,
    };
    reader.specific(
        &OTEL_EXPORTER_OTLP_TRACES_PROTOCOL,
        &OTEL_EXPORTER_OTLP_PROTOCOL,
    )?;
    let headers = reader.specific(
        &OTEL_EXPORTER_OTLP_TRACES_HEADERS,
        &OTEL_EXPORTER_OTLP_HEADERS,
    )?;
    let timeout = reader.specific(
        &OTEL_EXPORTER_OTLP_TRACES_TIMEOUT,
        &OTEL_EXPORTER_OTLP_TIMEOUT,
    )?;
    let compression = reader.specific(
        &OTEL_EXPORTER_OTLP_TRACES_COMPRESSION,
        &OTEL_EXPORTER_OTLP_COMPRESSION,
    )?;
    let batch_timeout = reader.required(&OTEL_BSP_EXPORT_TIMEOUT)?;
    Ok(endpoint.map(|endpoint| ExporterConfig {
        endpoint,
        headers: headers.unwrap_or_default(),
        timeout: timeout.map_or(batch_timeout, |timeout| timeout.min(batch_timeout)),
        compression: compression.unwrap_or(Compression::None),
        roots: reader.system_roots(),
    }))
}

fn sampler(reader: &mut Reader<'_>) -> Result<Sampler, ConfigError> {
    let mut sampler = reader.required(&OTEL_TRACES_SAMPLER)?;
    if let Some(ratio) = reader.optional(&OTEL_TRACES_SAMPLER_ARG)? {
        if !matches!(sampler.root, Root::Ratio(_)) {
            return Err(ConfigError::new(&format!(
                "{}: has no effect with {}; expected traceidratio or parentbased_traceidratio there",
                reader.name(&OTEL_TRACES_SAMPLER_ARG.about),
                reader.name(&OTEL_TRACES_SAMPLER.about),
            )));
        }
        sampler.root = Root::Ratio(ratio);
    } else if let Root::Ratio(ratio) = sampler.root {
        let about = &OTEL_TRACES_SAMPLER_ARG.about;
        reader.derive(about, &ratio.to_string(), about);
    }
    Ok(sampler)
}

pub(super) fn healthcheck_url(text: &str) -> Result<Uri, ConfigError> {
    let is_asked_openly = |url: &Uri| {
        let user = url
            .authority()
            .map(|authority| authority.as_str().contains('@'));
        url.scheme_str() == Some("http") && user == Some(false)
    };
    text.parse::<Uri>()
        .ok()
        .filter(is_asked_openly)
        .ok_or_else(|| {
            let value = displayed(text);
            ConfigError::new(&format!(
                "--{}={value}: expected an http:// URL without user",
                cli::URL
            ))
        })
}

/// The health endpoint of a service with these settings on this host.
pub(super) fn own_health(reader: &mut Reader<'_>) -> Result<Uri, ConfigError> {
    let mut address = reader.required(&BIND_ADDR)?;
    match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => address.set_ip(Ipv4Addr::LOCALHOST.into()),
        IpAddr::V6(ip) if ip.is_unspecified() => address.set_ip(Ipv6Addr::LOCALHOST.into()),
        _ => {}
    }
    if address.port() == 0 {
        return Err(ConfigError::new(&format!(
            "{}: has no port to ask; expected --{} beside it",
            reader.name(&BIND_ADDR.about),
            cli::URL,
        )));
    }
    healthcheck_url(&format!("http://{address}/health"))
}
