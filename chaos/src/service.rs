//! The service under a supervisor: starts, kills, stops and restarts it at the same address.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use lab::measure::Mebibytes;
use lab::metrics::Metrics;
use lab::ports::free_address;
use lab::process::{self, Process};
use lab::program::{COVERAGE, scratch, visitas};
use lab::{client, wait};

use crate::ground::Ground;

/// A service, running or not. Dropping it stops the process.
pub struct Service {
    /// Where it listens.
    pub address: SocketAddr,
    settings: Vec<(&'static str, String)>,
    wrapping: Vec<String>,
    /// The log files of all processes so far.
    logs: Vec<PathBuf>,
    process: Option<Process>,
    /// The counters of the processes that have ended.
    saved_counters: Counters,
}

/// The service's counters of visits.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counters {
    /// Recorded visits.
    pub recorded: usize,
    /// Visits in doubt.
    pub in_doubt: usize,
}

const READY_DEADLINE: Duration = Duration::from_secs(30);

impl Service {
    /// A service in this environment, not started yet.
    pub fn new(ground: &Ground) -> Result<Self> {
        let service = Self::with_settings(ground.settings())?;
        Ok(Self {
            wrapping: ground.wrapping(),
            ..service
        })
    }

    /// A service with these settings, not started yet.
    pub fn with_settings(settings: Vec<(&'static str, String)>) -> Result<Self> {
        Ok(Self {
            address: free_address()?,
            settings,
            wrapping: Vec::new(),
            logs: Vec::new(),
            process: None,
            saved_counters: Counters::default(),
        })
    }

    /// Adds a setting for the next start.
    pub fn set(&mut self, name: &'static str, value: &str) {
        self.settings.push((name, value.to_owned()));
    }

    /// Starts the service.
    pub fn start(&mut self) -> Result<()> {
        let program = visitas()?.display().to_string();
        let mut words = self
            .wrapping
            .iter()
            .cloned()
            .chain([program, "serve".to_owned()]);
        let mut command = process::command(words.next().context("no program")?);
        command
            .args(words)
            .env_clear()
            .envs(COVERAGE)
            .env("BIND_ADDR", self.address.to_string())
            .envs(self.settings.iter().map(|(name, value)| (name, value)));
        let port = self.address.port();
        let log = scratch()?.join(format!("chaos-{port}-{}.log", self.logs.len()));
        self.process = Some(Process::start(command, &log)?);
        self.logs.push(log);
        Ok(())
    }

    /// Waits until both stores are up.
    pub fn wait_until_ready(&mut self) -> Result<()> {
        self.wait_for(|health| health == Some("ok"))
    }

    /// Waits until `/health` responds.
    pub fn wait_until_it_responds(&mut self) -> Result<()> {
        self.wait_for(|health| health.is_some())
    }

    fn wait_for(&mut self, is_so: impl Fn(Option<&str>) -> bool) -> Result<()> {
        let is_so = wait::within(READY_DEADLINE, || is_so(self.health().as_deref()));
        let log = self.process.as_ref().map(Process::log_tail);
        ensure!(
            is_so,
            "the service is not ready; its log ends\n{}",
            log.unwrap_or_default()
        );
        Ok(())
    }

    /// The status in the response of `/health`, if there is a response.
    pub fn health(&self) -> Option<String> {
        let response = client::get(self.address, "/health").ok()?;
        let json: serde_json::Value = serde_json::from_str(&response.body).ok()?;
        Some(json["status"].as_str()?.to_owned())
    }

    /// Kills the process, and saves its counters first.
    pub fn kill(&mut self) -> Result<()> {
        self.saved_counters = self.counters()?;
        let mut process = self.process.take().context("the service is not running")?;
        process.kill()
    }

    /// Kills the process without a look at its counters. Does nothing if it is not running.
    pub fn kill_at_once(&mut self) -> Result<()> {
        self.process
            .take()
            .map_or(Ok(()), |mut process| process.kill())
    }

    /// Saves the counters, sends SIGTERM, and returns the time of the signal.
    pub fn terminate(&mut self) -> Result<Instant> {
        self.saved_counters = self.counters()?;
        let process = self
            .process
            .as_ref()
            .context("the service is not running")?;
        let asked = Instant::now();
        process.terminate()?;
        Ok(asked)
    }

    /// Runs `work` while the process is suspended.
    pub fn while_paused<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let process = self
            .process
            .as_ref()
            .context("the service is not running")?;
        process.pause()?;
        let result = work();
        process.resume()?;
        result
    }

    /// Waits for the process to exit and returns whether it succeeded. Kills it after `timeout` and
    /// returns `None`.
    pub fn wait_for_exit(&mut self, timeout: Duration) -> Result<Option<bool>> {
        let mut process = self.process.take().context("the service is not running")?;
        let status = process.wait(timeout)?;
        if status.is_none() {
            process.kill()?;
        }
        Ok(status.map(|status| status.success()))
    }

    /// The sum of the counters of all processes so far.
    pub fn counters(&self) -> Result<Counters> {
        let mut counters = self.saved_counters;
        if self.process.is_some() {
            let metrics = Metrics::scrape(self.address)?;
            let number = |outcome| anyhow::Ok(usize::try_from(metrics.visits(outcome)?)?);
            counters.recorded += number("ok")? + number("degraded")?;
            counters.in_doubt += number("in_doubt")?;
        }
        Ok(counters)
    }

    /// The value of a series of the metrics, by its name and labels as written there.
    pub fn metric(&self, series: &str) -> Option<f64> {
        Metrics::scrape(self.address).ok()?.value(series)
    }

    /// The resident memory, where the system reports it.
    pub fn memory(&self) -> Option<Mebibytes> {
        self.process.as_ref()?.resident_memory()
    }

    /// The peak resident memory, where the system reports it.
    pub fn peak_memory(&self) -> Option<Mebibytes> {
        self.process.as_ref()?.peak_memory()
    }

    /// The number of open file descriptors, where the system reports it.
    pub fn open_files(&self) -> Option<usize> {
        self.process.as_ref()?.open_files()
    }

    /// The lines about a panic in all logs.
    pub fn panics(&self) -> Vec<String> {
        let logs = self
            .logs
            .iter()
            .filter_map(|log| std::fs::read_to_string(log).ok());
        logs.flat_map(|log| {
            let lines = log.lines().filter(|line| line.contains("panicked"));
            lines.map(str::to_owned).collect::<Vec<_>>()
        })
        .collect()
    }
}
