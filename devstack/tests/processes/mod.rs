//! Lists processes with `ps`, independently of the crate's own way.

use std::process::Command;
use std::time::{Duration, Instant};

/// A line of `ps`.
#[derive(Debug)]
pub(crate) struct Process {
    /// The process id.
    pub(crate) id: u32,
    /// The id of the parent.
    pub(crate) parent: u32,
    /// `R` or `S` for running or sleeping, `T` for stopped, `Z` for a zombie.
    pub(crate) state: char,
}

/// All processes on the machine.
pub(crate) fn processes() -> Vec<Process> {
    let output = Command::new("ps")
        .args(["-A", "-o", "pid=", "-o", "ppid=", "-o", "state="])
        .output()
        .unwrap();
    String::from_utf8(output.stdout)
        .unwrap()
        .lines()
        .map(|line| {
            let columns: Vec<_> = line.split_whitespace().collect();
            Process {
                id: columns[0].parse().unwrap(),
                parent: columns[1].parse().unwrap(),
                state: columns[2].chars().next().unwrap(),
            }
        })
        .collect()
}

/// The ids of a process and its descendants.
pub(crate) fn family(root: u32) -> Vec<u32> {
    let all = processes();
    let mut family = vec![root];
    let mut next = 0;
    while next < family.len() {
        let parent = family[next];
        family.extend(
            all.iter()
                .filter(|process| process.parent == parent)
                .map(|process| process.id),
        );
        next += 1;
    }
    family
}

/// Waits until none of these processes runs, at most 20 s.
pub(crate) fn assert_gone(ids: &[u32]) {
    wait_until("the processes are gone", || {
        !processes()
            .iter()
            .any(|process| ids.contains(&process.id) && process.state != 'Z')
    });
}

/// Waits until `is_so` returns true, at most 20 s.
pub(crate) fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !is_so() {
        assert!(Instant::now() < deadline, "timed out waiting until {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
