//! What a power cut happens to: Postgres on a disk whose power can be cut, replicas of the service,
//! and a Redis on another machine.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use chaos::ledger::Ledger;
use chaos::service::Service;
use devstack::{DATABASE, Data, PASSWORD, Postgres, PostgresOptions, Redis, RedisOptions, USER};
use lab::history::PowerCut;
use lab::program::visitas;
use lab::stack;
use tokio::runtime::Runtime;

use crate::disk::{Disk, folder, run};

/// The folder of Postgres on the disk.
const POSTGRES: &str = "postgres";
/// The command of the service `db` names its settings as `-cNAME=VALUE`.
const COMPOSE: &str = include_str!("../../docker-compose.yml");

const REPLICAS: usize = 2;
/// A batch is in flight almost always, and the stores still get processor time.
const VISIT_PAUSE: Duration = Duration::from_millis(1);
/// In seconds. Counting three hundred thousand rows takes less than one.
const COMMAND_TIMEOUT: &str = "60";

/// The servers and the clients. Everything ends with this value.
pub struct Site {
    /// The runtime of the load.
    pub runtime: Runtime,
    /// The replicas.
    pub services: Vec<Service>,
    postgres: Option<Postgres>,
    redis: Redis,
    config: Vec<(String, String)>,
    /// Dropped after the server.
    disk: Disk,
}

/// When the power was off.
#[derive(Clone, Copy, Debug)]
pub struct Outage {
    /// Until when responses are kept to, and when the stores were killed.
    pub power: PowerCut,
    /// When Postgres accepted connections again.
    pub back: Instant,
    /// The part of it that Postgres took to recover.
    pub recovery: Duration,
}

impl Site {
    /// Starts Postgres, with these settings, and Redis, but no replica.
    pub fn start(config: Vec<(String, String)>) -> Result<Self> {
        let disk = Disk::create(&folder()?)?;
        let postgres = start_postgres(&disk, 0, &config)?;
        let site = Self {
            runtime: Runtime::new()?,
            services: Vec::new(),
            postgres: Some(postgres),
            redis: Redis::start(RedisOptions::default())?,
            config,
            disk,
        };
        // Copying the cluster to the disk flushes nothing.
        site.disk.sync()?;
        Ok(site)
    }

    /// The server.
    pub fn postgres(&self) -> Result<&Postgres> {
        self.postgres.as_ref().context("Postgres is off")
    }

    /// Runs a statement in the service's database.
    pub fn sql(&self, statement: &str) -> Result<String> {
        self.postgres()?.sql(DATABASE, statement)
    }

    /// Ends the replicas, and replaces the database and Redis by empty ones.
    pub fn begin_again(&mut self) -> Result<()> {
        self.services.clear();
        self.redis = Redis::start(RedisOptions::default())?;
        self.postgres()?.drop_database(DATABASE)?;
        self.postgres()?.create_database(DATABASE)
    }

    /// Replaces the disk by a new one, on which it makes a cluster and a database as the entry point
    /// of the official image does on an empty volume.
    pub fn initialise(&mut self) -> Result<()> {
        let postgres = self.postgres.take().context("Postgres is off")?;
        let (port, programs) = (postgres.port(), postgres.programs().to_owned());
        let major = postgres.sql(DATABASE, "show server_version_num")?;
        postgres.stop()?;
        drop(postgres);
        self.disk.replace_by_empty()?;
        initdb(&programs, &self.cluster(&major)?)?;
        let postgres = start_postgres(&self.disk, port, &self.config)?;
        postgres.drop_database(DATABASE)?;
        postgres.create_database(DATABASE)?;
        postgres.restart()?;
        self.postgres = Some(postgres);
        Ok(())
    }

    fn cluster(&self, version: &str) -> Result<std::path::PathBuf> {
        let major = version.parse::<u32>()? / 10_000;
        let home = self.disk.folder().join(POSTGRES);
        Ok(home.join(format!("postgres-{major}")))
    }

    /// Starts the replicas, and waits for none.
    pub fn start_services(&mut self) -> Result<()> {
        if self.services.is_empty() {
            for _ in 0..REPLICAS {
                self.services
                    .push(Service::with_settings(self.settings()?)?);
            }
        }
        self.services.iter_mut().try_for_each(Service::start)
    }

    /// Waits until every replica is ready.
    pub fn wait_until_ready(&mut self) -> Result<()> {
        self.services
            .iter_mut()
            .try_for_each(Service::wait_until_ready)
    }

