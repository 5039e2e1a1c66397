//! The page: who gets it, in which language and with which headers, and what counts as a visit.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use reqwest::header::HeaderMap;
use reqwest::{Method, StatusCode};

use crate::promise::{let_flushes_go_on, stall_flushes};
use crate::support::collector::{Behaviour, Collector};
use crate::support::traces::{PARENT, UNSAMPLED, ask, traced, traced_with, with_headers};
use crate::support::{HeldCount, Response, SOON, Service, Wire, World, eventually, without_stores};

/// What Chromium sends when somebody opens a page.
const BROWSER: &str = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,\
     image/apng,*/*;q=0.8,application/signed-exchange;v=b3;q=0.7";

const JAEGER: (&str, &str) = ("JAEGER_PUBLIC_URL", "http://jaeger.example:16686");

async fn open(service: &Service, path: &str) -> Response {
    ask(service, path, &[("accept", BROWSER)]).await
}

fn assert_is_page(response: &Response) {
    for (name, value) in [
        ("content-type", "text/html; charset=utf-8"),
        ("cache-control", "no-store"),
        ("vary", "Accept, Accept-Language"),
        ("x-content-type-options", "nosniff"),
        ("x-robots-tag", "noindex"),
    ] {
        assert_eq!(response.header(name), value, "{name}");
    }
    let policy = response.header("content-security-policy");
    assert!(policy.contains("default-src 'none'"), "{policy}");
    assert!(policy.contains("frame-ancestors 'none'"), "{policy}");
    assert!(!policy.contains("unsafe"), "{policy}");
    assert!(
        response.body.starts_with("<!doctype html>"),
        "{}",
        response.body
    );
}

/// The values of an attribute in the page.
fn values(page: &str, attribute: &str) -> Vec<String> {
    let start = format!(" {attribute}=\"");
    page.split(&start)
        .skip(1)
        .filter_map(|rest| Some(rest.split_once('"')?.0.to_owned()))
        .collect()
}

#[tokio::test]
async fn browser_gets_its_visit_as_a_page() {
    let world = World::new();
    let service = world.serve().await;
    let page = open(&service, "/").await;
    assert_eq!(page.status, StatusCode::OK);
    assert_is_page(&page);
    assert_eq!(values(&page.body, "data-visit"), ["recorded"]);
    assert_eq!(world.rows().await, 1);
    assert_eq!(world.redis_visits().await, 1);
    assert_eq!(service.visit().await, (2, 2));
}

#[tokio::test]
async fn client_that_does_not_prefer_html_gets_json() {
    let world = World::new();
    let service = world.serve().await;
    let (mut visits, none) = (0, HeaderMap::new());
    let mut responses = vec![service.ask(Method::GET, "/", none).await];
    for accept in [
        "*/*",
        "application/json",
        "application/json, text/html",
        "text/html;q=0",
    ] {
        responses.push(ask(&service, "/", &[("accept", accept)]).await);
    }
    for response in &responses {
        visits += 1;
        assert_eq!(response.header("content-type"), "application/json");
        assert_eq!(response.header("vary"), "Accept, Accept-Language");
        assert_eq!(response.header("server-timing"), "");
        assert_eq!(response.json()["total_registros_db"], visits);
    }
    for accept in ["*/*", "application/json"] {
        let response = ask(&service, "/visitas", &[("accept", accept)]).await;
        assert_eq!(response.header("content-type"), "application/json");
    }
    assert_eq!(world.rows().await, visits);
}

/// Python's urllib and a raw client send no `Accept` at all.
#[tokio::test]
async fn client_without_accept_gets_json() {
    let world = World::new();
    let service = world.serve().await;
    let response = Wire::open(&service).await.get("/").await;
    assert!(
        response.contains("content-type: application/json"),
        "{response}"
    );
}

#[tokio::test]
async fn head_has_the_headers_of_the_page_and_records_no_visit() {
    let world = World::new();
    let service = world.serve().await;
    for path in ["/", "/visitas"] {
        let accept = HeaderMap::from_iter([(http::header::ACCEPT, BROWSER.parse().unwrap())]);
        let head = service.ask(Method::HEAD, path, accept.clone()).await;
        let get = service.ask(Method::GET, path, accept).await;
        assert_eq!(head.body, "");
        for name in [
            "content-type",
            "content-language",
            "content-security-policy",
            "vary",
            "cache-control",
            "x-robots-tag",
        ] {
            assert_eq!(head.header(name), get.header(name), "{path} {name}");
        }
    }
    assert_eq!(world.rows().await, 1);
}

