//! Listening, limits, visits and stopping.
//!
//! Must not know: how a connection is served.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use clap::Args;
use url::Url;

use super::sources::{Sources, invalid};
use super::value::{Accept, accept, durations, parsed, port, within};

/// The address that visitors are served on, which `visitas healthcheck` asks too.
#[derive(Args, Clone, Debug)]
pub struct ListenConfig {
    /// Address to serve on; the default is every address of this host, IPv4 and IPv6. With port 0 the system chooses one
    #[arg(long, env, default_value = "[::]:5000", value_parser = address())]
    pub bind_addr: SocketAddr,
    /// TCP port to serve on in place of 5000, as platforms set it; without effect if BIND_ADDR is set
    #[arg(long, env, value_parser = port())]
    port: Option<u16>,
}

impl ListenConfig {
    /// Takes the port from `PORT`, unless there is a `BIND_ADDR`: platforms set `PORT` always.
    pub(super) fn finish(&mut self, sources: &mut Sources<'_>) {
        if let Some(port) = self.port
            && sources.is_default("BIND_ADDR")
        {
            self.bind_addr.set_port(port);
            sources.note("BIND_ADDR", &self.bind_addr.to_string(), "PORT");
        }
    }
}

/// Listening and connections.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "HTTP")]
pub struct HttpConfig {
    /// The address that visitors are served on.
    #[command(flatten)]
    pub listen: ListenConfig,
    /// Address to serve /metrics on, and only there; without it /metrics is served on BIND_ADDR
    #[arg(long, env, value_parser = address())]
    pub metrics_addr: Option<SocketAddr>,
    /// Maximum number of open client connections; beyond it the one idle longest is closed. Raises the open-file limit to match
    #[arg(long, env, default_value = "16384", value_parser = within(parsed::<usize>, "1", "1000000"))]
    pub http_max_connections: usize,
    /// Maximum time to receive a request's headers, from their first byte
    #[arg(long, env, default_value = "5s", value_parser = durations("100ms", "5m"))]
    pub header_timeout: Duration,
    /// Maximum time that a connection, a new one included, stays open without a request
    #[arg(long, env, default_value = "75s", value_parser = durations("100ms", "1h"))]
    pub idle_timeout: Duration,
}

impl HttpConfig {
    /// Takes `PORT`, and refuses contradictory settings.
    pub(super) fn finish(&mut self, sources: &mut Sources<'_>) -> Result<(), clap::Error> {
        self.listen.finish(sources);
        let bind_addr = self.listen.bind_addr;
        if bind_addr.port() != 0 && self.metrics_addr == Some(bind_addr) {
            return Err(invalid(format!(
                "METRICS_ADDR and BIND_ADDR are both {bind_addr}: expected two addresses"
            )));
        }
        Ok(())
    }
}

/// Recording of visits.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Visits")]
pub struct VisitConfig {
    /// Timeout of one visit, its wait in the queue included; at least DB_TIMEOUT + REDIS_TIMEOUT
    #[arg(long, env, default_value = "2s", value_parser = durations("10ms", "2m"))]
    pub visit_timeout: Duration,
    /// Maximum number of visits that wait to be recorded; further ones are refused at once
    #[arg(long, env, default_value = "8192", value_parser = within(parsed::<usize>, "1", "1000000"))]
    pub queue_capacity: usize,
}

/// Stopping.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Shutdown")]
pub struct ShutdownConfig {
    /// Time after SIGTERM, SIGINT or SIGHUP during which everything is still served, so that load balancers notice
    #[arg(long, env, default_value = "0s", value_parser = durations("0s", "10m"))]
    pub shutdown_delay: Duration,
    /// Maximum time to drain after SHUTDOWN_DELAY
    #[arg(long, env, default_value = "10s", value_parser = durations("100ms", "10m"))]
    pub shutdown_timeout: Duration,
}

impl ShutdownConfig {
    /// Share of the shutdown timeout for requests in flight. The other shares divide the rest
    /// between steps that can stall; the remainder is for the process's own exit.
    #[must_use]
    pub fn for_requests(&self) -> Duration {
        self.shutdown_timeout.saturating_sub(self.rest())
    }

    /// Share of the shutdown timeout for exporting the last spans; the collector can stall.
    #[must_use]
    pub fn for_spans(&self) -> Duration {
        self.rest() * 6 / 10
    }

    /// Share of the shutdown timeout for tasks that cannot be cancelled, such as a DNS lookup.
    #[must_use]
    pub fn for_tasks(&self) -> Duration {
        self.rest() / 20
    }

    /// Share of the shutdown timeout for scrapers of `METRICS_ADDR`, whose listener closes last.
    #[must_use]
    pub fn for_scrapes(&self) -> Duration {
        self.rest() / 20
    }

    /// Share of the shutdown timeout for flushing the log; stdout's reader can stall.
    #[must_use]
    pub fn for_log(&self) -> Duration {
        self.rest() * 2 / 10
    }

    fn rest(&self) -> Duration {
        (self.shutdown_timeout / 5).min(Duration::from_secs(2))
    }
}

/// The URL that `visitas healthcheck` asks.
#[derive(Args, Clone, Debug)]
pub struct HealthcheckConfig {
    /// URL to ask; without it /health at BIND_ADDR, on this host
    #[arg(long, value_parser = accept("an http:// URL without user", health_url))]
    url: Option<Url>,
    #[command(flatten)]
    listen: ListenConfig,
}

impl HealthcheckConfig {
    /// Takes `PORT`, and refuses an address that has no port to ask.
    pub(super) fn finish(&mut self, sources: &mut Sources<'_>) -> Result<(), clap::Error> {
        self.listen.finish(sources);
        self.url().map(drop)
    }

    /// The URL to ask.
    ///
    /// # Errors
    ///
    /// If there is no URL, and `BIND_ADDR` has port 0.
    pub fn url(&self) -> Result<Url, clap::Error> {
        if let Some(url) = &self.url {
            return Ok(url.clone());
        }
        let mut address = self.listen.bind_addr;
        if address.ip().is_unspecified() {
            // [::] accepts IPv4 too, and the host can have no address of IPv6.
            address.set_ip(Ipv4Addr::LOCALHOST.into());
        }
        health_url(&format!("http://{address}/health"))
            .filter(|_| address.port() != 0)
            .ok_or_else(|| invalid("BIND_ADDR has no port to ask: expected --url"))
    }
}

fn health_url(text: &str) -> Option<Url> {
    let url = text.parse::<Url>().ok()?;
    let has_user = !url.username().is_empty() || url.password().is_some();
    (url.scheme() == "http" && !has_user).then_some(url)
}

fn address() -> Accept<SocketAddr> {
    accept(
        "an IP address and a port, such as 0.0.0.0:5000 or [::]:5000",
        parsed,
    )
}
