//! The service as its users meet it: the real program beside real servers.
//!
//! Each test has a database and a Redis of its own; one that stops or breaks a server has its own
//! Postgres too. [`support`] hides how a program is started and asked.

mod support;

mod abandoned;
mod accept;
mod adoption;
mod batch;
mod canary;
mod collectors;
mod commands;
mod count;
mod exposition;
mod http;
mod kept;
mod load;
mod log;
mod metrics;
mod observability;
mod otlp;
mod outage;
mod promise;
mod relapse;
mod repair;
mod replaced;
mod resources;
mod restored;
mod rolling;
mod roots;
mod sampled;
mod server;
mod settings;
mod shutdown;
mod spans;
mod spared;
mod strangers;
mod sweep;
mod tls;
mod unread;
