//! Waiting for facts, with a deadline.

use std::net::SocketAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::net::TcpStream;

/// Timeout for events that should happen soon, on a busy machine.
pub const SOON: Duration = Duration::from_secs(10);

/// Polls until `is_so` holds, and panics after `timeout`. It polls often at first, since most facts
/// hold soon, and then less often, to leave time for other tests.
pub async fn eventually(what: &str, timeout: Duration, mut is_so: impl AsyncFnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + timeout;
    let mut pause = Duration::from_millis(2);
    while !is_so().await {
        assert!(
            tokio::time::Instant::now() < deadline,
            "after {timeout:?} still not so: {what}"
        );
        tokio::time::sleep(pause).await;
        pause = (2 * pause).min(Duration::from_millis(50));
    }
}

/// Polls until `is_so` holds, and returns whether it did before `timeout`. It blocks.
pub fn within(timeout: Duration, mut is_so: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + timeout;
    while !is_so() {
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    true
}

/// Waits until a connection is refused. A child process holds a copy of a closed listener between
/// `fork` and `exec`.
pub async fn until_refused(address: SocketAddr) {
    eventually("connections are refused", SOON, async || {
        TcpStream::connect(address).await.is_err()
    })
    .await;
}

/// Locks a mutex, also after a task has panicked while it held the lock.
pub fn locked<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
