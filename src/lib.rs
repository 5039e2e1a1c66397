//! A web service that records each visit in Postgres, counts it in Redis and says both totals.
//!
//! A map of the code, in the order in which a visit meets it:
//!
//! - [`server`] accepts connections and bounds how long each may take;
//! - [`app`] holds the routes and runs the parts until the service is stopped, whose phases are in
//!   [`lifecycle`];
//! - [`telemetry`] sees each request and changes none;
//! - [`visit`] is `GET /`, [`service`] what the handlers share;
//! - [`recorder`] is the queue and the one writer that records waiting visits together;
//! - [`store`] is Postgres and Redis, and watches both;
//! - [`health`] answers probes, [`metrics`] answers scrapes;
//! - [`error`] is what a client sees of a mistake of its own;
//! - [`config`] reads the settings, [`command`] runs what is not the service itself.

pub mod app;
pub mod command;
pub mod config;
pub mod error;
pub mod health;
pub mod lifecycle;
pub mod metrics;
#[cfg(test)]
mod property;
pub mod recorder;
pub mod server;
pub mod service;
pub mod store;
pub mod telemetry;
pub mod visit;

pub use self::config::{REVISION, VERSION};

/// The compiler that this program was built with.
pub const RUSTC: &str = env!("VISITAS_RUSTC");
