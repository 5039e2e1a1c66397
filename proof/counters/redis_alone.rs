//! Counts in Redis alone. How much a crash costs is a setting of Redis: `appendonly`, `appendfsync`.

use anyhow::Result;

use crate::Stores;

/// Redis runs one command at a time, so each visit gets a number of its own. There are no rows.
pub(crate) async fn visit(stores: Stores) -> Result<(i64, i64)> {
    let total = stores.increment().await?;
    Ok((total, total))
}
