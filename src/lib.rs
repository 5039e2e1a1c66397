//! A web service that records each visit in Postgres, counts it in Redis and responds with both
//! totals.
//!
//! A map of the code, in the order in which a visit passes through it:
//!
//! - [`server`] accepts connections and limits how long each can wait;
//! - [`telemetry`] observes every request: its span, its metrics and its log line;
//! - [`routes`] has the handlers: `GET /`, probes and scrapes;
//! - [`recorder`] is the queue and the one writer that records waiting visits together;
//! - [`rates`] is what the recorder did in the last minutes;
//! - [`store`] calls Postgres and Redis, and watches both;
//! - [`metrics`] declares every metric and renders them.
//!
//! [`config`] reads the settings. [`app`] builds these parts and runs them until the service is
//! stopped; [`lifecycle`] has the phases of a stop. [`command`] has the commands other than
//! `serve`. [`causes`] writes an error into one line.

pub mod app;
pub mod causes;
pub mod command;
pub mod config;
pub mod lifecycle;
pub mod metrics;
#[cfg(test)]
mod property;
pub mod rates;
pub mod recorder;
pub mod routes;
pub mod server;
pub mod store;
pub mod telemetry;

pub use self::config::{REVISION, VERSION};

/// The compiler that this program was built with.
pub const RUSTC: &str = env!("VISITAS_RUSTC");
