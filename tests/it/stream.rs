//! `GET /visitas/stream`: events for pages, as many as the limit allows, by one rendering.

use std::collections::BTreeSet;
use std::time::Duration;

use reqwest::header::HeaderMap;
use reqwest::{Method, StatusCode};
use serde_json::Value;
use tokio::time::timeout;

use crate::support::collector::Collector;
use crate::support::traces::{PARENT, traced};
use crate::support::{Response, SOON, Service, Wire, World, eventually, without_stores};

const PATH: &str = "/visitas/stream";

/// An open stream.
struct Events {
    response: reqwest::Response,
    text: String,
}

impl Events {
    async fn open(service: &Service) -> Self {
        let response = service.client.get(service.url(PATH)).send().await;
        let response = response.expect("a response");
        assert_eq!(response.status(), StatusCode::OK);
        Self {
            response,
            text: String::new(),
        }
    }

    /// The next block of lines: an event, a comment or the retry; `None` once the stream has ended.
    async fn block(&mut self) -> Option<String> {
        loop {
            if let Some((block, rest)) = self.text.split_once("\n\n") {
                let (block, rest) = (block.to_owned(), rest.to_owned());
                self.text = rest;
                return Some(block);
            }
            let chunk = timeout(SOON, self.response.chunk())
                .await
                .expect("an event or an end");
            let chunk = chunk.expect("a whole stream")?;
            self.text += std::str::from_utf8(&chunk).expect("UTF-8");
        }
    }

    /// The next event's JSON; `None` once the stream has ended.
    async fn next(&mut self) -> Option<Value> {
        loop {
            let block = self.block().await?;
            if let Some(data) = block.strip_prefix("data: ") {
                return Some(serde_json::from_str(data).expect("JSON in one line"));
            }
            assert!(block == "retry: 1000" || block == ":", "{block}");
        }
    }
}

/// The response to a request whose stream ends, or is refused.
async fn response(service: &Service) -> Response {
    let asked = timeout(SOON, service.get(PATH)).await;
    asked.expect("a response that ends")
}

async fn until_open(service: &Service, streams: f64) {
    eventually("so many streams are open", SOON, async || {
        service.metric("visitas_page_streams").await == Some(streams)
    })
    .await;
}

#[tokio::test]
async fn stream_has_the_json_of_visitas_each_second() {
    let world = World::new();
    let service = world.serve().await;
    service.visit().await;
    let mut events = Events::open(&service).await;
    for (name, value) in [
        ("content-type", "text/event-stream"),
        ("cache-control", "no-store"),
        ("x-accel-buffering", "no"),
    ] {
        assert_eq!(events.response.headers()[name], value, "{name}");
    }
    assert_eq!(events.block().await.as_deref(), Some("retry: 1000"));
    let read = service.get("/visitas").await.json();
    let fields = |json: &Value| -> Vec<String> {
        json.as_object()
            .expect("an object")
            .keys()
            .cloned()
            .collect()
    };
    let mut times = BTreeSet::new();
    for _ in 0..3 {
        let event = events.next().await.expect("an event");
        assert_eq!(fields(&event), fields(&read));
        assert_eq!(event["replica"]["id"], read["replica"]["id"]);
        times.insert(event["atualizado_em"].to_string());
    }
    assert_eq!(times.len(), 3, "{times:?}");
    eventually("an event has the visit", SOON, async || {
        events.next().await.expect("an event")["total_registros_db"] == 1
    })
    .await;
    assert_eq!(world.rows().await, 1);
}

