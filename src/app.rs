//! The service as a whole: its routes, and its life from start to stop.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use axum::Router;
use axum::routing::get;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tower::ServiceBuilder;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::limit::RequestBodyLimitLayer;
use tracing::info;

use crate::config::Config;
use crate::recorder::{Writer, recorder};
use crate::server::{self, Limits};
use crate::service::Service;
use crate::store::{Postgres, Redis};
use crate::telemetry::Telemetry;
use crate::telemetry::http::Observer;
use crate::telemetry::metric;
use crate::{error, health, metrics, store, visit};

/// A service that has its addresses and has not begun to serve.
pub struct App {
    config: Config,
    service: Service,
    writer: Writer,
    listener: TcpListener,
    metrics_listener: Option<TcpListener>,
}

/// No handler reads a body; a longer one is refused.
const BODY_LIMIT: usize = 64 * 1024;
/// How often samples are moved to where they are kept: the sooner, the less memory they take.
const SAMPLES_EVERY: Duration = Duration::from_secs(1);
/// How often access lines that were left out are told of when no line follows.
const LEFT_OUT_EVERY: Duration = Duration::from_secs(5);
/// Connections that may wait to be accepted.
const BACKLOG: u32 = 4096;
/// A client that takes nothing of its answer for this long is cut off.
const STALL_TIMEOUT: Duration = Duration::from_secs(10);
/// Descriptors for everything that is not a client connection.
const OTHER_FILES: u64 = 64;

impl App {
    /// Prepares the stores and takes the addresses. No store needs to be there yet.
    ///
    /// # Errors
    ///
    /// If an address is taken or a certificate cannot be used.
    pub fn build(config: Config, telemetry: Arc<Telemetry>) -> anyhow::Result<Self> {
        raise_file_limit(config.http.max_connections);
        let postgres = Arc::new(Postgres::new(&config.postgres));
        let redis = Arc::new(Redis::new(&config.redis)?);
        let (recorder, writer) = recorder(
            Arc::clone(&postgres),
            Arc::clone(&redis),
            config.visit.queue_capacity,
            config.visit.timeout,
        );
        metric::connections_max(config.http.max_connections);
        metric::connections(0);
        let listener = server::bind(config.http.bind_addr, BACKLOG)?;
        let metrics_listener = config
            .http
            .metrics_addr
            .map(|address| server::bind(address, BACKLOG))
            .transpose()?;
        let service = Service::new(recorder, postgres, redis, telemetry);
        Ok(Self {
            config,
            service,
            writer,
            listener,
            metrics_listener,
        })
    }

    /// Serves until `signal` resolves, then stops within `SHUTDOWN_DELAY` + `SHUTDOWN_TIMEOUT`.
    ///
    /// # Errors
    ///
    /// If the service cannot say where it listens, or a part of it ended that never should.
    pub async fn run_until(self, signal: impl Future<Output = ()>) -> anyhow::Result<()> {
        let Self {
            config,
            service,
            writer,
            listener,
            metrics_listener,
        } = self;
        let shutdown = &config.shutdown;
        let limits = Limits {
            max_connections: config.http.max_connections,
            header_timeout: config.http.header_timeout,
            idle_timeout: config.http.idle_timeout,
            stall_timeout: STALL_TIMEOUT,
        };
        info!(
            address = listener.local_addr()?.to_string(),
            metrics.address = metrics_listener
                .as_ref()
                .map(|listener| listener.local_addr().map(|address| address.to_string()))
                .transpose()?,
            version = crate::VERSION,
            revision = crate::REVISION,
            "listening"
        );
        let mut monitoring = tokio::spawn(monitor(service.clone()));
        let mut writing = tokio::spawn(writer.run());
        let slow = config.telemetry.log.access_slow;
        let observer = Observer::new(service.telemetry.sampler(), slow);
        let mut upkeeping = tokio::spawn(upkeep(service.clone(), Arc::clone(&observer)));
        let router = routes(&service, Arc::clone(&observer), metrics_listener.is_none());
        let (metrics_stop, metrics_stopped) = tokio::sync::oneshot::channel::<()>();
        let mut metrics_server = metrics_listener.map(|listener| {
            let router = metrics_routes(&service, Arc::clone(&observer));
            tokio::spawn(async move {
                let stop = async {
                    metrics_stopped.await.ok();
                };
                let drain = Duration::from_millis(100);
                let _drained =
                    server::serve(listener, router, limits, |_open| {}, stop, drain).await;
            })
        });

        let failed = AtomicBool::new(false);
        let stop = async {
            let unexpected = tokio::select! {
                () = signal => None,
                // None ends by itself; a service without one of them is better started again.
                task = first_to_end([
                    ("writer", Some(&mut writing)),
                    ("monitor", Some(&mut monitoring)),
                    ("upkeep", Some(&mut upkeeping)),
                    ("metrics listener", metrics_server.as_mut()),
                ]) => Some(task),
            };
            service.leave();
            if let Some(part) = unexpected {
                tracing::error!(part, "a part of the service ended unexpectedly");
                failed.store(true, Ordering::Release);
            } else {
                info!(delay.seconds = shutdown.delay.as_secs_f64(), "stopping");
                tokio::time::sleep(shutdown.delay).await;
            }
            service.recorder.stop();
        };
        let drain = shutdown.for_requests();
        let drained =
            server::serve(listener, router, limits, metric::connections, stop, drain).await;
        let deadline = Instant::now() + shutdown.for_spans();
        monitoring.abort();
        upkeeping.abort();
        finish_writing(writing, deadline).await;
        let telemetry = Arc::clone(&service.telemetry);
        tokio::task::spawn_blocking(move || {
            telemetry.flush(deadline.saturating_duration_since(Instant::now()));
        })
        .await
        .context("flushing telemetry")?;
        drop(metrics_stop);
        // Polled again after its end it would panic.
        if let Some(server) = metrics_server.filter(|server| !server.is_finished()) {
            server.await.context("serving metrics")?;
        }
        observer.tell_left_out();
        info!(connections.aborted = drained.aborted, "stopped");
        ensure!(
            !failed.load(Ordering::Acquire),
            "a part of the service ended unexpectedly"
        );
        Ok(())
    }
}