#[tokio::test]
async fn language_is_the_one_that_the_browser_prefers() {
    let world = World::new();
    let service = world.serve().await;
    for (accepted, tag) in [
        ("pt-BR,pt;q=0.9,en-US;q=0.8,en;q=0.7", "pt-BR"),
        ("pt", "pt-BR"),
        ("en-US,en;q=0.9,pt;q=0.8", "en"),
        ("fr", "en"),
        ("*", "en"),
    ] {
        for path in ["/", "/visitas", "/visitas?lang=fr", "/visitas?other=pt"] {
            let headers = [("accept", BROWSER), ("accept-language", accepted)];
            let page = ask(&service, path, &headers).await;
            assert_eq!(page.header("content-language"), tag, "{accepted} {path}");
            assert_eq!(values(&page.body, "lang")[0], tag, "{accepted} {path}");
        }
    }
    let page = open(&service, "/visitas").await;
    assert_eq!(page.header("content-language"), "en");
}

#[tokio::test]
async fn page_without_a_visit_is_in_the_language_that_its_address_names() {
    let world = World::new();
    let service = world.serve().await;
    for (lang, tag, other) in [
        ("pt", "pt-BR", "/visitas?lang=en"),
        ("en", "en", "/visitas?lang=pt"),
    ] {
        for accepted in ["pt", "en", ""] {
            let headers = [("accept", BROWSER), ("accept-language", accepted)];
            let page = ask(&service, &format!("/visitas?lang={lang}"), &headers).await;
            assert_eq!(page.status, StatusCode::OK);
            assert_is_page(&page);
            assert_eq!(page.header("content-language"), tag);
            assert_eq!(page.header("server-timing"), "");
            assert_eq!(values(&page.body, "data-visit"), ["none"]);
            assert!(
                values(&page.body, "href").contains(&other.to_owned()),
                "{}",
                page.body
            );
        }
    }
    assert_eq!(world.rows().await, 0);
    assert_eq!(world.redis_visits().await, 0);
}

#[tokio::test]
async fn prefetch_and_prerender_record_nothing() {
    let world = World::new();
    let service = world.serve().await;
    for purpose in [
        ("sec-purpose", "prefetch"),
        ("sec-purpose", "prefetch;prerender"),
        ("sec-purpose", "prerender"),
        ("purpose", "prefetch"),
        ("x-moz", "prefetch"),
    ] {
        for accept in [BROWSER, "*/*"] {
            for method in [Method::GET, Method::HEAD] {
                let headers = with_headers(&[purpose, ("accept", accept)]);
                let response = service.ask(method.clone(), "/", headers).await;
                let status = response.status;
                assert_eq!(status, StatusCode::NO_CONTENT, "{method} {purpose:?}");
                assert_eq!(response.header("cache-control"), "no-store");
                assert_eq!(response.header("content-type"), "");
                assert_eq!(response.body, "");
            }
        }
        let page = ask(&service, "/visitas", &[purpose, ("accept", BROWSER)]).await;
        assert_is_page(&page);
    }
    assert_eq!(world.rows().await, 0);
    assert_eq!(world.redis_visits().await, 0);
    assert_eq!(service.counted("ok").await, 0);
    assert_eq!(service.visit().await, (1, 1));
}

#[tokio::test]
async fn byte_beyond_ascii_in_a_header_costs_only_the_element_that_has_it() {
    let service = without_stores(&[]).await;
    let mut wire = Wire::open(&service).await;
    wire.send(
        b"GET /visitas HTTP/1.1\r\nhost: test\r\naccept: caf\xe9/*, text/html\r\n\
          accept-language: fran\xe7ais, pt;q=0.5, en;q=0.4\r\n\r\n",
    )
    .await;
    let page = wire.response_within(SOON).await.expect("a response");
    assert!(page.contains("content-language: pt-BR"), "{page}");
    wire.send(
        b"GET /metrics HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\
          accept: caf\xe9/*, application/openmetrics-text\r\naccept-encoding: br\xe9, gzip\r\n\r\n",
    )
    .await;
    let metrics = wire.rest().await;
    assert!(metrics.contains("content-encoding: gzip"), "{metrics}");
    assert!(metrics.contains("content-type: application/openmetrics-text"));
}

