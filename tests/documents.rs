//! The documents: each says the same in both languages, links lead somewhere, and figures are those
//! of the report that they cite. Must not know the service.
//!
//! `tests/tour.sh` runs the tour.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Each document and its translation.
const TRANSLATED: [[&str; 2]; 2] = [
    ["README.md", "README.pt-BR.md"],
    ["docs/tour.md", "docs/tour.pt-BR.md"],
];

/// Documents whose links are checked.
const DOCUMENTS: [&str; 21] = [
    "README.md",
    "README.pt-BR.md",
    "AGENTS.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "docs/architecture.md",
    "docs/compose.md",
    "docs/connecting.md",
    "docs/http.md",
    "docs/kubernetes.md",
    "docs/metrics.md",
    "docs/operations.md",
    "docs/proof.md",
    "docs/releases.md",
    "docs/reuse.md",
    "docs/scale.md",
    "docs/settings.md",
    "docs/tour.md",
    "docs/tour.pt-BR.md",
    "bench/report.md",
    "observability/runbook.md",
];

// --- languages ---

/// A line and its translation have the same place, so that a difference is easy to find.
#[test]
fn translation_has_the_same_commands_tables_figures_and_links() {
    for [original, translation] in TRANSLATED {
        let texts = [original, translation].map(read);
        let [ours, theirs] = texts.each_ref().map(|text| outline(text));
        for (number, (our, their)) in ours.iter().zip(&theirs).enumerate() {
            assert_eq!(our, their, "{translation}, line {}", number + 1);
        }
        assert_eq!(ours.len(), theirs.len(), "{translation}");
    }
}

#[test]
fn outline_sees_what_a_translation_must_keep() {
    let same = |our: &str, their: &str| outline(our) == outline(their);
    assert!(same("It took 0.5 s: `ls`.", "`ls` levou 0,5 s."));
    assert!(same("1 094 [a](b.md) in 3", "3, [c](b.pt-BR.md), 1 094"));
    for (our, their) in [
        ("It took 0.5 s.", "Levou 0,6 s."),
        ("| a | b |", "| a |"),
        ("Type `ls`.", "Digite `dir`."),
        ("```sh\nls\n```", "```sh\ndir\n```"),
        ("## A", "A"),
        ("- a", "a"),
        ("[a](b.md)", "[a](c.md)"),
    ] {
        assert!(!same(our, their), "{our} and {their}");
    }
}

// --- figures ---

/// Each line of evidence names its report; the report has its figures, date, revision and command.
#[test]
fn evidence_is_what_its_report_says() {
    let readme = read("README.md");
    let rows: Vec<_> = section(&readme, "## Evidence")
        .lines()
        .filter(|line| line.starts_with("| ") && line.contains("](") && line.contains(".md)"))
        .collect();
    assert_eq!(rows.len(), 13);
    for row in rows {
        let cells: Vec<_> = row.trim_matches('|').split(" | ").collect();
        let [_, measured, source, bounds] = cells[..] else {
            panic!("{row}");
        };
        let report = read(links(source).first().expect("a report"));
        let command = format!("- command: `{}`", code(source)[0]);
        assert!(report.contains(&command), "{command}: {row}");
        let (date, revision) = bounds.trim().split_once(", ").expect("date, revision");
        assert!(report.contains(&format!("- date: {date}")), "{row}");
        assert!(report.contains(&format!("({revision}")), "{row}");
        let known: BTreeSet<_> = figures(&report).into_iter().chain(sums(&report)).collect();
        for figure in figures(&without_code(measured)) {
            // Small whole numbers are names (p99) and counts of kinds.
            let is_name = figure.len() < 3 && !figure.contains('.');
            assert!(is_name || known.contains(&figure), "{figure}: {row}");
        }
    }
}

// --- links ---

#[test]
fn links_lead_to_files_and_headings() {
    for document in DOCUMENTS {
        let folder = root().join(document);
        let folder = folder.parent().expect("a folder");
        for link in links(&prose(&read(document))) {
            if link.contains("://") {
                continue;
            }
            let (file, anchor) = link.split_once('#').unwrap_or((&link, ""));
            let target = if file.is_empty() {
                root().join(document)
            } else {
                folder.join(file)
            };
            assert!(target.exists(), "{document}: {link}");
            if !anchor.is_empty() {
                let page = fs::read_to_string(&target).expect("a page");
                assert!(anchors(&page).contains(anchor), "{document}: {link}");
            }
        }
    }
}

