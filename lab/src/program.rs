//! The service's executable: where it is built, whether it is current, and how to start it. Also
//! the folder for logs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};

use crate::process;

/// Cargo's output folder for the profile of this program.
fn built() -> Result<PathBuf> {
    let program = std::env::current_exe()?;
    let folder = program.parent().context("a program without a folder")?;
    // Tests lie one deeper.
    let folder = if folder.ends_with("deps") {
        folder.parent().context("no target folder")?
    } else {
        folder
    };
    Ok(folder.to_owned())
}

/// The service's executable, next to this one. It is an error if it does not exist or is older than
/// its sources.
pub fn visitas() -> Result<PathBuf> {
    let program = built()?.join("visitas");
    let advice = "make builds it, or cargo build --bin visitas";
    ensure!(
        program.exists(),
        "{} is not built: {advice}",
        program.display()
    );
    if let Some(source) = newer_source(&program)? {
        let (program, source) = (program.display(), source.display());
        bail!("{program} is older than {source}: {advice}");
    }
    Ok(program)
}

/// A source of the service that is newer than the program. Next to each library, the compiler lists
/// its sources, as paths relative to the workspace.
fn newer_source(program: &Path) -> Result<Option<PathBuf>> {
    const WORKSPACE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
    let built = fs::metadata(program)?.modified()?;
    let folder = program.parent().context("a program without a folder")?;
    let mut sources = vec!["src/main.rs".to_owned()];
    for list in fs::read_dir(folder.join("deps"))? {
        let list = list?.path();
        let name = list.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with("visitas-") && list.extension() == Some("d".as_ref()) {
            let rules = fs::read_to_string(&list)?;
            let mut rules = rules.lines().filter_map(|rule| rule.split_once(": "));
            let library =
                rules.find(|(target, _)| Path::new(target).extension() == Some("rlib".as_ref()));
            if let Some((_, sources_of_library)) = library {
                // A space within a path is escaped.
                let sources_of_library = sources_of_library.replace("\\ ", "\0");
                let sources_of_library = sources_of_library
                    .split(' ')
                    .map(|source| source.replace('\0', " "));
                sources.extend(sources_of_library);
            }
        }
    }
    ensure!(
        sources.len() > 1,
        "no list of sources in {}",
        folder.display()
    );
    let is_newer = |source: &PathBuf| {
        // A list from an older build can name a deleted source.
        let modified = fs::metadata(source).and_then(|source| source.modified());
        modified.is_ok_and(|modified| modified > built)
    };
    let mut sources = sources
        .iter()
        .map(|source| Path::new(WORKSPACE).join(source));
    Ok(sources.find(is_newer))
}

/// The variable that says where an instrumented program leaves which of its lines have run;
/// cargo-llvm-cov builds with it.
pub const COVERAGE: Option<(&str, &str)> = match option_env!("LLVM_PROFILE_FILE") {
    Some(file) => Some(("LLVM_PROFILE_FILE", file)),
    None => None,
};

/// A command that runs the service with only these settings in its environment.
pub fn command(settings: impl IntoIterator<Item = (&'static str, String)>) -> Result<Command> {
    let mut command = process::command(visitas()?);
    command.env_clear().envs(COVERAGE).envs(settings);
    Ok(command)
}

/// The folder for logs and other files, in cargo's target folder.
pub fn scratch() -> Result<PathBuf> {
    let built = built()?;
    let target = built.parent().context("no target folder")?;
    let folder = target.join("bench");
    fs::create_dir_all(&folder)?;
    Ok(folder)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use super::*;

    #[test]
    fn program_older_than_a_source_is_refused() {
        let folder = scratch().unwrap().join("newer source");
        fs::create_dir_all(folder.join("deps")).unwrap();
        let [program, one, other] =
            ["visitas", "one.rs", "the other.rs"].map(|name| folder.join(name));
        let touch = |file: &Path, moment: SystemTime| {
            fs::File::create(file)
                .unwrap()
                .set_modified(moment)
                .unwrap();
        };
        let list = folder.join("deps/visitas-0123.d");
        let escaped = |file: &Path| file.display().to_string().replace(' ', "\\ ");
        let sources = format!("{} {}", escaped(&one), escaped(&other));
        let rules = format!("visitas-0123.d: {sources}\n\nlibvisitas-0123.rlib: {sources}\n");
        fs::write(&list, rules).unwrap();
        // Later than src/main.rs.
        let built = SystemTime::now() + Duration::from_secs(1000);
        touch(&program, built);
        touch(&one, built);
        touch(&other, built - Duration::from_secs(1));
        assert_eq!(newer_source(&program).unwrap(), None);
        touch(&other, built + Duration::from_secs(1));
        assert_eq!(newer_source(&program).unwrap(), Some(other));
        fs::remove_file(&list).unwrap();
        assert!(newer_source(&program).is_err());
    }
}
