//! A limit on the number of series, for labels whose values clients or stores choose.
//!
//! Must not know: any metric by its name.

use std::collections::HashSet;
use std::sync::{PoisonError, RwLock};

use metrics::Key;

/// The label value for everything without a name or a series of its own.
pub const OTHER: &str = "_OTHER";

/// Admits the first series up to a maximum, and no others.
#[derive(Debug)]
pub struct SeriesLimit {
    max_series: usize,
    admitted: RwLock<HashSet<Key>>,
}

impl SeriesLimit {
    /// Admits at most this many series.
    #[must_use]
    pub fn new(max_series: usize) -> Self {
        Self {
            max_series,
            admitted: RwLock::default(),
        }
    }

    /// Whether a series is admitted, now or earlier.
    pub fn admits(&self, series: &Key) -> bool {
        let admitted = self.admitted.read().unwrap_or_else(PoisonError::into_inner);
        if admitted.contains(series) || admitted.len() >= self.max_series {
            return admitted.contains(series);
        }
        drop(admitted);
        let mut admitted = self
            .admitted
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        if admitted.len() < self.max_series {
            admitted.insert(series.clone());
        }
        admitted.contains(series)
    }
}
