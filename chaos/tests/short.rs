//! Each fault once, shortened: nothing acknowledged is lost, and everything recovers. Overload and
//! hostile clients judge speed and need the machine, so `make faults` runs them.
//!
//! `make chaos` measures with the program as it is shipped; the bounds here hold on a busy machine.

use std::io::Write as _;
use std::time::{Duration, Instant};

use chaos::bounds::{MAX_CONNECTIONS, POOLED};
use chaos::report::{self, Tried};

const RECOVERY: f64 = 3.0;
const START: Duration = Duration::from_secs(3);
/// All faults together.
const ALL: Duration = Duration::from_mins(5);

#[test]
fn no_fault_loses_or_repeats_what_was_acknowledged() {
    let started = Instant::now();
    let tried = chaos::faults(None, chaos::SHORT, |_tried| {});
    let text = report::faults(&tried).text;
    for tried in &tried {
        let trial = match tried {
            Tried::Ran(trial) => trial,
            Tried::Skipped(name, why) => {
                // Not by `eprintln!`, whose output is hidden where a test passes.
                writeln!(std::io::stderr(), "{name}: SKIPPED: {why}").unwrap();
                continue;
            }
            Tried::Failed(name, why) => panic!("{name}: {why}"),
        };
        let verdict = trial.verdict;
        assert_eq!(verdict.violations(), 0, "{verdict:?}\n{text}");
        assert!(verdict.recorded > 0, "{text}");
        assert!(trial.complaints.is_empty(), "{text}");
        let late = trial.recoveries.iter().filter(|took| **took > RECOVERY);
        assert_eq!(late.count(), 0, "{text}");
        assert!(trial.back_in.is_none_or(|took| took < START), "{text}");
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
    assert!(hostile.complaints.is_empty(), "{text}");
    assert!(hostile.spans.0 < 32.0, "{:?}", hostile.spans);
    for damage in &hostile.damages {
        assert_eq!(damage.failed_probes, 0, "{text}");
        assert!(damage.answered > 0.99, "{text}");
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
