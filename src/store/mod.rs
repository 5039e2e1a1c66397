//! The two stores, each behind one type that owns its connections.
//!
//! Only a `pool` hands out connections, and it observes every call. So the types guarantee that
//! each call has a deadline, metrics and, in a sampled batch, a span. Must not know: HTTP.

mod availability;
mod call;
mod call_metrics;
mod error;
mod files;
mod pool;
mod postgres;
mod recording;
mod redis;
#[cfg(test)]
mod tests;
mod watch;

pub use self::availability::Availability;
pub use self::call::{Batch, Parent};
pub use self::error::{CallError, Error};
pub use self::postgres::{Postgres, Recount};
pub use self::recording::{Counter, Ledger};
pub use self::redis::Redis;
pub use self::watch::{Store, settle_time, watch};
