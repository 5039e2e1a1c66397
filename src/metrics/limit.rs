//! A limit on how many series of a kind there can be, for labels that others choose.

use std::collections::HashSet;
use std::sync::{PoisonError, RwLock};

use metrics::Key;

/// The value of a label that stands for everything without a name or a series of its own.
pub const OTHER: &str = "_OTHER";

/// Admits the first series that ask, and no others.
#[derive(Debug)]
pub struct SeriesLimit {
    series: usize,
    admitted: RwLock<HashSet<Key>>,
}

impl SeriesLimit {
    /// Admits this many series.
    #[must_use]
    pub fn new(series: usize) -> Self {
        Self {
            series,
            admitted: RwLock::default(),
        }
    }

    /// Whether a series is one of those admitted.
    pub fn admits(&self, series: &Key) -> bool {
        let admitted = self.admitted.read().unwrap_or_else(PoisonError::into_inner);
        if admitted.contains(series) || admitted.len() >= self.series {
            return admitted.contains(series);
        }
        drop(admitted);
        let mut admitted = self
            .admitted
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        if admitted.len() < self.series {
            admitted.insert(series.clone());
        }
        admitted.contains(series)
    }
}
