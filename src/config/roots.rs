//! The system's root certificates, and how they are hidden from the Postgres driver when
//! `DB_SSLROOTCERT` names others.
//!
//! The Postgres driver trusts the system's certificates as well as those it is given. It looks for
//! them at each handshake, by `SSL_CERT_FILE` and `SSL_CERT_DIR` or in the usual places, and has no
//! switch for that; a process cannot change its own environment without `unsafe`. So the program
//! executes itself again, as the same process, with `SSL_CERT_FILE=/dev/null`. From then on no
//! library finds a root certificate by itself, and each client gets the certificates that it may
//! trust. Two further variables pass on the paths of the system's certificates. A client that gets
//! no certificate trusts no authority.
//!
//! Must not know: any setting.

use std::ffi::{OsStr, OsString};
use std::io::ErrorKind;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use rustls::RootCertStore;
use rustls_native_certs::load_certs_from_paths;

use super::value::Certificates;

/// Reads a variable.
pub(super) type Environment<'a> = &'a dyn Fn(&str) -> Option<OsString>;

/// The variables that libraries read: a file of certificates, and directories of such files.
const FILE: &str = "SSL_CERT_FILE";
const DIRECTORIES: &str = "SSL_CERT_DIR";
/// The paths of the system's roots, for a process whose libraries do not find them. The second
/// variable is always set, if only to an empty text.
const HANDED_FILE: &str = "VISITAS_SYSTEM_CERT_FILE";
const HANDED_DIRECTORIES: &str = "VISITAS_SYSTEM_CERT_DIR";
/// A file that every process can read and that holds no certificate.
const NONE: &str = "/dev/null";

/// The system's root certificates, for a client whose library cannot find them; `None` if it can.
pub(super) fn load_system_roots(environment: Environment<'_>) -> Option<Certificates> {
    are_hidden(environment).then(|| {
        let file = environment(HANDED_FILE).map(PathBuf::from);
        let directories = paths(environment(HANDED_DIRECTORIES));
        load(file.as_deref(), &directories)
    })
}

/// Hides the system's root certificates from every library. Returns if they are hidden already;
/// otherwise it executes the program again, with the same arguments, and does not return. Must be
/// called before anything is started.
pub(super) fn hide(environment: Environment<'_>) -> anyhow::Result<()> {
    if are_hidden(environment) {
        return Ok(());
    }
    // Without this check the program could execute itself for ever.
    ensure!(
        environment(HANDED_DIRECTORIES).is_none(),
        "{HANDED_DIRECTORIES} is set, as by this program itself, but {FILE} is not {NONE}"
    );
    let (file, directories) = places(environment);
    let directories = std::env::join_paths(directories).context("naming the system's roots")?;
    let mut arguments = std::env::args_os();
    let name = arguments.next().unwrap_or_else(|| "visitas".into());
    let arguments: Vec<OsString> = arguments.collect();
    let execute = |program: &Path| {
        let mut command = std::process::Command::new(program);
        command
            .arg0(&name)
            .args(&arguments)
            .env(FILE, NONE)
            .env_remove(DIRECTORIES)
            .env(HANDED_DIRECTORIES, &directories);
        match &file {
            Some(file) => command.env(HANDED_FILE, file),
            None => command.env_remove(HANDED_FILE),
        };
        command.exec()
    };
    // The path keeps the process's name in the system's list of processes. It does not exist if the
    // file was deleted or replaced since the start.
    let failure = match std::env::current_exe().map(|program| execute(&program)) {
        Ok(error) if error.kind() == ErrorKind::NotFound => execute(Path::new("/proc/self/exe")),
        Ok(error) | Err(error) => error,
    };
    Err(failure).context("the program could not execute itself")
}

fn are_hidden(environment: Environment<'_>) -> bool {
    environment(FILE).is_some_and(|file| file == NONE)
        && environment(DIRECTORIES).is_none_or(|directories| directories.is_empty())
}

/// The paths where libraries look for the system's roots. As in `rustls-native-certs`, if either
/// variable is set, the two replace all usual places.
fn places(environment: Environment<'_>) -> (Option<OsString>, Vec<PathBuf>) {
    let (file, directories) = (environment(FILE), paths(environment(DIRECTORIES)));
    if file.is_some() || !directories.is_empty() {
        return (file, directories);
    }
    let found = openssl_probe::probe();
    (found.cert_file.map(OsString::from), found.cert_dir)
}

fn paths(joined: Option<OsString>) -> Vec<PathBuf> {
    let mut paths: Vec<_> = std::env::split_paths(&joined.unwrap_or_default()).collect();
    paths.retain(|path| path.as_os_str() != OsStr::new(""));
    paths
}

/// Reads certificates, and skips those that cannot be read or used, as libraries do with the
/// system's.
fn load(file: Option<&Path>, directories: &[PathBuf]) -> Certificates {
    let mut found = load_certs_from_paths(file, None).certs;
    for directory in directories {
        found.extend(load_certs_from_paths(None, Some(directory)).certs);
    }
    // The file and a directory often hold the same certificates.
    found.sort_unstable_by(|one, other| one.as_ref().cmp(other.as_ref()));
    found.dedup();
    let mut store = RootCertStore::empty();
    found.retain(|certificate| store.add(certificate.clone()).is_ok());
    Certificates {
        path: file.map(PathBuf::from).unwrap_or_default(),
        pem: Certificates::in_pem(&found),
    }
}
