//! A database and a Redis for one test.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{LazyLock, Mutex, PoisonError, Weak};

use devstack::{Data, Postgres, PostgresOptions, Redis, RedisOptions};
use lab::stack;
use sqlx::postgres::{PgConnectOptions, PgRow};
use sqlx::{ConnectOptions as _, PgConnection};

use super::{SOON, Service, eventually};

/// The stores of one test.
pub(crate) struct World {
    pub(crate) postgres: Arc<Postgres>,
    pub(crate) redis: Redis,
    pub(crate) database: String,
}

impl World {
    /// A fresh database on the Postgres that tests share, and a Redis.
    pub(crate) fn new() -> Self {
        Self::with_redis(RedisOptions::default())
    }

    /// A fresh database on the Postgres that tests share, and a Redis with settings.
    pub(crate) fn with_redis(redis: RedisOptions) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let database = format!("test_{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let postgres = shared_postgres();
        run_once(&postgres, format!("create database {database}")).expect("a fresh database");
        Self::using(postgres, database, redis)
    }

    /// A Postgres and a Redis of the test's own, to be stopped, paused or broken.
    pub(crate) fn of_its_own() -> Self {
        Self::with(PostgresOptions::default(), RedisOptions::default())
    }

    /// A Postgres and a Redis of the test's own, with settings.
    pub(crate) fn with(postgres: PostgresOptions, redis: RedisOptions) -> Self {
        let postgres = Arc::new(start_postgres(postgres));
        Self::using(postgres, devstack::DATABASE.to_owned(), redis)
    }

    fn using(postgres: Arc<Postgres>, database: String, mut redis: RedisOptions) -> Self {
        in_memory(&mut redis.data);
        Self {
            postgres,
            redis: Redis::start(redis).expect("Redis starts"),
            database,
        }
    }

    /// The settings that lead to these stores.
    pub(crate) fn settings(&self) -> Vec<(String, String)> {
        let (postgres, redis) = (&self.postgres, &self.redis);
        let settings = stack::settings(
            (postgres.host(), postgres.port()),
            &self.database,
            (redis.host(), redis.port()),
        );
        let settings = settings.into_iter();
        settings.map(|(name, value)| (name.into(), value)).collect()
    }

    /// The settings that lead to these stores, with others in place of those that begin with
    /// `prefix`, such as a URL in place of its parts.
    pub(crate) fn settings_but(
        &self,
        prefix: &str,
        settings: &[(&str, &str)],
    ) -> Vec<(String, String)> {
        let mut all = self.settings();
        all.retain(|(name, _)| !name.starts_with(prefix));
        all.extend(super::settings(settings));
        all
    }

    /// A service that is ready.
    pub(crate) async fn serve(&self) -> Service {
        self.serve_with(&[]).await
    }

    /// A service with settings in addition to those that lead to the stores, which is ready.
    pub(crate) async fn serve_with(&self, settings: &[(&str, &str)]) -> Service {
        let service = self.start(settings).await;
        service.until_ready().await;
        service
    }

    /// A service that listens. Its stores can be down.
    pub(crate) async fn start(&self, settings: &[(&str, &str)]) -> Service {
        let mut all = self.settings();
        all.extend(super::settings(settings));
        Service::start(&all).await
    }

    /// A session of the superuser in the test's database.
    pub(crate) async fn session(&self) -> PgConnection {
        self.session_as(devstack::USER, devstack::PASSWORD).await
    }

    /// A session of another role in the test's database.
    pub(crate) async fn session_as(&self, user: &str, password: &str) -> PgConnection {
        self.options(user, password)
            .connect()
            .await
            .expect("a session in the test's database")
    }

    /// A session of the superuser, where there may be no room for one.
    pub(crate) async fn try_session(&self) -> sqlx::Result<PgConnection> {
        self.options(devstack::USER, devstack::PASSWORD)
            .connect()
            .await
    }

    fn options(&self, user: &str, password: &str) -> PgConnectOptions {
        session_of(&self.postgres, &self.database)
            .username(user)
            .password(password)
    }

    /// One number from the test's database.
    pub(crate) async fn number(&self, query: &'static str) -> i64 {
        sqlx::query_scalar(query)
            .fetch_one(&mut self.session().await)
            .await
            .expect("a number")
    }

