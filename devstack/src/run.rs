//! `devstack run`: runs a command with both servers, on kept data.

use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Result;
use rustix::process::{Signal, kill_process, kill_process_group};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::server::pid_of;
use crate::supervise::Supervisor;
use crate::{
    DATABASE, Data, PASSWORD, Postgres, PostgresOptions, Redis, RedisOptions, USER, folder,
};

/// The phase of `run`, for the thread that receives signals.
enum Phase {
    Starting,
    Running(u32),
    Stopping,
}

/// Runs a command with both servers up and their addresses in its environment (`DB_HOST`,
/// `DB_PORT`, `DB_USER`, `DB_PASSWORD`, `DB_NAME`, `REDIS_HOST`, `REDIS_PORT`), and returns its
/// exit status, 128 + N for death by signal N.
///
/// The command has its own process group, so that it receives every signal once, from this process.
/// It therefore has no standard input. Like the servers, it does not outlive this process.
///
/// # Errors
///
/// When a server or the command cannot be started.
pub fn run(command: &[std::ffi::OsString]) -> Result<u8> {
    let phase = Arc::new(Mutex::new(Phase::Starting));
    forward_signals(Arc::clone(&phase))?;
    let phase = || phase.lock().unwrap_or_else(PoisonError::into_inner);

    let folder = folder()?;
    let postgres = Postgres::start(PostgresOptions {
        data: Data::Kept(folder.join("postgres")),
        ..PostgresOptions::default()
    })?;
    let redis = Redis::start(RedisOptions {
        data: Data::Kept(folder.join("redis")),
        ..RedisOptions::default()
    })?;
    for (name, server) in [("PostgreSQL", &*postgres), ("Redis", &*redis)] {
        let pid = server.pid().unwrap_or_default();
        let folder = server.folder().display();
        eprintln!(
            "devstack: {name} on {}:{}, process {pid}, files in {folder}",
            server.host(),
            server.port()
        );
    }

    let mut supervisor = Supervisor::for_process()?;
    let mut shell = Command::new("/bin/sh");
    shell
        .envs([
            ("DB_HOST", postgres.host()),
            ("DB_PORT", &postgres.port().to_string()),
        ])
        .envs([
            ("DB_USER", USER),
            ("DB_PASSWORD", PASSWORD),
            ("DB_NAME", DATABASE),
        ])
        .envs([
            ("REDIS_HOST", redis.host()),
            ("REDIS_PORT", &redis.port().to_string()),
        ]);
    // A signal during the start waits for this lock and then goes to the command.
    let mut starting = phase();
    let mut child = supervisor.spawn(shell, command)?;
    *starting = Phase::Running(child.id());
    drop(starting);
    let status = child.wait()?;
    *phase() = Phase::Stopping;
    supervisor.watch(0)?;

    let code = status
        .code()
        .or_else(|| status.signal().map(|signal| 128 + signal));
    Ok(code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1))
}

fn forward_signals(phase: Arc<Mutex<Phase>>) -> Result<()> {
    let mut signals = Signals::new([SIGHUP, SIGINT, SIGQUIT, SIGTERM])?;
    std::thread::spawn(move || {
        for signal in &mut signals {
            match *phase.lock().unwrap_or_else(PoisonError::into_inner) {
                // The supervisors stop the servers.
                Phase::Starting => std::process::exit(128 + signal),
                // Like a terminal and a process manager: keys reach the whole group, SIGTERM the
                // process.
                Phase::Running(pid) => {
                    let _ = pid_of(pid).map(|pid| match signal {
                        SIGINT => kill_process_group(pid, Signal::INT),
                        SIGQUIT => kill_process_group(pid, Signal::QUIT),
                        SIGHUP => kill_process_group(pid, Signal::HUP),
                        _ => kill_process(pid, Signal::TERM),
                    });
                }
                Phase::Stopping => {}
            }
        }
    });
    Ok(())
}
