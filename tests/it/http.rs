//! Every row of the table of requests and responses.

use std::time::{Duration, Instant};

use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::support::{
    HeldCount, Response, SOON, Service, Wire, World, eventually, until_refused, without_stores,
};

pub(crate) const PATHS: [&str; 7] = [
    "/",
    "/visitas",
    "/health",
    "/health/ready",
    "/health/live",
    "/metrics",
    "/openapi.json",
];

#[tokio::test]
async fn second_visit_counts_two() {
    let world = World::new();
    let service = world.serve().await;
    assert_eq!(service.visit().await, (1, 1));
    assert_eq!(service.visit().await, (2, 2));
    assert_eq!(world.rows().await, 2);
    assert_eq!(world.redis_visits().await, 2);
}

#[tokio::test]
async fn visit_answers_the_four_fields_in_order() {
    let world = World::new();
    let response = world.serve().await.get("/").await;
    assert_eq!(response.status, StatusCode::OK);
    assert_eq!(response.header("content-type"), "application/json");
    assert_eq!(response.header("cache-control"), "no-store");
    assert_eq!(
        response.body,
        concat!(
            r#"{"db_status":"ok","redis_status":"ok","total_registros_db":1,"visitas_redis":1}"#,
            "\n"
        )
    );
}

#[tokio::test]
async fn head_has_no_body_and_records_no_visit() {
    let world = World::new();
    let service = world.serve().await;
    let response = ask(&service, Method::HEAD, "/").await;
    assert_eq!(response.status, StatusCode::OK);
    assert_eq!(response.header("content-type"), "application/json");
    assert_eq!(response.body, "");
    assert_eq!(service.visit().await, (1, 1));
}

/// Nothing knows the length of a visit's body beforehand. Read as raw bytes, since a client library
/// can hide a header.
#[tokio::test]
async fn head_has_no_content_length() {
    let world = World::new();
    let service = world.serve().await;
    let mut wire = Wire::open(&service).await;
    wire.send("HEAD / HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n")
        .await;
    let response = wire.rest().await.to_ascii_lowercase();
    assert!(response.starts_with("http/1.1 200 ok\r\n"), "{response}");
    assert!(response.ends_with("\r\n\r\n"), "{response}");
    for absent in ["content-length", "transfer-encoding"] {
        assert!(!response.contains(absent), "{response}");
    }
}

#[tokio::test]
async fn head_on_every_other_route_is_get_without_the_body() {
    let world = World::new();
    let service = world.serve().await;
    for path in PATHS.into_iter().skip(1).chain(["/nope"]) {
        let [get, head] = [Method::GET, Method::HEAD].map(|method| ask(&service, method, path));
        let (get, head) = (get.await, head.await);
        assert_eq!(head.status, get.status, "{path}");
        assert_eq!(head.body, "", "{path}");
        let named = |response: &Response| -> Vec<_> { response.headers.keys().cloned().collect() };
        assert_eq!(named(&head), named(&get), "{path}");
        for name in ["content-type", "cache-control", "vary", "allow"] {
            assert_eq!(head.header(name), get.header(name), "{path}");
        }
        // The other bodies contain durations, so their lengths differ.
        if ["/health/live", "/nope"].contains(&path) {
            let length = get.body.len().to_string();
            assert_eq!(head.header("content-length"), length, "{path}");
        }
        assert_ne!(head.header("content-length"), "0", "{path}");
    }
    assert_eq!(world.rows().await, 0);
}

