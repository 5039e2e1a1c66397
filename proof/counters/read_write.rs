//! Reads the count, adds one, and writes it back: the first version of many badges, such as hits'.

use anyhow::Result;

use crate::Stores;

/// Two visits that read the same count write the same one.
pub(crate) async fn visit(stores: Stores) -> Result<(i64, i64)> {
    let read = "select total from contador";
    let total: i64 = sqlx::query_scalar(read).fetch_one(&stores.postgres).await?;
    let write = "update contador set total = $1";
    sqlx::query(write)
        .bind(total + 1)
        .execute(&stores.postgres)
        .await?;
    Ok((total + 1, stores.increment().await?))
}
