//! A disk whose power can be cut: ext4 in an image that lies on XFS.
//!
//! The page cache of the ext4 survives `kill -9`, so killing processes never shows a missing flush.
//! A copy of the image has only what reached the device. `FICLONE`, which `cp --reflink=always` uses,
//! takes that copy at one instant: XFS locks the file, writes what it has of it, and shares its blocks. A write that
//! reached the device counts as kept, even if the device was not told to flush: such a device has no
//! volatile cache of its own.
//!
//! Runs inside the namespaces of `isolate`, which unmount everything. Must not know what is stored.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail, ensure};
use lab::wait::within;
use rustix::fs::ioctl_ficlone;

/// Both images are sparse.
const STORE_SIZE: u64 = 12 << 30;
const DISK_SIZE: u64 = 3 << 30;
/// A killed process keeps its files open for a moment.
const UNMOUNT_TIMEOUT: Duration = Duration::from_secs(10);

/// A mounted disk.
pub struct Disk {
    /// Where the XFS with the images is mounted.
    store: PathBuf,
    /// Where the disk itself is mounted.
    mount: PathBuf,
    image: PathBuf,
    images: usize,
}

/// What a power cut would leave of the disk.
pub struct Remains(PathBuf);

impl Disk {
    /// Makes an empty disk in a folder that the servers' account can reach.
    pub fn create(folder: &Path) -> Result<Self> {
        let [store, mount] = ["images", "disk"].map(|name| folder.join(name));
        fs::create_dir_all(&store)?;
        fs::create_dir_all(&mount)?;
        let since = SystemTime::now().duration_since(UNIX_EPOCH)?;
        let backing = folder.join(format!("backing-{}", since.as_nanos()));
        File::create(&backing)?.set_len(STORE_SIZE)?;
        let mounted = run("mkfs.xfs", &["-q", "-m", "reflink=1", text(&backing)])
            .and_then(|()| run("mount", &["-o", "loop", text(&backing), text(&store)]));
        // The mount keeps the space until it ends, and nothing else does.
        fs::remove_file(&backing)?;
        mounted?;
        let mut disk = Self {
            image: store.join("none"),
            store,
            mount,
            images: 0,
        };
        let empty = disk.format()?;
        disk.mount(empty)?;
        Ok(disk)
    }

    /// Where its files are.
    pub fn folder(&self) -> &Path {
        &self.mount
    }

    /// Writes everything that the page cache has of the disk.
    pub fn sync(&self) -> Result<()> {
        run("sync", &["-f", text(&self.mount)])
    }

    /// Copies what has reached the device at one instant, and returns a time just before that.
    pub fn cut(&mut self) -> Result<(Instant, Remains)> {
        let copy = self.next_image();
        let (image, target) = (File::open(&self.image)?, File::create(&copy)?);
        // What the device has is written now, so that little is left to write in the call below.
        image.sync_data()?;
        let cut = Instant::now();
        ioctl_ficlone(&target, &image).context("FICLONE")?;
        Ok((cut, Remains(copy)))
    }

    /// Mounts what a cut has left in place of the disk. No process may use the disk any more.
    pub fn replace(&mut self, Remains(copy): Remains) -> Result<()> {
        self.unmount()?;
        self.mount(copy)
    }

    /// Replaces the disk by an empty one.
    pub fn replace_by_empty(&mut self) -> Result<()> {
        self.unmount()?;
        let empty = self.format()?;
        self.mount(empty)
    }

    fn format(&mut self) -> Result<PathBuf> {
        let image = self.next_image();
        File::create(&image)?.set_len(DISK_SIZE)?;
        run("mkfs.ext4", &["-q", "-F", text(&image)])?;
        Ok(image)
    }

    fn next_image(&mut self) -> PathBuf {
        self.images += 1;
        self.store.join(format!("disk-{}", self.images))
    }

    fn mount(&mut self, image: PathBuf) -> Result<()> {
        run("mount", &["-o", "loop", text(&image), text(&self.mount)])?;
        self.image = image;
        Ok(())
    }

    fn unmount(&mut self) -> Result<()> {
        let mut last = Ok(());
        within(UNMOUNT_TIMEOUT, || {
            last = run("umount", &[text(&self.mount)]);
            last.is_ok()
        });
        last?;
        fs::remove_file(&self.image)?;
        Ok(())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Best effort: the end of the namespace unmounts both.
        for mount in [&self.mount, &self.store] {
            run("umount", &["--lazy", text(mount)]).ok();
        }
    }
}

/// Runs a command, and returns its error output if it fails.
pub fn run(program: &str, arguments: &[&str]) -> Result<()> {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .with_context(|| format!("cannot run {program}"))?;
    if !output.status.success() {
        let errors = String::from_utf8_lossy(&output.stderr);
        bail!("{program} {}: {}", arguments.join(" "), errors.trim());
    }
    Ok(())
}

/// The folder for the disks of this clone.
pub fn folder() -> Result<PathBuf> {
    let folder = devstack::folder()?.join("proof");
    fs::create_dir_all(&folder)?;
    ensure!(folder.to_str().is_some(), "the folder's path is not UTF-8");
    Ok(folder)
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap_or_default()
}
