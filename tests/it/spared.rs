//! Requests that cost the stores no call, and refusals that cost the client no time. The tests read
//! the bytes that the service sends to the stores.

use std::time::{Duration, Instant};

use reqwest::StatusCode;

use crate::batch::{Commands, Messages};
use crate::support::{HeldCount, SOON, Service, Way, Wire, World, eventually};

/// Longer than the time between two periodic readings of the stores.
const MONITORED: Duration = Duration::from_millis(2100);

#[tokio::test(flavor = "multi_thread")]
async fn liveness_probe_costs_no_store_call() {
    let world = World::new();
    let ways = Ways::open(&world).await;
    let service = ways.serve(&world, &[]).await;
    let (said, commands) = (Messages::of(&ways.postgres), Commands::of(&ways.redis));
    let began = Instant::now();
    let mut wire = Wire::open(&service).await;
    let mut probes = 0;
    while began.elapsed() < MONITORED {
        assert!(wire.get("/health/live").await.starts_with("HTTP/1.1 200 "));
        probes += 1;
    }
    let readings = most_readings(began);
    let said = Messages::of(&ways.postgres).since(&said);
    let commands = Commands::of(&ways.redis).since(&commands);
    assert!(probes > 10 * readings, "{probes} probes");
    assert_eq!(said.all(), said.readings(), "{said:?}");
    assert_eq!(commands.all, commands.readings, "{commands:?}");
    assert!(said.all() <= readings, "{said:?}");
    assert!(commands.all <= readings, "{commands:?}");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "reads a clock: make faults"]
async fn liveness_probe_succeeds_while_stores_are_paused_or_down() {
    for stop in ["pause", "kill"] {
        let world = World::of_its_own();
        let service = world.serve().await;
        for store in [&**world.postgres, &*world.redis] {
            if stop == "pause" {
                store.pause().unwrap();
            } else {
                store.kill().unwrap();
            }
        }
        // First before the failure is noticed, then after.
        for _ in 0..2 {
            let asked = Instant::now();
            let response = service.get("/health/live").await;
            assert_eq!(response.status, StatusCode::OK, "{stop}: {response:?}");
            // A store call would take a second.
            assert!(asked.elapsed() < Duration::from_millis(500), "{stop}");
            service.until_health("unavailable").await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn visits_that_fail_in_postgres_cost_no_redis_call() {
    for fail in ["kill", "lock", "read-only"] {
        let world = World::of_its_own();
        let ways = Ways::open(&world).await;
        let service = ways.serve(&world, &[]).await;
        assert_eq!(service.visit().await, (1, 1));
        let _held = match fail {
            "kill" => {
                world.postgres.kill().unwrap();
                None
            }
            "lock" => Some(HeldCount::of(&world).await),
            _ => {
                let set = "alter system set default_transaction_read_only = on";
                world.postgres.sql("postgres", set).unwrap();
                let reload = "select pg_reload_conf()";
                world.postgres.sql("postgres", reload).unwrap();
                None
            }
        };
        eventually("a visit is refused", SOON, async || {
            service.get("/").await.status == StatusCode::SERVICE_UNAVAILABLE
        })
        .await;
        let commands = Commands::of(&ways.redis);
        let (began, mut wire) = (Instant::now(), Wire::open(&service).await);
        for _ in 0..200 {
            let response = wire.get("/").await;
            assert!(response.starts_with("HTTP/1.1 503 "), "{fail}: {response}");
            // The state of Redis as it was last read.
            let redis = r#""redis_status":"ok""#;
            assert!(response.contains(redis), "{fail}: {response}");
        }
        let commands = Commands::of(&ways.redis).since(&commands);
        assert_eq!(commands.all, commands.readings, "{fail}: {commands:?}");
        assert!(commands.all <= most_readings(began), "{fail}: {commands:?}");
        assert_eq!(
            world.redis_says::<i64>(&["GET", "visitas_home"]).await,
            i64::try_from(recorded(&service).await).unwrap(),
            "{fail}"
        );
    }
}

/// A visit that discovers a failure is sent to Postgres; the visits after it are refused without a
/// call.
#[tokio::test(flavor = "multi_thread")]
async fn visit_that_discovers_a_failure_of_postgres_costs_no_redis_call() {
    let world = World::new();
    let ways = Ways::open(&world).await;
    let hasty = [("DB_TIMEOUT", "300ms"), ("REDIS_TIMEOUT", "200ms")];
    let service = ways.serve(&world, &hasty).await;
    let (began, commands) = (Instant::now(), Commands::of(&ways.redis));
    for _ in 0..6 {
        let count = HeldCount::of(&world).await;
        let response = service.get("/").await;
        assert_eq!(response.status, StatusCode::SERVICE_UNAVAILABLE);
        count.release().await;
        service.until_ready().await;
    }
    let commands = Commands::of(&ways.redis).since(&commands);
    assert_eq!(commands.all, commands.readings, "{commands:?}");
    assert!(commands.all <= most_readings(began), "{commands:?}");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "reads a clock: make faults"]
async fn visit_beyond_the_queue_is_refused_within_5_ms() {
    let world = World::of_its_own();
    let patient = [
        ("QUEUE_CAPACITY", "1"),
        ("DB_TIMEOUT", "20s"),
        ("VISIT_TIMEOUT", "40s"),
    ];
    let service = world.serve_with(&patient).await;
    let mut count = HeldCount::of(&world).await;
    let first = service.begin_visit();
    count.until_waited_for().await;
    let second = service.begin_visit();
    service.until_queued(1).await;
    let mut wire = Wire::open(&service).await;
    let mut took = Vec::new();
    for _ in 0..100 {
        let asked = Instant::now();
        let response = wire.get("/").await;
        took.push(asked.elapsed());
        assert!(response.starts_with("HTTP/1.1 503 "), "{response}");
        assert!(response.contains("\r\nretry-after: 1\r\n"), "{response}");
        assert!(response.contains(r#"{"db_status":"ok""#), "{response}");
    }
    took.sort_unstable();
    // A few can have waited for a processor.
    assert!(took[89] < Duration::from_millis(5), "{took:?}");
    count.release().await;
    for visit in [first, second] {
        assert_eq!(visit.await.unwrap().status, StatusCode::OK);
    }
    assert_eq!(world.rows().await, 2);
}

/// Proxies to both stores that record what the service sends.
struct Ways {
    postgres: Way,
    redis: Way,
}

impl Ways {
    async fn open(world: &World) -> Self {
        Self {
            postgres: Way::to(world.postgres.port()).await,
            redis: Way::to(world.redis.port()).await,
        }
    }

    /// A service that reaches its stores through these proxies, unencrypted.
    async fn serve(&self, world: &World, settings: &[(&str, &str)]) -> Service {
        let (postgres, redis) = (self.postgres.port.to_string(), self.redis.port.to_string());
        let mut all = vec![
            ("DB_PORT", postgres.as_str()),
            ("REDIS_PORT", redis.as_str()),
            ("DB_SSLMODE", "disable"),
        ];
        all.extend(settings);
        world.serve_with(&all).await
    }
}

/// The most periodic readings of a store since `began`: one at once and one a second; two for Redis,
/// which is read before and after Postgres.
fn most_readings(began: Instant) -> usize {
    2 * usize::try_from(began.elapsed().as_secs()).expect("not that long") + 4
}

/// The number of visits that the service has counted as recorded.
async fn recorded(service: &Service) -> u64 {
    service.counted("ok").await + service.counted("degraded").await
}
