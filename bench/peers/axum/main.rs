//! A visit as a good engineer writes it with the service's own libraries and allocator, one
//! transaction for each visit:
//!
//! ```text
//! axum-peer plain ADDRESS     INSERT … RETURNING: the row's id in place of a count
//! axum-peer counter ADDRESS   a counter row, updated in the same transaction: an exact count
//! ```
//!
//! `bb8` pools the sessions, because sqlx's own pool pings each one when it comes back. All visits
//! share one connection to Redis, on which the driver pipelines.

use std::env;

use anyhow::{Context as _, Result, bail};
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;
use axum::{Json, Router};
use bb8_redis::bb8::{ManageConnection, Pool};
use bb8_redis::redis::aio::MultiplexedConnection;
use bb8_redis::redis::{AsyncCommands as _, Client};
use serde::Serialize;
use sqlx::postgres::PgConnectOptions;
use sqlx::{ConnectOptions as _, Connection as _, PgConnection};
use tikv_jemallocator::Jemalloc;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;

#[global_allocator]
static ALLOCATOR: Jemalloc = Jemalloc;

const PLAIN: &str = "INSERT INTO visitas DEFAULT VALUES RETURNING id";
/// One statement, so that the counter's lock is not held during a round trip.
const COUNTER: &str = "WITH visit AS (INSERT INTO visitas DEFAULT VALUES)
    UPDATE contador SET total = total + 1 RETURNING total";

#[derive(Clone)]
struct Stores {
    postgres: Pool<Sessions>,
    redis: MultiplexedConnection,
    statement: &'static str,
}

struct Sessions(PgConnectOptions);

#[derive(Serialize)]
struct Response {
    db_status: &'static str,
    redis_status: &'static str,
    total_registros_db: i64,
    visitas_redis: i64,
}

fn main() -> Result<()> {
    let arguments: Vec<_> = env::args().collect();
    let [_, kind, address] = &arguments[..] else {
        bail!("expected plain or counter, and an address");
    };
    let statement = match &**kind {
        "plain" => PLAIN,
        "counter" => COUNTER,
        _ => bail!("{kind} is neither plain nor counter"),
    };
    Runtime::new()?.block_on(async {
        let redis = format!(
            "redis://{}:{}",
            variable("REDIS_HOST")?,
            variable("REDIS_PORT")?
        );
        let stores = Stores {
            postgres: Pool::builder()
                .max_size(variable("DB_SESSIONS")?.parse()?)
                .test_on_check_out(false)
                .build(Sessions(options()?))
                .await?,
            redis: Client::open(redis)?
                .get_multiplexed_async_connection()
                .await?,
            statement,
        };
        let router = Router::new().route("/", get(visit)).with_state(stores);
        Ok(axum::serve(TcpListener::bind(address).await?, router).await?)
    })
}

async fn visit(State(mut stores): State<Stores>) -> Result<Json<Response>, StatusCode> {
    record(&mut stores)
        .await
        .map(Json)
        .map_err(|_| StatusCode::SERVICE_UNAVAILABLE)
}

async fn record(stores: &mut Stores) -> Result<Response> {
    let total = {
        let mut session = stores.postgres.get().await?;
        sqlx::query_scalar(stores.statement)
            .fetch_one(&mut *session)
            .await?
    };
    Ok(Response {
        db_status: "ok",
        redis_status: "ok",
        total_registros_db: total,
        visitas_redis: stores.redis.incr("visitas_home", 1).await?,
    })
}

impl ManageConnection for Sessions {
    type Connection = PgConnection;
    type Error = sqlx::Error;

    async fn connect(&self) -> Result<PgConnection, sqlx::Error> {
        self.0.connect().await
    }

    async fn is_valid(&self, session: &mut PgConnection) -> Result<(), sqlx::Error> {
        session.ping().await
    }

    fn has_broken(&self, _session: &mut PgConnection) -> bool {
        false
    }
}

fn options() -> Result<PgConnectOptions> {
    Ok(PgConnectOptions::new()
        .host(&variable("DB_HOST")?)
        .port(variable("DB_PORT")?.parse()?)
        .username(&variable("DB_USER")?)
        .password(&variable("DB_PASSWORD")?)
        .database(&variable("DB_NAME")?)
        .disable_statement_logging())
}

fn variable(name: &str) -> Result<String> {
    env::var(name).with_context(|| format!("{name} is not set"))
}
