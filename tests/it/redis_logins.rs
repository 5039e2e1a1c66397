//! How the service logs in to Redis: users, sockets, client certificates, secrets that change, and
//! what the log says when Redis refuses.

use std::fs;
use std::path::Path;
use std::process::Command;

use devstack::RedisOptions;
use lab::ports::free_address;
use lab::process::Process;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use crate::settings::secret_file;
use crate::support::{SOON, Service, World, eventually, settings};

/// Part of every password here.
const CANARY: &str = "c4nary";

/// Timeouts long enough for a handshake on a busy machine: the log has the first reason why a store
/// is down, which must not be a timeout.
const PATIENT: [(&str, &str); 3] = [
    ("REDIS_TIMEOUT", "5s"),
    ("DB_TIMEOUT", "10s"),
    ("VISIT_TIMEOUT", "15s"),
];

#[tokio::test]
async fn user_of_the_access_control_list_needs_the_documented_permissions_only() {
    let world = World::new();
    let command = documented("ACL SETUSER");
    let words: Vec<&str> = command.split(' ').collect();
    world.redis_says::<String>(&words).await;
    let (user, password) = (words[2], words[4].trim_start_matches('>'));
    let port = world.redis.port();
    for given in [
        vec![
            ("REDIS_PORT", port.to_string()),
            ("REDIS_HOST", "127.0.0.1".to_owned()),
            ("REDIS_USERNAME", user.to_owned()),
            ("REDIS_PASSWORD", password.to_owned()),
        ],
        vec![(
            "REDIS_URL",
            format!("valkey://{user}:{password}@127.0.0.1:{port}/3"),
        )],
    ] {
        let given: Vec<_> = given
            .iter()
            .map(|(name, value)| (*name, &**value))
            .collect();
        let service = Service::start(&world.settings_but("REDIS_", &given)).await;
        service.until_ready().await;
        assert_eq!(service.get("/").await.json()["redis_status"], "ok");
    }
    world
        .redis_says::<String>(&["ACL", "SETUSER", user, "nopass"])
        .await;
    let service = world.serve_with(&[("REDIS_USERNAME", user)]).await;
    service.visit().await;
}

#[tokio::test]
#[ignore = "reads a clock: make faults"]
async fn idle_connection_of_a_user_without_ping_stays_in_use() {
    let world = World::new();
    let rules = [
        "ACL",
        "SETUSER",
        "ana",
        "on",
        "nopass",
        "~visitas_home",
        "+incrby",
    ];
    world.redis_says::<String>(&rules).await;
    let service = world.serve_with(&[("REDIS_USERNAME", "ana")]).await;
    let opened = |statistics: String| -> u64 {
        let (_, value) = statistics
            .split_once("total_connections_received:")
            .expect("a number");
        value
            .lines()
            .next()
            .expect("a line")
            .parse()
            .expect("a number")
    };
    let before = opened(world.redis_says(&["INFO", "stats"]).await);
    for _ in 0..5 {
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        assert_eq!(service.get("/").await.json()["redis_status"], "ok");
    }
    // The questions here open connections, too.
    assert!(opened(world.redis_says(&["INFO", "stats"]).await) <= before + 3);
}

