//! The usual ways to count visits, each behind the same URL and the same four fields:
//!
//! ```text
//! counter DESIGN ADDRESS
//! ```
//!
//! Each design is a file of its own, written for this comparison from the idea alone. This file has
//! what they share: the pools, the tables and HTTP.

mod counter_row;
mod memory;
mod read_write;
mod redis_alone;
mod two_transactions;

use std::env;

use anyhow::{Context as _, Result, bail};
use axum::http::StatusCode;
use axum::routing::get;
use axum::{Json, Router};
use bb8_redis::RedisConnectionManager;
use bb8_redis::bb8;
use bb8_redis::redis::AsyncCommands as _;
use serde::Serialize;
use sqlx::PgPool;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;

#[derive(Clone)]
struct Stores {
    postgres: PgPool,
    redis: bb8::Pool<RedisConnectionManager>,
}

#[derive(Serialize)]
struct Response {
    db_status: &'static str,
    redis_status: &'static str,
    total_registros_db: i64,
    visitas_redis: i64,
}

fn main() -> Result<()> {
    let arguments: Vec<_> = env::args().collect();
    let [_, design, address] = &arguments[..] else {
        bail!("expected a design and an address");
    };
    Runtime::new()?.block_on(serve(design, address))
}

async fn serve(design: &str, address: &str) -> Result<()> {
    let variable = |name: &str| env::var(name).with_context(|| name.to_owned());
    let postgres = format!(
        "postgres://{}:{}@{}:{}/{}",
        variable("DB_USER")?,
        variable("DB_PASSWORD")?,
        variable("DB_HOST")?,
        variable("DB_PORT")?,
        variable("DB_NAME")?
    );
    let redis = format!(
        "redis://{}:{}",
        variable("REDIS_HOST")?,
        variable("REDIS_PORT")?
    );
    let stores = Stores {
        postgres: PgPool::connect_lazy(&postgres)?,
        redis: bb8::Pool::builder().build_unchecked(RedisConnectionManager::new(redis)?),
    };
    let router = match design {
        "read-write" => router(stores, read_write::visit),
        "memory" => {
            memory::begin(stores.clone()).await?;
            router(stores, memory::visit)
        }
        "two-transactions" => router(stores, two_transactions::visit),
        "redis-alone" => router(stores, redis_alone::visit),
        "counter-row" => router(stores, counter_row::visit),
        other => bail!("no design is called {other}"),
    };
    Ok(axum::serve(TcpListener::bind(address).await?, router).await?)
}

/// Serves a design that returns a visit's two numbers.
fn router<F>(stores: Stores, visit: fn(Stores) -> F) -> Router
where
    F: Future<Output = Result<(i64, i64)>> + Send + 'static,
{
    let respond = move || {
        let visited = visit(stores.clone());
        async {
            let (total, counted) = visited.await.map_err(|_| StatusCode::SERVICE_UNAVAILABLE)?;
            Ok::<_, StatusCode>(Json(Response {
                db_status: "ok",
                redis_status: "ok",
                total_registros_db: total,
                visitas_redis: counted,
            }))
        }
    };
    Router::new().route("/", get(respond))
}

impl Stores {
    /// Increments the counter in Redis.
    async fn increment(&self) -> Result<i64> {
        Ok(self.redis.get().await?.incr("visitas_home", 1).await?)
    }
}
