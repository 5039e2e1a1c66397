//! What the recorder needs from the two stores.
//!
//! Must not know: how a store does it.

use std::time::Duration;

use time::OffsetDateTime;

use super::call::Batch;
use super::error::CallError;
use super::watch::Store;

/// The store that records visits and gives them their numbers.
pub trait Ledger: Store + Send + Sync + 'static {
    /// Records visits that arrived at these moments, in this order, and returns the number of rows
    /// after the last of them. On return the visits are committed and flushed.
    ///
    /// # Errors
    ///
    /// Why the visits were not acknowledged, and whether they can be recorded nevertheless.
    fn record(
        &self,
        arrivals: &[OffsetDateTime],
        batch: &mut Batch,
    ) -> impl Future<Output = Result<i64, CallError>> + Send;

    /// How long a message to the store and its reply take on the network.
    fn round_trip(&self) -> Duration;
}

/// The store that counts recorded visits.
pub trait Counter: Store + Send + Sync + 'static {
    /// Adds the visits of a batch to the counter and returns its value after them.
    ///
    /// # Errors
    ///
    /// Why the value is unknown; the visits can be counted nevertheless.
    fn increment(
        &self,
        visits: usize,
        batch: &mut Batch,
    ) -> impl Future<Output = Result<i64, CallError>> + Send;
}
