//! Servers, programs and questions for the tests. It asserts nothing about what is tested.

pub(crate) mod collector;
mod ended;
pub(crate) mod exposition;
pub(crate) mod load;
pub(crate) mod prometheus;
mod proxy;
mod service;
pub(crate) mod traces;
mod wire;
mod world;

pub(crate) use lab::wait::{SOON, eventually, until_refused};

pub(crate) use self::ended::{Ended, settings};
pub(crate) use self::proxy::Way;
pub(crate) use self::service::{Reader, Response, Service, client, program};
pub(crate) use self::wire::Wire;
pub(crate) use self::world::{HeldCount, World, execute, start_postgres, without_stores};

/// Timeouts that are longer than a busy machine takes.
pub(crate) const PATIENT: [(&str, &str); 3] = [
    ("DB_TIMEOUT", "10s"),
    ("REDIS_TIMEOUT", "5s"),
    ("VISIT_TIMEOUT", "20s"),
];
