//! URLs of a real Postgres, with psql as the control: what psql accepts, the service accepts.

use std::process::Command;

use devstack::{PASSWORD, PostgresOptions, RedisOptions, USER};
use serde_json::Value;

use crate::support::{Ended, World, settings};

#[tokio::test]
async fn url_that_psql_accepts_leads_to_the_same_database() {
    let world = World::with(
        PostgresOptions {
            tls: true,
            ..PostgresOptions::default()
        },
        RedisOptions::default(),
    );
    world
        .sql("create role \"an@\" superuser login password 'a?b#c:d+é%'")
        .await;
    let (host, port, database) = (
        world.postgres.host(),
        world.postgres.port(),
        &world.database,
    );
    let place = format!("{host}:{port}/{database}");
    let usual = format!("postgres://{USER}:{PASSWORD}@{place}");
    let in_the_query = format!(
        "postgresql:///?host={host}&port={port}&dbname={database}&user={USER}&password={PASSWORD}"
    );
    let mut urls = vec![
        in_the_query,
        format!("postgres://an%40:a?b#c:d+é%25@{place}"),
        format!(
            "postgres://other:wrong@other:1/x?host={host}&port={port}&dbname={database}&user=an%40&password=a?b%23c:d+%C3%A9%25"
        ),
        format!(
            "postgresql:///{database}?hostaddr={host}&port={port}&user={USER}&password={PASSWORD}&sslmode=require"
        ),
    ];
    let parameters = [
        "ssl=true",
        "connect_timeout=10&application_name=web&fallback_application_name=x&client_encoding=UTF8",
        "keepalives=1&keepalives_idle=30&keepalives_interval=5&keepalives_count=3&tcp_user_timeout=5000",
        "sslmode=require&channel_binding=prefer&gssencmode=disable&target_session_attrs=read-write",
        "sslmode=require&channel_binding=require",
        "target_session_attrs=primary&sslcompression=0&sslsni=1&ssl_min_protocol_version=TLSv1.2",
        "options=-c%20geqo%3Doff%20--work-mem%3D8MB%20-csearch_path%3Dpublic",
        "krbsrvname=postgres&gsslib=gssapi&replication=false&passfile=/nonexistent",
    ];
    urls.extend(parameters.map(|parameters| format!("{usual}?{parameters}")));
    for url in urls {
        let control = psql(&world, &url, "select current_database()");
        assert_eq!(control.as_ref(), Ok(database), "{url}");
        let given = [("DATABASE_URL", &*url), ("DB_TIMEOUT", "10s")];
        let ended = Ended::of(&["migrate"], &settings(&given)).await;
        assert_eq!(ended.code, Some(0), "{url}: {ended:?}");
    }
    // These psql refuses: it ends user and password at the first @, and takes quotes literally.
    world
        .sql("create role \"eva@\" superuser login password 'a@b'")
        .await;
    for url in [
        format!("postgres://eva@:a@b@{place}"),
        format!("'{usual}'"),
        usual.replace("postgres://", "postgis://"),
    ] {
        psql(&world, &url, "select 1").expect_err(&url);
        let ended = Ended::of(&["migrate"], &settings(&[("DATABASE_URL", &url)])).await;
        assert_eq!(ended.code, Some(0), "{url}: {ended:?}");
    }
    assert_eq!(world.rows().await, 0);
}

#[tokio::test]
async fn url_leads_to_a_unix_socket_without_a_host_before_the_path() {
    let folder = tempfile::TempDir::new().expect("a folder");
    let path = folder.path().to_str().expect("a path of ASCII");
    let everyone = std::os::unix::fs::PermissionsExt::from_mode(0o777);
    std::fs::set_permissions(path, everyone).expect("a mode");
    let world = World::with(
        PostgresOptions {
            config: vec![("unix_socket_directories".to_owned(), path.to_owned())],
            ..PostgresOptions::default()
        },
        RedisOptions::default(),
    );
    let (port, database) = (world.postgres.port(), &world.database);
    for url in [
        format!("postgres:///{database}?host={path}&port={port}&user={USER}&password={PASSWORD}"),
        format!("postgres://{USER}:{PASSWORD}@/{database}?host={path}&port={port}"),
        format!(
            "postgres://{USER}:{PASSWORD}@{}:{port}/{database}",
            path.replace('/', "%2F")
        ),
    ] {
        psql(&world, &url, "select 1").expect("psql reaches the socket");
        let ended = Ended::of(&["migrate"], &settings(&[("DATABASE_URL", &url)])).await;
        assert_eq!(ended.code, Some(0), "{url}: {ended:?}");
    }
}

#[tokio::test]
async fn options_of_the_url_apply_unless_counting_depends_on_them() {
    let world = World::new();
    let url = world.postgres.url(&world.database);
    let url =
        format!("{url}?options=-c%20geqo%3Doff%20-c%20synchronous_commit%3Doff%20-c%20jit%3Don");
    let service = {
        let given = world.settings_but("DB_", &[("DATABASE_URL", &url)]);
        crate::support::Service::start(&given).await
    };
    service.until_ready().await;
    service.visit().await;
    world
        .sql(
            "create function nota() returns trigger language plpgsql as $$ begin \
             raise exception '% % %', current_setting('geqo'), \
             current_setting('synchronous_commit'), current_setting('jit'); end $$; \
             create trigger nota before insert on visitas execute function nota()",
        )
        .await;
    assert_eq!(service.get("/").await.status, 503);
    crate::support::eventually(
        "the log has the settings",
        crate::support::SOON,
        async || {
            let lines = service.logged("store is down");
            lines
                .iter()
                .any(|line| line["error"].to_string().contains("off on off"))
        },
    )
    .await;
}

#[tokio::test]
async fn parameter_without_effect_is_reported_once_by_its_name() {
    let world = World::new();
    let (url, cache) = (world.postgres.url(&world.database), world.redis.url());
    let url = format!("{url}?channel_binding=require&sslmode=disable&colour=c4nary");
    let cache = format!("{cache}?ssl_cert_reqs=none&family=0");
    let mut given = world.settings_but("DB_", &[("DATABASE_URL", &url)]);
    given.retain(|(name, _)| !name.starts_with("REDIS_"));
    given.extend(settings(&[("REDIS_URL", &cache)]));
    let service = crate::support::Service::start(&given).await;
    service.until_ready().await;
    let lines = service.logged("parameter of the URL has no effect");
    let named: Vec<_> = lines
        .iter()
        .map(|line| (line["setting"].as_str(), line["parameter"].as_str()))
        .collect();
    let expected = [
        (Some("DATABASE_URL"), Some("channel_binding")),
        (Some("DATABASE_URL"), Some("colour")),
        (Some("REDIS_URL"), Some("ssl_cert_reqs")),
    ];
    assert_eq!(named, expected);
    assert!(
        lines
            .iter()
            .all(|line| line["reason"].is_string() && line["level"] == "WARN")
    );
    assert!(!Value::from(lines).to_string().contains("c4nary"));
}

/// What psql prints, or its error.
fn psql(world: &World, url: &str, query: &str) -> Result<String, String> {
    let ended = Command::new(world.postgres.programs().join("psql"))
        .args(["-XAt", "-d", url, "-c", query])
        .env_clear()
        .output()
        .expect("psql starts");
    let text = |bytes| String::from_utf8(bytes).expect("text").trim().to_owned();
    if ended.status.success() {
        Ok(text(ended.stdout))
    } else {
        Err(text(ended.stderr))
    }
}
