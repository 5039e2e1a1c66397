//! Builds the parts of the service, runs them until it is stopped, and ends them in order.
//!
//! Must not know: SQL, Redis commands and what a handler responds.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, ensure};
use tokio::net::TcpListener;
use tokio::task::{AbortHandle, JoinHandle};
use tokio::time::{Instant, MissedTickBehavior};
use tracing::info;

use crate::config::Config;
use crate::lifecycle::{Lifecycle, Phase};
use crate::metrics::catalog::{CONNECTIONS, CONNECTIONS_MAX};
use crate::rates::Rates;
use crate::recorder::{Writer, recorder};
use crate::routes::{AppState, Feed, Parts, Renderings};
use crate::server::{self, Capacity, DrainReport, Events, Limits, Rejections, Stop};
use crate::store::{Postgres, Redis};
use crate::telemetry::Telemetry;
use crate::telemetry::request::Observer;
use crate::{routes, store};

/// A service that has bound its addresses and does not serve yet.
pub struct App {
    config: Config,
    capacity: Capacity,
    state: AppState,
    writer: Writer<Postgres, Redis>,
    listener: TcpListener,
    metrics_listener: Option<TcpListener>,
}

/// How often histograms fold the samples recorded since (until then each sample takes memory), and
/// how often rejected requests are reported.
const UPKEEP_INTERVAL: Duration = Duration::from_secs(1);
/// How often to report suppressed access-log lines while no further line is written.
const SUPPRESSED_INTERVAL: Duration = Duration::from_secs(5);
/// Connections that can wait to be accepted.
const BACKLOG: u32 = 4096;
/// A client that reads no byte of its response for this long is disconnected.
const STALL_TIMEOUT: Duration = Duration::from_secs(10);
/// The writer is aborted this long before the drain deadline, or a fifth of the drain timeout
/// before it if that is less, so that visits whose store hangs still get a response.
const LAST_RESPONSES: Duration = Duration::from_millis(250);

impl App {
    /// Prepares the stores and binds the addresses. No store needs to be up yet.
    ///
    /// # Errors
    ///
    /// If an address is in use or a certificate cannot be used.
    pub fn build(config: Config, telemetry: Arc<Telemetry>) -> anyhow::Result<Self> {
        let capacity = Capacity::new(
            config.http.http_max_connections,
            config.http.metrics_addr.is_some(),
        );
        let postgres = Arc::new(Postgres::new(&config.postgres));
        let redis = Arc::new(Redis::new(&config.redis)?);
        let rates = Arc::new(Rates::new()?);
        let (recorder, writer) = recorder(
            Arc::clone(&postgres),
            Arc::clone(&redis),
            &rates,
            config.visit.queue_capacity,
            config.visit.visit_timeout,
        );
        let listener = server::bind(config.http.listen.bind_addr, BACKLOG)?;
        let metrics_listener = config
            .http
            .metrics_addr
            .map(|address| server::bind(address, BACKLOG))
            .transpose()?;
        // Streams stay open, so that without this limit they could take every connection.
        let max_streams = config.page.page_streams_max.min(capacity.visitors / 2);
        let state = Parts {
            recorder,
            rates,
            postgres,
            redis,
            telemetry,
            renderings: Renderings::default(),
            lifecycle: Lifecycle::default(),
            feed: Feed::new(max_streams),
            page: config.page.clone(),
            has_metrics: metrics_listener.is_none(),
            access_slow: config.telemetry.log.access_slow,
            started: SystemTime::now(),
        };
        Ok(Self {
            config,
            capacity,
            state: state.into(),
            writer,
            listener,
            metrics_listener,
        })
    }

