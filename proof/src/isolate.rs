//! Runs a test in namespaces of its own: mounts, processes and, on request, a network.
//!
//! However the test ends, also by `kill -9`, the kernel then removes its mounts, loop devices,
//! network interfaces and processes. Must not know what is tested.

use std::ffi::OsString;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use lab::process;

/// The argument of the program inside the namespaces.
pub const INSIDE: &str = "--inside";

/// Reaps the processes that lose their parent, and exits as the program does.
const FIRST_PROCESS: &str = r#""$0" "$@" & wait "$!""#;

/// What a test needs of the machine.
#[derive(Clone, Copy, Debug)]
pub struct Needs {
    /// Programs, each with its Debian package.
    pub programs: &'static [(&'static str, &'static str)],
    /// Loop devices.
    pub loops: bool,
    /// A network of its own.
    pub network: bool,
}

/// Why the test cannot run on this machine.
pub fn skip_reason(needs: Needs) -> Option<String> {
    if !cfg!(target_os = "linux") {
        return Some("needs Linux".to_owned());
    }
    if as_root().is_none() {
        return Some("needs root, or a sudo that asks for no password".to_owned());
    }
    let missing = |&&(program, _): &&(&str, &str)| !is_installed(program);
    if let Some((program, package)) = needs.programs.iter().find(missing) {
        return Some(format!("needs {program} (package {package})"));
    }
    if needs.loops && !Path::new("/dev/loop-control").exists() {
        return Some("needs loop devices".to_owned());
    }
    let created = namespaces(needs.network)?.arg("true").output();
    match created {
        Ok(output) if output.status.success() => None,
        Ok(output) => {
            let why = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            Some(format!("needs namespaces: {why}"))
        }
        Err(error) => Some(format!("needs unshare: {error}")),
    }
}

/// Runs a script that installs what a test needs. The error, the script's last line, is the reason to
/// skip the test.
pub fn prepare(script: &mut Command) -> Result<()> {
    let output = script.output()?;
    let errors = String::from_utf8_lossy(&output.stderr);
    let last = errors.trim_end().lines().next_back();
    ensure!(
        output.status.success(),
        "{}",
        last.unwrap_or("no reason given")
    );
    Ok(())
}

/// Runs this program again with the same arguments, in namespaces. Returns whether it succeeded.
pub fn run(network: bool) -> Result<bool> {
    let mut command = namespaces(network).context("needs root")?;
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    let status = command
        .args(["/bin/sh", "-c", FIRST_PROCESS])
        .arg(std::env::current_exe()?)
        .args(arguments)
        .arg(INSIDE)
        .stdin(Stdio::null())
        .status()
        .context("cannot run unshare")?;
    Ok(status.success())
}

/// A command that runs the program that is appended to it in namespaces, which end with this thread.
fn namespaces(network: bool) -> Option<Command> {
    let mut words = as_root()?.to_vec();
    words.extend(["unshare", "--mount", "--pid", "--fork", "--kill-child"]);
    words.push("--mount-proc");
    if network {
        words.push("--net");
    }
    let mut command = process::command(words[0]);
    command.args(&words[1..]);
    // Debian keeps the tools of an administrator where only root looks for programs.
    command.env("PATH", path());
    Some(command)
}

/// The command that makes the rest of the line root's.
fn as_root() -> Option<&'static [&'static str]> {
    const WITH_SUDO: [&str; 3] = ["sudo", "-n", "--preserve-env=PATH"];
    if is_root() {
        return Some(&[]);
    }
    let allowed = Command::new("sudo").args(["-n", "true"]).output();
    allowed
        .is_ok_and(|output| output.status.success())
        .then_some(&WITH_SUDO)
}

fn is_root() -> bool {
    let id = Command::new("id").arg("-u").output();
    id.is_ok_and(|output| output.stdout == b"0\n")
}

fn is_installed(program: &str) -> bool {
    std::env::split_paths(&path()).any(|folder| folder.join(program).is_file())
}

fn path() -> OsString {
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    path.push(":/usr/sbin:/sbin");
    path
}
