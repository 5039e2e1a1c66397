//! Cuts the power of Postgres at random moments, and judges what was acknowledged before.

use std::fmt;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use chaos::chance;
use lab::client;
use lab::history::{History, Verdict, Visit, judge};
use lab::measure::{Spread, grouped};
use lab::process::Process;
use lab::program::scratch;
use lab::report::table;

use crate::site::{Outage, Site, compose_settings};

/// What happens as the power is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// Visits alone.
    Load,
    /// `CHECKPOINT`, under load.
    Checkpoint,
    /// `visitas recount`, under load.
    Recount,
    /// `visitas reconcile`, under load.
    Reconcile,
    /// Two replicas migrate an empty database.
    Migration,
    /// Two replicas adopt the table of an earlier version.
    Adoption,
    /// The first visits on a volume that was just initialised.
    FreshVolume,
}

/// What is switched off, so that the test must find lost visits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Control {
    /// Nothing: the subject is the service as it is.
    None,
    /// `fsync` of the server.
    Fsync,
    /// `synchronous_commit` of each transaction, by a trigger of another program.
    SynchronousCommit,
}

/// A row of the plan: what is cut, and how often.
#[derive(Clone, Copy, Debug)]
pub struct Series {
    /// What happens as the power is cut.
    pub moment: Moment,
    /// What is switched off.
    pub control: Control,
    /// Whether Postgres has the settings of Compose, or its defaults.
    pub compose: bool,
    /// How often.
    pub cuts: usize,
}

/// The cuts of one series.
#[derive(Debug)]
pub struct Cuts {
    series: Series,
    verdicts: Vec<Verdict>,
    recoveries: Vec<Duration>,
    /// From when Postgres accepted connections to the first visit that was acknowledged.
    returns: Vec<Duration>,
    /// What the cut left, each with how often.
    left: Vec<(String, usize)>,
    /// What must not be, apart from the verdicts.
    violations: Vec<String>,
}

/// Three cuts and a control.
pub const QUICK: &[Series] = &[
    series(Moment::Load, Control::None, 1),
    series(Moment::Migration, Control::None, 1),
    series(Moment::FreshVolume, Control::None, 1),
    series(Moment::Load, Control::Fsync, 1),
];

/// Each moment, and both controls.
pub const WHOLE: &[Series] = &plan(2, 2);

/// A hundred cuts, and both controls.
pub const LONG: &[Series] = &plan(20, 12);

/// So many rows are in the table before the load, or before its adoption.
const OLD_ROWS: usize = 300_000;
/// How long visits go on before and after a cut.
const LOAD: Duration = Duration::from_millis(300);
const LOAD_RANGE: Duration = Duration::from_millis(1500);
const AFTERMATH: Duration = Duration::from_millis(300);
/// A control is given time in which its visits reach the memory alone.
const CONTROL_LOAD: Duration = Duration::from_secs(2);
const RETURN_TIMEOUT: Duration = Duration::from_secs(30);
const COMMAND_TIMEOUT: Duration = Duration::from_secs(70);
/// A cut is to come anywhere in a command, and sometimes just after it.
const MARGIN: f64 = 1.2;

/// The table of an earlier version of the challenge.
const OLD_TABLE: &str =
    "create table visitas (id serial primary key, criado_em timestamp not null default now())";

/// Another program's trigger that takes a transaction's flush away. The session's own setting is
/// back once the transaction has ended.
const NO_FLUSH: &str = "create function sem_espera() returns trigger language plpgsql as \
    $$ begin perform set_config('synchronous_commit', 'off', true); return null; end $$; \
    create trigger sem_espera after insert on visitas execute function sem_espera()";

const fn series(moment: Moment, control: Control, cuts: usize) -> Series {
    Series {
        moment,
        control,
        compose: true,
        cuts,
    }
}