    /// Serves until `signal` resolves, then stops within `SHUTDOWN_DELAY` + `SHUTDOWN_TIMEOUT`.
    ///
    /// # Errors
    ///
    /// If the bound address cannot be read, or a task exited unexpectedly.
    pub async fn run_until(self, signal: impl Future<Output = ()>) -> anyhow::Result<()> {
        let Self {
            config,
            capacity,
            state,
            writer,
            listener,
            metrics_listener,
        } = self;
        log_addresses(&listener, metrics_listener.as_ref())?;
        let shutdown = &config.shutdown;
        let limits = Limits {
            max_connections: capacity.visitors,
            header_timeout: config.http.header_timeout,
            idle_timeout: config.http.idle_timeout,
            stall_timeout: STALL_TIMEOUT,
        };
        let slow = config.telemetry.log.access_slow;
        let observer = Observer::new(state.telemetry.sampler(), slow);
        let rejections = Arc::new(Rejections::default());
        let lifecycle = &state.lifecycle;
        CONNECTIONS_MAX.with([]).set(capacity.visitors as f64);
        let connections = CONNECTIONS.with([]);
        let mut tasks = Tasks {
            writer: tokio::spawn(writer.run()),
            monitor: tokio::spawn(store::watch(
                Arc::clone(&state.postgres),
                Arc::clone(&state.redis),
            )),
            upkeep: tokio::spawn(upkeep(
                state.clone(),
                Arc::clone(&observer),
                Arc::clone(&rejections),
            )),
            metrics_server: metrics_listener.map(|listener| {
                tokio::spawn(server::serve(
                    listener,
                    routes::metrics_router(&state, Arc::clone(&observer)),
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
            routes::main_router(&state, Arc::clone(&observer)),
            limits,
            events(&rejections, move |open| connections.set(open as f64)),
            Stop {
                lifecycle: lifecycle.clone(),
                leave_at: Phase::Leaving,
                drain_at: Phase::Draining,
                drain,
            },
        );
        let writer = tasks.writer.abort_handle();
        let (exited, drained) = tokio::select! {
            stopped = async {
                tokio::join!(leave(signal, &mut tasks, lifecycle, shutdown.shutdown_delay), serving)
            } => stopped,
            never = end_writer(writer, lifecycle, drain) => match never {},
        };
        // Every request has ended, so no further visit arrives.
        state.recorder.stop();
        let deadline = Instant::now() + shutdown.for_spans();
        let exited = exited.or_else(|| tasks.exited_while_draining());
        tasks.monitor.abort();
        tasks.upkeep.abort();
        finish_writing(tasks.writer, deadline).await;
        let telemetry = Arc::clone(&state.telemetry);
        tokio::task::spawn_blocking(move || {
            telemetry.flush(deadline.saturating_duration_since(Instant::now()));
        })
        .await
        .context("flushing telemetry")?;
        lifecycle.enter(Phase::Ended);
        // A join handle panics if it is polled again after its task has ended.
        if let Some(server) = tasks.metrics_server.filter(|server| !server.is_finished()) {
            let _drained = server.await.context("serving metrics")?;
        }
        observer.report_suppressed();
        rejections.report();
        info!(connections.aborted = drained.aborted, "stopped");
        ensure!(exited.is_none(), "a task exited unexpectedly");
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

/// The tasks without which the service does not work. None exits by itself.
struct Tasks {
    writer: JoinHandle<()>,
    monitor: JoinHandle<()>,
    upkeep: JoinHandle<()>,
    /// Serves `METRICS_ADDR`, where that is set.
    metrics_server: Option<JoinHandle<DrainReport>>,
}

impl Tasks {
    /// Waits until a task exits, and names it.
    async fn wait_for_exit(&mut self) -> &'static str {
        tokio::select! {
            _ = &mut self.writer => "writer",
            _ = &mut self.monitor => "monitor",
            _ = &mut self.upkeep => "upkeep",
            Some(_) = async { Some(self.metrics_server.as_mut()?.await) } => "metrics server",
        }
    }

    /// Names a task that exited while the service drained. The writer is not checked: it is aborted
    /// when visits wait for a store that hangs.
    fn exited_while_draining(&self) -> Option<&'static str> {
        let exited = if self.monitor.is_finished() {
            "monitor"
        } else if self.upkeep.is_finished() {
            "upkeep"
        } else {
            return None;
        };
        log_exit(exited);
        Some(exited)
    }
}

fn log_exit(task: &'static str) {
    tracing::error!(task, "task exited unexpectedly");
}

/// Takes the service from serving to draining when `signal` resolves, or without delay when a task
/// exits: a service without that task is better restarted. Returns the name of that task.
async fn leave(
    signal: impl Future<Output = ()>,
    tasks: &mut Tasks,
    lifecycle: &Lifecycle,
    delay: Duration,
) -> Option<&'static str> {
    let mut exited = tokio::select! {
        () = signal => None,
        task = tasks.wait_for_exit() => Some(task),
    };
    lifecycle.enter(Phase::Leaving);
    if exited.is_none() {
        info!(delay.seconds = delay.as_secs_f64(), "stopping");
        exited = tokio::select! {
            () = tokio::time::sleep(delay) => None,
            task = tasks.wait_for_exit() => Some(task),
        };
    }
    if let Some(task) = exited {
        log_exit(task);
    }
    lifecycle.enter(Phase::Draining);
    exited
}

/// Aborts the writer shortly before the drain deadline, so that visits that still wait for a store
/// get a response in time.
async fn end_writer(writer: AbortHandle, lifecycle: &Lifecycle, drain: Duration) -> Infallible {
    lifecycle.wait_for(Phase::Draining).await;
    tokio::time::sleep(drain.saturating_sub(LAST_RESPONSES.min(drain / 5))).await;
    writer.abort();
    std::future::pending().await
}

/// Waits for the writer until `deadline`, then aborts it. The queue is empty once every request has
/// its response, so this waits only if some requests were cut.
async fn finish_writing(mut writer: JoinHandle<()>, deadline: Instant) {
    if !writer.is_finished()
        && tokio::time::timeout_at(deadline, &mut writer)
            .await
            .is_err()
    {
        writer.abort();
    }
}

/// Sends a server's reports to the metrics and, for rejected requests, to the log.
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

async fn upkeep(state: AppState, observer: Arc<Observer>, rejections: Arc<Rejections>) {
    let mut upkeep = tokio::time::interval(UPKEEP_INTERVAL);
    // After a stall the next ticks keep this interval, so that reports stay a second apart.
    upkeep.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut suppressed = tokio::time::interval(SUPPRESSED_INTERVAL);
    loop {
        tokio::select! {
            _ = upkeep.tick() => {
                state.telemetry.upkeep();
                rejections.report();
            }
            _ = suppressed.tick() => observer.report_suppressed(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn task_that_panics_or_returns_is_named() {
        for end in [|| panic!("on purpose"), || {}] {
            let stays = || tokio::spawn(std::future::pending());
            let mut tasks = Tasks {
                writer: stays(),
                monitor: stays(),
                upkeep: tokio::spawn(async move { end() }),
                metrics_server: None,
            };
            assert_eq!(tasks.wait_for_exit().await, "upkeep");
        }
    }
}
