//! Reads the files of secrets and certificates, away from the threads that serve visits.
//!
//! Must not know: what a file holds.

use std::sync::Arc;

use tokio::sync::Mutex;

use super::error::{Cause, Error};

/// The files of one store.
#[derive(Debug, Clone, Default)]
pub(super) struct Files {
    /// Held while a thread reads, so that a file system that hangs blocks one thread at most.
    reading: Arc<Mutex<()>>,
}

impl Files {
    /// Runs `read`, which blocks, on a thread of its own.
    pub(super) async fn read<T: Send + 'static>(
        &self,
        read: impl FnOnce() -> Result<T, String> + Send + 'static,
    ) -> Result<T, Error> {
        let reading = Arc::clone(&self.reading).lock_owned().await;
        let read = tokio::task::spawn_blocking(move || {
            let _reading = reading;
            read()
        });
        match read.await {
            Ok(read) => read.map_err(|why| Error::Connection(Cause::from(why))),
            Err(error) => Err(Error::Connection(error.into())),
        }
    }
}
