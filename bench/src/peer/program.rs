//! The peers of `bench/peers`, programs of their own: how to build and how to serve each.

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::available_parallelism;

use anyhow::Result;
use lab::process;
use lab::program::scratch;

/// A visit in another stack. Except Flask, each is written and tuned for speed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Peer {
    /// The service's own libraries, a transaction for each visit, and no count.
    AxumPlain,
    /// The same with a counter row.
    AxumCounter,
    /// Go with pgx and a counter row.
    Go,
    /// `FastAPI` with asyncpg and a counter row.
    FastApi,
    /// Fastify with postgres.js and a counter row.
    Fastify,
    /// The challenge's app.
    Flask,
}

/// The peers that are written for speed.
pub(crate) const FAST: [Peer; 5] = [
    Peer::AxumPlain,
    Peer::AxumCounter,
    Peer::Go,
    Peer::FastApi,
    Peer::Fastify,
];

const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/peers");

impl Peer {
    /// Builds it, unless that is done. The error is the reason to skip it.
    pub(crate) fn build(self) -> Result<(), String> {
        if self.is_axum() {
            let program = self.program().map_err(|error| error.to_string())?;
            return if program.exists() {
                Ok(())
            } else {
                Err("axum-peer is not built: make builds it".to_owned())
            };
        }
        let folder = self.folder().map_err(|error| error.to_string())?;
        let output = Command::new(Path::new(FOLDER).join("prepare.sh"))
            .arg(self.source())
            .arg(folder)
            .output()
            .map_err(|error| format!("prepare.sh: {error}"))?;
        if output.status.success() {
            return Ok(());
        }
        let report = String::from_utf8_lossy(&output.stderr);
        let last = report.trim_end().lines().last();
        Err(last.unwrap_or("no reason given").to_owned())
    }

    /// How many sessions with Postgres to try, in all its processes together, the likeliest first.
    /// Counters wait for each other's lock. Flask opens a session for each visit.
    pub(crate) fn sessions(self) -> [usize; 4] {
        match self {
            Self::AxumPlain => [32, 8, 16, 64],
            _ => [4, 2, 8, 16],
        }
    }

    /// A command that serves it at an address. The stores' settings are in the environment.
    pub(crate) fn serve(self, address: SocketAddr, sessions: usize) -> Result<Command> {
        let mut command = process::command(self.program()?);
        command.env("DB_SESSIONS", sessions.to_string());
        let processors = available_parallelism().map_or(2, usize::from);
        let (host, port) = (address.ip().to_string(), address.port().to_string());
        match self {
            Self::AxumPlain => command.args(["plain", &address.to_string()]),
            Self::AxumCounter => command.args(["counter", &address.to_string()]),
            Self::Go => command.arg(address.to_string()),
            Self::Fastify => command
                .arg(self.folder()?.join("app.js"))
                .arg(address.to_string())
                .env("NODE_ENV", "production"),
            Self::FastApi => command
                .current_dir(Path::new(FOLDER).join(self.source()))
                .env("PYTHONDONTWRITEBYTECODE", "1")
                // The number of uvicorn's workers.
                .env("WEB_CONCURRENCY", processors.to_string())
                .args(["-m", "uvicorn", "app:app"])
                .args(["--loop", "uvloop", "--http", "httptools"])
                .args(["--no-access-log", "--log-level", "warning"])
                .args(["--host", &host, "--port", &port]),
            // As gunicorn's manual recommends: 2 workers per processor plus one.
            Self::Flask => command
                .current_dir(Path::new(FOLDER).join(self.source()))
                .env("PYTHONDONTWRITEBYTECODE", "1")
                .args(["-m", "gunicorn", "--log-level", "warning", "--workers"])
                .arg((2 * processors + 1).to_string())
                .args(["--bind", &address.to_string(), "app:app"]),
        };
        Ok(command)
    }

    /// What runs it, with its version; its lock file has the libraries' versions.
    pub(crate) fn runtime(self) -> Result<String> {
        let (program, argument) = match self {
            Self::AxumPlain | Self::AxumCounter => ("rustc".into(), "--version"),
            Self::Go => ("go".into(), "version"),
            _ => (self.program()?, "--version"),
        };
        let output = Command::new(program).arg(argument).output()?;
        let version = String::from_utf8_lossy(&output.stdout);
        let name = if self == Self::Fastify {
            "Node.js "
        } else {
            ""
        };
        Ok(format!("{name}{}", version.trim()))
    }

    /// Whether one process serves all its requests, so that its memory is that process's.
    pub(crate) fn is_one_process(self) -> bool {
        !matches!(self, Self::FastApi | Self::Fastify | Self::Flask)
    }

    fn is_axum(self) -> bool {
        matches!(self, Self::AxumPlain | Self::AxumCounter)
    }

    /// The folder of its source.
    fn source(self) -> &'static str {
        match self {
            Self::AxumPlain | Self::AxumCounter => "axum",
            Self::Go => "go",
            Self::FastApi => "fastapi",
            Self::Fastify => "fastify",
            Self::Flask => "flask",
        }
    }

    /// The folder of what was built.
    fn folder(self) -> Result<PathBuf> {
        Ok(scratch()?.join("peers").join(self.source()))
    }

    fn program(self) -> Result<PathBuf> {
        Ok(match self {
            // Cargo builds it next to this program.
            Self::AxumPlain | Self::AxumCounter => {
                std::env::current_exe()?.with_file_name("axum-peer")
            }
            Self::Go => self.folder()?.join("visit"),
            Self::FastApi | Self::Flask => self.folder()?.join("venv/bin/python"),
            Self::Fastify => PathBuf::from("node"),
        })
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::AxumPlain => "axum, no count",
            Self::AxumCounter => "axum, counter row",
            Self::Go => "Go, counter row",
            Self::FastApi => "FastAPI, counter row",
            Self::Fastify => "Fastify, counter row",
            Self::Flask => "Flask",
        })
    }
}
