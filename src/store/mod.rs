//! The two stores, each behind one type that keeps its connections to itself.
//!
//! A connection is reached through a `pool` alone, and a pool observes every call: that each
//! has a deadline, metrics and, in a sampled batch, a span is a fact of types. It knows nothing
//! of HTTP.

mod availability;
mod call;
mod error;
mod pool;
mod postgres;
mod redis;
mod watch;

pub use self::availability::Availability;
pub use self::call::{Batch, Parent};
pub use self::error::{CallError, Error};
pub use self::postgres::{Postgres, Recount};
pub use self::redis::Redis;
pub use self::watch::watch;

/// What both stores have in common: they are watched.
pub trait Store {
    /// Whether the store does what a visit needs, as far as is known.
    fn availability(&self) -> &Availability;

    /// Does on a new connection all that a visit needs, and keeps nothing of it. If it succeeds
    /// the store is up, and the connection is there for the next visit.
    ///
    /// # Errors
    ///
    /// Why a visit would fail.
    fn probe(&self) -> impl Future<Output = Result<(), Error>> + Send;

    /// How many visits the store has counted.
    ///
    /// # Errors
    ///
    /// Why it could not be read.
    fn total(&self) -> impl Future<Output = Result<i64, Error>> + Send;

    /// Publishes what the store's connections are doing.
    fn report(&self);
}
