//! The service as a whole: its routes, and its life from start to stop.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use axum::Router;
use axum::routing::get;
use tokio::net::TcpListener;
use tokio::task::{AbortHandle, JoinHandle};
use tokio::time::{Instant, MissedTickBehavior};
use tower::ServiceBuilder;
use tower_http::catch_panic::CatchPanicLayer;
use tracing::info;

use crate::config::Config;
use crate::lifecycle::{Lifecycle, Phase};
use crate::recorder::{Writer, recorder};
use crate::server::{self, Drained, Events, Limits, Stop};
use crate::service::Service;
use crate::store::{Postgres, Redis};
use crate::telemetry::Telemetry;
use crate::telemetry::http::Observer;
use crate::telemetry::metric;
use crate::telemetry::rejections::Rejections;
use crate::{error, health, metrics, store, visit};

/// A service that has its addresses and has not begun to serve.
pub struct App {
    config: Config,
    capacity: Capacity,
    service: Service,
    writer: Writer,
    listener: TcpListener,
    metrics_listener: Option<TcpListener>,
}

/// How often samples are moved to where they are kept (the sooner, the less memory they take), and
/// how often refused requests are reported.
const UPKEEP_EVERY: Duration = Duration::from_secs(1);
/// How often access lines that were left out are told of when no line follows.
const LEFT_OUT_EVERY: Duration = Duration::from_secs(5);
/// Connections that may wait to be accepted.
const BACKLOG: u32 = 4096;
/// A client that takes nothing of its answer for this long is cut off.
const STALL_TIMEOUT: Duration = Duration::from_secs(10);
/// Descriptors for everything that is not a client connection.
const OTHER_FILES: usize = 64;
/// Connections that scrapers can have open, where `METRICS_ADDR` gives them a listener of their own.
const SCRAPERS_MAX: usize = 64;
/// What is left of the time to drain when visits whose store does not answer are given up, so that
/// their clients get a response; a fifth of that time where this is less.
const LAST_RESPONSES: Duration = Duration::from_millis(250);

