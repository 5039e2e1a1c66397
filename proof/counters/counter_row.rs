//! Inserts a row and updates the one row of a counter in the same transaction.

use anyhow::Result;

use crate::Stores;

/// The row's lock is held until the commit is flushed, so all visits take turns on the disk.
pub(crate) async fn visit(stores: Stores) -> Result<(i64, i64)> {
    let count = "with visit as (insert into visitas default values) \
        update contador set total = total + 1 returning total";
    let total = sqlx::query_scalar(count).fetch_one(&stores.postgres);
    Ok((total.await?, stores.increment().await?))
}
