//! A way to a server that is longer, on which one can listen, or that loses what is sent on it.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use super::locked;

/// A port that leads to another one here.
pub(crate) struct Way {
    pub(crate) port: u16,
    said: Said,
    /// How many of the connections, from the first on, are silent.
    silent: Arc<AtomicUsize>,
}

/// What each client has said, in the order of their connections.
type Said = Arc<Mutex<Vec<Vec<u8>>>>;

impl Way {
    /// Opens a way on which one can listen.
    pub(crate) async fn to(port: u16) -> Self {
        Self::with_delay(port, Duration::ZERO).await
    }

    /// Opens a way where whatever a client says arrives late.
    pub(crate) async fn with_delay(port: u16, delay: Duration) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("its address");
        let said = Said::default();
        let heard = Arc::clone(&said);
        let silent = Arc::<AtomicUsize>::default();
        let silenced = Arc::clone(&silent);
        tokio::spawn(async move {
            for client in 0.. {
                let Ok((stream, _)) = listener.accept().await else {
                    return;
                };
                locked(&heard).push(Vec::new());
                let lost = Lost {
                    client,
                    silent: Arc::clone(&silenced),
                };
                tokio::spawn(lead(stream, port, delay, Arc::clone(&heard), lost));
            }
        });
        Self {
            port: address.port(),
            said,
            silent,
        }
    }

    /// From now on whatever is said on the connections that are open is lost, and nobody is told.
    pub(crate) fn fall_silent(&self) {
        self.silent
            .store(locked(&self.said).len(), Ordering::Release);
    }

    /// From now on whatever is said is lost, over new connections too, and nobody is told.
    pub(crate) fn fall_silent_for_good(&self) {
        self.silent.store(usize::MAX, Ordering::Release);
    }

    /// What each client has said so far.
    pub(crate) fn said(&self) -> Vec<Vec<u8>> {
        locked(&self.said).clone()
    }
}

/// Whether what a client says is lost.
struct Lost {
    client: usize,
    silent: Arc<AtomicUsize>,
}

async fn lead(
    stream: TcpStream,
    port: u16,
    delay: Duration,
    said: Said,
    lost: Lost,
) -> std::io::Result<()> {
    let server = TcpStream::connect(("127.0.0.1", port)).await?;
    let (mut words, mut hears) = stream.into_split();
    let (mut answers, mut asked) = server.into_split();
    let ask = async {
        let mut bytes = [0; 4096];
        loop {
            let length = words.read(&mut bytes).await?;
            if length == 0 {
                return asked.shutdown().await;
            }
            locked(&said)[lost.client].extend_from_slice(&bytes[..length]);
            if lost.client < lost.silent.load(Ordering::Acquire) {
                continue;
            }
            tokio::time::sleep(delay).await;
            asked.write_all(&bytes[..length]).await?;
        }
    };
    let answer = async { tokio::io::copy(&mut answers, &mut hears).await };
    tokio::try_join!(ask, answer)?;
    Ok(())
}
