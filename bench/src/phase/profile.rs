//! Shows the cost of a visit: processor time at the peak, and the parts of a lone visit's time.

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
use crate::subject::{Instance, Subject};

/// Processor time per visit, in seconds.
#[derive(Clone, Copy, Debug)]
struct PerVisit {
    client: f64,
    subject: ProcessorTime,
    postgres: f64,
    redis: f64,
    /// The time of all processors.
    all: f64,
}

/// Processor time at the peak.
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
            "µs per visit",
            "ceiling",
            "visitas, traces at 1 %",
            "difference",
        ],
        [
            row("client (wrk)", |visit| visit.client),
            row("program, user code", |visit| visit.subject.user),
            row("program, kernel", |visit| visit.subject.system),
            row("PostgreSQL", |visit| visit.postgres),
            row("Redis", |visit| visit.redis),
            row("idle and other processes", PerVisit::rest),
            row("all processors", |visit| visit.all),
        ],
    );
    Ok(Section {
        title: "Processor time at the peak",
        text: format!(
            "{CONNECTIONS} connections. Client, program and stores share the processors, so their sum \
             limits the throughput: the last row gives the ratio to the ceiling.\n\n{text}"
        ),
        goals: Vec::new(),
    })
}

fn at_peak(ground: &mut Ground, subject: Subject, effort: Effort) -> Result<PerVisit> {
    let postgres = ground.postgres.pid().context("Postgres does not run")?;
    let redis = ground.redis.pid().context("Redis does not run")?;
    while_serving(ground, subject, |instance| {
        warm_up(instance, CONNECTIONS, effort)?;
        let load = load::start(instance.address, CONNECTIONS, effort.duration)?;
        let processes = [load.id(), instance.process.id(), postgres, redis];
        let times =
            || -> Result<Vec<_>> { processes.map(ProcessorTime::read).into_iter().collect() };
        // Leaves out the start and the end of the run.
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

/// The time of a visit without other load.
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
        &["mean time", "", "/ insert"],
        rows.iter().map(|(what, all)| {
            [
                (*what).to_owned(),
                Spread::new(all.iter().copied()).format_with(milliseconds),
                ratio(Spread::ratio(all, &rows[0].1).median),
            ]
        }),
    );
    Ok(Section {
        title: "The time of a lone visit",
        text: format!(
            "One connection. The times of the two calls come from the service's histograms.\n\n{text}"
        ),
        goals: Vec::new(),
    })
}

/// The mean times of a visit and of its two calls, in seconds.
fn lone(ground: &mut Ground, effort: Effort) -> Result<(f64, f64, f64)> {
    while_serving(ground, VISITAS, |instance| {
        warm_up(instance, 1, effort)?;
        let before = Calls::read(instance)?;
        let visits = paced::run(instance.address, 1, Pace::Closed, effort.duration)?;
        let after = Calls::read(instance)?;
        Ok((
            visits.mean,
            after.postgres.mean_since(before.postgres),
            after.redis.mean_since(before.redis),
        ))
    })
}

/// The calls to the stores so far.
struct Calls {
    postgres: Sum,
    redis: Sum,
}

/// The sum and count of a histogram.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Sum {
    seconds: f64,
    count: f64,
}

impl Calls {
    fn read(instance: &Instance) -> Result<Self> {
        let metrics = Metrics::scrape(instance.address)?;
        Ok(Self {
            postgres: Sum::read(&metrics, r#"db_system_name="postgresql""#),
            redis: Sum::read(&metrics, r#"db_system_name="redis""#),
        })
    }
}

impl Sum {
    /// Reads the successful calls of all operations: one call per second by a monitor is
    /// negligible.
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
