//! Where the program is that is measured, where logs are left and which addresses are free.

use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU16, Ordering};

use anyhow::{Context as _, Result, ensure};

/// The folder that cargo builds into, of the profile that this program was built with.
fn built() -> Result<PathBuf> {
    let program = std::env::current_exe()?;
    let folder = program.parent().context("a program without a folder")?;
    // Tests lie one deeper.
    let folder = if folder.ends_with("deps") {
        folder.parent().context("no target folder")?
    } else {
        folder
    };
    Ok(folder.to_owned())
}

/// The program that is measured: beside this one.
///
/// # Errors
///
/// If it is not built.
pub fn visitas() -> Result<PathBuf> {
    let program = built()?.join("visitas");
    ensure!(
        program.exists(),
        "{} is not built: make does it, or cargo build --bin visitas",
        program.display()
    );
    Ok(program)
}

/// Where logs and the like are left: beside what was built.
///
/// # Errors
///
/// If the folder cannot be made.
pub fn scratch() -> Result<PathBuf> {
    let built = built()?;
    let target = built.parent().context("no target folder")?;
    let folder = target.join("bench");
    std::fs::create_dir_all(&folder)?;
    Ok(folder)
}

/// An address that nobody uses. It lies below the range that systems take client ports from, so
/// that whoever waits for it to be served cannot connect to itself.
///
/// # Errors
///
/// If there is none.
pub fn free_address() -> Result<SocketAddr> {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    for _ in 0..1000 {
        let port = 15_000 + NEXT.fetch_add(1, Ordering::Relaxed) % 5000;
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        if TcpListener::bind(address).is_ok() {
            return Ok(address);
        }
    }
    anyhow::bail!("no free port from 15000")
}
