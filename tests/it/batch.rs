//! What a batch costs the stores: one statement in one round trip and one command, however many
//! visits it has, and on each connection one preparation for good. Read from what the service says to them, byte by byte.

use std::collections::HashMap;

use crate::support::{HeldCount, Service, Way, World};

const RECORD: &str = "select public.registrar_visitas($1)";

#[tokio::test(flavor = "multi_thread")]
async fn batch_is_one_statement_and_one_command_however_many_visits_it_has() {
    let world = World::new();
    let (postgres, redis) = (
        Way::to(world.postgres.port()).await,
        Way::to(world.redis.port()).await,
    );
    let service = serve(&world, &postgres, &redis).await;
    for visits in [1, 10, 300] {
        let (sent, counted) = (Messages::of(&postgres), increments(&redis));
        record_one_and_then(visits, &world, &service).await;
        let sent = Messages::of(&postgres).since(&sent);
        assert_eq!(sent.recorded, 2, "{visits}");
        // Each statement is executed once and waited for once, as is each preparation.
        assert_eq!((sent.simple, sent.executed), (0, sent.bound), "{visits}");
        assert_eq!(sent.awaited, sent.bound + sent.prepared, "{visits}");
        assert_eq!(increments(&redis)[counted.len()..], [1, visits]);
    }
    let (connections, all) = (postgres.said().len(), Messages::of(&postgres));
    assert!(all.record_prepared <= connections, "{all:?}, {connections}");
}

/// A service that speaks to its stores by these ways, readably.
async fn serve(world: &World, postgres: &Way, redis: &Way) -> Service {
    world
        .serve_with(&[
            ("DB_PORT", &postgres.port.to_string()),
            ("REDIS_PORT", &redis.port.to_string()),
            ("DB_SSLMODE", "disable"),
            // Longer than the visits wait here, on a busy machine too.
            ("DB_TIMEOUT", "10s"),
            ("REDIS_TIMEOUT", "5s"),
            ("VISIT_TIMEOUT", "20s"),
        ])
        .await
}

/// Lets one visit wait for the count, and so many others for that one.
async fn record_one_and_then(visits: u32, world: &World, service: &Service) {
    let mut count = HeldCount::of(world).await;
    let mut waiting = vec![service.begin_visit()];
    count.until_waited_for().await;
    waiting.extend((0..visits).map(|_| service.begin_visit()));
    service.until_queued(visits).await;
    count.release().await;
    for visit in waiting {
        assert_eq!(visit.await.expect("an answer").status, 200);
    }
}

/// Messages to Postgres, by what they ask for.
#[derive(Debug, Default)]
struct Messages {
    /// Statements as text, as migrations are.
    simple: usize,
    prepared: usize,
    bound: usize,
    executed: usize,
    awaited: usize,
    /// Of those that were bound, the ones that record visits.
    recorded: usize,
    /// Of those that were prepared, the ones that record visits.
    record_prepared: usize,
}

impl Messages {
    fn of(way: &Way) -> Self {
        let mut all = Self::default();
        for said in way.said() {
            all.read(&said);
        }
        all
    }

    /// One client's, in the protocol of Postgres, version 3.
    fn read(&mut self, mut said: &[u8]) {
        let mut statements = HashMap::new();
        // The first message has a length and no kind.
        take(&mut said, 0);
        while let Some((kind, body)) = take(&mut said, 1) {
            match kind {
                b'Q' => self.simple += 1,
                b'P' => {
                    self.prepared += 1;
                    let (name, rest) = word(body);
                    let text = word(rest).0;
                    self.record_prepared += usize::from(text == RECORD);
                    statements.insert(name, text);
                }
                b'B' => {
                    let (_portal, rest) = word(body);
                    self.bound += 1;
                    self.recorded += usize::from(statements[word(rest).0] == RECORD);
                }
                b'E' => self.executed += 1,
                b'S' => self.awaited += 1,
                _ => {}
            }
        }
    }

    fn since(self, before: &Self) -> Self {
        Self {
            simple: self.simple - before.simple,
            prepared: self.prepared - before.prepared,
            bound: self.bound - before.bound,
            executed: self.executed - before.executed,
            awaited: self.awaited - before.awaited,
            recorded: self.recorded - before.recorded,
            record_prepared: self.record_prepared - before.record_prepared,
        }
    }
}

/// The next whole message: what stands in its first byte, and what follows its length. The length
/// stands after `kind` bytes and counts itself.
fn take<'a>(said: &mut &'a [u8], kind: usize) -> Option<(u8, &'a [u8])> {
    let length: [u8; 4] = said.get(kind..kind + 4)?.try_into().ok()?;
    let end = kind + u32::from_be_bytes(length) as usize;
    let message = said.get(..end)?;
    *said = &said[end..];
    Some((message[0], &message[kind + 4..]))
}

/// A text that ends with a zero, and what follows it.
fn word(bytes: &[u8]) -> (&str, &[u8]) {
    let end = bytes.iter().position(|&byte| byte == 0).expect("an end");
    let text = str::from_utf8(&bytes[..end]).expect("text");
    (text, &bytes[end + 1..])
}

/// By how much the counter was to be moved, in order. The monitor reads it by adding nothing.
fn increments(way: &Way) -> Vec<u32> {
    let said = way.said().concat();
    let said = String::from_utf8_lossy(&said);
    said.split("INCRBY\r\n$12\r\nvisitas_home\r\n")
        .skip(1)
        .map(|rest| rest.lines().nth(1).expect("an argument"))
        .map(|by| by.parse().expect("a number"))
        .filter(|&by| by != 0)
        .collect()
}
