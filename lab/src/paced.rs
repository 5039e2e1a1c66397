//! Measures latency. With a constant rate, visits are sent whether or not earlier ones have a
//! response, and each is timed from when it was due: delays behind a slow visit count. In a closed
//! loop, each connection sends its next visit after a response, as pgbench does.
//!
//! One thread per connection: a thread's sleep ends within about 60 µs, a runtime's timer only at
//! the next millisecond.

use std::net::SocketAddr;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use hdrhistogram::Histogram;

use crate::client::Connection;

/// How long after its end a run still sends visits that were due.
const OVERTIME: Duration = Duration::from_secs(2);

/// The rate of visits.
#[derive(Clone, Copy, Debug)]
pub enum Pace {
    /// This many per second, over all connections.
    Constant(f64),
    /// The next visit follows a response.
    Closed,
}

/// The result of a run; times are in seconds.
#[derive(Clone, Copy, Debug)]
pub struct Latency {
    /// Successful visits per second.
    pub throughput: f64,
    /// The mean of the successful visits.
    pub mean: f64,
    /// The 50th percentile.
    pub median: f64,
    /// The 99th percentile.
    pub p99: f64,
    /// The 99.9th percentile.
    pub p999: f64,
    /// The longest.
    pub max: f64,
    /// The share of the due visits that got a response.
    pub responded: f64,
}

/// Makes visits for `duration` and returns their latencies.
pub fn run(
    address: SocketAddr,
    connections: usize,
    pace: Pace,
    duration: Duration,
) -> Result<Latency> {
    let barrier = Barrier::new(connections);
    let parts = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..connections)
            .map(|index| {
                let barrier = &barrier;
                std::thread::Builder::new()
                    .stack_size(128 * 1024)
                    .spawn_scoped(scope, move || {
                        let connection = Connection::open(address);
                        // A thread without a connection must not block the others.
                        barrier.wait();
                        let schedule = Schedule::new(pace, connections, index, duration);
                        drive(connection?, &schedule)
                    })
                    .context("cannot start a thread")
            })
            .collect::<Result<_>>()?;
        threads
            .into_iter()
            .map(|thread| thread.join().expect("no thread panics"))
            .collect::<Result<Vec<Part>>>()
    })?;
    let mut whole = Part::new()?;
    for part in parts {
        whole.latencies.add(&part.latencies)?;
        whole.due += part.due;
    }
    let seconds = |microseconds: u64| microseconds as f64 / 1e6;
    let at = |quantile| seconds(whole.latencies.value_at_quantile(quantile));
    Ok(Latency {
        throughput: whole.latencies.len() as f64 / duration.as_secs_f64(),
        mean: whole.latencies.mean() / 1e6,
        median: at(0.5),
        p99: at(0.99),
        p999: at(0.999),
        max: seconds(whole.latencies.max()),
        responded: whole.latencies.len() as f64 / whole.due as f64,
    })
}

/// When the visits of one connection are due.
struct Schedule {
    first: Instant,
    /// `None`: the next visit is due after the response to the previous one.
    interval: Option<Duration>,
    end: Instant,
}

impl Schedule {
    fn new(pace: Pace, connections: usize, index: usize, duration: Duration) -> Self {
        let start = Instant::now();
        let end = start + duration;
        match pace {
            Pace::Closed => Self {
                first: start,
                interval: None,
                end,
            },
            Pace::Constant(rate) => Self {
                // The connections take turns, so that all of them together are even.
                first: start + Duration::from_secs_f64(index as f64 / rate),
                interval: Some(Duration::from_secs_f64(connections as f64 / rate)),
                end,
            },
        }
    }
}

/// The results of one connection.
struct Part {
    /// In microseconds.
    latencies: Histogram<u32>,
    due: u64,
}

impl Part {
    fn new() -> Result<Self> {
        Ok(Self {
            latencies: Histogram::new_with_max(120_000_000, 3)?,
            due: 0,
        })
    }
}

fn drive(mut connection: Connection, schedule: &Schedule) -> Result<Part> {
    let mut part = Part::new()?;
    let mut due = schedule.first;
    while due < schedule.end {
        part.due += 1;
        let mut now = Instant::now();
        if due > now {
            std::thread::sleep(due - now);
        } else if now > schedule.end + OVERTIME {
            // The visit was due but is no longer sent.
            due += schedule.interval.unwrap_or_default();
            continue;
        }
        let status = connection.visit()?.status;
        now = Instant::now();
        if status == 200 {
            let microseconds = u64::try_from((now - due).as_micros())?;
            part.latencies.saturating_record(microseconds);
        }
        due = schedule.interval.map_or(now, |interval| due + interval);
    }
    Ok(part)
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::TcpListener;

    use super::*;

    /// Responds to the visits of one connection, to the second after a pause.
    fn slow_at_the_second(pause: Duration) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            let mut stream = listener.accept().unwrap().0;
            let mut bytes = [0; 1024];
            for visit in 1.. {
                if stream.read(&mut bytes).unwrap_or(0) == 0 {
                    return;
                }
                if visit == 2 {
                    std::thread::sleep(pause);
                }
                stream
                    .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
                    .unwrap();
            }
        });
        address
    }

    #[test]
    fn visits_behind_a_slow_one_count_from_when_they_were_due() {
        let pause = Duration::from_millis(500);
        let second = Duration::from_secs(1);
        let open = run(slow_at_the_second(pause), 1, Pace::Constant(100.0), second).unwrap();
        // Fifty of the hundred were due meanwhile.
        assert!(open.median > 0.0 && open.p99 > 0.45, "{open:?}");
        let closed = run(slow_at_the_second(pause), 1, Pace::Closed, second).unwrap();
        assert!(closed.p99 < 0.45 && closed.max > 0.45, "{closed:?}");
    }

    #[test]
    fn connections_take_turns() {
        let first = Schedule::new(Pace::Constant(100.0), 4, 0, Duration::from_secs(1));
        let last = Schedule::new(Pace::Constant(100.0), 4, 3, Duration::from_secs(1));
        let offset = last.first - first.first;
        assert!(offset >= Duration::from_millis(30), "{offset:?}");
        assert_eq!(last.interval, Some(Duration::from_millis(40)));
    }
}
