//! The report: goals first, then a section for each question, in Markdown.

use std::fmt::Write as _;

use crate::measure::{Spread, ratio};

/// What was asked, and what came of it.
#[derive(Debug, Default)]
pub struct Section {
    /// Its heading.
    pub title: &'static str,
    /// Markdown.
    pub text: String,
    /// What was promised about it.
    pub goals: Vec<Goal>,
}

/// A figure that has been promised.
#[derive(Clone, Debug)]
pub struct Goal {
    what: String,
    wanted: String,
    measured: String,
    is_met: bool,
}

impl Goal {
    /// A ratio whose median is to be no lower.
    pub fn at_least(what: &str, wanted: f64, measured: Spread) -> Self {
        Self {
            what: what.to_owned(),
            wanted: format!("at least {}", ratio(wanted)),
            measured: measured.written(ratio),
            is_met: measured.median >= wanted,
        }
    }

    /// A figure that is to be no higher. Both numbers are written with their unit.
    pub fn at_most(what: &str, wanted: f64, measured: f64, write: impl Fn(f64) -> String) -> Self {
        Self {
            what: what.to_owned(),
            wanted: format!("at most {}", write(wanted)),
            measured: write(measured),
            is_met: measured <= wanted,
        }
    }

    /// Whether it was kept.
    pub fn is_met(&self) -> bool {
        self.is_met
    }
}

/// All of it, below a title. `head` says where and how it was measured.
pub fn document(title: &str, head: &str, sections: &[Section]) -> String {
    let goals = sections.iter().flat_map(|section| &section.goals);
    let goals = table(
        &["goal", "wanted", "measured", ""],
        goals.map(|goal| {
            let verdict = if goal.is_met { "met" } else { "**not met**" };
            [&*goal.what, &goal.wanted, &goal.measured, verdict].map(str::to_owned)
        }),
    );
    let mut text = format!("# {title}\n\n{head}\n## Goals\n\n{goals}");
    for section in sections {
        write!(text, "\n## {}\n\n{}", section.title, section.text).expect("a string takes all");
    }
    text
}

/// A table whose first column is text and whose others are figures.
pub fn table<const N: usize>(
    header: &[&str; N],
    rows: impl IntoIterator<Item = [String; N]>,
) -> String {
    let mut text = format!("| {} |\n| --- |", header.join(" | "));
    text.push_str(&" ---: |".repeat(N - 1));
    text.push('\n');
    for row in rows {
        writeln!(text, "| {} |", row.join(" | ")).expect("a string takes all");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn goal_is_met_by_the_median() {
        let spread = Spread::new([0.2, 0.61, 0.9]);
        assert!(Goal::at_least("", 0.6, spread).is_met);
        assert!(!Goal::at_least("", 0.62, spread).is_met);
        assert!(Goal::at_most("", 3.0, 3.0, ratio).is_met);
        assert!(!Goal::at_most("", 3.0, f64::NAN, ratio).is_met);
    }

    #[test]
    fn document_has_goals_before_sections() {
        let section = Section {
            title: "Memory",
            text: "Little.\n".to_owned(),
            goals: vec![Goal::at_most("idle", 24.0, 25.0, |mebibytes| {
                format!("{mebibytes:.0} MiB")
            })],
        };
        let expected = "\
# What was measured

Here.

## Goals

| goal | wanted | measured |  |
| --- | ---: | ---: | ---: |
| idle | at most 24 MiB | 25 MiB | **not met** |

## Memory

Little.
";
        assert_eq!(
            document("What was measured", "Here.\n", &[section]),
            expected
        );
    }
}
