//! Loses the leader's machine, in each way, while clients visit, and judges the numbers.
//!
//! After an asynchronous failover all totals agree, and numbers were given twice: only the judge of
//! histories sees it. The control shows that it does.

use std::fmt;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use chaos::ledger::Ledger;
use chaos::service::Service;
use devstack::{DATABASE, Redis, RedisOptions};
use lab::client;
use lab::history::{History, Verdict, Visit, judge};
use lab::measure::grouped;
use lab::report::table;
use lab::stack;
use lab::wait::within;
use tokio::runtime::Runtime;

use crate::cluster::Cluster;

/// What happens to the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// The leader's machine ends without a goodbye.
    LeaderKilled,
    /// The leader's machine goes on, and reaches no other machine.
    LeaderCutOff,
    /// The lead is handed over.
    SwitchedOver,
    /// Both standbys' machines are frozen, and go on later.
    StandbysFrozen,
    /// Both standbys are cut off, then the leader's machine ends.
    StandbysAway,
    /// The same, while commits wait for no standby.
    Control,
}

/// In this order, since the control ends the promise.
pub const ALL: [Loss; 6] = [
    Loss::LeaderKilled,
    Loss::LeaderCutOff,
    Loss::SwitchedOver,
    Loss::StandbysFrozen,
    Loss::StandbysAway,
    Loss::Control,
];

/// What was found after one loss.
#[derive(Debug)]
pub struct Finding {
    /// What happened.
    pub loss: Loss,
    /// What the judge says.
    pub verdict: Verdict,
    /// The longest time without an acknowledged visit.
    pub silence: Duration,
    /// From when a machine said that it leads, and from when a commit succeeds through the balancer
    /// without the service, to the first visit that was acknowledged.
    pub after_promotion: Option<(Duration, Duration)>,
    /// Visits acknowledged while no standby could have them.
    pub alone: usize,
    /// What must not be, apart from the verdict.
    pub violations: Vec<String>,
}

/// The cluster, and replicas of the service in front of it.
pub struct Site {
    /// The database.
    pub cluster: Cluster,
    /// The replicas.
    pub services: Vec<Service>,
    /// The runtime of the load.
    pub runtime: Runtime,
    _redis: Redis,
}

const VISIT_PAUSE: Duration = Duration::from_millis(1);
const LOAD: Duration = Duration::from_secs(2);
const AFTERMATH: Duration = Duration::from_secs(1);
/// How long standbys are away: too short for the leader to step down.
const AWAY: Duration = Duration::from_secs(3);
/// What the standbys had received before is still acknowledged.
const GRACE: Duration = Duration::from_millis(500);
/// Patroni's `ttl` is 20 s; after it, the machines elect.
const RETURN_TIMEOUT: Duration = Duration::from_secs(90);
/// How long the service can take once a commit succeeds without it. After a promotion that is when a
/// standby follows the new leader.
const AFTER_A_COMMIT: Duration = Duration::from_secs(1);

const ROWS: &str = "select (extract(epoch from data) * 1000000)::bigint from visitas order by id";

impl Site {
    /// Starts the machines and so many replicas.
    pub fn start(replicas: usize) -> Result<Self> {
        let cluster = Cluster::start()?;
        let redis = Redis::start(RedisOptions::default())?;
        let mut services = Vec::new();
        for _ in 0..replicas {
            let mut service = Service::with_settings(stack::settings(
                ("127.0.0.1", cluster.address.port()),
                DATABASE,
                (redis.host(), redis.port()),
            ))?;
            service.start()?;
            service.wait_until_ready()?;
            services.push(service);
        }
        Ok(Self {
            cluster,
            services,
            runtime: Runtime::new()?,
            _redis: redis,
        })
    }

    /// Where the replicas listen.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        let services = self.services.iter();
        services.map(|service| service.address).collect()
    }

    /// The `data` of all rows, in the order of their ids.
    pub fn rows(&self) -> Result<Vec<i64>> {
        let rows = self.cluster.sql(DATABASE, ROWS)?;
        rows.lines().map(|row| Ok(row.parse()?)).collect()
    }

    /// Waits until each replica has recorded a visit that was sent after a moment, and returns the
    /// end of the first.
    pub fn wait_for_return(&self, ledger: &Ledger, moment: Instant) -> Result<Instant> {
        let mut first: Option<Instant> = None;
        for replica in 0..self.services.len() {
            let visit = ledger.find(0, RETURN_TIMEOUT, |visit| {
                visit.replica == replica && visit.is_recorded() && visit.sent > moment
            });
            let ended = visit
                .with_context(|| format!("replica {replica} records nothing"))?
                .ended;
            first = Some(first.map_or(ended, |first| first.min(ended)));
        }
        first.context("no replica")
    }

    /// Waits until one of these machines leads.
    pub fn wait_for_promotion(&self, machines: &[u8]) -> Result<Instant> {
        let leads = || {
            machines
                .iter()
                .any(|&machine| self.cluster.is_leader(machine))
        };
        ensure!(within(RETURN_TIMEOUT, leads), "no machine took over");
        Ok(Instant::now())
    }
}

