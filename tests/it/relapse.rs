//! Faults that a probe does not see, and faults that only a visit or a rehearsal of it shows.

use std::time::{Duration, Instant};

use reqwest::StatusCode;

use crate::support::load::Load;
use crate::support::{HeldCount, PATIENT, SOON, Service, World, eventually};

#[tokio::test(flavor = "multi_thread")]
async fn deferred_trigger_that_raises_takes_the_store_down_once() {
    let world = World::new();
    let service = world.serve().await;
    service.visit().await;
    world
        .sql(
            "create function public.refuses() returns trigger language plpgsql as $$ begin \
               raise exception 'not today' using detail = 'It is a holiday.', hint = 'Come back.'; end $$; \
             create constraint trigger refuses after insert on visitas \
               deferrable initially deferred for each row execute function public.refuses()",
        )
        .await;
    assert_eq!(
        service.get("/").await.status,
        StatusCode::SERVICE_UNAVAILABLE
    );
    let until = Instant::now() + Duration::from_secs(1);
    while Instant::now() < until {
        let visit = service.get("/").await.status;
        assert_eq!(visit, StatusCode::SERVICE_UNAVAILABLE);
        let health = service.get("/health").await.status;
        assert_eq!(health, StatusCode::SERVICE_UNAVAILABLE);
    }
    let down = service.logged("store is down");
    assert_eq!(down.len(), 1, "{down:?}");
    let error = down[0]["error"].as_str().unwrap();
    let text = "not today (detail: It is a holiday.) (hint: Come back.)";
    assert!(error.ends_with(text), "{error}");
    assert!(service.logged("store is up again").is_empty());

    world.sql("drop trigger refuses on visitas").await;
    service.until_ready().await;
    assert_eq!(service.visit().await.0, 2);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "reads a clock: make faults"]
async fn fault_that_no_probe_sees_is_retried_less_and_less_often() {
    let world = World::new();
    let service = world.serve().await;
    // Only a batch of several visits fails.
    world
        .sql(
            "create function public.refuses() returns trigger language plpgsql as $$ begin \
               if (select count(*) from rows) > 1 then raise exception 'one at a time'; end if; \
               return null; end $$; \
             create trigger refuses after insert on visitas referencing new table as rows \
               for each statement execute function public.refuses()",
        )
        .await;
    let load = Load::start(&[&service], 32);
    let outages = || service.logged("store is down").len();
    eventually("visits fail", SOON, async || outages() > 0).await;
    let failing_since = Instant::now();
    eventually("several outages are logged", SOON, async || outages() >= 6).await;
    // The pauses before the sixth outage are 0.2, 0.4, 0.8, 1.6 and 2 s.
    assert!(failing_since.elapsed() > Duration::from_secs(4));
    load.stop().await;
    world.sql("drop trigger refuses on visitas").await;
    service.until_ready().await;
    assert_eq!(service.visit().await.0, world.rows().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn counter_at_its_maximum_takes_redis_down_once() {
    let world = World::new();
    let service = world.serve().await;
    service.visit().await;
    world
        .redis_says::<String>(&["SET", "visitas_home", "9223372036854775807"])
        .await;
    service.until_health("degraded").await;
    for total in 2..12 {
        let visit = service.get("/").await;
        assert_eq!(visit.status, StatusCode::OK);
        assert_eq!(visit.json()["total_registros_db"], total);
        assert_eq!(visit.json()["redis_status"], "erro");
        assert_eq!(service.get("/health").await.json()["status"], "degraded");
    }
    let down = service.logged("store is down");
    assert_eq!(down.len(), 1, "{down:?}");
    assert!(service.logged("store is up again").is_empty());

    world.redis_says::<i64>(&["DEL", "visitas_home"]).await;
    service.until_ready().await;
    assert_eq!(service.visit().await, (12, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn counter_with_room_for_one_more_batch_is_used() {
    let world = World::new();
    let highest = i64::MAX - 4096;
    world
        .redis_says::<String>(&["SET", "visitas_home", &highest.to_string()])
        .await;
    let service = world.serve().await;
    let visit = service.get("/").await.json();
    assert_eq!(visit["redis_status"], "ok", "{visit}");
    assert_eq!(visit["visitas_redis"], highest + 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn batch_that_takes_too_long_halves_the_limit_and_a_full_one_doubles_it() {
    let world = World::new();
    let service = world.serve_with(&PATIENT).await;
    // In place of a long batch: the error of one that reaches `statement_timeout`.
    world
        .sql(
            "create function public.cancels() returns trigger language plpgsql as $$ begin \
               if (select count(*) from rows) = 100 then \
                 raise exception 'too slow' using errcode = 'query_canceled'; end if; \
               return null; end $$; \
             create trigger cancels after insert on visitas referencing new table as rows \
               for each statement execute function public.cancels()",
        )
        .await;
    visit_behind_another(&world, &service, 100).await;
    world.sql("drop trigger cancels on visitas").await;
    service.until_ready().await;
    for visits in [60, 120] {
        visit_behind_another(&world, &service, visits).await;
    }
    let sizes = "select array_agg(n order by id) \
                 from (select count(*) as n, min(id) as id from visitas group by xmin::text) as b";
    let (sizes,): (Vec<i64>,) = world.row(sizes).await;
    assert_eq!(sizes, [1, 1, 50, 10, 1, 100, 20]);
}

/// Makes visits while another one waits for the count's lock.
async fn visit_behind_another(world: &World, service: &Service, visits: u32) {
    let mut count = HeldCount::of(world).await;
    let first = service.begin_visit();
    count.until_waited_for().await;
    let others: Vec<_> = (0..visits).map(|_| service.begin_visit()).collect();
    service.until_queued(visits).await;
    count.release().await;
    for visit in others.into_iter().chain([first]) {
        visit.await.expect("a response");
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "floods: make faults"]
async fn batches_too_large_for_the_timeout_shrink_and_grow_back() {
    let world = World::new();
    let service = world
        .serve_with(&[("DB_TIMEOUT", "1s"), ("VISIT_TIMEOUT", "5s")])
        .await;
    // At most some 70 rows within statement_timeout.
    world
        .sql(
            "create function public.slow() returns trigger language plpgsql as $$ begin \
               perform pg_sleep(0.012); return new; end $$; \
             create trigger slow before insert on visitas for each row execute function public.slow()",
        )
        .await;
    let load = Load::start(&[&service], 256);
    let rows = async || world.rows().await;
    eventually("small batches are recorded", 2 * SOON, async || {
        rows().await > 150
    })
    .await;
    world.sql("drop trigger slow on visitas").await;
    let large = "visitas_batch_size_bucket{le=\"128\"}";
    let all = "visitas_batch_size_bucket{le=\"+Inf\"}";
    eventually("large batches are recorded", SOON, async || {
        service.metric(all).await > service.metric(large).await
    })
    .await;
    load.stop().await;
    assert_eq!(service.visit().await.0, world.rows().await);
}
