//! The stores of the service: its settings for them, and the rows of its table.

use anyhow::Result;
use devstack::Postgres;

/// The service's settings for a Postgres database and Redis.
pub fn settings(
    (postgres_host, postgres_port): (&str, u16),
    database: &str,
    (redis_host, redis_port): (&str, u16),
) -> Vec<(&'static str, String)> {
    vec![
        ("DB_HOST", postgres_host.to_owned()),
        ("DB_PORT", postgres_port.to_string()),
        ("DB_USER", devstack::USER.to_owned()),
        ("DB_PASSWORD", devstack::PASSWORD.to_owned()),
        ("DB_NAME", database.to_owned()),
        ("REDIS_HOST", redis_host.to_owned()),
        ("REDIS_PORT", redis_port.to_string()),
    ]
}

/// The `data` of all rows in the order of their ids, in microseconds since 1970, for the judge of
/// histories.
pub fn rows(postgres: &Postgres, database: &str) -> Result<Vec<i64>> {
    let query = "select (extract(epoch from data) * 1000000)::bigint from visitas order by id";
    let rows = postgres.sql(database, query)?;
    rows.lines().map(|row| Ok(row.parse()?)).collect()
}
