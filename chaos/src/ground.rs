//! The environment of a service under test: a Postgres, a Redis, proxies to them, and, if a fault
//! needs them, a small disk, host names and a collector.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use devstack::{Data, Postgres, PostgresOptions, Redis, RedisOptions, Server};
use lab::collector::Collector;
use lab::program::scratch;
use lab::proxy::{Protocol, Proxy};
use lab::{stack, wait};
use sqlx::{Connection as _, PgConnection};
use tokio::runtime::{Builder, Runtime};

/// The environment that a fault needs.
#[expect(
    clippy::struct_excessive_bools,
    reason = "each part of the environment is independent of the others"
)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// The service reaches its stores through proxies. Otherwise it connects directly, so that a
    /// killed server closes its connections as usual.
    pub proxies: bool,
    /// Settings of Postgres.
    pub postgres: &'static [(&'static str, &'static str)],
    /// Redis requires a password, and the service has it.
    pub password: bool,
    /// The data of Postgres is on a disk that can be filled.
    pub small_disk: bool,
    /// The data of Postgres is in memory: beside environments that copy and remove their data, a
    /// sync can take longer than a visit waits for the count's lock.
    pub memory: bool,
    /// The service reaches its stores by host names that can be removed.
    pub names: bool,
    /// The service exports spans.
    pub collector: bool,
}

/// The servers and the proxies to them. Everything ends with this value.
pub struct Ground {
    /// The runtime of the load and the proxies.
    pub runtime: Runtime,
    /// Shared with the thread that restarts it in a loop.
    pub postgres: Arc<Postgres>,
    /// The cache.
    pub redis: Redis,
    /// The proxy from the service to Postgres.
    pub postgres_proxy: Proxy,
    /// The proxy from the service to Redis.
    pub redis_proxy: Proxy,
    /// The proxy from the service to the collector.
    pub collector_proxy: Proxy,
    /// The host names of the stores.
    pub names: Option<Names>,
    /// The disk of Postgres. It must be dropped after the server.
    pub disk: Option<Disk>,
    needs: Needs,
    /// The collector behind the proxy.
    _collector: Collector,
}

/// A file system in memory.
pub struct Disk {
    mount: PathBuf,
}

/// A hosts file that the service sees in place of the system's.
pub struct Names {
    hosts: PathBuf,
    resolver: PathBuf,
}

/// An administrator's connection to Redis.
pub struct Administrator(BufReader<TcpStream>);

/// The password of Redis, if it requires one.
pub const REDIS_PASSWORD: &str = "certa";

const POSTGRES_NAME: &str = "db.chaos.test";
const REDIS_NAME: &str = "cache.chaos.test";

/// Mounts two files over the system's, for one program only.
const WITH_NAMES: &str = r#"mount --bind "$1" /etc/hosts &&
mount --bind "$2" /etc/resolv.conf && shift 2 && exec "$@""#;

/// The prefix of a mount's name. The id of the process that made it follows, and a number.
const MOUNT: &str = "disk-";
/// Enough for a cluster, its write-ahead log and some visits, and small enough to be filled.
const SMALL_DISK: &str = "size=192m";

/// Recovery after a kill is a store's longest start.
const RETURN_DEADLINE: Duration = Duration::from_mins(1);

