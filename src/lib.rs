//! A web service that records each visit in Postgres, counts it in Redis and says both totals.
//!
//! A map of the code, in the order in which a visit meets it:
//!
//! - [`server`] accepts connections and bounds how long each may take;
//! - [`telemetry`] sees each request and changes none;
//! - [`routes`] answers it: `GET /`, probes and scrapes;
//! - [`recorder`] is the queue and the one writer that records waiting visits together;
//! - [`store`] is Postgres and Redis, and watches both;
//! - [`metrics`] has every metric.
//!
//! [`app`] builds these parts and runs them until the service is stopped, whose phases are in
//! [`lifecycle`]; [`config`] reads the settings, [`command`] runs what is not the service itself.

pub mod app;
pub mod command;
pub mod config;
pub mod lifecycle;
pub mod metrics;
#[cfg(test)]
mod property;
pub mod recorder;
pub mod routes;
pub mod server;
pub mod store;
pub mod telemetry;

pub use self::config::{REVISION, VERSION};

/// The compiler that this program was built with.
pub const RUSTC: &str = env!("VISITAS_RUSTC");
