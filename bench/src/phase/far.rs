//! Throughput and latency with both stores a network away: behind the relay, also with slower
//! commits. Compares the service with itself (three replicas, the commit before) and the textbook.

use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{Context as _, Result};
use lab::measure::{Spread, grouped, milliseconds, ratio};
use lab::process;
use lab::report::{Goal, Section, table};

use super::limits::lone_calls;
use super::{CONNECTIONS, COUNTS, REPLICAS, VISITAS};
use crate::ground::{Ground, ONE_WAY, SLOWER_COMMIT, Stores};
use crate::progress;
use crate::round::{self, Case, Effort, Series};
use crate::subject::Subject;

/// Both commits: their stores, and their name.
const COMMITS: [(Stores, &str); 2] = [
    (Stores::Far, "far"),
    (Stores::FarWithSlowCommit, "far, slower commit"),
];

/// Of each lone call.
const LONE_CALLS: Duration = Duration::from_secs(2);

/// Compares everything.
pub(crate) fn far(ground: &mut Ground, effort: Effort) -> Result<Section> {
    let subjects = subjects(ground, &[VISITAS, Subject::Before, Subject::Textbook]);
    compare(ground, &COMMITS, &subjects, &COUNTS, &[REPLICAS], effort)
}

/// Compares the service with the commit before, if there is one, at the plain commit.
pub(crate) fn far_quick(ground: &mut Ground, effort: Effort) -> Result<Section> {
    let subjects = subjects(ground, &[VISITAS, Subject::Before]);
    compare(
        ground,
        &COMMITS[..1],
        &subjects,
        &[1, CONNECTIONS],
        &[],
        effort,
    )
}

fn subjects(ground: &Ground, all: &[Subject]) -> Vec<Subject> {
    all.iter()
        .copied()
        .filter(|&subject| subject != Subject::Before || ground.before.is_some())
        .collect()
}

fn compare(
    ground: &mut Ground,
    commits: &[(Stores, &str)],
    subjects: &[Subject],
    counts: &[usize],
    replicas: &[usize],
    effort: Effort,
) -> Result<Section> {
    let calls = calls(ground, commits)?;
    let mut cases = Vec::new();
    for &(stores, _) in commits {
        let case = |subject, connections| Case {
            stores,
            ..Case::new(subject, connections)
        };
        for &connections in counts {
            cases.extend(subjects.iter().map(|&subject| case(subject, connections)));
        }
        cases.extend(replicas.iter().map(|&replicas| Case {
            replicas,
            ..case(VISITAS, CONNECTIONS)
        }));
    }
    let all = round::interleaved(ground, &cases, effort)?;

    let mut text = introduction(ground)?;
    text += &calls;
    let mut goals = Vec::new();
    for &(stores, name) in commits {
        let series = all.iter().filter(|series| series.case.stores == stores);
        let commit = Commit {
            series: series.collect(),
            name,
        };
        write!(text, "\nStores {name}:\n\n{}", commit.table()?)?;
        goals.extend(commit.goals()?);
    }
    Ok(Section {
        title: "Stores a network away",
        text,
        goals,
    })
}

/// Describes the relay, and the commit before or how to give one.
fn introduction(ground: &mut Ground) -> Result<String> {
    let mut text = format!(
        "Each store is behind a relay that delays everything by {} in each direction, on the same two \
         processors, at real-time priority where the system allows it. *Slower commit* is `commit_delay = {}` and `commit_siblings = 0`. *In lone \
         visits* is the median over that of the same program with one connection, in the same round. \
         The relay sent {}.\n\n",
        milliseconds(ONE_WAY.as_secs_f64()),
        SLOWER_COMMIT.as_micros(),
        ground.relay()?.lateness()
    );
    match &ground.before {
        Some(program) => {
            let output = process::command(program).arg("--version").output()?;
            let version = String::from_utf8_lossy(&output.stdout);
            write!(text, "The commit before: {}.\n\n", version.trim())?;
        }
        None => text += "The commit before SKIPPED: `BEFORE=REVISION` names it.\n\n",
    }
    Ok(text)
}

/// A table of what lone calls take.
fn calls(ground: &mut Ground, commits: &[(Stores, &str)]) -> Result<String> {
    ground.relay()?;
    let mut rows = Vec::new();
    for &(stores, name) in [(Stores::Near, "near")].iter().chain(commits) {
        let [select, insert, increment] = lone_calls(ground, stores, LONE_CALLS)?;
        progress!("{name}: a lone select takes {}", milliseconds(select));
        rows.push([
            name.to_owned(),
            milliseconds(select),
            milliseconds(insert),
            milliseconds(increment),
        ]);
    }
    let header = ["lone calls, median", "`select 1`", "insert", "`INCR`"];
    Ok(table(&header, rows))
}

/// The series of one kind of commit.
struct Commit<'a> {
    series: Vec<&'a Series>,
    name: &'a str,
}

impl Commit<'_> {
    fn find(&self, subject: Subject, connections: usize, replicas: usize) -> Option<&Series> {
        self.series.iter().copied().find(|series| {
            let case = series.case;
            (case.subject, case.connections, case.replicas) == (subject, connections, replicas)
        })
    }

    /// The median over that of the same program with one connection.
    fn in_lone_visits(&self, series: &Series) -> Result<Spread> {
        let lone = self.find(series.case.subject, 1, 1);
        let lone = lone.context("a lone visit was not measured")?;
        Ok(Spread::ratio(&series.medians(), &lone.medians()))
    }

    fn table(&self) -> Result<String> {
        let mut rows = Vec::new();
        for series in &self.series {
            let Case {
                subject,
                connections,
                replicas,
                ..
            } = series.case;
            let label = if replicas > 1 {
                format!("{connections}, three replicas")
            } else {
                format!("{connections}, {subject}")
            };
            let before = self.find(Subject::Before, connections, 1);
            rows.push([
                label,
                series.throughput().format_with(grouped),
                before.map_or_else(
                    || "–".to_owned(),
                    |before| series.ratio_to(before).format_with(ratio),
                ),
                milliseconds(series.spread(|sample| sample.load.median).median),
                self.in_lone_visits(series)?.format_with(ratio),
                milliseconds(series.spread(|sample| sample.load.p99).median),
                grouped(series.failed() as f64),
            ]);
        }
        let header = [
            "",
            "visits/s",
            "of the commit before",
            "median",
            "in lone visits",
            "p99",
            "failed",
        ];
        Ok(table(&header, rows))
    }

    fn goals(&self) -> Result<Vec<Goal>> {
        let name = self.name;
        let crowd = self.find(VISITAS, CONNECTIONS, 1).context("not measured")?;
        let mut goals = vec![Goal::at_most(
            &format!("{name}, {CONNECTIONS} connections: median in lone visits"),
            1.4,
            self.in_lone_visits(crowd)?.median,
            ratio,
        )];
        for (connections, wanted) in [(CONNECTIONS, 1.5), (1024, 1.0)] {
            if let Some(service) = self.find(VISITAS, connections, 1)
                && let Some(before) = self.find(Subject::Before, connections, 1)
            {
                goals.push(Goal::at_least(
                    &format!(
                        "{name}, {} connections: throughput against the commit before",
                        grouped(connections as f64)
                    ),
                    wanted,
                    service.ratio_to(before),
                ));
            }
        }
        if let Some(three) = self.find(VISITAS, CONNECTIONS, REPLICAS) {
            goals.push(Goal::at_least(
                &format!("{name}, three replicas: throughput against one"),
                1.5,
                three.ratio_to(crowd),
            ));
        }
        Ok(goals)
    }
}
