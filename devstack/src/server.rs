//! Common to Postgres and Redis: start, stop, pause. Knows nothing of their protocols.

use std::path::Path;
use std::process::Child;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};

use crate::place::{Home, Port};
use crate::supervise::{Supervisor, signal_all, tail};

/// Recovery after a kill under load is the longest start.
const START_DEADLINE: Duration = Duration::from_mins(1);
const STOP_DEADLINE: Duration = Duration::from_secs(10);

/// A server on 127.0.0.1, which dies with the process that started it.
///
/// Dropping it stops it and removes its temporary data. A panic does the same. When the runner ends
/// without that (`exit`, `abort`, `kill -9`), a supervisor process kills the server, paused or not,
/// and removes its temporary data.
pub struct Server {
    definition: Definition,
    home: Home,
    port: Port,
    state: Mutex<State>,
}

/// How one kind of server is started and stopped.
pub(crate) struct Definition {
    pub(crate) command: Vec<String>,
    /// Whether the process with this id, and no other on its port, serves requests.
    pub(crate) is_ready: Box<dyn Fn(u32) -> bool + Send + Sync>,
    pub(crate) stop_signal: Signal,
}

struct State {
    supervisor: Supervisor,
    child: Option<Child>,
    paused: bool,
}

impl Server {
    pub(crate) fn start(
        home: Home,
        port: Port,
        supervisor: Supervisor,
        definition: Definition,
    ) -> Result<Self> {
        let state = Mutex::new(State {
            supervisor,
            child: None,
            paused: false,
        });
        let server = Self {
            definition,
            home,
            port,
            state,
        };
        server.start_again()?;
        Ok(server)
    }

    /// The address that it listens on: 127.0.0.1.
    #[must_use]
    pub fn host(&self) -> &'static str {
        "127.0.0.1"
    }

    /// The port it listens on, unchanged by kills and restarts.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port.number
    }

    /// The id of its first process, `None` while it is killed or stopped.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.state().child.as_ref().map(Child::id)
    }

    /// The folder of its data, its log and its keys.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.home.path
    }

    /// Kills all its processes with SIGKILL and returns once they are gone. Does nothing if the
    /// server is not running.
    ///
    /// # Errors
    ///
    /// When the system refuses.
    pub fn kill(&self) -> Result<()> {
        let mut state = self.state();
        if let Some(pid) = state.child.as_ref().map(Child::id) {
            signal_all("KILL", pid)?;
        }
        state.reap()
    }

    /// Suspends all its processes with SIGSTOP: connections stay open, the system accepts new ones,
    /// and none gets a response.
    ///
    /// # Errors
    ///
    /// When the server is not running.
    pub fn pause(&self) -> Result<()> {
        let mut state = self.state();
        signal_all("STOP", state.running()?)?;
        state.paused = true;
        Ok(())
    }

    /// Resumes a paused server.
    ///
    /// # Errors
    ///
    /// When the server is not running.
    pub fn resume(&self) -> Result<()> {
        let mut state = self.state();
        signal_all("CONT", state.running()?)?;
        state.paused = false;
        Ok(())
    }

    /// Stops the server in an orderly way, and kills it after 10 s. Does nothing if the server is
    /// not running.
    ///
    /// # Errors
    ///
    /// When the system refuses.
    pub fn stop(&self) -> Result<()> {
        let mut state = self.state();
        let Some(pid) = state.child.as_ref().map(Child::id) else {
            return Ok(());
        };
        if state.paused {
            signal_all("CONT", pid)?;
        }
        kill_process(pid_of(pid)?, self.definition.stop_signal)?;
        let deadline = Instant::now() + STOP_DEADLINE;
        while !state.has_ended()? {
            if Instant::now() > deadline {
                signal_all("KILL", pid)?;
                break;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        state.reap()
    }

    /// Starts it after a kill or a stop, on the same port and data, and returns once it serves
    /// requests.
    ///
    /// # Errors
    ///
    /// When the server is already running, or does not serve within a minute. The error contains
    /// the end of its log.
    pub fn start_again(&self) -> Result<()> {
        let mut state = self.state();
        ensure!(
            state.child.is_none() || state.has_ended()?,
            "the server on port {} is already running",
            self.port()
        );
        let child = state
            .supervisor
            .spawn_server(&self.definition.command, &self.home.log())?;
        let pid = child.id();
        state.child = Some(child);
        state.paused = false;
        let deadline = Instant::now() + START_DEADLINE;
        while !(self.definition.is_ready)(pid) {
            let ended = state.has_ended()?;
            if ended || Instant::now() > deadline {
                if !ended {
                    signal_all("KILL", pid)?;
                }
                state.reap()?;
                let why = if ended {
                    "ended"
                } else {
                    "did not respond in time"
                };
                let log = self.home.log();
                bail!(
                    "{} {why}; its log ends\n{}",
                    self.definition.command[0],
                    tail(&log)
                );
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// [`stop`](Self::stop), then [`start_again`](Self::start_again).
    ///
    /// # Errors
    ///
    /// The errors of both.
    pub fn restart(&self) -> Result<()> {
        self.stop()?;
        self.start_again()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // The server must be stoppable even after a panic elsewhere.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn running(&self) -> Result<u32> {
        self.child
            .as_ref()
            .map(Child::id)
            .context("the server is not running")
    }

    fn has_ended(&mut self) -> Result<bool> {
        Ok(match &mut self.child {
            Some(child) => child.try_wait()?.is_some(),
            None => true,
        })
    }

    /// Reaps a process that has ended.
    fn reap(&mut self) -> Result<()> {
        // Until `wait`, its id cannot belong to another process.
        self.supervisor.watch(0)?;
        if let Some(mut child) = self.child.take() {
            child.wait()?;
        }
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if !self.home.temporary {
            let _ = self.stop();
        }
        let mut state = self.state();
        state.supervisor.end();
        if let Some(mut child) = state.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

pub(crate) fn pid_of(id: u32) -> Result<Pid> {
    Pid::from_raw(i32::try_from(id)?).context("no process has the id 0")
}
