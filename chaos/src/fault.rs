//! The faults: how each is injected and healed, and the harm that clients are allowed to notice.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use devstack::Postgres;
use lab::history::Visit;
use lab::proxy::{Cut, Proxy, Rules};
use lab::visitor::Visitor;
use sqlx::PgConnection;

use crate::chance;
use crate::ground::{Ground, Needs, REDIS_PASSWORD, Store};
use crate::service::Service;

/// One fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The name, in the report and for `--only`.
    pub name: &'static str,
    /// The worst harm that clients are allowed to notice.
    pub harm: Harm,
    /// The kind of fault.
    pub kind: Kind,
}

/// The harm that clients are allowed to notice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Harm {
    /// Only longer responses.
    Nothing,
    /// The number from Redis is missing.
    Count,
    /// Visits are refused.
    Visits,
}

/// The kind of fault, with the store or service that it affects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// SIGKILL to all processes of a store, then a restart.
    Kill(Store),
    /// SIGKILL to the service, then a restart.
    KillService,
    /// SIGSTOP to all processes of a store.
    Pause(Store),
    /// Open connections carry nothing any more; new ones work.
    SilenceEstablished(Store),
    /// Open connections are reset; new ones are refused.
    Refuse(Store),
    /// Each connection that records visits is reset.
    Cut(Store, Cut),
    /// Messages between the service and a store are delayed.
    Delay(Store),
    /// The bandwidth between the service and a store is limited.
    Narrow(Store),
    /// Other clients hold all connections of Postgres.
    ConnectionsTaken,
    /// Postgres is read-only.
    ReadOnly,
    /// The disk of Postgres is full.
    DiskFull,
    /// Postgres restarts again and again.
    RestartLoop,
    /// Another session holds the count's lock.
    CountLocked,
    /// A transaction that has inserted rows by hand stays open and idle.
    IdleTransaction,
    /// Another session holds the migration lock when the service first starts.
    MigrationLocked,
    /// Redis has no memory left for writes.
    OutOfMemory,
    /// Redis has become a replica.
    Replica,
    /// The password of Redis has changed.
    WrongPassword,
    /// There is a list under the counter's key.
    WrongType,
    /// The names of the stores do not resolve, and sessions have ended.
    NamesGone,
    /// The collector reads nothing and does not respond.
    CollectorSilent,
    /// Five instances start at once on an empty database.
    FiveInstances,
    /// Clients disconnect before their responses.
    Disconnects,
}

/// An active fault, with the data that healing it needs.
pub struct ActiveFault {
    kind: Kind,
    cause: Cause,
    /// The proxy's count of effects before the fault.
    effects_before: u64,
}

/// The resource that keeps a fault active.
enum Cause {
    Nothing,
    Sessions(Vec<PgConnection>),
    RestartLoop(RestartLoop),
    Storm(Storm),
}

/// The result of healing a fault.
#[derive(Clone, Debug)]
pub struct Repair {
    /// When the broken part worked again, observed without the service.
    pub at: Instant,
    /// Visits that the fault's own clients made meanwhile.
    pub others: Vec<Visit>,
}

const fn fault(name: &'static str, harm: Harm, kind: Kind) -> Fault {
    Fault { name, harm, kind }
}

