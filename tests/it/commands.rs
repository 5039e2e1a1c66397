//! The commands except `serve`: their exit status and what they print.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use devstack::RedisOptions;

use crate::settings::variables;
use crate::support::{Ended, HeldCount, Service, World, execute, settings};

#[tokio::test]
async fn healthcheck_succeeds_where_visits_are_recorded() {
    let world = World::new();
    let service = world.serve().await;
    let ended = healthcheck(&service).await;
    assert_eq!(
        (ended.code, ended.errors.as_str()),
        (Some(0), ""),
        "{ended:?}"
    );
    let address = settings(&[("BIND_ADDR", &service.address.to_string())]);
    let ended = Ended::of(&["healthcheck"], &address).await;
    assert_eq!(ended.code, Some(0), "{ended:?}");
    world.redis.kill().expect("Redis ends");
    service.until_health("degraded").await;
    assert_eq!(healthcheck(&service).await.code, Some(0));
}

#[tokio::test]
async fn healthcheck_fails_in_one_line_where_visits_are_not_recorded() {
    let world = World::new();
    let service = world.start(&[("DB_PORT", "1")]).await;
    let ended = healthcheck(&service).await;
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.error().ends_with("503 Service Unavailable"));
}

#[tokio::test]
async fn healthcheck_fails_in_one_line_where_no_service_responds() {
    let silent = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let silent = silent.local_addr().expect("an address");
    for address in [silent.to_string(), "127.0.0.1:1".to_owned()] {
        let url = format!("http://{address}/health");
        let ended = Ended::of(&["healthcheck", "--url", &url], &[]).await;
        assert_eq!(ended.code, Some(1), "{ended:?}");
        assert!(ended.error().contains(&url), "{ended:?}");
    }
}

#[tokio::test]
async fn healthcheck_refuses_a_url_with_a_password_and_does_not_repeat_it() {
    for user in ["ana:segredo@", "segredo@"] {
        let url = format!("http://{user}127.0.0.1:1/health");
        let ended = Ended::of(&["healthcheck", "--url", &url], &[]).await;
        assert_eq!(ended.code, Some(2), "{ended:?}");
        assert!(ended.errors.contains("without user"), "{ended:?}");
        let printed = ended.output + &ended.errors;
        assert!(!printed.contains("segredo"), "{printed}");
    }
}

#[tokio::test]
async fn migrate_brings_a_fresh_database_up_to_date_once() {
    let world = World::new();
    let migrate = async || Ended::of(&["migrate"], &world.settings()).await;
    let ended = migrate().await;
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(
        ended.output.ends_with("\n3 migrations applied\n"),
        "{ended:?}"
    );
    assert_eq!(world.rows().await, 0);
    let ended = migrate().await;
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert_eq!(ended.output, "the database is up to date\n");
}

#[tokio::test]
async fn recount_counts_rows_that_disabled_triggers_missed() {
    let world = World::new();
    let service = world.serve().await;
    service.visit().await;
    let mut session = world.session().await;
    for statement in [
        "set session_replication_role = replica",
        "insert into visitas default values",
    ] {
        sqlx::query(statement)
            .execute(&mut session)
            .await
            .expect(statement);
    }
    assert_eq!(service.visit().await.0, 2);
    let ended = Ended::of(&["recount"], &world.settings()).await;
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert_eq!(ended.output, "counted 3 rows; the total was 2\n");
    assert_eq!(service.visit().await.0, 4);
}

#[tokio::test]
async fn reconcile_corrects_a_redis_counter_that_is_too_low_or_too_high() {
    let world = World::new();
    let service = world.serve().await;
    service.visit().await;
    for (value, said) in [
        ("0", "both stores count 1; Redis was off by -1\n"),
        ("7", "both stores count 1; Redis was off by 6\n"),
        ("1", "both stores count 1\n"),
    ] {
        world
            .redis_says::<()>(&["SET", "visitas_home", value])
            .await;
        let ended = Ended::of(&["reconcile"], &world.settings()).await;
        assert_eq!(
            (ended.code, ended.output.as_str()),
            (Some(0), said),
            "{ended:?}"
        );
        assert_eq!(world.redis_visits().await, 1);
    }
    assert_eq!(service.visit().await, (2, 2));
}

#[tokio::test]
async fn recount_and_reconcile_give_up_while_another_session_holds_the_count() {
    let world = World::new();
    drop(world.serve().await);
    let count = HeldCount::of(&world).await;
    // Five seconds for a recount, 70 % of DB_TIMEOUT otherwise.
    for (command, most) in [("recount", 7), ("reconcile", 2)] {
        let asked = Instant::now();
        let ended = Ended::of(&[command], &world.settings()).await;
        let took = asked.elapsed();
        assert_eq!(ended.code, Some(1), "{ended:?}");
        assert!(ended.error().contains("lock timeout"), "{ended:?}");
        assert!(took < Duration::from_secs(most), "{command}: {took:?}");
    }
    count.release().await;
    for command in ["recount", "reconcile"] {
        let ended = Ended::of(&[command], &world.settings()).await;
        assert_eq!(ended.code, Some(0), "{ended:?}");
    }
}

