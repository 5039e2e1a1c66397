//! The commands other than `serve`: each does one thing and returns a line that says what it did.
//!
//! Must not know: SQL, Redis commands and how the line is printed.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use reqwest::redirect::Policy;
use url::Url;

use crate::config::{PostgresConfig, RedisConfig};
use crate::store::{Postgres, Redis, settle_time};

/// How long `healthcheck` waits for a response; the service promises one within 100 ms.
const HEALTHCHECK_TIMEOUT: Duration = Duration::from_secs(2);

/// `visitas migrate`: brings the database to this version.
///
/// # Errors
///
/// Why the migration failed.
pub async fn migrate(postgres: &PostgresConfig) -> anyhow::Result<String> {
    let applied = Postgres::new(postgres)
        .migrate()
        .await
        .context("migrating")?;
    Ok(match applied {
        0 => "the database is up to date".to_owned(),
        1 => "1 migration applied".to_owned(),
        applied => format!("{applied} migrations applied"),
    })
}

/// `visitas healthcheck`: asks a running service whether it records visits.
///
/// # Errors
///
/// If the service does not record visits, or does not respond in time.
pub fn healthcheck(url: &Url) -> anyhow::Result<String> {
    let client = reqwest::blocking::Client::builder()
        .timeout(HEALTHCHECK_TIMEOUT)
        .redirect(Policy::none())
        // The service is on this host or near it, and a proxy's response is not the service's.
        .no_proxy()
        // The URL is `http://`, and reading the system's certificates takes time.
        .tls_certs_only([])
        .build()?;
    let response = client.get(url.clone()).send();
    let status = response.with_context(|| format!("asking {url}"))?.status();
    ensure!(status.is_success(), "{url} responded with {status}");
    Ok(format!("{url} responded with {status}"))
}

/// `visitas recount`: recounts the rows, for use after triggers were disabled.
///
/// # Errors
///
/// Why the recount failed; nothing has changed then.
pub async fn recount(postgres: &PostgresConfig) -> anyhow::Result<String> {
    let recount = Postgres::new(postgres)
        .recount()
        .await
        .context("recounting")?;
    Ok(format!(
        "counted {} rows; the total was {}",
        recount.after, recount.before
    ))
}

/// `visitas reconcile`: adds to Redis what it lacks of the count in Postgres.
///
/// Visits wait meanwhile: this holds the count's lock for as long as an increment of a committed
/// batch can still be in flight, and then for one reading and one correction.
///
/// # Errors
///
/// Why the stores could not be reconciled.
pub async fn reconcile(postgres: &PostgresConfig, redis: &RedisConfig) -> anyhow::Result<String> {
    let settle = settle_time(redis.redis_timeout);
    let postgres = Postgres::new(postgres);
    let redis = Redis::new(redis)?;
    let (total, difference) = postgres
        .with_count_locked(settle, async |total| {
            let difference = total - redis.counter().await?;
            if difference != 0 {
                redis.correct(difference).await?;
            }
            Ok((total, difference))
        })
        .await
        .context("reconciling")?;
    Ok(match difference {
        0 => format!("both stores count {total}"),
        _ => format!(
            "both stores count {total}; Redis was off by {}",
            -difference
        ),
    })
}
