//! The peers that the service is compared with: subcommands of this program, so that a peer is
//! built like the service.

mod ceiling;
mod textbook;

use std::net::SocketAddr;

use anyhow::{Context as _, Result};
use axum::Router;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;

/// Serves a constant: the maximum of the HTTP library. Does not return.
pub(crate) fn ceiling(address: SocketAddr) -> Result<()> {
    runtime()?.block_on(serve(address, ceiling::router()))
}

/// Serves the textbook version of a visit. Does not return.
pub(crate) fn textbook(address: SocketAddr, database: &str, redis: &str) -> Result<()> {
    runtime()?.block_on(async {
        let router = textbook::router(database, redis).await?;
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
