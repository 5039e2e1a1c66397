//! Redis: the counter `visitas_home`.
//!
//! An increment is sent at most once: repeating one whose answer was lost could count it twice.
//! It knows nothing of HTTP or of Postgres.

use std::time::{Duration, Instant};

use redis::aio::MultiplexedConnection;
use redis::io::tcp::TcpSettings;
use redis::{
    AsyncConnectionConfig, Client, ConnectionAddr, ErrorKind, IntoConnectionInfo,
    RedisConnectionInfo, RedisError, TlsCertificates,
};

use super::pool::{Connect, Pool};
use super::{Error, State, Store};
use crate::config::RedisConfig;
use crate::telemetry::call::{Operation, Target, Trace, call};
use crate::telemetry::metric::System;

/// The counter that starts over with the cache.
#[derive(Debug)]
pub struct Redis {
    pool: Pool<Opener>,
    state: State,
    target: Target,
    deadline: Duration,
}

static INCREMENT: Operation = Operation::command("INCRBY");

const KEY: &str = "visitas_home";
/// The writer takes one connection and the health monitor one; the others leave room for what an
/// outage left behind.
const POOL_SIZE: u32 = 4;

impl Redis {
    /// Prepares the connections; none is opened yet.
    ///
    /// # Errors
    ///
    /// If the certificates of `REDIS_TLS_CA` cannot be used.
    pub fn new(config: &RedisConfig) -> anyhow::Result<Self> {
        let target = Target {
            system: System::Redis,
            namespace: config.database.to_string(),
            address: config.host.clone(),
            port: config.port,
        };
        INCREMENT.declare(&target);
        Ok(Self {
            pool: Pool::new(
                Opener::new(config)?,
                POOL_SIZE,
                config.timeout,
                System::Redis,
            ),
            state: State::new(System::Redis),
            target,
            deadline: config.timeout,
        })
    }

    /// Adds visits to the counter and returns its value after them.
    ///
    /// # Errors
    ///
    /// Whatever kept the value from being known; the visits may be counted even so.
    pub async fn increment(&self, visits: usize, trace: &mut Trace<'_>) -> Result<i64, Error> {
        let started = Instant::now();
        let result = self
            .increment_by(
                i64::try_from(visits).unwrap_or(i64::MAX),
                Some(visits),
                trace,
            )
            .await;
        match &result {
            Ok(_) => self.state.succeeded(started.elapsed()),
            Err(error) => self.failed(error),
        }
        result
    }

    /// Moves the counter by a correction, which may be negative, and returns its value.
    ///
    /// # Errors
    ///
    /// Why the value is not known; the correction may have been made.
    pub async fn correct(&self, difference: i64) -> Result<i64, Error> {
        self.increment_by(difference, None, &mut Trace::none())
            .await
    }

    async fn increment_by(
        &self,
        by: i64,
        visits: Option<usize>,
        trace: &mut Trace<'_>,
    ) -> Result<i64, Error> {
        let work = async {
            let mut link = self.pool.take().await?;
            link.call(async |connection| send_increment(connection, by).await)
                .await
        };
        call(&self.target, &INCREMENT, visits, trace, self.deadline, work).await
    }

    fn failed(&self, error: &Error) {
        // In this order: what a probe opens as soon as the state is down is not to be forgotten.
        self.pool.forget_all();
        self.state.failed(error);
    }
}

impl Store for Redis {
    fn state(&self) -> &State {
        &self.state
    }

    async fn probe(&self) -> Result<(), Error> {
        let started = Instant::now();
        let work = async {
            let mut link = self.pool.open().await?;
            link.call(async |connection| send_increment(connection, 0).await)
                .await?;
            Ok(link)
        };
        let trace = &mut Trace::none();
        match call(&self.target, &INCREMENT, None, trace, self.deadline, work).await {
            Ok(link) => {
                self.pool.offer(link);
                self.state.succeeded(started.elapsed());
                Ok(())
            }
            Err(error) => {
                self.failed(&error);
                Err(error)
            }
        }
    }

    /// Read by adding nothing: a cache that can be read and not written is of no use to a visit.
    async fn total(&self) -> Result<i64, Error> {
        let started = Instant::now();
        let result = self.increment_by(0, None, &mut Trace::none()).await;
        match &result {
            Ok(count) => self.state.read(*count, started.elapsed()),
            Err(error) => {
                self.state.reading_failed(started, error);
                if !self.state.is_up() {
                    self.pool.forget_all();
                }
            }
        }
        result
    }

    fn report(&self) {
        self.pool.report();
    }
}

async fn send_increment(connection: &mut MultiplexedConnection, by: i64) -> Result<i64, Error> {
    redis::cmd("INCRBY")
        .arg(KEY)
        .arg(by)
        .query_async(connection)
        .await
        .map_err(failure)
}

/// How to open a connection.
struct Opener {
    client: Client,
    config: AsyncConnectionConfig,
}

impl Opener {
    fn new(config: &RedisConfig) -> anyhow::Result<Self> {
        let address = if config.tls {
            ConnectionAddr::TcpTls {
                host: config.host.clone(),
                port: config.port,
                insecure: false,
                tls_params: None,
            }
        } else {
            ConnectionAddr::Tcp(config.host.clone(), config.port)
        };
        let mut settings = RedisConnectionInfo::default().set_db(config.database);
        if let Some(username) = &config.username {
            settings = settings.set_username(username);
        }
        if let Some(password) = &config.password {
            settings = settings.set_password(password.expose());
        }
        let info = address
            .into_connection_info()?
            .set_tcp_settings(TcpSettings::default().set_nodelay(true))
            .set_redis_settings(settings);
        let client = match &config.tls_ca {
            None => Client::open(info)?,
            Some(certificates) => Client::build_with_tls(
                info,
                TlsCertificates {
                    client_tls: None,
                    root_cert: Some(certificates.pem.clone()),
                },
            )?,
        };
        // The driver's own limits are off: each call has one deadline, checkout included.
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(None)
            .set_response_timeout(None);
        Ok(Self { client, config })
    }
}

impl Connect for Opener {
    type Connection = MultiplexedConnection;

    async fn open(&self) -> Result<MultiplexedConnection, Error> {
        self.client
            .get_multiplexed_async_connection_with_config(&self.config)
            .await
            .map_err(failure)
    }

    async fn ping(&self, connection: &mut MultiplexedConnection) -> Result<(), Error> {
        redis::cmd("PING")
            .query_async(connection)
            .await
            .map_err(failure)
    }
}

/// What a failed command says about itself.
fn failure(error: RedisError) -> Error {
    match error.code() {
        Some(code) => Error::Refused {
            code: code.to_owned(),
            source: error.into(),
        },
        // The driver keeps the server's word of a refused login from us.
        None if error.kind() == ErrorKind::AuthenticationFailed => Error::Refused {
            code: "WRONGPASS".to_owned(),
            source: error.into(),
        },
        None if error.is_io_error() || error.is_connection_dropped() => {
            Error::Connection(error.into())
        }
        None => Error::Unexpected(error.into()),
    }
}
