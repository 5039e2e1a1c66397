//! Private Postgres and Redis servers for development, tests and benches, without Docker.
//!
//! ```no_run
//! # fn main() -> anyhow::Result<()> {
//! let postgres = devstack::Postgres::start(devstack::PostgresOptions::default())?;
//! println!("{}", postgres.url(devstack::DATABASE));
//! postgres.kill()?; // as an outage would
//! postgres.start_again()?; // on the same port, with the same data
//! # Ok(())
//! # }
//! ```
//!
//! No server outlives the process that started it, however that process ends: see [`Server`]. Every
//! call blocks, usually for a second at most. In an async test, wrap long calls in `spawn_blocking`
//! if other tasks must continue.
//!
//! The crate `postgresql_embedded` is not suitable: it downloads its own server instead of using
//! the installed one, does not start it under another account when run as root, and leaves it
//! running when the runner is killed.
//!
//! In reading order: `find` (installed servers), `place` (folders, ports and account), `supervise`
//! (no process is left behind), `server` (common to both), `postgres`, `redis`, `tls`, and `run`
//! for the command `devstack run`.

mod find;
mod place;
mod postgres;
mod redis;
mod run;
mod server;
mod supervise;
mod tls;

pub use find::check;
pub use place::{Data, folder};
pub use postgres::{Postgres, PostgresOptions};
pub use redis::{Redis, RedisOptions};
pub use run::run;
pub use server::Server;

/// The superuser of every Postgres.
pub const USER: &str = "usuario";
/// The superuser's password.
pub const PASSWORD: &str = "senha123";
/// The database that every Postgres has from the start.
pub const DATABASE: &str = "desafio3db";