#[tokio::test]
async fn outage_and_its_end_are_seen_on_an_open_stream() {
    let world = World::new();
    let service = world.serve().await;
    let mut events = Events::open(&service).await;
    assert_eq!(events.next().await.unwrap()["redis_status"], "ok");
    world.redis.pause().expect("Redis pauses");
    let until = async |events: &mut Events, status: &str| {
        let seen =
            async { while events.next().await.expect("an event")["redis_status"] != status {} };
        timeout(SOON, seen).await.expect("the state is seen");
    };
    until(&mut events, "erro").await;
    world.redis.resume().expect("Redis goes on");
    until(&mut events, "ok").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_viewers_get_the_same_renderings() {
    let world = World::new();
    let service = world.serve().await;
    let mut viewers = Vec::new();
    for _ in 0..40 {
        viewers.push(Events::open(&service).await);
    }
    let mut distinct = BTreeSet::new();
    for _ in 0..4 {
        for viewer in &mut viewers {
            let event = viewer.next().await.expect("an event");
            distinct.insert(event["atualizado_em"].to_string());
        }
    }
    // A rendering for each of 160 events would have as many times.
    assert!(distinct.len() <= 12, "{distinct:?}");
}

#[tokio::test]
async fn streams_beyond_the_limit_are_refused_until_one_ends() {
    let service = without_stores(&[("PAGE_STREAMS_MAX", "2")]).await;
    let (first, second) = (Events::open(&service).await, Events::open(&service).await);
    until_open(&service, 2.0).await;
    let refused = response(&service).await;
    assert_eq!(refused.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(refused.header("content-type"), "application/problem+json");
    assert_eq!(refused.json()["status"], 503);
    drop(first);
    until_open(&service, 1.0).await;
    let third = Events::open(&service).await;
    until_open(&service, 2.0).await;
    drop((second, third));
    until_open(&service, 0.0).await;
}

#[tokio::test]
async fn streams_take_at_most_half_of_the_connections() {
    let service = without_stores(&[("HTTP_MAX_CONNECTIONS", "5")]).await;
    let open = [Events::open(&service).await, Events::open(&service).await];
    let refused = response(&service).await;
    assert_eq!(refused.status, StatusCode::SERVICE_UNAVAILABLE);
    drop(open);
    let none = without_stores(&[("PAGE_STREAMS_MAX", "0")]).await;
    let refused = response(&none).await;
    assert_eq!(refused.status, StatusCode::SERVICE_UNAVAILABLE);
}

#[tokio::test]
async fn stream_is_not_traced_and_in_no_duration_series() {
    let world = World::new();
    let collector = Collector::start().await;
    let service = traced(&world, &collector).await;
    let request = service
        .client
        .get(service.url(PATH))
        .header("traceparent", PARENT);
    let response = request.send().await.expect("a response");
    assert!(!response.headers().contains_key("traceresponse"));
    let head = service.ask(Method::HEAD, PATH, HeaderMap::new()).await;
    assert_eq!((head.status, &*head.body), (StatusCode::OK, ""));
    assert_eq!(head.header("content-type"), "text/event-stream");
    until_open(&service, 1.0).await;
    let metrics = service.metrics().await.0;
    let route = format!("http_route=\"{PATH}\"");
    assert!(!metrics.contains(&route), "{metrics}");
    let active = r#"http_server_active_requests{http_request_method="GET",url_scheme="http"}"#;
    // The scrape itself.
    assert_eq!(service.metric(active).await, Some(1.0));
    let refused = service.ask(Method::POST, PATH, HeaderMap::new()).await;
    assert_eq!(refused.status, StatusCode::METHOD_NOT_ALLOWED);
    assert_eq!(refused.header("allow"), "GET,HEAD");
}

#[tokio::test]
async fn client_that_leaves_or_crashes_frees_its_stream() {
    let service = without_stores(&[]).await;
    let request = format!("GET {PATH} HTTP/1.1\r\nhost: test\r\n\r\n");
    for crashes in [false, true] {
        let mut wire = Wire::open(&service).await;
        wire.send(&request).await;
        wire.beginning().await.expect("a response");
        until_open(&service, 1.0).await;
        if crashes {
            wire.reset();
        } else {
            drop(wire);
        }
        until_open(&service, 0.0).await;
    }
}

#[tokio::test]
async fn client_that_ends_its_sending_still_gets_events() {
    let service = without_stores(&[]).await;
    for version in ["1.0", "1.1"] {
        let mut wire = Wire::open(&service).await;
        wire.send(format!("GET {PATH} HTTP/{version}\r\nhost: test\r\n\r\n"))
            .await;
        wire.end_sending().await;
        let mut read = String::new();
        while read.matches("data: ").count() < 3 {
            read += &wire.beginning().await.expect("events");
        }
        assert!(read.starts_with(&format!("HTTP/{version} 200")), "{read}");
    }
}

#[tokio::test]
async fn streams_end_when_the_service_begins_to_stop() {
    let service = without_stores(&[("SHUTDOWN_DELAY", "20s")]).await;
    let mut open = [Events::open(&service).await, Events::open(&service).await];
    for events in &mut open {
        events.next().await.expect("an event");
    }
    service.signal("TERM");
    let ended = async {
        for events in &mut open {
            while events.next().await.is_some() {}
        }
    };
    timeout(SOON, ended).await.expect("the streams end");
    until_open(&service, 0.0).await;
    // A page that connects again meanwhile gets one event, and is sent away.
    let again = response(&service).await;
    assert_eq!(again.status, StatusCode::OK);
    assert_eq!(again.header("connection"), "close");
    assert_eq!(again.body.matches("data: ").count(), 1, "{}", again.body);
}

#[tokio::test]
async fn open_streams_do_not_hold_a_stop() {
    let world = World::new();
    let service = world.serve_with(&[("SHUTDOWN_TIMEOUT", "60s")]).await;
    let mut wires = Vec::new();
    for _ in 0..3 {
        let mut wire = Wire::open(&service).await;
        wire.send(format!("GET {PATH} HTTP/1.1\r\nhost: test\r\n\r\n"))
            .await;
        wire.beginning().await.expect("a response");
        wires.push(wire);
    }
    service.signal("TERM");
    let ended = service.ended(Duration::from_secs(20)).await;
    assert_eq!(ended.code(), Some(0));
}
