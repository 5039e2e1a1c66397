//! What a batch costs the stores: one statement in one round trip and one command, however many
//! visits it has, and one preparation per connection. The test reads the bytes that the service
//! sends, so it needs no clock.

use std::collections::HashMap;

use crate::support::{HeldCount, Service, Way, World};

pub(crate) const RECORD: &str = "select public.registrar_visitas($1)";
/// The statement that reads the state of a store that is up, once a second.
const READ: &str = "select e.total, e.recontagem, \
    (select max(m.version) from public.visitas_migracoes as m where m.success) \
    from public.estado_da_contagem($1) as e";
/// The statement that follows a reading once a minute.
const MEASURE: &str = "select pg_database_size(current_database())";

#[tokio::test(flavor = "multi_thread")]
async fn batch_is_one_statement_and_one_command_however_many_visits_it_has() {
    let world = World::new();
    let (postgres, redis) = (
        Way::to(world.postgres.port()).await,
        Way::to(world.redis.port()).await,
    );
    let service = serve(&world, &postgres, &redis).await;
    for visits in [1, 10, 300] {
        let (said, commands) = (Messages::of(&postgres), Commands::of(&redis));
        record_one_and_then(visits, &world, &service).await;
        let said = Messages::of(&postgres).since(&said);
        assert_eq!(said.bound(RECORD), 2, "{visits}: {said:?}");
        // A periodic reading opens a session if its time comes while the batch uses the only one.
        // It has one statement, and is pinged five times.
        assert!(said.simple <= said.sessions, "{said:?}");
        // Each statement and each preparation takes one round trip.
        assert_eq!(said.executed, said.all(), "{said:?}");
        let pings = said.awaited - said.all() - said.prepared;
        assert!(pings <= 2 + 5 * said.sessions, "{said:?}");
        let commands = Commands::of(&redis).since(&commands);
        assert_eq!(commands.increments, [1, visits], "{commands:?}");
        // Everything else is a periodic reading of the state, or a ping of an idle connection.
        assert_eq!(said.all(), 2 + said.readings(), "{said:?}");
        assert_eq!(
            commands.all,
            2 + commands.readings + commands.pings,
            "{commands:?}"
        );
        assert!(commands.pings <= 2, "{commands:?}");
        assert!(said.readings() < 100 && commands.readings < 100);
    }
    let (connections, said) = (postgres.said().len(), Messages::of(&postgres));
    assert!(said.record_prepared <= connections, "{said:?}");
}

/// A service that reaches its stores through these proxies, unencrypted.
async fn serve(world: &World, postgres: &Way, redis: &Way) -> Service {
    world
        .serve_with(&[
            ("DB_PORT", &postgres.port.to_string()),
            ("REDIS_PORT", &redis.port.to_string()),
            ("DB_SSLMODE", "disable"),
            // Longer than the visits wait here, even on a busy machine.
            ("DB_TIMEOUT", "10s"),
            ("REDIS_TIMEOUT", "5s"),
            ("VISIT_TIMEOUT", "20s"),
        ])
        .await
}

/// Makes one visit that waits for the count's lock, and this many visits that wait behind it.
async fn record_one_and_then(visits: u32, world: &World, service: &Service) {
    let mut count = HeldCount::of(world).await;
    let mut waiting = vec![service.begin_visit()];
    count.until_waited_for().await;
    waiting.extend((0..visits).map(|_| service.begin_visit()));
    service.until_queued(visits).await;
    count.release().await;
    for visit in waiting {
        assert_eq!(visit.await.expect("a response").status, 200);
    }
}

/// Messages to Postgres, by kind.
#[derive(Debug, Default)]
pub(crate) struct Messages {
    sessions: usize,
    /// Statements sent as text, as migrations are.
    simple: usize,
    prepared: usize,
    /// Preparations of the statement that records visits.
    record_prepared: usize,
    /// Executions of a prepared statement, by its text.
    bound: HashMap<String, usize>,
    executed: usize,
    awaited: usize,
}

impl Messages {
    pub(crate) fn of(way: &Way) -> Self {
        let mut all = Self::default();
        for said in way.said() {
            all.sessions += 1;
            all.read(&said);
        }
        all
    }

    /// Adds the messages of one connection, in version 3 of the protocol of Postgres.
    fn read(&mut self, mut said: &[u8]) {
        let mut statements = HashMap::new();
        // The first message of a connection has a length and no kind.
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
                    let text = statements[word(rest).0];
                    *self.bound.entry(text.to_owned()).or_default() += 1;
                }
                b'E' => self.executed += 1,
                b'S' => self.awaited += 1,
                _ => {}
            }
        }
    }

    pub(crate) fn since(mut self, before: &Self) -> Self {
        self.sessions -= before.sessions;
        self.simple -= before.simple;
        self.prepared -= before.prepared;
        self.record_prepared -= before.record_prepared;
        self.executed -= before.executed;
        self.awaited -= before.awaited;
        for (text, bound) in &before.bound {
            *self.bound.get_mut(text).expect("counted before") -= bound;
        }
        self
    }

    fn bound(&self, text: &str) -> usize {
        self.bound.get(text).copied().unwrap_or(0)
    }

    /// Statements of the monitor, which no request causes.
    pub(crate) fn readings(&self) -> usize {
        self.bound(READ) + self.bound(MEASURE)
    }

    pub(crate) fn all(&self) -> usize {
        self.bound.values().sum()
    }
}

/// Takes the next whole message: its first byte, and what follows its length. The length stands
/// after `kind` bytes and includes itself.
fn take<'a>(said: &mut &'a [u8], kind: usize) -> Option<(u8, &'a [u8])> {
    let length: [u8; 4] = said.get(kind..kind + 4)?.try_into().ok()?;
    let end = kind + u32::from_be_bytes(length) as usize;
    let message = said.get(..end)?;
    *said = &said[end..];
    Some((message[0], &message[kind + 4..]))
}

/// A text that ends with a zero byte, and what follows it.
fn word(bytes: &[u8]) -> (&str, &[u8]) {
    let end = bytes.iter().position(|&byte| byte == 0).expect("an end");
    let text = str::from_utf8(&bytes[..end]).expect("text");
    (text, &bytes[end + 1..])
}

/// Commands to Redis.
#[derive(Debug, Default)]
pub(crate) struct Commands {
    pub(crate) all: usize,
    /// Increments by 0.
    pub(crate) readings: usize,
    pub(crate) pings: usize,
    /// The other increments, sorted.
    pub(crate) increments: Vec<u32>,
}

impl Commands {
    pub(crate) fn of(way: &Way) -> Self {
        let mut commands = Self::default();
        for said in way.said() {
            let said = String::from_utf8(said).expect("text");
            // A command is `*` and the number of its words, then each word after its length.
            for command in said.split('*').skip(1) {
                let words: Vec<_> = command.lines().skip(2).step_by(2).collect();
                commands.all += 1;
                match words[..] {
                    ["PING"] => commands.pings += 1,
                    ["INCRBY", "visitas_home", "0"] => commands.readings += 1,
                    ["INCRBY", "visitas_home", by] => {
                        commands.increments.push(by.parse().expect("a number"));
                    }
                    _ => {}
                }
            }
        }
        commands.increments.sort_unstable();
        commands
    }

    pub(crate) fn since(mut self, before: &Self) -> Self {
        self.all -= before.all;
        self.readings -= before.readings;
        self.pings -= before.pings;
        for by in &before.increments {
            let at = self.increments.iter().position(|now| now == by);
            self.increments.remove(at.expect("sent before"));
        }
        self
    }
}
