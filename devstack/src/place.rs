//! The folders and ports of servers, and the account that runs them. Knows nothing of the kind of
//! server.

use std::fs::{self, File, TryLockError};
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::net::TcpListener;
use std::os::unix::fs::{DirBuilderExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

/// Where a server keeps its files.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Data {
    /// In a temporary folder, removed when the server is dropped or the runner ends.
    #[default]
    Temporary,
    /// As `Temporary`, and in memory where the system has a folder for that with enough room.
    InMemory,
    /// In this folder, which is created if missing, owned by the servers' account, and used by one
    /// runner at a time.
    Kept(PathBuf),
}

/// The folder of one server: its data, its log and its keys.
pub(crate) struct Home {
    pub(crate) path: PathBuf,
    pub(crate) temporary: bool,
    /// Held by the runner and its supervisor, so that it is free only once the last server on this
    /// data is dead.
    pub(crate) lock: File,
}

impl Home {
    pub(crate) fn open(data: Data) -> Result<Self> {
        let temporary = !matches!(data, Data::Kept(_));
        let name = || format!("{:016x}", random());
        let on_disk = || folder().map(|folder| folder.join("tmp").join(name()));
        let path = match data {
            Data::Temporary => on_disk()?,
            // No folder for all of them: another account could have made it first.
            Data::InMemory => match folder_in_memory() {
                Some(memory) => memory.join(format!("visitas-devstack-{}", name())),
                None => on_disk()?,
            },
            Data::Kept(path) => std::path::absolute(path)?,
        };
        create_owned(&path)?;
        ensure!(
            reachable(&path),
            "the servers' account cannot reach {}",
            path.display()
        );
        let lock = File::create(path.join("lock"))?;
        // The supervisor of a just killed runner needs a moment to release the lock.
        let deadline = Instant::now() + Duration::from_secs(2);
        loop {
            match lock.try_lock() {
                Ok(()) => {
                    File::create(path.join("log"))?;
                    return Ok(Self {
                        path,
                        temporary,
                        lock,
                    });
                }
                Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                Err(TryLockError::WouldBlock) => {
                    bail!(
                        "{} is in use: another `make run` or test of this folder is running on it",
                        path.display()
                    )
                }
                Err(TryLockError::Error(error)) => {
                    return Err(error).context("cannot lock the data");
                }
            }
        }
    }

    pub(crate) fn log(&self) -> PathBuf {
        self.path.join("log")
    }
}

/// A port of 127.0.0.1, reserved among all devstacks of this clone while this value lives.
pub(crate) struct Port {
    pub(crate) number: u16,
    /// The lock on this file is the reservation.
    _reservation: Option<File>,
}

impl Port {
    /// Takes the port `wanted`, or any free one if that is 0.
    ///
    /// A free port is chosen below the system's range of client ports: a client that retries the
    /// port of a killed server from that range could get this port itself and connect to itself.
    pub(crate) fn reserve(wanted: u16) -> Result<Self> {
        if wanted != 0 {
            return Ok(Self {
                number: wanted,
                _reservation: None,
            });
        }
        let reservations = folder()?.join("ports");
        create_owned(&reservations)?;
        for _ in 0..100 {
            let number = 20_000 + u16::try_from(random() % 12_000)?;
            let reservation = File::create(reservations.join(number.to_string()))?;
            if reservation.try_lock().is_ok() && TcpListener::bind(("127.0.0.1", number)).is_ok() {
                return Ok(Self {
                    number,
                    _reservation: Some(reservation),
                });
            }
        }
        bail!("no free port from 20000 to 31999")
    }
}

/// The folder of all kept files: `.devstack` in the clone, where git ignores it, or a folder for
/// this clone in `/var/lib` if the servers' account cannot reach the clone. `DEVSTACK_DIR`
/// overrides both.
///
/// # Errors
///
/// When the servers' account can reach none of them.
pub fn folder() -> Result<PathBuf> {
    if let Some(chosen) = std::env::var_os("DEVSTACK_DIR") {
        let chosen = std::path::absolute(chosen)?;
        create_owned(&chosen)?;
        ensure!(
            reachable(&chosen),
            "the servers' account cannot reach {}",
            chosen.display()
        );
        return Ok(chosen);
    }
    let devstack = Path::new(env!("CARGO_MANIFEST_DIR"));
    folder_for(devstack.parent().unwrap_or(devstack))
}

fn folder_for(clone: &Path) -> Result<PathBuf> {
    let inside = clone.join(".devstack");
    if create_owned(&inside).is_ok() && reachable(&inside) {
        let ignore = inside.join(".gitignore");
        if !ignore.exists() {
            fs::write(ignore, "*\n")?;
        }
        return Ok(inside);
    }
    // Removes the folder only if it is empty.
    let _ = fs::remove_dir(&inside);
    let outside = Path::new("/var/lib/visitas-devstack").join(format!(
        "{:016x}",
        hash(clone.as_os_str().as_encoded_bytes())
    ));
    create_owned(&outside).with_context(|| {
        format!(
            "the servers need a folder, and neither {} nor this one is usable",
            inside.display()
        )
    })?;
    ensure!(
        reachable(&outside),
        "the servers' account cannot reach {}",
        outside.display()
    );
    Ok(outside)
}

