//! Hosted CI, releases and the contributor's kit say what the rest of the repository says, and their
//! scripts do what they say. Must not know the service.

use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::thread;

const WORKFLOWS: [&str; 4] = [
    ".github/workflows/ci.yml",
    ".github/workflows/build.yml",
    ".github/workflows/release.yml",
    ".github/actions/rust/action.yml",
];

// --- hosted CI ---

#[test]
fn hosted_ci_makes_every_target_that_ci_run_makes() {
    let hosted = read(".github/workflows/ci.yml");
    let whole = read(".ci/run");
    let targets: Vec<_> = whole
        .lines()
        .filter_map(|line| line.trim().strip_prefix("step make "))
        .collect();
    assert!(targets.len() > 5, "{targets:?}");
    for target in targets {
        assert!(
            hosted.contains(&format!("{{ target: {target}, minutes: ")),
            "{target}"
        );
    }
}

#[test]
fn workflows_run_other_peoples_code_by_its_commit_alone() {
    for workflow in WORKFLOWS {
        let text = read(workflow);
        let uses = text.lines().filter_map(|line| line.split_once("uses: "));
        for (_, action) in uses {
            if action.starts_with("./") {
                continue;
            }
            let (action, version) = action.split_once(" # v").expect(action);
            let (_, commit) = action.split_once('@').expect(action);
            assert!(
                commit.len() == 40 && commit.bytes().all(|byte| byte.is_ascii_hexdigit()),
                "{workflow}: {action}"
            );
            assert!(version.contains('.'), "{workflow}: {action} # v{version}");
        }
    }
}

/// One action has one version everywhere.
#[test]
fn workflows_agree_about_versions() {
    let mut pinned = BTreeSet::new();
    for workflow in WORKFLOWS {
        let text = read(workflow);
        for (_, action) in text.lines().filter_map(|line| line.split_once("uses: ")) {
            pinned.insert(action.to_owned());
        }
    }
    let names: BTreeSet<_> = pinned
        .iter()
        .map(|action| action.split('@').next())
        .collect();
    assert_eq!(names.len(), pinned.len(), "{pinned:?}");
}

#[test]
fn pull_requests_meet_no_secret_and_no_right_to_write() {
    for workflow in WORKFLOWS {
        let text = read(workflow);
        assert!(!text.contains("secrets."), "{workflow}");
        assert!(!text.contains("pull_request_target"), "{workflow}");
        if !workflow.contains("/actions/") {
            assert!(text.contains("\npermissions: {}\n"), "{workflow}");
        }
    }
    let hosted = read(".github/workflows/ci.yml");
    assert!(!hosted.contains(": write"));
    assert!(!hosted.contains("github.token"));
}

#[test]
fn dependabot_watches_each_dockerfile() {
    let dependabot = read(".github/dependabot.yml");
    let docker = dependabot.split("package-ecosystem: docker\n").nth(1);
    let watched = docker.and_then(|rest| rest.lines().next()).expect("docker");
    let mut folders = folders_in(&root());
    let nested: Vec<_> = folders.iter().flat_map(|one| folders_in(one)).collect();
    folders.extend(nested);
    let mut found = 0;
    for folder in folders {
        if folder.join("Dockerfile").exists() {
            let name = folder.strip_prefix(root()).expect("a folder of ours");
            let name = format!(" /{}", name.display());
            let mut names = watched.split([',', '[', ']']);
            assert!(names.any(|watched| watched == name), "{name} in {watched}");
            found += 1;
        }
    }
    assert!(found > 2, "{found}");
}

// --- versions, each stated once ---

#[test]
fn documents_repeat_the_oldest_rust_of_the_manifest() {
    let manifest = read("Cargo.toml");
    let oldest = quoted_after(&manifest, "rust-version = ");
    let install = read("devstack/install.sh");
    assert!(!install.contains(&oldest), "{oldest} is stated again");
    for document in ["README.md", "README.pt-BR.md"] {
        let text = read(document);
        let (_, stated) = text
            .split_once("[Rust](https://rustup.rs) ")
            .expect(document);
        let stated = stated.split(' ').next();
        assert_eq!(stated, Some(oldest.as_str()), "{document}");
    }
}

