//! Processes that do not outlive this program, and their resource use.

use std::ffi::OsStr;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::LazyLock;
use std::time::Duration;

use anyhow::{Context as _, Result};
pub use rustix::process::Signal;
use rustix::process::{Pid, kill_process};

use crate::measure::Mebibytes;
use crate::output::{Output, Reader};
use crate::wait;

/// The service's own limit is 10 s.
const STOP_DEADLINE: Duration = Duration::from_secs(15);

/// A process that is stopped when this is dropped.
pub struct Process {
    child: Child,
    log: Log,
}

/// The destination of the process's output.
enum Log {
    File(PathBuf),
    /// Standard output and standard error.
    Pipes(Output, Output),
}

/// A command whose process is killed when the thread that started it ends, if the system supports
/// it. This covers `kill -9`, which reaches only this program.
pub fn command(program: impl AsRef<OsStr>) -> Command {
    static HAS_SETPRIV: LazyLock<bool> = LazyLock::new(|| {
        Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "true"])
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|status| status.success())
    });
    if !*HAS_SETPRIV {
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
        command.stdout(file.try_clone()?).stderr(file);
        Ok(Self {
            child: spawn(command)?,
            log: Log::File(log.to_owned()),
        })
    }

    /// Starts a command whose standard output has this reader.
    pub fn start_read_by(reader: Reader, mut command: Command) -> Result<Self> {
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = spawn(command)?;
        let output = child.stdout.take().context("a pipe")?;
        let errors = child.stderr.take().context("a pipe")?;
        Ok(Self {
            child,
            log: Log::Pipes(
                Output::read(output, reader),
                Output::read(errors, Reader::Stays),
            ),
        })
    }

    /// Whether the process has ended.
    pub fn has_ended(&mut self) -> Result<bool> {
        Ok(self.status()?.is_some())
    }

    /// The exit status, if the process has ended.
    pub fn status(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// The lines of standard output so far; of both outputs if they go to a file.
    pub fn output(&self) -> Vec<String> {
        match &self.log {
            Log::File(log) => {
                let log = std::fs::read(log).unwrap_or_default();
                let log = String::from_utf8_lossy(&log);
                log.lines().map(str::to_owned).collect()
            }
            Log::Pipes(output, _) => output.lines(),
        }
    }

    /// The lines of standard output and standard error so far.
    pub fn printed(&self) -> Vec<String> {
        let mut lines = self.output();
        if let Log::Pipes(_, errors) = &self.log {
            lines.extend(errors.lines());
        }
        lines
    }

    /// The end of its log.
    pub fn log_tail(&self) -> String {
        let lines = self.printed();
        lines[lines.len().saturating_sub(10)..].join("\n")
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The peak resident memory, where the system reports it.
    pub fn peak_memory(&self) -> Option<Mebibytes> {
        self.memory("VmHWM:")
    }

    /// The resident memory, where the system reports it.
    pub fn resident_memory(&self) -> Option<Mebibytes> {
        self.memory("VmRSS:")
    }

    /// The number of open file descriptors, where the system reports it.
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

    /// Sends SIGTERM and waits; kills the process if it takes too long.
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

    /// Sends SIGTERM.
    pub fn terminate(&self) -> Result<()> {
        self.signal(Signal::TERM)
    }

    /// Suspends the process until [`Self::resume`].
    pub fn pause(&self) -> Result<()> {
        self.signal(Signal::STOP)
    }

    /// Resumes the process.
    pub fn resume(&self) -> Result<()> {
        self.signal(Signal::CONT)
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.child.id())?;
        let pid = Pid::from_raw(pid).context("no process has the id 0")?;
        Ok(kill_process(pid, signal)?)
    }

    /// Kills the process and waits for its end.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Waits up to `timeout` for the exit status; `None` if the process still runs.
    pub fn wait(&mut self, timeout: Duration) -> Result<Option<ExitStatus>> {
        wait::within(timeout, || !matches!(self.status(), Ok(None)));
        self.status()
    }
}

fn spawn(mut command: Command) -> Result<Child> {
    command.stdin(Stdio::null()).spawn().with_context(|| {
        let program = command.get_program().display();
        format!("cannot run {program}")
    })
}

impl Drop for Process {
    fn drop(&mut self) {
        // Best effort: the process can have ended already.
        self.stop().ok();
    }
}
