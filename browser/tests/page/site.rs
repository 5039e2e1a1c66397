//! A running service with its own stores, which a test can break.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};

use devstack::{DATABASE, Postgres, PostgresOptions, Redis, RedisOptions};
use lab::metrics::Metrics;
use lab::process::{self, Process};
use lab::wait::{SOON, within};
use lab::{client, ports, program, stack};

/// A service and its stores.
pub(crate) struct Site {
    pub(crate) service: Process,
    pub(crate) postgres: Postgres,
    pub(crate) redis: Redis,
    pub(crate) address: SocketAddr,
}

impl Site {
    /// Starts a service that is ready.
    pub(crate) fn start(settings: &[(&'static str, &str)]) -> Self {
        // A flush to a busy disk can take longer than a visit may. No test cuts the power.
        let postgres = PostgresOptions {
            config: vec![("fsync".to_owned(), "off".to_owned())],
            ..PostgresOptions::default()
        };
        let postgres = Postgres::start(postgres).expect("PostgreSQL starts");
        let redis = Redis::start(RedisOptions::default()).expect("Redis starts");
        let address = ports::free_address().expect("a free port");
        let stores = stack::settings(
            (postgres.host(), postgres.port()),
            DATABASE,
            (redis.host(), redis.port()),
        );
        // Timeouts that are longer than a busy machine takes.
        let own = [
            ("BIND_ADDR", address.to_string()),
            ("DB_TIMEOUT", "10s".to_owned()),
            ("REDIS_TIMEOUT", "5s".to_owned()),
            ("VISIT_TIMEOUT", "20s".to_owned()),
        ];
        let given = settings
            .iter()
            .map(|&(name, value)| (name, value.to_owned()));
        let command = program::command(stores.into_iter().chain(own).chain(given));
        let folder = program::scratch().expect("a folder");
        let log = folder.join(format!("browser-{}.log", address.port()));
        let service = Process::start(command.expect("the program"), &log);
        let site = Self {
            service: service.expect("the service starts"),
            postgres,
            redis,
            address,
        };
        let is_ready = || {
            let health = client::get(site.address, "/health");
            health.is_ok_and(|health| health.body.contains(r#""status":"ok","checks""#))
        };
        assert!(within(SOON, is_ready), "{}", site.service.log_tail());
        site
    }

    /// The address of a path.
    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// Makes a visit without the browser and returns its number.
    pub(crate) fn visit(&self) -> i64 {
        client::visit(self.address).expect("a visit").0
    }

    /// The number of rows.
    pub(crate) fn rows(&self) -> i64 {
        let rows = self.postgres.sql(DATABASE, "select count(*) from visitas");
        let rows = rows.expect("the rows");
        rows.trim().parse().expect("a number")
    }

    /// Sets the count in Redis.
    pub(crate) fn set_redis(&self, count: i64) {
        let mut redis = TcpStream::connect((self.redis.host(), self.redis.port())).expect("Redis");
        let command = format!("SET visitas_home {count}\r\nQUIT\r\n");
        redis.write_all(command.as_bytes()).expect("it is sent");
        let mut replies = String::new();
        redis.read_to_string(&mut replies).expect("replies");
        assert!(replies.starts_with("+OK"), "{replies}");
    }

    /// Holds the count's lock, for which visits wait, until the session ends.
    pub(crate) fn hold_count(&self) -> Process {
        let mut command = process::command(self.postgres.programs().join("psql"));
        let held = "begin; select public.travar_contagem(); select pg_sleep(600)";
        command.args(["-c", held, &self.postgres.url(DATABASE)]);
        let log = program::scratch()
            .expect("a folder")
            .join("browser-psql.log");
        let session = Process::start(command, &log).expect("psql starts");
        let is_held = || self.locks("granted") == 1;
        assert!(within(SOON, is_held), "{}", session.log_tail());
        session
    }

    /// Whether a batch of visits waits for the count's lock.
    pub(crate) fn waits_for_count(&self) -> bool {
        self.locks("not granted") == 1
    }

    fn locks(&self, which: &str) -> i64 {
        let locks =
            format!("select count(*) from pg_locks where locktype = 'advisory' and {which}");
        let locks = self.postgres.sql(DATABASE, &locks).expect("the locks");
        locks.trim().parse().expect("a number")
    }

    /// The number of pages that listen to the stream.
    pub(crate) fn streams(&self) -> Option<f64> {
        let metrics = Metrics::scrape(self.address).expect("the metrics");
        metrics.value("visitas_page_streams")
    }
}
