//! Tells the program which revision it is and which compiler built it.
#![expect(
    clippy::disallowed_methods,
    reason = "cargo passes everything to a build script by the environment"
)]

use std::env;
use std::fs;
use std::process::Command;

fn main() {
    refuse_changed_migrations();
    println!("cargo:rustc-env=VISITAS_RUSTC={}", rustc_version());
    // A build without a repository, such as that of an image, gets its revision from a variable.
    println!("cargo:rerun-if-env-changed=VISITAS_REVISION");
    if env::var_os("VISITAS_REVISION").is_none()
        && let Some(revision) = git(&["rev-parse", "--short=12", "HEAD"])
    {
        println!("cargo:rustc-env=VISITAS_REVISION={revision}");
        for path in ["HEAD", "logs/HEAD"] {
            if let Some(path) = git(&["rev-parse", "--git-path", path]) {
                println!("cargo:rerun-if-changed={path}");
            }
        }
    }
}

/// Stops the build if a migration has line ends of Windows. They would change its checksum, and the
/// service would refuse each database that another build has migrated.
fn refuse_changed_migrations() {
    println!("cargo:rerun-if-changed=migrations");
    for entry in fs::read_dir("migrations").into_iter().flatten().flatten() {
        let path = entry.path();
        let has_cr = fs::read(&path).is_ok_and(|text| text.contains(&b'\r'));
        assert!(
            !has_cr,
            "{} has CR LF: restore it by `git checkout`, which writes LF (.gitattributes)",
            path.display()
        );
    }
}

fn rustc_version() -> String {
    let rustc = env::var("RUSTC").unwrap_or_else(|_| "rustc".to_owned());
    let version = output(Command::new(rustc).arg("--version"));
    version
        .as_deref()
        .and_then(|version| version.split_whitespace().nth(1))
        .unwrap_or("unknown")
        .to_owned()
}

fn git(arguments: &[&str]) -> Option<String> {
    output(Command::new("git").args(arguments))
}

fn output(command: &mut Command) -> Option<String> {
    let output = command
        .output()
        .ok()
        .filter(|output| output.status.success())?;
    Some(String::from_utf8(output.stdout).ok()?.trim().to_owned())
}
