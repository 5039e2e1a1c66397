//! What the machine itself keeps waiting while something is measured on it.
//!
//! A disk or a virtual processor that stands still makes every service on it slow. A figure next to
//! what a thread met that did nothing else shows which of the two was slow.

use std::fs::OpenOptions;
use std::io::{Seek as _, Write as _};
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

/// The longest waits that were met.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stalls {
    /// Until 8 KiB were synced to the disk.
    pub sync: Duration,
    /// From when a sleeping thread was due until it ran.
    pub wake: Duration,
}

/// A thread that meets them. It ends when this is dropped, too.
#[derive(Debug)]
pub struct StallWatch {
    /// The thread ends once this is dropped.
    alive: Arc<()>,
    thread: JoinHandle<Stalls>,
}

/// Between two syncs.
const PAUSE: Duration = Duration::from_millis(10);
const BLOCK: [u8; 8192] = [0; 8192];

impl StallWatch {
    /// Starts to write to a file of its own in `folder`.
    ///
    /// # Errors
    ///
    /// If the file cannot be made.
    pub fn start(folder: &Path) -> Result<Self> {
        let path = folder.join(format!("stalls-{}", std::process::id()));
        let mut file = OpenOptions::new()
            .create(true)
            .write(true)
            .truncate(false)
            .open(&path)
            .with_context(|| format!("opening {}", path.display()))?;
        // Nothing else opens it, and it goes with its last descriptor.
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
                // A full disk takes nothing, which is no stall.
                if synced.is_ok() {
                    stalls.sync = stalls.sync.max(woke.elapsed());
                }
            }
            stalls
        });
        Ok(Self { alive, thread })
    }

    /// Ends the thread and returns what it met.
    #[must_use]
    pub fn stop(self) -> Stalls {
        drop(self.alive);
        self.thread.join().unwrap_or_default()
    }
}

impl Stalls {
    /// The longer of each wait.
    #[must_use]
    pub fn max(self, other: Self) -> Self {
        Self {
            sync: self.sync.max(other.sync),
            wake: self.wake.max(other.wake),
        }
    }
}
