//! Processes that do not outlive this program, and what the system says of them.

use std::ffi::OsStr;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::LazyLock;
use std::time::Duration;

use anyhow::{Context as _, Result};
use rustix::process::{Pid, Signal, kill_process};

use crate::measure::Mebibytes;
use crate::wait;

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
    /// Starts a command, with its output in a file.
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
    pub fn has_ended(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_some())
    }

    /// The end of its log.
    pub fn log_tail(&self) -> String {
        let log = std::fs::read(&self.log).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(10)..].join("\n")
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The most memory that it has had resident; where the system says so.
    pub fn peak_memory(&self) -> Option<Mebibytes> {
        self.memory("VmHWM:")
    }

    /// The memory that it has resident now.
    pub fn resident_memory(&self) -> Option<Mebibytes> {
        self.memory("VmRSS:")
    }

    /// The file descriptors that it has open; where the system says so.
    pub fn open_files(&self) -> Option<usize> {
        let files = std::fs::read_dir(format!("/proc/{}/fd", self.child.id()));
        Some(files.ok()?.count())
    }

    fn memory(&self, field: &str) -> Option<Mebibytes> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).ok()?;
        status
            .lines()
            .find_map(|line| line.strip_prefix(field))
            .and_then(|value| value.trim().strip_suffix(" kB")?.parse().ok())
            .map(Mebibytes::from_kibibytes)
    }

    /// Asks it to stop and waits until it has; kills it if that takes too long.
    pub fn stop(&mut self) -> Result<()> {
        if self.has_ended()? {
            return Ok(());
        }
        self.terminate()?;
        if self.wait(STOP_DEADLINE)?.is_none() {
            self.kill()?;
        }
        Ok(())
    }

    /// Asks it to stop.
    pub fn terminate(&self) -> Result<()> {
        self.signal(Signal::TERM)
    }

    /// Suspends it, until [`Self::resume`].
    pub fn pause(&self) -> Result<()> {
        self.signal(Signal::STOP)
    }

    /// Lets it go on.
    pub fn resume(&self) -> Result<()> {
        self.signal(Signal::CONT)
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.child.id())?;
        let pid = Pid::from_raw(pid).context("no process has the id 0")?;
        Ok(kill_process(pid, signal)?)
    }

    /// Kills it and returns once it is gone.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// How it ended, or nothing if it has not after `timeout`.
    pub fn wait(&mut self, timeout: Duration) -> Result<Option<ExitStatus>> {
        wait::within(timeout, || !matches!(self.child.try_wait(), Ok(None)));
        Ok(self.child.try_wait()?)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Best effort: it may have ended.
        self.stop().ok();
    }
}
