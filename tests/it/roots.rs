//! Which authorities are trusted: those of the system and, for Postgres alone, those of
//! `DB_SSLROOTCERT` instead. psql is the reference: what it refuses is not accepted.

use std::fs::{self, File};
use std::os::fd::AsRawFd as _;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use devstack::{PostgresOptions, RedisOptions};
use rcgen::{
    BasicConstraints, CertificateParams, CidrSubnet, CustomExtension, DnType,
    ExtendedKeyUsagePurpose, GeneralSubtree, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    NameConstraints, SerialNumber, date_time_ymd,
};
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::Value;
use tempfile::{NamedTempFile, TempDir};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use crate::support::collector::Collector;
use crate::support::{Ended, SOON, Service, World, eventually, program, settings};

#[tokio::test(flavor = "multi_thread")]
async fn authority_of_the_system_is_refused_where_the_database_has_its_own() {
    let world = encrypting();
    let (signer, other) = (path(world.postgres.ca()), path(world.redis.ca()));
    for (mode, host) in [
        // The certificate is for another host.
        ("verify-ca", "127.0.0.2"),
        ("verify-full", "127.0.0.1"),
    ] {
        psql(&world, host, mode, signer).expect("psql accepts the right authority");
        let refusal = psql(&world, host, mode, other).expect_err("psql accepts any authority");
        assert!(refusal.contains("SSL error"), "{refusal}");

        let url = format!(
            "postgres://{}:{}@{host}:{}/{}?sslmode={mode}&sslrootcert={other}",
            devstack::USER,
            devstack::PASSWORD,
            world.postgres.port(),
            world.database,
        );
        let by_url = world.settings_but("DB_", &[("DATABASE_URL", &url)]);
        let by_parts = world.settings_but(
            "DB_HOST",
            &[
                ("DB_HOST", host),
                ("DB_SSLMODE", mode),
                ("DB_SSLROOTCERT", other),
            ],
        );
        for given in [by_url, by_parts] {
            let all = [given, settings(&PATIENT), system(signer)].concat();
            let service = Service::start(&all).await;
            until_down(&service, "postgresql", REFUSED).await;
            let hasty = settings(&[("DB_TIMEOUT", "3s"), ("REDIS_TIMEOUT", "1s")]);
            for command in ["migrate", "recount", "reconcile"] {
                let ended = Ended::of(&[command], &[&all[..], &hasty].concat()).await;
                assert_eq!(ended.code, Some(1), "{ended:?}");
                assert!(ended.errors.contains(REFUSED), "{ended:?}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn authorities_of_the_system_are_trusted_for_postgres_by_default() {
    let world = encrypting();
    let system = system(path(world.postgres.ca()));
    for mode in ["verify-ca", "verify-full"] {
        let mode = [("DB_SSLMODE", mode)];
        let all = [world.settings(), settings(&PATIENT), settings(&mode)].concat();
        let service = Service::start(&[all.clone(), system.clone()].concat()).await;
        until_up(&service, "postgresql").await;
        let service = Service::start(&all).await;
        until_down(&service, "postgresql", REFUSED).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_trusts_the_authorities_of_the_system_and_not_those_of_the_database() {
    let world = encrypting();
    let (database, cache) = (path(world.postgres.ca()), path(world.redis.ca()));
    let all = |system: Vec<(String, String)>, roots| {
        let given = [
            ("REDIS_URL", &*world.redis.url()),
            ("DB_SSLMODE", "verify-full"),
            ("DB_SSLROOTCERT", roots),
        ];
        let ours = world.settings_but("REDIS_", &given);
        [ours, settings(&PATIENT), system].concat()
    };
    // A directory works, too, and so does a file outside the usual places.
    let directories = directories(&[Some(Path::new(cache)), None]);
    for (system, visit) in [(system(cache), 1), (directories.1, 2)] {
        let service = Service::start(&all(system, database)).await;
        service.until_ready().await;
        assert_eq!(service.visit().await, (visit, visit));
    }
    let service = Service::start(&all(system(database), cache)).await;
    until_down(&service, "redis", REFUSED).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn exporter_trusts_the_authorities_of_the_system_and_not_those_of_the_database() {
    let world = encrypting();
    let (database, cache) = (path(world.postgres.ca()), path(world.redis.ca()));
    let collector = Collector::start().await;
    let start = async |collector: &Collector, system_roots, roots| {
        let endpoint = encrypted(collector, world.redis.folder()).await;
        let given = settings(&[
            ("DB_SSLMODE", "verify-full"),
            ("DB_SSLROOTCERT", roots),
            ("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint),
            ("OTEL_BSP_SCHEDULE_DELAY", "20"),
        ]);
        let ours = [world.settings_but("REDIS_", &[]), given];
        let all = [
            &ours.concat()[..],
            &settings(&PATIENT),
            &system(system_roots),
        ]
        .concat();
        Service::start(&all).await
    };
    let service = start(&collector, cache, database).await;
    until_up(&service, "postgresql").await;
    eventually("a span arrives", SOON, async || {
        service.get("/").await;
        !collector.spans().is_empty()
    })
    .await;

    let refused = Collector::start().await;
    let service = start(&refused, database, cache).await;
    service.get("/").await;
    eventually("the exporter refuses the collector", SOON, async || {
        let lines = service.logged("span export failing");
        lines
            .iter()
            .any(|line| line["error"].to_string().contains(REFUSED))
    })
    .await;
    assert!(refused.spans().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn spans_reach_an_unencrypted_collector_where_the_system_has_no_authority() {
    let world = encrypting();
    let collector = Collector::start().await;
    let given = [
        ("DB_SSLMODE", "verify-full"),
        ("DB_SSLROOTCERT", path(world.postgres.ca())),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", &collector.endpoint()),
        ("OTEL_BSP_SCHEDULE_DELAY", "20"),
    ];
    let ours = world.settings_but("REDIS_", &given);
    let service = Service::start(&[ours, settings(&PATIENT), system("/dev/null")].concat()).await;
    eventually("a span arrives", SOON, async || {
        service.get("/").await;
        !collector.spans().is_empty()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn authority_or_chain_that_psql_refuses_is_not_accepted() {
    let world = encrypting();
    let files = Chain::new(world.postgres.folder());
    let expired = |params: &mut CertificateParams| params.not_after = date_time_ymd(2020, 1, 1);
    let unborn = |params: &mut CertificateParams| params.not_before = date_time_ymd(2100, 1, 1);
    let no_authority = |params: &mut CertificateParams| params.is_ca = IsCa::ExplicitNoCa;
    let root = Authority::root("root", |_| {});
    let middle = root.signs("middle", |_| {});
    let (late, early) = (
        Authority::root("late", expired),
        Authority::root("early", unborn),
    );
    let (plain, stranger) = (
        Authority::root("plain", no_authority),
        Authority::root("root", |_| {}),
    );
    let old_middle = root.signs("old middle", expired);
    let broken = "-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n";
    let accepts = async |trusted: &[&str], signer: &Authority, above: &[&str]| {
        let (psql, ours) = accepts(&world, &files, trusted, signer, above).await;
        assert!(psql || !ours, "psql refuses what is accepted here");
        (psql, ours)
    };
    let both = (true, true);
    let neither = (false, false);
    assert_eq!(accepts(&[&root.pem], &root, &[]).await, both);
    assert_eq!(accepts(&[&root.pem], &middle, &[&middle.pem]).await, both);
    assert_eq!(accepts(&[&middle.pem, &root.pem], &middle, &[]).await, both);
    assert_eq!(accepts(&[&plain.pem, &root.pem], &root, &[]).await, both);
    assert_eq!(accepts(&[&late.pem, &root.pem], &root, &[]).await, both);
    assert_eq!(accepts(&[&root.pem], &middle, &[]).await, neither);
    assert_eq!(accepts(&[&stranger.pem], &root, &[]).await, neither);
    assert_eq!(accepts(&[&middle.pem], &middle, &[]).await, neither);
    assert_eq!(
        accepts(&[&middle.pem], &middle, &[&middle.pem, &root.pem]).await,
        neither
    );
    assert_eq!(accepts(&[&late.pem], &late, &[]).await, neither);
    assert_eq!(accepts(&[&early.pem], &early, &[]).await, neither);
    assert_eq!(accepts(&[&plain.pem], &plain, &[]).await, neither);
    assert_eq!(
        accepts(&[&root.pem, &old_middle.pem], &old_middle, &[]).await,
        neither
    );
    assert_eq!(accepts(&[&root.pem, broken], &root, &[]).await, neither);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes long: make faults"]
async fn authority_that_psql_refuses_for_its_purpose_or_issuer_is_not_accepted() {
    let world = encrypting();
    let files = Chain::new(world.postgres.folder());
    let root = Authority::root("root", |_| {});
    let middle = root.signs("middle", |_| {});
    // Each can be the root itself, or stand between the server's certificate and the root.
    let kinds: [(&str, Change); 10] = [
        ("plain", |_| {}),
        ("names its issuer's key", |params| {
            params.use_authority_key_identifier_extension = true;
        }),
        ("signs certificates", |params| {
            params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        }),
        ("signs no certificates", for_lists_only),
        ("names another's key", by_another_key),
        ("for servers", |params| {
            params.extended_key_usages = vec![
                ExtendedKeyUsagePurpose::ClientAuth,
                ExtendedKeyUsagePurpose::ServerAuth,
            ];
        }),
        ("for clients", |params| {
            params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        }),
        ("for anything", |params| {
            params.extended_key_usages = vec![ExtendedKeyUsagePurpose::Any];
        }),
        ("unknown", |params| {
            let mut unknown = CustomExtension::from_oid_content(&[1, 2, 3, 4], vec![5, 0]);
            unknown.set_criticality(true);
            params.custom_extensions = vec![unknown];
        }),
        ("no room", |params| {
            params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        }),
    ];
    let fit = [
        "plain",
        "names its issuer's key",
        "signs certificates",
        "for servers",
        "no room",
    ];
    let mut wrong = Vec::new();
    let mut check = async |what: String, expected, trusted: &[&str], signer: &Authority| {
        let found = accepts(&world, &files, trusted, signer, &[]).await;
        if found != (expected, expected) {
            wrong.push((what, found));
        }
    };
    for (kind, change) in kinds {
        let fits = fit.contains(&kind);
        let alone = Authority::root(kind, change);
        check(format!("{kind}: alone"), fits, &[&alone.pem], &alone).await;
        let between = root.signs(kind, change);
        let given = [&*root.pem, &between.pem];
        check(format!("{kind}: between"), fits, &given, &between).await;
        let below = alone.signs("below", |_| {});
        let given = [&*below.pem, &alone.pem];
        let fits = fits && kind != "no room";
        check(format!("{kind}: above"), fits, &given, &below).await;
        let below = between.signs("below", |_| {});
        let given = [&*below.pem, &root.pem, &between.pem];
        check(format!("{kind}: amid"), fits, &given, &below).await;
    }
    for (room, fits) in [(0, false), (1, false), (2, true)] {
        let root = Authority::root("root", |params| {
            params.is_ca = IsCa::Ca(BasicConstraints::Constrained(room));
        });
        let first = root.signs("first", |_| {});
        let second = first.signs("second", |_| {});
        let given = [&*second.pem, &first.pem, &root.pem];
        check(format!("room for {room}"), fits, &given, &second).await;
    }
    // The names lead to a root, and the signatures do not.
    let stranger = Authority::root("root", |_| {});
    let false_middle = stranger.signs("middle", |_| {});
    let given = [&*root.pem, &false_middle.pem];
    check("forged".to_owned(), false, &given, &false_middle).await;
    let false_below = false_middle.signs("below", |_| {});
    let given = [&*root.pem, &middle.pem, &false_below.pem];
    check("forged below".to_owned(), false, &given, &false_below).await;
    // It has its issuer's name, but the key of another signed it, as its key identifier says.
    let renewed = root.signs("root", |params| {
        params.use_authority_key_identifier_extension = true;
    });
    check("renewed".to_owned(), false, &[&renewed.pem], &renewed).await;
    // The root's names exclude the server's.
    let elsewhere = Authority::root("elsewhere", |params| {
        let network = CidrSubnet::V4([10, 0, 0, 0], [255, 0, 0, 0]);
        params.name_constraints = Some(NameConstraints {
            permitted_subtrees: vec![GeneralSubtree::IpAddress(network)],
            excluded_subtrees: Vec::new(),
        });
    });
    let below = elsewhere.signs("below", |_| {});
    let given = [&*elsewhere.pem, &below.pem];
    check("elsewhere".to_owned(), false, &given[..1], &elsewhere).await;
    check("below elsewhere".to_owned(), false, &given, &below).await;
    assert!(wrong.is_empty(), "(psql, here): {wrong:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn authority_that_names_another_serial_number_than_its_issuers_is_not_accepted() {
    let world = encrypting();
    let files = Chain::new(world.postgres.folder());
    let root = Authority::root("root", |params| {
        params.serial_number = Some(SerialNumber::from(vec![7]));
    });
    for (number, fits) in [(7, true), (8, false)] {
        let below = root.signs("below", |params| by_number(params, number));
        let found = accepts(&world, &files, &[&root.pem, &below.pem], &below, &[]).await;
        assert_eq!(found, (fits, fits), "{number}");
    }
}

/// `SECURITY.md` lists these cases: only rustls checks the certificates that the server sends.
#[tokio::test(flavor = "multi_thread")]
async fn chains_that_only_psql_refuses_are_those_that_security_names() {
    let world = encrypting();
    let mut files = Chain::new(world.postgres.folder());
    let root = Authority::root("root", |_| {});
    let short = Authority::root("short", |params| {
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    });
    let only_ours = (false, true);
    for (root, middle) in [
        (&short, short.signs("too long", |_| {})),
        (&root, root.signs("signs no certificates", for_lists_only)),
        (&root, root.signs("another's", by_another_key)),
    ] {
        let found = accepts(&world, &files, &[&root.pem], &middle, &[&middle.pem]).await;
        assert_eq!(found, only_ours);
    }
    for change in [for_lists_only, by_another_key] {
        files.change = change;
        let found = accepts(&world, &files, &[&root.pem], &root, &[]).await;
        assert_eq!(found, only_ours);
    }
    files.change = |_| {};
    // psql uses the first certificate with the name.
    let namesake = Authority::root("root", |_| {});
    let found = accepts(&world, &files, &[&namesake.pem, &root.pem], &root, &[]).await;
    assert_eq!(found, only_ours);
}

#[tokio::test(flavor = "multi_thread")]
async fn authority_removed_from_the_file_is_not_trusted_by_new_sessions() {
    let world = encrypting();
    let authority = fs::read_to_string(path(world.postgres.ca())).expect("PEM");
    let other = fs::read_to_string(path(world.redis.ca())).expect("PEM");
    let trusted = file(&authority);
    let trusted = trusted.path();
    let given = [
        ("DB_SSLMODE", "verify-full"),
        ("DB_SSLROOTCERT", path(Some(trusted))),
    ];
    let ours = world.settings_but("REDIS_", &given);
    let service = Service::start(&[ours, settings(&PATIENT)].concat()).await;
    let all_sessions_end = async || {
        world
            .sql("select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'visitas'")
            .await;
    };
    let psql_accepts = || psql(&world, "127.0.0.1", "verify-full", path(Some(trusted))).is_ok();
    for end in [Some(&other), None] {
        fs::write(trusted, &authority).expect("a file");
        until_up(&service, "postgresql").await;
        assert!(psql_accepts());
        match end {
            Some(other) => fs::write(trusted, other),
            None => fs::remove_file(trusted),
        }
        .expect("a file that changes");
        all_sessions_end().await;
        eventually("Postgres is down", SOON, async || {
            service.get("/").await.status == 503
        })
        .await;
        let failures = || service.metric(FAILURES);
        let before = failures().await;
        eventually("it stays down over some probes", SOON, async || {
            failures().await > before.map(|before| before + 3.0)
        })
        .await;
        assert_eq!(service.get("/").await.status, 503);
        assert_eq!(sessions(&world).await, 0);
        assert!(!psql_accepts());
    }
    fs::write(trusted, &authority).expect("a file");
    until_up(&service, "postgresql").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_works_without_the_certificates_of_the_database() {
    let world = encrypting();
    let trusted = file(&fs::read_to_string(path(world.postgres.ca())).expect("PEM"));
    let given = [
        ("DB_SSLMODE", "verify-full"),
        ("DB_SSLROOTCERT", path(Some(trusted.path()))),
        ("REDIS_URL", &world.redis.url()),
        ("REDIS_TLS_CA", path(world.redis.ca())),
    ];
    let ours = world.settings_but("REDIS_", &given);
    let service = Service::start(&[ours, settings(&PATIENT)].concat()).await;
    service.until_ready().await;
    trusted.close().expect("the file is gone");
    world.redis.restart().expect("Redis comes back");
    eventually("Redis is back", SOON, async || {
        service.get("/").await.json()["redis_status"] == "ok"
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn process_keeps_its_name_id_and_arguments() {
    let world = encrypting();
    let given = [
        ("DB_SSLMODE", "verify-full"),
        ("DB_SSLROOTCERT", path(world.postgres.ca())),
    ];
    let service =
        Service::start(&[world.settings_but("REDIS_", &given), settings(&PATIENT)].concat()).await;
    let read = |name| {
        let bytes = fs::read(format!("/proc/{}/{name}", service.pid())).expect("a process");
        String::from_utf8(bytes).expect("text")
    };
    assert_eq!(read("comm"), "visitas\n");
    let program = env!("CARGO_BIN_EXE_visitas");
    assert_eq!(read("cmdline"), format!("{program}\0serve\0"));
    assert!(read("environ").contains("SSL_CERT_FILE=/dev/null\0"));
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn program_whose_file_was_deleted_can_restart_itself() {
    let world = encrypting();
    let copy = TempDir::new().expect("a directory");
    let copied = copy.path().join("visitas");
    // Copied by another process: a program that another test starts from this one would inherit the
    // open file, and a file open for writing cannot be executed.
    let copying = Command::new("cp")
        .arg(env!("CARGO_BIN_EXE_visitas"))
        .arg(&copied)
        .status();
    assert!(copying.is_ok_and(|status| status.success()), "a copy");
    let program_of_the_copy = File::open(&copied).expect("the copy");
    fs::remove_file(&copied).expect("the copy is gone");
    let given = [
        ("DB_SSLMODE", "verify-full"),
        ("DB_SSLROOTCERT", path(world.postgres.ca())),
    ];
    let all = [world.settings_but("REDIS_", &given), settings(&PATIENT)].concat();
    let mut command = Command::new(format!("/proc/self/fd/{}", program_of_the_copy.as_raw_fd()));
    command.env_clear().envs(
        program(&[], &all)
            .get_envs()
            .filter_map(|(name, value)| Some((name, value?))),
    );
    let service = Service::spawn(command).await;
    until_up(&service, "postgresql").await;
    service.stop().await;
}

#[tokio::test]
async fn program_restarts_itself_at_most_once() {
    let trusted = file(&Authority::root("root", |_| {}).pem);
    let given = [
        ("DB_SSLMODE", "verify-full"),
        ("DB_SSLROOTCERT", path(Some(trusted.path()))),
        ("VISITAS_SYSTEM_CERT_DIR", ""),
    ];
    for command in ["serve", "migrate", "recount", "reconcile"] {
        let ended = Ended::of(&[command], &settings(&given)).await;
        assert_eq!((ended.code, &*ended.output), (Some(1), ""), "{ended:?}");
        assert!(
            ended.error().contains("VISITAS_SYSTEM_CERT_DIR"),
            "{ended:?}"
        );
    }
    for command in ["config", "--help"] {
        let ended = Ended::of(&[command], &settings(&given)).await;
        assert_eq!((ended.code, &*ended.errors), (Some(0), ""), "{ended:?}");
    }
}

// --- wiring ---

/// As in `tls`: timeouts long enough for a handshake on a busy machine.
const PATIENT: [(&str, &str); 3] = [
    ("REDIS_TIMEOUT", "5s"),
    ("DB_TIMEOUT", "10s"),
    ("VISIT_TIMEOUT", "15s"),
];

/// The beginning of all reasons: the authorities of two servers have the same name, so the reason can
/// be an unknown issuer or a bad signature.
const REFUSED: &str = "invalid peer certificate";

/// Calls that Postgres refused, or that did not reach it.
const FAILURES: &str = "visitas_store_calls_total{db_system_name=\"postgresql\",\
                        db_operation_name=\"SELECT\",outcome=\"error\"}";

/// A Postgres that also listens on an address that its certificate does not name, and a Redis. Both
/// use TLS, each with its own authority.
fn encrypting() -> World {
    let addresses = "127.0.0.1,127.0.0.2";
    World::with(
        PostgresOptions {
            config: vec![("listen_addresses".to_owned(), addresses.to_owned())],
            tls: true,
            ..PostgresOptions::default()
        },
        RedisOptions {
            tls: true,
            ..RedisOptions::default()
        },
    )
}

/// The setting for the system's authorities.
fn system(file: &str) -> Vec<(String, String)> {
    settings(&[("SSL_CERT_FILE", file)])
}

/// Directories with at most one file each, and the setting that names them.
fn directories(files: &[Option<&Path>]) -> (Vec<TempDir>, Vec<(String, String)>) {
    let directories: Vec<_> = files
        .iter()
        .map(|file| {
            let directory = TempDir::new().expect("a directory");
            if let Some(file) = file {
                fs::copy(file, directory.path().join("ca.pem")).expect("a copy");
            }
            directory
        })
        .collect();
    let joined = std::env::join_paths(directories.iter().rev().map(TempDir::path));
    let joined = joined.expect("paths").into_string().expect("text");
    (directories, settings(&[("SSL_CERT_DIR", &joined)]))
}

/// Whether psql opens a session.
fn psql(world: &World, host: &str, mode: &str, trusted: &str) -> Result<String, String> {
    let database = &world.database;
    let connection = format!("host={host} dbname={database} sslmode={mode} sslrootcert={trusted}");
    let result = world.postgres.sql(&connection, "select 1");
    result.map_err(|error| error.to_string())
}

async fn until_up(service: &Service, store: &str) {
    let series = format!("visitas_dependency_up{{db_system_name=\"{store}\"}}");
    eventually(&format!("{store} is up"), SOON, async || {
        service.metric(&series).await == Some(1.0)
    })
    .await;
}

async fn until_down(service: &Service, store: &str, why: &str) {
    let said = || -> Vec<Value> {
        let mut lines = service.logged("store is down");
        lines.retain(|line| line["store"] == store);
        lines
    };
    eventually(&format!("{store} is down"), SOON, async || {
        !said().is_empty()
    })
    .await;
    assert!(said()[0]["error"].to_string().contains(why), "{:?}", said());
}

/// The number of the service's sessions.
async fn sessions(world: &World) -> i64 {
    world
        .number("select count(*) from pg_stat_activity where application_name = 'visitas'")
        .await
}

/// The URL of a TLS proxy to a collector, with the server certificate in this folder.
async fn encrypted(collector: &Collector, server: &Path) -> String {
    let certificates = CertificateDer::pem_file_iter(server.join("server.pem")).expect("PEM");
    let key = PrivateKeyDer::from_pem_file(server.join("server.key")).expect("a key");
    rustls::crypto::ring::default_provider()
        .install_default()
        .ok();
    let config = ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(certificates.flatten().collect(), key)
        .expect("a certificate and its key");
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    let plain = collector.endpoint().replace("http://", "");
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (acceptor, plain) = (acceptor.clone(), plain.clone());
            tokio::spawn(async move {
                if let Ok(mut stream) = acceptor.accept(stream).await
                    && let Ok(mut onward) = TcpStream::connect(&plain).await
                {
                    tokio::io::copy_bidirectional(&mut stream, &mut onward)
                        .await
                        .ok();
                }
            });
        }
    });
    format!("https://{address}")
}

/// Whether psql and whether the program open a session, trusting these certificates, while the server
/// sends a certificate by the signer and those above it.
async fn accepts(
    world: &World,
    files: &Chain,
    trusted: &[&str],
    signer: &Authority,
    above: &[&str],
) -> (bool, bool) {
    files.install(world, signer, above).await;
    let trusted = file(&trusted.concat());
    let trusted = path(Some(trusted.path()));
    let psql = psql(world, "127.0.0.1", "verify-full", trusted);
    let given = [("DB_SSLMODE", "verify-full"), ("DB_SSLROOTCERT", trusted)];
    let ended = Ended::of(
        &["migrate"],
        &[world.settings(), settings(&given), settings(&PATIENT)].concat(),
    )
    .await;
    assert!(
        [Some(0), Some(1), Some(2)].contains(&ended.code),
        "{ended:?}"
    );
    assert!(!ended.errors.contains("panicked"), "{ended:?}");
    (psql.is_ok(), ended.code == Some(0))
}

/// A file that holds certificates.
fn file(pem: &str) -> NamedTempFile {
    let file = NamedTempFile::new().expect("a temporary file");
    fs::write(file.path(), pem).expect("certificates on the disk");
    file
}

fn path(path: Option<&Path>) -> &str {
    path.and_then(Path::to_str).expect("a path of ASCII")
}

/// A change to the parameters of a certificate.
type Change = fn(&mut CertificateParams);

/// A certificate that signs others, and its key.
struct Authority {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn params(name: &str, change: impl FnOnce(&mut CertificateParams)) -> CertificateParams {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        change(&mut params);
        params
    }

    fn root(name: &str, change: impl FnOnce(&mut CertificateParams)) -> Self {
        let (params, key) = (
            Self::params(name, change),
            KeyPair::generate().expect("a key"),
        );
        Self {
            pem: params.self_signed(&key).expect("a certificate").pem(),
            issuer: Issuer::new(params, key),
        }
    }

    fn signs(&self, name: &str, change: impl FnOnce(&mut CertificateParams)) -> Self {
        let (params, key) = (
            Self::params(name, change),
            KeyPair::generate().expect("a key"),
        );
        let signed = params.signed_by(&key, &self.issuer);
        Self {
            pem: signed.expect("a certificate").pem(),
            issuer: Issuer::new(params, key),
        }
    }
}

/// Allows the certificate to sign only revocation lists.
fn for_lists_only(params: &mut CertificateParams) {
    params.key_usages = vec![KeyUsagePurpose::CrlSign];
}

/// Makes the certificate name another key than its issuer's as the one that signed it.
fn by_another_key(params: &mut CertificateParams) {
    let key = vec![0x30, 0x06, 0x80, 0x04, 1, 2, 3, 4];
    let other = CustomExtension::from_oid_content(&AUTHORITY_KEY_IDENTIFIER, key);
    params.custom_extensions = vec![other];
}

/// Makes the certificate name its issuer's by this serial number.
fn by_number(params: &mut CertificateParams, number: u8) {
    let number = vec![0x30, 0x03, 0x82, 0x01, number];
    let named = CustomExtension::from_oid_content(&AUTHORITY_KEY_IDENTIFIER, number);
    params.custom_extensions = vec![named];
}

/// An extension's object identifier.
const AUTHORITY_KEY_IDENTIFIER: [u64; 4] = [2, 5, 29, 35];

/// The file of the certificates that Postgres sends, and its key.
struct Chain {
    file: std::path::PathBuf,
    key: KeyPair,
    change: Change,
}

impl Chain {
    fn new(server: &Path) -> Self {
        let key = fs::read_to_string(server.join("server.key")).expect("a key");
        Self {
            file: server.join("server.pem"),
            key: KeyPair::from_pem(&key).expect("a key"),
            change: |_| {},
        }
    }

    /// Makes Postgres send a certificate by this authority, and those above it.
    async fn install(&self, world: &World, signer: &Authority, above: &[&str]) {
        let mut params = CertificateParams::new(["127.0.0.1".to_owned()]).expect("a name");
        (self.change)(&mut params);
        let own = params
            .signed_by(&self.key, &signer.issuer)
            .expect("a certificate");
        fs::write(&self.file, format!("{}{}", own.pem(), above.concat())).expect("a file");
        let loaded = "select (extract(epoch from pg_conf_load_time()) * 1000000)::bigint";
        let before = world.number(loaded).await;
        world.sql("select pg_reload_conf()").await;
        eventually("Postgres has read its files again", SOON, async || {
            world.number(loaded).await > before
        })
        .await;
    }
}
