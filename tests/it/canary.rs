//! What no output contains: secrets, however they were set and whether or not they work;
//! confidential parts of requests; and, in responses, internals of the service.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io::{Read as _, Write as _};
use std::net::TcpListener;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD_NO_PAD, URL_SAFE_NO_PAD};
use devstack::{PostgresOptions, RedisOptions};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use reqwest::{Method, StatusCode};
use tempfile::NamedTempFile;

use crate::settings::{secret_file, variables};
use crate::support::collector::Collector;
use crate::support::exposition::PROMETHEUS_ACCEPTS;
use crate::support::traces::{PARENT, traced_with};
use crate::support::{Ended, Response, SOON, Service, Wire, World, eventually, settings};

/// Part of every secret here. Escaping and percent-encoding do not change it.
const CANARY: &str = "c4nary9Zx7Qk2";

#[test]
fn canary_is_found_in_every_encoding() {
    let secret = secret();
    for output in [
        format!("a\nerror: \"{secret}\" at"),
        format!("{:?}", secret.as_bytes()),
        encoded(&secret),
        every_byte_encoded(&secret),
        STANDARD_NO_PAD.encode(&secret),
        STANDARD_NO_PAD.encode(format!("u:{secret}")),
        URL_SAFE_NO_PAD.encode(format!("user:{secret}!")),
    ] {
        assert!(shown(&output).is_some(), "{output}");
    }
    assert_eq!(shown("c4nary is a bird"), None);
}

#[tokio::test]
async fn every_secret_setting_contains_the_canary() {
    let world = World::new();
    let help = Ended::of(&["--help"], &[]).await.output;
    let (_, listed) = help.split_once("by environment only:").expect("secrets");
    let mut secrets: BTreeSet<String> = variables()
        .into_iter()
        .filter(|name| name.ends_with("_FILE") || listed.contains(&format!("\n  {name}\n")))
        .map(str::to_owned)
        .collect();
    for given in SecretsBy::ALL {
        for (variable, value) in Secrets::of(&world, given, &secret()).settings {
            if value.contains(CANARY) || variable.ends_with("_FILE") {
                secrets.remove(&variable);
            }
        }
    }
    assert_eq!(secrets, BTreeSet::new());
}

#[tokio::test]
async fn working_secrets_never_appear_in_output() {
    let world = world_with_secrets().await;
    for given in SecretsBy::ALL {
        let secrets = Secrets::of(&world, given, &secret());
        let service = Service::start(&secrets.settings).await;
        service.until_ready().await;
        assert_no_secret_in_output(&service, &secrets.settings, Some(0)).await;
    }
}

#[tokio::test]
async fn secrets_that_a_store_refuses_never_appear_in_output() {
    let world = world_with_secrets().await;
    for given in SecretsBy::ALL {
        let secrets = Secrets::of(&world, given, &format!("{}-wrong", secret()));
        let service = Service::start(&secrets.settings).await;
        until_both_stores_are_down(&service).await;
        assert_no_secret_in_output(&service, &secrets.settings, Some(1)).await;
    }
}

#[tokio::test]
async fn secrets_of_stores_that_are_down_never_appear_in_output() {
    let world = world_with_secrets().await;
    world.postgres.kill().expect("Postgres ends");
    world.redis.kill().expect("Redis ends");
    for given in SecretsBy::ALL {
        let secrets = Secrets::of(&world, given, &secret());
        let service = Service::start(&secrets.settings).await;
        until_both_stores_are_down(&service).await;
        assert_no_secret_in_output(&service, &secrets.settings, Some(1)).await;
    }
}

