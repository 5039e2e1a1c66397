//! Totals, states and recent rates, as `GET /visitas` and its stream have them in JSON. They are
//! what the monitor and the recorder know, so a snapshot calls no store.
//!
//! Must not know: who reads them.

use std::time::{Duration, SystemTime};

use serde::Serialize;
use time::OffsetDateTime;
use time::serde::rfc3339;

use super::state::AppState;
use crate::rates;
use crate::store::Store as _;

/// The JSON of `GET /visitas`.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Snapshot {
    pub(super) db_status: &'static str,
    pub(super) redis_status: &'static str,
    pub(super) total_registros_db: Option<i64>,
    pub(super) visitas_redis: Option<i64>,
    #[serde(with = "rfc3339")]
    pub(super) atualizado_em: OffsetDateTime,
    pub(super) replica: Replica,
}

/// This replica: its rates are its own, while totals are of all replicas.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Replica {
    pub(super) id: &'static str,
    #[serde(with = "rfc3339")]
    pub(super) desde: OffsetDateTime,
    /// One entry for each finished interval of 5 s in the last 10 minutes, the oldest first.
    pub(super) taxas: Vec<Rate>,
}

/// What this replica did in 5 s.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Rate {
    /// When the 5 s began.
    #[serde(with = "rfc3339")]
    pub(super) em: OffsetDateTime,
    /// Visits recorded.
    pub(super) visitas: u64,
    /// Visits refused or in doubt.
    pub(super) falhas: u64,
    /// Of the recorded visits: milliseconds from the queue to the end of the batch.
    pub(super) p50_ms: Option<f64>,
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
pub(super) fn status(works: bool) -> &'static str {
    if works { "ok" } else { "erro" }
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
