//! A real pooler between the service and Postgres: `pgbouncer`. The test runs only where it is
//! installed (`apt-get install pgbouncer`), and says so where it is not.

use std::fs;

use devstack::{PASSWORD, USER};
use lab::ports::free_address;
use lab::process::Process;
use tempfile::TempDir;

use crate::support::{Ended, SOON, World, eventually, settings};

#[tokio::test]
async fn pooler_that_drops_the_settings_of_sessions_is_refused_and_named() {
    let Some(program) = pgbouncer() else {
        eprintln!("skipped: pgbouncer is not installed");
        return;
    };
    let world = World::new();
    for mode in ["session", "transaction"] {
        for (ignored, query, why) in [
            ("", "", "unsupported startup parameter: options"),
            ("options", "", "a pooler drops the settings of the session"),
            // Some settings are held, but not those that a 200 depends on.
            (
                "options",
                "connect_query='set plan_cache_mode = force_generic_plan'",
                "a pooler drops the settings of the session",
            ),
        ] {
            let folder = TempDir::new().expect("a folder");
            let port = free_address().expect("a free port").port();
            let file = folder.path().join("pgbouncer.ini");
            fs::write(
                &file,
                format!(
                    "[databases]\nvisitas = host={} port={} dbname={} user={USER} password={PASSWORD} {query}\n\
                     [pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nauth_type = any\n\
                     unix_socket_dir =\npool_mode = {mode}\nignore_startup_parameters = {ignored}\n",
                    world.postgres.host(),
                    world.postgres.port(),
                    world.database,
                ),
            )
            .expect("a file");
            let everyone = std::os::unix::fs::PermissionsExt::from_mode(0o755);
            fs::set_permissions(folder.path(), everyone).expect("a mode");
            let mut command = lab::process::command(program);
            if rustix::process::geteuid().is_root() {
                // It refuses to run as root.
                command.args(["-u", "nobody"]);
            }
            command.arg(&file);
            let log = folder.path().join("log");
            let _pooler = Process::start(command, &log).expect("PgBouncer starts");
            eventually("PgBouncer listens", SOON, async || {
                tokio::net::TcpStream::connect(("127.0.0.1", port))
                    .await
                    .is_ok()
            })
            .await;
            let url =
                format!("postgres://{USER}:{PASSWORD}@127.0.0.1:{port}/visitas?pgbouncer=true");
            let given = settings(&[("DATABASE_URL", &url), ("DB_TIMEOUT", "5s")]);
            let ended = Ended::of(&["migrate"], &given).await;
            assert_eq!(ended.code, Some(1), "{mode} {ignored} {query}: {ended:?}");
            for part in [why, "connect to the server itself", "PgBouncer"] {
                assert!(ended.errors.contains(part), "{part} in {ended:?}");
            }
        }
    }
}

fn pgbouncer() -> Option<&'static str> {
    let places = ["/usr/sbin/pgbouncer", "/usr/bin/pgbouncer"];
    places
        .into_iter()
        .find(|place| fs::exists(place).is_ok_and(|exists| exists))
}