const fn plan(under_load: usize, each: usize) -> [Series; 10] {
    [
        Series {
            compose: false,
            ..series(Moment::Load, Control::None, under_load)
        },
        series(Moment::Load, Control::None, under_load - under_load / 2 + 2),
        series(Moment::Checkpoint, Control::None, each),
        series(Moment::Recount, Control::None, each),
        series(Moment::Reconcile, Control::None, each),
        series(Moment::Migration, Control::None, each),
        series(Moment::Adoption, Control::None, each),
        series(Moment::FreshVolume, Control::None, each - each / 3),
        series(Moment::Load, Control::Fsync, 1 + each / 6),
        series(Moment::Load, Control::SynchronousCommit, 1 + each / 6),
    ]
}

/// Runs the plan, and reports each series as it ends.
pub fn run(plan: &[Series], report: impl Fn(&Cuts)) -> Result<Vec<Cuts>> {
    plan.iter()
        .map(|series| {
            let cuts = test(*series).with_context(|| series.to_string())?;
            report(&cuts);
            Ok(cuts)
        })
        .collect()
}

fn test(series: Series) -> Result<Cuts> {
    let mut cuts = Cuts {
        series,
        verdicts: Vec::new(),
        recoveries: Vec::new(),
        returns: Vec::new(),
        left: Vec::new(),
        violations: Vec::new(),
    };
    let mut config = if series.compose {
        compose_settings()
    } else {
        Vec::new()
    };
    if series.control == Control::Fsync {
        config.push(("fsync".to_owned(), "off".to_owned()));
    }
    // What a control's cut leaves can be beyond repair, so each has a site of its own.
    let sites = if series.control == Control::None {
        1
    } else {
        series.cuts
    };
    for _ in 0..sites {
        let mut site = Site::start(config.clone())?;
        if series.moment.is_at_the_start() {
            cut_starts(&mut site, &mut cuts)?;
        } else {
            cut_service(&mut site, &mut cuts, series.cuts / sites)?;
        }
    }
    Ok(cuts)
}

