//! The service, as a supervisor has it: started, killed, asked to stop, started again at the same
//! address.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use lab::measure::Mebibytes;
use lab::metrics::Metrics;
use lab::ports::free_address;
use lab::process::{self, Process};
use lab::program::{scratch, visitas};
use lab::{client, wait};

use crate::ground::Ground;

/// A service, whether it runs or not. Dropping it stops it.
pub struct Service {
    /// Where it listens.
    pub address: SocketAddr,
    settings: Vec<(&'static str, String)>,
    wrapping: Vec<String>,
    /// Of every process so far.
    logs: Vec<PathBuf>,
    process: Option<Process>,
    /// Of the processes that have ended.
    counted_before: Counters,
}

/// Counters of a service.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counters {
    /// Visits that are recorded.
    pub recorded: usize,
    /// Visits that are in doubt.
    pub in_doubt: usize,
}

const READY_DEADLINE: Duration = Duration::from_secs(30);

impl Service {
    /// A service on this ground that is not started yet.
    pub fn new(ground: &Ground) -> Result<Self> {
        Ok(Self {
            address: free_address()?,
            settings: ground.settings(),
            wrapping: ground.wrapping(),
            logs: Vec::new(),
            process: None,
            counted_before: Counters::default(),
        })
    }

    /// Adds a setting, for when it is next started.
    pub fn set(&mut self, name: &'static str, value: &str) {
        self.settings.push((name, value.to_owned()));
    }

    /// Starts it.
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
            .env("BIND_ADDR", self.address.to_string())
            .envs(self.settings.iter().map(|(name, value)| (name, value)));
        let port = self.address.port();
        let log = scratch()?.join(format!("chaos-{port}-{}.log", self.logs.len()));
        self.process = Some(Process::start(command, &log)?);
        self.logs.push(log);
        Ok(())
    }

    /// Waits until both stores are in use.
    pub fn until_ready(&mut self) -> Result<()> {
        self.wait_for(|health| health == Some("ok"))
    }

    /// Waits until it says anything of its health.
    pub fn until_it_answers(&mut self) -> Result<()> {
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

    /// What it says of its health, where it says anything.
    pub fn health(&self) -> Option<String> {
        let response = client::get(self.address, "/health").ok()?;
        let json: serde_json::Value = serde_json::from_str(&response.body).ok()?;
        Some(json["status"].as_str()?.to_owned())
    }

    /// Kills it, as the system would. Its counters go with it.
    pub fn kill(&mut self) -> Result<()> {
        self.counted_before = self.counted()?;
        let mut process = self.process.take().context("it does not run")?;
        process.kill()
    }

    /// Asks it to stop and says when. Its counters go with it.
    pub fn terminate(&mut self) -> Result<Instant> {
        self.counted_before = self.counted()?;
        let process = self.process.as_ref().context("it does not run")?;
        let asked = Instant::now();
        process.terminate()?;
        Ok(asked)
    }

    /// Does something while it is suspended.
    pub fn while_paused<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let process = self.process.as_ref().context("it does not run")?;
        process.pause()?;
        let done = work();
        process.resume()?;
        done
    }

    /// Whether it has ended with success, where it ends soon enough; it is killed otherwise.
    pub fn ended_within(&mut self, timeout: Duration) -> Result<Option<bool>> {
        let mut process = self.process.take().context("it does not run")?;
        let status = process.wait(timeout)?;
        if status.is_none() {
            process.kill()?;
        }
        Ok(status.map(|status| status.success()))
    }

    /// What it has counted, over all its processes.
    pub fn counted(&self) -> Result<Counters> {
        let mut counted = self.counted_before;
        if self.process.is_some() {
            let metrics = Metrics::scrape(self.address)?;
            let number = |outcome| anyhow::Ok(usize::try_from(metrics.visits(outcome)?)?);
            counted.recorded += number("ok")? + number("degraded")?;
            counted.in_doubt += number("in_doubt")?;
        }
        Ok(counted)
    }

    /// The value of a series of its metrics, by its name and labels as they are written there.
    pub fn metric(&self, series: &str) -> Option<f64> {
        Metrics::scrape(self.address).ok()?.value(series)
    }

    /// The memory that it has resident, where the system says so.
    pub fn memory(&self) -> Option<Mebibytes> {
        self.process.as_ref()?.resident_memory()
    }

    /// The most memory that it has had resident, where the system says so.
    pub fn peak_memory(&self) -> Option<Mebibytes> {
        self.process.as_ref()?.peak_memory()
    }

    /// The file descriptors that it has open, where the system says so.
    pub fn open_files(&self) -> Option<usize> {
        self.process.as_ref()?.open_files()
    }

    /// The lines of all its logs that tell of a panic.
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
