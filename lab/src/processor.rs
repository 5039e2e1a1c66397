//! The processor time of processes, from `/proc`.

use std::collections::HashMap;
use std::process::Command;
use std::sync::LazyLock;

use anyhow::{Context as _, Result};

/// Processor time, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ProcessorTime {
    /// In the program's own code.
    pub user: f64,
    /// In the kernel, for the program.
    pub system: f64,
}

impl ProcessorTime {
    /// The time that a process and its living descendants have used so far.
    pub fn read(root: u32) -> Result<Self> {
        static TICKS: LazyLock<f64> = LazyLock::new(|| {
            let output = Command::new("getconf").arg("CLK_TCK").output();
            let output = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
            // The value on every common Linux.
            output.map_or(100.0, |ticks| ticks.trim().parse().unwrap_or(100.0))
        });
        let mut all = HashMap::new();
        for entry in std::fs::read_dir("/proc").context("no /proc: processor time is not known")? {
            let path = entry?.path();
            // Entries that are no process and processes that just ended have no `stat`.
            if let Ok(stat) = std::fs::read_to_string(path.join("stat"))
                && let Some(process) = Stat::parse(&stat)
            {
                all.insert(process.id, process);
            }
        }
        let mut sum = Self::default();
        for process in all.values() {
            let mut ancestor = Some(process);
            while let Some(one) = ancestor {
                if one.id == root {
                    sum.user += process.user / *TICKS;
                    sum.system += process.system / *TICKS;
                    break;
                }
                ancestor = all.get(&one.parent);
            }
        }
        Ok(sum)
    }

    /// The time used between two readings.
    #[must_use]
    pub fn since(self, before: Self) -> Self {
        Self {
            user: self.user - before.user,
            system: self.system - before.system,
        }
    }
}

/// The used fields of a process's `stat`; times are in ticks.
#[derive(Debug, PartialEq)]
struct Stat {
    id: u32,
    parent: u32,
    user: f64,
    system: f64,
}

impl Stat {
    /// The name, in parentheses, can contain spaces and parentheses.
    fn parse(stat: &str) -> Option<Self> {
        let (id, rest) = stat.split_once(' ')?;
        let (_name, rest) = rest.rsplit_once(") ")?;
        let fields: Vec<_> = rest.split(' ').collect();
        Some(Self {
            id: id.parse().ok()?,
            parent: fields.get(1)?.parse().ok()?,
            user: fields.get(11)?.parse().ok()?,
            system: fields.get(12)?.parse().ok()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn stat_is_read_behind_the_name() {
        let stat = "42 (a ) b) S 7 42 42 0 -1 4194304 1 0 0 0 123 45 6 7 20 0 1 0 99 0 0";
        let expected = Stat {
            id: 42,
            parent: 7,
            user: 123.0,
            system: 45.0,
        };
        assert_eq!(Stat::parse(stat), Some(expected));
        assert_eq!(Stat::parse("42 (a) S 7"), None);
    }

    #[test]
    fn time_of_a_process_includes_its_children() {
        let own = std::process::id();
        let mut child = Command::new("sh")
            .args(["-c", "while :; do :; done"])
            .spawn()
            .unwrap();
        let before = ProcessorTime::read(own).unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        let mut used = 0.0;
        while used < 0.1 && Instant::now() < deadline {
            used = ProcessorTime::read(child.id()).unwrap().user;
        }
        let all = ProcessorTime::read(own).unwrap().since(before);
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(used >= 0.1 && all.user >= 0.09, "{used} {all:?}");
    }
}
