//! No server outlives the runner, however the runner ends.

mod processes;

use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Stdio};
use std::sync::{Arc, Once};

use devstack::{DATABASE, Postgres, PostgresOptions, Redis, RedisOptions};
use processes::{assert_gone, family, wait_until};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use tempfile::TempDir;

#[test]
fn kill_minus_nine_of_the_runner_leaves_no_server() {
    let mut runner = Runner::start(&["sleep", "60"]);
    let family = runner.family();
    assert!(
        family.len() > 6,
        "both servers, the command and the supervisors: {family:?}"
    );
    runner.process.kill().unwrap();
    assert_gone(&family);
}

#[test]
fn kill_minus_nine_of_the_runner_leaves_no_paused_server() {
    let mut runner = Runner::start(&["sleep", "60"]);
    let family = runner.family();
    for pid in &runner.servers {
        for pid in processes::family(*pid) {
            kill_process(id(pid), Signal::STOP).unwrap();
        }
    }
    runner.process.kill().unwrap();
    assert_gone(&family);
}

#[test]
fn next_runner_starts_on_the_data_of_one_that_was_killed() {
    let mut runner = Runner::start(&["sleep", "60"]);
    runner.process.kill().unwrap();
    let mut next = Runner::start_in(runner.folder.path(), &["true"]);
    assert!(next.process.wait().unwrap().success(), "{}", next.rest());
}

#[test]
fn second_runner_on_the_same_data_reports_that_it_is_in_use() {
    let runner = Runner::start(&["sleep", "60"]);
    let mut second = devstack(runner.folder.path(), &["true"]);
    let mut said = String::new();
    second
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut said)
        .unwrap();
    assert_eq!(second.wait().unwrap().code(), Some(1));
    assert!(said.contains("is in use"), "{said}");
}

#[test]
fn interrupt_ends_the_command_and_leaves_no_server() {
    let mut runner = Runner::start(&["sleep", "60"]);
    let family = runner.family();
    kill_process(id(runner.process.id()), Signal::INT).unwrap();
    assert_eq!(runner.process.wait().unwrap().code(), Some(130));
    assert_gone(&family);
}

#[test]
fn termination_ends_the_command_and_leaves_no_server() {
    let mut runner = Runner::start(&["sleep", "60"]);
    let family = runner.family();
    kill_process(id(runner.process.id()), Signal::TERM).unwrap();
    assert_eq!(runner.process.wait().unwrap().code(), Some(143));
    assert_gone(&family);
}

#[test]
fn interrupt_while_the_servers_start_leaves_no_server() {
    let folder = scratch();
    let mut process = devstack(folder.path(), &["sleep", "60"]);
    let mut family = Vec::new();
    wait_until("a server starts", || {
        family = processes::family(process.id());
        family.len() > 2
    });
    kill_process(id(process.id()), Signal::INT).unwrap();
    assert_eq!(process.wait().unwrap().code(), Some(130));
    assert_gone(&family);
}

#[test]
fn interrupt_of_the_group_reaches_the_command_once() {
    let mut runner = Runner::start(&[
        "sh",
        "-c",
        "trap 'echo got >&2' INT; echo up >&2; while :; do sleep 0.05; done",
    ]);
    runner.expect_line("up");
    kill_process_group(id(runner.process.id()), Signal::INT).unwrap();
    runner.expect_line("got");
    kill_process(id(runner.process.id()), Signal::TERM).unwrap();
    assert_eq!(runner.process.wait().unwrap().code(), Some(143));
    assert_eq!(runner.rest(), "");
}

#[test]
fn exit_status_of_the_runner_is_that_of_the_command() {
    let mut runner = Runner::start(&["sh", "-c", "exit 7"]);
    assert_eq!(runner.process.wait().unwrap().code(), Some(7));
}

#[test]
fn aborting_runner_leaves_no_server_and_no_data() {
    let Some((status, servers)) = again_as_runner("aborting_runner_leaves_no_server_and_no_data")
    else {
        let _servers = Servers::start_and_print();
        std::process::abort();
    };
    assert_eq!(status.signal(), Some(6));
    servers.assert_gone();
}

#[test]
fn panicking_runner_leaves_no_server_and_no_data() {
    let Some((status, servers)) = again_as_runner("panicking_runner_leaves_no_server_and_no_data")
    else {
        let _servers = Servers::start_and_print();
        panic!("on purpose");
    };
    assert_eq!(status.code(), Some(101));
    servers.assert_gone();
}

#[test]
fn runner_that_exits_without_a_drop_leaves_no_server_and_no_data() {
    let Some((status, servers)) =
        again_as_runner("runner_that_exits_without_a_drop_leaves_no_server_and_no_data")
    else {
        std::mem::forget(Servers::start_and_print());
        std::process::exit(3);
    };
    assert_eq!(status.code(), Some(3));
    servers.assert_gone();
}

#[test]
fn missing_servers_are_named_with_the_commands_that_install_them() {
    let output = Command::new(env!("CARGO_BIN_EXE_devstack"))
        .arg("check")
        .envs([
            ("DEVSTACK_PG_BIN", "/nowhere/pg"),
            ("DEVSTACK_REDIS_SERVER", "/nowhere/redis"),
        ])
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    for part in [
        "/nowhere/pg",
        "/nowhere/redis",
        "postgresql\n",
        "redis-server\n",
        "brew install postgresql@16",
    ] {
        assert!(said.contains(part), "{part} is not in: {said}");
    }
}

/// A `devstack run` whose servers are up.
struct Runner {
    process: Child,
    stderr: BufReader<ChildStderr>,
    servers: Vec<u32>,
    folder: TempDir,
}