/// A sentence of the page in English and in Portuguese.
type Sentence = (&'static str, &'static str);

const POSTGRES_DOWN: Sentence = ("PostgreSQL takes no visits", "não está aceitando visitas");
const NEW_VISITS: Sentence = ("New visits get status 503", "visitas recebem o status 503");
const KEEPS_TRYING: Sentence = ("The service keeps trying", "O serviço continua tentando");
const REDIS_WORKS: Sentence = ("Redis works, but counts", "O Redis funciona, mas");
const BOTH_DOWN: Sentence = ("Redis does not work either", "também não funciona");
const REDIS_DOWN: Sentence = ("Redis counts no visits", "não está contando visitas");
const ALL_THE_SAME: Sentence = ("recorded all the same", "registradas mesmo assim");
const SINCE: Sentence = ("down since", "fora do ar desde");
const WORKS: Sentence = (" works ", " funciona ");
const NUMBER: Sentence = ("is the number of your visit", "é o número da sua visita");
const SO_FAR: Sentence = ("number of visits so far", "total de visitas até agora");
const AT: Sentence = ("was the number of visits at", " era o ");
const NO_NUMBER: Sentence = ("Yours has no number", "A sua ficou sem número");
const NOT_RECORDED: Sentence = ("was not recorded", "não foi registrada");
const IN_DOUBT: Sentence = ("not known whether your visit", "sabe se a sua visita");
const SAME: Sentence = ("the same as PostgreSQL", "o mesmo que no PostgreSQL");
const BEHIND: Sentence = ("behind PostgreSQL", "a menos do que no PostgreSQL");
const AS_OF: Sentence = ("See it as it is now", "Ver como está agora");

const SENTENCES: [Sentence; 28] = [
    POSTGRES_DOWN,
    NEW_VISITS,
    KEEPS_TRYING,
    REDIS_WORKS,
    BOTH_DOWN,
    REDIS_DOWN,
    ALL_THE_SAME,
    SINCE,
    WORKS,
    NUMBER,
    SO_FAR,
    AT,
    NO_NUMBER,
    NOT_RECORDED,
    IN_DOUBT,
    SAME,
    BEHIND,
    AS_OF,
    ("PostgreSQL is back", "PostgreSQL voltou"),
    ("Redis is back", "Redis voltou"),
    ("was away for", "ficou fora do ar por"),
    ("Your own visit is safe", "A sua visita está a salvo"),
    ("This page will show", "Esta página vai mostrar"),
    ("Visit again", "Visitar de novo"),
    ("ahead of PostgreSQL", "a mais do que no PostgreSQL"),
    ("Live", "Ao vivo"),
    ("No news since", "Sem notícias desde"),
    ("Moment", "Momento"),
];

/// The text of a page for a reader that knows neither CSS nor `hidden`, such as a text browser.
fn text(page: &str) -> String {
    let (_, body) = page.split_once("<body>").expect("a body");
    let texts = body.split('<').skip(1);
    let texts = texts.map(|text| text.split_once('>').expect("a tag's end").1);
    let words: Vec<_> = texts.flat_map(str::split_whitespace).collect();
    words.join(" ")
}

