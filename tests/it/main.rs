//! The program as its users see it, tested against real servers.
//!
//! Each test has its own database and Redis; a test that stops or breaks Postgres has its own
//! Postgres, too. Tests run at the same time and wait for facts. A test that reads a clock, floods or
//! takes long is `#[ignore]`d here, and `make faults` runs it, one test at a time. [`support`] starts
//! programs and asks them.

mod support;

mod abandoned;
mod accept;
mod adoption;
mod backups;
mod batch;
mod canary;
mod collectors;
mod commands;
mod compatibility;
mod count;
mod description;
mod exposition;
mod far;
mod fronts;
mod http;
mod kept;
mod late;
mod ledger;
mod listen;
mod load;
mod log;
mod logins;
mod metrics;
mod observability;
mod otlp;
mod outage;
mod page;
mod poolers;
mod promise;
mod redis_logins;
mod relapse;
mod repair;
mod replaced;
mod resources;
mod restored;
mod roles;
mod rolling;
mod roots;
mod sampled;
mod scrapers;
mod server;
mod settings;
mod shutdown;
mod spans;
mod spared;
mod strangers;
mod stream;
mod sweep;
mod tls;
mod unread;
mod urls;
mod versions;
mod visitas_route;
