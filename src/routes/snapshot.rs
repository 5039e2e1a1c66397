//! Totals, states and recent rates, as `GET /visitas` and its stream have them in JSON. They are
//! what the monitor and the recorder know, so a snapshot calls no store.
//!
//! Must not know: who reads them.

use std::fmt;
use std::time::{Duration, SystemTime};

use serde::Serialize;
use time::OffsetDateTime;
use time::serde::rfc3339;
use utoipa::ToSchema;

use super::state::AppState;
use crate::rates;
use crate::store::Store as _;

/// Totals, states and recent rates.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(super) struct Snapshot {
    pub(super) db_status: Status,
    pub(super) redis_status: Status,
    /// The rows of the table, as last read; null while unknown
    #[schema(required, minimum = 0)]
    pub(super) total_registros_db: Option<i64>,
    /// The count in Redis, as last read; null while unknown
    #[schema(required)]
    pub(super) visitas_redis: Option<i64>,
    /// When this was written
    #[serde(with = "rfc3339")]
    pub(super) atualizado_em: OffsetDateTime,
    pub(super) replica: Replica,
}

/// Whether a store works, in the words of the challenge.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum Status {
    Ok,
    Erro,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

/// This replica: its rates are its own, while totals are of all replicas.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(super) struct Replica {
    /// As `service.instance.id` in traces
    pub(super) id: &'static str,
    /// When it started
    #[serde(with = "rfc3339")]
    pub(super) desde: OffsetDateTime,
    /// One entry for each finished interval of 5 s in the last 10 minutes, the oldest first.
    pub(super) taxas: Vec<Rate>,
}

/// What this replica did in 5 s.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, ToSchema)]
pub(super) struct Rate {
    /// When the 5 s began
    #[serde(with = "rfc3339")]
    pub(super) em: OffsetDateTime,
    /// Visits recorded
    pub(super) visitas: u64,
    /// Visits answered with 503
    pub(super) falhas: u64,
    /// Median of the recorded visits, from the queue to the end of the batch; null without a visit
    #[schema(required, minimum = 0)]
    pub(super) p50_ms: Option<f64>,
    /// 99th percentile of the same
    #[schema(required, minimum = 0)]
    pub(super) p99_ms: Option<f64>,
}

impl Snapshot {
    /// What is known now.
    pub(super) fn take(state: &AppState) -> Self {
        let (postgres, redis) = (state.postgres.availability(), state.redis.availability());
        let history = state.rates.history();
        Self {
            db_status: status(postgres.is_up()),
            redis_status: status(redis.is_up()),
            total_registros_db: postgres.count(),
            visitas_redis: redis.count(),
            atualizado_em: time(SystemTime::now()),
            replica: Replica {
                id: state.telemetry.instance_id(),
                desde: time(state.started),
                taxas: history.iter().map(Rate::from).collect(),
            },
        }
    }

    /// The snapshot in JSON, without a newline.
    pub(super) fn to_json(&self) -> serde_json::Result<Vec<u8>> {
        serde_json::to_vec(self)
    }
}

impl From<&rates::Rate> for Rate {
    fn from(rate: &rates::Rate) -> Self {
        Self {
            em: rate.began.into(),
            visitas: rate.visits,
            falhas: rate.failures,
            p50_ms: rate.p50.map(milliseconds),
            p99_ms: rate.p99.map(milliseconds),
        }
    }
}

/// A state in the words of the challenge.
pub(super) fn status(works: bool) -> Status {
    if works { Status::Ok } else { Status::Erro }
}

/// A duration in milliseconds, to the microsecond.
pub(super) fn milliseconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

/// A moment, to the millisecond.
fn time(moment: SystemTime) -> OffsetDateTime {
    let time = OffsetDateTime::from(moment);
    time.replace_millisecond(time.millisecond()).unwrap_or(time)
}
