//! The challenge's app: finds a Python with its modules, and serves it.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use lab::process;
use lab::program::scratch;

/// The folder of the app and its requirements.
const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/peers/flask");

/// An interpreter that can serve the app.
pub(crate) struct Python(PathBuf);

/// Uses the system's Python if it has the modules, otherwise a virtual environment with modules
/// that pip installs. The error is the reason to skip the app.
pub(crate) fn find() -> Result<Python, String> {
    let system = Path::new("python3");
    if serves(system) {
        return Ok(Python(system.to_owned()));
    }
    let folder = scratch().map_err(|error| error.to_string())?.join("venv");
    let own = folder.join("bin/python");
    if !serves(&own) {
        run(Command::new(system).args(["-m", "venv"]).arg(&folder))?;
        run(Command::new(&own)
            .args(["-m", "pip", "install", "--quiet", "--timeout", "15"])
            .args(["--retries", "1", "--requirement"])
            .arg(Path::new(FOLDER).join("requirements.txt")))?;
    }
    if serves(&own) {
        Ok(Python(own))
    } else {
        Err("Flask, gunicorn, psycopg2 or redis cannot be imported".to_owned())
    }
}

impl Python {
    /// Serves the app as gunicorn's manual recommends: 2 workers per processor plus one.
    pub(crate) fn serve(&self, address: SocketAddr) -> Command {
        let processors = std::thread::available_parallelism().map_or(2, usize::from);
        let mut command = process::command(&self.0);
        command
            .current_dir(FOLDER)
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .args(["-m", "gunicorn", "--log-level", "warning"])
            .args(["--workers", &(2 * processors + 1).to_string()])
            .args(["--bind", &address.to_string(), "app:app"]);
        command
    }
}

fn serves(python: &Path) -> bool {
    Command::new(python)
        .args(["-c", "import flask, gunicorn, psycopg2, redis"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

fn run(command: &mut Command) -> Result<(), String> {
    let output = command.output().map_err(|error| {
        let program = command.get_program().display();
        format!("{program}: {error}")
    })?;
    if output.status.success() {
        return Ok(());
    }
    let report = String::from_utf8_lossy(&output.stderr);
    let last = report
        .trim_end()
        .lines()
        .last()
        .unwrap_or("no reason given");
    Err(last.to_owned())
}
