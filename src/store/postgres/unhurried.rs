//! Calls that take as long as the table is large: migrations and counting. While one runs another
//! session looks whether the server still works on it, since a host that vanishes says nothing.

use std::time::Duration;

use sqlx::PgConnection;

use super::session::Session;
use super::statements::{BACKEND, IS_ACTIVE, backend, is_active};
use crate::store::call::Operation;
use crate::store::error::{Cause, Error};
use crate::store::pool::{Link, Pool};

/// The longest that such a call takes.
const TIMEOUT: Duration = Duration::from_mins(30);
/// How often to look whether the server still works on the call, and how many looks in a row that
/// fail end it.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
const LOOK_FAILURES: u32 = 10;

/// A session whose statements have no limit on how long they run.
pub(super) struct Unhurried<'a> {
    pool: &'a Pool<Session>,
    connection: PgConnection,
    backend: i32,
}

impl<'a> Unhurried<'a> {
    pub(super) async fn open(pool: &'a Pool<Session>, session: &Session) -> Result<Self, Error> {
        let opening = async {
            let mut connection = session.open_unhurried().await?;
            let backend = backend(&mut connection).await?;
            Ok(Self {
                pool,
                connection,
                backend,
            })
        };
        pool.observe(&BACKEND, pool.timeout(), opening).await
    }

    /// A call that ends within the pool's timeout.
    pub(super) async fn call_briefly<R>(
        &mut self,
        operation: &Operation,
        work: impl AsyncFnOnce(&mut PgConnection) -> Result<R, Error>,
    ) -> Result<R, Error> {
        let work = work(&mut self.connection);
        self.pool
            .observe(operation, self.pool.timeout(), work)
            .await
    }

    /// A call that may run for as long as the server is seen to work on it.
    pub(super) async fn call<R>(
        &mut self,
        operation: &Operation,
        work: impl AsyncFnOnce(&mut PgConnection) -> Result<R, Error>,
    ) -> Result<R, Error> {
        let (pool, backend) = (self.pool, self.backend);
        let work = async {
            tokio::select! {
                result = work(&mut self.connection) => result,
                error = Box::pin(stalled(pool, backend)) => Err(error),
            }
        };
        pool.observe(operation, TIMEOUT, work).await
    }
}

/// Returns once the server has failed to answer several times, or does nothing for that session.
async fn stalled(pool: &Pool<Session>, backend: i32) -> Error {
    let mut failures = 0;
    let mut watcher = None;
    loop {
        tokio::time::sleep(LOOK_INTERVAL).await;
        match look(pool, backend, &mut watcher).await {
            Ok(true) => failures = 0,
            // No further session is to be had, so the server is there.
            Err(error) if error.is_definite() => failures = 0,
            Ok(false) | Err(_) => failures += 1,
        }
        if failures == LOOK_FAILURES {
            return Error::Connection(Cause::from(
                "the server has not been seen to work on it for several seconds",
            ));
        }
    }
}

/// Asks on the `watcher`, which is opened where needed.
async fn look(
    pool: &Pool<Session>,
    backend: i32,
    watcher: &mut Option<Link<PgConnection>>,
) -> Result<bool, Error> {
    let look = async |connection: &mut PgConnection| is_active(connection, backend).await;
    let (link, is_active) = match watcher.take() {
        Some(mut link) => {
            let is_active = pool.call_on(&mut link, &IS_ACTIVE, look).await?;
            (link, is_active)
        }
        None => pool.call_on_new(&IS_ACTIVE, look).await?,
    };
    *watcher = Some(link);
    Ok(is_active)
}
