//! What a service stands on while it is being broken: a Postgres and a Redis of its own, ways to them
//! that can be cut, and, where a fault asks for them, a small disk, names and a collector.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use devstack::{Data, Postgres, PostgresOptions, Redis, RedisOptions, Server};
use lab::collector::Collector;
use lab::program::scratch;
use lab::proxy::{Protocol, Proxy};
use lab::{stack, wait};
use sqlx::{Connection as _, PgConnection};
use tokio::runtime::{Builder, Runtime};

/// What a fault needs to be there.
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is there or not, whatever the others are"
)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// The service reaches its stores through proxies. Otherwise it does so directly, so that a
    /// server that dies looks to it as servers that die do.
    pub proxies: bool,
    /// Settings of Postgres.
    pub postgres: &'static [(&'static str, &'static str)],
    /// Redis asks for a password, and the service has it.
    pub password: bool,
    /// The data of Postgres is on a disk that can be filled.
    pub small_disk: bool,
    /// The service knows its stores by names that can be taken away.
    pub names: bool,
    /// The service sends spans.
    pub collector: bool,
}

/// Servers and ways to them. Everything ends with this value.
pub struct Ground {
    /// Where load and proxies run.
    pub runtime: Runtime,
    /// Shared with whoever restarts it in a loop.
    pub postgres: Arc<Postgres>,
    /// The cache.
    pub redis: Redis,
    /// From the service to Postgres.
    pub way_to_postgres: Proxy,
    /// From the service to Redis.
    pub way_to_redis: Proxy,
    /// From the service to the collector.
    pub way_to_collector: Proxy,
    /// The names of the stores.
    pub names: Option<Names>,
    /// The disk of Postgres. It goes after the server.
    pub disk: Option<Disk>,
    needs: Needs,
    /// What comes through the way to it.
    _collector: Collector,
}

/// A file system in memory, small enough to be filled.
pub struct Disk {
    mount: PathBuf,
}

/// A file of hosts that the service has in place of the system's.
pub struct Names {
    hosts: PathBuf,
    resolver: PathBuf,
}

/// A connection to Redis that stays what it was when logins change.
pub struct Administrator(BufReader<TcpStream>);

/// The password of a Redis that has one.
pub const REDIS_PASSWORD: &str = "certa";

const POSTGRES_NAME: &str = "db.chaos.test";
const REDIS_NAME: &str = "cache.chaos.test";

/// Puts two files in the place of the system's, for one program alone.
const WITH_NAMES: &str = r#"mount --bind "$1" /etc/hosts &&
mount --bind "$2" /etc/resolv.conf && shift 2 && exec "$@""#;

/// What a mount is called before the process that made it.
const DISK: &str = "disk-";
/// Room for a cluster, its log of changes and some visits.
const DISK_SIZE: &str = "size=192m";

/// Recovery after a kill is the longest that a store takes.
const RETURN_DEADLINE: Duration = Duration::from_mins(1);

impl Ground {
    /// Starts what is needed.
    pub fn start(needs: Needs) -> Result<Self> {
        let runtime = Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()?;
        let disk = needs.small_disk.then(Disk::mount).transpose()?;
        let config = needs.postgres.iter();
        let postgres = Postgres::start(PostgresOptions {
            data: match &disk {
                Some(disk) => Data::Kept(disk.mount.join("postgres")),
                None => Data::Temporary,
            },
            config: config
                .map(|&(name, value)| (name.to_owned(), value.to_owned()))
                .collect(),
            ..PostgresOptions::default()
        })?;
        let redis = Redis::start(RedisOptions {
            password: needs.password.then(|| REDIS_PASSWORD.to_owned()),
            ..RedisOptions::default()
        })?;
        let collector = runtime.block_on(Collector::start());
        let open = |server, protocol| runtime.block_on(Proxy::open(server, protocol));
        let local = |port| SocketAddr::from(([127, 0, 0, 1], port));
        Ok(Self {
            way_to_postgres: open(local(postgres.port()), Protocol::Postgres)?,
            way_to_redis: open(local(redis.port()), Protocol::Redis)?,
            way_to_collector: open(collector.address, Protocol::Other)?,
            names: needs.names.then(Names::write).transpose()?,
            postgres: Arc::new(postgres),
            redis,
            runtime,
            disk,
            needs,
            _collector: collector,
        })
    }