/// Tests each loss, and reports each result as it comes.
pub fn run(report: impl Fn(&Finding)) -> Result<Vec<Finding>> {
    let mut site = Site::start(2)?;
    let mut findings = Vec::new();
    for loss in ALL {
        let finding = test(&mut site, loss).with_context(|| loss.to_string())?;
        report(&finding);
        findings.push(finding);
    }
    Ok(findings)
}

fn test(site: &mut Site, loss: Loss) -> Result<Finding> {
    if loss == Loss::Control {
        site.cluster.replicate_asynchronously()?;
    }
    // All numbers after these belong to this loss's visits.
    let (mut total, mut counted) = (0, 0);
    for service in &site.services {
        let (number, in_redis) = client::visit(service.address)?;
        (total, counted) = (
            number,
            in_redis.context("the first visit was not counted in Redis")?,
        );
    }
    let mut ledger = Ledger::start(site.runtime.handle(), &site.addresses(), VISIT_PAUSE);
    std::thread::sleep(LOAD);
    let begun = Instant::now();
    let Course { promoted, alone } = loss.happen(site)?;
    let usable = promoted
        .map(|_| site.cluster.wait_for_a_commit())
        .transpose()?;
    let first = site.wait_for_return(&ledger, promoted.unwrap_or_else(Instant::now))?;
    std::thread::sleep(AFTERMATH);
    let mut visits = ledger.stop();
    loss.repair(site)?;

    let mut finding = Finding {
        loss,
        verdict: Verdict::default(),
        silence: longest_silence(begun, &visits),
        after_promotion: promoted.zip(usable).map(|(promoted, usable)| {
            let since = |moment| first.saturating_duration_since(moment);
            (since(promoted), since(usable))
        }),
        alone: alone.map_or(0, |(from, to)| {
            let is_alone =
                |visit: &&Visit| visit.is_recorded() && visit.sent > from && visit.ended < to;
            visits.iter().filter(is_alone).count()
        }),
        violations: Vec::new(),
    };
    for visit in &mut visits {
        visit.total = visit.total.map(|number| number - total);
        visit.redis = visit.redis.map(|number| number - counted);
    }
    let rows = site.rows()?;
    finding.verdict = judge(History {
        visits: &visits,
        rows: rows.get(usize::try_from(total)?..).unwrap_or_default(),
        redis_outages: &[],
    });
    for (service, rows) in site.services.iter().zip(rows.len() + 1..) {
        let (number, _) = client::visit(service.address)?;
        if usize::try_from(number)? != rows {
            finding.violate(format!(
                "a visit returned {number} with {rows} rows in the table"
            ));
        }
    }
    if finding.alone > 0 && loss != Loss::Control {
        let alone = finding.alone;
        finding.violate(format!(
            "{alone} visits were acknowledged while no standby could have them"
        ));
    }
    if let Some((_, after)) = finding.after_promotion
        && after > AFTER_A_COMMIT
    {
        finding.violate(format!(
            "the first visit came {after:?} after commits succeeded"
        ));
    }
    Ok(finding)
}

/// How a loss went.
struct Course {
    /// When a machine took over, if the lead was lost.
    promoted: Option<Instant>,
    /// The period in which no standby could receive anything.
    alone: Option<(Instant, Instant)>,
}

