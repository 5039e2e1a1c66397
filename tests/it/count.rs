//! The count is exact whatever is done to the table by hand, and costs the same at any size.

use std::time::Duration;

use sqlx::{Executor as _, PgConnection};

use crate::support::load::{Load, Visit, are_one_to_n, are_unique, visits};
use crate::support::{SOON, Service, World, eventually};

/// Less than the server's `lock_timeout`, so that whoever answered within it has not waited for one.
const WITHOUT_A_WAIT: Duration = Duration::from_millis(600);

#[tokio::test(flavor = "multi_thread")]
async fn twenty_thousand_visits_are_numbered_without_gap_or_repeat() {
    let world = World::new();
    let service = world.serve().await;
    let visits = visits(&[&service], 256, 20_000).await;
    assert_eq!(visits.len(), 20_000);
    assert!(are_one_to_n(visits.iter().map(Visit::total)));
    assert!(are_one_to_n(visits.iter().map(Visit::redis)));
    assert_eq!(world.rows().await, 20_000);
    assert_eq!(world.redis_visits().await, 20_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn numbers_ascend_for_each_client() {
    let world = World::new();
    let service = world.serve().await;
    let visits = visits(&[&service], 16, 2_000).await;
    for client in 0..16 {
        let mut of_client: Vec<_> = visits
            .iter()
            .filter(|visit| visit.client == client)
            .collect();
        of_client.sort_by_key(|visit| visit.sent);
        assert!(of_client.is_sorted_by(|a, b| a.total() < b.total()));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_row_has_the_moment_of_its_own_arrival() {
    let world = World::new();
    let service = world.serve().await;
    let before: String = world.text("select now()::text").await;
    visits(&[&service], 32, 500).await;
    let moments = "select count(distinct data) from visitas";
    assert!(world.number(moments).await > 400, "not one moment a batch");
    let outside = format!(
        "select count(*)::text from visitas where data < '{before}'::timestamptz - interval '10 ms' or data > now()"
    );
    assert_eq!(world.text(&outside).await, "0");
}

#[tokio::test(flavor = "multi_thread")]
async fn two_instances_give_no_number_twice() {
    let world = World::new();
    let (one, other) = (world.serve().await, world.serve().await);
    let visits = visits(&[&one, &other], 64, 6_000).await;
    assert!(are_one_to_n(visits.iter().map(Visit::total)));
    assert!(are_one_to_n(visits.iter().map(Visit::redis)));
    assert_eq!(world.rows().await, 6_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn five_instances_migrate_an_empty_database_once() {
    let world = World::new();
    let start = || world.start(&[]);
    let five = tokio::join!(start(), start(), start(), start(), start());
    let five = [&five.0, &five.1, &five.2, &five.3, &five.4];
    for service in five {
        service.until_ready().await;
    }
    assert_eq!(
        world
            .number("select count(*) from _sqlx_migrations where success")
            .await,
        2
    );
    let visits = visits(&five, 10, 500).await;
    assert!(are_one_to_n(visits.iter().map(Visit::total)));
}

#[tokio::test(flavor = "multi_thread")]
async fn count_follows_what_is_done_by_hand() {
    let world = World::new();
    let service = world.serve().await;
    let mut hand = world.session().await;
    for (statement, total) in [
        ("insert into visitas default values", 2),
        (
            "insert into visitas (data) select now() from generate_series(1, 1000)",
            1003,
        ),
        ("update visitas set data = now() where id > 3", 1004),
        (
            "delete from visitas where id in (select id from visitas limit 500)",
            505,
        ),
        (
            "insert into visitas (id) values (1) on conflict (id) do update set data = now()",
            506,
        ),
        (
            "with gone as (delete from visitas returning data) insert into visitas (data) select data from gone limit 5",
            6,
        ),
        ("truncate visitas", 1),
        (
            "begin; insert into visitas default values; truncate visitas; insert into visitas default values; commit",
            2,
        ),
        ("begin; delete from visitas; rollback", 3),
        (
            "begin; savepoint s; insert into visitas default values; rollback to s; insert into visitas default values; commit",
            5,
        ),
    ] {
        hand.execute(sqlx::raw_sql(statement)).await.unwrap();
        assert_eq!(service.visit().await.0, total, "after {statement}");
        assert_eq!(world.rows().await, total, "after {statement}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn uncommitted_insert_neither_counts_nor_stops_visits() {
    for (end, counted) in [("commit", 1000), ("rollback", 0)] {
        let world = World::new();
        let service = world.serve().await;
        let mut hand = world.session().await;
        let insert = "begin; insert into visitas (data) select now() from generate_series(1, 1000)";
        hand.execute(sqlx::raw_sql(insert)).await.unwrap();
        for number in 1..=20 {
            let started = std::time::Instant::now();
            assert_eq!(service.visit().await.0, number);
            assert!(
                started.elapsed() < WITHOUT_A_WAIT,
                "{:?}",
                started.elapsed()
            );
        }
        hand.execute(end).await.unwrap();
        assert_eq!(service.visit().await.0, 21 + counted, "after {end}");
        assert_eq!(world.rows().await, 21 + counted);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn count_is_exact_after_manual_sessions_at_every_isolation_level() {
    let world = World::new();
    let (one, other) = (world.serve().await, world.serve().await);
    let load = Load::start(&[&one, &other], 16);
    let mut hands = tokio::task::JoinSet::new();
    for level in [
        "read uncommitted",
        "read committed",
        "repeatable read",
        "serializable",
    ] {
        hands.spawn(change_by_hand(world.session().await, level));
    }
    hands.join_all().await;
    load.stop().await;
    let total = one.visit().await.0;
    assert_eq!(world.rows().await, total);
    assert_eq!(other.visit().await.0, total + 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn role_with_table_privileges_and_an_empty_search_path_is_counted() {
    let world = World::new();
    let service = world.serve().await;
    let role = format!("hand_{}", world.database);
    world
        .sql(&format!(
            "create role {role} login password 'x'; \
             grant select, insert, update, delete, truncate on public.visitas to {role}"
        ))
        .await;
    let mut hand = world.session_as(&role, "x").await;
    for (statement, total) in [
        (
            "set search_path = ''; insert into public.visitas default values",
            2,
        ),
        ("insert into public.visitas default values", 4),
        ("delete from public.visitas", 1),
        ("truncate public.visitas", 1),
    ] {
        hand.execute(sqlx::raw_sql(statement)).await.unwrap();
        assert_eq!(service.visit().await.0, total, "after {statement}");
    }
    drop(hand);
    world
        .sql(&format!("drop owned by {role}; drop role {role}"))
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ids_written_by_hand_stop_no_visit() {
    let world = World::new();
    let service = world.serve().await;
    for number in 1..=20 {
        let (total, _) = service.visit().await;
        assert_eq!(total, 2 * number - 1);
        let insert = "insert into visitas (id) select max(id) + 1 from visitas";
        world.session().await.execute(insert).await.unwrap();
    }
    let ahead = "insert into visitas (id) select max(id) + 3 from visitas";
    world.session().await.execute(ahead).await.unwrap();
    let visits = visits(&[&service], 8, 200).await;
    assert!(visits.iter().all(|visit| visit.status == 200));
    assert!(are_unique(visits.iter().filter_map(Visit::total)));
}

#[tokio::test(flavor = "multi_thread")]
async fn uncommitted_id_in_the_way_ends_in_bounded_refusals() {
    let world = World::new();
    let service = world.serve().await;
    service.visit().await;
    let mut hand = world.session().await;
    let insert = "begin; insert into visitas (id) select max(id) + 1 from visitas";
    hand.execute(sqlx::raw_sql(insert)).await.unwrap();
    let started = std::time::Instant::now();
    assert_eq!(service.get("/").await.status, 503);
    assert!(
        started.elapsed() < Duration::from_millis(1100),
        "{:?}",
        started.elapsed()
    );
    hand.execute("commit").await.unwrap();
    service.until_ready().await;
    assert_eq!(service.visit().await.0, 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_in_both_stores_and_their_difference_are_gauges() {
    let world = World::new();
    let service = world.serve().await;
    service.visit().await;
    let insert = "insert into visitas (data) select now() from generate_series(1, 5)";
    world.session().await.execute(insert).await.unwrap();
    eventually("the gauges follow", SOON, async || {
        gauges(&service).await == [Some(6.0), Some(1.0), Some(5.0)]
    })
    .await;
    world.redis.kill().unwrap();
    eventually("what is not known is NaN", SOON, async || {
        let [rows, redis, drift] = gauges(&service).await;
        rows == Some(6.0) && redis.is_some_and(f64::is_nan) && drift.is_some_and(f64::is_nan)
    })
    .await;
}

/// The recording call's cost in pages, which no clock decides.
#[tokio::test(flavor = "multi_thread")]
async fn old_snapshot_does_not_make_the_recording_call_read_more() {
    let world = World::new();
    drop(world.serve().await);
    let mut recorder = world.session().await;
    recorder
        .execute("set synchronous_commit = off")
        .await
        .unwrap();
    // The trees get their height, and the plans their shape.
    record_batches(&mut recorder, 20_000).await;
    recorder.execute("vacuum analyze").await.unwrap();
    record_batches(&mut recorder, 500).await;

    let mut old = world.session().await;
    let snapshot = "begin isolation level repeatable read; select count(*) from visitas_contagem";
    old.execute(sqlx::raw_sql(snapshot)).await.unwrap();
    let before = buffers_of_a_call(&mut recorder).await;
    record_batches(&mut recorder, 20_000).await;
    let after = buffers_of_a_call(&mut recorder).await;
    assert!(after <= before, "{before} buffers became {after}");
}

async fn record_batches(session: &mut PgConnection, batches: i32) {
    // One transaction each, as the recorder's calls are; the manual insert gives each a fold.
    for _ in 0..batches / 100 {
        let block = "do $$ begin for i in 1..100 loop \
                     perform public.registrar_visitas(array[now()]); \
                     if i = 50 then insert into public.visitas default values; end if; \
                     commit; end loop; end $$";
        session.execute(block).await.unwrap();
    }
}

/// The median of the pages that one call reads, in memory or not.
async fn buffers_of_a_call(session: &mut PgConnection) -> i64 {
    let mut readings = Vec::new();
    for _ in 0..31 {
        let explain = "explain (analyze, buffers, format json) \
                       select public.registrar_visitas(array[now()])";
        let plan: serde_json::Value =
            sqlx::query_scalar::<_, sqlx::types::Json<serde_json::Value>>(explain)
                .fetch_one(&mut *session)
                .await
                .unwrap()
                .0;
        let pages = |kind: &str| plan[0]["Plan"][kind].as_i64().unwrap();
        readings.push(pages("Shared Hit Blocks") + pages("Shared Read Blocks"));
    }
    readings.sort_unstable();
    readings[readings.len() / 2]
}

/// Inserts, changes, deletes and truncates for a while. What another session made impossible is
/// rolled back by the server, which is as good.
async fn change_by_hand(mut session: PgConnection, level: &'static str) {
    let isolation = format!("set session characteristics as transaction isolation level {level}");
    session
        .execute(sqlx::AssertSqlSafe(isolation))
        .await
        .unwrap();
    session.execute("set lock_timeout = '500ms'").await.unwrap();
    for turn in 0..60 {
        let statement = match turn % 6 {
            0 => "insert into visitas (data) select now() from generate_series(1, 7)",
            1 => {
                "begin; insert into visitas default values; delete from visitas where id in (select id from visitas order by id desc limit 3); commit"
            }
            2 => "update visitas set data = now() where id in (select id from visitas limit 5)",
            3 => "begin; insert into visitas default values; select pg_sleep(0.01); rollback",
            4 => "delete from visitas where id in (select id from visitas limit 5)",
            _ if turn % 30 == 29 => "truncate visitas",
            _ => {
                "begin; savepoint s; delete from visitas; rollback to s; insert into visitas default values; commit"
            }
        };
        if session.execute(sqlx::raw_sql(statement)).await.is_err() {
            session.execute("rollback").await.ok();
        }
    }
}

async fn gauges(service: &Service) -> [Option<f64>; 3] {
    [
        service.metric("visitas_rows").await,
        service.metric("visitas_redis_visits").await,
        service.metric("visitas_store_drift").await,
    ]
}
