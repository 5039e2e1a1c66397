//! The service, as a supervisor has it: started, killed, asked to stop, started again at the same
//! address.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bench::client::Connection;
use bench::measure::Mebibytes;
use bench::place::{free_address, scratch, visitas};
use bench::process::{self, Process};

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
    counted_before: Counted,
}

/// What a service has counted.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counted {
    /// Visits that are recorded.
    pub recorded: usize,
    /// Visits that are in doubt.
    pub in_doubt: usize,
}

const READY_DEADLINE: Duration = Duration::from_secs(30);

impl Service {
    /// A service on this ground that is not started yet.
    ///
    /// # Errors
    ///
    /// If there is no free address.
    pub fn new(ground: &Ground) -> Result<Self> {
        Ok(Self {
            address: free_address()?,
            settings: ground.settings(),
            wrapping: ground.wrapping(),
            logs: Vec::new(),
            process: None,
            counted_before: Counted::default(),
        })
    }

    /// Adds a setting, for when it is next started.
    pub fn set(&mut self, name: &'static str, value: &str) {
        self.settings.push((name, value.to_owned()));
    }

    /// Starts it.
    ///
    /// # Errors
    ///
    /// If it is not built or cannot be run.
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
    ///
    /// # Errors
    ///
    /// If that takes half a minute.
    pub fn until_ready(&mut self) -> Result<()> {
        self.until(|health| health == Some("ok"))
    }

    /// Waits until it says anything of its health.
    ///
    /// # Errors
    ///
    /// If that takes half a minute.
    pub fn until_it_answers(&mut self) -> Result<()> {
        self.until(|health| health.is_some())
    }

    fn until(&mut self, is_it: impl Fn(Option<&str>) -> bool) -> Result<()> {
        let deadline = Instant::now() + READY_DEADLINE;
        while !is_it(self.health().as_deref()) {
            let said = self.process.as_ref().map(Process::last_words);
            ensure!(
                Instant::now() < deadline,
                "the service is not ready; it said\n{}",
                said.unwrap_or_default()
            );
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// What it says of its health, where it says anything.
    #[must_use]
    pub fn health(&self) -> Option<String> {
        let answer = Connection::open(self.address).and_then(|mut open| open.get("/health"));
        let json: serde_json::Value = serde_json::from_str(&answer.ok()?.body).ok()?;
        Some(json["status"].as_str()?.to_owned())
    }

    /// Kills it, as the system would. Its counters go with it.
    ///
    /// # Errors
    ///
    /// If it does not run, or does not say what it has counted.
    pub fn kill(&mut self) -> Result<()> {
        self.counted_before = self.counted()?;
        let mut process = self.process.take().context("it does not run")?;
        process.kill()
    }

    /// Asks it to stop and says when. Its counters go with it.
    ///
    /// # Errors
    ///
    /// If it does not run, or does not say what it has counted.
    pub fn terminate(&mut self) -> Result<Instant> {
        self.counted_before = self.counted()?;
        let process = self.process.as_ref().context("it does not run")?;
        let asked = Instant::now();
        process.terminate()?;
        Ok(asked)
    }

    /// Does something while it stands still.
    ///
    /// # Errors
    ///
    /// If it does not run, or that fails.
    pub fn while_paused<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let process = self.process.as_ref().context("it does not run")?;
        process.pause()?;
        let done = work();
        process.resume()?;
        done
    }

    /// Whether it has ended with success, where it ends soon enough; it is killed otherwise.
    ///
    /// # Errors
    ///
    /// If it does not run.
    pub fn ended_within(&mut self, patience: Duration) -> Result<Option<bool>> {
        let mut process = self.process.take().context("it does not run")?;
        let status = process.ended_within(patience)?;
        if status.is_none() {
            process.kill()?;
        }
        Ok(status.map(|status| status.success()))
    }

    /// What it has counted, over all its processes.
    ///
    /// # Errors
    ///
    /// If it runs and does not say.
    pub fn counted(&self) -> Result<Counted> {
        let mut counted = self.counted_before;
        if self.process.is_some() {
            let number = |outcome: &str| -> Result<usize> {
                let series = format!("visitas_visits_total{{outcome=\"{outcome}\"}}");
                let counted = self
                    .metric(&series)
                    .context("it does not say what it counted")?;
                Ok(format!("{counted:.0}").parse()?)
            };
            counted.recorded += number("ok")? + number("degraded")?;
            counted.in_doubt += number("in_doubt")?;
        }
        Ok(counted)
    }

    /// The value of a series of its metrics, by its name and labels as they are written there.
    #[must_use]
    pub fn metric(&self, series: &str) -> Option<f64> {
        let answer = Connection::open(self.address).and_then(|mut open| open.get("/metrics"));
        let text = answer.ok()?.body;
        text.lines().find_map(|line| {
            let value = line.strip_prefix(series)?.strip_prefix(' ')?;
            value.parse().ok()
        })
    }

    /// The memory that it has resident, where the system says so.
    #[must_use]
    pub fn memory(&self) -> Option<Mebibytes> {
        self.process.as_ref()?.resident_memory()
    }

    /// The most memory that it has had resident, where the system says so.
    #[must_use]
    pub fn peak_memory(&self) -> Option<Mebibytes> {
        self.process.as_ref()?.peak_memory()
    }

    /// The file descriptors that it has open, where the system says so.
    #[must_use]
    pub fn open_files(&self) -> Option<usize> {
        let id = self.process.as_ref()?.id();
        Some(std::fs::read_dir(format!("/proc/{id}/fd")).ok()?.count())
    }

    /// The lines of all its logs that tell of a panic.
    #[must_use]
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