impl Loss {
    fn happen(self, site: &mut Site) -> Result<Course> {
        let leader = site.cluster.leader().context("no leader")?;
        let standbys = site.cluster.standbys()?;
        let mut course = Course {
            promoted: None,
            alone: None,
        };
        match self {
            Self::LeaderKilled => {
                site.cluster.kill_machine(leader)?;
                course.promoted = Some(site.wait_for_promotion(&standbys)?);
            }
            Self::LeaderCutOff => {
                site.cluster.unplug(leader)?;
                course.promoted = Some(site.wait_for_promotion(&standbys)?);
            }
            Self::SwitchedOver => {
                // Patroni hands over to a standby that commits wait for; it refuses another one.
                let handed = standbys
                    .iter()
                    .any(|&to| site.cluster.switch_over(leader, to).is_ok());
                ensure!(handed, "no standby can take over");
                course.promoted = Some(site.wait_for_promotion(&standbys)?);
            }
            Self::StandbysFrozen => {
                for &standby in &standbys {
                    site.cluster.freeze(standby, "")?;
                }
                let from = Instant::now() + GRACE;
                std::thread::sleep(AWAY);
                course.alone = Some((from, Instant::now()));
                for &standby in &standbys {
                    site.cluster.thaw(standby)?;
                }
            }
            Self::StandbysAway | Self::Control => {
                for &standby in &standbys {
                    site.cluster.unplug(standby)?;
                }
                let from = Instant::now() + GRACE;
                std::thread::sleep(AWAY);
                site.cluster.kill_machine(leader)?;
                course.alone = Some((from, Instant::now()));
                for &standby in &standbys {
                    site.cluster.plug(standby)?;
                }
                course.promoted = Some(site.wait_for_promotion(&standbys)?);
            }
        }
        Ok(course)
    }

    /// Makes the cluster whole again. The control is the last one.
    fn repair(self, site: &mut Site) -> Result<()> {
        if self == Self::Control {
            return Ok(());
        }
        site.cluster.make_whole()
    }
}

impl Finding {
    fn violate(&mut self, violation: String) {
        self.violations.push(violation);
    }

    /// Whether nothing was lost or given twice, or the control lost visits and gave numbers twice.
    pub fn is_as_wanted(&self) -> bool {
        if self.loss == Loss::Control {
            self.verdict.lost > 0 && self.verdict.postgres.repeated > 0
        } else {
            self.verdict.violations() == 0 && self.violations.is_empty()
        }
    }
}

fn longest_silence(begun: Instant, visits: &[Visit]) -> Duration {
    let recorded = visits.iter().filter(|visit| visit.is_recorded());
    let mut ends: Vec<_> = recorded.map(|visit| visit.ended).collect();
    ends.push(begun);
    ends.sort_unstable();
    let gaps = ends.windows(2).map(|pair| pair[1] - pair[0]);
    gaps.max().unwrap_or_default()
}

/// The table of the report.
pub fn report(findings: &[Finding]) -> String {
    let count = |number: usize| grouped(number as f64);
    let seconds = |duration: Duration| format!("{:.2} s", duration.as_secs_f64());
    let rows = findings.iter().map(|finding| {
        let verdict = finding.verdict;
        [
            finding.loss.to_string(),
            count(verdict.recorded),
            count(verdict.lost),
            count(verdict.duplicated()),
            count(verdict.out_of_order()),
            count(verdict.in_doubt),
            count(finding.alone),
            seconds(finding.silence),
            finding
                .after_promotion
                .map_or_else(|| "–".to_owned(), |(promotion, _)| seconds(promotion)),
            finding
                .after_promotion
                .map_or_else(|| "–".to_owned(), |(_, commit)| seconds(commit)),
        ]
    });
    let mut text = table(
        &[
            "what happens",
            "acknowledged",
            "lost",
            "duplicated",
            "out of order",
            "in doubt",
            "acknowledged without a standby",
            "longest time without a 200",
            "first 200 after the promotion",
            "after a commit without the service",
        ],
        rows,
    );
    for finding in findings {
        for violation in &finding.violations {
            text += "\n- ";
            text += &finding.loss.to_string();
            text += ": ";
            text += violation;
        }
    }
    text
}

impl fmt::Display for Loss {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::LeaderKilled => "the leader's machine is killed",
            Self::LeaderCutOff => "the leader's machine is cut off, alive",
            Self::SwitchedOver => "planned switchover",
            Self::StandbysFrozen => "both standbys freeze for 3 s",
            Self::StandbysAway => "both standbys are cut off, then the leader's machine is killed",
            Self::Control => "control: the same, with asynchronous replication",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finding(loss: Loss, verdict: Verdict) -> Finding {
        Finding {
            loss,
            verdict,
            silence: Duration::ZERO,
            after_promotion: None,
            alone: 0,
            violations: Vec::new(),
        }
    }

    #[test]
    fn control_that_loses_nothing_fails_the_test() {
        let kept = Verdict::default();
        assert!(finding(Loss::LeaderKilled, kept).is_as_wanted());
        assert!(!finding(Loss::Control, kept).is_as_wanted());
        let mut repeated = kept;
        repeated.lost = 1;
        repeated.postgres.repeated = 1;
        assert!(finding(Loss::Control, repeated).is_as_wanted());
        assert!(!finding(Loss::LeaderKilled, repeated).is_as_wanted());
    }
}
