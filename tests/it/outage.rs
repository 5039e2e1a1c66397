//! Stores that are missing, die, pause and come back, without a restart of the service.

use std::time::{Duration, Instant};

use devstack::{PostgresOptions, RedisOptions, Server};
use reqwest::StatusCode;

use crate::support::load::{Load, Visit, verdict};
use crate::support::{HeldCount, PATIENT, SOON, Service, Way, World, eventually};

/// How soon the service uses a store that is back.
const RECOVERY: Duration = Duration::from_secs(1);
/// `VISIT_TIMEOUT` and a tenth.
const LONGEST_ANSWER: Duration = Duration::from_millis(2200);

#[tokio::test(flavor = "multi_thread")]
#[ignore = "reads a clock: make faults"]
async fn service_starts_without_stores_and_serves_when_they_come() {
    let world = World::of_its_own();
    world.postgres.kill().unwrap();
    world.redis.kill().unwrap();
    let service = world.start(&[]).await;
    assert_eq!(service.get("/health/live").await.status, StatusCode::OK);
    service.until_health("unavailable").await;
    assert_eq!(
        service.get("/").await.status,
        StatusCode::SERVICE_UNAVAILABLE
    );

    world.redis.start_again().unwrap();
    world.postgres.start_again().unwrap();
    let took = until_visit(&service, |visit| visit["redis_status"] == "ok").await;
    assert!(took < RECOVERY, "{took:?}");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "reads a clock: make faults"]
async fn postgres_killed_under_load_loses_and_repeats_no_visit() {
    let world = World::of_its_own();
    let service = world.serve().await;
    let load = Load::start(&[&service], 64);
    eventually("visits are made", SOON, async || world.rows().await > 500).await;

    let killed = Instant::now();
    world.postgres.kill().unwrap();
    service.until_health("unavailable").await;
    let redis_while_down = world.redis_visits().await;
    // Nothing must change while visits are refused, so there is no fact to wait for.
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(world.redis_visits().await, redis_while_down);

    let returned = return_of(&world.postgres);
    service.until_ready().await;
    let rows = world.rows().await;
    eventually("visits are made again", SOON, async || {
        world.rows().await > rows + 100
    })
    .await;
    let visits = load.stop().await;
    let verdict = verdict(&world, &visits, &[]).await;
    assert_eq!(verdict.violations(), 0, "{verdict:?}");
    assert_eq!(
        u64::try_from(verdict.in_doubt).unwrap(),
        service.counted("in_doubt").await,
        "{verdict:?}"
    );
    let rows = i64::try_from(verdict.rows).unwrap();
    assert_eq!(service.visit().await.0, rows + 1);

    let refused = visits.iter().filter(|visit| visit.status == 503);
    let first_refusal = refused.map(Visit::answered).min().expect("a refusal");
    assert!(first_refusal.duration_since(killed) < RECOVERY);
    let recovery = first_ok_after(&visits, returned);
    assert!(recovery < RECOVERY, "{recovery:?}\n{}", service.printed());
    assert!(visits.iter().all(|visit| visit.took < LONGEST_ANSWER));
    assert!(
        visits
            .iter()
            .all(|visit| [200, 503].contains(&visit.status))
    );
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "reads a clock: make faults"]
async fn redis_killed_under_load_fails_no_visit() {
    let world = World::of_its_own();
    let service = world.serve().await;
    let load = Load::start(&[&service], 64);
    eventually("visits are made", SOON, async || world.rows().await > 500).await;

    world.redis.kill().unwrap();
    service.until_health("degraded").await;
    let down = Instant::now();
    tokio::time::sleep(Duration::from_millis(500)).await;
    let returning = Instant::now();
    let returned = return_of(&world.redis);
    service.until_ready().await;
    eventually("visits are counted again", SOON, async || {
        world.redis_visits().await > 100
    })
    .await;
    let visits = load.stop().await;

    assert!(visits.iter().all(|visit| visit.status == 200));
    let during = |visit: &&Visit| visit.sent > down && visit.answered() < returning;
    let mut during_outage = visits.iter().filter(during).peekable();
    assert!(during_outage.peek().is_some());
    assert!(during_outage.all(|visit| visit.json["redis_status"] == "erro"));
    let counted_again = visits
        .iter()
        .filter(|visit| visit.sent > returning && visit.json["redis_status"] == "ok")
        .map(Visit::answered)
        .min()
        .unwrap();
    assert!(counted_again.duration_since(returned) < RECOVERY);
    let verdict = verdict(&world, &visits, &[down..returning]).await;
    assert_eq!(verdict.violations(), 0, "{verdict:?}");
    assert_eq!(
        (verdict.rows, verdict.recorded),
        (visits.len(), visits.len())
    );
    let rows = i64::try_from(verdict.rows).unwrap();
    assert_eq!(service.visit().await.0, rows + 1);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "reads a clock: make faults"]