/// Cuts the machine of Postgres while the replicas serve, on other machines.
fn cut_service(site: &mut Site, cuts: &mut Cuts, times: usize) -> Result<()> {
    let series = cuts.series;
    site.start_services()?;
    site.wait_until_ready()?;
    let insert =
        format!("insert into visitas (data) select now() from generate_series(1, {OLD_ROWS})");
    site.sql(&insert)?;
    if series.control == Control::SynchronousCommit {
        site.sql(NO_FLUSH)?;
    }
    site.sql("checkpoint")?;
    // How long a command takes under load.
    let ledger = site.load();
    let started = Instant::now();
    Work::begin(series.moment, site)?.wait()?;
    let range = started.elapsed().mul_f64(MARGIN);
    drop(ledger);
    for _ in 0..times {
        if series.moment == Moment::Reconcile {
            // Redis has counted visits whose commit the cut before took. Moved back under load, it
            // would give their numbers again.
            Work::begin(series.moment, site)?.wait()?;
        }
        // All numbers after these belong to this cut's visits.
        let (total, counted) = first_visit(site)?;
        let mut ledger = site.load();
        let load = if series.control == Control::None {
            LOAD
        } else {
            CONTROL_LOAD
        };
        std::thread::sleep(load + random(LOAD_RANGE));
        let work = Work::begin(series.moment, site)?;
        if series.moment != Moment::Load {
            std::thread::sleep(random(range));
        }
        let outage = match site.cut(true) {
            Ok(outage) => outage,
            Err(error) if series.control != Control::None => {
                // Without flushes, the server need not even start.
                let visits = ledger.stop();
                cuts.add_ruin(&visits, &error);
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        cuts.note(work.result()?);
        wait_for_return(site, &ledger, outage, cuts);
        let visits = ledger.stop();
        cuts.add(site, visits, outage, total, counted)?;
    }
    Ok(())
}

/// Cuts the one machine that everything runs on, before or just after the first visit.
fn cut_starts(site: &mut Site, cuts: &mut Cuts) -> Result<()> {
    let moment = cuts.series.moment;
    let old_rows = if moment == Moment::Adoption {
        OLD_ROWS
    } else {
        0
    };
    let prepare = |site: &mut Site| -> Result<()> {
        site.begin_again()?;
        match moment {
            Moment::FreshVolume => site.initialise(),
            Moment::Adoption => {
                site.sql(OLD_TABLE)?;
                let rows =
                    format!("insert into visitas select from generate_series(1, {old_rows})");
                site.sql(&rows)?;
                site.sql("checkpoint").map(drop)
            }
            _ => Ok(()),
        }
    };
    prepare(site)?;
    let started = Instant::now();
    site.start_services()?;
    site.wait_until_ready()?;
    let range = started.elapsed().mul_f64(MARGIN);
    for _ in 0..cuts.series.cuts {
        prepare(site)?;
        site.start_services()?;
        let mut ledger = site.load();
        if moment == Moment::FreshVolume {
            ensure!(
                ledger.find(0, RETURN_TIMEOUT, Visit::is_recorded).is_some(),
                "no visit was acknowledged on a new volume"
            );
            std::thread::sleep(random(LOAD));
        } else {
            std::thread::sleep(random(range));
        }
        let outage = site.cut(false)?;
        cuts.note(remains(site)?);
        site.start_services()?;
        wait_for_return(site, &ledger, outage, cuts);
        let visits = ledger.stop();
        cuts.add(site, visits, outage, i64::try_from(old_rows)?, 0)?;
    }
    Ok(())
}

/// What a cut during a start has left in the database.
fn remains(site: &Site) -> Result<String> {
    let ask = "select coalesce(to_regclass('visitas')::text, ''), \
        coalesce(to_regclass('visitas_migracoes')::text, '')";
    let tables = site.sql(ask)?;
    let mut left = match tables.split_once('|').context("two columns")? {
        ("", "") => return Ok("an empty database".to_owned()),
        (_, "") => "the old table, untouched".to_owned(),
        _ => {
            let versions = site.sql("select count(*) from visitas_migracoes where success")?;
            let plural = if versions == "1" { "" } else { "s" };
            format!("{versions} migration{plural}")
        }
    };
    if left.contains(" migration") && tables.starts_with('|') {
        left += ", no table";
    } else if left.contains(" migration") {
        let ids = "select data_type from information_schema.columns \
            where table_name = 'visitas' and column_name = 'id'";
        if site.sql(ids)? == "integer" {
            left += ", the old table untouched";
        }
    }
    Ok(left)
}

/// What runs as the power is cut.
enum Work {
    Nothing,
    Sql(std::thread::JoinHandle<Result<std::process::Output, std::io::Error>>),
    Command(Process),
}

impl Work {
    fn begin(moment: Moment, site: &Site) -> Result<Self> {
        let name = match moment {
            Moment::Recount => "recount",
            Moment::Reconcile => "reconcile",
            Moment::Checkpoint => {
                let mut command = site.psql("checkpoint")?;
                return Ok(Self::Sql(std::thread::spawn(move || command.output())));
            }
            _ => return Ok(Self::Nothing),
        };
        let log = scratch()?.join(format!("power-{name}.log"));
        Ok(Self::Command(Process::start(site.command(name)?, &log)?))
    }

    /// Waits until it has succeeded.
    fn wait(self) -> Result<()> {
        let result = self.finish()?;
        ensure!(!matches!(result, Some((false, _))), "{result:?}");
        Ok(())
    }

    /// Whether it succeeded, and what it printed at the end.
    fn finish(self) -> Result<Option<(bool, String)>> {
        Ok(match self {
            Self::Nothing => None,
            Self::Sql(thread) => {
                let output = thread.join().ok().context("psql panicked")??;
                let errors = String::from_utf8_lossy(&output.stderr).into_owned();
                Some((output.status.success(), errors))
            }
            Self::Command(mut process) => {
                let status = process.wait(COMMAND_TIMEOUT)?;
                let status = status.context("the command takes longer than a minute")?;
                Some((ExitStatus::success(&status), process.log_tail()))
            }
        })
    }

    /// What the cut did to it, for the report.
    fn result(self) -> Result<String> {
        Ok(match self.finish()? {
            None => String::new(),
            Some((true, _)) => "had ended".to_owned(),
            Some((false, _)) => "failed with an error".to_owned(),
        })
    }
}

fn first_visit(site: &Site) -> Result<(i64, i64)> {
    let mut last = None;
    for service in &site.services {
        last = Some(client::visit(service.address)?);
    }
    let (total, counted) = last.context("no replica")?;
    Ok((
        total,
        counted.context("the first visit was not counted in Redis")?,
    ))
}

/// Waits until each replica has recorded a visit, and a little longer.
fn wait_for_return(site: &Site, ledger: &chaos::ledger::Ledger, outage: Outage, cuts: &mut Cuts) {
    let mut first: Option<Instant> = None;
    for replica in 0..site.services.len() {
        let returned = ledger.find(0, RETURN_TIMEOUT, |visit| {
            visit.replica == replica && visit.is_complete() && visit.sent > outage.back
        });
        match returned {
            Some(visit) => first = Some(first.map_or(visit.ended, |first| first.min(visit.ended))),
            None => cuts.violate(format!("replica {replica} recorded no visit after the cut")),
        }
    }
    if let Some(first) = first {
        cuts.returns.push(first - outage.back);
    }
    cuts.recoveries.push(outage.recovery);
    std::thread::sleep(AFTERMATH);
}

fn random(range: Duration) -> Duration {
    range.mul_f64(chance::fraction())
}

impl Cuts {
    /// Judges the visits of a cut. The numbers up to `total` and `counted` belong to earlier ones.
    fn add(
        &mut self,
        site: &Site,
        mut visits: Vec<Visit>,
        outage: Outage,
        total: i64,
        counted: i64,
    ) -> Result<()> {
        outage.power.hide(&mut visits);
        for visit in &mut visits {
            visit.total = visit.total.map(|number| number - total);
            visit.redis = visit.redis.map(|number| number - counted);
        }
        let all = site.rows()?;
        let rows = all.get(usize::try_from(total)?..).unwrap_or_default();
        if i64::try_from(all.len())? < total && self.series.control == Control::None {
            self.violate(format!("{} rows are left of {total}", all.len()));
        }
        self.verdicts.push(judge(History {
            visits: &visits,
            rows,
            redis_outages: &[],
        }));
        // Once nothing else visits, each number is the number of rows.
        for (service, rows) in site.services.iter().zip(all.len() + 1..) {
            let (total, _) = client::visit(service.address)?;
            if usize::try_from(total)? != rows {
                self.violate(format!(
                    "a visit returned {total} with {rows} rows in the table"
                ));
            }
            let health = service.health();
            if health.as_deref() != Some("ok") {
                self.violate(format!("a replica's health is {health:?} after the cut"));
            }
        }
        Ok(())
    }

    /// Notes a server that cannot start: everything is lost.
    fn add_ruin(&mut self, visits: &[Visit], error: &anyhow::Error) {
        let recorded = visits.iter().filter(|visit| visit.is_recorded()).count();
        self.verdicts.push(Verdict {
            recorded,
            lost: recorded,
            ..Verdict::default()
        });
        eprintln!("proof: {error:#}");
        self.note("a server that does not start".to_owned());
    }

    fn note(&mut self, left: String) {
        if left.is_empty() {
            return;
        }
        match self.left.iter_mut().find(|(text, _)| *text == left) {
            Some((_, times)) => *times += 1,
            None => self.left.push((left, 1)),
        }
    }

    fn violate(&mut self, violation: String) {
        self.violations.push(violation);
    }

    fn sum(&self, figure: impl Fn(&Verdict) -> usize) -> usize {
        self.verdicts.iter().map(figure).sum()
    }

    /// Whether the service kept everything, or each cut of a control lost visits.
    pub fn is_as_wanted(&self) -> bool {
        if self.series.control == Control::None {
            self.sum(Verdict::violations) == 0 && self.violations.is_empty()
        } else {
            self.verdicts.iter().all(|verdict| verdict.lost > 0)
        }
    }

    /// One line, for the terminal.
    pub fn line(&self) -> String {
        let mut line = format!(
            "{}: {} cuts, {} acknowledged, {} lost, {} duplicated ({} of them in Redis), {} out of order \
             ({}), {} in doubt",
            self.series,
            self.verdicts.len(),
            self.sum(|verdict| verdict.recorded),
            self.sum(|verdict| verdict.lost),
            self.sum(Verdict::duplicated),
            self.sum(|verdict| verdict.redis.repeated + verdict.redis.unexplained),
            self.sum(Verdict::out_of_order),
            self.sum(|verdict| verdict.redis.out_of_order),
            self.sum(|verdict| verdict.in_doubt),
        );
        for violation in &self.violations {
            line += "\n  ";
            line += violation;
        }
        line
    }
}

/// The table of the report, and whether everything is as wanted.
pub fn report(all: &[Cuts]) -> (String, bool) {
    let count = |number: usize| grouped(number as f64);
    let milliseconds = |durations: &[Duration]| {
        if durations.is_empty() {
            return String::new();
        }
        let figures = durations
            .iter()
            .map(|duration| duration.as_secs_f64() * 1000.0);
        let write = |figure| format!("{figure:.0} ms");
        match durations {
            [one] => write(one.as_secs_f64() * 1000.0),
            _ => Spread::new(figures).format_with(write),
        }
    };
    let rows = all.iter().map(|cuts| {
        let left: Vec<_> = cuts
            .left
            .iter()
            .map(|(what, times)| format!("{what} ({times})"))
            .collect();
        [
            cuts.series.to_string(),
            count(cuts.verdicts.len()),
            count(cuts.sum(|verdict| verdict.recorded)),
            count(cuts.sum(|verdict| verdict.lost)),
            count(cuts.sum(Verdict::duplicated)),
            count(cuts.sum(Verdict::out_of_order)),
            count(cuts.sum(|verdict| verdict.in_doubt)),
            milliseconds(&cuts.recoveries),
            milliseconds(&cuts.returns),
            left.join(", "),
        ]
    });
    let mut text = table(
        &[
            "the power is cut",
            "cuts",
            "acknowledged",
            "lost",
            "duplicated",
            "out of order",
            "in doubt",
            "PostgreSQL recovers",
            "first visit after that",
            "what the cut left",
        ],
        rows,
    );
    for violation in all.iter().flat_map(|cuts| &cuts.violations) {
        text += "\n- ";
        text += violation;
    }
    (text, all.iter().all(Cuts::is_as_wanted))
}

impl Moment {
    /// Whether it comes before, or just after, the first visit.
    fn is_at_the_start(self) -> bool {
        matches!(self, Self::Migration | Self::Adoption | Self::FreshVolume)
    }
}

impl fmt::Display for Series {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match (self.control, self.moment) {
            (Control::Fsync, _) => "control: `fsync=off`",
            (Control::SynchronousCommit, _) => "control: a trigger sets `synchronous_commit=off`",
            (Control::None, Moment::Load) if self.compose => "under load, Compose's settings",
            (Control::None, Moment::Load) => "under load, PostgreSQL's defaults",
            (Control::None, Moment::Checkpoint) => "during a checkpoint",
            (Control::None, Moment::Recount) => "during `visitas recount`",
            (Control::None, Moment::Reconcile) => "during `visitas reconcile`",
            (Control::None, Moment::Migration) => "during the migration of an empty database",
            (Control::None, Moment::Adoption) => "during the adoption of an old table",
            (Control::None, Moment::FreshVolume) => "just after a volume was initialised",
        })
    }
}