/// All faults, in the report's order.
pub const ALL: [Fault; 32] = {
    use Harm::{Count, Nothing, Visits};
    use Kind as K;
    use Store::{Postgres, Redis};
    [
        fault("postgres killed", Visits, K::Kill(Postgres)),
        fault("redis killed", Count, K::Kill(Redis)),
        fault("service killed", Visits, K::KillService),
        fault("postgres paused", Visits, K::Pause(Postgres)),
        fault("redis paused", Count, K::Pause(Redis)),
        fault(
            "postgres, open connections silent",
            Visits,
            K::SilenceEstablished(Postgres),
        ),
        fault(
            "redis, open connections silent",
            Count,
            K::SilenceEstablished(Redis),
        ),
        fault("postgres refuses connections", Visits, K::Refuse(Postgres)),
        fault("redis refuses connections", Count, K::Refuse(Redis)),
        fault(
            "postgres, reset in mid-statement",
            Visits,
            K::Cut(Postgres, Cut::Statement),
        ),
        fault(
            "postgres, reset before the reply",
            Visits,
            K::Cut(Postgres, Cut::Reply),
        ),
        fault(
            "redis, reset in mid-command",
            Count,
            K::Cut(Redis, Cut::Statement),
        ),
        fault(
            "redis, reset before the reply",
            Count,
            K::Cut(Redis, Cut::Reply),
        ),
        fault("postgres, 60 ms away", Nothing, K::Delay(Postgres)),
        fault("redis, 60 ms away", Nothing, K::Delay(Redis)),
        fault("postgres, 16 KiB/s", Nothing, K::Narrow(Postgres)),
        fault("redis, 16 KiB/s", Nothing, K::Narrow(Redis)),
        fault("postgres, connections used up", Visits, K::ConnectionsTaken),
        fault("postgres read-only", Visits, K::ReadOnly),
        fault("postgres, disk full", Visits, K::DiskFull),
        fault("postgres restarts in a loop", Visits, K::RestartLoop),
        fault("count's lock held", Visits, K::CountLocked),
        fault("idle transaction with visits", Nothing, K::IdleTransaction),
        fault("migration lock held", Visits, K::MigrationLocked),
        fault("redis out of memory", Count, K::OutOfMemory),
        fault("redis read-only", Count, K::Replica),
        fault("redis, wrong password", Count, K::WrongPassword),
        fault("redis, another type under the key", Count, K::WrongType),
        fault("names do not resolve", Visits, K::NamesGone),
        fault("collector silent", Nothing, K::CollectorSilent),
        fault(
            "five instances on an empty database",
            Visits,
            K::FiveInstances,
        ),
        fault("storm of disconnects", Nothing, K::Disconnects),
    ]
};

/// The lock lasts as long as the session.
const COUNT_LOCK: &str = "begin; select public.travar_contagem()";
const MIGRATION_LOCK: &str = "select pg_advisory_lock(8532477865791419136)";
const VISITS_BY_HAND: &str =
    "begin; insert into visitas (data) select now() from generate_series(1, 1000)";

const DELAY_EACH_WAY: Duration = Duration::from_millis(30);
const NARROW: u32 = 16 * 1024;
/// Bytes of the shortest call that records visits: `INCRBY visitas_home 1`.
const SHORTEST_CALL: u32 = 42;

impl Fault {
    /// The environment that the fault needs.
    pub fn needs(&self) -> Needs {
        let mut needs = Needs::default();
        match self.kind {
            Kind::SilenceEstablished(_)
            | Kind::Refuse(_)
            | Kind::Cut(..)
            | Kind::Delay(_)
            | Kind::Narrow(_) => needs.proxies = true,
            // A service that is suspended during a login keeps its connection until the timeout.
            Kind::ConnectionsTaken => {
                needs.postgres = &[("max_connections", "16"), ("authentication_timeout", "1s")];
            }
            Kind::DiskFull => {
                needs.small_disk = true;
                needs.postgres = &[("min_wal_size", "32MB"), ("max_wal_size", "48MB")];
            }
            Kind::WrongPassword => needs.password = true,
            Kind::NamesGone => needs.names = true,
            Kind::CollectorSilent => needs.collector = true,
            _ => {}
        }
        needs
    }

    /// The number of replicas of the service.
    pub fn replicas(&self) -> usize {
        match self.kind {
            Kind::FiveInstances => 5,
            // A kill is short, which leaves processor time for a third replica.
            Kind::Kill(_) | Kind::KillService => 3,
            _ => 2,
        }
    }

    /// Whether the fault can harm visits to this replica.
    pub fn affects(&self, replica: usize) -> bool {
        self.kind != Kind::KillService || replica == 0
    }

