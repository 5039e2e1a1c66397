//! The totals, states and recent rates, as `GET /visitas` has them in JSON.
//!
//! Must not know: who reads them.

use serde::Serialize;
use time::OffsetDateTime;

/// The JSON of `GET /visitas`.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Snapshot {
    pub(super) db_status: &'static str,
    pub(super) redis_status: &'static str,
    pub(super) total_registros_db: Option<i64>,
    pub(super) visitas_redis: Option<i64>,
    #[serde(with = "time::serde::rfc3339")]
    pub(super) atualizado_em: OffsetDateTime,
    pub(super) replica: Replica,
}

/// This replica: its rates are its own, while totals are of all replicas.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Replica {
    pub(super) id: &'static str,
    #[serde(with = "time::serde::rfc3339")]
    pub(super) desde: OffsetDateTime,
    /// One entry for each complete interval of 5 s in the last 10 minutes, the oldest first. Fewer
    /// while the replica is younger.
    pub(super) taxas: Vec<Rate>,
}

/// What this replica did in 5 s.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Rate {
    /// When the 5 s began.
    #[serde(with = "time::serde::rfc3339")]
    pub(super) em: OffsetDateTime,
    /// Visits recorded.
    pub(super) visitas: u64,
    /// Visits refused or in doubt.
    pub(super) falhas: u64,
    /// Of the recorded visits: milliseconds from the request to the end of its batch.
    pub(super) p50_ms: Option<f64>,
    pub(super) p99_ms: Option<f64>,
}