#[tokio::test]
async fn recount_gives_up_while_another_session_changes_the_table() {
    let world = World::new();
    let service = world.serve().await;
    let mut hand = world
        .transaction("insert into visitas default values")
        .await;
    let asked = Instant::now();
    let ended = Ended::of(&["recount"], &world.settings()).await;
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.error().contains("lock timeout"), "{ended:?}");
    assert!(asked.elapsed() < Duration::from_secs(7));
    execute(&mut hand, "commit").await.expect("the commit");
    // The recount held the count's lock, and has released it.
    service.until_ready().await;
    assert_eq!(service.visit().await.0, 2);
}

#[tokio::test]
async fn command_without_its_store_fails_in_one_line_that_says_why() {
    let world = World::with_redis(RedisOptions {
        password: Some("s3cret".to_owned()),
        ..RedisOptions::default()
    });
    drop(
        world
            .serve_with(&[("REDIS_PASSWORD", "s3cret"), ("SHUTDOWN_TIMEOUT", "1s")])
            .await,
    );
    for (command, variable, value, why) in [
        ("migrate", "DB_PORT", "1", "Connection refused"),
        ("recount", "DB_PORT", "1", "Connection refused"),
        ("reconcile", "DB_PORT", "1", "Connection refused"),
        ("reconcile", "REDIS_PORT", "1", "Connection refused"),
        ("migrate", "DB_PASSWORD", "c4nary", "authentication failed"),
        ("recount", "DB_PASSWORD", "c4nary", "authentication failed"),
        (
            "reconcile",
            "DB_PASSWORD",
            "c4nary",
            "authentication failed",
        ),
        (
            "reconcile",
            "REDIS_PASSWORD",
            "c4nary",
            "authentication failed",
        ),
        ("recount", "DB_NAME", "postgres", "does not exist"),
    ] {
        let mut all = world.settings();
        all.extend(settings(&[
            ("REDIS_PASSWORD", "s3cret"),
            ("RUST_LOG", "trace"),
        ]));
        all.extend(settings(&[(variable, value)]));
        let ended = Ended::of(&[command], &all).await;
        assert_eq!(ended.code, Some(1), "{command} {variable}: {ended:?}");
        assert!(ended.error().contains(why), "{ended:?}");
        let said = ended.output + &ended.errors;
        for secret in ["c4nary", "s3cret", devstack::PASSWORD] {
            assert!(!said.contains(secret), "{secret} in {said}");
        }
    }
}

#[tokio::test]
async fn config_lists_every_setting_with_secrets_masked() {
    let given = settings(&[
        ("DB_PASSWORD", "c4nary"),
        ("REDIS_URL", "redis://:c4nary@cache:6380/2"),
        ("DB_TIMEOUT", "1500ms"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "authorization=c4nary"),
    ]);
    let ended = Ended::of(&["config"], &given).await;
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(!ended.output.contains("c4nary"), "{}", ended.output);
    let listed: Vec<&str> = ended
        .output
        .lines()
        .map(|line| line.split_once(" #").expect("an origin").0.trim_end())
        .collect();
    for line in [
        "DB_PASSWORD=****",
        "REDIS_URL=redis://:****@cache:6380/2",
        "REDIS_HOST=cache",
        "DB_TIMEOUT=1500ms",
        "OTEL_EXPORTER_OTLP_HEADERS=****",
        "QUEUE_CAPACITY=8192",
    ] {
        assert!(listed.contains(&line), "{line} in {listed:?}");
    }
    let names = listed.iter().filter_map(|line| line.split('=').next());
    assert_eq!(names.collect::<BTreeSet<_>>(), variables());
}

#[tokio::test]
async fn help_has_every_setting_and_every_command() {
    let ended = Ended::of(&["--help"], &[]).await;
    assert_eq!((ended.code, ended.errors.as_str()), (Some(0), ""));
    for variable in variables() {
        let env = format!("[env: {variable}]");
        let words: Vec<&str> = ended.output.split_whitespace().collect();
        assert!(words.join(" ").contains(&env), "{env}");
    }
    for command in [
        "serve",
        "migrate",
        "healthcheck",
        "reconcile",
        "recount",
        "config",
    ] {
        assert!(
            ended.output.contains(&format!("\n  {command}\n")),
            "{command}"
        );
    }
}

