//! Each fault once, shortened: no acknowledged visit is lost, and the service recovers. `make test`
//! kills each part; `make faults` does the rest, which takes longer, and overload and hostile
//! clients, which measure speed and need an idle machine.
//!
//! `make chaos` measures the release build; the bounds here hold on a busy machine.

use std::io::Write as _;
use std::time::{Duration, Instant};

use chaos::bounds::{MAX_CONNECTIONS, POOLED};
use chaos::report::{self, FaultResult};

const RECOVERY: f64 = 3.0;
const START: Duration = Duration::from_secs(3);
/// Maximum duration of all faults together.
const ALL: Duration = Duration::from_mins(5);

#[test]
fn no_kill_loses_or_repeats_what_was_acknowledged() {
    assert_nothing_is_lost_or_repeated(Some("killed"));
}

#[test]
#[ignore = "takes long: make faults"]
fn no_fault_loses_or_repeats_what_was_acknowledged() {
    assert_nothing_is_lost_or_repeated(None);
}

#[expect(
    clippy::explicit_write,
    reason = "a passing test hides what `eprintln!` prints"
)]
fn assert_nothing_is_lost_or_repeated(only: Option<&str>) {
    let started = Instant::now();
    let results = chaos::faults(only, chaos::SHORT, |_result| {});
    assert!(!results.is_empty());
    let text = report::faults(&results).text;
    for result in &results {
        let trial = match result {
            FaultResult::Completed(trial) => trial,
            FaultResult::Skipped(name, why) => {
                writeln!(std::io::stderr(), "{name}: SKIPPED: {why}").unwrap();
                continue;
            }
            FaultResult::Failed(name, why) => panic!("{name}: {why}"),
        };
        let verdict = trial.verdict;
        assert_eq!(verdict.violations(), 0, "{verdict:?}\n{text}");
        assert!(verdict.recorded > 0, "{text}");
        assert!(trial.violations.is_empty(), "{text}");
        let late = trial.recoveries.iter().filter(|took| **took > RECOVERY);
        assert_eq!(late.count(), 0, "{text}");
        assert!(
            trial.time_to_start.is_none_or(|took| took < START),
            "{text}"
        );
    }
    let took = started.elapsed();
    assert!(took < ALL, "{took:?}");
}

#[test]
#[ignore = "floods: make faults"]
fn overload_refuses_what_it_cannot_record_and_breaks_nothing() {
    let overload = chaos::overload::run(&[2.0, 5.0], Duration::from_secs(2)).unwrap();
    let text = report::overload(&overload).text;
    for step in &overload.steps {
        assert_eq!(step.broken, 0, "{text}");
        assert!(step.goodput > 0.7 * overload.peak, "{text}");
        assert!(step.accepted_p99 < Duration::from_secs(1), "{text}");
    }
    assert!(overload.recovery.is_some(), "{text}");
}

#[test]
#[ignore = "floods: make faults"]
fn hostile_clients_keep_no_other_client_from_its_response() {
    let hostile = chaos::hostile::run(1, Duration::from_secs(2), 2000).unwrap();
    let text = report::hostile(&hostile).text;
    assert!(hostile.violations.is_empty(), "{text}");
    assert!(hostile.spans.0 < 32.0, "{:?}", hostile.spans);
    for result in &hostile.attacks {
        assert_eq!(result.failed_probes, 0, "{text}");
        assert!(result.responded > 0.99, "{text}");
    }
}

#[test]
#[ignore = "floods: make faults"]
fn connections_are_bounded_and_leave_nothing_behind() {
    let bounds = chaos::bounds::run().unwrap();
    assert!(
        bounds.left_files <= bounds.idle_files + POOLED,
        "{bounds:?}"
    );
    let most = bounds.idle_files + POOLED + MAX_CONNECTIONS;
    assert!(bounds.capped_files <= most, "{bounds:?}");
}
