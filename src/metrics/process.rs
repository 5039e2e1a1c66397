//! Metrics of the process and of the runtime, read at each scrape.
//!
//! Must not know: in which format metrics are rendered.

use std::fmt::Write as _;
use std::time::Duration;

use super::catalog::{
    ALIVE_TASKS, BUSY_SECONDS, CPU_SECONDS, GLOBAL_QUEUE_DEPTH, MAX_FDS, OPEN_FDS, RESIDENT_MEMORY,
    START_TIME, THREADS, VIRTUAL_MEMORY, WORKERS,
};

/// Reads all of them. Returns the counters with fractions as text, since the exporter's counters
/// are whole numbers. Must be called inside the runtime.
pub(super) fn read() -> String {
    let process = metrics_process::collector::collect();
    for (gauge, value) in [
        (OPEN_FDS, process.open_fds),
        (MAX_FDS, process.max_fds),
        (RESIDENT_MEMORY, process.resident_memory_bytes),
        (VIRTUAL_MEMORY, process.virtual_memory_bytes),
        (START_TIME, process.start_time_seconds),
        (THREADS, process.threads),
    ] {
        if let Some(value) = value {
            gauge.with([]).set(value as f64);
        }
    }
    let runtime = tokio::runtime::Handle::current().metrics();
    let workers = runtime.num_workers();
    WORKERS.with([]).set(workers as f64);
    ALIVE_TASKS.with([]).set(runtime.num_alive_tasks() as f64);
    GLOBAL_QUEUE_DEPTH
        .with([])
        .set(runtime.global_queue_depth() as f64);
    let busy: Duration = (0..workers)
        .map(|worker| runtime.worker_total_busy_duration(worker))
        .sum();

    let mut text = String::new();
    let fractions = [
        (BUSY_SECONDS, Some(busy.as_secs_f64())),
        (CPU_SECONDS, process.cpu_seconds_total),
    ];
    for (counter, value) in fractions {
        if let Some(value) = value {
            let (name, help) = (counter.description.name, counter.description.help);
            // Writing to a string cannot fail.
            let _ = writeln!(
                text,
                "# HELP {name} {help}\n# TYPE {name} counter\n{name} {value}\n"
            );
        }
    }
    text
}