impl Runner {
    fn start(command: &[&str]) -> Self {
        let folder = scratch();
        let mut runner = Self::start_in(folder.path(), command);
        runner.folder = folder;
        runner
    }

    fn start_in(folder: &Path, command: &[&str]) -> Self {
        let mut process = devstack(folder, command);
        let stderr = BufReader::new(process.stderr.take().unwrap());
        let mut runner = Self {
            process,
            stderr,
            servers: Vec::new(),
            folder: tempfile::tempdir().unwrap(),
        };
        for _ in 0..2 {
            let line = runner.line();
            let (_, rest) = line
                .split_once("process ")
                .unwrap_or_else(|| panic!("{line}{}", runner.rest()));
            runner
                .servers
                .push(rest.split_once(',').unwrap().0.parse().unwrap());
        }
        runner
    }

    /// The processes of the runner, once the command runs.
    fn family(&self) -> Vec<u32> {
        let mut family = Vec::new();
        wait_until("the command runs", || {
            family = processes::family(self.process.id());
            let sleeps = Command::new("ps")
                .args(["-A", "-o", "pid=", "-o", "comm="])
                .output()
                .unwrap();
            String::from_utf8_lossy(&sleeps.stdout).lines().any(|line| {
                let (pid, command) = line.trim().split_once(' ').unwrap();
                command.trim().ends_with("sleep") && family.contains(&pid.parse().unwrap())
            })
        });
        family
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.stderr.read_line(&mut line).unwrap();
        line
    }

    fn expect_line(&mut self, expected: &str) {
        assert_eq!(self.line().trim_end(), expected);
    }

    fn rest(&mut self) -> String {
        let mut rest = String::new();
        self.stderr.read_to_string(&mut rest).unwrap();
        rest
    }
}

impl Drop for Runner {
    fn drop(&mut self) {
        let family = processes::family(self.process.id());
        let _ = self.process.kill();
        let _ = self.process.wait();
        assert_gone(&family);
    }
}

/// Two servers. One runs a query that does not notice by itself that its server is gone.
struct Servers {
    pids: Vec<u32>,
    folders: Vec<PathBuf>,
    segment: String,
}

impl Servers {
    fn start_and_print() -> (Arc<Postgres>, Redis) {
        let postgres = Arc::new(Postgres::start(PostgresOptions::default()).unwrap());
        let redis = Redis::start(RedisOptions::default()).unwrap();
        let client = Arc::clone(&postgres);
        std::thread::spawn(move || {
            client.sql(DATABASE, "select count(*) from generate_series(1, 1e10)")
        });
        wait_until("the query runs", || {
            let busy = "select count(*) from pg_stat_activity
                where query like '%1e10%' and pid <> pg_backend_pid()";
            postgres.sql(DATABASE, busy).unwrap() == "1"
        });
        println!();
        for server in [&**postgres, &*redis] {
            println!("folder {}", server.folder().display());
            for pid in family(server.pid().unwrap()) {
                println!("pid {pid}");
            }
        }
        println!("segment {}", shared_memory_segment(&postgres));
        (postgres, redis)
    }

    fn assert_gone(&self) {
        assert!(self.pids.len() > 6 && self.folders.len() == 2 && !self.segment.is_empty());
        assert_gone(&self.pids);
        wait_until("the data is gone", || {
            self.folders.iter().all(|folder| !folder.exists())
        });
        let segments = std::fs::read_to_string("/proc/sysvipc/shm").unwrap_or_default();
        assert!(
            !segments
                .lines()
                .any(|line| line.split_whitespace().nth(1) == Some(&self.segment)),
            "{segments}"
        );
    }
}

/// The id of the server's System V shared memory segment; a machine has a limited number of them.
fn shared_memory_segment(postgres: &Postgres) -> String {
    let mut data = std::fs::read_dir(postgres.folder())
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let data = data
        .find(|path| path.join("postmaster.pid").exists())
        .unwrap();
    let file = std::fs::read_to_string(data.join("postmaster.pid")).unwrap();
    file.lines()
        .nth(6)
        .unwrap()
        .split_whitespace()
        .nth(1)
        .unwrap()
        .to_owned()
}

/// Runs one test of this file in a second process, which is the runner. Returns `None` in that
/// process.
fn again_as_runner(test: &str) -> Option<(std::process::ExitStatus, Servers)> {
    if std::env::var_os("DEVSTACK_TEST_RUNNER").is_some() {
        return None;
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env("DEVSTACK_TEST_RUNNER", "1")
        .output()
        .unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    let all = |name: &str| {
        said.lines()
            .filter_map(|line| line.strip_prefix(name))
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    let pids = all("pid ").iter().map(|pid| pid.parse().unwrap()).collect();
    let folders = all("folder ").iter().map(PathBuf::from).collect();
    Some((
        output.status,
        Servers {
            pids,
            folders,
            segment: all("segment ").concat(),
        },
    ))
}

fn devstack(folder: &Path, command: &[&str]) -> Child {
    Command::new(env!("CARGO_BIN_EXE_devstack"))
        .args(["run", "--"])
        .args(command)
        .env("DEVSTACK_DIR", folder)
        .process_group(0)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// A folder for kept data that shares the templates of the repository's own folder.
fn scratch() -> TempDir {
    static TEMPLATE_IS_MADE: Once = Once::new();
    TEMPLATE_IS_MADE.call_once(|| drop(Postgres::start(PostgresOptions::default()).unwrap()));
    let folder = devstack::folder().unwrap();
    let scratch = tempfile::tempdir_in(&folder).unwrap();
    std::os::unix::fs::symlink(folder.join("templates"), scratch.path().join("templates")).unwrap();
    scratch
}

fn id(pid: u32) -> Pid {
    Pid::from_raw(i32::try_from(pid).unwrap()).unwrap()
}
