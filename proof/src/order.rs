//! Millions of visits over three replicas, while replicas are killed and restarted, sessions end and
//! the database changes its machine. No number must be lost, given twice, or out of order.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use chaos::ledger::{Ledger, Pace};
use devstack::DATABASE;
use lab::history::{History, Verdict, judge};
use lab::measure::grouped;

use crate::failover::Site;

/// What was found.
#[derive(Debug)]
pub struct Finding {
    /// What the judge says.
    pub verdict: Verdict,
    /// How long the load lasted.
    pub took: Duration,
    kills: usize,
    restarts: usize,
    reconnects: usize,
    switchovers: usize,
    failovers: usize,
}

const REPLICAS: usize = 3;
const PACE: Pace = Pace {
    clients: 256,
    pause: Duration::ZERO,
    // A failover takes twenty seconds, and a refusal a millisecond.
    pause_after_refusal: Duration::from_millis(50),
};
/// The time between two disturbances.
const BETWEEN: Duration = Duration::from_secs(4);
const STOP_TIMEOUT: Duration = Duration::from_secs(12);
/// Ends every session of the service.
const RECONNECT: &str = "select count(pg_terminate_backend(pid)) from pg_stat_activity \
    where application_name = 'visitas'";

/// Visits until so many visits are acknowledged, for `limit` at most.
pub fn run(visits: usize, limit: Duration) -> Result<Finding> {
    let mut site = Site::start(REPLICAS)?;
    let mut finding = Finding {
        verdict: Verdict::default(),
        took: Duration::ZERO,
        kills: 0,
        restarts: 0,
        reconnects: 0,
        switchovers: 0,
        failovers: 0,
    };
    let started = Instant::now();
    let mut ledger = Ledger::start_at(site.runtime.handle(), &site.addresses(), PACE);
    for turn in 0.. {
        let until = Instant::now() + BETWEEN;
        while ledger.recorded() < visits && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(10));
        }
        let done = ledger.recorded();
        if done >= visits {
            break;
        }
        ensure!(started.elapsed() < limit, "only {done} visits in {limit:?}");
        if turn % 16 == 0 {
            eprintln!("proof: {done} visits after {:?}", started.elapsed());
        }
        disturb(&mut site, &ledger, &mut finding, turn, done * 100 / visits)?;
    }
    let all = ledger.stop();
    finding.took = started.elapsed();
    site.cluster.make_whole()?;
    let rows = site.rows()?;
    finding.verdict = judge(History {
        visits: &all,
        rows: &rows,
        redis_outages: &[],
    });
    Ok(finding)
}

/// A switchover after a third, the loss of the leader's machine after two thirds, and something
/// smaller at each turn between.
fn disturb(
    site: &mut Site,
    ledger: &Ledger,
    finding: &mut Finding,
    turn: usize,
    percent: usize,
) -> Result<()> {
    if percent >= 33 && finding.switchovers == 0 {
        finding.switchovers += 1;
        let leader = site.cluster.leader().context("no leader")?;
        let standbys = site.cluster.standbys()?;
        let handed = standbys
            .iter()
            .any(|&to| site.cluster.switch_over(leader, to).is_ok());
        ensure!(handed, "no standby can take over");
        let promoted = site.wait_for_promotion(&standbys)?;
        site.wait_for_return(ledger, promoted)?;
        return site.cluster.wait_until_whole();
    }
    if percent >= 66 && finding.failovers == 0 {
        finding.failovers += 1;
        let leader = site.cluster.leader().context("no leader")?;
        let standbys = site.cluster.standbys()?;
        site.cluster.kill_machine(leader)?;
        let promoted = site.wait_for_promotion(&standbys)?;
        site.wait_for_return(ledger, promoted)?;
        return site.cluster.make_whole();
    }
    let service = &mut site.services[turn / 3 % REPLICAS];
    match turn % 3 {
        0 => {
            finding.kills += 1;
            service.kill_at_once()?;
        }
        1 => {
            finding.restarts += 1;
            service.terminate()?;
            let ended = service.wait_for_exit(STOP_TIMEOUT)?;
            ensure!(
                ended == Some(true),
                "a replica did not stop successfully: {ended:?}"
            );
        }
        _ => {
            finding.reconnects += 1;
            site.cluster.sql(DATABASE, RECONNECT)?;
            return Ok(());
        }
    }
    service.start()?;
    service.wait_until_ready()
}

impl Finding {
    /// Whether nothing was lost, given twice or out of order.
    pub fn is_as_wanted(&self) -> bool {
        self.verdict.violations() == 0
    }

    /// A sentence for the report.
    pub fn text(&self) -> String {
        let verdict = self.verdict;
        let count = |number: usize| grouped(number as f64);
        format!(
            "{} acknowledged visits over three replicas in {:.0} minutes, through {} kills and {} \
             restarts of a replica, {} ends of all sessions, {} switchover and {} loss of the leader's \
             machine: {} lost, {} duplicated, {} out of order, {} in doubt.\n",
            count(verdict.recorded),
            self.took.as_secs_f64() / 60.0,
            self.kills,
            self.restarts,
            self.reconnects,
            self.switchovers,
            self.failovers,
            count(verdict.lost),
            count(verdict.duplicated()),
            count(verdict.out_of_order()),
            count(verdict.in_doubt),
        )
    }
}