async fn paused_postgres_costs_one_timeout_and_then_nothing() {
    let world = World::of_its_own();
    let service = world.serve().await;
    world.postgres.pause().unwrap();
    let first = timed_visit(&service).await;
    assert_eq!(first.0, StatusCode::SERVICE_UNAVAILABLE);
    assert!(first.1 < LONGEST_ANSWER, "{:?}", first.1);
    service.until_health("unavailable").await;
    let later = timed_visit(&service).await;
    assert_eq!(later.0, StatusCode::SERVICE_UNAVAILABLE);
    assert!(later.1 < Duration::from_millis(250), "{:?}", later.1);
    // The first is in doubt only if its connection was not idle before: otherwise the ping fails.
    let in_doubt = counted(&service, "in_doubt").await;
    assert!(in_doubt <= 1, "{in_doubt}");
    assert_eq!(in_doubt + counted(&service, "failed").await, 2);

    world.postgres.resume().unwrap();
    let took = until_visit(&service, |visit| visit["db_status"] == "ok").await;
    assert!(took < RECOVERY, "{took:?}");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "reads a clock: make faults"]
async fn visit_is_recorded_although_the_idle_connections_have_fallen_silent() {
    let world = World::new();
    let way = Way::to(world.postgres.port()).await;
    let service = world
        .serve_with(&[
            ("DB_PORT", &way.port.to_string()),
            ("DB_TIMEOUT", "3s"),
            ("VISIT_TIMEOUT", "10s"),
        ])
        .await;
    let said = || way.said().concat().len();
    // A reading during a visit opens a second connection, so that the next visit and the next reading
    // both meet a silent one.
    let mut count = HeldCount::of(&world).await;
    let visit = service.begin_visit();
    count.until_waited_for().await;
    let before = said();
    eventually("a reading during the visit", SOON, async || said() > before).await;
    count.release().await;
    assert_eq!(visit.await.expect("a response").status, StatusCode::OK);
    // The visit begins after a reading, so that the next reading is most of a second away.
    let before = said();
    eventually("a reading", SOON, async || said() > before).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    way.fall_silent();
    let first = timed_visit(&service).await;
    assert_eq!(first.0, StatusCode::OK);
    // Each of the two connections is given up after a ping of 250 ms.
    assert!(first.1 < Duration::from_secs(1), "{:?}", first.1);
    assert_eq!(counted(&service, "in_doubt").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn visit_after_the_idle_connections_to_redis_were_reset_is_counted() {
    let world = World::new();
    let way = Way::to(world.redis.port()).await;
    let mut settings = PATIENT.to_vec();
    let port = way.port.to_string();
    settings.push(("REDIS_PORT", &port));
    let service = world.serve_with(&settings).await;
    for visit in 1..4 {
        assert_eq!(service.visit().await, (visit, visit));
        way.reset();
        // A connection that was used less than 50 ms ago is not looked at.
        tokio::time::sleep(Duration::from_millis(60)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "reads a clock: make faults"]
async fn paused_redis_costs_one_timeout_and_then_nothing() {
    let world = World::of_its_own();
    let service = world.serve().await;
    world.redis.pause().unwrap();
    let first = timed_visit(&service).await;
    assert_eq!(first.0, StatusCode::OK);
    assert!(first.1 < Duration::from_secs(1), "{:?}", first.1);
    service.until_health("degraded").await;
    let calls = redis_timeouts(&service).await;
    let later = timed_visit(&service).await;
    assert_eq!(later.0, StatusCode::OK);
    assert!(later.1 < Duration::from_millis(200), "{:?}", later.1);
    assert!(calls >= 1.0, "a call that times out is counted");

    world.redis.resume().unwrap();
    let took = until_visit(&service, |visit| visit["redis_status"] == "ok").await;
    assert!(took < RECOVERY, "{took:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn outage_is_logged_once_when_it_begins_and_once_when_it_ends() {
    let world = World::of_its_own();
    let service = world.serve().await;
    for store in [&**world.postgres, &*world.redis] {
        store.kill().unwrap();
    }
    service.until_health("unavailable").await;
    eventually("both are known to be down", SOON, async || {
        service.logged("store is down").len() == 2
    })
    .await;
    for _ in 0..20 {
        service.get("/").await;
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    world.redis.start_again().unwrap();
    world.postgres.start_again().unwrap();
    service.until_ready().await;

    eventually("both ends are logged", SOON, async || {
        service.logged("store is up again").len() == 2
    })
    .await;
    assert_eq!(service.logged("store is down").len(), 2);
    let ends = service.logged("store is up again");
    assert!(
        ends.iter()
            .all(|line| line["down.seconds"].as_f64().unwrap() >= 0.5)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_that_answers_ping_but_counts_no_visit_is_down_without_flapping() {
    for break_it in [
        "set visitas_home text",
        "config set maxmemory 1",
        "replicaof 127.0.0.1 1",
    ] {
        let world = World::new();
        let service = world.serve().await;
        service.visit().await;
        redis_command(&world, break_it).await;
        service.until_health("degraded").await;
        for _ in 0..50 {
            assert_eq!(service.get("/").await.json()["redis_status"], "erro");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(service.logged("store is down").len(), 1, "{break_it}");

        redis_command(&world, "config set maxmemory 0").await;
        redis_command(&world, "replicaof no one").await;
        redis_command(&world, "del visitas_home").await;
        service.until_ready().await;
        eventually("its end is logged", SOON, async || {
            service.logged("store is up again").len() == 1
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn refused_login_is_named_in_log_and_metrics() {
    let world = World::new();
    let url = format!(
        "redis://:wrong@{}:{}",
        world.redis.host(),
        world.redis.port()
    );
    redis_command(&world, "config set requirepass right").await;
    let mut settings = world.settings();
    settings.retain(|(name, _)| !name.starts_with("REDIS_"));
    settings.push(("REDIS_URL".to_owned(), url));
    let service = Service::start(&settings).await;
    eventually("the refusal is counted", SOON, async || {
        let metrics = service.get("/metrics").await.body;
        metrics.contains("error_type=\"WRONGPASS\"")
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn postgres_that_only_reads_is_down_without_flapping() {
    let world = World::of_its_own();
    let service = world.serve().await;
    let database = &world.database;
    let alter = |value: &str| {
        let statement =
            format!("alter database {database} set default_transaction_read_only = {value}");
        world.postgres.sql("postgres", &statement).unwrap();
        // Open sessions keep the default that they began with.
        let end = "select pg_terminate_backend(pid) from pg_stat_activity \
                   where application_name = 'visitas'";
        world.postgres.sql("postgres", end).unwrap();
    };
    alter("on");
    service.get("/").await;
    service.until_health("unavailable").await;
    for _ in 0..20 {
        assert_eq!(
            service.get("/").await.status,
            StatusCode::SERVICE_UNAVAILABLE
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(service.logged("store is down").len(), 1);
    alter("off");
    service.until_ready().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_taken_by_others_do_not_stop_visits() {
    let config = vec![("max_connections".to_owned(), "12".to_owned())];
    let options = PostgresOptions {
        config,
        ..PostgresOptions::default()
    };
    let world = World::with(options, RedisOptions::default());
    let service = world.serve().await;
    service.visit().await;
    let mut taken = Vec::new();
    while let Ok(session) = world.try_session().await {
        taken.push(session);
    }
    for _ in 0..100 {
        service.visit().await;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(service.get("/health").await.json()["status"], "ok");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "reads a clock: make faults"]
async fn wait_for_the_counts_lock_ends_in_a_definite_failure() {
    let world = World::new();
    let service = world.serve().await;
    let mut holder = world.session().await;
    sqlx::raw_sql("begin; select pg_advisory_xact_lock(33329991663247731)")
        .execute(&mut holder)
        .await
        .unwrap();
    let (status, took) = timed_visit(&service).await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(took < Duration::from_millis(1100), "{took:?}");
    assert_eq!(counted(&service, "in_doubt").await, 0);
    assert_eq!(counted(&service, "failed").await, 1);

    drop(holder);
    until_visit(&service, |visit| visit["db_status"] == "ok").await;
    assert_eq!(world.rows().await, 1);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "reads a clock: make faults"]
async fn both_stores_killed_are_used_again_within_a_second_of_their_return() {
    let world = World::of_its_own();
    let service = world.serve().await;
    assert_eq!(service.visit().await, (1, 1));
    world.redis.kill().unwrap();
    world.postgres.kill().unwrap();
    service.until_health("unavailable").await;
    let (status, took) = timed_visit(&service).await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(took < Duration::from_millis(250), "{took:?}");

    world.redis.start_again().unwrap();
    world.postgres.start_again().unwrap();
    let took = until_visit(&service, |visit| visit["redis_status"] == "ok").await;
    assert!(took < RECOVERY, "{took:?}");
    assert!(world.redis_visits().await < world.rows().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn wait_for_a_table_lock_ends_in_a_definite_failure() {
    let world = World::new();
    let service = world.serve().await;
    let mut holder = world.session().await;
    sqlx::raw_sql("begin; lock table visitas in access exclusive mode")
        .execute(&mut holder)
        .await
        .unwrap();
    fails_definitely(&service).await;
    drop(holder);
    until_visit(&service, |visit| visit["db_status"] == "ok").await;
    assert_eq!(world.rows().await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn insertion_that_takes_too_long_ends_in_a_definite_failure() {
    let world = World::new();
    let service = world.serve().await;
    world
        .sql(
            "create function demorar() returns trigger language plpgsql \
             as 'begin perform pg_sleep(5); return null; end'; \
             create trigger demora before insert on visitas execute function demorar()",
        )
        .await;
    fails_definitely(&service).await;
    world.sql("drop trigger demora on visitas").await;
    until_visit(&service, |visit| visit["db_status"] == "ok").await;
    assert_eq!(world.rows().await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn open_sessions_that_become_read_only_are_one_outage() {
    let world = World::of_its_own();
    let service = world.serve().await;
    let read_only = |value: &str| {
        let set = format!("alter system set default_transaction_read_only = {value}");
        world.postgres.sql("postgres", &set).unwrap();
        let reload = "select pg_reload_conf()";
        world.postgres.sql("postgres", reload).unwrap();
    };
    service.visit().await;
    read_only("on");
    until_visit(&service, |visit| visit["db_status"] == "erro").await;
    for _ in 0..20 {
        service.get("/").await;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(service.logged("store is up again").is_empty());
    assert_eq!(counted(&service, "in_doubt").await, 0);

    read_only("off");
    service.until_ready().await;
    eventually("its end is logged", SOON, async || {
        service.logged("store is up again").len() == 1
    })
    .await;
    assert_eq!(service.logged("store is down").len(), 1);
}

/// Makes a visit, which must fail in time and definitely.
async fn fails_definitely(service: &Service) {
    let (status, took) = timed_visit(service).await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(took < LONGEST_ANSWER, "{took:?}");
    assert_eq!(counted(service, "in_doubt").await, 0);
    assert_eq!(counted(service, "failed").await, 1);
}

/// Starts a server again and returns the time at which it answered.
fn return_of(server: &Server) -> Instant {
    server.start_again().unwrap();
    Instant::now()
}

fn first_ok_after(visits: &[Visit], returned: Instant) -> Duration {
    let first = visits
        .iter()
        .filter(|visit| visit.status == 200 && visit.answered() > returned)
        .map(Visit::answered)
        .min();
    first
        .expect("a visit after the return")
        .duration_since(returned)
}

/// Visits until `is_so` accepts the response, and returns how long that took.
async fn until_visit(service: &Service, is_so: impl Fn(&serde_json::Value) -> bool) -> Duration {
    let started = Instant::now();
    eventually("a visit has the expected response", SOON, async || {
        is_so(&service.get("/").await.json())
    })
    .await;
    started.elapsed()
}

async fn timed_visit(service: &Service) -> (StatusCode, Duration) {
    let started = Instant::now();
    let response = service.get("/").await;
    (response.status, started.elapsed())
}

async fn counted(service: &Service, outcome: &str) -> i64 {
    let series = format!("visitas_visits_total{{outcome=\"{outcome}\"}}");
    let value = service.metric(&series).await.expect("the series is there");
    value.to_string().parse().expect("a whole number")
}

async fn redis_timeouts(service: &Service) -> f64 {
    let series = "visitas_store_calls_total{db_system_name=\"redis\",db_operation_name=\"INCRBY\",outcome=\"timeout\"}";
    service.metric(series).await.expect("the series is there")
}

async fn redis_command(world: &World, command: &str) {
    let client = redis::Client::open(world.redis.url()).unwrap();
    let mut connection = client.get_multiplexed_async_connection().await.unwrap();
    let mut words = command.split(' ');
    let mut command = redis::cmd(words.next().unwrap());
    command.arg(words.collect::<Vec<_>>());
    command
        .query_async::<redis::Value>(&mut connection)
        .await
        .unwrap();
}
