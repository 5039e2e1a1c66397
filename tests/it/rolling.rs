//! Replicas that restart one after another, as in a rolling update, while clients keep their
//! connections.

use std::net::SocketAddr;

use lab::rolling::{Crowd, Relay, Replicas, Tally};

use crate::support::{SOON, Service, World, eventually};

/// Timeouts longer than a stall of the disk, so that only a restart could fail a visit.
const SETTINGS: [(&str, &str); 4] = [
    ("SHUTDOWN_DELAY", "500ms"),
    ("SHUTDOWN_TIMEOUT", "20s"),
    ("DB_TIMEOUT", "8s"),
    ("VISIT_TIMEOUT", "9s"),
];
const REPLICAS: usize = 3;
const RESTARTS: usize = 6;
/// Clients that keep their connection, and clients that open one for each visit.
const KEEPING: usize = 16;
const OPENING: usize = 4;

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_choose_among_replicas_see_no_restart() {
    let world = World::new();
    let replicas = Replicas::default();
    let seen = restart_in_turn(&world, &replicas, Crowd::start(KEEPING, OPENING, &replicas)).await;
    assert!(seen.refused > 0, "{seen:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_behind_a_balancer_that_keeps_connections_see_no_restart() {
    let world = World::new();
    let replicas = Replicas::default();
    let relay = Relay::start(&replicas).unwrap();
    let balanced = Replicas::default();
    balanced.add(relay.address);
    restart_in_turn(&world, &replicas, Crowd::start(KEEPING, OPENING, &balanced)).await;
}

/// Expects that every visit is answered 200, and that each visit is one row.
async fn restart_in_turn(world: &World, replicas: &Replicas, crowd: Crowd) -> Tally {
    let mut running = Vec::new();
    for _ in 0..REPLICAS {
        running.push(start(world, replicas).await);
    }
    for _ in 0..RESTARTS {
        until_visited(&crowd).await;
        let (service, address) = running.remove(0);
        service.signal("TERM");
        assert!(
            service.ended(3 * SOON).await.success(),
            "{}",
            service.printed()
        );
        replicas.remove(address);
        running.push(start(world, replicas).await);
    }
    until_visited(&crowd).await;
    let seen = tokio::task::spawn_blocking(|| crowd.leave()).await.unwrap();
    assert_eq!(seen.failures, Vec::<String>::new(), "{seen:?}");
    assert_eq!(world.rows().await, i64::try_from(seen.visits).unwrap());
    seen
}

async fn start(world: &World, replicas: &Replicas) -> (Service, SocketAddr) {
    let service = world.serve_with(&SETTINGS).await;
    let address = service.address;
    replicas.add(address);
    (service, address)
}

/// Waits until the clients have made 200 more visits, so that all of them are active.
async fn until_visited(crowd: &Crowd) {
    let before = crowd.visits();
    eventually("clients visit", SOON, async || {
        crowd.visits() >= before + 200
    })
    .await;
}