#[test]
fn rust_of_image_and_devcontainer_is_one_version() {
    let version = |file: &str| {
        let text = read(file);
        let (_, version) = text.split_once("library/rust:").expect(file);
        version.split('-').next().expect(file).to_owned()
    };
    let built = version("Dockerfile");
    assert_eq!(version(".devcontainer/Dockerfile"), built);
    let minor = |version: &str| version.split('.').nth(1)?.parse::<u32>().ok();
    let oldest = quoted_after(&read("Cargo.toml"), "rust-version = ");
    assert!(minor(&oldest) <= minor(&built), "{oldest}, {built}");
}

#[test]
fn licences_of_a_release_are_those_that_deny_allows() {
    let allowed = |file: &str| -> BTreeSet<String> {
        let text = read(file);
        // The list in deny.toml, and those of its exceptions; the only list of about.toml with them.
        text.lines()
            .filter(|line| line.starts_with("    \"") || line.contains("allow = [\""))
            .filter_map(|line| line.split('"').rev().nth(1))
            .filter(|name| !name.contains("-unknown-") && !name.contains("-apple-"))
            .map(str::to_owned)
            .collect()
    };
    assert_eq!(allowed("about.toml"), allowed("deny.toml"));
}

// --- make ---

#[test]
fn every_target_that_is_listed_says_how_long_it_takes() {
    let makefile = read("Makefile");
    let listed: Vec<_> = makefile
        .lines()
        .filter(|line| {
            !line.starts_with(['\t', '#']) && line.contains(": ") && line.contains(" ## ")
        })
        .collect();
    assert!(listed.len() > 15, "{listed:?}");
    for line in listed {
        let time = line.rsplit_once(" (").map(|(_, time)| time);
        let units = ["at once)", "seconds)", "minute)", "minutes)"];
        assert!(
            time.is_some_and(|time| units.iter().any(|unit| time.ends_with(unit))),
            "{line}"
        );
    }
}

#[test]
fn setup_all_installs_what_any_target_installs() {
    let said = run(Command::new("make")
        .args(["--dry-run", "setup-all"])
        .current_dir(root()));
    let installed = text(&said.stdout);
    let makefile = read("Makefile");
    let is_pair = |word: &&str| {
        let name = |name: &str| {
            let letters = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
            name.starts_with(|letter: char| letter.is_ascii_lowercase())
                && name
                    .bytes()
                    .all(|byte| letters(byte) || b":._-".contains(&byte))
        };
        let sides = word.split_once('=');
        sides.is_some_and(|(program, package)| name(program) && name(package))
    };
    let pairs: Vec<_> = makefile.split_whitespace().filter(is_pair).collect();
    assert!(pairs.len() > 15, "{pairs:?}");
    for pair in pairs {
        let mut words = installed.split_whitespace();
        assert!(words.any(|word| word == pair), "{pair} in {said:?}");
    }
}

// --- the release's scripts ---

#[test]
fn release_notes_are_the_section_of_the_version() {
    let copy = copy_of(&[".github/release-notes.sh", "Cargo.toml", "Dockerfile"]);
    let script = copy.path().join(".github/release-notes.sh");
    let version = quoted_after(&read("Cargo.toml"), "version = ");
    let notes = |changelog: &str| {
        fs::write(copy.path().join("CHANGELOG.md"), changelog).expect("a changelog");
        run(Command::new(&script).arg(&version))
    };
    let said = notes(&format!(
        "# Changelog\n\n## [Unreleased]\n\n- Later.\n\n## [{version}] - 2026-12-01\n\n- Now.\n\n## [0.0.1]\n\n- Before.\n"
    ));
    assert_eq!(text(&said.stdout).trim(), "- Now.", "{said:?}");
    let said = notes("# Changelog\n\n## [Unreleased]\n\n- Later.\n");
    assert!(!said.status.success());
    assert!(text(&said.stderr).contains("has no section"), "{said:?}");
    let said = run(Command::new(&script).arg("9.9.9"));
    assert!(
        text(&said.stderr).contains("Cargo.toml has another"),
        "{said:?}"
    );
}

