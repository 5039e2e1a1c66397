//! `/openapi.json` describes every response of every route, and nothing that does not occur. What
//! JSON bodies contain is tested by Schemathesis: `make api`.

use std::collections::BTreeSet;
use std::path::Path;

use reqwest::header::HeaderName;
use reqwest::{Method, StatusCode};
use serde_json::Value;

use crate::compatibility::{entries, resolved};
use crate::http::PATHS;
use crate::support::collector::Collector;
use crate::support::traces::{PARENT, traced};
use crate::support::{Response, Service, World, without_stores};

/// Headers that describe the connection or the message, on every route.
const OF_HTTP: [&str; 5] = [
    "connection",
    "content-length",
    "content-type",
    "date",
    "transfer-encoding",
];

#[tokio::test]
async fn every_declared_route_is_served_and_every_served_route_is_declared() {
    let world = World::new();
    let service = world.serve().await;
    let api = service.get("/openapi.json").await.json();
    let files = files(&service).await;
    assert_eq!(api["openapi"], "3.1.0");
    let declared: BTreeSet<_> = entries(&api["paths"])
        .map(|(path, _)| path.as_str())
        .collect();
    let others = [
        "/visitas/stream",
        "/assets/{file}",
        "/favicon.ico",
        "/robots.txt",
    ];
    assert_eq!(declared, PATHS.into_iter().chain(others).collect());
    for (path, item) in entries(&api["paths"]) {
        for method in [
            "GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE",
        ] {
            let is_declared = item.get(method.to_ascii_lowercase()).is_some();
            let method = Method::from_bytes(method.as_bytes()).expect("a method");
            let got = ask(&service, &method, &real(path, &files), &[]).await;
            let is_served = got.status != StatusCode::METHOD_NOT_ALLOWED;
            assert_eq!(is_served, is_declared, "{method} {path}");
            assert_ne!(got.status, StatusCode::NOT_FOUND, "{method} {path}");
        }
    }
}

/// `Router::route` would serve a route that no description has.
#[test]
fn every_route_is_added_by_its_description() {
    let mut files = 0;
    for file in sources(Path::new("src/routes")) {
        files += 1;
        let text = std::fs::read_to_string(&file).expect("a source file");
        for undescribed in [
            ".route(",
            ".route_service(",
            ".nest(",
            ".nest_service(",
            ".fallback(",
        ] {
            assert!(
                !text.contains(undescribed),
                "{undescribed} in {}",
                file.display()
            );
        }
    }
    assert!(files > 10, "{files} files");
}

#[tokio::test]
async fn metrics_at_another_address_are_not_described() {
    let apart = without_stores(&[("METRICS_ADDR", "127.0.0.1:0")]).await;
    let api = apart.get("/openapi.json").await.json();
    assert!(api["paths"]["/metrics"].is_null() && api["paths"]["/"].is_object());
}

#[tokio::test]
async fn description_is_json_that_a_cache_keeps_for_minutes() {
    let got = without_stores(&[]).await.get("/openapi.json").await;
    assert_eq!(got.header("content-type"), "application/json");
    assert_eq!(got.header("cache-control"), "public, max-age=300");
    assert_eq!(got.json()["info"]["version"], env!("CARGO_PKG_VERSION"));
}

#[tokio::test]
async fn every_body_has_a_schema_and_an_example() {
    let got = without_stores(&[]).await.get("/openapi.json").await;
    let api = got.json();
    for reference in got.body.split("\"$ref\":\"#").skip(1) {
        let (pointer, _) = reference.split_once('"').expect("the end of a string");
        assert!(api.pointer(pointer).is_some(), "{pointer} is not there");
    }
    for (path, item) in entries(&api["paths"]) {
        for (method, operation) in entries(item) {
            for (status, response) in entries(&operation["responses"]) {
                for (media, content) in entries(&resolved(&api, response)["content"]) {
                    assert!(
                        content["schema"].is_object(),
                        "{method} {path} {status} {media}"
                    );
                    let has_example = content.get("example").or(content.get("examples")).is_some();
                    assert!(
                        has_example,
                        "{method} {path} {status} {media} has no example"
                    );
                }
            }
        }
    }
}

/// In both directions: what is answered is described, and what is described is answered.
#[tokio::test(flavor = "multi_thread")]
async fn every_status_media_type_and_header_is_described_and_occurs() {
    let (world, collector) = (World::of_its_own(), Collector::start().await);
    let service = traced(&world, &collector).await;
    let mut seen = Seen {
        api: service.get("/openapi.json").await.json(),
        files: files(&service).await,
        facts: BTreeSet::new(),
    };
    seen.everything(&service).await;
    seen.problem(&service, Method::GET, "/nope", "NotFound")
        .await;
    seen.problem(&service, Method::POST, "/", "MethodNotAllowed")
        .await;
    world.redis.kill().expect("Redis ends");
    service.until_health("degraded").await;
    seen.everything(&service).await;
    world.postgres.kill().expect("Postgres ends");
    service.until_health("unavailable").await;
    seen.everything(&service).await;
    let full = without_stores(&[("PAGE_STREAMS_MAX", "0")]).await;
    seen.everything(&full).await;
    // Only a bug makes this status.
    let described = described(&seen.api)
        .into_iter()
        .filter(|fact| !fact.contains(" 500 "));
    let never: Vec<_> = described
        .filter(|fact| !seen.facts.contains(fact))
        .collect();
    assert!(never.is_empty(), "described and never answered: {never:#?}");
}

