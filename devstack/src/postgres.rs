//! A Postgres with its user, password and database, and a way for tests to run SQL.

use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, bail};
use rustix::process::Signal;

use crate::find::{self, Installation};
use crate::place::{self, Data, Home, Port};
use crate::server::{Definition, Server};
use crate::supervise::Supervisor;
use crate::{DATABASE, PASSWORD, USER, tls};

/// The options of a Postgres. The default is temporary, on a free port, without TLS.
#[derive(Clone, Debug, Default)]
pub struct PostgresOptions {
    /// The location of the data. Kept data has a separate folder for each major version.
    pub data: Data,
    /// The port; 0 chooses a free one.
    pub port: u16,
    /// Settings of `postgresql.conf`, such as `("log_statement", "all")`. The last value of a name
    /// wins, also over the defaults here.
    pub config: Vec<(String, String)>,
    /// Whether it offers TLS. Clients without TLS are still accepted.
    pub tls: bool,
    /// Whether a login hashes the password once in place of the 4096 times of the default. In a
    /// debug build that is most of the time that a login takes.
    pub quick_login: bool,
    /// The folder of its programs, if it is not the installed one that devstack would choose.
    pub programs: Option<PathBuf>,
}

/// [`PASSWORD`] as Postgres keeps it after one round of hashing, with the salt `visitas-devstack`.
const QUICK_PASSWORD: &str = "SCRAM-SHA-256$1:dmlzaXRhcy1kZXZzdGFjaw==$\
    HppOEc3OoYrlOtPuul/fvMSpOrV7j5f4VJV91eYM27E=:vSyGX6wnSS6I6NNWwDtuWpyYzXlaYUpfDNgrOOJquNA=";

/// A Postgres on 127.0.0.1 with the superuser [`USER`] and the database [`DATABASE`]. See
/// [`Server`] for its lifetime.
pub struct Postgres {
    server: Server,
    programs: PathBuf,
    ca: Option<PathBuf>,
}

impl Postgres {
    /// Starts a Postgres and returns once it accepts connections.
    ///
    /// # Errors
    ///
    /// When no server is installed (the error says how to install one), the data is in use, or the
    /// server does not start (the error contains the end of its log).
    pub fn start(options: PostgresOptions) -> Result<Self> {
        let Installation {
            major,
            path: programs,
        } = find::postgres(options.programs.as_deref())?;
        let home = Home::open(options.data)?;
        let mut supervisor = Supervisor::for_home(&home)?;
        let data = home.path.join(format!("postgres-{major}"));
        if data.exists() {
            remove_stale_pid_file(&data)?;
        } else {
            let password = if options.quick_login {
                QUICK_PASSWORD
            } else {
                PASSWORD
            };
            let template = template(&programs, password)?;
            let copy = data.with_extension("new");
            let run = |supervisor: &mut Supervisor, command: &[&Path]| {
                supervisor.finish(command, &home.log())
            };
            run(&mut supervisor, &["rm".as_ref(), "-rf".as_ref(), &copy])?;
            run(
                &mut supervisor,
                &["cp".as_ref(), "-R".as_ref(), &template, &copy],
            )?;
            std::fs::rename(&copy, &data)?;
        }

        let port = Port::reserve(options.port)?;
        let mut settings = vec![
            ("port".into(), port.number.to_string()),
            ("listen_addresses".into(), "127.0.0.1".into()),
            ("unix_socket_directories".into(), String::new()),
            // The shared memory is then in the data folder, and is removed with it after a kill.
            ("dynamic_shared_memory_type".into(), "mmap".into()),
        ];
        let mut ca = None;
        if options.tls {
            let files = tls::Files::generate(&home)?;
            settings.extend([
                ("ssl".into(), "on".into()),
                (
                    "ssl_cert_file".into(),
                    files.certificate.display().to_string(),
                ),
                ("ssl_key_file".into(), files.key.display().to_string()),
            ]);
            ca = Some(files.ca);
        }
        settings.extend(options.config);
        let mut command = vec![
            programs.join("postgres").display().to_string(),
            "-D".into(),
            data.display().to_string(),
        ];
        command.extend(
            settings
                .iter()
                .flat_map(|(name, value)| ["-c".into(), format!("{name}={value}")]),
        );

        let pg_isready = programs.join("pg_isready");
        let number = port.number;
        let is_ready = move |pid| {
            // Checks the pid file first: another server could respond on the port.
            is_ready_by_pid_file(&data, pid)
                && place::without_settings(&pg_isready)
                    .args([
                        "-h",
                        "127.0.0.1",
                        "-p",
                        &number.to_string(),
                        "-t",
                        "1",
                        "-q",
                    ])
                    .status()
                    .is_ok_and(|status| status.success())
        };
        // SIGINT is the fast shutdown: connections are ended, and the next start needs no recovery.
        let definition = Definition {
            command,
            is_ready: Box::new(is_ready),
            stop_signal: Signal::INT,
        };
        Ok(Self {
            server: Server::start(home, port, supervisor, definition)?,
            programs,
            ca,
        })
    }

    /// The address of a database: `postgres://user:password@host:port/database`.
    #[must_use]
    pub fn url(&self, database: &str) -> String {
        format!(
            "postgres://{USER}:{PASSWORD}@{}:{}/{database}",
            self.host(),
            self.port()
        )
    }

    /// The certificate, in PEM, that a client must trust; `None` without TLS.
    #[must_use]
    pub fn ca(&self) -> Option<&Path> {
        self.ca.as_deref()
    }

