//! Many visits at once: each has its own number, row and timestamp.

use std::time::Duration;

use time::OffsetDateTime;
use tokio::task::JoinHandle;

use crate::support::load::{Visit, are_one_to_n, verdict, visits};
use crate::support::{PATIENT, SOON, Service, World, eventually};

#[tokio::test(flavor = "multi_thread")]
#[ignore = "floods: make faults"]
async fn twenty_thousand_visits_are_numbered_without_gap_or_repeat() {
    let world = World::new();
    let service = patient(&world).await;
    let visits = visits(&[&service], 256, 20_000).await;
    assert_eq!(visits.len(), 20_000);
    assert!(are_one_to_n(visits.iter().map(Visit::total)));
    assert!(are_one_to_n(visits.iter().map(Visit::redis)));
    assert_eq!(world.rows().await, 20_000);
    assert_eq!(world.redis_visits().await, 20_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn numbers_ascend_for_each_client() {
    let world = World::new();
    let service = patient(&world).await;
    let mut visits = visits(&[&service], 16, 2_000).await;
    visits.sort_by_key(|visit| (visit.client, visit.sent));
    for of_client in visits.chunk_by(|one, other| one.client == other.client) {
        assert!(of_client.is_sorted_by(|a, b| a.total() < b.total() && a.redis() < b.redis()));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn visits_of_one_commit_are_numbered_in_order_of_arrival() {
    let world = World::new();
    let service = patient(&world).await;
    let (waiting, _) = queue_behind_the_count(&world, &service, 8).await;
    for (number, visit) in (1..).zip(waiting) {
        assert_eq!(visit.await.unwrap(), (number, number));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_row_has_the_time_of_its_own_arrival() {
    let world = World::new();
    let service = patient(&world).await;
    let (waiting, sent) = queue_behind_the_count(&world, &service, 8).await;
    for visit in waiting {
        visit.await.unwrap();
    }
    let moments = moments(&world).await;
    assert_eq!(moments.len(), 8);
    for (moment, sent) in moments.iter().zip(sent.windows(2)) {
        assert!((sent[0]..sent[1]).contains(moment), "{moments:?} {sent:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_instances_number_as_one() {
    let world = World::new();
    let (one, other) = tokio::join!(patient(&world), patient(&world));
    let visits = visits(&[&one, &other], 64, 6_000).await;
    assert!(are_one_to_n(visits.iter().map(Visit::total)));
    assert!(are_one_to_n(visits.iter().map(Visit::redis)));
    // A visit that was answered before another one was sent has the lower number, whichever instance
    // answered.
    let verdict = verdict(&world, &visits, &[]).await;
    assert_eq!(
        (verdict.violations(), verdict.rows),
        (0, 6_000),
        "{verdict:?}"
    );
    assert_eq!(one.visit().await, (6_001, 6_001));
}

#[tokio::test(flavor = "multi_thread")]
async fn five_instances_migrate_an_empty_database_once() {
    let world = World::new();
    let serve = || patient(&world);
    let instances: [Service; 5] = tokio::join!(serve(), serve(), serve(), serve(), serve()).into();
    let log: Vec<_> = instances.iter().flat_map(Service::log).collect();
    let applied = log
        .iter()
        .filter_map(|line| line["migrations.applied"].as_i64());
    assert_eq!(applied.sum::<i64>(), 3);
    assert!(!log.iter().any(|line| line["message"] == "store is down"));
    let migrations = "select count(*) from visitas_migracoes where success";
    assert_eq!(world.number(migrations).await, 3);
    let visits = visits(&instances.each_ref(), 10, 500).await;
    assert!(are_one_to_n(visits.iter().map(Visit::total)));
}

/// A service whose timeouts are longer than a busy machine takes.
async fn patient(world: &World) -> Service {
    world.serve_with(&PATIENT).await
}

/// Makes visits one after another while the count's lock is held, so that all of them wait: the
/// first one for the lock, the others in the queue. Releases the lock and returns the visits and the
/// times between which each was sent.
async fn queue_behind_the_count(
    world: &World,
    service: &Service,
    visits: usize,
) -> (Vec<JoinHandle<(i64, i64)>>, Vec<OffsetDateTime>) {
    let lock = world.transaction("select public.travar_contagem()").await;
    let mut sent = vec![OffsetDateTime::now_utc()];
    let mut waiting = Vec::new();
    for already in 0..visits {
        let visit = service.client.get(service.url("/"));
        waiting.push(tokio::spawn(async move {
            let response = visit.send().await.unwrap().text().await.unwrap();
            let json: serde_json::Value = serde_json::from_str(&response).unwrap();
            let number = |field: &str| json[field].as_i64().unwrap();
            (number("total_registros_db"), number("visitas_redis"))
        }));
        eventually("the visit waits", SOON, async || {
            is_waiting(world, service, already).await
        })
        .await;
        // A timestamp of Postgres has whole microseconds; without a pause two could be equal.
        tokio::time::sleep(Duration::from_micros(2)).await;
        sent.push(OffsetDateTime::now_utc());
    }
    drop(lock);
    (waiting, sent)
}

/// Whether one visit waits in Postgres and this many in the queue.
async fn is_waiting(world: &World, service: &Service, already: usize) -> bool {
    let locked = "select count(*) from pg_locks where locktype = 'advisory' and not granted \
                  and database = (select oid from pg_database where datname = current_database())";
    service.metric("visitas_queue_depth").await == Some(already as f64)
        && world.number(locked).await == 1
}

async fn moments(world: &World) -> Vec<OffsetDateTime> {
    sqlx::query_scalar("select data from visitas order by id")
        .fetch_all(&mut world.session().await)
        .await
        .unwrap()
}
