//! Three machines with Postgres under Patroni, and an `HAProxy` that leads to the leader.
//!
//! A machine is a network namespace with an address on a bridge, and a process namespace whose end
//! is the machine's: nothing says goodbye. Runs inside the namespaces of `isolate`. Must not know
//! what the clients do.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use devstack::{DATABASE, PASSWORD, USER};
use lab::ports::free_address;
use lab::process::{self, Process};
use lab::program::scratch;
use lab::wait::within;
use serde_json::Value;

use crate::disk::run;
use crate::isolate;

/// The machines' number, and the last part of their addresses.
const MACHINES: [u8; 3] = [11, 12, 13];

const SOURCES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/patroni");
const MEMBER: &str = include_str!("../patroni/patroni.yml");
const BALANCER: &str = include_str!("../patroni/haproxy.cfg");

/// Making the first cluster, or copying the leader's, is the longest start.
const START_TIMEOUT: Duration = Duration::from_mins(2);

/// Reading ten million rows takes less than a minute.
const SQL_TIMEOUT: &str = "120";
/// A transaction that writes.
const COMMIT: &str = "begin; create table if not exists sonda (id integer); \
    insert into sonda values (1); commit";

/// The machines and the balancer. Everything ends with this value.
pub struct Cluster {
    /// Where the balancer listens.
    pub address: SocketAddr,
    folder: PathBuf,
    programs: PathBuf,
    machines: BTreeMap<u8, Process>,
    balancer: Option<Process>,
}

/// Installs Patroni. The error is the reason to skip the test.
pub fn prepare() -> Result<()> {
    let mut script = Command::new(Path::new(SOURCES).join("prepare.sh"));
    isolate::prepare(script.arg(installation()?)).context("Patroni cannot be installed")
}

fn installation() -> Result<PathBuf> {
    Ok(devstack::folder()?.join("patroni"))
}

impl Cluster {
    /// Starts the machines, and waits until the leader has two standbys.
    pub fn start() -> Result<Self> {
        let folder = crate::disk::folder()?.join("machines");
        if folder.exists() {
            fs::remove_dir_all(&folder)?;
        }
        let found = devstack::check()?;
        let programs = found
            .lines()
            .next()
            .and_then(|line| line.split_once(" in "));
        let (_, programs) = programs.context("no folder of Postgres")?;
        run("ip", &["link", "set", "lo", "up"])?;
        run("ip", &["link", "add", "br0", "type", "bridge"])?;
        run("ip", &["addr", "add", "10.99.0.1/24", "dev", "br0"])?;
        run("ip", &["link", "set", "br0", "up"])?;
        let mut cluster = Self {
            address: free_address()?,
            folder,
            programs: programs.into(),
            machines: BTreeMap::new(),
            balancer: None,
        };
        for machine in MACHINES {
            cluster.write_files(machine)?;
            cluster.start_machine(machine)?;
        }
        cluster.start_balancer()?;
        cluster.wait_until_whole()?;
        cluster.sql("postgres", &format!("create database {DATABASE}"))?;
        Ok(cluster)
    }

    /// The machine of the leader, as the machines themselves say.
    pub fn leader(&self) -> Option<u8> {
        MACHINES
            .into_iter()
            .find(|&machine| self.is_leader(machine))
    }

    /// The machines that are not the leader's.
    pub fn standbys(&self) -> Result<Vec<u8>> {
        let leader = self.leader().context("no leader")?;
        Ok(MACHINES
            .into_iter()
            .filter(|&machine| machine != leader)
            .collect())
    }

    /// Whether a machine says that it is the leader.
    pub fn is_leader(&self, machine: u8) -> bool {
        self.machines.contains_key(&machine)
            && ask(machine, "GET", "/primary", "").is_ok_and(|(status, _)| status == 200)
    }

    /// Kills a machine: no process of it says goodbye, and its address is silent.
    pub fn kill_machine(&mut self, machine: u8) -> Result<()> {
        let mut process = self
            .machines
            .remove(&machine)
            .context("the machine is off")?;
        process.kill()
    }

