//! Leaves no process behind: a shell that outlives the runner for long enough to kill its
//! processes.
//!
//! The shell waits at the read end of a pipe whose write end only the runner holds. When the runner
//! ends, even by a panic, an abort or `kill -9`, the pipe closes, and the shell kills the server
//! and removes its temporary data. It has its own process group, so a terminal's Ctrl-C reaches
//! only the runner. `PR_SET_PDEATHSIG` is not sufficient: it is Linux only, tied to the thread that
//! started the process, and lost on a change of user.

use std::ffi::OsStr;
use std::fs::File;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::place::{self, Home};

const SCRIPT: &str = include_str!("supervise.sh");

pub(crate) struct Supervisor {
    shell: Child,
    /// `None` once closed.
    pipe: Option<ChildStdin>,
}

impl Supervisor {
    /// Watches over the server of `home`.
    pub(crate) fn for_home(home: &Home) -> Result<Self> {
        let remove = if home.temporary {
            home.path.as_path()
        } else {
            Path::new("")
        };
        // The shell never writes: its standard output only holds the lock.
        Self::start(remove, home.lock.try_clone()?.into())
    }

    /// Watches over a process without temporary files.
    pub(crate) fn for_process() -> Result<Self> {
        Self::start(Path::new(""), Stdio::null())
    }

    fn start(remove: &Path, stdout: Stdio) -> Result<Self> {
        let mut shell = script(["watch".as_ref(), remove.as_os_str()])
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(stdout)
            .stderr(Stdio::null())
            .spawn()
            .context("cannot run /bin/sh")?;
        let pipe = shell.stdin.take();
        Ok(Self { shell, pipe })
    }

    /// Sets the process to kill when the runner ends; 0 is none. Replaces the previous one.
    pub(crate) fn watch(&mut self, pid: u32) -> Result<()> {
        // One write: a pipe accepts it entirely or not at all.
        self.pipe
            .as_mut()
            .context("the supervisor has ended")?
            .write_all(format!("{pid}\n").as_bytes())
            .context("the supervisor was killed")
    }

    /// Starts a program through `shell`, a `/bin/sh` whose user, environment and output it
    /// inherits, in its own process group and without input. The supervisor knows it before its
    /// first instruction.
    pub(crate) fn spawn(
        &mut self,
        mut shell: Command,
        program: impl IntoIterator<Item = impl AsRef<OsStr>>,
    ) -> Result<Child> {
        let mut child = shell
            .args(["-c", r#"read -r _ && exec "$@" </dev/null"#, "devstack"])
            .args(program)
            .process_group(0)
            .stdin(Stdio::piped())
            .spawn()
            .context("cannot run /bin/sh")?;
        self.watch(child.id())?;
        child.stdin.take().context("no pipe")?.write_all(b"go\n")?;
        Ok(child)
    }

    /// Starts a program as the servers' account.
    pub(crate) fn spawn_server(
        &mut self,
        program: impl IntoIterator<Item = impl AsRef<OsStr>>,
        log: &Path,
    ) -> Result<Child> {
        let log = File::options().create(true).append(true).open(log)?;
        let mut shell = place::as_servers_account("/bin/sh")?;
        shell.stdout(log.try_clone()?).stderr(log);
        self.spawn(shell, program)
    }

    /// Runs a program as the servers' account and waits for its end.
    pub(crate) fn finish(&mut self, program: &[impl AsRef<OsStr>], log: &Path) -> Result<()> {
        let status = self.spawn_server(program, log)?.wait()?;
        self.watch(0)?;
        if !status.success() {
            let program = Path::new(program[0].as_ref()).display();
            bail!("{program} failed ({status}); its log ends\n{}", tail(log));
        }
        Ok(())
    }

    /// Kills and removes everything at once, as if the runner had ended.
    pub(crate) fn end(&mut self) {
        drop(self.pipe.take());
        let _ = self.shell.wait();
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        self.end();
    }
}

/// Sends a signal (`KILL`, `STOP`, `CONT`) to a process and all its descendants. After `KILL`, they
/// are gone.
pub(crate) fn signal_all(signal: &str, pid: u32) -> Result<()> {
    let status = script(["signal", signal, &pid.to_string()])
        .status()
        .context("cannot run /bin/sh")?;
    ensure!(
        status.success(),
        "SIG{signal} could not be sent to process {pid}"
    );
    Ok(())
}

/// The end of a log, for an error message.
pub(crate) fn tail(log: &Path) -> String {
    let log = std::fs::read(log).unwrap_or_default();
    let log = String::from_utf8_lossy(&log);
    let lines: Vec<_> = log.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}

fn script(arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Command {
    let mut command = place::without_settings("/bin/sh");
    command.args(["-c", SCRIPT, "devstack"]).args(arguments);
    command
}
