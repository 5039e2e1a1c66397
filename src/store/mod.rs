//! The two stores, each behind one type that keeps its connections to itself.
//!
//! A connection is reached through a `pool` alone, and a pool observes every call: that each
//! has a deadline, metrics and, in a sampled batch, a span is a fact of types. It knows nothing
//! of HTTP.

mod availability;
mod call;
mod call_metrics;
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
pub use self::watch::{Store, watch};