#[tokio::test]
async fn no_response_but_the_description_may_be_stored() {
    let world = World::of_its_own();
    let service = world.serve().await;
    let assert_not_stored = async |service: &Service| {
        for path in PATHS.into_iter().chain(["/nope"]) {
            for method in [Method::GET, Method::HEAD, Method::POST] {
                let response = ask(service, method.clone(), path).await;
                let said = response.header("cache-control");
                if path == "/openapi.json" && method != Method::POST {
                    assert_eq!(said, "public, max-age=300", "{method}");
                    continue;
                }
                assert_eq!(said, "no-store", "{method} {path}");
            }
        }
    };
    assert_not_stored(&service).await;
    let apart = world.start(&[("METRICS_ADDR", "127.0.0.1:0")]).await;
    let address = apart.logged("listening")[0]["metrics.address"].clone();
    let address = address.as_str().expect("an address").to_owned();
    for path in ["metrics", "nope"] {
        let response = read(
            apart
                .client
                .get(format!("http://{address}/{path}"))
                .send()
                .await,
        )
        .await;
        assert_eq!(response.header("cache-control"), "no-store", "{path}");
    }
    world.postgres.kill().expect("Postgres ends");
    service.until_health("unavailable").await;
    assert_not_stored(&service).await;
    let large = service
        .client
        .get(service.url("/"))
        .body(vec![b'x'; 64 * 1024 + 1]);
    assert_eq!(
        read(large.send().await).await.header("cache-control"),
        "no-store"
    );
}

#[tokio::test]
async fn other_method_on_a_known_path_is_405_with_allow() {
    let world = World::new();
    let service = world.serve().await;
    for path in PATHS {
        for method in ["POST", "PUT", "DELETE", "OPTIONS", "BREW"] {
            let method = Method::from_bytes(method.as_bytes()).expect("a method");
            let response = ask(&service, method, path).await;
            assert_problem(&response, StatusCode::METHOD_NOT_ALLOWED);
            assert_eq!(response.header("allow"), "GET,HEAD", "{path}");
        }
    }
    assert_eq!(world.rows().await, 0);
}

#[tokio::test]
async fn unknown_path_is_404_whatever_the_method() {
    let world = World::new();
    let service = world.serve().await;
    for path in ["/nope", "/health/", "//", "/metrics/x", "/%00"] {
        for method in [Method::GET, Method::POST] {
            let response = ask(&service, method, path).await;
            assert_problem(&response, StatusCode::NOT_FOUND);
            assert_eq!(response.header("allow"), "", "{path}");
        }
    }
}

#[tokio::test]
async fn body_is_never_read_and_its_response_ends_the_connection() {
    let world = World::new();
    let service = world.serve().await;
    for (visits, bytes) in [(1, 1), (2, 64 * 1024 + 1), (3, 4 << 20)] {
        let request = service.client.get(service.url("/")).body(vec![b'x'; bytes]);
        let response = read(request.send().await).await;
        assert_eq!(response.status, StatusCode::OK);
        assert_eq!(response.header("connection"), "close");
        assert_eq!(world.rows().await, visits);
    }
    for path in PATHS {
        let request = service.client.post(service.url(path)).body("x");
        let refused = read(request.send().await).await;
        assert_problem(&refused, StatusCode::METHOD_NOT_ALLOWED);
        assert_eq!(refused.header("connection"), "close");
    }
    assert_eq!(service.get("/").await.header("connection"), "");
}

/// Like Python's `requests` and `httpx`: the body is sent after the headers, and the connection is
/// used again unless the response says close.
#[tokio::test]
async fn client_whose_request_had_a_body_gets_its_next_response() {
    let world = World::new();
    let service = world.serve().await;
    for _ in 0..50 {
        let mut wire = Wire::open(&service).await;
        wire.send("POST / HTTP/1.1\r\nhost: test\r\ncontent-length: 3\r\n\r\n")
            .await;
        wire.send("a=b").await;
        let response = wire.response_within(SOON).await.expect("a response");
        if response.contains("\r\nconnection: close\r\n") {
            wire = Wire::open(&service).await;
        }
        wire.get("/health/live").await;
    }
}

#[tokio::test]
async fn client_that_shuts_down_its_sending_side_gets_the_response_of_every_route() {
    let world = World::new();
    let service = world.serve().await;
    for path in PATHS.into_iter().chain(["/nope"]) {
        for _ in 0..10 {
            let mut wire = Wire::open(&service).await;
            wire.send(format!("GET {path} HTTP/1.1\r\nhost: test\r\n\r\n"))
                .await;
            wire.end_sending().await;
            let response = wire.rest().await;
            let status = if path == "/nope" { "404" } else { "200" };
            assert!(
                response.starts_with(&format!("HTTP/1.1 {status} ")),
                "{path}: {response:.200}"
            );
        }
    }
    assert_eq!(world.rows().await, 10);
    assert_eq!(service.counted("abandoned").await, 0);
}