    /// Kills the replicas, as their machine's power cut would.
    pub fn kill_services(&mut self) -> Result<()> {
        for service in &mut self.services {
            service.kill_at_once()?;
        }
        Ok(())
    }

    /// Starts the clients.
    pub fn load(&self) -> Ledger {
        Ledger::start(self.runtime.handle(), &self.addresses(), VISIT_PAUSE)
    }

    fn addresses(&self) -> Vec<SocketAddr> {
        let services = self.services.iter();
        services.map(|service| service.address).collect()
    }

    /// A command of the service, such as `recount`, that is killed after a minute.
    pub fn command(&self, name: &str) -> Result<Command> {
        let mut command = lab::process::command("timeout");
        command
            .arg(COMMAND_TIMEOUT)
            .arg(visitas()?)
            .arg(name)
            .env_clear()
            .envs(self.settings()?);
        Ok(command)
    }

    /// Cuts the power of the machine of Postgres: kills it, and starts it again on what had reached
    /// the device at one instant before. Without `services`, the replicas go the same way, and are
    /// not started again.
    pub fn cut(&mut self, services: bool) -> Result<Outage> {
        let postgres = self.postgres.take().context("Postgres is off")?;
        let (cut, remains) = self.disk.cut()?;
        postgres.kill()?;
        if !services {
            self.kill_services()?;
        }
        let port = postgres.port();
        drop(postgres);
        let off = Instant::now();
        self.disk.replace(remains)?;
        let started = Instant::now();
        self.postgres = Some(start_postgres(&self.disk, port, &self.config)?);
        let back = Instant::now();
        Ok(Outage {
            power: PowerCut { cut, off },
            back,
            recovery: back - started,
        })
    }

    /// A command that runs a statement in the service's database.
    pub fn psql(&self, statement: &str) -> Result<Command> {
        let postgres = self.postgres()?;
        let mut command = lab::process::command(postgres.programs().join("psql"));
        command.args(["-XqAt", "-c", statement, &postgres.url(DATABASE)]);
        Ok(command)
    }

    /// The `data` of all rows, in the order of their ids.
    pub fn rows(&self) -> Result<Vec<i64>> {
        stack::rows(self.postgres()?, DATABASE)
    }

    fn settings(&self) -> Result<Vec<(&'static str, String)>> {
        let postgres = self.postgres()?;
        Ok(stack::settings(
            (postgres.host(), postgres.port()),
            DATABASE,
            (self.redis.host(), self.redis.port()),
        ))
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        // A stop would flush what the test no longer needs.
        if let Some(postgres) = &self.postgres {
            postgres.kill().ok();
        }
    }
}

/// The settings of Postgres in Compose.
pub fn compose_settings() -> Vec<(String, String)> {
    let arguments = COMPOSE
        .lines()
        .filter_map(|line| line.trim().strip_prefix("- -c"));
    let pairs = arguments.filter_map(|setting| setting.split_once('='));
    pairs
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect()
}

fn start_postgres(disk: &Disk, port: u16, config: &[(String, String)]) -> Result<Postgres> {
    Postgres::start(PostgresOptions {
        data: Data::Kept(disk.folder().join(POSTGRES)),
        port,
        config: config.to_vec(),
        ..PostgresOptions::default()
    })
}

/// Makes a cluster with the arguments of Compose. It is flushed, as `initdb` does by default.
fn initdb(programs: &Path, cluster: &Path) -> Result<()> {
    let home = cluster.parent().context("a cluster without a folder")?;
    fs::create_dir_all(home)?;
    let password = home.join("password");
    fs::write(&password, PASSWORD)?;
    let [program, home, cluster, password] =
        [&programs.join("initdb"), home, cluster, &password].map(|path| path.display().to_string());
    run("chown", &["-R", "postgres:postgres", &home])?;
    let arguments = [
        "-u",
        "postgres",
        "--",
        &program,
        "--data-checksums",
        "--no-instructions",
        "--auth=scram-sha-256",
        "--encoding=UTF8",
        "--pgdata",
        &cluster,
        "--username",
        USER,
        "--pwfile",
        &password,
    ];
    run("runuser", &arguments)?;
    ensure!(
        Path::new(&cluster).join("PG_VERSION").exists(),
        "initdb made no cluster"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_of_compose_are_read() {
        let settings = compose_settings();
        let has = |name: &str, value: &str| settings.contains(&(name.to_owned(), value.to_owned()));
        assert!(
            has("fsync", "on") && has("synchronous_commit", "on"),
            "{settings:?}"
        );
        assert!(settings.len() >= 5, "{settings:?}");
    }
}
