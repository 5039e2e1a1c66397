//! Measures the machine's own delays during a measurement.
//!
//! A stalled disk or virtual processor slows every service on the machine. The delays of a thread
//! that does nothing else show whether a slow response is the machine's fault.

use std::fs::OpenOptions;
use std::io::{Seek as _, Write as _};
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

/// The longest delays.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stalls {
    /// Time to sync 8 KiB to the disk.
    pub sync: Duration,
    /// Time from when a sleeping thread was due until it ran.
    pub wake: Duration,
}

/// A thread that measures the delays. It also ends when this value is dropped.
#[derive(Debug)]
pub struct StallWatch {
    /// The thread ends once this `Arc` is dropped.
    alive: Arc<()>,
    thread: JoinHandle<Stalls>,
}

/// The pause between two syncs.
const PAUSE: Duration = Duration::from_millis(10);
const BLOCK: [u8; 8192] = [0; 8192];

impl StallWatch {
    /// Starts a thread that writes to a file in `folder`.
    ///
    /// # Errors
    ///
    /// If the file cannot be created.
    pub fn start(folder: &Path) -> Result<Self> {
        let path = folder.join(format!("stalls-{}", std::process::id()));
        let mut file = OpenOptions::new()
            .create(true)
            .write(true)
            .truncate(false)
            .open(&path)
            .with_context(|| format!("opening {}", path.display()))?;
        // The file stays usable until its descriptor is closed.
        std::fs::remove_file(&path).ok();
        let alive = Arc::new(());
        let watched = Arc::downgrade(&alive);
        let thread = std::thread::spawn(move || {
            let mut stalls = Stalls::default();
            while watched.strong_count() > 0 {
                let due = Instant::now() + PAUSE;
                std::thread::sleep(PAUSE);
                let woke = Instant::now();
                stalls.wake = stalls.wake.max(woke - due);
                let synced = file
                    .rewind()
                    .and_then(|()| file.write_all(&BLOCK))
                    .and_then(|()| file.sync_data());
                // A full disk fails at once: that is no stall.
                if synced.is_ok() {
                    stalls.sync = stalls.sync.max(woke.elapsed());
                }
            }
            stalls
        });
        Ok(Self { alive, thread })
    }

    /// Ends the thread and returns the longest delays.
    #[must_use]
    pub fn stop(self) -> Stalls {
        drop(self.alive);
        self.thread.join().unwrap_or_default()
    }
}

impl Stalls {
    /// The longer of each delay.
    #[must_use]
    pub fn max(self, other: Self) -> Self {
        Self {
            sync: self.sync.max(other.sync),
            wake: self.wake.max(other.wake),
        }
    }
}