#[tokio::test]
async fn http_1_1_without_exactly_one_valid_host_is_400() {
    let world = World::new();
    let service = world.serve().await;
    let refused = [
        "GET / HTTP/1.1\r\n",
        "GET http://a/ HTTP/1.1\r\n",
        "GET / HTTP/1.1\r\nhost: a\r\nhost: a\r\n",
        "GET / HTTP/1.1\r\nhost: a\r\nx: y\r\nHost: b\r\n",
        "GET / HTTP/1.1\r\nhost: a b\r\n",
        "GET / HTTP/1.1\r\nhost: a, b\r\n",
        "GET / HTTP/1.1\r\nhost: http://a\r\n",
        "GET / HTTP/1.1\r\nhost: ana@a\r\n",
        "GET / HTTP/1.1\r\nhost: a:b\r\n",
        "GET / HTTP/1.1\r\nhost: ::1\r\n",
        "GET / HTTP/1.1\r\nhost: [::1\r\n",
        "GET / HTTP/1.1\r\nhost: b\u{fc}cher\r\n",
        "GET http://a/ HTTP/1.1\r\nhost: a/b\r\n",
        "GET http://ana@a/ HTTP/1.1\r\nhost: a\r\n",
        "GET / HTTP/1.0\r\nhost: a\r\nhost: b\r\n",
        "GET / HTTP/1.0\r\nhost: a b\r\n",
        "BREW / HTTP/1.1\r\n",
        "OPTIONS * HTTP/1.1\r\n",
        "GET /nope HTTP/1.1\r\n",
        "POST / HTTP/1.1\r\ncontent-length: 100000\r\n",
    ];
    for request in refused {
        let mut wire = Wire::open(&service).await;
        wire.send(format!("{request}\r\n")).await;
        let response = wire.rest().await;
        let version = if request.contains("1.0") {
            "1.0"
        } else {
            "1.1"
        };
        assert!(
            response.starts_with(&format!("HTTP/{version} 400 ")),
            "{request}: {response}"
        );
        for part in [
            "\r\ncontent-type: application/problem+json\r\n",
            "\r\nconnection: close\r\n",
            "\r\n\r\n{\"type\":\"about:blank\",\"title\":\"Bad Request\",\"status\":400}",
        ] {
            assert!(response.contains(part), "{part} to {request}: {response}");
        }
    }
    assert_eq!(world.rows().await, 0);
    let metrics = service.get("/metrics").await.body;
    let rejected = format!("_rejected_total{{reason=\"host\"}} {}\n", refused.len());
    assert!(metrics.contains(&rejected), "{metrics}");
    for other in [
        "status_code=\"400\"",
        "\"BREW\"",
        "method=\"POST\"",
        "method=\"OPTIONS\"",
    ] {
        assert!(!metrics.contains(other), "{other} in {metrics}");
    }
}

#[tokio::test]
async fn every_valid_host_is_served_and_http_1_0_needs_none() {
    let world = World::new();
    let service = world.serve().await;
    for (visits, request) in (1..).zip([
        "GET / HTTP/1.1\r\nhost: a",
        "GET / HTTP/1.1\r\nHOST: a:5000",
        "GET / HTTP/1.1\r\nhost: [::1]:5000",
        "GET / HTTP/1.1\r\nhost: [2001:db8::1]",
        "GET / HTTP/1.1\r\nhost: 127.0.0.1:",
        "GET / HTTP/1.1\r\nhost:   a.example.  ",
        // A client whose target has no authority sends an empty `Host`.
        "GET / HTTP/1.1\r\nhost:",
        "GET http://a/ HTTP/1.1\r\nhost: a",
        // The authority of the target takes precedence over `Host`.
        "GET http://[::1]:80/?x HTTP/1.1\r\nhost: b",
        "GET / HTTP/1.0",
        "GET / HTTP/1.0\r\nhost: a",
        "GET http://a/ HTTP/1.0",
    ]) {
        let mut wire = Wire::open(&service).await;
        wire.send(format!("{request}\r\nconnection: close\r\n\r\n"))
            .await;
        let response = wire.rest().await;
        assert!(response[8..].starts_with(" 200 "), "{request}: {response}");
        assert_eq!(world.rows().await, visits);
    }
}

