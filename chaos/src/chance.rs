//! Random delays and random replicas.

use std::hash::{BuildHasher as _, RandomState};

/// A random number from 0 to 1.
pub fn fraction() -> f64 {
    // The standard library's random seeds are sufficient.
    let bits = RandomState::new().hash_one(()) >> 32;
    bits as f64 / f64::from(u32::MAX)
}

/// A random number from 0 to `count`, exclusive.
pub fn below(count: usize) -> usize {
    let number = RandomState::new().hash_one(()) % (count as u64).max(1);
    usize::try_from(number).unwrap_or_default()
}
