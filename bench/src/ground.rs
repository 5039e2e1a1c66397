//! The environment of all subjects: one Postgres and one Redis with durable settings, near or behind
//! a relay, a collector, and a database for each subject and number of rows.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use devstack::{Postgres, PostgresOptions, Redis, RedisOptions};
use lab::collector::Collector;
use lab::{process, program, stack};
use tokio::runtime::{Builder, Runtime};

use crate::peer::Peer;
use crate::progress;
use crate::relay::Relay;

/// The servers. They end with this value.
pub(crate) struct Ground {
    pub(crate) postgres: Postgres,
    pub(crate) redis: Redis,
    pub(crate) collector: Collector,
    /// The runtime of the collector and clients.
    pub(crate) runtime: Runtime,
    /// The peers that cannot be measured, each with the reason.
    pub(crate) skipped: Vec<(Peer, String)>,
    /// The program of the commit before, if one was given.
    pub(crate) before: Option<PathBuf>,
    relay: Option<Relay>,
    /// How many sessions the peers that were tuned have.
    sessions: Vec<(Peer, usize)>,
    databases: HashSet<String>,
}

/// Where a subject finds the stores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stores {
    /// On this machine.
    Near,
    /// On this machine, and each commit takes this much longer.
    SlowCommit(Duration),
    /// Behind the relay.
    Far,
    /// Behind the relay, and each commit takes [`SLOWER_COMMIT`] more.
    FarWithSlowCommit,
}

impl Stores {
    /// Whether they are behind the relay.
    pub(crate) fn are_far(self) -> bool {
        matches!(self, Self::Far | Self::FarWithSlowCommit)
    }
}

/// The relay's delay in each direction.
pub(crate) const ONE_WAY: Duration = Duration::from_micros(500);

/// Postgres's `commit_delay`.
pub(crate) const SLOWER_COMMIT: Duration = Duration::from_millis(2);

/// The kind of table: the service's has its triggers, the peers' has a counter row next to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Owner {
    Visitas,
    /// The service of the commit before, whose migrations can differ.
    Before,
    Peer,
}

/// Settings that must be on so that an acknowledged commit survives a crash.
const DURABLE: [&str; 3] = ["fsync", "synchronous_commit", "full_page_writes"];

/// Maximum time for the sessions of a stopped subject to end.
const SETTLE_DEADLINE: Duration = Duration::from_mins(1);

impl Ground {
    /// Starts the servers and builds the peers.
    pub(crate) fn start(peers: &[Peer], before: Option<PathBuf>) -> Result<Self> {
        let mut skipped = Vec::new();
        for &peer in peers {
            progress!("building {peer}");
            if let Err(reason) = peer.build() {
                progress!("{peer} SKIPPED: {reason}");
                skipped.push((peer, reason));
            }
        }
        progress!("starting PostgreSQL and Redis");
        let postgres = Postgres::start(PostgresOptions::default())?;
        for setting in DURABLE {
            let value = postgres.sql(devstack::DATABASE, &format!("show {setting}"))?;
            ensure!(
                value == "on",
                "{setting} is {value}: the figures would be meaningless"
            );
        }
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        Ok(Self {
            postgres,
            redis: Redis::start(RedisOptions::default())?,
            collector: runtime.block_on(Collector::start()),
            runtime,
            skipped,
            before,
            relay: None,
            sessions: Vec::new(),
            databases: HashSet::new(),
        })
    }

    /// Whether a peer was built. [`Self::start`] must have been asked for it.
    pub(crate) fn has(&self, peer: Peer) -> bool {
        self.skipped.iter().all(|(skipped, _)| *skipped != peer)
    }

    /// Sets how many sessions with Postgres a peer has from its next start on.
    pub(crate) fn set_sessions(&mut self, peer: Peer, sessions: usize) {
        self.sessions.retain(|(tuned, _)| *tuned != peer);
        self.sessions.push((peer, sessions));
    }

    /// How many sessions with Postgres a peer has.
    pub(crate) fn sessions(&self, peer: Peer) -> usize {
        let tuned = self.sessions.iter().find(|(tuned, _)| *tuned == peer);
        tuned.map_or(peer.sessions()[0], |(_, sessions)| *sessions)
    }

    /// One line for each of these peers that cannot be measured.
    pub(crate) fn skipped_lines(&self, peers: &[Peer]) -> String {
        let skipped = self.skipped.iter().filter(|(peer, _)| peers.contains(peer));
        let lines: Vec<_> = skipped
            .map(|(peer, reason)| format!("\n{peer} SKIPPED: {reason}.\n"))
            .collect();
        lines.concat()
    }

    /// Starts the relay, unless it runs.
    pub(crate) fn relay(&mut self) -> Result<&Relay> {
        if self.relay.is_none() {
            let servers = self.addresses(Stores::Near)?;
            self.relay = Some(Relay::start(servers, ONE_WAY)?);
        }
        self.relay.as_ref().context("the relay has just started")
    }