impl Ground {
    /// Starts the servers that are needed.
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
                None if needs.memory => Data::InMemory,
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
            postgres_proxy: open(local(postgres.port()), Protocol::Postgres)?,
            redis_proxy: open(local(redis.port()), Protocol::Redis)?,
            collector_proxy: open(collector.address, Protocol::Other)?,
            names: needs.names.then(Names::write).transpose()?,
            postgres: Arc::new(postgres),
            redis,
            runtime,
            disk,
            needs,
            _collector: collector,
        })
    }

    /// The settings for a service in this environment.
    pub fn settings(&self) -> Vec<(&'static str, String)> {
        let (mut postgres, mut redis) = (self.postgres.port(), self.redis.port());
        if self.needs.proxies {
            postgres = self.postgres_proxy.port();
            redis = self.redis_proxy.port();
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
            let port = self.collector_proxy.port();
            let endpoint = format!("http://127.0.0.1:{port}");
            settings.push(("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint));
            // Exports spans during the fault even if there are few visits.
            settings.push(("OTEL_BSP_SCHEDULE_DELAY", "200".to_owned()));
        }
        settings
    }

    /// Runs a statement in the service's database and returns its rows.
    pub fn sql(&self, statement: &str) -> Result<String> {
        self.postgres.sql(devstack::DATABASE, statement)
    }

    /// The `data` of all rows by id, in microseconds since 1970.
    pub fn row_times(&self) -> Result<Vec<i64>> {
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

    /// Ends sessions, which releases their locks.
    pub fn end(&self, sessions: impl IntoIterator<Item = PgConnection>) {
        self.runtime.block_on(async {
            for session in sessions {
                // The session ends even if the close fails.
                session.close().await.ok();
            }
        });
    }

    /// Restarts a store and returns the time of its first response.
    pub fn start_again(&self, store: Store) -> Result<Instant> {
        match store {
            Store::Postgres => {
                let response = self.runtime.spawn(wait_until_writable(self.postgres_url()));
                self.postgres.start_again()?;
                self.runtime.block_on(response)?
            }
            Store::Redis => {
                let port = self.redis.port();
                let response = std::thread::spawn(move || wait_for_redis(port));
                self.redis.start_again()?;
                response.join().ok().context("the watcher panicked")?
            }
        }
    }

    /// Restarts Postgres if it has ended by itself, and returns the time when it responds.
    pub fn revive_postgres(&self) -> Result<Instant> {
        // This fails if the server still runs.
        self.postgres.start_again().ok();
        self.wait_for_postgres()
    }

    /// Waits until a new session of Postgres can write.
    pub fn wait_for_postgres(&self) -> Result<Instant> {
        self.runtime
            .block_on(wait_until_writable(self.postgres_url()))
    }

    /// One of the two servers.
    pub fn server(&self, store: Store) -> &Server {
        match store {
            Store::Postgres => &self.postgres,
            Store::Redis => &self.redis,
        }
    }

    /// The proxy to one of the two servers.
    pub fn proxy_to(&self, store: Store) -> &Proxy {
        match store {
            Store::Postgres => &self.postgres_proxy,
            Store::Redis => &self.redis_proxy,
        }
    }

    /// Removes all rules of a proxy.
    pub fn clear(&self, proxy: &Proxy) -> Result<()> {
        self.runtime.block_on(proxy.clear())
    }

    /// Ends all sessions between the service and both stores.
    pub fn end_service_sessions(&self) -> Result<()> {
        self.sql(
            "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'visitas'",
        )?;
        self.administrator()?
            .command("CLIENT KILL TYPE normal SKIPME yes")?;
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
        administrator.command(&format!("AUTH {password}"))?;
        Ok(administrator)
    }

    /// The command prefix for a service that sees this environment's host names.
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

/// Why this machine cannot provide the environment, or `None` if it can.
pub fn skip_reason(needs: Needs) -> Option<String> {
    let needs_mount = needs.small_disk || needs.names;
    needs_mount.then(mount_error).flatten()
}

/// Why this machine allows no mount, or `None` if it does.
fn mount_error() -> Option<String> {
    let result = Command::new("unshare")
        .args(["--mount", "--", "mount", "-t", "tmpfs", "tmpfs", "/mnt"])
        .output();
    match result {
        Ok(output) if output.status.success() => None,
        Ok(output) => {
            let reason = String::from_utf8_lossy(&output.stderr);
            Some(format!("mounting is not allowed: {}", reason.trim()))
        }
        Err(error) => Some(format!("unshare: {error}")),
    }
}

impl Disk {
    fn mount() -> Result<Self> {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let folder = devstack::folder()?;
        Self::clear_abandoned(&folder)?;
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let mount = folder.join(format!("{MOUNT}{}-{number}", std::process::id()));
        fs::create_dir_all(&mount)?;
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", SMALL_DISK, "tmpfs"])
            .arg(&mount)
            .output()?;
        ensure!(
            mounted.status.success(),
            "mount: {}",
            String::from_utf8_lossy(&mounted.stderr)
        );
        Ok(Self { mount })
    }

    /// Unmounts disks of processes that were killed.
    fn clear_abandoned(folder: &Path) -> Result<()> {
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            let name = entry.file_name();
            let name = name.to_str().and_then(|name| name.strip_prefix(MOUNT));
            let owner = name.and_then(|name| name.split('-').next());
            if owner.is_some_and(|owner| !Path::new("/proc").join(owner).exists()) {
                unmount(&entry.path());
            }
        }
        Ok(())
    }

    /// Fills the disk to the last byte.
    pub fn fill(&self) -> Result<()> {
        let mut filler = fs::File::create(self.filler())?;
        let zeros = vec![0; 64 * 1024];
        while filler.write_all(&zeros).is_ok() {}
        Ok(())
    }

    /// Frees the space.
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

/// Best effort. Lazily, since the server's supervisor can still use the disk.
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
        // No name server runs there: only names in the hosts file resolve.
        fs::write(
            &names.resolver,
            "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n",
        )?;
        names.publish()?;
        Ok(names)
    }

    /// Makes the names resolve.
    pub fn publish(&self) -> Result<()> {
        write_in_place(
            &self.hosts,
            &format!("127.0.0.1 localhost {POSTGRES_NAME} {REDIS_NAME}\n"),
        )
    }

    /// Removes the names.
    pub fn remove(&self) -> Result<()> {
        write_in_place(&self.hosts, "127.0.0.1 localhost\n")
    }
}

/// Keeps the inode, since the file is mounted elsewhere.
fn write_in_place(file: &Path, text: &str) -> Result<()> {
    Ok(fs::write(file, text)?)
}

impl Administrator {
    fn connect(port: u16) -> Result<Self> {
        let stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        Ok(Self(BufReader::new(stream)))
    }

    /// Sends a command and returns the first line of the reply.
    pub fn command(&mut self, line: &str) -> Result<String> {
        self.0
            .get_mut()
            .write_all(format!("{line}\r\n").as_bytes())?;
        let mut reply = String::new();
        self.0.read_line(&mut reply)?;
        ensure!(
            !reply.is_empty() && !reply.starts_with('-'),
            "Redis replied to {line:?} with {reply:?}"
        );
        Ok(reply.trim_end().to_owned())
    }
}

/// Waits until a new session of Postgres can write, and returns the time.
async fn wait_until_writable(url: String) -> Result<Instant> {
    let deadline = Instant::now() + RETURN_DEADLINE;
    while Instant::now() < deadline {
        match tokio::time::timeout(RETURN_DEADLINE, can_write(&url)).await? {
            Ok(true) => return Ok(Instant::now()),
            Ok(false) | Err(_) => tokio::time::sleep(Duration::from_millis(1)).await,
        }
    }
    bail!("Postgres does not respond")
}

async fn can_write(url: &str) -> sqlx::Result<bool> {
    let mut session = PgConnection::connect(url).await?;
    let result = sqlx::query_scalar("select current_setting('transaction_read_only') = 'off'")
        .fetch_one(&mut session)
        .await;
    session.close().await.ok();
    result
}

/// Waits until Redis responds, and returns the time.
fn wait_for_redis(port: u16) -> Result<Instant> {
    let responds = wait::within(RETURN_DEADLINE, || {
        let pong = Administrator::connect(port).and_then(|mut redis| redis.command("PING"));
        pong.is_ok()
    });
    ensure!(responds, "Redis does not respond");
    Ok(Instant::now())
}
