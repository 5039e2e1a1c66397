//! Dumps and copies: however data gets into the tables, the total equals the rows, or the service
//! reports that a recount is due.
//!
//! `make compat` runs these tests with one version of Postgres and restores into another.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use devstack::{Postgres, PostgresOptions};
use reqwest::StatusCode;

use crate::support::{Ended, SOON, Service, World, eventually, start_postgres};

/// Rows added and removed by hand, which no visit has added to the total yet.
pub(crate) const BY_HAND: &str = "insert into visitas select from generate_series(1, 20); \
                       delete from visitas where id in (select id from visitas order by id limit 2)";

#[tokio::test(flavor = "multi_thread")]
async fn dump_restored_into_an_empty_cluster_is_counted_exactly() {
    let (world, dump) = dumped(&[]).await;
    let other = Other::new("restored");
    other.load(&dump);
    other.pass_transactions_of(&world);
    let service = other.serve(&world).await;
    // 3 visits and the 18 rows of BY_HAND.
    assert_eq!(service.visit().await.0, 22);
    other.expect_exact(&service).await;
    other.sql("truncate visitas; insert into visitas default values");
    assert_eq!(service.visit().await.0, 2);
    other.expect_exact(&service).await;
}

/// As `pg_dump -Fc` writes it and `pg_restore` reads it.
#[tokio::test(flavor = "multi_thread")]
async fn archive_restored_into_an_empty_cluster_is_counted_exactly() {
    let (world, _) = dumped(&[]).await;
    let folder = tempfile::tempdir().unwrap();
    let archive = folder.path().join("archive");
    dump_of(
        &world.postgres,
        &world.database,
        &["-Fc", "-f", archive.to_str().unwrap()],
    );
    let other = Other::new("restored");
    let restored = client(&other.postgres, "pg_restore", &other.database)
        .args(["--exit-on-error", "--no-owner"])
        .arg(archive)
        .output()
        .unwrap();
    assert!(restored.status.success(), "{restored:?}");
    let service = other.serve(&world).await;
    assert_eq!(service.visit().await.0, 22);
    other.expect_exact(&service).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_after_a_restore_and_before_the_first_visit_are_counted() {
    let (world, dump) = dumped(&[]).await;
    let other = Other::new("restored");
    other.load(&dump);
    other.sql("truncate visitas");
    other.sql("insert into visitas select from generate_series(1, 4)");
    let service = other.serve(&world).await;
    assert_eq!(service.visit().await.0, 5);
    other.expect_exact(&service).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn dump_loaded_into_a_migrated_database_leaves_an_exact_total_or_a_recount_due() {
    let (world, _) = dumped(&[]).await;
    let first = Other::new("restored");
    for (index, arguments) in [
        &[][..],
        &["--data-only"],
        &["--data-only", "--disable-triggers"],
        &["--data-only", "--inserts"],
        &["--clean", "--if-exists"],
        &["--data-only", "--table=visitas"],
    ]
    .into_iter()
    .enumerate()
    {
        let dump = dump_of(&world.postgres, &world.database, arguments);
        let other = first.another(&format!("restored_{index}"));
        let service = other.serve(&world).await;
        other.load(&dump);
        other.pass_transactions_of(&world);
        // A dump with `--clean` drops and creates what visits need, so Postgres can be down at first.
        eventually("a visit is recorded", SOON, async || {
            service.get("/").await.status == StatusCode::OK
        })
        .await;
        other.expect_exact_or_due(&service).await;
        other.expect_exact_after_a_recount(&world, &service).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn dump_loaded_into_another_database_of_the_cluster_is_not_counted_twice() {
    let (world, dump) = dumped(&["--data-only"]).await;
    let other = Other::named(&world, &world.database).another("neighbour");
    let service = other.serve(&world).await;
    // So that the second dump is younger than the other database's last entry.
    service.visit().await;
    world.sql("insert into visitas default values").await;
    let younger = dump_of(&world.postgres, &world.database, &["--data-only"]);
    for dump in [dump, younger] {
        other.load(&dump);
        other.expect_exact_or_due(&service).await;
    }
    other.expect_exact_after_a_recount(&world, &service).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn copy_of_the_database_counts_for_itself() {
    let world = World::of_its_own();
    let service = world.serve().await;
    service.visit().await;
    service.stop().await;
    world.sql(BY_HAND).await;
    let copy = Other::named(&world, "copied");
    let template = format!("create database copied template {}", world.database);
    world.postgres.sql("postgres", &template).unwrap();
    let service = copy.serve(&world).await;
    assert_eq!(service.visit().await.0, 20);
    copy.expect_exact(&service).await;
    let first = world.serve().await;
    assert_eq!(first.visit().await.0, world.rows().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn own_data_loaded_again_is_not_counted_twice() {
    let world = World::of_its_own();
    let service = world.serve().await;
    service.visit().await;
    world.sql(BY_HAND).await;
    let dump = dump_of(&world.postgres, &world.database, &["--data-only"]);
    service.visit().await;
    world.sql("truncate visitas").await;
    service.visit().await;
    let own = Other::named(&world, &world.database);
    own.load(&dump);
    own.expect_exact_or_due(&service).await;
    world.postgres.kill().unwrap();
    world.postgres.start_again().unwrap();
    // The first visit can meet a broken connection.
    eventually("a visit is recorded", SOON, async || {
        service.get("/").await.status == StatusCode::OK
    })
    .await;
    service.until_health("degraded").await;
    own.expect_exact_or_due(&service).await;
    own.expect_exact_after_a_recount(&world, &service).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn replicated_tables_are_counted_exactly_after_the_switch() {
    let (world, schema) = dumped(&["--schema-only"]).await;
    let ledger = dump_of(
        &world.postgres,
        &world.database,
        &[
            "--data-only",
            "--table=visitas_migracoes",
            "--table=visitas",
            "--table=visitas_contagem",
            "--table=visitas_ajustes",
        ],
    );
    // Replication copies rows, not sequences, and fires no trigger.
    let rows: String = ledger
        .split_inclusive('\n')
        .filter(|line| !line.contains("pg_catalog.setval"))
        .collect();
    let other = Other::new("replicated");
    other.load(&schema);
    other.load(&format!("set session_replication_role = replica;\n{rows}"));
    other.sql("select setval('visitas_id_seq', 1000)");
    other.sql("delete from visitas where id in (select id from visitas order by id limit 1)");
    other.sql("truncate visitas");
    other.sql("insert into visitas select from generate_series(1, 6)");
    let service = other.serve(&world).await;
    assert_eq!(service.visit().await.0, 7);
    other.expect_exact(&service).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ledger_with_foreign_entries_is_due_for_a_recount() {
    for forgery in [
        "insert into visitas_ajustes (transacao, diferenca, origem) values ('1', 5, 'elsewhere/1')",
        "insert into visitas_ajustes (transacao, diferenca) values ('1', 5)",
        "insert into visitas_contagem select 999, 5, limite, abertas, 'elsewhere/1' from visitas_contagem limit 1",
    ] {
        let world = World::new();
        let service = world.serve().await;
        service.visit().await;
        world.sql(forgery).await;
        let own = Other::named(&world, &world.database);
        service.until_health("degraded").await;
        let health = service.get("/health").await;
        assert_eq!(health.status, StatusCode::OK);
        assert_eq!(health.json()["checks"]["count"]["status"], "recount_due");
        assert_eq!(service.metric("visitas_recount_due").await, Some(1.0));
        assert_eq!(service.visit().await.0, 2, "{forgery}");
        own.expect_exact_after_a_recount(&world, &service).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn dump_of_which_only_the_ledger_was_loaded_is_counted_by_its_rows() {
    let (world, dump) = dumped(&[]).await;
    let other = Other::new("restored");
    // These rows have the ids of the dump's rows, so the dump's rows are refused.
    other.sql("create table visitas (id bigint generated by default as identity primary key, data timestamptz not null default now())");
    other.sql("insert into visitas (id) select generate_series(1, 100)");
    other.load(&dump);
    assert_eq!(other.rows(), 100);
    assert_ne!(other.sql("select max(total) from visitas_contagem"), "100");
    let service = other.serve(&world).await;
    // The first visit fails: its id is taken.
    eventually("a visit is recorded", SOON, async || {
        service.get("/").await.status == StatusCode::OK
    })
    .await;
    other.expect_exact(&service).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes long: make faults"]
async fn many_changes_by_hand_before_a_restart_stop_no_visit() {
    let world = World::of_its_own();
    let service = world.serve().await;
    service.visit().await;
    service.stop().await;
    world
        .sql("do $$ begin for i in 1..300000 loop insert into visitas default values; end loop; end $$")
        .await;
    world.postgres.kill().unwrap();
    world.postgres.start_again().unwrap();
    let service = world.serve().await;
    assert_eq!(service.visit().await.0, 300_002);
}

#[tokio::test(flavor = "multi_thread")]
async fn truncation_after_the_clock_went_back_drops_earlier_changes() {
    let world = World::new();
    let service = world.serve().await;
    service.visit().await;
    service.stop().await;
    world
        .sql("insert into visitas select from generate_series(1, 5)")
        .await;
    // As a server writes it whose clock was ahead when it started.
    world
        .sql("update visitas_ajustes set origem = split_part(origem, '@', 1) || '@2999-01-01T00:00:00.000000'; \
              update visitas_contagem set origem = split_part(origem, '@', 1) || '@2999-01-01T00:00:00.000000'")
        .await;
    world.sql("truncate visitas").await;
    let service = world.serve().await;
    assert_eq!(service.visit().await.0, 1);
    assert_eq!(world.rows().await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn emptied_ledger_is_counted_again() {
    let world = World::new();
    let service = world.serve().await;
    service.visit().await;
    world
        .sql("insert into visitas default values; delete from visitas_contagem")
        .await;
    assert_eq!(service.visit().await.0, 3);
    assert_eq!(service.visit().await.0, 4);
}

/// A database with three visits, manual changes that no visit followed, and its dump.
async fn dumped(arguments: &[&str]) -> (World, String) {
    let world = World::of_its_own();
    let service = world.serve().await;
    for _ in 0..3 {
        service.visit().await;
    }
    service.stop().await;
    world.sql(BY_HAND).await;
    let dump = dump_of(&world.postgres, &world.database, arguments);
    (world, dump)
}

pub(crate) fn dump_of(postgres: &Postgres, database: &str, arguments: &[&str]) -> String {
    let output = client(postgres, "pg_dump", database)
        .args(arguments)
        .output()
        .expect("pg_dump runs");
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).expect("text")
}

pub(crate) fn client(postgres: &Postgres, program: &str, database: &str) -> Command {
    let mut command = Command::new(postgres.programs().join(program));
    command
        .env_clear()
        .env("PGPASSWORD", devstack::PASSWORD)
        .args(["-h", postgres.host(), "-p", &postgres.port().to_string()])
        .args(["-U", devstack::USER, "-d", database]);
    command
}

/// The folder of the programs of the Postgres that dumps are restored into, if it is another one.
#[expect(
    clippy::disallowed_methods,
    reason = "`make compat` tells the test which servers it has"
)]
fn restored_into() -> Option<PathBuf> {
    std::env::var_os("RESTORED_INTO_PG_BIN").map(Into::into)
}

/// A database that data is loaded into.
pub(crate) struct Other {
    pub(crate) postgres: std::sync::Arc<Postgres>,
    pub(crate) database: String,
    /// The folder of a server on data that was there before. Last, so that it is removed after it.
    #[expect(
        dead_code,
        reason = "held, so that the folder is removed with the server"
    )]
    pub(crate) folder: Option<tempfile::TempDir>,
}

impl Other {
    /// A new database on its own cluster.
    pub(crate) fn new(database: &str) -> Self {
        let postgres = start_postgres(PostgresOptions {
            programs: restored_into(),
            ..PostgresOptions::default()
        });
        // All clusters here are copies of one template: without this database, the next one would have
        // the same number as in the other cluster.
        postgres.create_database("first").expect("a database");
        postgres.create_database(database).expect("a database");
        Self {
            postgres: postgres.into(),
            database: database.to_owned(),
            folder: None,
        }
    }

    /// A new database on the same cluster.
    fn another(&self, database: &str) -> Self {
        self.postgres.create_database(database).expect("a database");
        Self {
            postgres: std::sync::Arc::clone(&self.postgres),
            database: database.to_owned(),
            folder: None,
        }
    }

    /// A database of this name on the world's cluster.
    fn named(world: &World, database: &str) -> Self {
        Self {
            postgres: std::sync::Arc::clone(&world.postgres),
            database: database.to_owned(),
            folder: None,
        }
    }

    fn settings(&self, world: &World) -> Vec<(String, String)> {
        world.settings_but(
            "DB_",
            &[
                ("DB_HOST", self.postgres.host()),
                ("DB_PORT", &self.postgres.port().to_string()),
                ("DB_PASSWORD", devstack::PASSWORD),
                ("DB_NAME", &self.database),
            ],
        )
    }

    pub(crate) async fn serve(&self, world: &World) -> Service {
        let service = Service::start(&self.settings(world)).await;
        service.until_ready().await;
        service
    }

    /// Loads a dump with `psql`, which continues after an error by default.
    pub(crate) fn load(&self, dump: &str) {
        let mut psql = client(&self.postgres, "psql", &self.database)
            .arg("-Xq")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("psql runs");
        let mut input = psql.stdin.take().expect("its input");
        input.write_all(dump.as_bytes()).expect("psql reads");
        drop(input);
        psql.wait().expect("psql ends");
    }

    pub(crate) fn sql(&self, statement: &str) -> String {
        self.postgres
            .sql(&self.database, statement)
            .expect("the statement succeeds")
    }

    pub(crate) fn rows(&self) -> i64 {
        self.sql("select count(*) from visitas")
            .parse()
            .expect("a number")
    }

    /// Advances the transaction ids here beyond those of the cluster that the data came from.
    fn pass_transactions_of(&self, world: &World) {
        let theirs: i64 = world
            .postgres
            .sql("postgres", "select pg_current_xact_id()")
            .unwrap()
            .parse()
            .unwrap();
        let ours = || {
            self.sql("select pg_current_xact_id()")
                .parse::<i64>()
                .unwrap()
        };
        while ours() <= theirs + 100 {
            self.sql("do $$ begin for i in 1..500 loop perform pg_current_xact_id(); commit; end loop; end $$");
        }
    }

    pub(crate) async fn expect_exact(&self, service: &Service) {
        eventually("the health is ok", SOON, async || {
            let health = service.get("/health").await.json();
            health["checks"]["count"]["status"] == "ok"
        })
        .await;
        assert_eq!(service.visit().await.0, self.rows());
        assert_eq!(service.metric("visitas_recount_due").await, Some(0.0));
    }

    /// The total is the number of rows, or a recount is due.
    async fn expect_exact_or_due(&self, service: &Service) {
        for _ in 0..3 {
            let total = service.visit().await.0;
            if total != self.rows() {
                let ledger = self.sql("select 'entry', c::text from visitas_contagem as c union all select 'adjustment', a::text from visitas_ajustes as a");
                let what = format!("a recount is due: {total} of {}\n{ledger}", self.rows());
                eventually(&what, SOON, async || {
                    service.metric("visitas_recount_due").await == Some(1.0)
                })
                .await;
            }
        }
    }

    async fn expect_exact_after_a_recount(&self, world: &World, service: &Service) {
        let ended = Ended::of(&["recount"], &self.settings(world)).await;
        assert_eq!(ended.code, Some(0), "{ended:?}");
        service.until_ready().await;
        self.expect_exact(service).await;
    }
}