#[test]
fn readme_names_every_document() {
    let index = read("README.md");
    for folder in ["docs", "bench", "observability"] {
        for entry in fs::read_dir(root().join(folder)).expect("a folder") {
            let name = entry.expect("an entry").file_name();
            let name = name.to_string_lossy().into_owned();
            let stem = name.strip_suffix(".md");
            if stem.is_some_and(|stem| !stem.contains(".pt-BR")) {
                assert!(index.contains(&format!("({folder}/{name})")), "{name}");
            }
        }
    }
}

#[test]
fn readme_names_existing_cases_of_the_end_to_end_test() {
    let cases = read("tests/e2e.sh");
    let readme = read("README.md");
    let rows = section(&readme, "## The challenge, point by point");
    let named: Vec<_> = rows
        .lines()
        .skip_while(|line| !line.starts_with("| ---"))
        .filter_map(|line| code(line.trim_end_matches([' ', '|'])).pop())
        .collect();
    assert!(named.len() > 7, "{named:?}");
    for case in named {
        assert!(cases.contains(&format!("\n{case}() {{")), "{case}");
    }
}

/// Who copies the repository learns of each part whether it is the challenge.
#[test]
fn reuse_names_files_that_exist_and_leaves_out_no_crate_and_no_part_of_src() {
    let reuse = read("docs/reuse.md");
    let tables = section(&reuse, "## What is the challenge, and what is not");
    let mut named: Vec<String> = Vec::new();
    for row in tables.lines().filter(|line| line.starts_with("| `")) {
        let cell = row.trim_start_matches("| ").split(" | ").next();
        let mut folder = "";
        let spans = code(cell.expect("a cell"));
        for name in &spans {
            // A name without a folder is in that of the name before it, or in the root.
            let paths = [format!("{folder}{name}"), name.clone()];
            let path = paths.into_iter().find(|path| begins_a_file(path));
            named.push(path.unwrap_or_else(|| panic!("{name} in {row}")));
            if let Some(end) = name.rfind('/') {
                folder = &name[..=end];
            }
        }
    }
    let manifest = read("Cargo.toml");
    let members = manifest.lines().find(|line| line.starts_with("members = "));
    let mut parts: Vec<_> = members
        .expect("members")
        .split('"')
        .skip(1)
        .step_by(2)
        .collect();
    let src: Vec<_> = entries("src").collect();
    parts.extend(src.iter().map(String::as_str));
    assert!(parts.len() > 15, "{parts:?}");
    for part in parts {
        assert!(named.iter().any(|name| name.starts_with(part)), "{part}");
    }
}

/// The tour shows these lines as those of the function that records visits.
#[test]
fn tour_shows_lines_of_the_last_migration() {
    let tour = read("docs/tour.md");
    let (_, after) = tour.split_once("sf registrar_visitas").expect("the lines");
    let shown = after.split("```").nth(2).expect("a block");
    let migration = read("migrations/0003_verificacao.sql");
    let lines: Vec<_> = shown.lines().skip(1).filter(|line| *line != "…").collect();
    assert_eq!(lines.len(), 3, "{shown}");
    for line in lines {
        assert!(migration.contains(line), "{line}");
    }
}

// --- what is in a document ---

/// What a translation has in common with its original, line by line: code as it is, except a diagram;
/// of other lines their kind, code, figures and links, in any order.
fn outline(text: &str) -> Vec<String> {
    let mut block = None;
    let line = |line: &str| {
        if let Some(language) = line.strip_prefix("```") {
            block = block.is_none().then(|| language.to_owned());
            return line.to_owned();
        }
        match block.as_deref() {
            Some("mermaid") => return String::new(),
            Some(_) => return line.to_owned(),
            None => {}
        }
        let kind: String = line
            .chars()
            .take_while(|letter| "#-|0123456789. ".contains(*letter))
            .collect();
        let cells = line.matches(" |").count();
        let mut kept = code(line);
        // A heading has another name in another language.
        kept.extend(links(line).iter().map(|link| {
            let page = link.split('#').next().unwrap_or_default();
            page.replace(".pt-BR.md", ".md")
        }));
        kept.extend(figures(&without_code(line)));
        kept.sort_unstable();
        let kind = if kind.starts_with(['#', '-', '|']) {
            kind.trim()
        } else {
            ""
        };
        format!("{kind} {cells} {kept:?}")
    };
    text.lines().map(line).collect()
}

