//! What stands between the service and its goals: where the processors' time goes at the peak, and
//! where the time of a lone visit goes.

use std::time::Instant;

use anyhow::{Context as _, Result};
use lab::measure::{Spread, milliseconds, ratio};
use lab::metrics::Metrics;
use lab::paced::{self, Pace};
use lab::processor::ProcessorTime;
use lab::report::{Section, table};

use super::limits::{Inserts, insert, record};
use super::{CONNECTIONS, VISITAS, while_serving};
use crate::ground::Ground;
use crate::load;
use crate::progress;
use crate::round::{Effort, warm_up};
use crate::subject::{Running, Subject};

/// Processor time that a visit takes, in seconds.
#[derive(Clone, Copy, Debug)]
struct PerVisit {
    client: f64,
    subject: ProcessorTime,
    postgres: f64,
    redis: f64,
    /// Of all processors.
    all: f64,
}

/// The processors' time at the peak.
pub(crate) fn processors(ground: &mut Ground, effort: Effort) -> Result<Section> {
    let mut ceiling = Vec::new();
    let mut visitas = Vec::new();
    for round in 1..=effort.rounds {
        ceiling.push(at_peak(ground, Subject::Ceiling, effort)?);
        visitas.push(at_peak(ground, VISITAS, effort)?);
        progress!("round {round} of {}: processor time", effort.rounds);
    }
    let row = |what: &str, figure: fn(&PerVisit) -> f64| {
        let median = |all: &[PerVisit]| Spread::new(all.iter().map(figure)).median * 1e6;
        let (ceiling, visitas) = (median(&ceiling), median(&visitas));
        [
            what.to_owned(),
            ratio(ceiling),
            ratio(visitas),
            ratio(visitas - ceiling),
        ]
    };
    let text = table(
        &[
            "µs a visit",
            "ceiling",
            "visitas, traces at 1 %",
            "difference",
        ],
        [
            row("client (wrk)", |visit| visit.client),
            row("program, its own code", |visit| visit.subject.user),
            row("program, the kernel for it", |visit| visit.subject.system),
            row("PostgreSQL", |visit| visit.postgres),
            row("Redis", |visit| visit.redis),
            row("idle, and whatever else runs", PerVisit::rest),
            row("all processors", |visit| visit.all),
        ],
    );
    Ok(Section {
        title: "Processor time at the peak",
        text: format!(
            "{CONNECTIONS} connections. Client, program and stores share the processors, so the \
             throughput is what all rows together leave: the ratio to the ceiling is that of the \
             last row.\n\n{text}"
        ),
        goals: Vec::new(),
    })
}

fn at_peak(ground: &mut Ground, subject: Subject, effort: Effort) -> Result<PerVisit> {
    let postgres = ground.postgres.pid().context("Postgres does not run")?;
    let redis = ground.redis.pid().context("Redis does not run")?;
    while_serving(ground, subject, |running| {
        warm_up(running, CONNECTIONS, effort)?;
        let load = load::start(running.address, CONNECTIONS, effort.duration)?;
        let processes = [load.id(), running.process.id(), postgres, redis];
        let times =
            || -> Result<Vec<_>> { processes.map(ProcessorTime::read).into_iter().collect() };
        // Without its start and its end.
        std::thread::sleep(effort.duration / 10);
        let (began, before) = (Instant::now(), times()?);
        std::thread::sleep(effort.duration * 8 / 10);
        let (took, after) = (began.elapsed().as_secs_f64(), times()?);
        let visits = load.finish()?.throughput * took;
        let used: Vec<_> = after
            .iter()
            .zip(before)
            .map(|(after, before)| after.since(before))
            .collect();
        let whole = |time: ProcessorTime| (time.user + time.system) / visits;
        let processors = std::thread::available_parallelism()?.get() as f64;
        Ok(PerVisit {
            client: whole(used[0]),
            subject: ProcessorTime {
                user: used[1].user / visits,
                system: used[1].system / visits,
            },
            postgres: whole(used[2]),
            redis: whole(used[3]),
            all: processors * took / visits,
        })
    })
}

impl PerVisit {
    fn rest(&self) -> f64 {
        let known = self.client + self.subject.user + self.subject.system;
        self.all - known - self.postgres - self.redis
    }
}

