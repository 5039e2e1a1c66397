//! Random moments and random replicas.

use std::hash::{BuildHasher as _, RandomState};

/// Some number from 0 up to 1.
pub(crate) fn fraction() -> f64 {
    // The standard library's own seeds are all the chance that is needed.
    let bits = RandomState::new().hash_one(()) >> 32;
    bits as f64 / f64::from(u32::MAX)
}

/// Some number from 0 up to, not including, `count`.
pub(crate) fn below(count: usize) -> usize {
    let number = RandomState::new().hash_one(()) % (count as u64).max(1);
    usize::try_from(number).unwrap_or_default()
}
