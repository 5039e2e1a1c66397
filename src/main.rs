//! Parses the command line, runs one command and turns its result into an exit status.
//!
//! Must not know: how a command does its work.

use std::io::Write as _;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tikv_jemallocator::Jemalloc;
use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};
use tracing::warn;
use visitas::app::App;
use visitas::command;
use visitas::config::{self, Command, Config, LogConfig};
use visitas::telemetry::Telemetry;

/// A visit allocates and frees dozens of small pieces, and glibc's allocator takes a fifth of the
/// service's time. With this one the process also stays the same size under constant load.
#[global_allocator]
static ALLOCATOR: Jemalloc = Jemalloc;

/// How long a command waits for its log to be written; stdout's reader can stall.
const LOG_TIMEOUT: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    // A bad setting ends the program with exit status 2 before anything has started.
    let command = config::from_process().unwrap_or_else(|error| error.exit());
    if let Err(error) = config::trust_no_other(&command) {
        eprintln!("visitas: {error:#}");
        return ExitCode::FAILURE;
    }
    match run(command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("visitas: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> anyhow::Result<()> {
    // Both stores and the exporter encrypt with this provider, the only one built in.
    rustls::crypto::ring::default_provider()
        .install_default()
        .map_err(|_provider| anyhow::anyhow!("a TLS provider is installed already"))?;
    let unenforced = command.unenforced();
    // The log starts with the command.
    let report = move || {
        for parameter in unenforced {
            warn!(
                setting = parameter.setting,
                parameter = parameter.parameter,
                reason = parameter.reason,
                "parameter of the URL has no effect"
            );
        }
    };
    match command {
        Command::Serve(config) => serve(*config, report),
        Command::Migrate(config) => {
            run_once(&config.log, report, command::migrate(&config.postgres))
        }
        Command::Recount(config) => {
            run_once(&config.log, report, command::recount(&config.postgres))
        }
        Command::Reconcile(config) => {
            let reconcile = command::reconcile(&config.postgres, &config.redis);
            run_once(&config.log, report, reconcile)
        }
        Command::Healthcheck(config) => {
            let result = command::healthcheck(&config.url()?)?;
            print(&format!("{result}\n"));
            Ok(())
        }
        Command::Config(config) => {
            print(&config.listing);
            Ok(())
        }
    }
}

/// Runs a command that ends by itself and prints what it did.
fn run_once(
    log: &LogConfig,
    report: impl FnOnce(),
    command: impl Future<Output = anyhow::Result<String>>,
) -> anyhow::Result<()> {
    let telemetry = Telemetry::start(log, None, false, LOG_TIMEOUT)?;
    report();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("starting the runtime")?;
    let done = runtime.block_on(command);
    // A thread can still wait for a file system or a resolver.
    runtime.shutdown_background();
    // The log's own thread writes to stdout too: without this the result could precede its last
    // lines.
    drop(telemetry);
    let done = done?;
    print(&format!("{done}\n"));
    Ok(())
}

/// Prints to stdout, and ignores a closed one.
fn print(text: &str) {
    std::io::stdout().write_all(text.as_bytes()).ok();
}

fn serve(config: Config, report: impl FnOnce()) -> anyhow::Result<()> {
    let shutdown = config.shutdown.clone();
    let telemetry = Arc::new(Telemetry::start(
        &config.telemetry.log,
        config.telemetry.traces(),
        config.telemetry.trace_context(),
        shutdown.for_log(),
    )?);
    report();
    let runtime = Runtime::new().context("starting the runtime")?;
    let result = runtime.block_on(async {
        let stop = stop_signal()?;
        App::build(config, Arc::clone(&telemetry))?
            .run_until(stop)
            .await
    });
    // For an exit by an error; a regular stop has sent the spans already.
    telemetry.flush(shutdown.for_spans());
    runtime.shutdown_timeout(shutdown.for_tasks());
    result
}

/// Resolves at the first SIGTERM, SIGINT or SIGHUP; the second ends the process at once.
fn stop_signal() -> anyhow::Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate()).context("watching for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("watching for SIGINT")?;
    let mut hangup = signal(SignalKind::hangup()).context("watching for SIGHUP")?;
    let (sender, first) = tokio::sync::oneshot::channel();
    tokio::spawn(async move {
        let mut next = async || {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
                _ = hangup.recv() => {}
            }
        };
        next().await;
        sender.send(()).ok();
        next().await;
        std::process::exit(1);
    });
    Ok(async {
        first.await.ok();
    })
}
