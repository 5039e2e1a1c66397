//! Brings the database to this version, one instance at a time.

use std::borrow::Cow;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use sqlx::Connection as _;
use sqlx::migrate::{MigrateError, Migrator};

use super::Postgres;
use super::session::failure;
use crate::store::{Cause, Error};
use crate::telemetry::call::{Operation, Trace, call};

static MIGRATIONS: Migrator = sqlx::migrate!();

pub(super) static APPLIED: Operation = Operation::query(
    "SELECT _sqlx_migrations",
    "select version, checksum from public._sqlx_migrations where success",
);

const UNDEFINED_TABLE: &str = "42P01";

/// Serialises migrations between instances; any constant that nothing else uses.
const MIGRATION_LOCK: i64 = 0x7669_7369_7461_7300;
/// How long to wait for another instance's migration before saying so and trying again.
const MIGRATION_LOCK_WAIT: Duration = Duration::from_secs(10);
const MIGRATION_LOCK_RETRY: Duration = Duration::from_millis(50);
/// Adopting a table with many rows rewrites it, which takes as long as it takes; this is only the
/// end of waiting for a server that has gone.
const MIGRATION_DEADLINE: Duration = Duration::from_mins(30);

impl Postgres {
    /// Brings the database to this version, under a lock that only one instance holds. Returns
    /// how many migrations were applied.
    ///
    /// # Errors
    ///
    /// Why it was not done. What had been applied stays; a migration is applied whole or not.
    pub async fn migrate(&self) -> Result<usize, Error> {
        let mut applied = 0;
        let pending = self.pending().await?;
        if pending > 0 {
            // Said once: what keeps it from succeeding is said by the store's state.
            if !self.migration_announced.swap(true, Ordering::Relaxed) {
                tracing::info!(migrations.pending = pending, "migrating the database");
            }
            applied = tokio::time::timeout(MIGRATION_DEADLINE, self.apply_migrations())
                .await
                .unwrap_or(Err(Error::Timeout(MIGRATION_DEADLINE)))?;
            tracing::info!(migrations.applied = applied, "the database is migrated");
        }
        self.migrated.store(true, Ordering::Release);
        Ok(applied)
    }

    /// How many migrations of this version the database lacks. It takes no lock, so that a
    /// database in order is ready at once, whoever holds the lock.
    async fn pending(&self) -> Result<usize, Error> {
        let work = async {
            let mut link = self.pool.open().await?;
            let applied = link
                .call(async |connection| {
                    sqlx::query_as::<_, (i64, Vec<u8>)>(APPLIED.text())
                        .fetch_all(connection)
                        .await
                        .map_err(failure)
                })
                .await;
            match applied {
                Err(Error::Refused { code, .. }) if code == UNDEFINED_TABLE => Ok(Vec::new()),
                applied => applied,
            }
        };
        let applied = call(
            &self.target,
            &APPLIED,
            None,
            &mut Trace::none(),
            self.deadline,
            work,
        )
        .await?;
        let is_applied = |version, checksum: &[u8]| {
            applied
                .iter()
                .any(|(applied, sum)| *applied == version && sum == checksum)
        };
        Ok(MIGRATIONS
            .iter()
            .filter(|migration| !is_applied(migration.version, &migration.checksum))
            .count())
    }

    async fn apply_migrations(&self) -> Result<usize, Error> {
        let mut connection = self.session.open_unhurried().await?;
        let started = Instant::now();
        while !sqlx::query_scalar::<_, bool>("select pg_try_advisory_lock($1)")
            .bind(MIGRATION_LOCK)
            .fetch_one(&mut connection)
            .await
            .map_err(failure)?
        {
            if started.elapsed() > MIGRATION_LOCK_WAIT {
                return Err(Error::Unexpected(Cause::from(
                    "another session holds the migration lock",
                )));
            }
            tokio::time::sleep(MIGRATION_LOCK_RETRY).await;
        }
        // Whoever held the lock may have done it all.
        let pending = self.pending().await?;
        let migrator = Migrator {
            migrations: Cow::Borrowed(&MIGRATIONS.migrations),
            // A newer version may have migrated further; what it added is its own business.
            ignore_missing: true,
            // sqlx's own lock waits without limit; ours is held already.
            locking: false,
            ..Migrator::DEFAULT
        };
        migrator
            .run_direct(None, &mut connection, false)
            .await
            .map_err(migration_failure)?;
        // The session's end gives the lock back; nothing is left to say if it ends badly.
        connection.close().await.ok();
        Ok(pending)
    }
}

fn migration_failure(error: MigrateError) -> Error {
    match error {
        MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _) => failure(error),
        other => Error::Unexpected(other.into()),
    }
}