impl App {
    /// Prepares the stores and takes the addresses. No store needs to be there yet.
    ///
    /// # Errors
    ///
    /// If an address is taken or a certificate cannot be used.
    pub fn build(config: Config, telemetry: Arc<Telemetry>) -> anyhow::Result<Self> {
        let capacity = Capacity::new(
            config.http.max_connections,
            config.http.metrics_addr.is_some(),
        );
        let postgres = Arc::new(Postgres::new(&config.postgres));
        let redis = Arc::new(Redis::new(&config.redis)?);
        let (recorder, writer) = recorder(
            Arc::clone(&postgres),
            Arc::clone(&redis),
            config.visit.queue_capacity,
            config.visit.timeout,
        );
        metric::connections_max(capacity.visitors);
        metric::connections(0);
        let listener = server::bind(config.http.bind_addr, BACKLOG)?;
        let metrics_listener = config
            .http
            .metrics_addr
            .map(|address| server::bind(address, BACKLOG))
            .transpose()?;
        let lifecycle = Lifecycle::default();
        let service = Service::new(recorder, postgres, redis, telemetry, lifecycle);
        Ok(Self {
            config,
            capacity,
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
            capacity,
            service,
            writer,
            listener,
            metrics_listener,
        } = self;
        let shutdown = &config.shutdown;
        let limits = Limits {
            max_connections: capacity.visitors,
            header_timeout: config.http.header_timeout,
            idle_timeout: config.http.idle_timeout,
            stall_timeout: STALL_TIMEOUT,
        };
        log_addresses(&listener, metrics_listener.as_ref())?;
        let slow = config.telemetry.log.access_slow;
        let observer = Observer::new(service.telemetry.sampler(), slow);
        let rejections = Arc::new(Rejections::default());
        let lifecycle = &service.lifecycle;
        let scrapers = metrics_listener.is_some();
        let mut parts = Parts {
            writer: tokio::spawn(writer.run()),
            monitor: tokio::spawn(monitor(service.clone())),
            upkeep: tokio::spawn(upkeep(
                service.clone(),
                Arc::clone(&observer),
                Arc::clone(&rejections),
            )),
            scrapes: metrics_listener.map(|listener| {
                tokio::spawn(server::serve(
                    listener,
                    metrics_routes(&service, Arc::clone(&observer)),
                    Limits {
                        max_connections: capacity.scrapers,
                        ..limits
                    },
                    events(&rejections, |_open| {}),
                    Stop {
                        lifecycle: lifecycle.clone(),
                        leave_at: Phase::Leaving,
                        drain_at: Phase::Ended,
                        drain: shutdown.for_scrapes(),
                    },
                ))
            }),
        };
        let drain = shutdown.for_requests();
        let serving = server::serve(
            listener,
            routes(&service, Arc::clone(&observer), !scrapers),
            limits,
            events(&rejections, metric::connections),
            Stop {
                leave_at: Phase::Leaving,
                drain_at: Phase::Draining,
                drain,
                lifecycle: lifecycle.clone(),
            },
        );
        let writer = parts.writer.abort_handle();
        let (unexpected, drained) = tokio::select! {
            stopped = async {
                tokio::join!(stop(signal, &mut parts, lifecycle, shutdown.delay), serving)
            } => stopped,
            never = abandon_visits(writer, lifecycle, drain) => match never {},
        };
        // No request is left that could bring a visit.
        service.recorder.stop();
        let deadline = Instant::now() + shutdown.for_spans();
        let unexpected = unexpected.or_else(|| parts.ended_while_draining());
        parts.monitor.abort();
        parts.upkeep.abort();
        finish_writing(parts.writer, deadline).await;
        let telemetry = Arc::clone(&service.telemetry);
        tokio::task::spawn_blocking(move || {
            telemetry.flush(deadline.saturating_duration_since(Instant::now()));
        })
        .await
        .context("flushing telemetry")?;
        lifecycle.enter(Phase::Ended);
        // A task that is polled again after its end panics.
        if let Some(scrapes) = parts.scrapes.filter(|scrapes| !scrapes.is_finished()) {
            let _drained = scrapes.await.context("serving metrics")?;
        }
        observer.tell_left_out();
        rejections.report();
        info!(connections.aborted = drained.aborted, "stopped");
        ensure!(
            unexpected.is_none(),
            "a part of the service ended unexpectedly"
        );
        Ok(())
    }
}

fn log_addresses(listener: &TcpListener, metrics_listener: Option<&TcpListener>) -> io::Result<()> {
    info!(
        address = listener.local_addr()?.to_string(),
        metrics.address = metrics_listener
            .map(|listener| listener.local_addr().map(|address| address.to_string()))
            .transpose()?,
        version = crate::VERSION,
        revision = crate::REVISION,
        "listening"
    );
    Ok(())
}

/// The tasks without which the service does not work. None of them ends by itself.
struct Parts {
    writer: JoinHandle<()>,
    monitor: JoinHandle<()>,
    upkeep: JoinHandle<()>,
    /// The listener for scrapers, where they have one of their own.
    scrapes: Option<JoinHandle<Drained>>,
}

impl Parts {
    /// Names a part that has ended although the service still needed it. The writer does not count:
    /// it is ended where visits wait for a store that does not answer.
    fn ended_while_draining(&self) -> Option<&'static str> {
        let part = if self.monitor.is_finished() {
            "monitor"
        } else if self.upkeep.is_finished() {
            "upkeep"
        } else {
            return None;
        };
        tracing::error!(part, "a part of the service ended unexpectedly");
        Some(part)
    }

    /// Waits until one ends, and names it.
    async fn one_ended(&mut self) -> &'static str {
        tokio::select! {
            _ = &mut self.writer => "writer",
            _ = &mut self.monitor => "monitor",
            _ = &mut self.upkeep => "upkeep",
            Some(_) = async { Some(self.scrapes.as_mut()?.await) } => "metrics listener",
        }
    }
}

/// Takes the service from serving to draining: when `signal` resolves, or without delay when a part
/// ends, which it names. A service without that part is better started again.
async fn stop(
    signal: impl Future<Output = ()>,
    parts: &mut Parts,
    lifecycle: &Lifecycle,
    delay: Duration,
) -> Option<&'static str> {
    let mut unexpected = tokio::select! {
        () = signal => None,
        part = parts.one_ended() => Some(part),
    };
    lifecycle.enter(Phase::Leaving);
    if unexpected.is_none() {
        info!(delay.seconds = delay.as_secs_f64(), "stopping");
        unexpected = tokio::select! {
            () = tokio::time::sleep(delay) => None,
            part = parts.one_ended() => Some(part),
        };
    }
    if let Some(part) = unexpected {
        tracing::error!(part, "a part of the service ended unexpectedly");
    }
    lifecycle.enter(Phase::Draining);
    unexpected
}