    /// One row from the test's database.
    pub(crate) async fn row<R>(&self, query: &'static str) -> R
    where
        R: for<'r> sqlx::FromRow<'r, PgRow> + Send + Unpin,
    {
        sqlx::query_as(query)
            .fetch_one(&mut self.session().await)
            .await
            .expect("a row")
    }

    /// A transaction of the superuser's that has made these statements, and stays open.
    pub(crate) async fn transaction(&self, statements: &str) -> PgConnection {
        let mut session = self.session().await;
        execute(&mut session, &format!("begin; {statements}"))
            .await
            .expect("the statements succeed");
        session
    }

    /// Runs statements in the test's database.
    pub(crate) async fn sql(&self, statements: &str) {
        execute(&mut self.session().await, statements)
            .await
            .expect("the statements succeed");
    }

    /// The number of rows.
    pub(crate) async fn rows(&self) -> i64 {
        self.number("select count(*) from visitas").await
    }

    /// The value of `visitas_home`.
    pub(crate) async fn redis_visits(&self) -> i64 {
        self.redis_says::<Option<i64>>(&["GET", "visitas_home"])
            .await
            .unwrap_or(0)
    }

    /// What Redis responds to a command.
    pub(crate) async fn redis_says<T: redis::FromRedisValue>(&self, command: &[&str]) -> T {
        let client = redis::Client::open(self.redis.url()).expect("an address");
        let mut connection = client
            .get_multiplexed_async_connection()
            .await
            .expect("a connection to Redis");
        redis::cmd(command[0])
            .arg(&command[1..])
            .query_async(&mut connection)
            .await
            .expect("a response")
    }
}

/// A service whose stores are both down, for tests that need no store.
pub(crate) async fn without_stores(settings: &[(&str, &str)]) -> Service {
    let down = [
        ("DB_PORT", "1"),
        ("DB_PASSWORD", "none"),
        ("REDIS_PORT", "1"),
    ];
    let down = [
        &down,
        &[("DB_HOST", "127.0.0.1"), ("REDIS_HOST", "127.0.0.1")][..],
    ]
    .concat();
    Service::start(&super::settings(&[&down, settings].concat())).await
}

/// Runs statements in a session.
pub(crate) async fn execute(session: &mut PgConnection, statements: &str) -> sqlx::Result<()> {
    sqlx::raw_sql(sqlx::AssertSqlSafe(statements.to_owned()))
        .execute(session)
        .await
        .map(drop)
}

/// The count's lock: visits wait until it is released.
pub(crate) struct HeldCount(PgConnection);

impl HeldCount {
    /// Takes it.
    pub(crate) async fn of(world: &World) -> Self {
        let mut session = world.session().await;
        sqlx::raw_sql("begin; select public.travar_contagem()")
            .execute(&mut session)
            .await
            .expect("the lock");
        Self(session)
    }

    /// Waits until a batch of visits is with Postgres and waits for it.
    pub(crate) async fn until_waited_for(&mut self) {
        eventually("a batch waits for the lock", SOON, async || {
            self.waiting().await > 0
        })
        .await;
    }

    /// The number of batches that are with Postgres and wait for it.
    pub(crate) async fn waiting(&mut self) -> i64 {
        let waiting = "select count(*) from pg_locks as l \
                       where l.locktype = 'advisory' and not l.granted and l.database = \
                       (select d.oid from pg_database as d where d.datname = current_database())";
        sqlx::query_scalar(waiting)
            .fetch_one(&mut self.0)
            .await
            .expect("the locks")
    }

    /// Gives it back.
    pub(crate) async fn release(mut self) {
        sqlx::raw_sql("commit")
            .execute(&mut self.0)
            .await
            .expect("the end of the lock");
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // Best effort: the test may have stopped the server, and the data is temporary.
        if Arc::strong_count(&self.postgres) > 1 {
            let statement = format!("drop database if exists {} with (force)", self.database);
            run_once(&self.postgres, statement).ok();
        }
    }
}

/// Starts Postgres in memory and without flushes, which make creating and dropping a database take
/// seconds. The system outlives every server that a test kills, so no data is lost.
pub(crate) fn start_postgres(mut options: PostgresOptions) -> Postgres {
    options.config.push(("fsync".to_owned(), "off".to_owned()));
    options.quick_login = true;
    in_memory(&mut options.data);
    Postgres::start(options).expect("Postgres starts")
}

/// Data that is not kept goes into memory.
fn in_memory(data: &mut Data) {
    if *data == Data::Temporary {
        *data = Data::InMemory;
    }
}

/// How the superuser reaches a database.
fn session_of(postgres: &Postgres, database: &str) -> PgConnectOptions {
    PgConnectOptions::new_without_pgpass()
        .host(postgres.host())
        .port(postgres.port())
        .username(devstack::USER)
        .password(devstack::PASSWORD)
        .database(database)
}

/// Runs a statement in a session of its own. Blocks, also in an async test: to start `psql` takes
/// several times as long as this.
fn run_once(postgres: &Postgres, statement: String) -> sqlx::Result<()> {
    let options = session_of(postgres, "postgres");
    let run = async move {
        let run = async { execute(&mut options.connect().await?, &statement).await };
        let within = tokio::time::timeout(SOON, run).await;
        within.map_err(std::io::Error::from)?
    };
    // Its own thread, since the runtime of an async test cannot block for another one.
    let thread = std::thread::spawn(|| {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?
            .block_on(run)
    });
    thread.join().expect("no panic")
}

/// The Postgres of all tests that leave it alone. It ends with the last of them that runs.
fn shared_postgres() -> Arc<Postgres> {
    static SHARED: LazyLock<Mutex<Weak<Postgres>>> = LazyLock::new(Mutex::default);
    let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
    shared.upgrade().unwrap_or_else(|| {
        let options = PostgresOptions {
            config: vec![("max_connections".to_owned(), "300".to_owned())],
            ..PostgresOptions::default()
        };
        let postgres = Arc::new(start_postgres(options));
        *shared = Arc::downgrade(&postgres);
        postgres
    })
}
