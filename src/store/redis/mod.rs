//! Redis: the counter `visitas_home`.
//!
//! An increment is sent at most once: a retry after a lost response could count a visit twice. Must
//! not know: HTTP and Postgres.

mod connection;
mod error;

use std::time::Duration;

use tokio::time::Instant;

use self::connection::{Opener, Session};
use super::availability::Availability;
use super::call::{Batch, Operation, Target};
use super::error::{CallError, Error, System};
use super::pool::Pool;
use super::recording::Counter;
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

const KEY: &str = "visitas_home";
/// Above this value a batch could overflow the counter, which `INCRBY` refuses.
const HIGHEST: i64 = i64::MAX - 4096;
/// Redis usually counts one batch at a time. The monitor uses another connection; the others are a reserve
/// for connections that an outage has left in doubt.
const POOL_SIZE: u32 = 4;

impl Redis {
    /// Prepares the connections; none is opened yet.
    ///
    /// # Errors
    ///
    /// If the certificates of `REDIS_TLS_CA`, or those of the client, cannot be used.
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
        let corrected = self.pool.call(&ADJUST, None, async |session| {
            increment_by(session, difference).await
        });
        corrected.await.map_err(|failure| failure.error)
    }
}

impl Counter for Redis {
    async fn increment(&self, visits: usize, batch: &mut Batch) -> Result<i64, CallError> {
        let by = i64::try_from(visits).unwrap_or(i64::MAX);
        self.pool
            .call(&INCREMENT, Some(batch), async |session| {
                increment_by(session, by).await
            })
            .await
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
                self.pool.keep(link, started, Some(count));
                Ok(())
            }
            Err(error) => {
                self.pool.fail(started, &error);
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
async fn read_counter(session: &mut Session) -> Result<i64, Error> {
    let count = increment_by(session, 0).await?;
    if count > HIGHEST {
        let cause = format!("{KEY} is {count}: it has no room for a batch of visits");
        return Err(Error::Unexpected(cause.into()));
    }
    Ok(count)
}

async fn increment_by(session: &mut Session, by: i64) -> Result<i64, Error> {
    session.send(redis::cmd("INCRBY").arg(KEY).arg(by)).await
}
