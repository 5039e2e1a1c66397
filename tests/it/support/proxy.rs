//! A longer way to a server.

use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

/// Opens a port that leads to another one here, where whatever a client says arrives late.
pub(crate) async fn slow_way_to(port: u16, delay: Duration) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("its address");
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            tokio::spawn(async move {
                let server = TcpStream::connect(("127.0.0.1", port)).await?;
                let (mut said, mut heard) = client.into_split();
                let (mut answers, mut asked) = server.into_split();
                let ask = async {
                    let mut bytes = [0; 4096];
                    loop {
                        let length = said.read(&mut bytes).await?;
                        if length == 0 {
                            return asked.shutdown().await;
                        }
                        tokio::time::sleep(delay).await;
                        asked.write_all(&bytes[..length]).await?;
                    }
                };
                tokio::try_join!(ask, tokio::io::copy(&mut answers, &mut heard))
            });
        }
    });
    address.port()
}
