//! What each scraper of `docs/connecting.md` asks `/metrics` for, and that it gets a response that
//! it can read.

use std::io::Read as _;

use flate2::read::GzDecoder;
use http::header::{ACCEPT, ACCEPT_ENCODING};
use http::{HeaderMap, Method};
use lab::proxy::{Protocol, Proxy};
use reqwest::Response;

use crate::support::exposition::PROMETHEUS_ACCEPTS;
use crate::support::prometheus::{Prometheus, installed};
use crate::support::{SOON, Service, eventually, without_stores};

const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
const PROTOBUF: &str = "application/vnd.google.protobuf;\
     proto=io.prometheus.client.MetricFamily;encoding=delimited";

/// A scraper, what it sends in `Accept` and `Accept-Encoding`, and what it gets.
type Scraper = (
    &'static str,
    Option<String>,
    Option<&'static str>,
    &'static str,
    bool,
);

fn scrapers() -> Vec<Scraper> {
    let gzip = Some("gzip");
    vec![
        (
            "Prometheus 2",
            Some(
                "application/openmetrics-text;version=1.0.0,\
                 application/openmetrics-text;version=0.0.1;q=0.75,\
                 text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
                    .to_owned(),
            ),
            gzip,
            OPENMETRICS,
            true,
        ),
        (
            "Prometheus 3, Alloy, the Collector",
            Some(PROMETHEUS_ACCEPTS.to_owned()),
            gzip,
            OPENMETRICS,
            true,
        ),
        (
            "Prometheus 3 with native histograms",
            Some(format!(
                "{PROTOBUF};escaping=allow-utf-8;q=0.6,{PROMETHEUS_ACCEPTS}"
            )),
            gzip,
            OPENMETRICS,
            true,
        ),
        (
            "VictoriaMetrics",
            Some("text/plain;version=0.0.4;q=1,*/*;q=0.1".to_owned()),
            gzip,
            TEXT,
            true,
        ),
        (
            "Telegraf",
            Some(format!("{PROTOBUF};q=0.7,text/plain;version=0.0.4;q=0.3")),
            gzip,
            TEXT,
            true,
        ),
        ("curl", Some("*/*".to_owned()), None, TEXT, false),
        (
            "curl --compressed",
            Some("*/*".to_owned()),
            Some("deflate, gzip, br, zstd"),
            TEXT,
            true,
        ),
        ("Python's urllib", None, Some("identity"), TEXT, false),
        ("a script", None, None, TEXT, false),
        (
            "a client that cannot",
            None,
            Some("gzip;q=0, *"),
            TEXT,
            false,
        ),
        ("a client that can do all", None, Some("*"), TEXT, true),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn each_scraper_gets_what_it_can_read() {
    for settings in [&[][..], &[("METRICS_ADDR", "127.0.0.1:0")]] {
        let service = without_stores(settings).await;
        let listening = &service.logged("listening")[0];
        let address = listening["metrics.address"].as_str().map(str::to_owned);
        let address = address.unwrap_or_else(|| service.address.to_string());
        for (scraper, accept, encoding, content_type, compressed) in scrapers() {
            let asked = (accept.as_deref(), encoding);
            let get = scrape(&service, &address, Method::GET, asked).await;
            let head = scrape(&service, &address, Method::HEAD, asked).await;
            let header = |response: &Response, name: &str| {
                let value = response.headers().get(name);
                value.map(|value| value.to_str().unwrap().to_owned())
            };
            for response in [&get, &head] {
                let encoding = header(response, "content-encoding");
                assert_eq!(
                    encoding.as_deref(),
                    compressed.then_some("gzip"),
                    "{scraper}"
                );
                for (name, value) in [
                    ("content-type", content_type),
                    ("vary", "Accept, Accept-Encoding"),
                    ("cache-control", "no-store"),
                ] {
                    assert_eq!(header(response, name).as_deref(), Some(value), "{scraper}");
                }
                assert!(header(response, "content-length").is_some(), "{scraper}");
                assert_eq!(header(response, "etag"), None, "{scraper}");
            }
            assert!(head.bytes().await.unwrap().is_empty(), "{scraper}");
            let body = get.bytes().await.unwrap();
            let text = if compressed {
                let mut text = String::new();
                GzDecoder::new(&*body).read_to_string(&mut text).unwrap();
                assert!(8 * body.len() < text.len(), "{scraper}: {}", body.len());
                text
            } else {
                String::from_utf8(body.into()).unwrap()
            };
            assert!(text.contains("\nvisitas_visits_total{outcome=\"ok\"} 0\n"));
            assert_eq!(
                text.ends_with("# EOF\n"),
                content_type == OPENMETRICS,
                "{scraper}"
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn prometheus_reads_the_compressed_response() {
    let service = without_stores(&[]).await;
    let way = Proxy::recording(service.address, Protocol::Other).await;
    let way = way.expect("a free port");
    let prometheus = Prometheus::start(&[([127, 0, 0, 1], way.port()).into()]).await;
    eventually("a series is there", SOON, async || {
        let values = prometheus
            .query("visitas_visits_total{outcome=\"ok\"}")
            .await;
        values.is_ok_and(|values| values == [0.0])
    })
    .await;
    let asked = String::from_utf8_lossy(&way.record().concat()).to_lowercase();
    assert!(asked.contains("\r\naccept-encoding: gzip\r\n"), "{asked}");
}

#[test]
fn prometheus_accepts_the_configuration_in_the_document() {
    let document = include_str!("../../docs/connecting.md");
    let (_, configuration) = document.split_once("```yaml\n# prometheus.yml\n").unwrap();
    let (configuration, _) = configuration.split_once("```").unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("prometheus.yml");
    std::fs::write(&file, configuration).unwrap();
    let checked = installed("promtool")
        .args(["check", "config"])
        .arg(file)
        .status();
    assert!(checked.unwrap().success());
}

async fn scrape(
    service: &Service,
    address: &str,
    method: Method,
    (accept, encoding): (Option<&str>, Option<&str>),
) -> Response {
    let mut headers = HeaderMap::new();
    for (name, value) in [(ACCEPT, accept), (ACCEPT_ENCODING, encoding)] {
        if let Some(value) = value {
            headers.insert(name, value.parse().unwrap());
        }
    }
    let request = service
        .client
        .request(method, format!("http://{address}/metrics"));
    request.headers(headers).send().await.unwrap()
}