    /// Whether Redis and its connections work all the time: then every recorded visit must be
    /// counted, and every refusal must have the last number from Redis.
    pub fn spares_redis(&self) -> bool {
        use Store::Postgres;
        match self.kind {
            Kind::Kill(Postgres)
            | Kind::Pause(Postgres)
            | Kind::SilenceEstablished(Postgres)
            | Kind::Refuse(Postgres)
            | Kind::Cut(Postgres, _)
            | Kind::Delay(_)
            | Kind::Narrow(_)
            | Kind::ReadOnly
            | Kind::DiskFull
            | Kind::RestartLoop
            | Kind::CountLocked
            | Kind::IdleTransaction
            | Kind::CollectorSilent
            | Kind::Disconnects => true,
            Kind::Kill(Store::Redis)
            | Kind::Pause(Store::Redis)
            | Kind::SilenceEstablished(Store::Redis)
            | Kind::Refuse(Store::Redis)
            | Kind::Cut(Store::Redis, _)
            | Kind::OutOfMemory
            | Kind::Replica
            | Kind::WrongPassword
            | Kind::WrongType
            | Kind::NamesGone
            // The replicas are suspended meanwhile, possibly for longer than `REDIS_TIMEOUT`.
            | Kind::ConnectionsTaken
            // A starting replica has not read Redis yet.
            | Kind::KillService
            | Kind::MigrationLocked
            | Kind::FiveInstances => false,
        }
    }

    /// Whether the fault is active before the service first starts.
    pub fn precedes_start(&self) -> bool {
        matches!(self.kind, Kind::MigrationLocked | Kind::FiveInstances)
    }

    /// Whether the replicas are suspended while the fault is injected.
    pub fn suspends_replicas(&self) -> bool {
        self.kind == Kind::ConnectionsTaken
    }

    /// Whether the fault is a kill: a repetition takes only as long as the recovery.
    pub fn is_a_kill(&self) -> bool {
        matches!(self.kind, Kind::Kill(_) | Kind::KillService)
    }

    /// Whether the service must recover while the fault is still active.
    pub fn must_recover_while_active(&self) -> bool {
        matches!(self.kind, Kind::SilenceEstablished(_))
    }

    /// Whether the fault harms a visit to every replica that it affects. A replica can find silent
    /// connections without harm: by the ping before a visit, or while a reading of the store uses
    /// its only one. The proxy's own count then shows that the fault took effect.
    pub fn must_harm_every_replica(&self) -> bool {
        self.harm != Harm::Nothing && !matches!(self.kind, Kind::SilenceEstablished(_))
    }

    /// Whether a visit is harmed as the fault is allowed to harm it.
    pub fn is_harmed(&self, visit: &Visit) -> bool {
        match self.harm {
            Harm::Visits => !visit.is_recorded(),
            Harm::Nothing | Harm::Count => !visit.is_complete(),
        }
    }

    /// Whether the fault harms every visit from the first harmed visit to its end.
    pub fn harms_every_visit(&self) -> bool {
        let leaves_some = matches!(
            self.kind,
            Kind::SilenceEstablished(_) | Kind::Cut(..) | Kind::DiskFull | Kind::RestartLoop
        );
        self.harm != Harm::Nothing && !leaves_some
    }

    /// Whether the counter in Redis restarts.
    pub fn counter_restarts(&self) -> bool {
        self.kind == Kind::Kill(Store::Redis)
    }

    /// Maximum time until visits are complete again.
    pub fn recovery(&self) -> Duration {
        match self.kind {
            // The store's timeout must expire first.
            Kind::SilenceEstablished(Store::Postgres) => Duration::from_millis(1250),
            Kind::SilenceEstablished(Store::Redis) => Duration::from_millis(500),
            // Includes a start of the service.
            Kind::KillService | Kind::FiveInstances => Duration::from_secs(1),
            _ => Duration::from_millis(250),
        }
    }

    /// Maximum response time: the timeouts of the stores that the fault harms plus a tenth, and the
    /// response time with slow stores.
    pub fn longest_response(&self) -> Duration {
        const REDIS: Duration = Duration::from_millis(275);
        const POSTGRES: Duration = Duration::from_millis(1100);
        const SLOW: Duration = Duration::from_millis(100);
        match self.harm {
            Harm::Nothing | Harm::Count => REDIS + SLOW,
            Harm::Visits => POSTGRES + REDIS,
        }
    }

