//! Counts in memory and writes the sum every two seconds, as analytics such as `GoatCounter` do. It
//! promises no number for each visit: the total is this replica's guess.

use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use anyhow::Result;

use crate::Stores;

static TOTAL: AtomicI64 = AtomicI64::new(0);
static UNWRITTEN: AtomicI64 = AtomicI64::new(0);

const INTERVAL: Duration = Duration::from_secs(2);

/// Reads the total, and writes what is counted from now on.
pub(crate) async fn begin(stores: Stores) -> Result<()> {
    let read = "select total from contador";
    let total: i64 = sqlx::query_scalar(read).fetch_one(&stores.postgres).await?;
    TOTAL.store(total, Ordering::Relaxed);
    tokio::spawn(async move {
        loop {
            tokio::time::sleep(INTERVAL).await;
            let visits = UNWRITTEN.swap(0, Ordering::Relaxed);
            let write = "update contador set total = total + $1";
            let write = sqlx::query(write).bind(visits);
            if write.execute(&stores.postgres).await.is_err() {
                UNWRITTEN.fetch_add(visits, Ordering::Relaxed);
            }
        }
    });
    Ok(())
}

/// What was counted since the last write is lost with the process.
pub(crate) async fn visit(stores: Stores) -> Result<(i64, i64)> {
    UNWRITTEN.fetch_add(1, Ordering::Relaxed);
    let total = TOTAL.fetch_add(1, Ordering::Relaxed) + 1;
    Ok((total, stores.increment().await?))
}
