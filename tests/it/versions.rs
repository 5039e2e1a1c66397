//! What the service shows and what it leaves in the stores, which is the same with every supported
//! version of them: `make compat` runs this test with each.
//!
//! `UPDATE_EXPECT=1 cargo test --test it versions` rewrites the file `versions.txt`.

use std::fmt::Write as _;

use expect_test::expect_file;
use http::{HeaderMap, Method};

use crate::support::exposition::Exposition;
use crate::support::{HeldCount, Response, SOON, World, eventually};

/// The tables, functions and triggers, one a line.
const OBJECTS: &str = "\
    select format('column %s.%s %s nullable %s default %s', table_name, column_name, data_type, \
                  is_nullable, coalesce(column_default, identity_generation, '-')) \
    from information_schema.columns where table_schema = 'public' \
    union all \
    select format('function %s %s returns %s is %s', p.proname, \
                  pg_get_function_identity_arguments(p.oid), pg_get_function_result(p.oid), \
                  md5(p.prosrc)) \
    from pg_proc as p where p.pronamespace = 'public'::regnamespace \
    union all \
    select pg_get_triggerdef(t.oid) from pg_trigger as t where not t.tgisinternal \
    union all \
    select indexdef from pg_indexes where schemaname = 'public' \
    order by 1";

#[tokio::test(flavor = "multi_thread")]
async fn every_version_of_the_stores_gives_the_same() {
    let world = World::new();
    let service = world.serve().await;
    let mut seen = String::new();
    let mut note = |what: &str, response: &Response| {
        writeln!(
            seen,
            "== {what}\n{} {}",
            response.status,
            without_times(&response.body)
        )
        .unwrap();
    };
    note("visit", &service.get("/").await);
    note("visit", &service.get("/").await);
    note(
        "HEAD /",
        &service.ask(Method::HEAD, "/", HeaderMap::new()).await,
    );
    note("health", &service.get("/health").await);
    // A refused visit shows what the monitor has read last.
    eventually("the monitor has read both visits", SOON, async || {
        service.metric("visitas_redis_visits").await == Some(2.0)
    })
    .await;
    // Postgres ends the call by its own lock_timeout.
    let held = HeldCount::of(&world).await;
    let refused = service.get("/").await;
    note("visit while the count is locked", &refused);
    assert_eq!(refused.header("retry-after"), "1");
    held.release().await;
    service.until_ready().await;
    note("visit", &service.get("/").await);
    world.sql("delete from visitas where id = 1").await;
    note("visit after a delete", &service.get("/").await);
    world.sql("truncate visitas").await;
    note("visit after a truncate", &service.get("/").await);
    let objects = world.postgres.sql(&world.database, OBJECTS).unwrap();
    let keys: Vec<String> = world.redis_says(&["KEYS", "*"]).await;
    let kind: String = world.redis_says(&["TYPE", "visitas_home"]).await;
    let value: String = world.redis_says(&["GET", "visitas_home"]).await;
    let series = series_of_stores(&Exposition::text(&service).await);
    let series = series.replace(&world.database, "…");
    writeln!(
        seen,
        "== Postgres\n{objects}\n== Redis\n{keys:?} {kind} {value}\n== series\n{series}"
    )
    .unwrap();
    expect_file!["versions.txt"].assert_eq(&seen);
}

/// The body of a health report without its durations and version.
fn without_times(body: &str) -> String {
    let digits = |text: &str| text.replace(|letter: char| letter.is_ascii_digit(), "");
    let parts = body.split(',').map(|part| {
        let varies = part.contains("latency_ms") || part.contains("version");
        if varies {
            digits(part)
        } else {
            part.to_owned()
        }
    });
    parts.collect::<Vec<_>>().join(",").trim_end().to_owned()
}

/// The series of calls to the stores, without their values.
fn series_of_stores(exposition: &Exposition) -> String {
    let body = exposition.sorted();
    let lines = body.lines().filter(|line| !line.starts_with('#'));
    let lines = lines.filter(|line| line.contains("_count{") || line.contains("_calls_total"));
    let names = lines.filter_map(|line| Some(line.rsplit_once(' ')?.0));
    let names = names.filter(|name| name.contains("db_system_name"));
    names.collect::<Vec<_>>().join("\n")
}
