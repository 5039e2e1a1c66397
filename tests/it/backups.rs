//! Backups and moves that copy more than a dump: a base backup, a moment in the past, and logical
//! replication into another server. The total equals the rows after each.
//!
//! `make compat` replicates from each version of Postgres into the newest.

use std::fs;
use std::io::Write as _;
use std::path::PathBuf;

use devstack::{Data, Postgres, PostgresOptions, RedisOptions};
use tempfile::TempDir;

use crate::restored::{BY_HAND, Other, client, dump_of};
use crate::support::{SOON, World, eventually, start_postgres};

#[tokio::test(flavor = "multi_thread")]
async fn base_backup_is_counted_exactly() {
    let world = World::of_its_own();
    let service = world.serve().await;
    for _ in 0..3 {
        service.visit().await;
    }
    world.sql(BY_HAND).await;
    let backup = Backup::of(&world.postgres);
    // Not in the backup.
    service.visit().await;
    let restored = backup.start(&world);
    let service = restored.serve(&world).await;
    assert_eq!(service.visit().await.0, 22);
    restored.expect_exact(&service).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn moment_in_the_past_is_counted_exactly() {
    let archive = "mkdir -p ../archive && cp %p ../archive/%f";
    let archiving = PostgresOptions {
        config: [("archive_mode", "on"), ("archive_command", archive)]
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .into(),
        ..PostgresOptions::default()
    };
    let world = World::with(archiving, RedisOptions::default());
    let service = world.serve().await;
    service.visit().await;
    let backup = Backup::of(&world.postgres);
    for _ in 0..3 {
        service.visit().await;
    }
    world.sql(BY_HAND).await;
    let sql = |statement| world.postgres.sql(&world.database, statement).unwrap();
    let moment = sql("select clock_timestamp()");
    // The mistake.
    world.sql("truncate visitas").await;
    service.visit().await;
    let segment = sql("select pg_walfile_name(pg_switch_wal())");
    let is_archived = format!("select last_archived_wal >= '{segment}' from pg_stat_archiver");
    eventually("the log is archived", SOON, async || {
        world.postgres.sql("postgres", &is_archived).unwrap() == "t"
    })
    .await;
    let archive = world.postgres.folder().join("archive");
    backup.recover(&format!(
        "restore_command = 'cp \"{}/%f\" \"%p\"'\n\
         recovery_target_time = '{moment}'\n\
         recovery_target_action = 'promote'\n",
        archive.display()
    ));
    let restored = backup.start(&world);
    eventually("the recovery has ended", SOON, async || {
        restored.sql("select pg_is_in_recovery()") == "f"
    })
    .await;
    let service = restored.serve(&world).await;
    // 4 visits and the 18 rows of BY_HAND.
    assert_eq!(service.visit().await.0, 23);
    restored.expect_exact(&service).await;
}

/// As docs/operations.md upgrades Postgres with little downtime.
#[tokio::test(flavor = "multi_thread")]
async fn subscriber_is_counted_exactly_after_the_switch() {
    let logical = PostgresOptions {
        config: vec![("wal_level".to_owned(), "logical".to_owned())],
        ..PostgresOptions::default()
    };
    let world = World::with(logical, RedisOptions::default());
    let service = world.serve().await;
    service.visit().await;
    world.sql(BY_HAND).await;
    let other = Other::new("replicated");
    for arguments in [
        &["--schema-only"][..],
        &["--data-only", "--table=visitas_migracoes"],
    ] {
        other.load(&dump_of(&world.postgres, &world.database, arguments));
    }
    world
        .sql("create publication mudanca for table visitas")
        .await;
    other.sql(&format!(
        "create subscription mudanca connection '{}' publication mudanca",
        world.postgres.url(&world.database)
    ));
    // Visits go on while rows are copied.
    service.visit().await;
    world
        .sql("delete from visitas where id in (select max(id) from visitas)")
        .await;
    service.visit().await;
    service.stop().await;
    let rows = world.rows().await;
    eventually("every row has arrived", SOON, async || other.rows() == rows).await;
    other.sql("drop subscription mudanca");
    other.sql("select setval(pg_get_serial_sequence('visitas', 'id'), max(id)) from visitas");
    let service = other.serve(&world).await;
    assert_eq!(service.visit().await.0, rows + 1);
    other.expect_exact(&service).await;
}

/// A copy of a cluster's files, with which a server can be started.
struct Backup {
    home: TempDir,
    data: PathBuf,
}

impl Backup {
    fn of(postgres: &Postgres) -> Self {
        let home = TempDir::new().expect("a folder");
        let version = postgres.sql("postgres", "show server_version_num");
        let version: u32 = version.unwrap().parse().expect("a number");
        let data = home.path().join(format!("postgres-{}", version / 10_000));
        let output = client(postgres, "pg_basebackup", "dbname=postgres")
            .args(["--checkpoint=fast", "--no-sync", "--pgdata"])
            .arg(&data)
            .output()
            .expect("pg_basebackup runs");
        assert!(output.status.success(), "{output:?}");
        Self { home, data }
    }

    /// Recovers by these settings at the start.
    fn recover(&self, settings: &str) {
        fs::write(self.data.join("recovery.signal"), "").expect("a file");
        let mut file = fs::File::options()
            .append(true)
            .open(self.data.join("postgresql.auto.conf"))
            .expect("the backup's settings");
        file.write_all(settings.as_bytes()).expect("settings");
    }

    fn start(self, world: &World) -> Other {
        let owned = lab::process::command("chown")
            .arg("-R")
            .arg(format!("--reference={}", world.postgres.folder().display()))
            .arg(&self.data)
            .status();
        assert!(owned.expect("chown runs").success());
        let postgres = start_postgres(PostgresOptions {
            data: Data::Kept(self.home.path().to_owned()),
            programs: Some(world.postgres.programs().to_owned()),
            ..PostgresOptions::default()
        });
        Other {
            postgres: postgres.into(),
            database: world.database.clone(),
            folder: Some(self.home),
        }
    }
}
