//! The system's root certificates, and how Postgres is kept from trusting them where
//! `DB_SSLROOTCERT` names others.
//!
//! The Postgres driver adds the certificates that it is given to the system's, which it finds at
//! each handshake by `SSL_CERT_FILE` and `SSL_CERT_DIR` or in the usual places. It has no switch
//! for that, and a process cannot change its own environment without `unsafe`. So the program
//! executes itself again, as the same process, with `SSL_CERT_FILE=/dev/null`: from there on no
//! library finds a root certificate by itself, and each client is given those that it may trust.
//! Where the system's are is handed on in two further variables. A client that is given none
//! trusts no authority.
//!
//! This file knows no setting.

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

/// What libraries read: a file of certificates, and directories of such files.
const FILE: &str = "SSL_CERT_FILE";
const DIRECTORIES: &str = "SSL_CERT_DIR";
/// Where the system's roots are, for a process whose libraries do not find them. The second is
/// always there, if only as an empty text.
const HANDED_FILE: &str = "VISITAS_SYSTEM_CERT_FILE";
const HANDED_DIRECTORIES: &str = "VISITAS_SYSTEM_CERT_DIR";
/// A file that can be read everywhere and holds no certificate.
const NONE: &str = "/dev/null";

/// The system's root certificates, for a client that does not find them by itself; `None` where it
/// does.
pub(super) fn handed_on(environment: Environment<'_>) -> Option<Certificates> {
    are_hidden(environment).then(|| {
        let file = environment(HANDED_FILE).map(PathBuf::from);
        let directories = paths(environment(HANDED_DIRECTORIES));
        load(file.as_deref(), &directories)
    })
}

/// Returns once no library finds a root certificate by itself: at once in a process where that is
/// so. Otherwise the program is executed again, with the same arguments, and this does not return.
/// Must be called before anything has been started.
pub(super) fn hide(environment: Environment<'_>) -> anyhow::Result<()> {
    if are_hidden(environment) {
        return Ok(());
    }
    // Or the program would execute itself for ever.
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
    // By its path the process keeps its name in the system's list of processes. A file that has
    // been deleted or replaced since the start is no longer there by its path.
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

/// Where libraries look for the system's roots: as `rustls-native-certs` has it, where either
/// variable is set both stand for all usual places.
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

/// Reads certificates. As everywhere, those of the system's that cannot be read or used are left
/// out.
fn load(file: Option<&Path>, directories: &[PathBuf]) -> Certificates {
    let mut found = load_certs_from_paths(file, None).certs;
    for directory in directories {
        found.extend(load_certs_from_paths(None, Some(directory)).certs);
    }
    // The same ones are often in the file and in a directory.
    found.sort_unstable_by(|one, other| one.as_ref().cmp(other.as_ref()));
    found.dedup();
    let mut store = RootCertStore::empty();
    found.retain(|certificate| store.add(certificate.clone()).is_ok());
    Certificates {
        path: file.map(PathBuf::from).unwrap_or_default(),
        pem: Certificates::in_pem(&found),
    }
}
