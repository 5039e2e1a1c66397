//! What makes an acknowledged visit durable: session settings that no default of the database or of
//! the role can weaken, and a visit in doubt where a flush stalls.

use std::time::{Duration, Instant};

use reqwest::StatusCode;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};

use crate::support::{Ended, SOON, World, eventually, execute, settings};

/// Each setting that the session of a visit fixes: its name, another value, and the fixed value.
const PINNED: [(&str, &str, &str); 9] = [
    ("synchronous_commit", "off", "on"),
    (
        "default_transaction_isolation",
        "serializable",
        "read committed",
    ),
    ("search_path", "outro", "public"),
    ("TimeZone", "America/Sao_Paulo", "UTC"),
    ("jit", "on", "off"),
    ("plan_cache_mode", "force_custom_plan", "force_generic_plan"),
    ("lock_timeout", "1ms", "700"),
    ("statement_timeout", "1ms", "850"),
    ("application_name", "outro", "visitas"),
];

#[tokio::test(flavor = "multi_thread")]
async fn no_default_of_the_database_or_role_weakens_the_session_of_a_visit() {
    for owner in ["database", "role"] {
        let world = World::new();
        drop(world.serve().await);
        observe_sessions(&world).await;
        for (name, opposite, _) in PINNED {
            set_default(&world, owner, name, opposite);
        }
        let service = world.serve().await;
        assert_eq!(service.visit().await, (1, 1));
        let mut session = world.session().await;
        execute(&mut session, "set statement_timeout = 0")
            .await
            .unwrap();
        let seen: Vec<(String, String)> =
            sqlx::query_as("select distinct nome, valor from public.observado")
                .fetch_all(&mut session)
                .await
                .unwrap();
        assert_eq!(seen.len(), PINNED.len(), "{seen:?}");
        for (name, opposite, pinned) in PINNED {
            let pinned = (name.to_owned(), pinned.to_owned());
            assert!(
                seen.contains(&pinned),
                "{owner}: {name} = {opposite}: {seen:?}"
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_default_of_the_database_shortens_a_migration_or_a_recount() {
    let world = World::new();
    for (name, opposite, _) in PINNED {
        set_default(&world, "database", name, opposite);
    }
    let service = world.serve().await;
    assert_eq!(service.visit().await, (1, 1));
    let ended = Ended::of(&["recount"], &world.settings()).await;
    assert_eq!(
        ended.output, "counted 1 rows; the total was 1\n",
        "{ended:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn transaction_timeout_of_the_database_ends_no_visit() {
    let world = World::new();
    let version = "select current_setting('server_version_num')::bigint";
    if world.number(version).await < 170_000 {
        eprintln!("skipped: PostgreSQL 17 is the first with a transaction_timeout");
        return;
    }
    drop(world.serve().await);
    set_default(&world, "database", "transaction_timeout", "100ms");
    world
        .sql(
            "create function public.demora() returns trigger language plpgsql as $$ begin \
               perform pg_sleep(0.2); return null; end $$; \
             create trigger demora after insert on public.visitas \
               for each statement execute function public.demora()",
        )
        .await;
    assert_eq!(world.serve().await.visit().await, (1, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn session_whose_settings_were_changed_on_the_way_is_refused_and_names_them() {
    let world = World::new();
    drop(world.serve().await);
    for (setting, value, found) in [
        ("synchronous_commit", "no", "off"),
        ("lock_timeout", "9999", "9999"),
        ("statement_timeout", "8888", "8888"),
        ("plan_cache_mode", "auto", "auto"),
        ("visitas.sessao", "0", "0"),
    ] {
        let port = change_on_the_way(&world, setting, value).await.to_string();
        let on_the_way = [("DB_PORT", &*port), ("DB_SSLMODE", "disable")];
        let settings = [world.settings(), settings(&on_the_way)].concat();
        let ended = Ended::of(&["recount"], &settings).await;
        assert_eq!(ended.code, Some(1), "{setting}: {ended:?}");
        let named = format!("{setting} is \"{found}\" in place of ");
        assert!(ended.errors.contains(&named), "{named} in {ended:?}");

        let service = world.start(&on_the_way).await;
        eventually("the log names the setting", SOON, async || {
            service.printed().contains(&format!("{setting} is "))
        })
        .await;
        let visit = service.get("/").await;
        assert_eq!(visit.status, StatusCode::SERVICE_UNAVAILABLE, "{setting}");
    }
    assert_eq!(world.rows().await, 0);
}

/// Listens in place of the server, and gives each session another value for a setting of its login.
async fn change_on_the_way(world: &World, setting: &str, value: &str) -> u16 {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = (world.postgres.host(), world.postgres.port());
    let (setting, value) = (format!("{setting}="), value.to_owned());
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let mut server = TcpStream::connect(server).await.unwrap();
            let (setting, value) = (setting.clone(), value.clone());
            tokio::spawn(async move {
                let mut login = vec![0; client.read_u32().await? as usize - 4];
                client.read_exact(&mut login).await?;
                // One byte a character, so that the login stays what it is.
                let login: String = login.iter().map(|byte| char::from(*byte)).collect();
                let changed = match login.split_once(&*setting) {
                    Some((before, rest)) => {
                        let end = rest.find([' ', '\0']).unwrap_or(rest.len());
                        format!("{before}{setting}{value}{}", &rest[end..])
                    }
                    None => login,
                };
                let changed: Vec<u8> = changed.chars().map(|char| char as u8).collect();
                server
                    .write_u32(u32::try_from(changed.len()).unwrap() + 4)
                    .await?;
                server.write_all(&changed).await?;
                copy_bidirectional(&mut client, &mut server).await
            });
        }
    });
    port
}

#[tokio::test(flavor = "multi_thread")]
async fn commit_whose_flush_stalls_is_in_doubt_and_visits_behind_it_fail_definitely() {
    let world = World::of_its_own();
    let (one, other) = (world.serve().await, world.serve().await);
    assert_eq!(one.visit().await, (1, 1));
    stall_flushes(&world).await;

    let asked = Instant::now();
    let stalled = one.begin_visit();
    let stalls = "select count(*) from pg_stat_activity \
                  where application_name = 'visitas' and wait_event = 'SyncRep'";
    eventually("its commit stalls", SOON, async || {
        world.number(stalls).await == 1
    })
    .await;
    let behind = other.get("/").await;
    assert_eq!(behind.status, StatusCode::SERVICE_UNAVAILABLE);
    let stalled = stalled.await.unwrap();
    assert_eq!(stalled.status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(asked.elapsed() < Duration::from_millis(2200), "{stalled:?}");
    assert_eq!(one.counted("in_doubt").await, 1);
    assert_eq!(one.counted("failed").await, 0);
    assert_eq!(other.counted("in_doubt").await, 0);
    assert_eq!(other.counted("failed").await, 1);
    // Once the database is known to fail, no visit is in doubt.
    assert_eq!(one.get("/").await.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(one.counted("in_doubt").await, 1);

    let_flushes_go_on(&world);
    for service in [&one, &other] {
        service.until_ready().await;
    }
    // The visit in doubt is recorded once, and is not counted in Redis.
    assert_eq!(world.rows().await, 2);
    assert_eq!(other.visit().await, (3, 2));
    assert_eq!(one.visit().await, (4, 3));
}

#[tokio::test(flavor = "multi_thread")]
async fn only_a_definite_failure_asks_the_client_to_retry() {
    let world = World::of_its_own();
    let service = world.serve().await;
    stall_flushes(&world).await;
    let in_doubt = service.get("/").await;
    assert_eq!(in_doubt.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(service.counted("in_doubt").await, 1);
    assert_eq!(in_doubt.header("retry-after"), "", "{in_doubt:?}");
    let certain = service.get("/").await;
    assert_eq!(certain.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(service.counted("failed").await, 1);
    assert_eq!(certain.header("retry-after"), "1", "{certain:?}");
    let_flushes_go_on(&world);
}

/// Makes each session that records visits store the settings that it began with: those inside a
/// function can differ.
async fn observe_sessions(world: &World) {
    let names: Vec<_> = PINNED.iter().map(|(name, ..)| *name).collect();
    let names = names.join(",");
    world
        .sql(&format!(
            "create table public.observado (nome text, valor text); \
             create function public.observar() returns trigger language plpgsql as $$ begin \
                 insert into public.observado \
                 select s.name, s.reset_val from pg_catalog.pg_settings as s \
                  where s.name = any ('{{{names}}}'); \
                 return null; \
             end $$; \
             create trigger observa after insert on public.visitas \
                 for each statement execute function public.observar()"
        ))
        .await;
}

/// Sets a default for sessions.
fn set_default(world: &World, owner: &str, name: &str, value: &str) {
    let database = &world.database;
    let owner = match owner {
        "database" => format!("database {database}"),
        _ => format!("role {} in database {database}", devstack::USER),
    };
    let statement = format!("alter {owner} set {name} = '{value}'");
    world.postgres.sql("postgres", &statement).unwrap();
}

/// Makes every commit wait for a standby that does not exist, and waits until commits stall.
pub(crate) async fn stall_flushes(world: &World) {
    world.sql("create table public.espera (nada int)").await;
    let set = "alter system set synchronous_standby_names = 'ausente'";
    world.postgres.sql("postgres", set).unwrap();
    let reload = "select pg_reload_conf()";
    world.postgres.sql("postgres", reload).unwrap();
    eventually("a commit stalls", SOON, async || {
        let commit = world.sql("insert into public.espera values (1)");
        tokio::time::timeout(Duration::from_millis(200), commit)
            .await
            .is_err()
    })
    .await;
}

pub(crate) fn let_flushes_go_on(world: &World) {
    let reset = "alter system reset synchronous_standby_names";
    world.postgres.sql("postgres", reset).unwrap();
    let reload = "select pg_reload_conf()";
    world.postgres.sql("postgres", reload).unwrap();
}