#[tokio::test]
async fn redis_is_reached_by_its_unix_socket() {
    let folder = open_folder();
    let socket = folder.path().join("redis.sock");
    let socket = socket.to_str().expect("a path of ASCII");
    let world = World::with_redis(RedisOptions {
        config: vec![
            ("unixsocket".to_owned(), socket.to_owned()),
            ("unixsocketperm".to_owned(), "777".to_owned()),
        ],
        ..RedisOptions::default()
    });
    let url = format!("unix://{socket}?db=0");
    let by_url = world.settings_but("REDIS_", &[("REDIS_URL", &url)]);
    let by_host = world.settings_but("REDIS_", &[("REDIS_HOST", socket)]);
    for (given, visit) in [(by_url, 1), (by_host, 2)] {
        let service = Service::start(&given).await;
        service.until_ready().await;
        assert_eq!(service.visit().await, (visit, visit));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn password_that_changes_in_its_file_is_used_for_the_next_connection() {
    let world = World::new();
    let port = world.redis.port();
    let with_url = |password: &str| format!("redis://:{password}@127.0.0.1:{port}");
    for (variable, form) in [
        ("REDIS_PASSWORD_FILE", None),
        ("REDIS_URL_FILE", Some(with_url)),
    ] {
        let text = |password: &str| form.map_or(password.to_owned(), |form| form(password));
        redis(port, "", &["config", "set", "requirepass", "c4nary-old"]);
        let file = secret_file(&text("c4nary-old"));
        let path = file.path().to_str().expect("a path of ASCII");
        let prefix = if form.is_some() {
            "REDIS_"
        } else {
            "REDIS_PASSWORD"
        };
        let service = Service::start(&world.settings_but(prefix, &[(variable, path)])).await;
        service.until_ready().await;

        redis(
            port,
            "c4nary-old",
            &["config", "set", "requirepass", "c4nary-new"],
        );
        redis(port, "c4nary-new", &["client", "kill", "type", "normal"]);
        let why = "authentication failed: check REDIS_USERNAME and REDIS_PASSWORD";
        until_down(&service, why).await;
        fs::write(file.path(), text("c4nary-new")).expect("a file");
        service.until_ready().await;
        assert_eq!(service.get("/").await.json()["redis_status"], "ok");
        fs::remove_file(file.path()).expect("a file");
        redis(port, "c4nary-new", &["client", "kill", "type", "normal"]);
        let line = until_down(&service, "cannot be read").await;
        let tried = format!("tried with a password at 127.0.0.1:{port}, without TLS");
        assert!(line.contains(variable) && line.contains(&tried), "{line}");
        // A pipe without a writer blocks no later read.
        let made = Command::new("mkfifo").arg(path).status().unwrap();
        assert!(made.success());
        redis(port, "c4nary-new", &["client", "kill", "type", "normal"]);
        until_down(
            &service,
            &format!("{variable} ({path}) is not a regular file"),
        )
        .await;
        fs::remove_file(path).expect("a pipe");
        fs::write(path, text("c4nary-new")).expect("a file");
        eventually("Redis counts again", SOON, async || {
            service.get("/").await.json()["redis_status"] == "ok"
        })
        .await;
        redis(port, "c4nary-new", &["config", "set", "requirepass", ""]);
        service.stop().await;
        assert!(!service.printed().contains(CANARY));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn refusal_says_what_was_tried_and_what_to_check() {
    let world = World::new();
    let port = world.redis.port();
    let place = format!("at 127.0.0.1:{port}, without TLS");
    let as_reader = format!("sent as reader {place}");
    let acl = ["acl", "setuser", "reader", "on", ">c4nary", "+get", "~*"];
    let cluster = World::with_redis(RedisOptions {
        config: vec![("cluster-enabled".to_owned(), "yes".to_owned())],
        ..RedisOptions::default()
    });
    let replica = World::new();
    replica
        .redis_says::<String>(&["REPLICAOF", "127.0.0.1", "1"])
        .await;
    redis(port, "", &acl);
    let user = [("REDIS_USERNAME", "reader"), ("REDIS_PASSWORD", CANARY)];
    let unknown = [("REDIS_USERNAME", "unknown"), ("REDIS_PASSWORD", CANARY)];
    for (world, given, expected) in [
        (
            &world,
            &unknown[..],
            ["WRONGPASS", "tried as unknown", &place],
        ),
        (&world, &user, ["NOPERM", "ACL SETUSER", &as_reader]),
        (
            &world,
            &[("REDIS_PASSWORD", CANARY)],
            ["the server has no password", "unset REDIS_PASSWORD", &place],
        ),
        (
            &cluster,
            &[],
            ["CLUSTERDOWN", "Redis Cluster", "not supported"],
        ),
        (&replica, &[], ["READONLY", "replica", "name the primary"]),
    ] {
        assert_refused(world, given, &expected).await;
    }
    let cluster_url = format!("redis://127.0.0.1:{}/1", cluster.redis.port());
    let given = cluster.settings_but("REDIS_", &[("REDIS_URL", &cluster_url)]);
    let service = Service::start(&[given, settings(&PATIENT)].concat()).await;
    until_down(&service, "Redis Cluster").await;

    redis(port, "", &["config", "set", "requirepass", CANARY]);
    let expected = ["NOAUTH", "tried without a password", "set REDIS_PASSWORD"];
    assert_refused(&world, &[], &expected).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn refusal_of_a_command_says_what_to_check() {
    let world = World::with_redis(RedisOptions::default());
    let port = world.redis.port();
    let place = format!("without a password at 127.0.0.1:{port}, without TLS");
    let serve_no_stale_data = ["config", "set", "replica-serve-stale-data", "no"];
    for (commands, undo, expected) in [
        (
            vec![vec!["lpush", "visitas_home", "x"]],
            vec!["del", "visitas_home"],
            ["WRONGTYPE", "another program's value"],
        ),
        (
            vec![vec!["set", "visitas_home", "x"]],
            vec!["del", "visitas_home"],
            ["refused with ERR", "another program's value"],
        ),
        (
            vec![vec!["config", "set", "maxmemory", "1"]],
            vec!["config", "set", "maxmemory", "0"],
            ["OOM", "raise its maxmemory"],
        ),
        (
            vec![vec!["config", "set", "min-replicas-to-write", "1"]],
            vec!["config", "set", "min-replicas-to-write", "0"],
            ["NOREPLICAS", "min-replicas-to-write"],
        ),
        (
            vec![
                serve_no_stale_data.to_vec(),
                vec!["replicaof", "127.0.0.1", "1"],
            ],
            vec!["replicaof", "no", "one"],
            ["MASTERDOWN", "name the primary"],
        ),
    ] {
        for command in commands {
            redis(port, "", &command);
        }
        let service = world.start(&PATIENT).await;
        let line = until_down(&service, expected[0]).await;
        assert_plain(&line, &[expected[1], &place]);
        redis(port, "", &undo);
        service.until_ready().await;
    }
    // Clients beyond the limit are refused before they log in.
    redis(port, "", &["config", "set", "maxclients", "1"]);
    let client = redis::Client::open(world.redis.url()).expect("an address");
    let _only = client.get_multiplexed_async_connection().await;
    let service = world.start(&PATIENT).await;
    let line = until_down(&service, "tried without a password").await;
    assert_plain(&line, &[&place]);
}

#[tokio::test(flavor = "multi_thread")]
async fn another_program_at_the_address_is_explained() {
    let world = World::new();
    let other = world.serve().await;
    let greeting = listener_that(|mut stream| async move {
        stream.write_all(b"SSH-2.0-OpenSSH_9.2p1\r\n").await.ok();
        stream.read_u8().await.ok();
    });
    let end = listener_that(|mut stream| async move {
        stream.read_u8().await.ok();
    });
    let end_of_a_session = listener_that(|mut stream| async move {
        let mut ping = [0; b"*1\r\n$4\r\nPING\r\n".len()];
        stream.read_exact(&mut ping).await.ok();
        stream.write_all(b"+PONG\r\n").await.ok();
        stream.read_u8().await.ok();
    });
    let no_redis = "check that Redis is running there, and REDIS_HOST and REDIS_PORT";
    let closed = "the server closed the connection; ";
    let postgres = world.postgres.port();
    for (scheme, port, expected) in [
        (
            "redis",
            other.address.port(),
            ["does not answer as Redis does", no_redis],
        ),
        (
            "redis",
            greeting.await,
            ["tried without a password", "that Redis is"],
        ),
        (
            "redis",
            postgres,
            [closed, "that Redis is what listens there"],
        ),
        ("rediss", postgres, [closed, "the port is the one for TLS"]),
        ("rediss", end.await, [closed, "the port is the one for TLS"]),
        (
            "rediss",
            other.address.port(),
            ["does not speak TLS", "a redis:// URL"],
        ),
        (
            "redis",
            end_of_a_session.await,
            [closed, "sent without a password at"],
        ),
        ("redis", 1, ["refused", no_redis]),
    ] {
        let url = format!("{scheme}://127.0.0.1:{port}");
        let given = world.settings_but("REDIS_", &[("REDIS_URL", &url)]);
        let service = Service::start(&[given, settings(&PATIENT)].concat()).await;
        let line = until_down(&service, expected[0]).await;
        let tls = if scheme == "redis" { "without" } else { "with" };
        let place = format!("without a password at 127.0.0.1:{port}, {tls} TLS");
        assert_plain(&line, &[expected[1], &place]);
    }
    let given = world.settings_but("REDIS_", &[("REDIS_HOST", "/nonexistent/redis.sock")]);
    let service = Service::start(&given).await;
    let line = until_down(&service, "its unixsocket is this path").await;
    assert_plain(
        &line,
        &["tried without a password at /nonexistent/redis.sock"],
    );
    assert!(!line.contains("rediss"), "{line}");
}

#[tokio::test(flavor = "multi_thread")]
async fn certificate_that_has_expired_is_named_by_one_line() {
    let folder = open_folder();
    let authority_key = rcgen::KeyPair::generate().expect("a key");
    let mut authority = rcgen::CertificateParams::default();
    authority.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let root = authority.self_signed(&authority_key).expect("a root");
    let key = rcgen::KeyPair::generate().expect("a key");
    let mut server = rcgen::CertificateParams::new(["localhost".to_owned()]).expect("a name");
    server.not_after = rcgen::date_time_ymd(2020, 1, 1);
    let issuer = rcgen::Issuer::new(authority, authority_key);
    let certificate = server.signed_by(&key, &issuer).expect("a certificate");
    let text = |name: &str, text: String| {
        let path = folder.path().join(name);
        fs::write(&path, text).expect("a file");
        set_mode(&path, 0o644);
        path.to_str().expect("a path of ASCII").to_owned()
    };
    let ca = text("root.pem", root.pem());
    let world = World::with_redis(RedisOptions {
        tls: true,
        config: vec![
            (
                "tls-cert-file".to_owned(),
                text("cache.pem", certificate.pem()),
            ),
            (
                "tls-key-file".to_owned(),
                text("cache.key", key.serialize_pem()),
            ),
        ],
        ..RedisOptions::default()
    });
    let url = format!("rediss://localhost:{}", world.redis.port());
    let given = world.settings_but("REDIS_", &[("REDIS_URL", &url), ("REDIS_TLS_CA", &ca)]);
    let service = Service::start(&[given, settings(&PATIENT)].concat()).await;
    let line = until_down(&service, "has expired (invalid peer certificate: Expired)").await;
    assert_plain(
        &line,
        &[
            "tried without a password at localhost:",
            "with TLS",
            "clock",
        ],
    );
    // The driver's text has the time, which would be a new reason each second.
    assert!(!line.contains("verification time"), "{line}");
}

#[tokio::test(flavor = "multi_thread")]
async fn sentinel_is_named_in_the_log() {
    let folder = open_folder();
    let file = folder.path().join("sentinel.conf");
    let port = free_address().expect("a free port").port();
    fs::write(&file, format!("bind 127.0.0.1\nport {port}\n")).expect("a file");
    let mut command = lab::process::command("redis-server");
    command.arg(&file).arg("--sentinel");
    let _sentinel = Process::start(command, &folder.path().join("log")).expect("a Sentinel");
    let world = World::new();
    let port = port.to_string();
    for (number, command) in [("0", "INCRBY"), ("1", "SELECT")] {
        let url = format!("redis://127.0.0.1:{port}/{number}");
        let given = world.settings_but("REDIS_", &[("REDIS_URL", &url)]);
        let service = Service::start(&[given, settings(&PATIENT)].concat()).await;
        // The first attempts can be before it listens.
        until_down(&service, "Redis Sentinel (port 26379) is not supported").await;
        assert_eq!(
            service.get("/").await.json()["redis_status"],
            "erro",
            "{command}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn server_that_repeats_the_login_shows_no_password() {
    let echo = listener_that(|mut stream| async move {
        let mut request = [0; 1024];
        while let Ok(1..) = stream.read(&mut request).await {
            let reply = b"-ERR unknown command 'AUTH', with args beginning with: 'c4nary'\r\n";
            stream.write_all(reply).await.ok();
        }
    });
    let port = echo.await.to_string();
    let world = World::new();
    let given = [
        ("REDIS_HOST", "127.0.0.1"),
        ("REDIS_PORT", &*port),
        ("REDIS_PASSWORD", CANARY),
        ("RUST_LOG", "trace"),
    ];
    let service = Service::start(&world.settings_but("REDIS_", &given)).await;
    until_down(&service, "refused with ERR").await;
    service.stop().await;
    assert!(!service.printed().contains(CANARY));
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_on_one_side_only_is_explained() {
    for (tls, scheme, hint) in [
        (true, "redis", "needs a rediss:// URL"),
        (false, "rediss", "one for TLS"),
    ] {
        let world = World::with_redis(RedisOptions {
            tls,
            ..RedisOptions::default()
        });
        let url = format!("{scheme}://127.0.0.1:{}", world.redis.port());
        let given = world.settings_but("REDIS_", &[("REDIS_URL", &url)]);
        let timeout = settings(&[("REDIS_TIMEOUT", "500ms")]);
        let service = Service::start(&[given, timeout].concat()).await;
        until_down(&service, hint).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn client_certificate_of_the_recipe_is_sent_and_read_again() {
    let folder = open_folder();
    let made = Command::new("sh")
        .args(["-ec", &documented_block("openssl req -x509")])
        .current_dir(folder.path())
        .output()
        .expect("a shell");
    assert!(made.status.success(), "{made:?}");
    let file = |name: &str| folder.path().join(name);
    let text = |name: &str| file(name).to_str().expect("a path of ASCII").to_owned();
    for name in ["authority.pem", "cache.pem", "cache.key"] {
        set_mode(&file(name), 0o644);
    }
    let world = World::with_redis(RedisOptions {
        tls: true,
        config: vec![
            ("tls-cert-file".to_owned(), text("cache.pem")),
            ("tls-key-file".to_owned(), text("cache.key")),
            ("tls-ca-cert-file".to_owned(), text("authority.pem")),
            ("tls-auth-clients".to_owned(), "yes".to_owned()),
        ],
        ..RedisOptions::default()
    });
    let url = format!("rediss://localhost:{}", world.redis.port());
    let ca = text("authority.pem");
    let mut given = world.settings_but("REDIS_", &[("REDIS_URL", &url), ("REDIS_TLS_CA", &ca)]);
    given.extend(settings(&PATIENT));
    let without = Service::start(&given).await;
    until_down(&without, "REDIS_TLS_CERT and REDIS_TLS_KEY").await;

    // A certificate that the server does not trust, until its files are replaced.
    let (certificate, key) = (file("current.pem"), file("current.key"));
    let stranger =
        rcgen::generate_simple_self_signed(["visitas".to_owned()]).expect("a certificate");
    fs::write(&certificate, stranger.cert.pem()).expect("a file");
    fs::write(&key, stranger.signing_key.serialize_pem()).expect("a file");
    given.extend(settings(&[
        ("REDIS_TLS_CERT", certificate.to_str().expect("ASCII")),
        ("REDIS_TLS_KEY", key.to_str().expect("ASCII")),
    ]));
    let service = Service::start(&given).await;
    until_down(&service, "REDIS_TLS_CERT and REDIS_TLS_KEY").await;
    fs::copy(file("visitas.pem"), &certificate).expect("a copy");
    fs::copy(file("visitas.key"), &key).expect("a copy");
    service.until_ready().await;
    assert_eq!(service.get("/").await.json()["redis_status"], "ok");
}

/// The line of `docs/connecting.md` that begins like this.
fn documented(beginning: &str) -> String {
    let document = include_str!("../../docs/connecting.md");
    let line = document.lines().find(|line| line.starts_with(beginning));
    line.expect("a documented command").to_owned()
}

/// The block of code in `docs/connecting.md` that contains this.
fn documented_block(part: &str) -> String {
    let document = include_str!("../../docs/connecting.md");
    let (_, section) = document
        .split_once("### Client certificates of Redis")
        .expect("a section");
    let mut blocks = section.split("```sh\n").skip(1);
    let block = blocks.find_map(|block| {
        let (block, _) = block.split_once("```")?;
        block.contains(part).then(|| block.to_owned())
    });
    block.expect("a documented recipe")
}

/// Checks that the line has these parts and none twice, and none of the driver's own words.
fn assert_plain(line: &str, parts: &[&str]) {
    for part in parts {
        assert!(line.contains(part), "{part} in {line}");
    }
    let driver = [
        "broken pipe",
        "NoPerm",
        "docs.rs",
        "early eof",
        "Incompatible",
    ];
    for word in driver {
        assert!(!line.contains(word), "{word} in {line}");
    }
    let mut seen = std::collections::BTreeSet::new();
    let texts = line.split("; ").flat_map(|text| text.split(": "));
    for text in texts {
        assert!(seen.insert(text), "{text} twice in {line}");
    }
}

/// The port of a program that does this with each connection, and then closes it.
async fn listener_that<F>(serve: impl Fn(TcpStream) -> F + Send + 'static) -> u16
where
    F: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("an address").port();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(serve(stream));
        }
    });
    port
}

async fn assert_refused(world: &World, given: &[(&str, &str)], expected: &[&str]) {
    let all = [&PATIENT[..], given].concat();
    let service = world.start(&all).await;
    let line = until_down(&service, expected[0]).await;
    for part in expected {
        assert!(line.contains(part), "{part} in {line}");
    }
    assert_eq!(service.get("/").await.json()["redis_status"], "erro");
    service.stop().await;
    assert!(!service.printed().contains(CANARY));
}

/// Waits until the log says that Redis is down for this reason, and returns the reason.
async fn until_down(service: &Service, why: &str) -> String {
    let reasons = || -> Vec<String> {
        let lines = ["store is down", "store is still down"].map(|message| service.logged(message));
        let lines = lines.into_iter().flatten();
        lines
            .filter(|line| line["store"] == "redis")
            .map(|line| line["error"].to_string())
            .collect()
    };
    eventually(&format!("Redis is down: {why}"), SOON, async || {
        service.get("/").await;
        reasons().iter().any(|reason| reason.contains(why))
    })
    .await;
    let found = reasons().into_iter().rfind(|reason| reason.contains(why));
    found.expect("a reason")
}

/// Sends a command by another client.
fn redis(port: u16, password: &str, command: &[&str]) {
    let mut client = Command::new("redis-cli");
    client.args(["-p", &port.to_string()]);
    if !password.is_empty() {
        client.env("REDISCLI_AUTH", password);
    }
    let ended = client.args(command).output().expect("redis-cli");
    let reply = String::from_utf8(ended.stdout).expect("text");
    assert!(
        ended.status.success() && !reply.contains("ERR"),
        "{command:?}: {reply}"
    );
}

/// A folder that every account can read.
fn open_folder() -> TempDir {
    let folder = TempDir::new().expect("a folder");
    set_mode(folder.path(), 0o777);
    folder
}

fn set_mode(path: &Path, mode: u32) {
    use std::os::unix::fs::PermissionsExt as _;
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("a mode");
}
