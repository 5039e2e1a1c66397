//! The commands that are not the service itself: each does one thing, says what it did and ends.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use reqwest::redirect::Policy;
use url::Url;

use crate::config::{PostgresConfig, RedisConfig};
use crate::store::{Postgres, Redis};

/// How long a service may take to say how it is; it promises a tenth of a second.
const HEALTHCHECK_TIMEOUT: Duration = Duration::from_secs(2);

/// `visitas migrate`: brings the database to this version.
///
/// # Errors
///
/// Why it was not done.
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
/// If it does not, or does not answer in time.
pub fn healthcheck(url: &Url) -> anyhow::Result<String> {
    let client = reqwest::blocking::Client::builder()
        .timeout(HEALTHCHECK_TIMEOUT)
        .redirect(Policy::none())
        // The service is on this host or near it, and a proxy's answer is not the service's.
        .no_proxy()
        // The URL is not an encrypted one, and reading the system's certificates takes time.
        .tls_certs_only([])
        .build()?;
    let response = client.get(url.clone()).send();
    let status = response.with_context(|| format!("asking {url}"))?.status();
    ensure!(status.is_success(), "{url} answers {status}");
    Ok(format!("{url} answers {status}"))
}

/// `visitas recount`: recounts the rows, where triggers had been disabled.
///
/// # Errors
///
/// Why it was not done; nothing has changed then.
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
/// Visits wait meanwhile: the count's lock is held for as long as an increment of a committed
/// batch may still be under way, and then for one reading and one correction.
///
/// # Errors
///
/// Why it was not done.
pub async fn reconcile(postgres: &PostgresConfig, redis: &RedisConfig) -> anyhow::Result<String> {
    let settle = redis.redis_timeout;
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
