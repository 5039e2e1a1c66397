//! The page's settings.
//!
//! Must not know: what the page shows.

use clap::Args;
use url::{Host, Url};

use super::value::{Accept, accept, parsed, within};

/// The page: its streams, and where its links lead.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Page")]
pub struct PageConfig {
    /// Maximum number of open streams of /visitas/stream, each of which keeps a page up to date; at most half of HTTP_MAX_CONNECTIONS
    #[arg(long, env, default_value = "256", value_parser = within(parsed::<usize>, "0", "1000000"))]
    pub page_streams_max: usize,
    /// URL of Jaeger for a visitor's browser; without it the page has no link to a visit's trace
    #[arg(long, env, value_parser = public_url())]
    pub jaeger_public_url: Option<String>,
    /// URL of Grafana for a visitor's browser
    #[arg(long, env, value_parser = public_url())]
    pub grafana_public_url: Option<String>,
    /// URL of Prometheus for a visitor's browser
    #[arg(long, env, value_parser = public_url())]
    pub prometheus_public_url: Option<String>,
}

/// Accepts the URL of another service's page, and completes it. Compose makes these URLs from its
/// published ports, which can be a port alone (`http://16686`) or have the address that stands for
/// all addresses; a browser gets `localhost` in both cases.
fn public_url() -> Accept<String> {
    const ACCEPTED: &str = "an http:// or https:// URL without user, query and fragment";
    accept(ACCEPTED, |text| {
        let mut url = text.parse::<Url>().ok()?;
        let is_plain = url.username().is_empty()
            && url.password().is_none()
            && url.query().is_none()
            && url.fragment().is_none();
        if !matches!(url.scheme(), "http" | "https") || !is_plain {
            return None;
        }
        match url.host()? {
            // A number is an address to a URL's parser.
            Host::Ipv4(address) => {
                if let [0, 0, high, low] = address.octets() {
                    let port = u16::from_be_bytes([high, low]);
                    if port > 0 {
                        url.set_port(Some(port)).ok()?;
                    }
                    url.set_host(Some("localhost")).ok()?;
                }
            }
            Host::Ipv6(address) if address.is_unspecified() => {
                url.set_host(Some("localhost")).ok()?;
            }
            _ => {}
        }
        Some(url.as_str().trim_end_matches('/').to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn public_url_is_one_that_a_browser_can_open() {
        for (given, completed) in [
            ("http://localhost:16686", "http://localhost:16686"),
            ("https://jaeger.example/", "https://jaeger.example"),
            (
                "https://example/tools/jaeger/",
                "https://example/tools/jaeger",
            ),
            ("http://127.0.0.1:16686", "http://127.0.0.1:16686"),
            ("http://[::1]:16686", "http://[::1]:16686"),
            ("http://16686", "http://localhost:16686"),
            ("http://0.0.0.0:16686", "http://localhost:16686"),
            ("http://[::]:16686", "http://localhost:16686"),
        ] {
            let read = public_url().read(given);
            assert_eq!(read.as_deref(), Ok(completed), "{given}");
        }
        for refused in [
            "",
            "localhost:16686",
            "16686",
            "//localhost:16686",
            "ftp://localhost",
            "javascript:alert(1)",
            "http://",
            "http://ana@localhost",
            "http://:c4nary@localhost",
            "http://localhost/?a=b",
            "http://localhost/#a",
            "http://localhost:70000",
        ] {
            let error = public_url().read(refused).expect_err(refused);
            assert!(!error.contains("c4nary"), "{error}");
        }
    }
}
