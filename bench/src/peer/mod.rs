//! What the service is measured beside: this program under another subcommand, so that a peer is
//! built as the service is.

mod ceiling;
mod textbook;

use std::net::SocketAddr;

use anyhow::{Context as _, Result};
use axum::Router;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;

/// Serves a constant: what the HTTP library can do at most. Does not return.
pub(crate) fn ceiling(address: SocketAddr) -> Result<()> {
    runtime()?.block_on(serve(address, ceiling::router()))
}

/// Serves visits as they are written first. Does not return.
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