/// What was answered, as lines like those of [`described`].
struct Seen {
    api: Value,
    /// Paths of the page's files.
    files: Vec<String>,
    facts: BTreeSet<String>,
}

impl Seen {
    async fn everything(&mut self, service: &Service) {
        let api = self.api.clone();
        let requests: [&[(&str, &str)]; 6] = [
            &[],
            &[("traceparent", PARENT)],
            &[("accept", "text/html")],
            &[("sec-purpose", "prefetch")],
            &[
                ("accept", "application/openmetrics-text"),
                ("accept-encoding", "gzip"),
            ],
            &[("host", "two words")],
        ];
        for (path, item) in entries(&api["paths"]) {
            for (method, operation) in entries(item) {
                let place = format!("{method} {path}");
                let method = method.to_ascii_uppercase();
                let method = method.parse::<Method>().expect("a method");
                let mut paths = vec![real(path, &self.files)];
                if path.contains('{') {
                    paths = [&self.files[..], &["/assets/none.css".to_owned()]].concat();
                }
                for (path, headers) in paths.iter().flat_map(|path| requests.map(|of| (path, of))) {
                    let got = ask(service, &method, path, headers).await;
                    let response = &operation["responses"][got.status.as_str()];
                    self.check(&place, response, &got, method == Method::HEAD);
                }
            }
        }
    }

    async fn problem(&mut self, service: &Service, method: Method, path: &str, name: &str) {
        let got = ask(service, &method, path, &[]).await;
        let response = self.api["components"]["responses"][name].clone();
        self.check(name, &response, &got, false);
        let media = &response["content"]["application/problem+json"];
        assert_eq!(got.json(), media["example"], "{name}");
    }

    fn check(&mut self, place: &str, response: &Value, got: &Response, is_head: bool) {
        let place = format!("{place} {}", got.status.as_u16());
        assert!(response.is_object(), "{place} is not described");
        let response = resolved(&self.api, response);
        let media = got
            .header("content-type")
            .split(';')
            .next()
            .unwrap_or_default();
        if media.is_empty() {
            assert!(response["content"].is_null(), "{place} has no body");
        } else if !is_head {
            assert!(
                response["content"][media].is_object(),
                "{place} {media:?} is not described"
            );
        }
        self.facts.insert(format!("{place} is {media}"));
        let names: BTreeSet<_> = got.headers.keys().map(HeaderName::as_str).collect();
        for name in names.iter().filter(|name| !OF_HTTP.contains(name)) {
            assert!(
                response["headers"][name].is_object(),
                "{place} {name} is not described"
            );
            self.facts.insert(format!("{place} has {name}"));
        }
        for (name, header) in entries(&response["headers"]) {
            let header = resolved(&self.api, header);
            let is_absent = header["required"] == true && !names.contains(name.as_str());
            assert!(!is_absent, "{place} lacks {name}");
        }
    }
}

/// Every media type and header of every status of every operation, one a line.
fn described(api: &Value) -> Vec<String> {
    let mut facts = Vec::new();
    for (path, item) in entries(&api["paths"]) {
        for (method, operation) in entries(item) {
            for (status, response) in entries(&operation["responses"]) {
                // What routes share has headers that only some of them send.
                let is_shared = response["$ref"].is_string();
                let response = resolved(api, response);
                let place = format!("{method} {path} {status}");
                let media = entries(&response["content"]);
                facts.extend(media.map(|(media, _)| format!("{place} is {media}")));
                let headers = entries(&response["headers"])
                    .filter(|(_, header)| !is_shared || resolved(api, header)["required"] == true);
                facts.extend(headers.map(|(name, _)| format!("{place} has {name}")));
            }
        }
    }
    facts
}

/// Asks, and reads the body unless it is a stream, which never ends.
async fn ask(service: &Service, method: &Method, path: &str, headers: &[(&str, &str)]) -> Response {
    let mut request = service.client.request(method.clone(), service.url(path));
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let response = request.send().await.expect("a response");
    let media = response.headers().get("content-type");
    if media.is_some_and(|media| media == "text/event-stream") {
        return Response {
            status: response.status(),
            headers: response.headers().clone(),
            body: String::new(),
        };
    }
    Response::read(response).await.expect("a body")
}

/// The paths of the page's files, one of each type.
async fn files(service: &Service) -> Vec<String> {
    let page = ask(
        service,
        &Method::GET,
        "/visitas",
        &[("accept", "text/html")],
    )
    .await;
    let names = page
        .body
        .split('"')
        .filter(|part| part.starts_with("/assets/"));
    let files: BTreeSet<_> = names.map(str::to_owned).collect();
    assert_eq!(files.len(), 3, "{files:?}");
    files.into_iter().collect()
}

/// A path that the route has.
fn real(route: &str, files: &[String]) -> String {
    if route.contains('{') {
        files[0].clone()
    } else {
        route.to_owned()
    }
}

fn sources(folder: &Path) -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    found
}
