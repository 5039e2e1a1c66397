//! A way to a server that is longer, or on which one can listen.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use super::locked;

/// A port that leads to another one here.
pub(crate) struct Way {
    pub(crate) port: u16,
    said: Said,
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
        tokio::spawn(async move {
            for client in 0.. {
                let Ok((stream, _)) = listener.accept().await else {
                    return;
                };
                locked(&heard).push(Vec::new());
                tokio::spawn(lead(stream, port, delay, Arc::clone(&heard), client));
            }
        });
        Self {
            port: address.port(),
            said,
        }
    }

    /// What each client has said so far.
    pub(crate) fn said(&self) -> Vec<Vec<u8>> {
        locked(&self.said).clone()
    }
}

async fn lead(
    stream: TcpStream,
    port: u16,
    delay: Duration,
    said: Said,
    client: usize,
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
            locked(&said)[client].extend_from_slice(&bytes[..length]);
            tokio::time::sleep(delay).await;
            asked.write_all(&bytes[..length]).await?;
        }
    };
    let answer = async { tokio::io::copy(&mut answers, &mut hears).await };
    tokio::try_join!(ask, answer)?;
    Ok(())
}
