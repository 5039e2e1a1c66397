//! Ports of this machine that are free.

use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::{AtomicU16, Ordering};

use anyhow::{Context as _, Result};

/// The first port and the number of ports. They lie below the system's range of client ports, so
/// that a client that retries one of them cannot connect to itself, and below the stores' ports
/// (`devstack`).
const FIRST: u16 = 15_000;
const COUNT: u16 = 5_000;

/// Returns an address that no process listens on, each only once.
pub fn free_address() -> Result<SocketAddr> {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    // Concurrent processes begin at different ports.
    let first = std::process::id() * 97 % u32::from(COUNT);
    let first = u16::try_from(first)?;
    (0..COUNT)
        .map(|_| FIRST + (first + NEXT.fetch_add(1, Ordering::Relaxed) % COUNT) % COUNT)
        .map(|port| SocketAddr::from(([127, 0, 0, 1], port)))
        .find(|address| TcpListener::bind(address).is_ok())
        .context("no free port from 15000 to 19999")
}
