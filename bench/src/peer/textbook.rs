//! The textbook: a visit as a competent engineer first writes it, with the same libraries as the
//! service. A pool for each store in its default size, and for each visit an `INSERT`, a `SELECT
//! count(*)` and an `INCR`, in sequence.

use std::env;

use anyhow::{Context as _, Result};
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;
use axum::{Json, Router};
use bb8_redis::RedisConnectionManager;
use bb8_redis::bb8;
use bb8_redis::redis::AsyncCommands as _;
use serde::Serialize;
use sqlx::PgPool;

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

/// With the stores of the environment.
pub(super) async fn router() -> Result<Router> {
    let [host, port, user, password, database, redis_host, redis_port] = [
        "DB_HOST",
        "DB_PORT",
        "DB_USER",
        "DB_PASSWORD",
        "DB_NAME",
        "REDIS_HOST",
        "REDIS_PORT",
    ]
    .map(|name| env::var(name).with_context(|| name));
    let database = format!(
        "postgres://{}:{}@{}:{}/{}",
        user?, password?, host?, port?, database?
    );
    let redis = format!("redis://{}:{}", redis_host?, redis_port?);
    let stores = Stores {
        postgres: PgPool::connect(&database).await?,
        redis: bb8::Pool::builder()
            .build(RedisConnectionManager::new(redis)?)
            .await?,
    };
    Ok(Router::new().route("/", get(visit)).with_state(stores))
}

async fn visit(State(stores): State<Stores>) -> Result<Json<Response>, StatusCode> {
    match record(&stores).await {
        Ok((total, redis)) => Ok(Json(Response {
            db_status: "ok",
            redis_status: "ok",
            total_registros_db: total,
            visitas_redis: redis,
        })),
        Err(_) => Err(StatusCode::SERVICE_UNAVAILABLE),
    }
}

async fn record(stores: &Stores) -> Result<(i64, i64)> {
    sqlx::query("INSERT INTO visitas DEFAULT VALUES")
        .execute(&stores.postgres)
        .await?;
    let total = sqlx::query_scalar("SELECT count(*) FROM visitas")
        .fetch_one(&stores.postgres)
        .await?;
    let redis = stores.redis.get().await?.incr("visitas_home", 1).await?;
    Ok((total, redis))
}
