//! The programs that are measured: how to start each, and how to check that it is ready.

use std::fmt;
use std::net::SocketAddr;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use lab::client;
use lab::ports::free_address;
use lab::process::{self, Process};
use lab::program;

use crate::ground::{Ground, Owner};

/// A program that responds to `GET /`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Subject {
    /// A constant, from the HTTP library alone.
    Ceiling,
    /// The service.
    Visitas(Traces),
    /// The textbook version of a visit.
    Textbook,
    /// The challenge's app.
    Flask,
}

/// The service's tracing. Logs and metrics are always on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Traces {
    /// None.
    Off,
    /// One visit in a hundred.
    Hundredth,
    /// All visits.
    All,
    /// All visits, to a collector that does not listen.
    Nowhere,
}

/// A running subject. Dropping it stops the process.
pub(crate) struct Instance {
    pub(crate) address: SocketAddr,
    /// Time from the start to the first successful readiness probe.
    pub(crate) started_in: Duration,
    pub(crate) process: Process,
}

const START_DEADLINE: Duration = Duration::from_secs(30);

impl Subject {
    /// The kind of table that it uses, if it has stores.
    pub(crate) fn owner(self) -> Option<Owner> {
        match self {
            Self::Ceiling => None,
            Self::Visitas(_) => Some(Owner::Visitas),
            Self::Textbook | Self::Flask => Some(Owner::Peer),
        }
    }

    /// Starts it and waits until it serves.
    pub(crate) fn start(self, ground: &Ground, database: &str) -> Result<Instance> {
        let address = free_address()?;
        let log = program::scratch()?.join(format!("{}.log", address.port()));
        let command = self.command(ground, database, address)?;
        let started = Instant::now();
        let mut process = Process::start(command, &log)?;
        while !self.is_ready(address) {
            ensure!(
                !process.has_ended()? && started.elapsed() < START_DEADLINE,
                "{self} is not ready; its log ends\n{}",
                process.log_tail()
            );
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(Instance {
            address,
            started_in: started.elapsed(),
            process,
        })
    }

    fn command(self, ground: &Ground, database: &str, address: SocketAddr) -> Result<Command> {
        let own = std::env::current_exe()?;
        let mut command = match self {
            Self::Ceiling => {
                let mut command = process::command(own);
                command.arg("ceiling").arg(address.to_string());
                command
            }
            Self::Textbook => {
                let mut command = process::command(own);
                command.arg("textbook").arg(address.to_string());
                command.args([ground.postgres.url(database), ground.redis.url()]);
                command
            }
            Self::Flask => {
                let python = ground.python.as_ref();
                python.map_err(|reason| anyhow!("{reason}"))?.serve(address)
            }
            Self::Visitas(traces) => {
                let mut command = program::command(traces.settings(ground)?)?;
                command.arg("serve").env("BIND_ADDR", address.to_string());
                command
            }
        };
        command.envs(ground.settings(database));
        Ok(command)
    }

    /// A peer is ready when a visit succeeds.
    fn is_ready(self, address: SocketAddr) -> bool {
        let path = if matches!(self, Self::Visitas(_)) {
            "/health/ready"
        } else {
            "/"
        };
        client::get(address, path).is_ok_and(|response| response.status == 200)
    }
}

impl Traces {
    fn settings(self, ground: &Ground) -> Result<Vec<(&'static str, String)>> {
        let endpoint = |address| ("OTEL_EXPORTER_OTLP_ENDPOINT", format!("http://{address}"));
        Ok(match self {
            Self::Off => vec![("OTEL_SDK_DISABLED", "true".to_owned())],
            Self::Hundredth => vec![
                endpoint(ground.collector.address),
                ("OTEL_TRACES_SAMPLER", "parentbased_traceidratio".to_owned()),
                ("OTEL_TRACES_SAMPLER_ARG", "0.01".to_owned()),
            ],
            Self::All => vec![endpoint(ground.collector.address)],
            Self::Nowhere => vec![endpoint(free_address()?)],
        })
    }
}

impl Instance {
    /// Makes a visit and compares its number with the table. No other client must visit meanwhile.
    pub(crate) fn check_number(&self, ground: &Ground, database: &str) -> Result<()> {
        let (total, _) = client::visit(self.address).context("checking the number")?;
        let rows = ground.rows(database)?;
        ensure!(
            total == rows,
            "the service returned {total} with {rows} rows in the table"
        );
        Ok(())
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Ceiling => "ceiling",
            Self::Visitas(Traces::Off) => "visitas, tracing off",
            Self::Visitas(Traces::Hundredth) => "visitas, traces at 1 %",
            Self::Visitas(Traces::All) => "visitas, traces at 100 %",
            Self::Visitas(Traces::Nowhere) => "visitas, no collector listens",
            Self::Textbook => "textbook",
            Self::Flask => "Flask",
        })
    }
}