#[tokio::test]
async fn visit_without_redis_is_recorded_and_says_so() {
    let world = World::new();
    let service = world.serve().await;
    world.redis.kill().expect("Redis ends");
    let response = service.get("/").await;
    assert_eq!(response.status, StatusCode::OK);
    assert_eq!(
        response.body,
        concat!(
            r#"{"db_status":"ok","redis_status":"erro","total_registros_db":1,"visitas_redis":null}"#,
            "\n"
        )
    );
    assert_eq!(world.rows().await, 1);
}

#[tokio::test]
#[ignore = "reads a clock: make faults"]
async fn only_visits_that_find_redis_slow_wait_for_it_and_no_longer_than_its_timeout() {
    let world = World::new();
    let service = world.serve_with(&SLOW_REDIS).await;
    world.redis.pause().expect("Redis pauses");
    let first = elapsed(async || assert_degraded(&service.get("/").await)).await;
    assert!(first < REDIS_TIMEOUT + SLACK, "{first:?}");
    service.until_health("degraded").await;
    let next_twenty = elapsed(async || {
        for _ in 0..20 {
            assert_degraded(&service.get("/").await);
        }
    })
    .await;
    assert!(next_twenty < REDIS_TIMEOUT, "{next_twenty:?}");
    assert_eq!(world.rows().await, 21);
}

#[tokio::test]
async fn redis_that_can_be_read_and_not_written_is_skipped_until_it_can() {
    let world = World::new();
    let service = world.serve().await;
    assert_eq!(service.visit().await, (1, 1));
    let replicas = async |wanted| {
        let command = ["CONFIG", "SET", "min-replicas-to-write", wanted];
        world.redis_says::<()>(&command).await;
    };
    replicas("1").await;
    assert_degraded(&service.get("/").await);
    until_probes_fail(&service, 3.0).await;
    assert!(service.logged("store is up again").is_empty());
    assert_degraded(&service.get("/").await);
    assert_eq!(world.redis_visits().await, 1);
    replicas("0").await;
    service.until_ready().await;
    assert_eq!(service.visit().await, (4, 2));
}

#[tokio::test]
async fn visit_without_postgres_is_503_and_increments_nothing() {
    let world = World::of_its_own();
    let service = world.serve().await;
    service.visit().await;
    until_redis_is_read_as(&service, 1.0).await;
    world.postgres.kill().expect("Postgres ends");
    for visit in 0..3 {
        let response = service.get("/").await;
        assert_eq!(response.status, StatusCode::SERVICE_UNAVAILABLE);
        // The first visit is in doubt if it is sent right after a reading, on its connection.
        let is_certain = response.header("retry-after") == "1";
        assert!(is_certain || visit == 0, "{response:?}");
        assert_eq!(response.header("content-type"), "application/json");
        assert_eq!(response.header("cache-control"), "no-store");
        assert_eq!(
            response.body,
            concat!(
                r#"{"db_status":"erro","redis_status":"ok","total_registros_db":null,"visitas_redis":1}"#,
                "\n"
            )
        );
    }
    assert_eq!(world.redis_visits().await, 1);
}

