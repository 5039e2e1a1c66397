//! The recipes of `docs/connecting.md` for reverse proxies and the `HAProxy` of
//! `docker-compose.scale.yml`, each with the real program in front of the real service: a request is
//! at most one visit, also when a connection between the two breaks.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use lab::history::Outcome;
use lab::ports::free_address;
use lab::process::{self, Process};
use lab::proxy::{Protocol, Proxy};
use lab::rolling::{Crowd, Replicas};
use lab::visitor::Visitor;
use reqwest::StatusCode;
use tempfile::TempDir;

use crate::support::load::are_one_to_n;
use crate::support::{HeldCount, Response, SOON, Service, Wire, World, eventually, without_stores};

/// Where programs are. Debian keeps servers where only root looks for them.
const PATH: &str = "/usr/local/bin:/usr/local/sbin:/usr/bin:/usr/sbin:/opt/homebrew/bin";

/// For tests that wait longer than a visit may take.
const PATIENT: [(&str, &str); 2] = [("DB_TIMEOUT", "8s"), ("VISIT_TIMEOUT", "9s")];

/// Runs a fact's check with each front.
macro_rules! with_each_front {
    ($($(#[$attribute:meta])* $fact:ident;)+) => {
        mod nginx {
            $(with_each_front!(@ $fact, Nginx, $(#[$attribute])*);)+
        }
        mod haproxy {
            $(with_each_front!(@ $fact, Haproxy, $(#[$attribute])*);)+
        }
        mod caddy {
            $(with_each_front!(@ $fact, Caddy, $(#[$attribute])*);)+
        }
        mod compose {
            $(with_each_front!(@ $fact, Compose, $(#[$attribute])*);)+
        }
    };
    (@ $fact:ident, $program:ident, $(#[$attribute:meta])*) => {
        #[tokio::test(flavor = "multi_thread")]
        $(#[$attribute])*
        async fn $fact() {
            super::$fact(super::Program::$program).await;
        }
    };
}

with_each_front! {
    visits_and_their_ids_pass;
    slow_visit_gets_the_response_of_the_service;
    visit_whose_connection_breaks_is_sent_once;
    visit_that_the_front_gives_up_is_sent_once;
    replica_that_refuses_connections_costs_no_visit;
    #[ignore = "takes long: make faults"]
    restart_of_the_service_neither_loses_nor_doubles_a_visit;
    #[ignore = "takes long: make faults"]
    replicas_that_restart_in_turn_fail_no_visit;
}

async fn visits_and_their_ids_pass(program: Program) {
    let world = World::new();
    let service = world.serve().await;
    let front = Front::start(program, [service.address; 2], &[]).await;
    let ask = async |method, path: &str, (name, value): (&str, &str)| {
        let request = service.client.request(method, front.url(path));
        let response = request.header(name, value).send().await;
        Response::read(response.expect("a response")).await.unwrap()
    };
    let visit = ask(reqwest::Method::GET, "/", ("x-request-id", "given")).await;
    assert_eq!(visit.status, StatusCode::OK);
    assert_eq!(visit.json()["total_registros_db"], 1);
    assert_eq!(visit.header("x-request-id"), "given");
    let visit = ask(reqwest::Method::GET, "/", ("x-other", "1")).await;
    assert_eq!(visit.header("x-request-id").len(), 32, "{visit:?}");
    let head = ask(reqwest::Method::HEAD, "/", ("x-other", "1")).await;
    assert_eq!(head.status, StatusCode::OK);
    assert_eq!(world.rows().await, 2);
    let metrics = ask(
        reqwest::Method::GET,
        "/metrics",
        ("accept-encoding", "gzip"),
    );
    assert_eq!(metrics.await.header("content-encoding"), "gzip");
}

/// Postgres is as slow as a visit may wait for it.
async fn slow_visit_gets_the_response_of_the_service(program: Program) {
    let world = World::new();
    let service = world.serve().await;
    let way = way_to(&service).await;
    let front = Front::start(program, [at(&way); 2], &[]).await;
    let held = HeldCount::of(&world).await;
    let response = front.open().await.get("/").await;
    assert!(response.starts_with("HTTP/1.1 503"), "{response}");
    assert!(response.contains(r#""db_status":"erro""#), "{response}");
    held.release().await;
    assert_eq!(visits_sent(&way), 1);
}

async fn visit_whose_connection_breaks_is_sent_once(program: Program) {
    let world = World::new();
    let service = world.serve_with(&PATIENT).await;
    let way = way_to(&service).await;
    let front = Front::start(program, [at(&way); 2], &[]).await;
    let mut rows = 0;
    for keeps in [false, true] {
        let mut client = front.open().await;
        if keeps {
            // So that the front can use a connection again.
            client.get("/").await;
            rows += 1;
        }
        let response = break_a_visit(&world, &way, client).await;
        rows += 1;
        assert!(!response.starts_with("HTTP/1.1 200"), "{response}");
        assert_eq!(visits_sent(&way), rows);
        assert_eq!(world.rows().await, i64::try_from(rows).unwrap());
    }
}

async fn visit_that_the_front_gives_up_is_sent_once(program: Program) {
    let world = World::new();
    let service = world.serve_with(&PATIENT).await;
    let way = way_to(&service).await;
    let front = Front::start(program, [at(&way); 2], &[program.hasty()]).await;
    let response = give_up_a_visit(&world, &front).await;
    assert!(response.starts_with("HTTP/1.1 50"), "{response}");
    assert_eq!(visits_sent(&way), 1);
}

async fn replica_that_refuses_connections_costs_no_visit(program: Program) {
    let world = World::new();
    let service = world.serve().await;
    let absent = free_address().unwrap();
    let front = Front::start(program, [absent, service.address], &[]).await;
    for visit in 1..=20 {
        let response = front.open().await.get("/").await;
        let number = format!("\"total_registros_db\":{visit},");
        assert!(response.contains(&number), "{response}");
    }
}

async fn restart_of_the_service_neither_loses_nor_doubles_a_visit(program: Program) {
    let world = World::new();
    let address = free_address().unwrap();
    let mut service = serve_at(&world, address, &[]).await;
    let front = Front::start(program, [address; 2], &[]).await;
    let going = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(true));
    let clients: Vec<_> = (0..8)
        .map(|client| {
            let mut visitor = Visitor::new(client, 0, front.address);
            let going = std::sync::Arc::clone(&going);
            tokio::spawn(async move {
                let mut visits = Vec::new();
                while going.load(std::sync::atomic::Ordering::Relaxed) {
                    visits.push(visitor.visit().await);
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
                visits
            })
        })
        .collect();
    for _ in 0..3 {
        until_visited(&service).await;
        service.stop().await;
        service = serve_at(&world, address, &[]).await;
    }
    until_visited(&service).await;
    going.store(false, std::sync::atomic::Ordering::Relaxed);
    let mut visits = Vec::new();
    for client in clients {
        visits.extend(client.await.unwrap());
    }
    let recorded = visits
        .iter()
        .filter(|visit| visit.outcome == Outcome::Recorded);
    let numbers: Vec<_> = recorded.map(|visit| visit.total).collect();
    assert_eq!(world.rows().await, i64::try_from(numbers.len()).unwrap());
    assert!(are_one_to_n(numbers.into_iter()));
}

async fn replicas_that_restart_in_turn_fail_no_visit(program: Program) {
    let world = World::new();
    let addresses = [(); 2].map(|()| free_address().unwrap());
    let leaving = [("SHUTDOWN_DELAY", "3s"), ("SHUTDOWN_TIMEOUT", "20s")];
    let leaving = [&leaving[..], &PATIENT].concat();
    let mut replicas = Vec::new();
    for address in addresses {
        replicas.push(serve_at(&world, address, &leaving).await);
    }
    let front = Front::start(program, addresses, &[]).await;
    let fronts = Replicas::default();
    fronts.add(front.address);
    let crowd = Crowd::start(12, 4, &fronts);
    for (replica, address) in addresses.into_iter().enumerate() {
        for replica in &replicas {
            until_visited(replica).await;
        }
        replicas[replica].signal("TERM");
        let status = replicas[replica].ended(3 * SOON).await;
        assert!(status.success(), "{}", replicas[replica].printed());
        replicas[replica] = serve_at(&world, address, &leaving).await;
    }
    for replica in &replicas {
        until_visited(replica).await;
    }
    let seen = tokio::task::spawn_blocking(|| crowd.leave()).await.unwrap();
    assert_eq!(seen.failures, Vec::<String>::new(), "{seen:?}");
    assert_eq!(world.rows().await, i64::try_from(seen.visits).unwrap());
}

// --- why the recipes are as they are: each line that is left out makes a request two visits ---

#[tokio::test(flavor = "multi_thread")]
async fn nginx_as_it_comes_sends_a_visit_again() {
    let world = World::new();
    let service = world.serve_with(&PATIENT).await;
    let way = way_to(&service).await;
    let changes = [
        ("proxy_next_upstream off;", ""),
        ("error_page 502 504 = @unsent;", ""),
        Program::Nginx.hasty(),
    ];
    let front = Front::start(Program::Nginx, [at(&way); 2], &changes).await;
    give_up_a_visit(&world, &front).await;
    assert!(visits_sent(&way) > 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn caddy_that_keeps_connections_sends_a_visit_again() {
    let world = World::new();
    let service = world.serve_with(&PATIENT).await;
    let way = way_to(&service).await;
    let changes = [("keepalive off", "keepalive 60s")];
    let front = Front::start(Program::Caddy, [at(&way); 2], &changes).await;
    let mut client = front.open().await;
    client.get("/").await;
    let response = break_a_visit(&world, &way, client).await;
    assert!(response.starts_with("HTTP/1.1 200"), "{response}");
    // Caddy decides how often. What it sends on a connection that is reset before its batch begins is
    // no visit.
    let sent = i64::try_from(visits_sent(&way)).expect("a few");
    let rows = world.rows().await;
    assert!((3..=sent).contains(&rows), "{rows} of {sent}");
}

#[tokio::test(flavor = "multi_thread")]
async fn haproxy_with_a_bare_check_takes_every_replica_out() {
    let service = World::new().serve().await;
    let check = "option httpchk\n    http-check send meth GET uri /health/ready ver HTTP/1.1 hdr \
                 Host visitas\n    http-check expect status 200\n";
    let changes = [(check, "option httpchk\n")];
    let front = Front::start(Program::Haproxy, [service.address; 2], &changes).await;
    eventually("the front has no replica", SOON, async || {
        let response = front.open().await.get("/health/live").await;
        response.starts_with("HTTP/1.1 503")
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn haproxy_takes_out_replicas_whose_postgres_is_down() {
    let service = without_stores(&[]).await;
    let head = service.client.head(service.url("/")).send().await.unwrap();
    assert_eq!(head.status(), StatusCode::OK, "HEAD / is no check");
    let front = Front::start(Program::Haproxy, [service.address; 2], &[]).await;
    eventually("the front has no replica", SOON, async || {
        let response = front.open().await.get("/health/live").await;
        response.starts_with("HTTP/1.1 503")
    })
    .await;
}

// --- what the HAProxy of Compose says itself ---

#[tokio::test(flavor = "multi_thread")]
async fn compose_passes_the_responses_of_replicas_whose_postgres_is_down() {
    let service = without_stores(&[]).await;
    let front = Front::start(Program::Compose, [service.address; 2], &[]).await;
    eventually("no replica is ready", SOON, async || {
        let log = front.process.log_tail();
        log.contains("backend ready has no server available")
    })
    .await;
    let visit = front.open().await.get("/").await;
    assert!(visit.starts_with("HTTP/1.1 503"), "{visit}");
    assert!(visit.contains(r#""db_status":"erro""#), "{visit}");
    let page = front.open().await.get("/visitas").await;
    assert!(page.starts_with("HTTP/1.1 200"), "{page}");
}

/// As in the service's own responses, `Retry-After` says that the visit is certainly not recorded.
#[tokio::test(flavor = "multi_thread")]
async fn compose_invites_to_retry_only_what_was_never_sent() {
    let absent = free_address().unwrap();
    let front = Front::start(Program::Compose, [absent; 2], &[]).await;
    let unsent = front.open().await.get("/").await.to_lowercase();
    assert!(unsent.starts_with("http/1.1 503"), "{unsent}");
    assert!(unsent.contains("retry-after: 1\r\n"), "{unsent}");

    let world = World::new();
    let service = world.serve_with(&PATIENT).await;
    let hasty = [Program::Compose.hasty()];
    let front = Front::start(Program::Compose, [service.address; 2], &hasty).await;
    let sent = give_up_a_visit(&world, &front).await.to_lowercase();
    assert!(sent.starts_with("http/1.1 504"), "{sent}");
    assert!(!sent.contains("retry-after"), "{sent}");
    eventually("the front says so", SOON, async || {
        let log = front.process.log_tail();
        log.contains("no response: status=504")
    })
    .await;

    for response in [unsent, sent] {
        assert!(response.contains("application/problem+json"), "{response}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn cache_of_nginx_makes_visits_of_head_requests_unless_configured_not_to() {
    let world = World::new();
    let service = world.serve().await;
    let cache = "http {\n    proxy_cache_path cache keys_zone=cache:1m;\n    proxy_cache cache;";
    let configured = format!(
        "{cache}\n    proxy_cache_convert_head off;\n    \
         proxy_cache_key $request_method$proxy_host$request_uri;"
    );
    for (cache, rows) in [(cache, 1), (&configured, 1)] {
        let changes = [("http {", cache)];
        let front = Front::start(Program::Nginx, [service.address; 2], &changes).await;
        let head = service.client.head(front.url("/")).send().await.unwrap();
        assert_eq!(head.status(), StatusCode::OK);
        assert_eq!(world.rows().await, rows);
    }
}

// --- wiring ---

#[derive(Clone, Copy)]
enum Program {
    Nginx,
    Haproxy,
    Caddy,
    /// `HAProxy`, with the configuration of `docker-compose.scale.yml`.
    Compose,
}

impl Program {
    fn name(self) -> &'static str {
        match self {
            Self::Nginx => "nginx",
            Self::Haproxy | Self::Compose => "haproxy",
            Self::Caddy => "caddy",
        }
    }

    fn command(self) -> Command {
        let mut command = process::command(self.name());
        command.env("PATH", PATH);
        command
    }

    /// The change of its recipe after which it waits for a response for only a second.
    fn hasty(self) -> (&'static str, &'static str) {
        match self {
            Self::Nginx => ("proxy_read_timeout 10s", "proxy_read_timeout 1s"),
            Self::Haproxy | Self::Compose => ("timeout server 10s", "timeout server 1s"),
            Self::Caddy => ("response_header_timeout 10s", "response_header_timeout 1s"),
        }
    }

    /// Its configuration.
    fn recipe(self) -> String {
        let document = include_str!("../../docs/connecting.md");
        let fence = match self {
            Self::Nginx => "```nginx\n",
            Self::Haproxy => "```haproxy\n",
            Self::Caddy => "```caddyfile\n",
            Self::Compose => return compose_configuration(),
        };
        let (_, recipe) = document.split_once(fence).expect("a recipe");
        recipe.split_once("```").expect("its end").0.to_owned()
    }

    /// What a test changes in each recipe, so that the program can run at `address` as any user.
    fn settings(self, address: SocketAddr) -> (&'static str, String) {
        match self {
            Self::Nginx => ("listen 80;", format!("listen {address};")),
            Self::Haproxy => ("bind :80\n", format!("bind {address}\n")),
            Self::Compose => ("bind :::8000 v4v6\n", format!("bind {address}\n")),
            Self::Caddy => {
                let (ip, port) = (address.ip(), address.port());
                (":80 {", format!(":{port} {{\n\tbind {ip}"))
            }
        }
    }

    /// Runs it in the foreground with a configuration in `folder`.
    fn run(self, folder: &Path, text: &str) -> Process {
        let file = folder.join("configuration");
        let mut command = self.command();
        let text = match self {
            Self::Nginx => {
                let paths = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
                    .map(|kind| format!("\n    {kind}_temp_path {kind};"));
                let global = "daemon off; pid pid; error_log stderr; user root;";
                command.args(["-g", global, "-p"]).arg(folder);
                command.arg("-c").arg(&file);
                let paths = paths.concat();
                text.replace("http {", &format!("http {{\n    access_log off;{paths}"))
            }
            Self::Haproxy | Self::Compose => {
                command.args(["-db", "-f"]).arg(&file);
                text.to_owned()
            }
            Self::Caddy => {
                command.args(["run", "--adapter", "caddyfile", "--config"]);
                command.arg(&file);
                command
                    .envs(["HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME"].map(|name| (name, folder)));
                format!("{{\n\tadmin off\n}}\n{text}")
            }
        };
        std::fs::write(file, text).expect("a configuration");
        Process::start(command, &folder.join("log")).expect("it starts")
    }
}

/// The configuration of `docker-compose.scale.yml`, with two replicas where it asks the network's
/// DNS.
fn compose_configuration() -> String {
    let text = include_str!("../../deploy/haproxy/haproxy.cfg");
    let (found, known) = (
        "server-template replica 12 \"web:${PORT}\" resolvers network resolve-prefer ipv4 \
         init-addr none\n",
        "server replica1 visitas-1:5000\n    server replica2 visitas-2:5000\n",
    );
    assert!(text.contains(found), "{found} in {text}");
    text.replace(found, known)
}

/// A running front. Dropping it stops it.
struct Front {
    address: SocketAddr,
    // Before its folder, so that it ends first.
    process: Process,
    _folder: TempDir,
}

impl Front {
    /// Starts a program with its recipe, in which these texts are changed, and waits until it
    /// responds.
    async fn start(program: Program, replicas: [SocketAddr; 2], changes: &[(&str, &str)]) -> Self {
        let address = free_address().expect("a free port");
        let [one, other] = replicas.map(|replica| replica.to_string());
        let (listens, here) = program.settings(address);
        let mut text = program.recipe();
        for &(old, new) in changes.iter().chain(&[
            ("visitas-1:5000", &*one),
            ("visitas-2:5000", &*other),
            (listens, &*here),
        ]) {
            assert!(text.contains(old), "{old} in {text}");
            text = text.replace(old, new);
        }
        let folder = tempfile::tempdir().expect("a folder");
        let process = program.run(folder.path(), &text);
        let mut front = Self {
            address,
            process,
            _folder: folder,
        };
        eventually("the front listens", SOON, async || {
            let has_ended = front.process.has_ended().expect("its status");
            let log = front.process.log_tail();
            assert!(!has_ended, "it ended (`make test` installs it): {log}");
            tokio::net::TcpStream::connect(address).await.is_ok()
        })
        .await;
        front
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// A client that repeats nothing.
    async fn open(&self) -> Wire {
        Wire::open_at(self.address).await
    }
}

/// A way to the service that writes down what the front sends.
async fn way_to(service: &Service) -> Proxy {
    let way = Proxy::recording(service.address, Protocol::Other).await;
    way.expect("a free port")
}

fn at(way: &Proxy) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], way.port()))
}

/// How many visits the front has sent.
fn visits_sent(way: &Proxy) -> usize {
    let said = way.record();
    let requests = |said: &Vec<u8>| {
        String::from_utf8_lossy(said)
            .matches("GET / HTTP/1")
            .count()
    };
    said.iter().map(requests).sum()
}

/// Makes a visit whose connection to the service breaks after it was recorded and before its
/// response arrives, and returns what the client gets.
async fn break_a_visit(world: &World, way: &Proxy, mut client: Wire) -> String {
    let before = world.rows().await;
    way.change(|rules| rules.delay_to_client = 6 * SOON);
    client.send("GET / HTTP/1.1\r\nhost: test\r\n\r\n").await;
    eventually("the visit is recorded", SOON, async || {
        world.rows().await > before
    })
    .await;
    way.change(|rules| rules.delay_to_client = Duration::ZERO);
    way.reset_established();
    client.response_within(SOON).await.unwrap_or_default()
}

/// Makes a visit that Postgres keeps for longer than the front waits, and returns what the client
/// gets.
async fn give_up_a_visit(world: &World, front: &Front) -> String {
    let held = HeldCount::of(world).await;
    let response = front.open().await.get("/").await;
    held.release().await;
    response
}

async fn serve_at(world: &World, address: SocketAddr, settings: &[(&str, &str)]) -> Service {
    let address = address.to_string();
    let settings = [&[("BIND_ADDR", &*address)], settings].concat();
    world.serve_with(&settings).await
}

/// Waits until the service has recorded some visits.
async fn until_visited(service: &Service) {
    eventually("clients visit", SOON, async || {
        service.counted("ok").await >= 50
    })
    .await;
}
