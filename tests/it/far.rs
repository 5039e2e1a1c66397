//! Stores a network away: several batches are in flight, and each visit still has its own number.

use std::time::Duration;

use crate::support::load::{Load, Visit, are_one_to_n, verdict, visits};
use crate::support::{HeldCount, PATIENT, SOON, Service, Way, World, eventually};

/// Far more than a commit takes on a busy machine.
const DELAY: Duration = Duration::from_millis(40);

#[tokio::test(flavor = "multi_thread")]
async fn several_batches_are_in_flight_and_number_visits_as_one() {
    let world = World::new();
    let (one, other) = (Far::serve(&world).await, Far::serve(&world).await);
    let visits = visits(&[&one.service, &other.service], 32, 1000).await;
    assert!(are_one_to_n(visits.iter().map(Visit::total)));
    assert!(are_one_to_n(visits.iter().map(Visit::redis)));
    let verdict = verdict(&world, &visits, &[]).await;
    assert_eq!(
        (verdict.violations(), verdict.rows),
        (0, 1000),
        "{verdict:?}"
    );
    for far in [&one, &other] {
        let recording = far.sessions_that_record();
        assert!(recording > 1, "{recording} sessions");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn several_batches_are_in_flight_if_only_postgres_is_far_away() {
    let world = World::new();
    let far = Far::serve_with(&world, Duration::ZERO).await;
    let mut loads = vec![Load::start(&[&far.service], 32)];
    let count = far.hold_several_batches(&world, &mut loads).await;
    count.release().await;
    let mut visits = Vec::new();
    for load in loads {
        visits.extend(load.stop().await);
    }
    let verdict = verdict(&world, &visits, &[]).await;
    assert_eq!(verdict.violations(), 0, "{verdict:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn new_session_far_away_is_not_pinged_several_times() {
    let world = World::new();
    let most_pings = async |delay: Duration| {
        let way = Way::with_delay(world.postgres.port(), delay).await;
        let port = way.port.to_string();
        let mut settings = PATIENT.to_vec();
        settings.extend([("DB_PORT", port.as_str()), ("DB_SSLMODE", "disable")]);
        let service = world.serve_with(&settings).await;
        service.visit().await;
        way.said().iter().map(|said| pings_in_a_row(said)).max()
    };
    // One at the most follows the first, once the session has been idle.
    assert!(most_pings(DELAY).await < Some(3));
    // On a busy machine a near one can seem far.
    eventually("a near session is pinged several times", SOON, async || {
        most_pings(Duration::ZERO).await > Some(2)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_are_reset_under_several_batches_are_one_outage() {
    let world = World::new();
    let far = Far::serve(&world).await;
    let mut loads = vec![Load::start(&[&far.service], 32)];
    eventually("several batches are in flight", SOON, async || {
        far.sessions_that_record() > 1
    })
    .await;
    let count = far.hold_several_batches(&world, &mut loads).await;
    far.postgres.reset();
    eventually("both batches are in doubt", SOON, async || {
        far.batches_in_doubt() > 1
    })
    .await;
    count.release().await;
    eventually("the outage is over", SOON, async || {
        far.service.logged("store is up again").len() == 1
    })
    .await;
    let rows = world.rows().await;
    eventually("visits are made again", SOON, async || {
        world.rows().await > rows + 100
    })
    .await;
    let mut visits = Vec::new();
    for load in loads {
        visits.extend(load.stop().await);
    }
    let verdict = verdict(&world, &visits, &[]).await;
    assert_eq!(verdict.violations(), 0, "{verdict:?}");
    let in_doubt = far.service.counted("in_doubt").await;
    assert_eq!(u64::try_from(verdict.in_doubt).unwrap(), in_doubt);
    assert!((2..=4).contains(&far.batches_in_doubt()));
    assert_eq!(far.service.logged("store is down").len(), 1);
}

/// Redis counts one batch after another, but none is left out because the one before it takes long.
#[tokio::test(flavor = "multi_thread")]
async fn batch_behind_a_slow_call_to_redis_is_counted() {
    let world = World::new();
    let redis = Way::with_delay(world.redis.port(), DELAY).await;
    let port = redis.port.to_string();
    let settings = [
        ("REDIS_PORT", port.as_str()),
        ("REDIS_TIMEOUT", "1s"),
        PATIENT[0],
        PATIENT[2],
    ];
    let service = world.serve_with(&settings).await;
    let load = Load::start(&[&service], 16);
    for _ in 0..3 {
        some_are_recorded(&world).await;
        redis.delay(Duration::from_millis(800));
        // A batch leaves meanwhile.
        tokio::time::sleep(2 * DELAY).await;
        redis.delay(DELAY);
    }
    let visits = load.stop().await;
    let longest = visits.iter().map(|visit| visit.took).max();
    assert!(longest > Some(Duration::from_millis(800)), "{longest:?}");
    assert!(are_one_to_n(visits.iter().map(Visit::redis)));
}

/// A service whose stores are a network away.
struct Far {
    service: Service,
    postgres: Way,
    _redis: Way,
}

impl Far {
    async fn serve(world: &World) -> Self {
        Self::serve_with(world, DELAY).await
    }

    async fn serve_with(world: &World, delay_of_redis: Duration) -> Self {
        let postgres = Way::with_delay(world.postgres.port(), DELAY).await;
        let redis = Way::with_delay(world.redis.port(), delay_of_redis).await;
        let (postgres_port, redis_port) = (postgres.port.to_string(), redis.port.to_string());
        let mut settings = PATIENT.to_vec();
        settings.extend([
            ("DB_PORT", postgres_port.as_str()),
            ("REDIS_PORT", redis_port.as_str()),
            ("DB_SSLMODE", "disable"),
        ]);
        Self {
            service: world.serve_with(&settings).await,
            postgres,
            _redis: redis,
        }
    }

    /// The number of sessions that have recorded visits.
    fn sessions_that_record(&self) -> usize {
        let record = b"registrar_visitas";
        let said = self.postgres.said();
        let records = |said: &&Vec<u8>| said.windows(record.len()).any(|word| word == record);
        said.iter().filter(records).count()
    }

    /// Takes the count's lock while several batches wait for it. Clients that are answered together
    /// visit again together, so a second batch needs visits of other clients.
    async fn hold_several_batches(&self, world: &World, loads: &mut Vec<Load>) -> HeldCount {
        for _ in 0..10 {
            // Batches that take as long as usual.
            some_are_recorded(world).await;
            let mut count = HeldCount::of(world).await;
            loads.push(Load::start(&[&self.service], 2));
            for _ in 0..50 {
                if count.waiting().await > 1 {
                    return count;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            count.release().await;
        }
        panic!("no two batches wait for the lock");
    }

    fn batches_in_doubt(&self) -> usize {
        let in_doubt = "visits in doubt: statement sent, result unknown";
        self.service.logged(in_doubt).len()
    }
}

/// Waits until some batches are recorded.
async fn some_are_recorded(world: &World) {
    let rows = world.rows().await;
    eventually("some batches are recorded", SOON, async || {
        world.rows().await > rows + 500
    })
    .await;
}

/// The most pings that a client has sent without another message between them. A ping is the
/// message Sync of the protocol.
fn pings_in_a_row(said: &[u8]) -> usize {
    const SYNC: &[u8] = b"S\0\0\0\x04";
    let (mut most, mut pings, mut rest) = (0, 0, said);
    while !rest.is_empty() {
        if let Some(after) = rest.strip_prefix(SYNC) {
            (pings, rest) = (pings + 1, after);
            most = most.max(pings);
        } else {
            (pings, rest) = (0, &rest[1..]);
        }
    }
    most
}