/// Ends the writer shortly before the time to drain is over. Visits that still wait for a store then
/// get a response while there is time to send one.
async fn abandon_visits(writer: AbortHandle, lifecycle: &Lifecycle, drain: Duration) -> Infallible {
    lifecycle.reached(Phase::Draining).await;
    tokio::time::sleep(drain.saturating_sub(LAST_RESPONSES.min(drain / 5))).await;
    writer.abort();
    std::future::pending().await
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
/// again for each layer that is added by itself.
pub fn layered(router: Router, observer: Arc<Observer>) -> Router {
    router.layer(
        ServiceBuilder::new()
            .layer(observer.layer())
            .map_response(error::not_stored)
            .map_response(error::problem_document)
            .layer(CatchPanicLayer::custom(error::panicked)),
    )
}

async fn monitor(service: Service) {
    store::watch(&service.postgres, &service.redis).await;
}

/// What a server reports goes to the metrics and, refused requests, to the log.
fn events(
    rejections: &Arc<Rejections>,
    connections: impl Fn(usize) + Send + Sync + 'static,
) -> Events {
    let rejections = Arc::clone(rejections);
    Events {
        connections: Box::new(connections),
        rejected: Box::new(move |reason| rejections.count(reason)),
    }
}

async fn upkeep(service: Service, observer: Arc<Observer>, rejections: Arc<Rejections>) {
    let mut upkeep = tokio::time::interval(UPKEEP_EVERY);
    // After a pause of this task it goes on at this pace, so that reports stay a second apart.
    upkeep.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut left_out = tokio::time::interval(LEFT_OUT_EVERY);
    loop {
        tokio::select! {
            _ = upkeep.tick() => {
                service.telemetry.upkeep();
                rejections.report();
            }
            _ = left_out.tick() => observer.tell_left_out(),
        }
    }
}

/// How many connections each listener can have open: together no more than the limit on open files
/// allows, since each is a file.
#[derive(Debug, Clone, Copy)]
struct Capacity {
    visitors: usize,
    scrapers: usize,
}

impl Capacity {
    /// Raises the limit on open files as far as it is needed and allowed.
    fn new(max_connections: usize, with_scrapers: bool) -> Self {
        let scrapers = if with_scrapers { SCRAPERS_MAX } else { 0 };
        let wanted = max_connections + scrapers + OTHER_FILES;
        let limit = match rlimit::increase_nofile_limit(wanted as u64) {
            Ok(limit) => usize::try_from(limit).unwrap_or(usize::MAX),
            Err(error) => {
                tracing::warn!(
                    error = error.to_string(),
                    "cannot raise the limit on open files"
                );
                wanted
            }
        };
        let capacity = Self::within(limit, max_connections, scrapers);
        if capacity.visitors < max_connections {
            tracing::warn!(
                limit,
                wanted,
                connections = capacity.visitors,
                "the limit on open files is below HTTP_MAX_CONNECTIONS"
            );
        }
        capacity
    }

    /// Scrapers have a quarter at most, and each listener has one in any case.
    fn within(limit: usize, max_connections: usize, scrapers: usize) -> Self {
        let files = limit.saturating_sub(OTHER_FILES);
        let scrapers = scrapers.min((files / 4).max(1));
        Self {
            visitors: max_connections.min(files.saturating_sub(scrapers).max(1)),
            scrapers,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn part_that_panics_or_returns_is_named() {
        for end in [|| panic!("on purpose"), || {}] {
            let stays = || tokio::spawn(std::future::pending());
            let mut parts = Parts {
                writer: stays(),
                monitor: stays(),
                upkeep: tokio::spawn(async move { end() }),
                scrapes: None,
            };
            assert_eq!(parts.one_ended().await, "upkeep");
        }
    }

    #[test]
    fn listeners_together_fit_the_file_limit() {
        for limit in [66, 70, 100, 128, 1024, 16_511, 16_512, 1 << 20] {
            for (max_connections, scrapers) in
                [(1, 0), (300, 0), (16_384, 0), (16_384, 64), (3, 64)]
            {
                let capacity = Capacity::within(limit, max_connections, scrapers);
                assert!(
                    capacity.visitors + capacity.scrapers + OTHER_FILES <= limit,
                    "{capacity:?}"
                );
                assert!(capacity.visitors >= 1 && capacity.scrapers >= scrapers.min(1));
            }
        }
        let roomy = Capacity::within(1 << 20, 16_384, 64);
        assert_eq!((roomy.visitors, roomy.scrapers), (16_384, 64));
    }
}