#[test]
fn compose_file_of_a_release_differs_in_its_image_alone() {
    let said =
        run(Command::new(root().join(".github/release-compose.sh"))
            .arg("registry.example/visitas:1.0"));
    assert!(said.status.success(), "{said:?}");
    let (ours, theirs) = (read("docker-compose.yml"), text(&said.stdout));
    let changed: Vec<_> = ours
        .lines()
        .zip(theirs.lines())
        .filter(|(our, their)| our != their)
        .map(|(_, their)| their.trim())
        .collect();
    assert_eq!(
        changed,
        ["image: ${VISITAS_IMAGE:-registry.example/visitas:1.0}"]
    );
    assert_eq!(ours.lines().count(), theirs.lines().count());
}

/// With programs in place of gh and cosign, of which one at a time refuses.
#[test]
fn verification_fails_if_provenance_contents_or_signature_do_not_hold() {
    let programs = tempfile::tempdir().expect("a folder");
    let digest = "0123456789abcdef".repeat(4);
    let program = |name: &str, script: &str| {
        let file = programs.path().join(name);
        fs::write(&file, format!("#!/bin/sh\n{script}\n")).expect("a program");
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).expect("its mode");
    };
    let calls = programs.path().join("calls");
    let verify = |refused: &str| {
        fs::write(&calls, "").expect("a file");
        let script = format!(
            "echo \"$(basename \"$0\") $*\" >>'{}'\ncase \"$0 $*\" in *'{refused}'*) exit 1 ;; esac",
            calls.display()
        );
        program("gh", &format!("{script}\necho {digest}"));
        program("cosign", &script);
        run(Command::new(root().join(".github/verify-release.sh"))
            .args(["Some-Owner/Visitas", "1.2.3"])
            .env(
                "PATH",
                format!("{}:/usr/bin:/bin", programs.path().display()),
            ))
    };
    let said = verify("nothing that is asked");
    assert!(said.status.success(), "{said:?}");
    let image = format!("ghcr.io/some-owner/visitas@sha256:{digest}");
    assert!(text(&said.stdout).starts_with(&image), "{said:?}");
    let asked = fs::read_to_string(&calls).expect("the calls");
    let signer =
        "https://github.com/Some-Owner/Visitas/.github/workflows/build.yml@refs/tags/v1.2.3";
    assert_eq!(asked.lines().count(), 3, "{asked}");
    assert_eq!(asked.matches(signer).count(), 3, "{asked}");
    // Only the first question is about a name, and the others about what it led to.
    assert_eq!(asked.matches(&image).count(), 2, "{asked}");
    for refused in ["slsa.dev/provenance", "spdx.dev", "cosign"] {
        let said = verify(refused);
        assert!(!said.status.success(), "{refused}: {said:?}");
        assert!(said.stdout.is_empty(), "{refused}: {said:?}");
    }
}

// --- helpers ---

/// A child that another test has forked holds a script open until the child's program starts.
fn run(command: &mut Command) -> Output {
    loop {
        match command.output() {
            Err(error) if error.kind() == ErrorKind::ExecutableFileBusy => thread::yield_now(),
            output => return output.expect("a script"),
        }
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("text")
}

/// The folders in a folder, without what builds and git keep.
fn folders_in(folder: &Path) -> Vec<PathBuf> {
    let kept = |path: &PathBuf| {
        ["target", ".git", ".devstack"]
            .iter()
            .any(|name| path.ends_with(name))
    };
    let entries = fs::read_dir(folder).expect("a folder");
    entries
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.is_dir() && !kept(path))
        .collect()
}

/// A folder with these files.
fn copy_of(files: &[&str]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    for file in files {
        let target = folder.path().join(file);
        fs::create_dir_all(target.parent().expect("a folder")).expect("a folder");
        fs::copy(root().join(file), target).expect(file);
    }
    folder
}

/// The value of the first line that begins like this.
fn quoted_after(text: &str, beginning: &str) -> String {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(beginning))
        .expect(beginning);
    line.trim_matches('"').to_owned()
}

fn read(file: &str) -> String {
    fs::read_to_string(root().join(file)).unwrap_or_else(|error| panic!("{file}: {error}"))
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_owned()
}