    /// The settings that lead a service here.
    pub fn settings(&self) -> Vec<(&'static str, String)> {
        let (mut postgres, mut redis) = (self.postgres.port(), self.redis.port());
        if self.needs.proxies {
            postgres = self.way_to_postgres.port();
            redis = self.way_to_redis.port();
        }
        let host = |name| if self.needs.names { name } else { "127.0.0.1" };
        let mut settings = stack::settings(
            (host(POSTGRES_NAME), postgres),
            devstack::DATABASE,
            (host(REDIS_NAME), redis),
        );
        if self.needs.password {
            settings.push(("REDIS_PASSWORD", REDIS_PASSWORD.to_owned()));
        }
        if self.needs.collector {
            let port = self.way_to_collector.port();
            let endpoint = format!("http://127.0.0.1:{port}");
            settings.push(("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint));
            // So that spans are exported during the fault, however few visits there are.
            settings.push(("OTEL_BSP_SCHEDULE_DELAY", "200".to_owned()));
        }
        settings
    }

    /// Runs a statement in the service's database and returns what it says.
    pub fn sql(&self, statement: &str) -> Result<String> {
        self.postgres.sql(devstack::DATABASE, statement)
    }

    /// The `data` of all rows by id, in microseconds since 1970.
    pub fn moments(&self) -> Result<Vec<i64>> {
        stack::rows(&self.postgres, devstack::DATABASE)
    }

    /// A session that has run these statements and stays open.
    pub fn session(&self, statements: &'static str) -> Result<PgConnection> {
        let url = self.postgres.url(devstack::DATABASE);
        self.runtime.block_on(async {
            let mut session = PgConnection::connect(&url).await?;
            sqlx::raw_sql(statements).execute(&mut session).await?;
            Ok(session)
        })
    }

    /// Ends sessions, and with them what they hold.
    pub fn end(&self, sessions: impl IntoIterator<Item = PgConnection>) {
        self.runtime.block_on(async {
            for session in sessions {
                // Whether it says goodbye or breaks, it is over.
                session.close().await.ok();
            }
        });
    }

    /// Starts a store again and returns the moment when it first answered, or why it did not.
    pub fn start_again(&self, store: Store) -> Result<Instant> {
        match store {
            Store::Postgres => {
                let answer = self.runtime.spawn(first_answer(self.postgres_url()));
                self.postgres.start_again()?;
                self.runtime.block_on(answer)?
            }
            Store::Redis => {
                let port = self.redis.port();
                let answer = std::thread::spawn(move || first_pong(port));
                self.redis.start_again()?;
                answer.join().ok().context("the watcher panicked")?
            }
        }
    }

    /// Starts Postgres again if it has ended by itself, and returns the moment when it answers.
    pub fn revive_postgres(&self) -> Result<Instant> {
        // It refuses where the server runs.
        self.postgres.start_again().ok();
        self.postgres_answers()
    }

    /// Waits until Postgres takes a new session that may write.
    pub fn postgres_answers(&self) -> Result<Instant> {
        self.runtime.block_on(first_answer(self.postgres_url()))
    }

    /// One of the two servers.
    pub fn server(&self, store: Store) -> &Server {
        match store {
            Store::Postgres => &self.postgres,
            Store::Redis => &self.redis,
        }
    }

    /// The way to one of the two servers.
    pub fn way_to(&self, store: Store) -> &Proxy {
        match store {
            Store::Postgres => &self.way_to_postgres,
            Store::Redis => &self.way_to_redis,
        }
    }

    /// Lets everything pass on a way to a server again.
    pub fn clear(&self, way: &Proxy) -> Result<()> {
        self.runtime.block_on(way.clear())
    }

    /// Ends every session that the service has with either store.
    pub fn end_sessions_of_the_service(&self) -> Result<()> {
        self.sql(
            "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'visitas'",
        )?;
        self.administrator()?
            .say("CLIENT KILL TYPE normal SKIPME yes")?;
        Ok(())
    }

    /// Logs in to Redis.
    pub fn administrator(&self) -> Result<Administrator> {
        if self.needs.password {
            self.administrator_with(REDIS_PASSWORD)
        } else {
            Administrator::connect(self.redis.port())
        }
    }

    /// Logs in to Redis with a password.
    pub fn administrator_with(&self, password: &str) -> Result<Administrator> {
        let mut administrator = Administrator::connect(self.redis.port())?;
        administrator.say(&format!("AUTH {password}"))?;
        Ok(administrator)
    }

    /// What starts a service that sees the names of this ground: the program goes behind it.
    pub fn wrapping(&self) -> Vec<String> {
        let Some(names) = &self.names else {
            return Vec::new();
        };
        let words = [
            "unshare", "--mount", "--", "/bin/sh", "-c", WITH_NAMES, "sh",
        ];
        let files = [&names.hosts, &names.resolver].map(|file| file.display().to_string());
        words.into_iter().map(str::to_owned).chain(files).collect()
    }

    fn postgres_url(&self) -> String {
        self.postgres.url(devstack::DATABASE)
    }
}

/// One of the two stores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Store {
    /// The database.
    Postgres,
    /// The cache.
    Redis,
}

/// Why this cannot be had on this machine, if it cannot.
pub fn obstacle(needs: Needs) -> Option<String> {
    if !needs.small_disk && !needs.names {
        return None;
    }
    let tried = Command::new("unshare")
        .args(["--mount", "--", "mount", "-t", "tmpfs", "tmpfs", "/mnt"])
        .output();
    match tried {
        Ok(output) if output.status.success() => None,
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr);
            Some(format!("mounting is not allowed: {}", said.trim()))
        }
        Err(error) => Some(format!("unshare: {error}")),
    }
}

