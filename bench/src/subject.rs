//! The programs that are measured: how to start each, and how to check that it is ready.

use std::fmt;
use std::net::SocketAddr;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use lab::client;
use lab::ports::free_address;
use lab::process::{self, Process};
use lab::program;

use crate::ground::{Ground, Owner, Stores};
use crate::peer::Peer;

/// A program that responds to `GET /`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Subject {
    /// A constant, from the HTTP library alone.
    Ceiling,
    /// The service.
    Visitas(Traces),
    /// The service of the commit before, as in production.
    Before,
    /// The textbook version of a visit.
    Textbook,
    /// A visit in another stack.
    Peer(Peer),
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

/// How long a peer can still record visits whose clients have left.
const BACKLOG_DEADLINE: Duration = Duration::from_secs(20);

impl Subject {
    /// The kind of table that it uses, if it has stores.
    pub(crate) fn owner(self) -> Option<Owner> {
        match self {
            Self::Ceiling => None,
            Self::Visitas(_) => Some(Owner::Visitas),
            Self::Before => Some(Owner::Before),
            Self::Textbook | Self::Peer(_) => Some(Owner::Peer),
        }
    }

    /// Whether it counts all rows for each visit.
    pub(crate) fn counts_all_rows(self) -> bool {
        matches!(self, Self::Textbook | Self::Peer(Peer::Flask))
    }

    /// Starts it on near stores and waits until it serves.
    pub(crate) fn start(self, ground: &Ground, database: &str) -> Result<Instance> {
        self.start_with(ground, database, Stores::Near)
    }

    /// Starts it and waits until it serves.
    pub(crate) fn start_with(
        self,
        ground: &Ground,
        database: &str,
        stores: Stores,
    ) -> Result<Instance> {
        let address = free_address()?;
        let log = program::scratch()?.join(format!("{}.log", address.port()));
        let mut command = self.command(ground, address)?;
        command.envs(ground.settings(database, stores)?);
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

    /// A command that serves it. The stores' settings are still missing.
    fn command(self, ground: &Ground, address: SocketAddr) -> Result<Command> {
        let own = |name: &str| -> Result<Command> {
            let mut command = process::command(std::env::current_exe()?);
            command.arg(name).arg(address.to_string());
            Ok(command)
        };
        let service = |owner, traces: Traces| -> Result<Command> {
            let mut command = ground.service(owner, traces.settings(ground)?)?;
            command.arg("serve").env("BIND_ADDR", address.to_string());
            Ok(command)
        };
        match self {
            Self::Ceiling => own("ceiling"),
            Self::Textbook => own("textbook"),
            Self::Peer(peer) => peer.serve(address, ground.sessions(peer)),
            Self::Visitas(traces) => service(Owner::Visitas, traces),
            Self::Before => service(Owner::Before, Traces::Hundredth),
        }
    }

    /// A peer is ready when a visit succeeds.
    fn is_ready(self, address: SocketAddr) -> bool {
        let path = if matches!(self, Self::Visitas(_) | Self::Before) {
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
    /// Makes a visit and compares its number with the table. No other client must visit meanwhile;
    /// visits whose clients have left can still be in progress, so there are several attempts.
    pub(crate) fn check_number(&self, ground: &Ground, database: &str) -> Result<()> {
        let deadline = Instant::now() + BACKLOG_DEADLINE;
        loop {
            let (total, _) = client::visit(self.address).context("checking the number")?;
            let rows = ground.rows(database)?;
            if total == rows {
                return Ok(());
            }
            ensure!(
                Instant::now() < deadline,
                "a visit returned {total} with {rows} rows in the table"
            );
            std::thread::sleep(Duration::from_millis(100));
        }
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
            Self::Before => "the commit before",
            Self::Peer(peer) => return fmt::Display::fmt(peer, formatter),
        })
    }
}