    /// Starts a machine with the disk that it had.
    pub fn start_machine(&mut self, machine: u8) -> Result<()> {
        let (name, address) = (name(machine), address(machine));
        let folder = self.folder_of(machine);
        let members: Vec<_> = MACHINES
            .iter()
            .map(|&machine| {
                format!(
                    "{}=http://{}:2380",
                    self::name(machine),
                    self::address(machine)
                )
            })
            .collect();
        let mut command = process::command("unshare");
        command
            .args([
                "--net",
                "--mount",
                "--pid",
                "--fork",
                "--kill-child",
                "--mount-proc",
            ])
            .arg(Path::new(SOURCES).join("machine.sh"))
            .arg(&folder)
            .args([&*name, &*address, &*members.join(","), "new"])
            .arg(installation()?.join("venv/bin/patroni"))
            .arg("etcd");
        let log = scratch()?.join(format!("machine-{machine}.log"));
        let process = Process::start(command, &log)?;
        let pid = process.id().to_string();
        self.machines.insert(machine, process);
        // The process has left this network once it is in its own.
        let own = fs::read_link("/proc/self/ns/net")?;
        let is_apart =
            || fs::read_link(format!("/proc/{pid}/ns/net")).is_ok_and(|network| network != own);
        ensure!(
            within(Duration::from_secs(5), is_apart),
            "the machine has no network of its own"
        );
        let cable = cable(machine);
        // The kernel removes the cable of a dead machine some seconds later.
        let plug = || {
            run("ip", &["link", "delete", &cable]).ok();
            run(
                "ip",
                &[
                    "link", "add", &cable, "type", "veth", "peer", "name", "eth0", "netns", &pid,
                ],
            )
        };
        let mut plugged = plug();
        within(Duration::from_secs(5), || {
            if plugged.is_err() {
                plugged = plug();
            }
            plugged.is_ok()
        });
        plugged?;
        run("ip", &["link", "set", &cable, "master", "br0", "up"])?;
        let inside = |arguments: &[&str]| {
            let network = format!("--net=/proc/{pid}/ns/net");
            let mut words = vec![&*network, "ip"];
            words.extend(arguments);
            run("nsenter", &words)
        };
        inside(&["link", "set", "eth0", "up"])?;
        inside(&["addr", "add", &format!("{address}/24"), "dev", "eth0"])
    }

    /// Unplugs a machine, which goes on alive.
    pub fn unplug(&self, machine: u8) -> Result<()> {
        run("ip", &["link", "set", &cable(machine), "down"])
    }

    /// Plugs a machine in again.
    pub fn plug(&self, machine: u8) -> Result<()> {
        run("ip", &["link", "set", &cable(machine), "up"])
    }

    /// Freezes all processes of a machine whose command line contains `what`.
    pub fn freeze(&self, machine: u8, what: &str) -> Result<()> {
        self.signal(machine, "STOP", what)
    }

    /// Lets a frozen machine go on.
    pub fn thaw(&self, machine: u8) -> Result<()> {
        self.signal(machine, "CONT", "")
    }

    fn signal(&self, machine: u8, signal: &str, what: &str) -> Result<()> {
        let process = self.machines.get(&machine).context("the machine is off")?;
        for pid in descendants(process.id())? {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            if String::from_utf8_lossy(&line).contains(what) {
                // It can have ended since.
                run("kill", &[&format!("-{signal}"), &pid.to_string()]).ok();
            }
        }
        Ok(())
    }

    /// Hands the lead over to another machine, as for maintenance.
    pub fn switch_over(&self, from: u8, to: u8) -> Result<()> {
        let (from, to) = (name(from), name(to));
        let order = format!(r#"{{"leader":"{from}","candidate":"{to}"}}"#);
        let machine = self.leader().context("no leader")?;
        let (status, body) = ask(machine, "POST", "/switchover", &order)?;
        ensure!(
            status == 200 || status == 202,
            "switchover: {status} {body}"
        );
        Ok(())
    }

    /// Makes commits wait for no standby. This is the control: a failover then loses visits.
    pub fn replicate_asynchronously(&self) -> Result<()> {
        let leader = self.leader().context("no leader")?;
        let settings = r#"{"synchronous_mode":false,"synchronous_mode_strict":false}"#;
        let (status, body) = ask(leader, "PATCH", "/config", settings)?;
        ensure!(status == 200, "config: {status} {body}");
        let is_asynchronous = || {
            let names = self.sql("postgres", "show synchronous_standby_names");
            names.is_ok_and(|names| names.is_empty())
        };
        ensure!(
            within(START_TIMEOUT, is_asynchronous),
            "commits still wait for a standby"
        );
        Ok(())
    }

    /// Starts and plugs in every machine, and waits until the cluster is whole.
    pub fn make_whole(&mut self) -> Result<()> {
        for machine in MACHINES {
            if !self.machines.contains_key(&machine) {
                self.start_machine(machine)?;
            }
            self.plug(machine)?;
        }
        self.wait_until_whole()
    }

    /// Waits until a leader has two standbys that follow it, of which commits wait for one.
    pub fn wait_until_whole(&self) -> Result<()> {
        let is_whole = || {
            let Some(leader) = self.leader() else {
                return false;
            };
            let members = ask(leader, "GET", "/cluster", "").map(|(_, body)| body);
            let members: Value =
                serde_json::from_str(&members.unwrap_or_default()).unwrap_or_default();
            let members = members["members"].as_array().cloned().unwrap_or_default();
            let follows = |member: &&Value| {
                member["state"] == "streaming"
                    && (member["role"] == "quorum_standby" || member["role"] == "sync_standby")
            };
            members.iter().filter(follows).count() == MACHINES.len() - 1
        };
        // Each look asks up to four times over HTTP.
        let deadline = Instant::now() + START_TIMEOUT;
        while !is_whole() {
            if Instant::now() > deadline {
                bail!("the cluster is not whole: {}", self.describe());
            }
            std::thread::sleep(Duration::from_millis(200));
        }
        Ok(())
    }

    fn describe(&self) -> String {
        let tails = MACHINES.iter().map(|&machine| {
            let log = self.folder_of(machine).join("patroni.log");
            let log = fs::read_to_string(log).unwrap_or_default();
            let lines: Vec<_> = log.lines().collect();
            let tail = &lines[lines.len().saturating_sub(5)..];
            format!("\n{}:\n{}", name(machine), tail.join("\n"))
        });
        tails.collect()
    }

    /// Waits until a transaction that writes succeeds through the balancer, and returns when it did.
    pub fn wait_for_a_commit(&self) -> Result<Instant> {
        let commits = || self.sql("postgres", COMMIT).is_ok();
        ensure!(within(START_TIMEOUT, commits), "no commit succeeds");
        Ok(Instant::now())
    }

    /// Runs a statement on the leader, through the balancer.
    pub fn sql(&self, database: &str, statement: &str) -> Result<String> {
        let port = self.address.port();
        let url = format!("postgres://{USER}:{PASSWORD}@127.0.0.1:{port}/{database}");
        let output = Command::new("timeout")
            .arg(SQL_TIMEOUT)
            .arg(self.programs.join("psql"))
            .args(["-XqAt", "-v", "ON_ERROR_STOP=1", "-c", statement, &url])
            .env("PGCONNECT_TIMEOUT", "10")
            .output()?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "psql: {errors}");
        Ok(String::from_utf8(output.stdout)?.trim_end().to_owned())
    }