#[tokio::test]
async fn secrets_in_rejected_settings_never_appear_in_output() {
    let (plain, encoded) = (secret(), encoded(&secret()));
    let file = secret_file(&plain);
    let path = file.path().to_str().expect("a path of ASCII");
    for (variable, value) in [
        ("DB_PASSWORD", format!("{plain}\nmore")),
        ("REDIS_PASSWORD", format!("{plain}\rmore")),
        ("DATABASE_URL", plain.clone()),
        ("DATABASE_URL", format!("mysql://ana:{encoded}@db/visitas")),
        ("DATABASE_URL", format!("postgres://ana:{plain}@db/visitas")),
        ("DATABASE_URL", format!("postgres://ana:1/{plain}@db")),
        (
            "DATABASE_URL",
            format!("postgres://ana:{encoded}@db:0/visitas"),
        ),
        (
            "DATABASE_URL",
            format!("postgres://ana:x@{encoded}/visitas"),
        ),
        (
            "DATABASE_URL",
            format!("postgres://ana@db/visitas?sslmode={encoded}"),
        ),
        (
            "DATABASE_URL",
            format!("postgres://ana@db/visitas?{encoded}=1"),
        ),
        (
            "DATABASE_URL",
            format!("postgres://ana@db/visitas?sslmod={encoded}"),
        ),
        (
            "DATABASE_URL",
            format!("postgres://ana@db/visitas?schema={encoded}"),
        ),
        (
            "DATABASE_URL",
            format!("postgres://ana@db/visitas?service={encoded}&sslpassword={encoded}"),
        ),
        (
            "DATABASE_URL",
            format!("postgres://ana:{encoded}@db1,db2/visitas"),
        ),
        ("DATABASE_URL_FILE", path.to_owned()),
        (
            "REDIS_URL",
            format!("redis://:{encoded}@cache?sslcertfile={encoded}"),
        ),
        ("REDIS_URL", format!("redis+cluster://:{encoded}@cache")),
        ("REDIS_URL", format!("http://:{encoded}@cache")),
        ("REDIS_URL", format!("redis://{encoded}@cache")),
        ("REDIS_URL", format!("redis://:{plain}@cache")),
        ("REDIS_URL", format!("redis://:{encoded}@cache/zero")),
        ("REDIS_URL_FILE", path.to_owned()),
        (
            "OTEL_EXPORTER_OTLP_HEADERS",
            format!("authorization: {plain}"),
        ),
        (
            "OTEL_EXPORTER_OTLP_HEADERS",
            format!("authorization={encoded}%0A"),
        ),
        (
            "OTEL_EXPORTER_OTLP_TRACES_HEADERS",
            format!("a={encoded},a={encoded}"),
        ),
        (
            "OTEL_EXPORTER_OTLP_ENDPOINT",
            format!("http://ana:{encoded}@jaeger:4318"),
        ),
        ("DB_HOST", format!("postgres://ana:{plain}@db")),
        ("PGOPTIONS", format!("-c a={plain}")),
    ] {
        for command in ["serve", "config"] {
            let ended = Ended::of(&[command], &settings(&[(variable, &value)])).await;
            assert_eq!(ended.code, Some(2), "{variable}: {ended:?}");
            assert_no_canary(&format!("{}{}", ended.output, ended.errors));
        }
    }
    let ended = Ended::of(&["--db-password", &plain], &[]).await;
    assert_eq!(ended.code, Some(2), "{ended:?}");
    assert_no_canary(&ended.errors);
}

