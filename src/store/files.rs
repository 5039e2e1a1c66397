//! Reads the files of secrets and certificates, away from the threads that serve visits.
//!
//! Must not know: what a file holds.

use std::sync::Arc;

use tokio::sync::Semaphore;

use super::error::{Cause, Error};

/// How many reads can be under way: a new one can begin although four hang.
const READS: usize = 5;

/// The files of one store.
#[derive(Debug, Clone)]
pub(super) struct Files {
    /// A permit is held while a thread reads, so that a file system that hangs blocks few threads.
    reads: Arc<Semaphore>,
}

impl Default for Files {
    fn default() -> Self {
        Self {
            reads: Arc::new(Semaphore::new(READS)),
        }
    }
}

impl Files {
    /// Runs `read`, which blocks, on a thread of its own.
    pub(super) async fn read<T: Send + 'static>(
        &self,
        read: impl FnOnce() -> Result<T, String> + Send + 'static,
    ) -> Result<T, Error> {
        // The semaphore is never closed.
        let permit = Arc::clone(&self.reads).acquire_owned().await.ok();
        let read = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            read()
        });
        match read.await {
            Ok(read) => read.map_err(|why| Error::Connection(Cause::from(why))),
            Err(error) => Err(Error::Connection(error.into())),
        }
    }
}

/// The error of files that could not be read in time.
pub(super) fn unread(files: &str) -> String {
    format!("{files} could not be read in time: check the file system")
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    #[test]
    fn files_that_could_not_be_read_are_named() {
        let error = unread("DB_PASSWORD_FILE (/run/secret)");
        assert!(
            error.starts_with("DB_PASSWORD_FILE (/run/secret) could not be read in time"),
            "{error}"
        );
    }

    #[tokio::test]
    async fn new_read_begins_although_four_hang() {
        let files = Files::default();
        let wait = Duration::from_millis(50);
        let mut ends = Vec::new();
        for _ in 1..READS {
            let (end, ended) = mpsc::channel::<()>();
            ends.push(end);
            let hangs = files.read(move || ended.recv().map_err(|error| error.to_string()));
            timeout(wait, hangs).await.expect_err("it hangs");
        }
        let read = timeout(Duration::from_secs(10), files.read(|| Ok(7))).await;
        assert_eq!(read.expect("a read").expect("a result"), 7);

        let (end, ended) = mpsc::channel::<()>();
        let hangs = files.read(move || ended.recv().map_err(|error| error.to_string()));
        timeout(wait, hangs).await.expect_err("it hangs");
        timeout(wait, files.read(|| Ok(7)))
            .await
            .expect_err("too many hang");
        drop(end);
        let read = timeout(Duration::from_secs(10), files.read(|| Ok(7))).await;
        assert_eq!(read.expect("a read").expect("a result"), 7);
    }
}