#[tokio::test]
async fn visit_with_a_paused_postgres_is_503_at_its_timeout() {
    let world = World::of_its_own();
    let service = world
        .serve_with(&[("DB_TIMEOUT", "750ms"), ("VISIT_TIMEOUT", "1s")])
        .await;
    world.postgres.pause().expect("Postgres pauses");
    let took = elapsed(async || {
        let response = service.get("/").await;
        assert_eq!(response.status, StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(response.json()["db_status"], "erro");
        assert_eq!(response.json()["total_registros_db"], Value::Null);
    })
    .await;
    assert!(took < Duration::from_secs(1) + SLACK, "{took:?}");
    assert_eq!(world.redis_visits().await, 0);
}

#[tokio::test]
async fn visit_without_either_store_is_503_with_both_in_error() {
    let service = without_stores(&[]).await;
    let response = service.get("/").await;
    assert_eq!(response.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(
        response.body,
        concat!(
            r#"{"db_status":"erro","redis_status":"erro","total_registros_db":null,"visitas_redis":null}"#,
            "\n"
        )
    );
}

#[tokio::test]
async fn visit_that_finds_the_queue_full_is_503_with_the_state_of_postgres() {
    let world = World::new();
    let service = world.serve_with(&QUEUE_OF_ONE).await;
    until_redis_is_read_as(&service, 0.0).await;
    let mut count = HeldCount::of(&world).await;
    let (first, second) = two_visits_wait(&service, &mut count).await;
    for _ in 0..9 {
        let response = service.get("/").await;
        assert_eq!(response.status, StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(response.header("retry-after"), "1");
        assert_eq!(
            response.body,
            concat!(
                r#"{"db_status":"ok","redis_status":"ok","total_registros_db":null,"visitas_redis":0}"#,
                "\n"
            )
        );
    }
    count.release().await;
    assert_eq!(first.await.expect("a response"), StatusCode::OK);
    assert_eq!(second.await.expect("a response"), StatusCode::OK);
    assert_eq!(world.rows().await, 2);
    assert_eq!(world.redis_visits().await, 2);
}

#[tokio::test]
async fn visit_after_the_stop_delay_is_recorded_and_ends_its_connection() {
    let world = World::new();
    let service = world.serve().await;
    let mut wire = Wire::open(&service).await;
    wire.send("GET / HTTP/1.1\r\nhost: test\r\n").await;
    // The response on a later connection shows that the headers above are being read.
    service.visit().await;
    service.signal("TERM");
    until_refused(service.address).await;
    wire.send("\r\n").await;
    let response = wire.rest().await;
    assert!(response.starts_with("HTTP/1.1 200 "), "{response}");
    assert!(response.contains("\r\nconnection: close\r\n"), "{response}");
    assert!(
        response.contains(r#""total_registros_db":2,"#),
        "{response}"
    );
    assert_eq!(world.rows().await, 2);
}

#[tokio::test]
async fn request_id_of_1_to_128_visible_ascii_characters_is_kept() {
    let world = World::new();
    let service = world.serve().await;
    for id in ["a", "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~", &"x".repeat(128)] {
        let response = with_header(&service, "/", "x-request-id", id.as_bytes()).await;
        assert_eq!(response.header("x-request-id"), id);
    }
}

#[tokio::test]
async fn any_other_request_id_is_replaced() {
    let world = World::new();
    let service = world.serve().await;
    for id in [
        "",
        "two words",
        "a\tb",
        "\u{e9}",
        "ok\u{e9}",
        &"x".repeat(129),
    ] {
        let response = with_header(&service, "/", "x-request-id", id.as_bytes()).await;
        assert_hexadecimal(response.header("x-request-id"), 32);
    }
}

#[tokio::test]
async fn every_response_has_its_own_request_id() {
    let service = without_stores(&[]).await;
    let mut ids = std::collections::HashSet::new();
    for method in [Method::GET, Method::HEAD, Method::POST] {
        for path in PATHS.into_iter().chain(["/nope"]) {
            let response = ask(&service, method.clone(), path).await;
            let id = response.header("x-request-id").to_owned();
            assert_hexadecimal(&id, 32);
            assert!(ids.insert(id), "{method} {path} repeats one");
        }
    }
}

#[tokio::test]
async fn traceresponse_has_the_trace_of_the_caller_and_a_span_of_the_server() {
    let world = World::new();
    let service = world.serve_with(&TRACED).await;
    let response = with_header(&service, "/", "traceparent", SAMPLED.as_bytes()).await;
    let parts: Vec<&str> = response.header("traceresponse").split('-').collect();
    let [version, trace, span, flags] = parts[..] else {
        panic!("{parts:?}")
    };
    assert_eq!((version, trace, flags), ("00", TRACE, "01"));
    assert_hexadecimal(span, 16);
    assert_ne!(span, PARENT);
    let unsampled = with_header(&service, "/", "traceparent", UNSAMPLED.as_bytes()).await;
    assert_eq!(unsampled.header("traceresponse"), "");
}

#[tokio::test]
async fn probes_and_scrapes_have_no_traceresponse() {
    let world = World::new();
    let service = world.serve_with(&TRACED).await;
    let traced = ["/", "/visitas"];
    for path in PATHS.into_iter().filter(|path| !traced.contains(path)) {
        let response = with_header(&service, path, "traceparent", SAMPLED.as_bytes()).await;
        assert_eq!(response.header("traceresponse"), "", "{path}");
    }
}

#[tokio::test]
async fn without_an_exporter_nothing_is_sampled() {
    let world = World::new();
    let service = world.serve().await;
    let response = with_header(&service, "/", "traceparent", SAMPLED.as_bytes()).await;
    assert_eq!(response.header("traceresponse"), "");
}

#[tokio::test]
async fn no_response_repeats_an_error_or_an_address_of_a_store() {
    let world = World::new();
    for settings in [
        [
            ("DB_HOST", "postgres.invalid"),
            ("REDIS_HOST", "redis.invalid"),
            ("DB_PASSWORD", "c4nary"),
        ],
        [
            ("DB_PASSWORD", "c4nary"),
            ("REDIS_PASSWORD", "c4nary"),
            ("DB_USER", "n0body"),
        ],
    ] {
        let service = world.start(&settings).await;
        until_both_stores_have_failed(&service).await;
        let responses = every_response(&service).await;
        for text in [
            "invalid",
            "127.0.0.1",
            "c4nary",
            "senha",
            "n0body",
            "lookup",
            "WRONGPASS ",
            "NOAUTH",
            "28P01:",
            "os error",
            "authentication",
            "refused",
        ] {
            assert!(!responses.contains(text), "{text} in {responses}");
        }
    }
}

#[tokio::test]
async fn health_is_ok_when_both_stores_work() {
    let world = World::new();
    let service = world.serve().await;
    for path in ["/health", "/health/ready"] {
        let response = service.get(path).await;
        assert_eq!(response.status, StatusCode::OK);
        assert_eq!(response.header("content-type"), "application/json");
        assert_eq!(response.header("cache-control"), "no-store");
        let mut health = response.json();
        for store in ["postgres", "redis"] {
            let latency = health["checks"][store]["latency_ms"].take();
            assert!(latency.as_f64().is_some_and(|ms| ms > 0.0), "{latency}");
        }
        let store = json!({"status": "ok", "latency_ms": null});
        let fine = json!({"status": "ok"});
        let checks = json!({"postgres": store, "redis": store, "migrations": fine, "count": fine});
        let version = env!("CARGO_PKG_VERSION");
        assert_eq!(
            health,
            json!({"status": "ok", "checks": checks, "version": version})
        );
    }
}

#[tokio::test]
async fn health_is_degraded_and_200_without_redis() {
    let world = World::new();
    let service = world.serve().await;
    world.redis.kill().expect("Redis ends");
    service.until_health("degraded").await;
    for path in ["/health", "/health/ready"] {
        let response = service.get(path).await;
        assert_eq!(response.status, StatusCode::OK);
        assert_eq!(
            response.json()["checks"]["redis"],
            json!({"status": "unavailable"})
        );
        assert_eq!(response.json()["checks"]["postgres"]["status"], "ok");
    }
}

#[tokio::test]
async fn health_is_unavailable_and_503_without_postgres_and_the_process_is_live() {
    let world = World::of_its_own();
    let service = world.serve().await;
    world.postgres.kill().expect("Postgres ends");
    service.until_health("unavailable").await;
    for path in ["/health", "/health/ready"] {
        let response = service.get(path).await;
        assert_eq!(response.status, StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(
            response.json()["checks"]["postgres"],
            json!({"status": "unavailable"})
        );
        assert_eq!(response.json()["checks"]["redis"]["status"], "ok");
    }
    assert_alive(&service).await;
}

#[tokio::test]
async fn health_is_unavailable_until_the_database_is_migrated() {
    let world = World::new();
    let lock = "select pg_advisory_lock(8532478930943832832)";
    let mut session = world.session().await;
    sqlx::query(lock).execute(&mut session).await.expect(lock);
    let service = world.start(&[]).await;
    let response = service.get("/health").await;
    assert_eq!(response.status, StatusCode::SERVICE_UNAVAILABLE);
    let migrations = json!({"status": "pending"});
    assert_eq!(response.json()["checks"]["migrations"], migrations);
    drop(session);
    service.until_ready().await;
}

#[tokio::test]
async fn health_is_unavailable_while_stopping_and_visits_are_still_recorded() {
    let world = World::new();
    let service = world.serve_with(&[("SHUTDOWN_DELAY", "5m")]).await;
    service.signal("TERM");
    service.until_health("unavailable").await;
    let response = service.get("/health/ready").await;
    assert_eq!(response.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(response.json()["checks"]["postgres"]["status"], "ok");
    assert_alive(&service).await;
    assert_eq!(service.visit().await, (1, 1));
}

#[tokio::test]
#[ignore = "reads a clock: make faults"]
async fn health_answers_within_100_ms_while_neither_store_does() {
    let world = World::of_its_own();
    let service = world.serve().await;
    world.postgres.pause().expect("Postgres pauses");
    world.redis.pause().expect("Redis pauses");
    service.until_health("unavailable").await;
    assert_alive(&service).await;
    for route in ["/health", "/health/live"] {
        let answered = answered_within(&service, route, "+Inf").await;
        assert!(answered > 0, "{route} was not asked");
        assert_eq!(answered_within(&service, route, "0.1").await, answered);
    }
}

#[tokio::test]
async fn metrics_are_prometheus_text() {
    let world = World::new();
    let response = world.serve().await.get("/metrics").await;
    assert_eq!(response.status, StatusCode::OK);
    assert_eq!(
        response.header("content-type"),
        "text/plain; version=0.0.4; charset=utf-8"
    );
    assert!(response.body.starts_with("# "), "{}", response.body);
}

#[tokio::test]
async fn metrics_are_only_at_their_own_address_where_it_is_set() {
    let world = World::new();
    let service = world.serve_with(&[("METRICS_ADDR", "127.0.0.1:0")]).await;
    assert_problem(&service.get("/metrics").await, StatusCode::NOT_FOUND);
    let address = &service.logged("listening")[0]["metrics.address"];
    let address = address.as_str().expect("an address");
    let at = async |path| {
        let url = format!("http://{address}{path}");
        read(service.client.get(url).send().await).await
    };
    let metrics = at("/metrics").await;
    assert_eq!(metrics.status, StatusCode::OK);
    assert!(!metrics.header("x-request-id").is_empty());
    assert!(
        metrics.body.contains("\nvisitas_queue_depth "),
        "{metrics:?}"
    );
    for path in ["/", "/health"] {
        assert_problem(&at(path).await, StatusCode::NOT_FOUND);
    }
    assert_eq!(world.rows().await, 0);
}

/// More than a scheduler delays a test on a busy machine.
const SLACK: Duration = Duration::from_millis(900);
const REDIS_TIMEOUT: Duration = Duration::from_secs(1);
const SLOW_REDIS: [(&str, &str); 3] = [
    ("REDIS_TIMEOUT", "1s"),
    ("DB_TIMEOUT", "3s"),
    ("VISIT_TIMEOUT", "6s"),
];
const QUEUE_OF_ONE: [(&str, &str); 3] = [
    ("QUEUE_CAPACITY", "1"),
    ("DB_TIMEOUT", "20s"),
    ("VISIT_TIMEOUT", "40s"),
];

/// An exporter that sends nothing before the test ends.
const TRACED: [(&str, &str); 2] = [
    ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1"),
    ("OTEL_BSP_SCHEDULE_DELAY", "600000"),
];
const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const PARENT: &str = "b7ad6b7169203331";
const SAMPLED: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
const UNSAMPLED: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00";

fn assert_problem(response: &Response, status: StatusCode) {
    assert_eq!(response.status, status, "{response:?}");
    assert_eq!(response.header("content-type"), "application/problem+json");
    assert_eq!(
        response.json(),
        json!({
            "type": "about:blank",
            "title": status.canonical_reason(),
            "status": status.as_u16(),
        })
    );
}

fn assert_degraded(response: &Response) {
    assert_eq!(response.status, StatusCode::OK, "{response:?}");
    let json = response.json();
    assert_eq!(
        (&json["redis_status"], &json["visitas_redis"]),
        (&json!("erro"), &Value::Null)
    );
}

async fn assert_alive(service: &Service) {
    let response = service.get("/health/live").await;
    assert_eq!(response.status, StatusCode::OK);
    assert_eq!(response.json(), json!({"status": "ok"}));
}

fn assert_hexadecimal(text: &str, length: usize) {
    assert!(
        text.len() == length && text.bytes().all(|byte| byte.is_ascii_hexdigit()),
        "{text:?}"
    );
}

async fn ask(service: &Service, method: Method, path: &str) -> Response {
    service.ask(method, path, HeaderMap::new()).await
}

async fn with_header(service: &Service, path: &str, name: &'static str, value: &[u8]) -> Response {
    let value = HeaderValue::from_bytes(value).expect("a header's value");
    let headers = HeaderMap::from_iter([(HeaderName::from_static(name), value)]);
    service.ask(Method::GET, path, headers).await
}

async fn read(response: reqwest::Result<reqwest::Response>) -> Response {
    let response = response.expect("a response");
    Response::read(response).await.expect("a whole response")
}

async fn elapsed(work: impl AsyncFnOnce()) -> Duration {
    let started = Instant::now();
    work().await;
    started.elapsed()
}

type Asked = tokio::task::JoinHandle<StatusCode>;

/// One visit that the writer has taken, and one that waits in the queue.
async fn two_visits_wait(service: &Service, count: &mut HeldCount) -> (Asked, Asked) {
    let visit = || {
        let request = service.client.get(service.url("/"));
        tokio::spawn(async move { request.send().await.expect("a response").status() })
    };
    let first = visit();
    count.until_waited_for().await;
    let second = visit();
    service.until_queued(1).await;
    (first, second)
}

/// How many responses of a route took no longer than a bucket's bound, by the service's own metrics.
async fn answered_within(service: &Service, route: &str, bound: &str) -> u64 {
    let metrics = service.get("/metrics").await.body;
    let series = metrics.lines().filter_map(|line| line.rsplit_once(' '));
    series
        .filter(|(series, _)| {
            series.starts_with("http_server_request_duration_seconds_bucket{")
                && series.contains("http_request_method=\"GET\"")
                && series.contains(&format!("http_route=\"{route}\""))
                && series.contains(&format!("le=\"{bound}\""))
        })
        .map(|(_, value)| value.parse::<u64>().expect("a count"))
        .sum()
}

async fn until_redis_is_read_as(service: &Service, visits: f64) {
    eventually("Redis has been read", SOON, async || {
        service.metric("visitas_redis_visits").await == Some(visits)
    })
    .await;
}

/// Waits until Redis has refused this many more probes.
async fn until_probes_fail(service: &Service, times: f64) {
    let refused = async || {
        let series = "visitas_store_calls_total{db_system_name=\"redis\",\
                      db_operation_name=\"INCRBY\",outcome=\"error\"}";
        service.metric(series).await.unwrap_or(0.0)
    };
    let before = refused().await;
    eventually("probes fail", SOON, async || {
        refused().await >= before + times
    })
    .await;
}

async fn until_both_stores_have_failed(service: &Service) {
    eventually("both stores are down", SOON, async || {
        service.logged("store is down").len() == 2
    })
    .await;
}

/// Headers and bodies of all kinds of responses.
async fn every_response(service: &Service) -> String {
    let mut responses = String::new();
    for method in [Method::GET, Method::HEAD, Method::POST] {
        for path in PATHS.into_iter().chain(["/nope"]) {
            let response = ask(service, method.clone(), path).await;
            responses += &response.text();
        }
    }
    responses
}
