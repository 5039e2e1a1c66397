//! Redis: the counter `visitas_home`.
//!
//! An increment is sent at most once: a retry after a lost response could count a visit twice. Must
//! not know: HTTP and Postgres.

use std::time::{Duration, Instant};

use redis::aio::MultiplexedConnection;
use redis::io::tcp::TcpSettings;
use redis::{
    AsyncConnectionConfig, Client, ConnectionAddr, ErrorKind, IntoConnectionInfo,
    RedisConnectionInfo, RedisError, TlsCertificates,
};

use super::availability::Availability;
use super::call::{Batch, Operation, Target};
use super::error::{CallError, Error, System};
use super::pool::{Connect, Pool};
use super::watch::Store;
use crate::config::RedisConfig;

/// The counter, which starts from 0 again when the cache is emptied.
#[derive(Debug)]
pub struct Redis {
    pool: Pool<Opener>,
}

static INCREMENT: Operation = Operation::command("INCRBY").that_records_visits();
/// The same command, for calls that count no visit.
static ADJUST: Operation = Operation::command("INCRBY");
static PING: Operation = Operation::command("PING");

const KEY: &str = "visitas_home";
/// Above this value a batch could overflow the counter, which `INCRBY` refuses.
const HIGHEST: i64 = i64::MAX - 4096;
/// The writer uses one connection and the monitor one; the others are a reserve for connections
/// that an outage has left in doubt.
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
            address: config.redis_host.clone(),
            port: config.redis_port,
        };
        Ok(Self {
            pool: Pool::new(
                Opener::new(config)?,
                POOL_SIZE,
                config.redis_timeout,
                target,
                &[&INCREMENT, &ADJUST],
            ),
        })
    }

    /// Adds the visits of a batch to the counter and returns its value after them.
    ///
    /// # Errors
    ///
    /// Why the value is unknown; the visits can be counted nevertheless.
    pub async fn increment(&self, visits: usize, batch: &mut Batch) -> Result<i64, CallError> {
        let by = i64::try_from(visits).unwrap_or(i64::MAX);
        self.pool
            .call(&INCREMENT, Some(batch), async |connection| {
                increment_by(connection, by).await
            })
            .await
    }

    /// Reads the counter, even if it has no room for a batch.
    ///
    /// # Errors
    ///
    /// Why it could not be read.
    pub async fn counter(&self) -> Result<i64, Error> {
        self.correct(0).await
    }

    /// Adds a correction, which can be negative, to the counter, and returns its value.
    ///
    /// # Errors
    ///
    /// Why the value is unknown; the correction can have been made.
    pub async fn correct(&self, difference: i64) -> Result<i64, Error> {
        let corrected = self.pool.call(&ADJUST, None, async |connection| {
            increment_by(connection, difference).await
        });
        corrected.await.map_err(|failure| failure.error)
    }
}

impl Store for Redis {
    fn availability(&self) -> &Availability {
        self.pool.availability()
    }

    /// How long an increment can be in flight.
    fn timeout(&self) -> Duration {
        self.pool.timeout()
    }

    async fn probe(&self) -> Result<(), Error> {
        let started = Instant::now();
        match self.pool.call_on_new(&ADJUST, read_counter).await {
            Ok((link, count)) => {
                self.pool.keep(link, started.elapsed(), Some(count));
                Ok(())
            }
            Err(error) => {
                self.pool.fail(&error);
                Err(error)
            }
        }
    }

    async fn total(&self) -> Result<i64, Error> {
        self.pool.read(&ADJUST, read_counter, |count| *count).await
    }

    fn report(&self) {
        self.pool.report();
    }
}

/// Reads the counter by adding 0, and checks that a batch could be added: a visit needs a counter
/// that can be incremented, not only read.
async fn read_counter(connection: &mut MultiplexedConnection) -> Result<i64, Error> {
    let count = increment_by(connection, 0).await?;
    if count > HIGHEST {
        let cause = format!("{KEY} is {count}: it has no room for a batch of visits");
        return Err(Error::Unexpected(cause.into()));
    }
    Ok(count)
}

async fn increment_by(connection: &mut MultiplexedConnection, by: i64) -> Result<i64, Error> {
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
                host: config.redis_host.clone(),
                port: config.redis_port,
                insecure: false,
                tls_params: None,
            }
        } else {
            ConnectionAddr::Tcp(config.redis_host.clone(), config.redis_port)
        };
        let mut settings = RedisConnectionInfo::default().set_db(config.database);
        if let Some(username) = &config.username {
            settings = settings.set_username(username);
        }
        if let Some(password) = &config.redis_password {
            settings = settings.set_password(password.expose());
        }
        let info = address
            .into_connection_info()?
            .set_tcp_settings(TcpSettings::default().set_nodelay(true))
            .set_redis_settings(settings);
        let client = match &config.redis_tls_ca {
            None => Client::open(info)?,
            Some(certificates) => Client::build_with_tls(
                info,
                TlsCertificates {
                    client_tls: None,
                    root_cert: Some(certificates.pem.clone()),
                },
            )?,
        };
        // Without the driver's own timeouts: each call has one deadline, checkout included.
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(None)
            .set_response_timeout(None);
        Ok(Self { client, config })
    }
}

impl Connect for Opener {
    type Connection = MultiplexedConnection;

    const PING: &'static Operation = &PING;

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

/// Converts the error of a command.
fn failure(error: RedisError) -> Error {
    match error.code() {
        Some(code) => Error::Refused {
            code: code.to_owned(),
            source: error.into(),
        },
        // The driver drops the server's code of a refused login.
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
