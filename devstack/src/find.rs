//! Finds the installed servers. Knows nothing of running them.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// An installed server.
pub(crate) struct Installation {
    pub(crate) major: u32,
    /// Postgres' folder of programs, or the path of `redis-server`.
    pub(crate) path: PathBuf,
}

/// The Postgres in the folder `programs`, or the one in `DEVSTACK_PG_BIN`, or the newest installed
/// one from 14 to 18.
pub(crate) fn postgres(programs: Option<&Path>) -> Result<Installation> {
    find(
        "find_postgres",
        programs.map(|path| ("DEVSTACK_PG_BIN", path)),
    )
}

/// The installed Redis, at least 6, or the one that `DEVSTACK_REDIS_SERVER` names.
pub(crate) fn redis() -> Result<Installation> {
    find("find_redis", None)
}

/// Describes the servers that would be used, one per line.
///
/// # Errors
///
/// When a server is missing. The error contains the commands that install it.
pub fn check() -> Result<String> {
    match (postgres(None), redis()) {
        (Ok(postgres), Ok(redis)) => Ok(format!(
            "PostgreSQL {} in {}\nRedis {} at {}",
            postgres.major,
            postgres.path.display(),
            redis.major,
            redis.path.display()
        )),
        (Err(postgres), Err(redis)) => bail!("{postgres}\n{redis}"),
        (Err(error), _) | (_, Err(error)) => Err(error),
    }
}

fn find(function: &str, chosen: Option<(&str, &Path)>) -> Result<Installation> {
    let output = Command::new("/bin/sh")
        .args([
            "-c",
            concat!(include_str!("find.sh"), "\n\"$1\""),
            "find",
            function,
        ])
        .envs(chosen)
        .output()
        .context("cannot run /bin/sh")?;
    if !output.status.success() {
        bail!("{}", String::from_utf8_lossy(&output.stderr).trim_end());
    }
    let line = String::from_utf8(output.stdout)?;
    let (major, path) = line
        .trim_end()
        .split_once(' ')
        .context("find.sh printed no path")?;
    Ok(Installation {
        major: major.parse()?,
        path: path.into(),
    })
}