#[tokio::test]
async fn version_has_the_revision() {
    let ended = Ended::of(&["--version"], &[]).await;
    assert_eq!(ended.code, Some(0));
    let expected = format!("visitas {} ({})\n", visitas::VERSION, visitas::REVISION);
    assert_eq!(ended.output, expected);
    assert!(!visitas::REVISION.is_empty());
}

#[tokio::test]
async fn unknown_command_or_flag_is_exit_2() {
    for argument in ["nope", "--nope", "--db-password=c4nary", "--db-port"] {
        let ended = Ended::of(&[argument], &[]).await;
        assert_eq!(
            (ended.code, ended.output.as_str()),
            (Some(2), ""),
            "{argument}"
        );
        assert!(ended.errors.starts_with("error: "), "{ended:?}");
        assert!(!ended.errors.contains("c4nary"), "{ended:?}");
    }
}

#[tokio::test]
async fn flag_wins_over_variable() {
    let ended = Ended::of(
        &["config", "--db-host=flag"],
        &settings(&[("DB_HOST", "a")]),
    )
    .await;
    assert!(ended.output.starts_with("DB_HOST=flag "), "{ended:?}");
}

#[tokio::test]
async fn command_reads_only_the_settings_that_it_uses() {
    // With these alone a command fails by itself: nothing listens there.
    let reachable = [("DB_PORT", "1"), ("BIND_ADDR", "127.0.0.1:1")];
    let all = ["DB_USER", "RUST_LOG", "REDIS_PORT", "OTEL_SDK_DISABLED"];
    for (command, used) in [
        ("healthcheck", 0),
        ("migrate", 2),
        ("recount", 2),
        ("reconcile", 3),
        ("serve", 4),
    ] {
        let (used, unused) = all.split_at(used);
        let bad = |variable: &&'static str| (*variable, "\u{7}=b");
        for variable in used {
            let ended = Ended::of(&[command], &settings(&[bad(variable)])).await;
            assert_eq!(ended.code, Some(2), "{command} {variable}: {ended:?}");
        }
        if command != "serve" {
            let given: Vec<_> = unused.iter().map(bad).chain(reachable).collect();
            let ended = Ended::of(&[command], &settings(&given)).await;
            assert_eq!(ended.code, Some(1), "{command}: {ended:?}");
        }
    }
}

#[tokio::test]
async fn variables_of_the_drivers_have_no_effect_on_a_service() {
    let world = World::new();
    let service = world
        .serve_with(&[
            ("PGHOST", "postgres.invalid"),
            ("PGHOSTADDR", "192.0.2.1"),
            ("PGPORT", "1"),
            ("PGUSER", "nobody"),
            ("PGPASSWORD", "wrong"),
            ("PGDATABASE", "none"),
            ("PGSSLMODE", "verify-full"),
            ("PGAPPNAME", "other"),
            ("PGPASSFILE", "/nonexistent"),
        ])
        .await;
    assert_eq!(service.visit().await, (1, 1));
    let named = "select count(*) from pg_stat_activity \
                 where datname = current_database() and application_name = 'other'";
    assert_eq!(world.number(named).await, 0);
}

#[tokio::test]
async fn password_variable_of_the_driver_is_not_used() {
    let world = World::new();
    let given = [("PGPASSWORD", devstack::PASSWORD)];
    let service = Service::start(&world.settings_but("DB_PASSWORD", &given)).await;
    crate::support::eventually("Postgres refuses", crate::support::SOON, async || {
        service
            .logged("store is down")
            .iter()
            .any(|line| line["store"] == "postgresql")
    })
    .await;
    assert_eq!(service.get("/").await.status, 503);
}

#[tokio::test]
async fn driver_variable_that_would_take_effect_is_exit_2() {
    for (variable, ours) in [
        ("PGOPTIONS", "PGOPTIONS"),
        ("PGSSLROOTCERT", "DB_SSLROOTCERT"),
        ("PGSSLCERT", "DB_SSLCERT"),
        ("PGSSLKEY", "DB_SSLKEY"),
    ] {
        for command in ["serve", "migrate", "recount", "reconcile", "config"] {
            let ended = Ended::of(&[command], &settings(&[(variable, "c4nary")])).await;
            assert_eq!(
                (ended.code, ended.output.as_str()),
                (Some(2), ""),
                "{ended:?}"
            );
            let line = ended.error();
            assert!(line.contains(variable) && line.contains(ours), "{line}");
            assert!(!line.contains("c4nary"), "{line}");
        }
    }
}

async fn healthcheck(service: &Service) -> Ended {
    Ended::of(&["healthcheck", "--url", &service.url("/health")], &[]).await
}