    /// The database of a subject, with `rows` rows plus those recorded since. With 0 rows, the
    /// table is truncated each time.
    pub(crate) fn database(&mut self, owner: Owner, rows: u64) -> Result<String> {
        let name = match owner {
            Owner::Visitas => format!("visitas_{rows}"),
            Owner::Before => format!("before_{rows}"),
            Owner::Peer => format!("peer_{rows}"),
        };
        if !self.databases.contains(&name) {
            self.create(&name, owner, rows)?;
            self.databases.insert(name.clone());
        } else if rows == 0 {
            let truncate = match owner {
                Owner::Visitas | Owner::Before => "truncate visitas",
                Owner::Peer => "truncate visitas restart identity; update contador set total = 0",
            };
            self.postgres.sql(&name, truncate)?;
        }
        // Each measurement starts just after a checkpoint.
        self.postgres.sql(&name, "checkpoint")?;
        Ok(name)
    }

    /// A database without a table.
    pub(crate) fn fresh_database(&mut self, name: &str) -> Result<()> {
        self.postgres.drop_database(name)?;
        self.postgres.create_database(name)
    }

    fn create(&mut self, name: &str, owner: Owner, rows: u64) -> Result<()> {
        self.fresh_database(name)?;
        match owner {
            Owner::Visitas | Owner::Before => self.migrate(name, owner)?,
            Owner::Peer => {
                self.postgres.sql(
                    name,
                    &format!(
                        "create table visitas (
                             id bigint generated by default as identity primary key,
                             data timestamptz not null default now()
                         );
                         create table contador (total bigint not null) with (fillfactor = 10);
                         insert into contador values ({rows})"
                    ),
                )?;
            }
        }
        if rows > 0 {
            let started = Instant::now();
            // This fires the triggers, if there are any.
            self.postgres.sql(
                name,
                &format!("insert into visitas (data) select now() from generate_series(1, {rows})"),
            )?;
            progress!(
                "{name}: {rows} rows written in {:.1} s",
                started.elapsed().as_secs_f64()
            );
            // Otherwise autovacuum would do this during a measurement.
            self.postgres.sql(name, "vacuum (analyze) visitas")?;
        }
        Ok(())
    }

    fn migrate(&self, database: &str, owner: Owner) -> Result<()> {
        let settings = self.settings(database, Stores::Near)?;
        let output = self.service(owner, settings)?.arg("migrate").output()?;
        ensure!(
            output.status.success(),
            "visitas migrate: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(())
    }

    /// The number of rows in the table.
    pub(crate) fn rows(&self, database: &str) -> Result<i64> {
        let rows = self
            .postgres
            .sql(database, "select count(*) from visitas")?;
        Ok(rows.parse()?)
    }

    /// Ends the sessions that a subject has left in its database, so that the next subject has the
    /// machine for itself.
    pub(crate) fn settle(&self, database: &str) -> Result<()> {
        let deadline = Instant::now() + SETTLE_DEADLINE;
        let end = format!(
            "select count(pg_terminate_backend(pid))
               from pg_stat_activity
              where datname = '{database}' and pid <> pg_backend_pid()"
        );
        while self.postgres.sql("postgres", &end)? != "0" {
            ensure!(
                Instant::now() < deadline,
                "sessions in {database} do not end"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Makes commits in a database slower, or as fast as before, in sessions that are opened from now
    /// on.
    pub(crate) fn set_commit_delay(&self, database: &str, stores: Stores) -> Result<()> {
        let delay = match stores {
            Stores::Near | Stores::Far => Duration::ZERO,
            Stores::SlowCommit(delay) => delay,
            Stores::FarWithSlowCommit => SLOWER_COMMIT,
        };
        // With `commit_siblings` at 0, a lone commit waits, too.
        let delay = format!(
            "alter database {database} set commit_siblings = 0;
             alter database {database} set commit_delay = {}",
            delay.as_micros()
        );
        self.postgres.sql(database, &delay).map(drop)
    }

    /// A command that runs the service, this one or the one before, with only these settings in its
    /// environment.
    pub(crate) fn service(
        &self,
        owner: Owner,
        settings: impl IntoIterator<Item = (&'static str, String)>,
    ) -> Result<Command> {
        if owner != Owner::Before {
            return program::command(settings);
        }
        let before = self.before.as_ref().context("no commit before was given")?;
        let mut command = process::command(before);
        command.env_clear().envs(settings);
        Ok(command)
    }

    /// The addresses of Postgres and Redis for a subject.
    pub(crate) fn addresses(&self, stores: Stores) -> Result<[SocketAddr; 2]> {
        match stores {
            Stores::Near | Stores::SlowCommit(_) => Ok([self.postgres.port(), self.redis.port()]
                .map(|port| SocketAddr::from(([127, 0, 0, 1], port)))),
            Stores::Far | Stores::FarWithSlowCommit => {
                let relay = self.relay.as_ref().context("the relay does not run")?;
                Ok(relay.addresses)
            }
        }
    }

    /// The settings for these stores, for the service and the peers.
    pub(crate) fn settings(
        &self,
        database: &str,
        stores: Stores,
    ) -> Result<Vec<(&'static str, String)>> {
        let addresses = self.addresses(stores)?;
        let [postgres, redis] = addresses.map(|address| (address.ip().to_string(), address.port()));
        Ok(stack::settings(
            (&postgres.0, postgres.1),
            database,
            (&redis.0, redis.1),
        ))
    }
}