impl Disk {
    fn mount() -> Result<Self> {
        let folder = devstack::folder()?;
        Self::clear_abandoned(&folder)?;
        let mount = folder.join(format!("{DISK}{}", std::process::id()));
        fs::create_dir_all(&mount)?;
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", DISK_SIZE, "tmpfs"])
            .arg(&mount)
            .output()?;
        ensure!(
            mounted.status.success(),
            "mount: {}",
            String::from_utf8_lossy(&mounted.stderr)
        );
        Ok(Self { mount })
    }

    /// Takes away what others have left that could not do so themselves.
    fn clear_abandoned(folder: &Path) -> Result<()> {
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            let name = entry.file_name();
            let owner = name.to_str().and_then(|name| name.strip_prefix(DISK));
            if owner.is_some_and(|owner| !Path::new("/proc").join(owner).exists()) {
                unmount(&entry.path());
            }
        }
        Ok(())
    }

    /// Fills it to the last byte.
    pub fn fill(&self) -> Result<()> {
        let mut filler = fs::File::create(self.filler())?;
        let zeros = vec![0; 64 * 1024];
        while filler.write_all(&zeros).is_ok() {}
        Ok(())
    }

    /// Gives the room back.
    pub fn empty(&self) -> Result<()> {
        Ok(fs::remove_file(self.filler())?)
    }

    fn filler(&self) -> PathBuf {
        self.mount.join("filler")
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        unmount(&self.mount);
    }
}

/// Best effort. Lazily, since what watches over the server may still be there.
fn unmount(mount: &Path) {
    let unmounted = Command::new("umount").arg("-l").arg(mount).status();
    if unmounted.is_ok_and(|status| status.success()) {
        fs::remove_dir(mount).ok();
    }
}

impl Names {
    fn write() -> Result<Self> {
        let folder = scratch()?.join(format!("names-{}", std::process::id()));
        fs::create_dir_all(&folder)?;
        let names = Self {
            hosts: folder.join("hosts"),
            resolver: folder.join("resolv.conf"),
        };
        // Nobody serves names here: what the file of hosts does not have does not exist.
        fs::write(
            &names.resolver,
            "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n",
        )?;
        names.give()?;
        Ok(names)
    }

    /// Makes the names resolve.
    pub fn give(&self) -> Result<()> {
        write_in_place(
            &self.hosts,
            &format!("127.0.0.1 localhost {POSTGRES_NAME} {REDIS_NAME}\n"),
        )
    }

    /// Takes the names away.
    pub fn take(&self) -> Result<()> {
        write_in_place(&self.hosts, "127.0.0.1 localhost\n")
    }
}

/// The file stays the same one, since it is mounted elsewhere.
fn write_in_place(file: &Path, text: &str) -> Result<()> {
    Ok(fs::write(file, text)?)
}

impl Administrator {
    fn connect(port: u16) -> Result<Self> {
        let stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        Ok(Self(BufReader::new(stream)))
    }

    /// Says a line and returns the first line of the answer.
    pub fn say(&mut self, line: &str) -> Result<String> {
        self.0
            .get_mut()
            .write_all(format!("{line}\r\n").as_bytes())?;
        let mut answer = String::new();
        self.0.read_line(&mut answer)?;
        ensure!(
            !answer.is_empty() && !answer.starts_with('-'),
            "Redis answered {line:?} with {answer:?}"
        );
        Ok(answer.trim_end().to_owned())
    }
}

/// When a new session of Postgres first may write.
async fn first_answer(url: String) -> Result<Instant> {
    let deadline = Instant::now() + RETURN_DEADLINE;
    while Instant::now() < deadline {
        match tokio::time::timeout(RETURN_DEADLINE, may_write(&url)).await? {
            Ok(true) => return Ok(Instant::now()),
            Ok(false) | Err(_) => tokio::time::sleep(Duration::from_millis(1)).await,
        }
    }
    bail!("Postgres does not answer")
}

async fn may_write(url: &str) -> sqlx::Result<bool> {
    let mut session = PgConnection::connect(url).await?;
    let may_write = sqlx::query_scalar("select current_setting('transaction_read_only') = 'off'")
        .fetch_one(&mut session)
        .await;
    session.close().await.ok();
    may_write
}

/// When Redis first answers.
fn first_pong(port: u16) -> Result<Instant> {
    let answers = wait::within(RETURN_DEADLINE, || {
        let pong = Administrator::connect(port).and_then(|mut redis| redis.say("PING"));
        pong.is_ok()
    });
    ensure!(answers, "Redis does not answer");
    Ok(Instant::now())
}