/// The system's folder in memory, if there is room for a dozen servers at a time. Linux has half of its
/// memory for such files; a container has 64 MiB. None where `DEVSTACK_DIR` chooses the folder.
fn folder_in_memory() -> Option<&'static Path> {
    const ROOM: u64 = 2 << 30;
    if std::env::var_os("DEVSTACK_DIR").is_some() {
        return None;
    }
    let folder = Path::new("/dev/shm");
    let system = rustix::fs::statvfs(folder).ok()?;
    (system.f_bavail * system.f_frsize >= ROOM).then_some(folder)
}

/// FNV-1a: unlike the standard hashers, stable across versions of Rust.
pub(crate) fn hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

fn random() -> u64 {
    RandomState::new().hash_one(())
}

/// A command that runs as the servers' account, without the runner's environment (`PGPORT` and
/// similar).
pub(crate) fn as_servers_account(program: impl AsRef<std::ffi::OsStr>) -> Result<Command> {
    let mut command = without_settings(program);
    if let Some((user, group)) = servers_account()? {
        // The standard library drops the supplementary groups as well when it changes from root to
        // another user.
        std::os::unix::process::CommandExt::gid(&mut command, group);
        std::os::unix::process::CommandExt::uid(&mut command, user);
    }
    Ok(command)
}

/// A command that runs as the current user, without the runner's environment.
pub(crate) fn without_settings(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new(program);
    command
        .env_clear()
        .env("LC_ALL", "C")
        .current_dir("/")
        .stdin(Stdio::null());
    if let Some(path) = std::env::var_os("PATH") {
        command.env("PATH", path);
    }
    command
}

/// Creates the folder if missing, and makes the servers' account its owner.
pub(crate) fn create_owned(folder: &Path) -> Result<()> {
    let made = match folder.parent().map(fs::create_dir_all) {
        Some(Err(error)) => Err(error),
        _ => fs::DirBuilder::new().mode(0o755).create(folder),
    };
    match made {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(error).with_context(|| format!("cannot create {}", folder.display()));
        }
        _ => {}
    }
    change_owner(folder)
}

/// Makes the servers' account the owner of a file.
pub(crate) fn change_owner(file: &Path) -> Result<()> {
    if let Some((user, group)) = servers_account()? {
        chown(file, Some(user), Some(group))
            .with_context(|| format!("cannot change the owner of {}", file.display()))?;
    }
    Ok(())
}

/// Whether the servers' account can write to the folder. Only an attempt shows this, since the
/// permissions of all parent folders matter.
fn reachable(folder: &Path) -> bool {
    as_servers_account("/bin/sh").is_ok_and(|mut shell| {
        shell
            .args([
                "-c",
                r#"cd "$1" && : >probe."$$" && rm probe."$$""#,
                "probe",
            ])
            .arg(folder)
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|status| status.success())
    })
}

/// User and group of the servers, `None` for the current user: Postgres refuses to run as root.
fn servers_account() -> Result<Option<(u32, u32)>> {
    static ACCOUNT: OnceLock<Option<(u32, u32)>> = OnceLock::new();
    if !rustix::process::geteuid().is_root() {
        return Ok(None);
    }
    let id = |kind: &str, name: &str| -> Option<u32> {
        let output = Command::new("id")
            .args([kind, name])
            .stderr(Stdio::null())
            .output()
            .ok()?;
        String::from_utf8(output.stdout).ok()?.trim().parse().ok()
    };
    let account = *ACCOUNT.get_or_init(|| {
        ["postgres", "nobody"]
            .into_iter()
            .find_map(|name| Some((id("-u", name)?, id("-g", name)?)))
    });
    ensure!(
        account.is_some(),
        "as root, the servers run as the user postgres or nobody, but neither exists"
    );
    Ok(account)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn clone_closed_to_the_servers_account_moves_its_data_to_var_lib() {
        let clone = tempfile::tempdir().unwrap();
        fs::set_permissions(clone.path(), fs::Permissions::from_mode(0o700)).unwrap();
        let folder = folder_for(clone.path()).unwrap();
        if rustix::process::geteuid().is_root() {
            assert!(
                folder.starts_with("/var/lib/visitas-devstack"),
                "{}",
                folder.display()
            );
            assert!(!clone.path().join(".devstack").exists());
            fs::remove_dir(folder).unwrap();
        } else {
            assert_eq!(folder, clone.path().join(".devstack"));
        }
    }

    #[test]
    fn open_clone_keeps_its_data_and_git_ignores_it() {
        let clone = tempfile::tempdir().unwrap();
        fs::set_permissions(clone.path(), fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(
            folder_for(clone.path()).unwrap(),
            clone.path().join(".devstack")
        );
        assert_eq!(
            fs::read_to_string(clone.path().join(".devstack/.gitignore")).unwrap(),
            "*\n"
        );
    }

    #[test]
    fn reserved_ports_differ() {
        // Random ports alone would collide about ten times.
        let ports: Vec<_> = (0..500).map(|_| Port::reserve(0).unwrap()).collect();
        let distinct: std::collections::HashSet<_> = ports.iter().map(|port| port.number).collect();
        assert_eq!(distinct.len(), 500);
    }
}
