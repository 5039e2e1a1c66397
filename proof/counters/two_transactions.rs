//! Inserts a row, then counts all rows, each in a transaction of its own.

use anyhow::Result;

use crate::Stores;

/// Two visits that insert before either counts get the same number.
pub(crate) async fn visit(stores: Stores) -> Result<(i64, i64)> {
    let insert = "insert into visitas default values";
    sqlx::query(insert).execute(&stores.postgres).await?;
    let count = "select count(*) from visitas";
    let total = sqlx::query_scalar(count).fetch_one(&stores.postgres);
    Ok((total.await?, stores.increment().await?))
}
