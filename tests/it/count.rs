//! The count equals `count(*)` after any manual change, and does not cost more as the table grows.

use std::time::Duration;

use serde_json::Value;
use sqlx::PgConnection;
use sqlx::types::Json;
use tokio::task::JoinSet;

use crate::support::load::{Load, Visit, visits};
use crate::support::{Service, World, execute};

/// Long enough for a busy machine; a visit waits 1.4 s for a lock.
const DB_TIMEOUT: (&str, &str) = ("DB_TIMEOUT", "2s");

#[tokio::test(flavor = "multi_thread")]
async fn count_follows_manual_changes() {
    let world = World::new();
    let service = world.serve().await;
    for (statements, total) in [
        ("insert into visitas default values", 2),
        (
            "insert into visitas select from generate_series(1, 1000)",
            1003,
        ),
        ("update visitas set data = now()", 1004),
        ("update visitas set id = -id", 1005),
        (
            "delete from visitas where id in (select id from visitas order by id limit 1000)",
            6,
        ),
        (
            "insert into visitas (id) select max(id) from visitas union select 0 on conflict (id) do update set data = now()",
            8,
        ),
        (
            "with gone as (delete from visitas returning data) insert into visitas (data) select data from gone limit 4",
            5,
        ),
        ("truncate visitas", 1),
        (
            "begin; insert into visitas default values; truncate visitas; insert into visitas default values; commit",
            2,
        ),
        ("begin; delete from visitas; truncate visitas; rollback", 3),
        (
            "begin; savepoint s; truncate visitas; rollback to s; insert into visitas default values; commit",
            5,
        ),
        ("delete from visitas where false", 6),
    ] {
        world.sql(statements).await;
        assert_eq!(service.visit().await.0, total, "after {statements}");
        assert_eq!(world.rows().await, total, "after {statements}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn uncommitted_insert_is_not_counted_and_stops_no_visit() {
    let world = World::new();
    let service = world.serve().await;
    for (end, total) in [("commit", 1021), ("rollback", 1042)] {
        let insert = "insert into visitas select from generate_series(1, 1000)";
        let before = world.rows().await;
        let mut hand = world.transaction(insert).await;
        // The transaction is open until all visits are answered, so no visit waited for it.
        let visits = visits(&[&service], 4, 20).await;
        let last = visits.iter().filter_map(Visit::total).max();
        assert_eq!(last, Some(before + 20));
        execute(&mut hand, end).await.unwrap();
        assert_eq!(service.visit().await.0, total, "after {end}");
        assert_eq!(world.rows().await, total);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn count_is_exact_with_two_services_and_manual_sessions_at_every_isolation_level() {
    let world = World::new();
    let (one, other) = tokio::join!(world.serve(), world.serve());
    let load = Load::start(&[&one, &other], 16);
    let mut hands = JoinSet::new();
    for level in [
        "read uncommitted",
        "read committed",
        "repeatable read",
        "serializable",
    ] {
        hands.spawn(change_by_hand(world.session().await, level));
    }
    assert!(hands.join_all().await.iter().all(|&done| done > 20));
    load.stop().await;
    let total = one.visit().await.0;
    assert_eq!(total, world.rows().await);
    assert_eq!(other.visit().await.0, total + 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_by_a_role_with_only_table_privileges_are_counted() {
    let world = World::new();
    let service = world.serve().await;
    let role = format!("hand_of_{}", world.database);
    world
        .sql(&format!(
            "create role {role} login password 'x'; \
             grant select, insert, update, delete, truncate on visitas to {role}"
        ))
        .await;
    follow_by_hand(&service, world.session_as(&role, "x").await, "").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_under_an_empty_search_path_are_counted() {
    let world = World::new();
    let service = world.serve().await;
    follow_by_hand(&service, world.session().await, "set search_path = ''").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ids_inserted_by_hand_stop_no_visit() {
    let world = World::new();
    let service = world.serve().await;
    service.visit().await;
    for ids in [
        "last_value + 1 from visitas_id_seq",
        "last_value + n from visitas_id_seq, generate_series(1, 50) as n",
        "last_value + n from visitas_id_seq, generate_series(1, 20000) as n",
        "4611686018427387904",
    ] {
        let insert = format!("insert into visitas (id) select {ids}");
        world.sql(&insert).await;
        assert_eq!(
            service.visit().await.0,
            world.rows().await,
            "after {insert}"
        );
    }
    let visits = visits(&[&service], 8, 200).await;
    assert!(visits.iter().all(|visit| visit.status == 200));
    assert_eq!(service.visit().await.0, world.rows().await);
    // More than probes pass by themselves: each attempt takes an id, even if it fails.
    world
        .sql(
            "insert into visitas (id) \
             select last_value + n from visitas_id_seq, generate_series(1, 1000) as n",
        )
        .await;
    let another = world.serve().await;
    assert_eq!(another.visit().await.0, world.rows().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn visit_is_not_in_doubt_if_the_sequence_could_not_be_moved() {
    let world = World::new();
    let service = world.serve().await;
    service.visit().await;
    world
        .sql(
            "insert into visitas (id) select last_value + 1 from visitas_id_seq; \
             create or replace function public.avancar_sequencia() returns void language plpgsql \
               as $$ begin perform pg_terminate_backend(pg_backend_pid()); end $$",
        )
        .await;
    assert_eq!(service.get("/").await.status, 503);
    assert_eq!(service.counted("failed").await, 1);
    assert_eq!(service.counted("in_doubt").await, 0);
    assert_eq!(world.rows().await, 2);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "reads a clock: make faults"]
async fn held_count_lock_costs_bounded_refusals() {
    let world = World::new();
    let lock = "select pg_advisory_xact_lock(33329991663247731)";
    let (service, recorded) = refused_meanwhile(&world, lock, "rollback").await;
    assert_eq!(recorded, 0);
    assert_eq!(service.visit().await, (2, 2));
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "reads a clock: make faults"]
async fn uncommitted_id_that_is_next_costs_bounded_refusals() {
    let world = World::new();
    let insert = "insert into visitas (id) select last_value + 1 from visitas_id_seq";
    let (service, recorded) = refused_meanwhile(&world, insert, "commit").await;
    // Each attempt takes the next id of the sequence, and so passes the uncommitted one.
    assert!(recorded < 24, "none was refused");
    assert_eq!(service.visit().await, (recorded + 3, recorded + 2));
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "reads a clock: make faults"]
async fn locked_table_costs_bounded_refusals() {
    let world = World::new();
    let (service, recorded) = refused_meanwhile(&world, "truncate visitas", "commit").await;
    assert_eq!(recorded, 0);
    assert_eq!(service.visit().await, (1, 2));
}

/// Counts pages: a clock would be less exact.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes long: make faults"]
async fn recording_call_reads_no_more_pages_after_load_with_an_old_snapshot() {
    let world = World::new();
    drop(world.serve().await);
    let old = "set transaction isolation level repeatable read; select total_visitas()";
    let _old = world.transaction(old).await;
    // First the indexes reach their final height.
    record(&world, 3_000).await;
    let start = pages_of_recording(&world).await;
    record(&world, 30_000).await;
    let end = pages_of_recording(&world).await;
    assert!(end.median <= start.median, "{start:?} became {end:?}");
    // Pruning changes the sum by a page or two; growth would add a page to each call.
    assert!(
        end.sum < start.sum + start.calls,
        "{start:?} became {end:?}"
    );
}

/// Makes changes in one session and expects after each that the next visit counts it.
async fn follow_by_hand(service: &Service, mut hand: PgConnection, first: &str) {
    execute(&mut hand, first).await.unwrap();
    for (statement, total) in [
        ("insert into public.visitas default values", 2),
        (
            "insert into public.visitas select from generate_series(1, 10)",
            13,
        ),
        ("update public.visitas set data = now()", 14),
        (
            "delete from public.visitas where id in (select min(id) from public.visitas)",
            14,
        ),
        ("truncate public.visitas", 1),
    ] {
        execute(&mut hand, statement).await.unwrap();
        assert_eq!(service.visit().await.0, total, "after {statement}");
    }
}

/// Inserts, updates, deletes and truncates, and returns how many of the changes succeeded. A change
/// that conflicts with another session is rolled back.
async fn change_by_hand(mut session: PgConnection, level: &str) -> usize {
    let isolation = format!(
        "set session characteristics as transaction isolation level {level}; set lock_timeout = '1s'"
    );
    execute(&mut session, &isolation).await.unwrap();
    let mut done = 0;
    for turn in 1..=90 {
        let statements = match turn % 6 {
            // Not towards the end: a truncation would hide errors that happened before it.
            0 if turn == 18 => "truncate visitas",
            0 if turn == 36 => {
                "begin; select count(*) from visitas; select pg_sleep(0.02); truncate visitas; commit"
            }
            0 => "begin; insert into visitas default values; select pg_sleep(0.01); rollback",
            1 => "insert into visitas select from generate_series(1, 7)",
            2 => {
                "begin; insert into visitas default values; delete from visitas where id in (select id from visitas order by id desc limit 3); commit"
            }
            3 => "update visitas set data = now() where id in (select id from visitas limit 5)",
            4 => "delete from visitas where id in (select id from visitas limit 5)",
            _ => {
                "begin; savepoint s; delete from visitas where id in (select id from visitas limit 5); rollback to s; insert into visitas default values; select pg_sleep(0.01); commit"
            }
        };
        match execute(&mut session, statements).await {
            Ok(()) => done += 1,
            Err(_) => execute(&mut session, "rollback").await.unwrap(),
        }
    }
    done
}

/// Makes one visit, then 24 more while a transaction with this statement is open. Returns the
/// service, ready again after the end of the transaction, and how many of the 24 were recorded.
async fn refused_meanwhile(world: &World, statement: &str, end: &str) -> (Service, i64) {
    let service = world
        .serve_with(&[DB_TIMEOUT, ("VISIT_TIMEOUT", "5s")])
        .await;
    service.visit().await;
    let mut hand = world.transaction(statement).await;
    let visits = visits(&[&service], 8, 24).await;
    let answered = |status| visits.iter().filter(|visit| visit.status == status).count();
    let (recorded, refused) = (answered(200), answered(503));
    assert_eq!(recorded + refused, visits.len());
    let longest = visits.iter().map(|visit| visit.took).max().unwrap();
    assert!(longest < Duration::from_secs(2), "{longest:?}");
    execute(&mut hand, end).await.unwrap();
    service.until_ready().await;
    assert_eq!(
        service
            .metric(r#"visitas_visits_total{outcome="in_doubt"}"#)
            .await,
        Some(0.0)
    );
    assert_eq!(
        service
            .metric(r#"visitas_visits_total{outcome="failed"}"#)
            .await,
        Some(refused as f64)
    );
    (service, i64::try_from(recorded).unwrap())
}

/// Makes this many recording calls from two sessions, each in its own transaction, with a manual
/// insert after every tenth.
async fn record(world: &World, calls: usize) {
    let calls = calls / 2;
    let block = format!(
        "do $$ begin for nth in 1..{calls} loop \
             perform public.registrar_visitas(array[now()]); \
             if nth % 10 = 0 then insert into public.visitas default values; end if; \
             commit; \
         end loop; end $$"
    );
    let session = async || {
        let mut session = world.session().await;
        // Sent separately: statements sent together are one transaction, in which `commit` fails.
        for statement in ["set synchronous_commit = off", &block] {
            execute(&mut session, statement).await.unwrap();
        }
    };
    tokio::join!(session(), session());
}

/// The pages that recording calls read, from memory or disk.
#[derive(Debug)]
struct Pages {
    calls: i64,
    median: i64,
    sum: i64,
}

async fn pages_of_recording(world: &World) -> Pages {
    let mut session = world.session().await;
    // The first calls make the plans.
    for _ in 0..16 {
        pages_of_a_call(&mut session).await;
    }
    // 256 calls include two rounds of pruning.
    let mut pages = Vec::new();
    for _ in 0..256 {
        pages.push(pages_of_a_call(&mut session).await);
    }
    pages.sort_unstable();
    Pages {
        calls: 256,
        median: pages[128],
        sum: pages.iter().sum(),
    }
}

async fn pages_of_a_call(session: &mut PgConnection) -> i64 {
    let Json(explained): Json<Value> = sqlx::query_scalar(
        "explain (analyze, buffers, format json) select public.registrar_visitas(array[now()])",
    )
    .fetch_one(session)
    .await
    .unwrap();
    let pages = |kind: &str| explained[0]["Plan"][kind].as_i64().unwrap();
    pages("Shared Hit Blocks") + pages("Shared Read Blocks")
}