    /// The minimum response time during a fault that only slows visits.
    pub fn shortest_visit(&self) -> Duration {
        match self.kind {
            Kind::Delay(_) => 2 * DELAY_EACH_WAY,
            Kind::Narrow(_) => {
                Duration::from_secs_f64(f64::from(SHORTEST_CALL) / f64::from(NARROW))
            }
            _ => Duration::ZERO,
        }
    }

    /// Injects the fault.
    pub fn inject(&self, ground: &Ground, services: &mut [Service]) -> Result<ActiveFault> {
        let mut cause = Cause::Nothing;
        let effects_before = self.kind.proxy(ground).map_or(0, Proxy::effects);
        match self.kind {
            Kind::Kill(store) => ground.server(store).kill()?,
            Kind::KillService => services[0].kill()?,
            Kind::Pause(store) => ground.server(store).pause()?,
            Kind::SilenceEstablished(store) => ground.proxy_to(store).silence_established(),
            Kind::Refuse(store) => ground.runtime.block_on(ground.proxy_to(store).refuse()),
            Kind::Cut(store, cut) => change(ground, store, |rules| rules.cut = Some(cut)),
            Kind::Delay(store) => {
                change(ground, store, |rules| rules.delay_each_way(DELAY_EACH_WAY));
            }
            Kind::Narrow(store) => {
                change(ground, store, |rules| rules.bytes_per_second = Some(NARROW));
            }
            Kind::ConnectionsTaken => {
                // Otherwise the replicas would reconnect first.
                let mut taken = Vec::new();
                while_paused(services, &mut || {
                    taken = take_connections(ground)?;
                    Ok(())
                })?;
                cause = Cause::Sessions(taken);
            }
            Kind::ReadOnly => set_read_only(ground, true)?,
            Kind::DiskFull => ground.disk.as_ref().context("no disk")?.fill()?,
            Kind::RestartLoop => cause = Cause::RestartLoop(RestartLoop::start(&ground.postgres)),
            Kind::CountLocked => cause = Cause::Sessions(vec![ground.session(COUNT_LOCK)?]),
            Kind::IdleTransaction => cause = Cause::Sessions(vec![ground.session(VISITS_BY_HAND)?]),
            Kind::MigrationLocked => cause = Cause::Sessions(vec![ground.session(MIGRATION_LOCK)?]),
            Kind::OutOfMemory => redis(ground, &["CONFIG SET maxmemory 1"])?,
            Kind::Replica => redis(ground, &["REPLICAOF 127.0.0.1 1"])?,
            Kind::WrongPassword => redis(
                ground,
                &[
                    "CONFIG SET requirepass outra",
                    "CLIENT KILL TYPE normal SKIPME yes",
                ],
            )?,
            // One script, so that no visit comes in between.
            Kind::WrongType => redis(
                ground,
                &["EVAL \"redis.call('RENAME', 'visitas_home', 'guardada') \
                   return redis.call('LPUSH', 'visitas_home', 'x')\" 0"],
            )?,
            Kind::NamesGone => {
                ground.names.as_ref().context("no names")?.remove()?;
                ground.end_service_sessions()?;
            }
            Kind::CollectorSilent => {
                let way = &ground.collector_proxy;
                way.change(|rules| rules.silent_below = u64::MAX);
            }
            Kind::FiveInstances => {}
            Kind::Disconnects => cause = Cause::Storm(Storm::start(ground, services)),
        }
        Ok(ActiveFault {
            kind: self.kind,
            cause,
            effects_before,
        })
    }
}

impl Kind {
    /// The proxy that applies the fault.
    fn proxy(self, ground: &Ground) -> Option<&Proxy> {
        match self {
            Self::SilenceEstablished(store)
            | Self::Refuse(store)
            | Self::Cut(store, _)
            | Self::Delay(store)
            | Self::Narrow(store) => Some(ground.proxy_to(store)),
            Self::CollectorSilent => Some(&ground.collector_proxy),
            _ => None,
        }
    }
}

