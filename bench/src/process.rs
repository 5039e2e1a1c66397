//! Processes that do not outlive this program, and what the system says of them.

use std::ffi::OsStr;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use rustix::process::{Pid, Signal, kill_process};

use crate::measure::Mebibytes;

/// The service takes 10 s at most.
const STOP_DEADLINE: Duration = Duration::from_secs(15);

/// A process that is stopped when this is dropped.
pub struct Process {
    child: Child,
    log: PathBuf,
}

/// A command whose process is killed when the thread that started it ends, however that happens,
/// where the system can do so: a Ctrl-C reaches all, a `kill -9` only this program.
pub fn command(program: impl AsRef<OsStr>) -> Command {
    static BOUND: LazyLock<bool> = LazyLock::new(|| {
        Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "true"])
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|status| status.success())
    });
    if !*BOUND {
        return Command::new(program);
    }
    let mut command = Command::new("setpriv");
    command
        .args(["--pdeathsig", "KILL", "--"])
        .arg(program.as_ref());
    command
}

impl Process {
    /// Starts a command, with what it says in a file.
    ///
    /// # Errors
    ///
    /// If it cannot be run, or the file not be written.
    pub fn start(mut command: Command, log: &Path) -> Result<Self> {
        let file = File::create(log).with_context(|| log.display().to_string())?;
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("cannot run {}", command.get_program().display()))?;
        Ok(Self {
            child,
            log: log.to_owned(),
        })
    }

    /// Whether it runs no more.
    ///
    /// # Errors
    ///
    /// What the system says.
    pub fn has_ended(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_some())
    }

    /// The end of what it said.
    #[must_use]
    pub fn last_words(&self) -> String {
        let log = std::fs::read(&self.log).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(10)..].join("\n")
    }

    /// Its number.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The most memory that it has had resident; where the system says so.
    #[must_use]
    pub fn peak_memory(&self) -> Option<Mebibytes> {
        self.memory("VmHWM:")
    }

    /// The memory that it has resident now.
    #[must_use]
    pub fn resident_memory(&self) -> Option<Mebibytes> {
        self.memory("VmRSS:")
    }

    fn memory(&self, field: &str) -> Option<Mebibytes> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).ok()?;
        status
            .lines()
            .find_map(|line| line.strip_prefix(field))
            .and_then(|value| value.trim().strip_suffix(" kB")?.parse().ok())
            .map(Mebibytes::of_kibibytes)
    }

    /// Asks it to stop and waits until it has; kills it if that takes too long.
    ///
    /// # Errors
    ///
    /// What the system says.
    pub fn stop(&mut self) -> Result<()> {
        if self.has_ended()? {
            return Ok(());
        }
        self.terminate()?;
        if self.ended_within(STOP_DEADLINE)?.is_none() {
            self.kill()?;
        }
        Ok(())
    }

    /// Asks it to stop.
    ///
    /// # Errors
    ///
    /// What the system says.
    pub fn terminate(&self) -> Result<()> {
        self.signal(Signal::TERM)
    }

    /// Lets it stand still, until [`Self::resume`].
    ///
    /// # Errors
    ///
    /// What the system says.
    pub fn pause(&self) -> Result<()> {
        self.signal(Signal::STOP)
    }

    /// Lets it go on.
    ///
    /// # Errors
    ///
    /// What the system says.
    pub fn resume(&self) -> Result<()> {
        self.signal(Signal::CONT)
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.child.id())?;
        let pid = Pid::from_raw(pid).context("no process has the id 0")?;
        Ok(kill_process(pid, signal)?)
    }

    /// Kills it and returns once it is gone.
    ///
    /// # Errors
    ///
    /// What the system says.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// How it ended, where it does so soon enough.
    ///
    /// # Errors
    ///
    /// What the system says.
    pub fn ended_within(&mut self, patience: Duration) -> Result<Option<ExitStatus>> {
        let deadline = Instant::now() + patience;
        loop {
            let status = self.child.try_wait()?;
            if status.is_some() || Instant::now() > deadline {
                return Ok(status);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Best effort: it may have ended.
        self.stop().ok();
    }
}
