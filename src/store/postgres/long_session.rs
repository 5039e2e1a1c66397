//! Calls whose time grows with the table: migrations and counting. While such a call runs, another
//! session checks that the server still works on it, since a host that fails sends no error.
//!
//! Must not know: what a call does.

use std::time::Duration;

use sqlx::PgConnection;

use super::session::Session;
use super::statements::{BACKEND, IS_ACTIVE, backend, is_active};
use crate::store::call::Operation;
use crate::store::error::{Cause, Error};
use crate::store::pool::{Link, Pool};

/// Timeout of a long call.
const TIMEOUT: Duration = Duration::from_mins(30);
/// How often to check that the server still works on the call, and how many failed checks in a row
/// end it.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);
const MAX_FAILED_CHECKS: u32 = 10;

/// A session without a statement timeout.
pub(super) struct LongSession<'a> {
    pool: &'a Pool<Session>,
    connection: PgConnection,
    backend: i32,
}

impl<'a> LongSession<'a> {
    pub(super) async fn open(pool: &'a Pool<Session>, session: &Session) -> Result<Self, Error> {
        let opening = async {
            let mut connection = session.open_long().await?;
            let backend = backend(&mut connection).await?;
            Ok(Self {
                pool,
                connection,
                backend,
            })
        };
        pool.observe(&BACKEND, pool.timeout(), opening).await
    }

    /// Makes a call with the pool's timeout.
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

    /// Makes a call that can run for as long as the server works on it.
    pub(super) async fn call<R>(
        &mut self,
        operation: &Operation,
        work: impl AsyncFnOnce(&mut PgConnection) -> Result<R, Error>,
    ) -> Result<R, Error> {
        let (pool, backend) = (self.pool, self.backend);
        let work = async {
            tokio::select! {
                result = work(&mut self.connection) => result,
                error = Box::pin(wait_for_stall(pool, backend)) => Err(error),
            }
        };
        pool.observe(operation, TIMEOUT, work).await
    }
}

/// Returns after [`MAX_FAILED_CHECKS`] checks in a row in which the server did not respond, or did
/// not work on the session's statement.
async fn wait_for_stall(pool: &Pool<Session>, backend: i32) -> Error {
    let mut failures = 0;
    let mut watcher = None;
    loop {
        tokio::time::sleep(CHECK_INTERVAL).await;
        match check(pool, backend, &mut watcher).await {
            Ok(true) => failures = 0,
            // The server refused another session, so it is running.
            Err(error) if error.is_definite() => failures = 0,
            Ok(false) | Err(_) => failures += 1,
        }
        if failures == MAX_FAILED_CHECKS {
            return Error::Connection(Cause::from(
                "the server has not been seen to work on it for several seconds",
            ));
        }
    }
}

/// Checks on the session `watcher`, and opens it if needed.
async fn check(
    pool: &Pool<Session>,
    backend: i32,
    watcher: &mut Option<Link<PgConnection>>,
) -> Result<bool, Error> {
    let check = async |connection: &mut PgConnection| is_active(connection, backend).await;
    let (link, is_active) = match watcher.take() {
        Some(mut link) => {
            let is_active = pool.call_on(&mut link, &IS_ACTIVE, check).await?;
            (link, is_active)
        }
        None => pool.call_on_new(&IS_ACTIVE, check).await?,
    };
    *watcher = Some(link);
    Ok(is_active)
}