impl ActiveFault {
    /// Checks, while the fault is active, that it has taken effect, and returns the missing
    /// evidence. For faults that harm visits, the harm is further evidence.
    pub fn missing_evidence(&self, ground: &Ground) -> Result<Option<&'static str>> {
        if let Some(proxy) = self.kind.proxy(ground)
            && proxy.effects() == self.effects_before
        {
            return Ok(Some("the proxy carried nothing that it could break"));
        }
        let is_open = match self.kind {
            Kind::IdleTransaction => ground.sql(
                "select count(*) > 0 from pg_stat_activity \
                 where state = 'idle in transaction' and backend_xid is not null",
            )?,
            _ => return Ok(None),
        };
        Ok((is_open != "t").then_some("no transaction with visits is open and idle"))
    }

    /// Heals the fault.
    pub fn heal(self, ground: &Ground, services: &mut [Service]) -> Result<Repair> {
        let mut others = Vec::new();
        // For most faults, the time before healing is the right one.
        let mut at = Instant::now();
        match (self.kind, self.cause) {
            (Kind::Kill(store), _) => at = ground.start_again(store)?,
            (Kind::KillService, _) => services[0].start()?,
            (Kind::Pause(store), _) => ground.server(store).resume()?,
            (
                Kind::SilenceEstablished(store)
                | Kind::Refuse(store)
                | Kind::Cut(store, _)
                | Kind::Delay(store)
                | Kind::Narrow(store),
                _,
            ) => {
                ground.clear(ground.proxy_to(store))?;
                // What was sent before the rules were gone can still be broken.
                at = Instant::now();
            }
            (Kind::ReadOnly, _) => {
                set_read_only(ground, false)?;
                at = ground.wait_for_postgres()?;
            }
            (Kind::DiskFull, _) => {
                ground.disk.as_ref().context("no disk")?.empty()?;
                at = ground.revive_postgres()?;
            }
            (Kind::RestartLoop, Cause::RestartLoop(restart_loop)) => {
                restart_loop.stop()?;
                at = ground.start_again(Store::Postgres)?;
            }
            (_, Cause::Sessions(sessions)) => ground.end(sessions),
            (Kind::OutOfMemory, _) => redis(ground, &["CONFIG SET maxmemory 0"])?,
            (Kind::Replica, _) => redis(ground, &["REPLICAOF NO ONE"])?,
            (Kind::WrongPassword, _) => {
                let mut administrator = ground.administrator_with("outra")?;
                administrator.command(&format!("CONFIG SET requirepass {REDIS_PASSWORD}"))?;
            }
            (Kind::WrongType, _) => redis(ground, &["RENAME guardada visitas_home"])?,
            (Kind::NamesGone, _) => ground.names.as_ref().context("no names")?.publish()?,
            (Kind::CollectorSilent, _) => ground.clear(&ground.collector_proxy)?,
            (Kind::Disconnects, Cause::Storm(storm)) => others = storm.stop(ground),
            _ => {}
        }
        Ok(Repair { at, others })
    }
}

fn change(ground: &Ground, store: Store, change: impl FnOnce(&mut Rules)) {
    ground.proxy_to(store).change(change);
}

fn redis(ground: &Ground, lines: &[&str]) -> Result<()> {
    let mut administrator = ground.administrator()?;
    lines
        .iter()
        .try_for_each(|line| administrator.command(line).map(drop))
}

/// Applies to open sessions as well.
fn set_read_only(ground: &Ground, on: bool) -> Result<()> {
    let value = if on { "on" } else { "off" };
    ground.sql(&format!(
        "alter system set default_transaction_read_only = {value}"
    ))?;
    ground.sql("select pg_reload_conf()")?;
    Ok(())
}