/// The code spans of a line.
fn code(line: &str) -> Vec<String> {
    let spans = line.split('`').skip(1).step_by(2);
    spans.map(str::to_owned).collect()
}

fn without_code(line: &str) -> String {
    let parts: Vec<_> = line.split('`').step_by(2).collect();
    parts.join(" ")
}

/// The targets of a text's links.
fn links(text: &str) -> Vec<String> {
    let marked = text
        .split("](")
        .skip(1)
        .filter_map(|rest| rest.split_once(')'));
    let plain = text
        .split('<')
        .skip(1)
        .filter_map(|rest| rest.split_once('>'));
    marked
        .chain(plain.filter(|(link, _)| link.starts_with("http")))
        .map(|(link, _)| link.to_owned())
        .collect()
}

/// The numbers of a text, with a point and without separators.
fn figures(text: &str) -> Vec<String> {
    let letters: Vec<char> = text.chars().collect();
    let mut found = Vec::new();
    let mut number = String::new();
    for (at, letter) in letters.iter().enumerate() {
        let digit = |at: usize| letters.get(at).is_some_and(char::is_ascii_digit);
        let is_group = *letter == ' ' && (1..=3).all(|ahead| digit(at + ahead)) && !digit(at + 4);
        match letter {
            '0'..='9' => number.push(*letter),
            '.' | ',' if !number.is_empty() && digit(at + 1) => number.push('.'),
            _ if is_group && !number.is_empty() => {}
            _ if !number.is_empty() => found.push(std::mem::take(&mut number)),
            _ => {}
        }
    }
    found.extend((!number.is_empty()).then_some(number));
    found
}

/// The sums of each column of a report's tables, and how many rows a table has.
fn sums(report: &str) -> Vec<String> {
    let mut found = Vec::new();
    for table in report.split("\n\n").filter(|part| part.starts_with('|')) {
        let rows: Vec<Vec<_>> = table
            .lines()
            .skip(2)
            .map(|line| line.trim_matches('|').split('|').map(figures).collect())
            .collect();
        found.push(rows.len().to_string());
        let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
        for column in 0..columns {
            let numbers = rows.iter().filter_map(|row| row.get(column)?.first());
            let sum: u64 = numbers
                .filter_map(|number| number.parse::<u64>().ok())
                .sum();
            found.push(sum.to_string());
        }
    }
    found
}

/// A document without its blocks of code.
fn prose(text: &str) -> String {
    let parts: Vec<_> = text.split("\n```").step_by(2).collect();
    parts.join("\n")
}

/// The part of a document beneath a heading.
fn section<'a>(text: &'a str, heading: &str) -> &'a str {
    let (_, rest) = text
        .split_once(&format!("\n{heading}\n"))
        .expect("a section");
    rest.split("\n## ").next().expect("a part")
}

/// The anchors of a page's headings, as renderers of Markdown make them.
fn anchors(page: &str) -> BTreeSet<String> {
    let prose = prose(page);
    let headings = prose.lines().filter(|line| line.starts_with('#'));
    headings
        .map(|heading| {
            let title = heading.trim_start_matches('#').trim().to_lowercase();
            let kept = title
                .chars()
                .filter(|letter| letter.is_alphanumeric() || " -_".contains(*letter));
            kept.collect::<String>().replace(' ', "-")
        })
        .collect()
}

/// Whether this path, up to a `*`, is that of a file or the beginning of one.
fn begins_a_file(path: &str) -> bool {
    let path = path.split('*').next().unwrap_or_default();
    let (folder, _) = path.rsplit_once('/').unwrap_or_default();
    entries(folder).any(|entry| entry.starts_with(path))
}

/// The paths of what is in a folder; none if it does not exist.
fn entries(folder: &str) -> impl Iterator<Item = String> {
    let entries = fs::read_dir(root().join(folder)).into_iter().flatten();
    let prefix = if folder.is_empty() {
        String::new()
    } else {
        format!("{folder}/")
    };
    entries.map(move |entry| {
        let name = entry.expect("an entry").file_name();
        format!("{prefix}{}", name.to_string_lossy())
    })
}

fn read(document: &str) -> String {
    fs::read_to_string(root().join(document)).unwrap_or_else(|error| panic!("{document}: {error}"))
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_owned()
}