/// The time of a visit that has the machine for itself.
pub(crate) fn lone_visit(ground: &mut Ground, effort: Effort) -> Result<Section> {
    let mut rows: [(_, Vec<f64>); 6] = [
        ("an insert, by pgbench", Vec::new()),
        ("the recording statement, by pgbench", Vec::new()),
        ("a visit", Vec::new()),
        ("– its call to PostgreSQL", Vec::new()),
        ("– its call to Redis", Vec::new()),
        ("– everything else: the client, HTTP, the queue", Vec::new()),
    ];
    for round in 1..=effort.rounds {
        let insert = insert(ground, Inserts { clients: 1 }, effort.duration)?.mean;
        let statement = record(ground, effort.duration)?.mean;
        let (visit, postgres, redis) = lone(ground, effort)?;
        let rest = visit - postgres - redis;
        let round_s = [insert, statement, visit, postgres, redis, rest];
        for ((_, all), figure) in rows.iter_mut().zip(round_s) {
            all.push(figure);
        }
        progress!("round {round} of {}: a lone visit", effort.rounds);
    }
    let text = table(
        &["mean time", "", "in inserts"],
        rows.iter().map(|(what, all)| {
            [
                (*what).to_owned(),
                Spread::new(all.iter().copied()).written(milliseconds),
                ratio(Spread::ratio(all, &rows[0].1).median),
            ]
        }),
    );
    Ok(Section {
        title: "The time of a lone visit",
        text: format!(
            "One connection. The two calls are as the service's own histograms have them.\n\n{text}"
        ),
        goals: Vec::new(),
    })
}

/// Means, in seconds: of a visit, and of its two calls.
fn lone(ground: &mut Ground, effort: Effort) -> Result<(f64, f64, f64)> {
    while_serving(ground, VISITAS, |running| {
        warm_up(running, 1, effort)?;
        let before = Calls::read(running)?;
        let visits = paced::run(running.address, 1, Pace::Closed, effort.duration)?;
        let after = Calls::read(running)?;
        Ok((
            visits.mean,
            after.postgres.mean_since(before.postgres),
            after.redis.mean_since(before.redis),
        ))
    })
}

/// The calls that visits have made so far.
struct Calls {
    postgres: Sum,
    redis: Sum,
}

/// Durations of one histogram.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Sum {
    seconds: f64,
    count: f64,
}

impl Calls {
    fn read(running: &Running) -> Result<Self> {
        let metrics = Metrics::scrape(running.address)?;
        Ok(Self {
            postgres: Sum::read(&metrics, r#"db_system_name="postgresql""#),
            redis: Sum::read(&metrics, r#"db_system_name="redis""#),
        })
    }
}

impl Sum {
    /// Of the calls that succeeded, by whichever operation: a monitor's reading a second does not
    /// weigh.
    fn read(metrics: &Metrics, system: &str) -> Self {
        let value = |suffix: &str| {
            let name = format!("db_client_operation_duration_seconds_{suffix}{{");
            metrics
                .series(&name)
                .filter(|(series, _)| series.contains(system) && !series.contains("error_type"))
                .map(|(_, value)| value)
                .sum()
        };
        Self {
            seconds: value("sum"),
            count: value("count"),
        }
    }

    fn mean_since(self, before: Self) -> f64 {
        (self.seconds - before.seconds) / (self.count - before.count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mean_is_that_of_the_calls_in_between() {
        let scrape = |seconds: f64, count: u32| {
            let name = "db_client_operation_duration_seconds";
            let ok = r#"{db_system_name="redis",db_operation_name="INCRBY"}"#;
            let failed = r#"{db_system_name="redis",error_type="timeout"}"#;
            format!(
                "{name}_sum{ok} {seconds}\n{name}_count{ok} {count}\n\
                 {name}_sum{failed} 7\n{name}_count{failed} 7\n"
            )
        };
        let sum = |text| Sum::read(&Metrics(text), r#"db_system_name="redis""#);
        let (before, after) = (sum(scrape(1.0, 10)), sum(scrape(1.5, 20)));
        assert!((after.mean_since(before) - 0.05).abs() < 1e-9);
    }
}
