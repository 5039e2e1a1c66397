//! Encryption of the connections to both stores, and which certificates are trusted.

use std::path::Path;

use devstack::{PostgresOptions, RedisOptions};

use crate::support::{SOON, Service, World, eventually};

#[tokio::test]
async fn connections_to_postgres_are_encrypted_in_every_mode_that_asks_for_it() {
    let world = encrypting_postgres();
    let ca = text(world.postgres.ca());
    for (mode, trusted) in [
        ("prefer", None),
        ("require", None),
        ("verify-ca", Some(ca)),
        ("verify-full", Some(ca)),
    ] {
        let trusted = trusted.map(|ca| ("DB_SSLROOTCERT", ca));
        let settings: Vec<_> = [("DB_SSLMODE", mode)].into_iter().chain(trusted).collect();
        let service = world.serve_with(&settings).await;
        service.visit().await;
        assert_eq!(sessions(&world, false).await, 0, "{mode}");
        assert!(sessions(&world, true).await > 0, "{mode}");
        service.stop().await;
        eventually("its sessions end", SOON, async || {
            sessions(&world, true).await == 0
        })
        .await;
    }
}

#[tokio::test]
async fn mode_disable_is_unencrypted_although_postgres_offers_tls() {
    let world = encrypting_postgres();
    let service = world.serve_with(&[("DB_SSLMODE", "disable")]).await;
    service.visit().await;
    assert_eq!(sessions(&world, true).await, 0);
}

#[tokio::test]
async fn database_url_sets_mode_and_certificate() {
    let world = encrypting_postgres();
    let url = world.postgres.url(&world.database);
    let ca = text(world.postgres.ca());
    let start = async |query: &str| {
        let url = format!("{url}?{query}");
        let all = [&PATIENT[..], &[("DATABASE_URL", &url)]].concat();
        Service::start(&world.settings_but("DB_", &all)).await
    };
    let service = start("sslmode=disable").await;
    service.until_ready().await;
    assert_eq!(sessions(&world, true).await, 0);
    let service = start(&format!("sslmode=verify-full&sslrootcert={ca}")).await;
    service.until_ready().await;
    assert!(sessions(&world, true).await > 0);
    let service = start("sslmode=verify-full").await;
    assert_down(&service, "postgresql", "UnknownIssuer").await;
}

#[tokio::test]
async fn postgres_with_an_unknown_certificate_stays_down_and_the_log_says_why() {
    let world = encrypting_postgres();
    for mode in ["verify-ca", "verify-full"] {
        let service = patient(&world, &[("DB_SSLMODE", mode)]).await;
        assert_down(&service, "postgresql", "UnknownIssuer").await;
        assert_eq!(service.get("/").await.status, 503);
    }
}

#[tokio::test]
async fn only_verify_full_checks_the_name_in_the_certificate() {
    // An address that the certificate does not name.
    let world = World::with(
        PostgresOptions {
            config: vec![(
                "listen_addresses".to_owned(),
                "127.0.0.1,127.0.0.2".to_owned(),
            )],
            tls: true,
            ..PostgresOptions::default()
        },
        RedisOptions::default(),
    );
    let settings = |mode| {
        [
            ("DB_HOST", "127.0.0.2"),
            ("DB_SSLROOTCERT", text(world.postgres.ca())),
            ("DB_SSLMODE", mode),
        ]
    };
    let service = world.serve_with(&settings("verify-ca")).await;
    service.visit().await;
    let service = patient(&world, &settings("verify-full")).await;
    assert_down(&service, "postgresql", "not valid for name").await;
}

#[tokio::test]
async fn postgres_without_tls_is_not_used_in_mode_require() {
    let world = World::new();
    let service = patient(&world, &[("DB_SSLMODE", "require")]).await;
    assert_down(&service, "postgresql", "does not support TLS").await;
    assert_eq!(service.get("/health").await.status, 503);
}

#[tokio::test]
async fn redis_with_a_certificate_of_a_trusted_authority_is_used_encrypted() {
    let world = encrypting_redis();
    let ca = text(world.redis.ca());
    let service = redis_by(&world, &world.redis.url(), &[("REDIS_TLS_CA", ca)]).await;
    service.until_ready().await;
    assert_eq!(service.visit().await, (1, 1));
    assert_eq!(service.visit().await, (2, 2));
}