    /// The folder of its installed programs: `psql`, `pgbench` and the others.
    #[must_use]
    pub fn programs(&self) -> &Path {
        &self.programs
    }

    /// Creates an empty database.
    ///
    /// # Errors
    ///
    /// When it exists, or the server does not respond.
    pub fn create_database(&self, name: &str) -> Result<()> {
        self.sql("postgres", &format!("create database {}", quote(name)))
            .map(drop)
    }

    /// Removes a database if it exists, and ends the connections to it.
    ///
    /// # Errors
    ///
    /// When the server does not respond.
    pub fn drop_database(&self, name: &str) -> Result<()> {
        self.sql(
            "postgres",
            &format!("drop database if exists {} with (force)", quote(name)),
        )
        .map(drop)
    }

    /// Runs one statement through `psql` and returns its rows, one per line, with `|` between the
    /// columns.
    ///
    /// # Errors
    ///
    /// When the statement fails, or the server does not respond.
    pub fn sql(&self, database: &str, statement: &str) -> Result<String> {
        let output = place::without_settings(self.programs.join("psql"))
            .env("PGPASSWORD", PASSWORD)
            .env("PGCONNECT_TIMEOUT", "10")
            .args([
                "-h",
                self.host(),
                "-p",
                &self.port().to_string(),
                "-U",
                USER,
                "-d",
                database,
            ])
            .args(["-XqAt", "-v", "ON_ERROR_STOP=1", "-c", statement])
            .stderr(Stdio::piped())
            .output()
            .context("cannot run psql")?;
        if !output.status.success() {
            bail!(
                "psql: {}",
                String::from_utf8_lossy(&output.stderr).trim_end()
            );
        }
        Ok(String::from_utf8(output.stdout)?.trim_end().to_owned())
    }
}

impl Deref for Postgres {
    type Target = Server;

    fn deref(&self) -> &Server {
        &self.server
    }
}

/// A cluster to copy, created once for each installed version: `initdb` takes a second, a copy a
/// tenth of that.
fn template(programs: &Path, password: &str) -> Result<PathBuf> {
    const INITDB: &str = include_str!("initdb.sh");
    let version = place::without_settings(programs.join("postgres"))
        .arg("--version")
        .output()?
        .stdout;
    let key = place::hash(&[&version, INITDB.as_bytes(), password.as_bytes()].concat());
    let templates = place::folder()?.join("templates");
    let template = templates.join(format!("{key:016x}"));
    if template.exists() {
        return Ok(template);
    }
    place::create_owned(&templates)?;
    let home = Home::open(Data::Temporary)?;
    let mut supervisor = Supervisor::for_home(&home)?;
    let cluster = home.path.join("cluster");
    let programs = programs.display().to_string();
    let path = cluster.display().to_string();
    supervisor.finish(
        &[
            "/bin/sh", "-c", INITDB, "initdb", &programs, &path, USER, password, DATABASE,
        ],
        &home.log(),
    )?;
    // The first process to rename wins; the clusters of the others are removed with their temporary
    // folders.
    if let Err(error) = std::fs::rename(&cluster, &template)
        && !template.exists()
    {
        return Err(error).context("cannot keep the new cluster");
    }
    Ok(template)
}

/// Whether `postmaster.pid` belongs to this process and states that it accepts connections.
fn is_ready_by_pid_file(data: &Path, pid: u32) -> bool {
    let file = std::fs::read_to_string(data.join("postmaster.pid")).unwrap_or_default();
    let mut lines = file.lines();
    lines.next() == Some(pid.to_string().as_str())
        && lines.nth(6).map(str::trim_end) == Some("ready")
}

/// Removes the `postmaster.pid` of a killed server whose id now belongs to another process, or to a
/// zombie.
///
/// Postgres itself would mistake any process of its account for a server on this data, and not
/// start. The lock on the data shows that no devstack runs one; a postmaster started otherwise has
/// the data folder in its command.
fn remove_stale_pid_file(data: &Path) -> Result<()> {
    let file = data.join("postmaster.pid");
    let Ok(content) = std::fs::read_to_string(&file) else {
        return Ok(());
    };
    let pid = content.lines().next().unwrap_or_default();
    let command = std::fs::read_to_string(format!("/proc/{pid}/cmdline"))
        .ok()
        .or_else(|| {
            let ps = place::without_settings("ps")
                .args(["-o", "command=", "-p", pid])
                .output()
                .ok()?;
            ps.status
                .success()
                .then(|| String::from_utf8_lossy(&ps.stdout).into_owned())
        });
    if command.is_some_and(|command| !command.contains(&*data.display().to_string())) {
        std::fs::remove_file(file)?;
    }
    Ok(())
}

fn quote(identifier: &str) -> String {
    format!("\"{}\"", identifier.replace('"', "\"\""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pid_file_whose_id_went_to_another_process_does_not_block() {
        let home = tempfile::tempdir().unwrap();
        let options = || PostgresOptions {
            data: Data::Kept(home.path().into()),
            ..PostgresOptions::default()
        };
        let first = Postgres::start(options()).unwrap();
        let other = Postgres::start(PostgresOptions::default()).unwrap();
        first.kill().unwrap();
        let data = format!("postgres-{}", find::postgres(None).unwrap().major);
        let pid_file = first.folder().join(data).join("postmaster.pid");
        let content = std::fs::read_to_string(&pid_file).unwrap();
        let (_, rest) = content.split_once('\n').unwrap();
        std::fs::write(&pid_file, format!("{}\n{rest}", other.pid().unwrap())).unwrap();
        drop(first);
        Postgres::start(options()).unwrap();
    }
}