    fn start_balancer(&mut self) -> Result<()> {
        let servers: Vec<_> = MACHINES
            .iter()
            .map(|&machine| {
                let (name, address) = (name(machine), address(machine));
                format!("    server {name} {address}:5432 check port 8008")
            })
            .collect();
        let config = BALANCER
            .replace("{port}", &self.address.port().to_string())
            .replace("{servers}", &servers.join("\n"));
        let file = self.folder.join("haproxy.cfg");
        fs::write(&file, config)?;
        let mut command = process::command("haproxy");
        command.args(["-db", "-f"]).arg(&file);
        self.balancer = Some(Process::start(command, &self.folder.join("haproxy.log"))?);
        Ok(())
    }

    fn write_files(&self, machine: u8) -> Result<()> {
        let folder = self.folder_of(machine);
        fs::create_dir_all(&folder)?;
        let hosts: Vec<_> = MACHINES
            .iter()
            .map(|&machine| format!("{}:2379", address(machine)))
            .collect();
        let config = MEMBER
            .replace("{name}", &name(machine))
            .replace("{address}", &address(machine))
            .replace("{hosts}", &hosts.join(","))
            .replace("{folder}", &folder.display().to_string())
            .replace("{programs}", &self.programs.display().to_string())
            .replace("{user}", USER)
            .replace("{password}", PASSWORD);
        fs::write(folder.join("patroni.yml"), config)?;
        let text = folder.display().to_string();
        run("chown", &["-R", "postgres:postgres", &text])?;
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o755))?;
        Ok(())
    }

    fn folder_of(&self, machine: u8) -> PathBuf {
        self.folder.join(name(machine))
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for process in self.machines.values_mut() {
            process.kill().ok();
        }
        fs::remove_dir_all(&self.folder).ok();
    }
}

fn name(machine: u8) -> String {
    format!("pg{machine}")
}

fn address(machine: u8) -> String {
    format!("10.99.0.{machine}")
}

fn cable(machine: u8) -> String {
    format!("cable{machine}")
}

/// Sends a request to a machine's Patroni. A machine that is silent is given half a second.
fn ask(machine: u8, method: &str, path: &str, body: &str) -> Result<(u16, String)> {
    let long = if method == "GET" { "0.5" } else { "20" };
    let url = format!("http://{}:8008{path}", address(machine));
    let output = Command::new("curl")
        .args(["--silent", "--max-time", long, "--request", method])
        .args(["--data", body, "--write-out", "\n%{http_code}", &url])
        .output()
        .context("cannot run curl")?;
    let text = String::from_utf8(output.stdout)?;
    let (body, status) = text.rsplit_once('\n').context("no status")?;
    Ok((status.parse()?, body.to_owned()))
}

/// The processes that a process has started, and those that they have.
fn descendants(root: u32) -> Result<BTreeSet<u32>> {
    let mut parents = BTreeMap::new();
    for entry in fs::read_dir("/proc")? {
        let Ok(pid) = entry?.file_name().to_string_lossy().parse::<u32>() else {
            continue;
        };
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // The command's name, in parentheses, can have any character.
        let fields = stat.rsplit_once(')').map(|(_, fields)| fields);
        let parent =
            fields.and_then(|fields| fields.split_whitespace().nth(1)?.parse::<u32>().ok());
        if let Some(parent) = parent {
            parents.insert(pid, parent);
        }
    }
    let is_below = |mut pid: u32| {
        while let Some(&parent) = parents.get(&pid) {
            if parent == root {
                return true;
            }
            pid = parent;
        }
        false
    };
    Ok(parents
        .keys()
        .copied()
        .filter(|&pid| is_below(pid))
        .collect())
}