/// Asserts that the page has these of the sentences in its text, and no other.
async fn assert_says(service: &Service, path: &str, lang: &str, said: &[Sentence]) {
    let headers = [("accept", BROWSER), ("accept-language", lang)];
    let page = ask(service, path, &headers).await.body;
    let text = text(&page);
    for sentence in SENTENCES {
        let (english, portuguese) = sentence;
        let (own, other) = match lang {
            "en" => (english, portuguese),
            _ => (portuguese, english),
        };
        assert_eq!(
            text.contains(own),
            said.contains(&sentence),
            "{own}: {text}"
        );
        assert!(!text.contains(other), "{other}: {text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn page_without_css_says_what_is_true_and_nothing_else() {
    let world = World::of_its_own();
    let service = world.serve().await;
    for lang in ["en", "pt"] {
        assert_says(&service, "/", lang, &[NUMBER, WORKS, SAME, AS_OF]).await;
    }
    eventually("both are in the totals", SOON, async || {
        let read = service.get("/visitas").await.json();
        read["total_registros_db"] == 2 && read["visitas_redis"] == 2
    })
    .await;
    for lang in ["en", "pt"] {
        assert_says(&service, "/visitas", lang, &[SO_FAR, WORKS, SAME, AS_OF]).await;
    }
    for lang in ["en", "pt"] {
        stall_flushes(&world).await;
        let said = [
            &[POSTGRES_DOWN, NEW_VISITS, KEEPS_TRYING, REDIS_WORKS, SINCE][..],
            &[WORKS, IN_DOUBT, AT, AS_OF],
        ];
        assert_says(&service, "/", lang, &said.concat()).await;
        let_flushes_go_on(&world);
        world.sql("drop table public.espera").await;
        service.until_ready().await;
    }
    world.postgres.kill().expect("Postgres ends");
    service.until_health("unavailable").await;
    let down = [POSTGRES_DOWN, NEW_VISITS, KEEPS_TRYING, SINCE, AT, AS_OF];
    for lang in ["en", "pt"] {
        let said = [&down[..], &[REDIS_WORKS, WORKS, NOT_RECORDED, NO_NUMBER]].concat();
        assert_says(&service, "/", lang, &said).await;
        let said = [&down[..], &[REDIS_WORKS, WORKS]].concat();
        assert_says(&service, "/visitas", lang, &said).await;
    }
    world.redis.kill().expect("Redis ends");
    eventually("Redis is down too", SOON, async || {
        service.get("/visitas").await.json()["redis_status"] == "erro"
    })
    .await;
    for lang in ["en", "pt"] {
        let said = [&down[..], &[BOTH_DOWN]].concat();
        assert_says(&service, "/visitas", lang, &said).await;
    }
}

#[tokio::test]
async fn page_without_css_of_a_visit_that_redis_did_not_count_says_so() {
    let world = World::new();
    let service = world.serve().await;
    world.redis.kill().expect("Redis ends");
    service.until_health("degraded").await;
    for lang in ["en", "pt"] {
        let said = [REDIS_DOWN, ALL_THE_SAME, NUMBER, WORKS, SINCE, AS_OF];
        assert_says(&service, "/", lang, &said).await;
    }
}

#[tokio::test]
async fn server_timing_is_where_the_visits_time_went() {
    let world = World::new();
    let service = world.serve().await;
    let mut count = HeldCount::of(&world).await;
    let began = Instant::now();
    let (page, held) = tokio::join!(open(&service, "/"), async {
        count.until_waited_for().await;
        let waited_for = Instant::now();
        service.get("/health").await;
        let held = waited_for.elapsed();
        count.release().await;
        held
    });
    let milliseconds = |duration: Duration| duration.as_secs_f64() * 1e3;
    let (took, held) = (milliseconds(began.elapsed()), milliseconds(held));
    let header = page.header("server-timing");
    let parts: Vec<_> = header
        .split(", ")
        .map(|part| part.split_once(";dur="))
        .collect();
    let parts: Vec<(&str, f64)> = parts
        .into_iter()
        .map(|part| part.expect("a duration"))
        .map(|(name, dur)| (name, dur.parse().expect("a number")))
        .collect();
    let [("queue", queue), ("postgres", postgres), ("redis", redis)] = parts[..] else {
        panic!("{header}")
    };
    assert!(queue >= 0.0 && postgres > 0.0 && redis > 0.0, "{header}");
    assert!(queue + postgres + redis <= took, "{header} in {took}");
    // It waited for the count's lock.
    assert!(postgres >= held, "{header} with {held} held");
}

#[tokio::test]
async fn page_says_how_many_visits_its_commit_recorded() {
    let world = World::new();
    let service = world.serve().await;
    let mut count = HeldCount::of(&world).await;
    let first = service.begin_visit();
    count.until_waited_for().await;
    let others = [service.begin_visit(), service.begin_visit()];
    let (page, ()) = tokio::join!(open(&service, "/"), async {
        service.until_queued(3).await;
        count.release().await;
    });
    assert!(
        page.body
            .contains("Recorded with 2 other visits by one commit"),
        "{}",
        page.body
    );
    first.await.expect("a response");
    for other in others {
        other.await.expect("a response");
    }
}

#[tokio::test]
async fn outage_is_the_same_page_with_status_503() {
    let world = World::of_its_own();
    let service = world.serve().await;
    service.visit().await;
    world.postgres.kill().expect("Postgres ends");
    service.until_health("unavailable").await;
    let page = open(&service, "/").await;
    assert_eq!(page.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_is_page(&page);
    assert_eq!(page.header("retry-after"), "1");
    assert_eq!(page.header("server-timing"), "");
    assert_eq!(values(&page.body, "data-visit"), ["failed"]);
    assert_eq!(values(&page.body, "data-postgres"), ["erro"]);
    let page = open(&service, "/visitas").await;
    assert_eq!(page.status, StatusCode::OK);
    assert_eq!(values(&page.body, "data-postgres"), ["erro"]);
}

#[tokio::test]
async fn visit_that_redis_did_not_count_is_a_page_that_says_so() {
    let world = World::new();
    let service = world.serve().await;
    world.redis.kill().expect("Redis ends");
    service.until_health("degraded").await;
    let page = open(&service, "/").await;
    assert_eq!(page.status, StatusCode::OK);
    assert_eq!(values(&page.body, "data-visit"), ["recorded"]);
    assert_eq!(values(&page.body, "data-redis"), ["erro"]);
}

#[tokio::test]
async fn page_has_the_trace_of_a_sampled_visit_only() {
    let world = World::new();
    let collector = Collector::start().await;
    let service = traced_with(&world, &collector, &[JAEGER]).await;
    let page = ask(
        &service,
        "/",
        &[("accept", BROWSER), ("traceparent", PARENT)],
    )
    .await;
    let trace = PARENT.split('-').nth(1).unwrap();
    assert!(page.header("traceresponse").contains(trace));
    assert!(page.body.contains(trace), "{}", page.body);
    let page = ask(
        &service,
        "/",
        &[("accept", BROWSER), ("traceparent", UNSAMPLED)],
    )
    .await;
    let unsampled = UNSAMPLED.split('-').nth(1).unwrap();
    assert!(!page.body.contains(unsampled), "{}", page.body);
    assert!(page.body.contains("not sampled"), "{}", page.body);
}

#[tokio::test]
async fn link_to_jaeger_is_there_while_spans_are_exported() {
    let world = World::new();
    let collector = Collector::start().await;
    let service = traced_with(&world, &collector, &[JAEGER]).await;
    let linked = async || {
        let page = ask(
            &service,
            "/",
            &[("accept", BROWSER), ("traceparent", PARENT)],
        )
        .await;
        let link = format!("{}/trace/{}", JAEGER.1, PARENT.split('-').nth(1).unwrap());
        values(&page.body, "href").contains(&link)
    };
    eventually("an export has succeeded", SOON, linked).await;
    collector
        .change_to(Behaviour::Refuses(StatusCode::SERVICE_UNAVAILABLE))
        .await;
    eventually("exports fail", SOON, async || !linked().await).await;
    collector.change_to(Behaviour::Takes).await;
    eventually("exports succeed", SOON, linked).await;
}

#[tokio::test]
async fn page_links_to_jaeger_only_where_its_address_is_known() {
    let world = World::new();
    let collector = Collector::start().await;
    let service = traced(&world, &collector).await;
    let first = open(&service, "/").await;
    let trace = first
        .header("traceresponse")
        .split('-')
        .nth(1)
        .unwrap()
        .to_owned();
    collector.trace(&trace, 3).await;
    let page = open(&service, "/").await;
    assert!(!page.body.contains("Jaeger</a>"), "{}", page.body);
    // Without a collector the address alone is not enough.
    let alone = world.serve_with(&[JAEGER]).await;
    let page = open(&alone, "/").await;
    assert!(!page.body.contains(JAEGER.1), "{}", page.body);
}

#[tokio::test]
async fn addresses_from_settings_are_escaped() {
    let service = without_stores(&[
        ("GRAFANA_PUBLIC_URL", "https://grafana.example/a&b'c\"<d>"),
        ("PROMETHEUS_PUBLIC_URL", "http://19090"),
    ])
    .await;
    let page = open(&service, "/visitas").await;
    assert!(!page.body.contains("a&b"), "{}", page.body);
    assert!(!page.body.contains("b'c"), "{}", page.body);
    assert!(!page.body.contains("<d>"), "{}", page.body);
    assert!(
        page.body
            .contains("https://grafana.example/a&#38;b&#39;c%22%3Cd%3E"),
        "{}",
        page.body
    );
    let prometheus = "http://localhost:19090".to_owned();
    assert!(
        values(&page.body, "href").contains(&prometheus),
        "{}",
        page.body
    );
}

#[tokio::test]
async fn metrics_on_a_listener_of_their_own_have_no_link() {
    for (settings, linked) in [
        (&[][..], true),
        (&[("METRICS_ADDR", "127.0.0.1:0")][..], false),
    ] {
        let page = open(&without_stores(settings).await, "/visitas").await;
        let links = values(&page.body, "href");
        assert_eq!(links.contains(&"/metrics".to_owned()), linked, "{links:?}");
    }
}

#[tokio::test]
async fn every_file_of_the_page_is_served_for_ever_and_records_nothing() {
    let world = World::new();
    let collector = Collector::start().await;
    let service = traced(&world, &collector).await;
    let page = open(&service, "/visitas").await;
    let mut files: BTreeSet<_> = values(&page.body, "href").into_iter().collect();
    files.extend(values(&page.body, "src"));
    files.retain(|path| path.starts_with("/assets/"));
    assert!(files.len() >= 3, "{files:?}");
    for path in &files {
        let file = ask(&service, path, &[("traceparent", PARENT)]).await;
        assert_eq!(file.status, StatusCode::OK, "{path}");
        assert_eq!(
            file.header("cache-control"),
            "public, max-age=31536000, immutable"
        );
        assert_eq!(file.header("x-content-type-options"), "nosniff");
        assert_eq!(file.header("traceresponse"), "", "{path}");
        assert!(!file.body.is_empty(), "{path}");
        let content_type = match path.rsplit_once('.').unwrap().1 {
            "css" => "text/css; charset=utf-8",
            "js" => "text/javascript; charset=utf-8",
            "svg" => "image/svg+xml",
            other => panic!("{other}"),
        };
        assert_eq!(file.header("content-type"), content_type, "{path}");
    }
    for (path, content_type) in [
        ("/favicon.ico", "image/svg+xml"),
        ("/robots.txt", "text/plain; charset=utf-8"),
    ] {
        let file = ask(&service, path, &[("traceparent", PARENT)]).await;
        assert_eq!(file.status, StatusCode::OK, "{path}");
        assert_eq!(file.header("content-type"), content_type, "{path}");
        assert_eq!(file.header("cache-control"), "public, max-age=86400");
        assert_eq!(file.header("traceresponse"), "", "{path}");
        let refused = service.ask(Method::POST, path, HeaderMap::new()).await;
        assert_eq!(refused.status, StatusCode::METHOD_NOT_ALLOWED);
        assert_eq!(refused.header("allow"), "GET,HEAD");
    }
    assert_eq!(
        service.get("/robots.txt").await.body,
        "User-agent: *\nDisallow: /\n"
    );
    let unknown = files.first().unwrap().replace('.', ".0");
    for path in [
        &*unknown,
        "/assets/page.css",
        "/assets/",
        "/assets/..%2Fpage.css",
    ] {
        let response = service.get(path).await;
        assert_eq!(response.status, StatusCode::NOT_FOUND, "{path}");
        assert_eq!(response.header("content-type"), "application/problem+json");
        assert_eq!(response.header("cache-control"), "no-store");
    }
    assert_eq!(world.rows().await, 0);
}

#[tokio::test]
async fn page_names_no_other_host() {
    let service = without_stores(&[]).await;
    let page = open(&service, "/visitas").await;
    for attribute in ["href", "src"] {
        for value in values(&page.body, attribute) {
            assert!(
                value.starts_with('/') && !value.starts_with("//"),
                "{value}"
            );
        }
    }
    assert!(!page.body.contains(" style=") && !page.body.contains("<style"));
}

#[tokio::test]
async fn page_of_an_outage_names_no_host_and_no_error() {
    let service = without_stores(&[
        ("DB_HOST", "postgres.invalid"),
        ("DB_USER", "c4nary"),
        ("DB_PASSWORD", "c4nary"),
        ("REDIS_HOST", "redis.invalid"),
        ("REDIS_PASSWORD", "c4nary"),
    ])
    .await;
    eventually("both stores have failed", SOON, async || {
        service.logged("store is down").len() == 2
    })
    .await;
    for path in ["/", "/visitas"] {
        let page = ask(
            &service,
            path,
            &[("accept", BROWSER), ("x-request-id", "c4nary")],
        )
        .await;
        for inside in ["c4nary", ".invalid", "os error", "sqlx"] {
            assert!(!page.body.contains(inside), "{inside} in {}", page.body);
        }
    }
}