/// Runs `work` while every replica is suspended.
fn while_paused(services: &[Service], work: &mut dyn FnMut() -> Result<()>) -> Result<()> {
    match services.split_first() {
        Some((first, others)) => first.while_paused(|| while_paused(others, work)),
        None => work(),
    }
}

/// Takes all connections of Postgres, including those of the service.
fn take_connections(ground: &Ground) -> Result<Vec<PgConnection>> {
    const TRIES: usize = 500;
    let end = "select pg_terminate_backend(pid) from pg_stat_activity \
               where application_name = 'visitas'";
    let mut taken = vec![ground.session("select 1")?];
    let all = "select current_setting('max_connections')::bigint";
    let all: i64 = ground
        .runtime
        .block_on(sqlx::query_scalar(all).fetch_one(&mut taken[0]))?;
    // A session needs a moment to end.
    for _ in 0..TRIES {
        while let Ok(session) = ground.session("select 1") {
            taken.push(session);
        }
        if taken.len() == usize::try_from(all)? {
            return Ok(taken);
        }
        ground
            .runtime
            .block_on(sqlx::query(end).execute(&mut taken[0]))?;
        std::thread::sleep(Duration::from_millis(10));
    }
    bail!("the service keeps its connections")
}

/// A thread that restarts Postgres until it is stopped. It leaves Postgres stopped.
struct RestartLoop {
    running: Arc<AtomicBool>,
    thread: JoinHandle<Result<()>>,
}

/// Long enough for some visits.
const BETWEEN_RESTARTS: Duration = Duration::from_millis(300);

impl RestartLoop {
    fn start(postgres: &Arc<Postgres>) -> Self {
        let running = Arc::new(AtomicBool::new(true));
        let (postgres, keeps_running) = (Arc::clone(postgres), Arc::clone(&running));
        let thread = std::thread::spawn(move || {
            loop {
                postgres.stop()?;
                if !keeps_running.load(Ordering::Relaxed) {
                    return Ok(());
                }
                postgres.start_again()?;
                std::thread::sleep(BETWEEN_RESTARTS);
            }
        });
        Self { running, thread }
    }

    fn stop(self) -> Result<()> {
        self.running.store(false, Ordering::Relaxed);
        self.thread.join().ok().context("the thread panicked")?
    }
}

/// Clients that send a visit and disconnect after a random delay.
struct Storm {
    running: Arc<AtomicBool>,
    clients: Vec<tokio::task::JoinHandle<Vec<Visit>>>,
}

const STORM_CLIENTS: usize = 32;
const LONGEST_STAY: Duration = Duration::from_millis(6);

impl Storm {
    fn start(ground: &Ground, services: &[Service]) -> Self {
        let running = Arc::new(AtomicBool::new(true));
        let clients = (0..STORM_CLIENTS).map(|client| {
            let running = Arc::clone(&running);
            let replicas = services.iter().enumerate();
            // Client numbers that differ from those of the ledger's clients.
            let client = usize::MAX - client;
            let visitor =
                |(replica, service): (_, &Service)| Visitor::new(client, replica, service.address);
            let visitors: Vec<_> = replicas.map(visitor).collect();
            ground.runtime.spawn(async move {
                let some_time = || LONGEST_STAY.mul_f64(chance::fraction());
                let mut visits = Vec::new();
                while running.load(Ordering::Relaxed) {
                    let visitor = &visitors[chance::below(visitors.len())];
                    visits.push(visitor.visit_and_leave(some_time(), client % 2 == 0).await);
                    tokio::time::sleep(some_time()).await;
                }
                visits
            })
        });
        Self {
            clients: clients.collect(),
            running,
        }
    }

    /// Ends the clients and returns their visits.
    fn stop(self, ground: &Ground) -> Vec<Visit> {
        self.running.store(false, Ordering::Relaxed);
        let clients = self.clients.into_iter();
        let visits = clients.filter_map(|client| ground.runtime.block_on(client).ok());
        visits.flatten().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique() {
        let names: std::collections::HashSet<_> = ALL.iter().map(|fault| fault.name).collect();
        assert_eq!(names.len(), ALL.len());
    }
}
