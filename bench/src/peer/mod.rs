//! The peers that the service is compared with: the ceiling and the textbook are subcommands of this
//! program, so that they are built like the service; the others are programs of `bench/peers`.

mod ceiling;
mod program;
mod textbook;

use std::net::SocketAddr;

use anyhow::{Context as _, Result};
use axum::Router;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;

pub(crate) use program::{FAST, Peer};

/// Serves a constant: the maximum of the HTTP library. Does not return.
pub(crate) fn ceiling(address: SocketAddr) -> Result<()> {
    runtime()?.block_on(serve(address, ceiling::router()))
}

/// Serves the textbook version of a visit. Does not return.
pub(crate) fn textbook(address: SocketAddr) -> Result<()> {
    runtime()?.block_on(async {
        let router = textbook::router().await?;
        serve(address, router).await
    })
}

fn runtime() -> Result<Runtime> {
    Runtime::new().context("starting the runtime")
}

async fn serve(address: SocketAddr, router: Router) -> Result<()> {
    let listener = TcpListener::bind(address).await?;
    axum::serve(listener, router).await?;
    Ok(())
}
