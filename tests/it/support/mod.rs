//! Servers, programs and questions for the tests. It asserts nothing about what is tested.

pub(crate) mod collector;
mod ended;
pub(crate) mod exposition;
pub(crate) mod load;
pub(crate) mod prometheus;
mod proxy;
mod service;
pub(crate) mod traces;
mod wire;
mod world;

use std::net::SocketAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::net::TcpStream;

pub(crate) use self::ended::{Ended, settings};
pub(crate) use self::proxy::Way;
pub(crate) use self::service::{Answer, Reader, Service, program};
pub(crate) use self::wire::Wire;
pub(crate) use self::world::{HeldCount, World, execute, without_stores};

/// How long a test waits for what should happen soon, on a machine that is busy with other tests.
pub(crate) const SOON: Duration = Duration::from_secs(10);

/// Polls until `is_so` holds, for at most `patience`: often at first, since most facts are soon there,
/// and then less often, since a poll costs time that other tests need.
pub(crate) async fn eventually(
    what: &str,
    patience: Duration,
    mut is_so: impl AsyncFnMut() -> bool,
) {
    let deadline = tokio::time::Instant::now() + patience;
    let mut pause = Duration::from_millis(2);
    while !is_so().await {
        assert!(
            tokio::time::Instant::now() < deadline,
            "after {patience:?} still not so: {what}"
        );
        tokio::time::sleep(pause).await;
        pause = (2 * pause).min(Duration::from_millis(50));
    }
}

/// Waits until nobody can connect. A process that another test is just starting has a copy of a
/// listener that was closed here, until it becomes the program that it is to be.
pub(crate) async fn until_refused(address: SocketAddr) {
    eventually("connections are refused", SOON, async || {
        TcpStream::connect(address).await.is_err()
    })
    .await;
}

/// What a test's own task guards is whole even where another has panicked.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