/// Waits until one of these tasks has ended, by a panic or otherwise, and returns its name.
async fn first_to_end<const N: usize>(
    mut tasks: [(&'static str, Option<&mut JoinHandle<()>>); N],
) -> &'static str {
    poll_fn(|cx| {
        for (name, task) in &mut tasks {
            if let Some(task) = task
                && Pin::new(&mut **task).poll(cx).is_ready()
            {
                return Poll::Ready(*name);
            }
        }
        Poll::Pending
    })
    .await
}

/// The queue is empty once every request is answered, so this waits only where some were not.
async fn finish_writing(mut writing: JoinHandle<()>, deadline: Instant) {
    if writing.is_finished() {
        return;
    }
    if tokio::time::timeout_at(deadline, &mut writing)
        .await
        .is_err()
    {
        writing.abort();
    }
}

fn routes(service: &Service, observer: Arc<Observer>, with_metrics: bool) -> Router {
    let mut router = Router::new()
        .route("/", get(visit::record).head(visit::head))
        .route("/health", get(health::ready))
        .route("/health/ready", get(health::ready))
        .route("/health/live", get(health::live));
    if with_metrics {
        router = router.route("/metrics", get(metrics::render));
    }
    layered(router.with_state(service.clone()), observer)
}

fn metrics_routes(service: &Service, observer: Arc<Observer>) -> Router {
    let router = Router::new().route("/metrics", get(metrics::render));
    layered(router.with_state(service.clone()), observer)
}

/// The first layer sees a request first: what is observed includes what the others refuse, and a
/// panic is caught before it can pass anything unobserved. They are one stack, since axum allocates
/// anew for each layer that is added by itself.
pub fn layered(router: Router, observer: Arc<Observer>) -> Router {
    router.layer(
        ServiceBuilder::new()
            .layer(observer.layer())
            .map_response(error::not_stored)
            .map_response(error::problem_document)
            .layer(CatchPanicLayer::custom(error::panicked))
            .layer(RequestBodyLimitLayer::new(BODY_LIMIT)),
    )
}

async fn monitor(service: Service) {
    store::watch(&service.postgres, &service.redis).await;
}

async fn upkeep(service: Service, observer: Arc<Observer>) {
    let mut samples = tokio::time::interval(SAMPLES_EVERY);
    let mut left_out = tokio::time::interval(LEFT_OUT_EVERY);
    loop {
        tokio::select! {
            _ = samples.tick() => service.telemetry.upkeep(),
            _ = left_out.tick() => observer.tell_left_out(),
        }
    }
}

/// Each connection is a file. Where the limit cannot be raised far enough, accepting waits for
/// descriptors instead of failing.
fn raise_file_limit(connections: usize) {
    let wanted = connections as u64 + OTHER_FILES;
    match rlimit::increase_nofile_limit(wanted) {
        Ok(limit) if limit < wanted => {
            tracing::warn!(
                limit,
                wanted,
                "the limit on open files is below HTTP_MAX_CONNECTIONS"
            );
        }
        Ok(_) => {}
        Err(error) => tracing::warn!(
            error = error.to_string(),
            "cannot raise the limit on open files"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn task_that_panics_or_returns_is_named() {
        for end in [|| panic!("on purpose"), || {}] {
            let mut stays = tokio::spawn(std::future::pending());
            let mut ends = tokio::spawn(async move { end() });
            let tasks = [
                ("stays", Some(&mut stays)),
                ("absent", None),
                ("ends", Some(&mut ends)),
            ];
            assert_eq!(first_to_end(tasks).await, "ends");
        }
    }
}