#[tokio::test]
async fn spans_contain_no_secret() {
    let world = world_with_secrets().await;
    let collector = Collector::start().await;
    let mut secrets = Secrets::of(&world, SecretsBy::Urls, &secret());
    // The last value of a setting wins.
    let endpoint = collector.endpoint();
    secrets
        .settings
        .extend(settings(&[("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint)]));
    let service = Service::start(&secrets.settings).await;
    service.until_ready().await;
    collector.trace_of(&service.get("/").await, 3).await;
    let export = &collector.exports()[0];
    let authorization = export.headers.get("authorization");
    assert!(authorization.is_some_and(|value| value.as_bytes().ends_with(secret().as_bytes())));
    assert_no_canary(&format!("{:?}", collector.spans()));
}

#[tokio::test]
async fn confidential_parts_of_requests_never_appear_in_output() {
    let world = World::new();
    let collector = Collector::start().await;
    let service = traced_with(&world, &collector, &[("RUST_LOG", "trace")]).await;
    let mut output = String::new();
    for path in ["/", "/health", "/metrics", "/nope"] {
        for method in [Method::GET, Method::POST] {
            let url = format!("{}?token={CANARY}", service.url(path));
            let request = service.client.request(method, url).headers(confidential());
            output += &response(request.body(CANARY)).await.text();
        }
    }
    collector.trace_of(&service.get("/").await, 3).await;
    write!(output, "{:?}", collector.spans()).expect("room");
    output += &service.get("/metrics").await.body;
    service.stop().await;
    output += &service.printed();
    assert!(output.contains("TRACE") && output.contains("\"access\""));
    assert_no_canary(&output);
}

#[tokio::test]
async fn responses_reveal_no_internals() {
    let world = World::new();
    let by_name = [("DB_HOST", "localhost"), ("REDIS_HOST", "localhost")];
    let service = world.serve_with(&by_name).await;
    let responses = every_response(&service).await;
    let statuses: BTreeSet<_> = responses
        .iter()
        .map(|response| response.status.as_u16())
        .collect();
    assert_eq!(statuses, BTreeSet::from([200, 400, 404, 405, 431]));
    assert_no_internals(&world, &responses).await;
    let nowhere = [("DB_HOST", "db.invalid"), ("REDIS_HOST", "cache.invalid")];
    let service = world.start(&nowhere).await;
    until_both_stores_are_down(&service).await;
    let responses = every_response(&service).await;
    let refused = responses
        .iter()
        .filter(|response| response.status == StatusCode::SERVICE_UNAVAILABLE);
    assert!(refused.count() >= 2);
    assert_no_internals(&world, &responses).await;
}

/// Responses of every status, each to a request that contains the canary wherever possible.
async fn every_response(service: &Service) -> Vec<Response> {
    let mut responses = Vec::new();
    let confident = async |method: Method, path: &str, body: String| {
        let url = format!("{}?{CANARY}", service.url(path));
        let request = service.client.request(method, url).headers(confidential());
        response(request.body(body)).await
    };
    for path in [
        "/",
        "/health",
        "/health/ready",
        "/health/live",
        "/metrics",
        "/openapi.json",
        "/visitas",
        "/robots.txt",
        &format!("/assets/{CANARY}"),
        &format!("/{CANARY}"),
    ] {
        for method in [Method::GET, Method::HEAD, Method::POST] {
            responses.push(confident(method, path, CANARY.to_owned()).await);
        }
    }
    responses.push(confident(Method::GET, "/", CANARY.repeat(10_000)).await);
    let accept = HeaderMap::from_iter([(
        reqwest::header::ACCEPT,
        HeaderValue::from_static(PROMETHEUS_ACCEPTS),
    )]);
    responses.push(service.ask(Method::GET, "/metrics", accept).await);
    let long = "x".repeat(256 * 1024);
    for head in [
        format!("{CANARY}\r\n"),
        format!("GET /{CANARY} HTTP/1.1\r\nhost: a/{CANARY}\r\n"),
        format!("GET / HTTP/1.1\r\n{CANARY}: {long}\r\n"),
    ] {
        responses.push(raw_request(service, &format!("{head}\r\n")).await);
    }
    responses
}

/// A response that no route makes. The request is sent as raw bytes.
async fn raw_request(service: &Service, request: &str) -> Response {
    let mut wire = Wire::open(service).await;
    wire.send(request).await;
    let response = wire.rest().await;
    let (head, body) = response.split_once("\r\n\r\n").expect("a head");
    let mut lines = head.lines();
    let status = lines
        .next()
        .and_then(|line| line.split(' ').nth(1))
        .expect("a status");
    let headers = lines.map(|line| {
        let (name, value) = line.split_once(": ").expect("a header");
        let name: HeaderName = name.parse().expect("a name");
        (name, value.parse().expect("a value"))
    });
    Response {
        status: status.parse().expect("a status"),
        headers: headers.collect(),
        body: body.to_owned(),
    }
}

/// The headers that a response is allowed to have. `server` is not one of them.
const HEADERS: [&str; 10] = [
    "allow",
    "cache-control",
    "connection",
    "content-length",
    "content-type",
    "date",
    "retry-after",
    "vary",
    "x-content-type-options",
    "x-request-id",
];

/// Internals that no response contains, separated by bars: statements, files, addresses, and the
/// names of libraries and stores.
const INSIDE: &str = "localhost|.invalid|127.0.0.1|usuario|senha|select |insert |_visitas(|public.|\
    /tmp|/home|/root|/usr|/var|.rs|.sql|PostgreSQL|redis_version|Debian|sqlx|hyper|axum|os error";

async fn assert_no_internals(world: &World, responses: &[Response]) {
    let postgres: String = sqlx::query_scalar("select current_setting('server_version')")
        .fetch_one(&mut world.session().await)
        .await
        .expect("a version");
    let redis: String = world.redis_says(&["INFO", "server"]).await;
    let redis = redis
        .lines()
        .find_map(|line| line.strip_prefix("redis_version:"));
    let versions = [postgres.split(' ').next(), redis].map(|version| version.expect("a version"));
    for response in responses {
        for name in response.headers.keys() {
            assert!(HEADERS.contains(&name.as_str()), "{name} in {response:?}");
        }
        let output = without_measures(response);
        for inside in INSIDE.split('|').chain(versions) {
            assert!(!output.contains(inside), "{inside} in {output}");
        }
        assert_no_canary(&output);
    }
}

/// The whole response except measured numbers, which can contain any digits.
fn without_measures(response: &Response) -> String {
    let mut output = format!("{} {:?}\n", response.status, response.headers);
    let is_exposition = response.body.starts_with("# ");
    // Times and rates follow.
    let body = response.body.split("\"atualizado_em\":").next();
    for line in body.into_iter().flat_map(str::lines) {
        let series = line
            .rsplit_once(' ')
            .filter(|_| is_exposition && !line.starts_with('#'));
        let text = series.map_or(line, |(series, _)| series);
        let latency = text.split("\"latency_ms\":").map(|part| {
            part.trim_start_matches(|character: char| {
                character.is_ascii_digit() || character == '.'
            })
        });
        output.extend(latency);
        output.push('\n');
    }
    output
}

/// Headers whose values are confidential.
fn confidential() -> HeaderMap {
    let of = |name, value: String| {
        let value = HeaderValue::try_from(value).expect("a header's value");
        (HeaderName::from_static(name), value)
    };
    HeaderMap::from_iter([
        of("authorization", format!("Bearer {CANARY}")),
        of("cookie", format!("session={CANARY}")),
        of("referer", format!("http://elsewhere/?{CANARY}")),
        of("x-forwarded-for", CANARY.to_owned()),
        of("tracestate", format!("vendor={CANARY}")),
    ])
}

async fn response(request: reqwest::RequestBuilder) -> Response {
    let response = request.send().await.expect("a response");
    Response::read(response).await.expect("a whole response")
}

async fn until_both_stores_are_down(service: &Service) {
    eventually("both stores are down", SOON, async || {
        service.logged("store is down").len() == 2
    })
    .await;
}

/// Searches all output of a service and of the commands for the canary. `code` is the expected exit
/// status of the commands that use both stores.
async fn assert_no_secret_in_output(
    service: &Service,
    given: &[(String, String)],
    code: Option<i32>,
) {
    let mut output = String::new();
    for response in every_visible(service).await {
        output += &response.text();
    }
    let refused = "span export failing";
    eventually(refused, SOON, async || !service.logged(refused).is_empty()).await;
    output += &command_lines(service.pid());
    let health = service.url("/health");
    let commands: [(&[&str], Option<i32>); 7] = [
        (&["config"], Some(0)),
        (&["--help"], Some(0)),
        (&["--version"], Some(0)),
        (&["migrate"], code),
        (&["recount"], code),
        (&["reconcile"], code),
        (&["healthcheck", "--url", &health], code),
    ];
    for (arguments, expected) in commands {
        let ended = Ended::of(arguments, given).await;
        assert_eq!(ended.code, expected, "{arguments:?}: {ended:?}");
        output += &ended.output;
        output += &ended.errors;
    }
    service.stop().await;
    output += &service.printed();
    assert!(output.contains("postgresql") && output.contains("TRACE"));
    assert_no_canary(&output);
}

async fn every_visible(service: &Service) -> Vec<Response> {
    let mut responses = Vec::new();
    for path in [
        "/",
        "/visitas",
        "/health",
        "/health/live",
        "/metrics",
        "/nope",
    ] {
        for method in [Method::GET, Method::POST] {
            let parent = HeaderValue::from_static(PARENT);
            let headers = HeaderMap::from_iter([(HeaderName::from_static("traceparent"), parent)]);
            responses.push(service.ask(method, path, headers).await);
        }
    }
    responses.push(raw_request(service, "nonsense\r\n\r\n").await);
    responses
}

/// The command lines of a process and of its descendants.
fn command_lines(process: u32) -> String {
    let parents: Vec<(u32, u32)> = std::fs::read_dir("/proc")
        .expect("the processes")
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter_map(|process: u32| {
            let status = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
            let (_, after_the_name) = status.rsplit_once(") ")?;
            Some((process, after_the_name.split(' ').nth(1)?.parse().ok()?))
        })
        .collect();
    let mut family = vec![process];
    let mut lines = String::new();
    while let Some(process) = family.pop() {
        let line = std::fs::read(format!("/proc/{process}/cmdline")).unwrap_or_default();
        lines += &String::from_utf8_lossy(&line);
        lines.push('\n');
        let children = parents.iter().filter(|(_, parent)| *parent == process);
        family.extend(children.map(|(child, _)| *child));
    }
    assert!(lines.contains("visitas"), "{lines}");
    lines
}

/// A password that needs every kind of escaping. The canary is after the @: text before an @ is
/// masked in every setting.
fn secret() -> String {
    format!("@/:%?#{CANARY}+&=")
}

fn encoded(text: &str) -> String {
    utf8_percent_encode(text, NON_ALPHANUMERIC).to_string()
}

fn every_byte_encoded(text: &str) -> String {
    text.bytes().fold(String::new(), |encoded, byte| {
        format!("{encoded}%{byte:02x}")
    })
}

/// The first line that contains the canary, plain or encoded.
fn shown(output: &str) -> Option<&str> {
    let decimals: Vec<_> = CANARY.bytes().map(|byte| byte.to_string()).collect();
    let bytes = every_byte_encoded(CANARY);
    let mut forms = vec![
        CANARY.to_owned(),
        decimals.join(", "),
        bytes.replace('%', ""),
        bytes.to_uppercase(),
        bytes,
    ];
    // In base64 the bytes before and after change the first and the last characters.
    for before in 0..3 {
        let padded = format!("{}{CANARY}", "x".repeat(before));
        let own = (8 * before).div_ceil(6)..8 * padded.len() / 6;
        forms.push(STANDARD_NO_PAD.encode(&padded)[own.clone()].to_owned());
        forms.push(URL_SAFE_NO_PAD.encode(&padded)[own].to_owned());
    }
    output
        .lines()
        .find(|line| forms.iter().any(|form| line.contains(form)))
}

#[track_caller]
fn assert_no_canary(output: &str) {
    assert_eq!(shown(output), None);
}

/// How a service receives its secrets.
#[derive(Clone, Copy)]
enum SecretsBy {
    Variables,
    Urls,
    Files,
    FilesOfUrls,
}

impl SecretsBy {
    const ALL: [Self; 4] = [Self::Variables, Self::Urls, Self::Files, Self::FilesOfUrls];
}

struct Secrets {
    settings: Vec<(String, String)>,
    _files: [NamedTempFile; 2],
}

impl Secrets {
    fn of(world: &World, given: SecretsBy, password: &str) -> Self {
        let (postgres, redis) = (&world.postgres, &world.redis);
        let encoded = encoded(password);
        let urls = [
            format!(
                "postgres://canary:{encoded}@{}:{}/{}",
                postgres.host(),
                postgres.port(),
                world.database
            ),
            format!("redis://:{encoded}@{}:{}", redis.host(), redis.port()),
        ];
        let passwords = [password.to_owned(), password.to_owned()];
        let (variables, secrets) = match given {
            SecretsBy::Variables | SecretsBy::Files => {
                (["DB_PASSWORD", "REDIS_PASSWORD"], passwords)
            }
            SecretsBy::Urls | SecretsBy::FilesOfUrls => (["DATABASE_URL", "REDIS_URL"], urls),
        };
        let headers = match given {
            SecretsBy::Variables | SecretsBy::Urls => "OTEL_EXPORTER_OTLP_HEADERS",
            SecretsBy::Files | SecretsBy::FilesOfUrls => "OTEL_EXPORTER_OTLP_TRACES_HEADERS",
        };
        let files = [secret_file(&secrets[0]), secret_file(&secrets[1])];
        let mut settings = settings(&[
            (
                "OTEL_EXPORTER_OTLP_ENDPOINT",
                &collector_that_repeats(password),
            ),
            (headers, &format!("authorization=Bearer%20{encoded}")),
            ("OTEL_BSP_SCHEDULE_DELAY", "50"),
            ("RUST_LOG", "trace"),
        ]);
        if matches!(given, SecretsBy::Variables | SecretsBy::Files) {
            settings.extend(world.settings_but("DB_PASSWORD", &[("DB_USER", "canary")]));
        }
        match given {
            SecretsBy::Variables | SecretsBy::Urls => {
                settings.extend(std::iter::zip(variables.map(str::to_owned), secrets));
            }
            SecretsBy::Files | SecretsBy::FilesOfUrls => {
                let variables = variables.map(|variable| format!("{variable}_FILE"));
                let paths = files
                    .each_ref()
                    .map(|file| file.path().display().to_string());
                settings.extend(std::iter::zip(variables, paths));
            }
        }
        Self {
            settings,
            _files: files,
        }
    }
}

/// Stores that require the secret.
async fn world_with_secrets() -> World {
    let redis = RedisOptions {
        password: Some(secret()),
        ..RedisOptions::default()
    };
    let world = World::with(PostgresOptions::default(), redis);
    // The role needs to own the database, and nothing else.
    let (password, database) = (secret(), &world.database);
    world
        .sql(&format!("create role canary login password '{password}'"))
        .await;
    world
        .sql(&format!("alter database {database} owner to canary"))
        .await;
    world
}

/// The address of a collector that refuses every export, with the secret in its response.
fn collector_that_repeats(secret: &str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("an address");
    let length = secret.len();
    let response = format!("HTTP/1.1 401 {secret}\r\ncontent-length: {length}\r\n\r\n{secret}");
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.expect("a connection");
            let mut request = [0; 4096];
            if stream.read(&mut request).is_ok_and(|bytes| bytes > 0) {
                // The client can have disconnected.
                stream.write_all(response.as_bytes()).ok();
            }
        }
    });
    format!("http://{address}")
}
