//! The report: goals first, then a section for each question, in Markdown.

use std::fmt::Write as _;

use crate::measure::{Spread, ratio};

/// One topic of a report, with its results.
#[derive(Debug, Default)]
pub struct Section {
    /// The heading.
    pub title: &'static str,
    /// Markdown.
    pub text: String,
    /// The goals of this topic.
    pub goals: Vec<Goal>,
}

/// A figure with a required bound.
#[derive(Clone, Debug)]
pub struct Goal {
    what: String,
    wanted: String,
    measured: String,
    is_met: bool,
}

impl Goal {
    /// A ratio whose median must not be lower.
    pub fn at_least(what: &str, wanted: f64, measured: Spread) -> Self {
        Self {
            what: what.to_owned(),
            wanted: format!("at least {}", ratio(wanted)),
            measured: measured.format_with(ratio),
            is_met: measured.median >= wanted,
        }
    }

    /// A figure that must not be higher. `write` formats both numbers with their unit.
    pub fn at_most(what: &str, wanted: f64, measured: f64, write: impl Fn(f64) -> String) -> Self {
        Self {
            what: what.to_owned(),
            wanted: format!("at most {}", write(wanted)),
            measured: write(measured),
            is_met: measured <= wanted,
        }
    }

    /// Whether the goal is met.
    pub fn is_met(&self) -> bool {
        self.is_met
    }
}

/// The whole document. `introduction` describes the machine and the method.
pub fn document(title: &str, introduction: &str, sections: &[Section]) -> String {
    let goals = sections.iter().flat_map(|section| &section.goals);
    let goals = table(
        &["goal", "wanted", "measured", ""],
        goals.map(|goal| {
            let verdict = if goal.is_met { "met" } else { "**not met**" };
            [&*goal.what, &goal.wanted, &goal.measured, verdict].map(str::to_owned)
        }),
    );
    let mut text = format!("# {title}\n\n{introduction}\n## Goals\n\n{goals}");
    for section in sections {
        write!(text, "\n## {}\n\n{}", section.title, section.text)
            .expect("writing to a string succeeds");
    }
    text
}

/// A table with text in the first column and figures in the others.
pub fn table<const N: usize>(
    header: &[&str; N],
    rows: impl IntoIterator<Item = [String; N]>,
) -> String {
    let mut text = format!("| {} |\n| --- |", header.join(" | "));
    text.push_str(&" ---: |".repeat(N - 1));
    text.push('\n');
    for row in rows {
        writeln!(text, "| {} |", row.join(" | ")).expect("writing to a string succeeds");
    }
    text
}

/// The section of a document with this title, from its heading to the next one.
pub fn section<'a>(document: &'a str, title: &str) -> Option<&'a str> {
    let heading = format!("## {title}\n");
    let start = document
        .match_indices(&heading)
        .map(|(start, _)| start)
        .find(|&start| start == 0 || document[..start].ends_with('\n'))?;
    let rest = &document[start + heading.len()..];
    let length = rest.find("\n## ").map_or(rest.len(), |end| end + 1);
    Some(&document[start..start + heading.len() + length])
}

/// The document with this text as its section of this title, in the old one's place or at the end.
pub fn with_section(document: &str, title: &str, text: &str) -> String {
    let new = format!("## {title}\n\n{}\n", text.trim_end());
    let Some(old) = section(document, title) else {
        return format!("{}\n\n{new}", document.trim_end());
    };
    let (before, after) = document.split_once(old).unwrap_or((document, ""));
    let gap = if after.is_empty() { "" } else { "\n" };
    format!("{before}{new}{gap}{after}")
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
# Measurements

Here.

## Goals

| goal | wanted | measured |  |
| --- | ---: | ---: | ---: |
| idle | at most 24 MiB | 25 MiB | **not met** |

## Memory

Little.
";
        assert_eq!(document("Measurements", "Here.\n", &[section]), expected);
    }

    #[test]
    fn section_is_replaced_in_its_place_or_added_at_the_end() {
        let document = "# Title\n\n## One\n\nFirst.\n\n## Two\n\nSecond.\n";
        assert_eq!(section(document, "One"), Some("## One\n\nFirst.\n\n"));
        assert_eq!(section(document, "Two"), Some("## Two\n\nSecond.\n"));
        assert_eq!(section(document, "Three"), None);
        assert_eq!(
            with_section(document, "One", "New.\n"),
            "# Title\n\n## One\n\nNew.\n\n## Two\n\nSecond.\n"
        );
        assert_eq!(
            with_section(document, "Two", "New."),
            "# Title\n\n## One\n\nFirst.\n\n## Two\n\nNew.\n"
        );
        let added = with_section(document, "Three", "Third.");
        assert_eq!(added, format!("{document}\n## Three\n\nThird.\n"));
    }
}
