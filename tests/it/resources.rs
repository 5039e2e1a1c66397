//! Metrics of connections, process and runtime, compared with what the stores and the system report.

use std::fs;
use std::thread::available_parallelism;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use reqwest::StatusCode;

use crate::support::load::visits;
use crate::support::{HeldCount, SOON, Service, Way, Wire, World, eventually};

#[tokio::test(flavor = "multi_thread")]
async fn connection_counts_of_a_pool_match_those_of_its_store() {
    let world = World::new();
    let service = world
        .serve_with(&[("DB_TIMEOUT", "8s"), ("VISIT_TIMEOUT", "9s")])
        .await;
    service.visit().await;
    let mut count = HeldCount::of(&world).await;
    let visit = service.begin_visit();
    count.until_waited_for().await;
    let sessions = "select count(*) from pg_stat_activity \
                    where datname = current_database() and application_name = 'visitas'";
    let pool = async |pool, state| pool_count(&service, pool, state).await;
    // The writer uses a connection, and a periodic reading uses another for a moment.
    eventually("Postgres has the pool's connections", SOON, async || {
        let (used, idle) = (
            pool("postgres", "used").await,
            pool("postgres", "idle").await,
        );
        used == 1 && used + idle == world.number(sessions).await
    })
    .await;
    count.release().await;
    assert_eq!(visit.await.unwrap().status, StatusCode::OK);
    eventually("no connection is used", SOON, async || {
        pool("postgres", "used").await == 0 && pool("redis", "used").await == 0
    })
    .await;
    eventually("Redis has the pool's connections", SOON, async || {
        let clients: String = world.redis_says(&["CLIENT", "LIST"]).await;
        let clients = i64::try_from(clients.lines().count()).unwrap();
        // The test's own connection is one of them.
        pool("redis", "idle").await == clients - 1
    })
    .await;
    for pool in ["postgres", "redis"] {
        assert_eq!(of_pool(&service, "max", pool).await, 4);
        assert_eq!(of_pool(&service, "pending_requests", pool).await, 0);
        assert_eq!(of_pool(&service, "timeouts_total", pool).await, 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn checkout_is_timed() {
    let world = World::new();
    let service = world.serve().await;
    let waits = async |pool| {
        (
            of_pool(&service, "wait_time_seconds_count", pool).await,
            time_of_pool(&service, pool).await,
        )
    };
    for pool in ["postgres", "redis"] {
        let (before, _) = waits(pool).await;
        for _ in 0..50 {
            service.visit().await;
        }
        let (after, sum) = waits(pool).await;
        // Periodic readings check out connections, too.
        assert!((50..150).contains(&(after - before)), "{before} {after}");
        assert!(sum > 0.0 && sum < 5.0, "{sum}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn checkout_that_waits_is_pending_and_is_counted_when_it_times_out() {
    let world = World::new();
    let way = Way::to(world.postgres.port()).await;
    let port = way.port.to_string();
    let service = world
        .serve_with(&[("DB_PORT", &port), ("VISIT_TIMEOUT", "5s")])
        .await;
    let said = || way.said().concat().len();
    way.fall_silent_for_good();
    // A periodic reading holds the only open connection.
    let before = said();
    eventually("a reading", SOON, async || said() > before).await;
    let visit = service.begin_visit();
    eventually("a checkout waits", SOON, async || {
        of_pool(&service, "pending_requests", "postgres").await == 1
    })
    .await;
    assert_eq!(visit.await.unwrap().status, StatusCode::SERVICE_UNAVAILABLE);
    eventually("the timeout is counted", SOON, async || {
        of_pool(&service, "timeouts_total", "postgres").await == 1
    })
    .await;
    assert_eq!(of_pool(&service, "pending_requests", "postgres").await, 0);
    let longest = time_of_pool(&service, "postgres").await;
    assert!(longest >= 0.9, "{longest}");
}

#[tokio::test(flavor = "multi_thread")]
async fn process_metrics_match_those_of_the_system() {
    let world = World::new();
    let service = world.serve().await;
    service.visit().await;
    let pid = service.pid();
    let read = |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap();
    let status = |field: &str| -> f64 {
        let status = read("status");
        let line = status.lines().find_map(|line| line.strip_prefix(field));
        let value = line.unwrap().trim().trim_end_matches(" kB");
        value.parse().unwrap()
    };
    let metric = async |name: &str| service.metric(name).await.unwrap();
    let near = |one: f64, other: f64| (one - other).abs() < 0.2 * other;

    let files = || {
        let files = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
        i64::try_from(files).unwrap()
    };
    eventually("the open files are counted", SOON, async || {
        let before = files();
        // The process has the folder open that it counts.
        whole(&service, "process_open_fds").await == before + 1 && files() == before
    })
    .await;
    let open = whole(&service, "process_open_fds").await;
    let mut wires = Vec::new();
    for _ in 0..20 {
        let mut wire = Wire::open(&service).await;
        wire.get("/health/live").await;
        wires.push(wire);
    }
    let more = whole(&service, "process_open_fds").await - open;
    // The pools can open or close a connection.
    assert!((18..=26).contains(&more), "{more}");
    let limits = read("limits");
    let limit = limits
        .lines()
        .find(|line| line.starts_with("Max open files"));
    let soft = limit.unwrap().split_whitespace().nth(3).unwrap();
    assert_eq!(metric("process_max_fds").await.to_string(), soft);
    let resident = metric("process_resident_memory_bytes").await;
    assert!(near(resident, status("VmRSS:") * 1024.0), "{resident}");
    let virtual_memory = metric("process_virtual_memory_bytes").await;
    assert!(
        near(virtual_memory, status("VmSize:") * 1024.0),
        "{virtual_memory}"
    );
    eventually("the threads are counted", SOON, async || {
        (metric("process_threads").await - status("Threads:")).abs() < 0.5
    })
    .await;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let age = now.as_secs_f64() - metric("process_start_time_seconds").await;
    assert!((-1.0..60.0).contains(&age), "{age}");
}

#[tokio::test(flavor = "multi_thread")]
async fn processor_time_has_fractions_and_matches_that_of_the_system() {
    let world = World::new();
    let service = world.serve().await;
    let pid = service.pid();
    let used = || {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let fields = stat.rsplit_once(") ").unwrap().1.split(' ');
        let ticks = fields.skip(11).take(2);
        // The unit is a hundredth of a second.
        let ticks = ticks.map(|ticks| ticks.parse::<u32>().unwrap());
        f64::from(ticks.sum::<u32>()) / 100.0
    };
    let metric = async || service.metric("process_cpu_seconds_total").await.unwrap();
    visits(&[&service], 16, 2_000).await;
    let (before, said, after) = (used(), metric().await, used());
    assert!((before..=after).contains(&said), "{before} {said} {after}");
    eventually("it has a fraction", SOON, async || {
        visits(&[&service], 4, 100).await;
        metric().await.fract() > 0.0
    })
    .await;
    assert!(metric().await > said);
}

#[tokio::test(flavor = "multi_thread")]
async fn runtime_metrics_follow_the_load() {
    let world = World::new();
    let service = world.serve().await;
    let metric = async |name: &str| service.metric(name).await.unwrap();
    let workers = available_parallelism().unwrap().get();
    let said = whole(&service, "tokio_workers").await;
    assert_eq!(said, i64::try_from(workers).unwrap());
    assert!(whole(&service, "tokio_global_queue_depth").await >= 0);

    let tasks = whole(&service, "tokio_alive_tasks").await;
    let more = async || whole(&service, "tokio_alive_tasks").await - tasks;
    let mut wires = Vec::new();
    for _ in 0..20 {
        wires.push(Wire::open(&service).await);
    }
    // The pools' connections have tasks, too, and can open or close.
    eventually("each connection has a task", SOON, async || {
        (18..=24).contains(&more().await)
    })
    .await;
    drop(wires);
    eventually("the tasks have ended", SOON, async || {
        more().await.abs() <= 2
    })
    .await;

    let (began, busy) = (SystemTime::now(), metric("tokio_busy_seconds_total").await);
    visits(&[&service], 32, 3_000).await;
    let busy = metric("tokio_busy_seconds_total").await - busy;
    let most = workers as f64 * began.elapsed().unwrap_or(Duration::ZERO).as_secs_f64();
    assert!(busy > 0.01 && busy <= most, "{busy} of {most}");
}

/// A metric of a store's pool, as a whole number.
async fn of_pool(service: &Service, figure: &str, pool: &str) -> i64 {
    let series =
        format!("db_client_connection_{figure}{{db_client_connection_pool_name=\"{pool}\"}}");
    whole(service, &series).await
}

/// The time that calls have waited for a connection of a store's pool, in seconds.
async fn time_of_pool(service: &Service, pool: &str) -> f64 {
    let series = format!(
        "db_client_connection_wait_time_seconds_sum{{db_client_connection_pool_name=\"{pool}\"}}"
    );
    service.metric(&series).await.expect("the series is there")
}

/// How many connections of a store's pool are in a state.
async fn pool_count(service: &Service, pool: &str, state: &str) -> i64 {
    let series = format!(
        "db_client_connection_count{{db_client_connection_pool_name=\"{pool}\",\
         db_client_connection_state=\"{state}\"}}"
    );
    whole(service, &series).await
}

async fn whole(service: &Service, series: &str) -> i64 {
    let value = service.metric(series).await.expect("the series is there");
    value.to_string().parse().expect("a whole number")
}