#[tokio::test]
async fn redis_with_an_unknown_certificate_degrades_and_the_log_says_why() {
    let world = encrypting_redis();
    let service = redis_by(&world, &world.redis.url(), &[]).await;
    service.until_health("degraded").await;
    assert_down(&service, "redis", "UnknownIssuer").await;
    assert_eq!(service.get("/").await.json()["redis_status"], "erro");
}

#[tokio::test]
async fn redis_whose_certificate_is_for_another_name_is_not_trusted() {
    let world = World::with_redis(RedisOptions {
        config: vec![("bind".to_owned(), "127.0.0.1 127.0.0.2".to_owned())],
        tls: true,
        ..RedisOptions::default()
    });
    let url = format!("rediss://127.0.0.2:{}", world.redis.port());
    let ca = text(world.redis.ca());
    let service = redis_by(&world, &url, &[("REDIS_TLS_CA", ca)]).await;
    assert_down(&service, "redis", "not valid for name").await;
}

#[tokio::test]
async fn redis_is_down_where_only_one_side_uses_tls() {
    for (tls, scheme) in [(true, "redis"), (false, "rediss")] {
        let world = World::with_redis(RedisOptions {
            tls,
            ..RedisOptions::default()
        });
        let url = format!("{scheme}://127.0.0.1:{}", world.redis.port());
        let service = redis_by(&world, &url, &[]).await;
        service.until_health("degraded").await;
        assert_eq!(service.get("/").await.json()["redis_status"], "erro");
    }
}

#[tokio::test]
async fn commands_use_tls_too() {
    let world = World::with(
        PostgresOptions {
            tls: true,
            ..PostgresOptions::default()
        },
        RedisOptions {
            tls: true,
            ..RedisOptions::default()
        },
    );
    let settings = world.settings_but(
        "REDIS_",
        &[
            ("DB_SSLMODE", "verify-full"),
            ("DB_SSLROOTCERT", text(world.postgres.ca())),
            ("REDIS_URL", &world.redis.url()),
            ("REDIS_TLS_CA", text(world.redis.ca())),
        ],
    );
    for command in ["migrate", "recount", "reconcile"] {
        let ended = crate::support::Ended::of(&[command], &settings).await;
        assert_eq!(ended.code, Some(0), "{ended:?}");
    }
}

fn encrypting_postgres() -> World {
    let options = PostgresOptions {
        tls: true,
        ..PostgresOptions::default()
    };
    World::with(options, RedisOptions::default())
}

fn encrypting_redis() -> World {
    World::with_redis(RedisOptions {
        tls: true,
        ..RedisOptions::default()
    })
}

/// Timeouts long enough for a handshake on a busy machine: the log has the first reason why a store
/// is down, which must not be a timeout.
const PATIENT: [(&str, &str); 3] = [
    ("REDIS_TIMEOUT", "5s"),
    ("DB_TIMEOUT", "10s"),
    ("VISIT_TIMEOUT", "15s"),
];

async fn patient(world: &World, settings: &[(&str, &str)]) -> Service {
    world.start(&[&PATIENT[..], settings].concat()).await
}

async fn redis_by(world: &World, url: &str, settings: &[(&str, &str)]) -> Service {
    let all = [&PATIENT[..], &[("REDIS_URL", url)], settings].concat();
    Service::start(&world.settings_but("REDIS_", &all)).await
}

async fn assert_down(service: &Service, store: &str, why: &str) {
    let said = || {
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

/// The number of the service's sessions that are encrypted, or that are not.
async fn sessions(world: &World, encrypted: bool) -> i64 {
    sqlx::query_scalar(
        "select count(*) from pg_stat_ssl join pg_stat_activity using (pid) \
         where datname = current_database() and application_name = 'visitas' and ssl = $1",
    )
    .bind(encrypted)
    .fetch_one(&mut world.session().await)
    .await
    .expect("a number")
}

fn text(path: Option<&Path>) -> &str {
    path.and_then(Path::to_str).expect("a path of ASCII")
}
