//! `GET /visitas`: totals, states and rates, read without counting.

use std::time::Duration;

use reqwest::StatusCode;
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::support::{SOON, Service, World, eventually, without_stores};

async fn read(service: &Service) -> Value {
    let answer = service.get("/visitas").await;
    assert_eq!(answer.status, StatusCode::OK);
    assert_eq!(answer.header("content-type"), "application/json");
    assert_eq!(answer.header("cache-control"), "no-store");
    assert_eq!(answer.header("vary"), "Accept, Accept-Language");
    answer.json()
}

fn time(value: &Value) -> OffsetDateTime {
    OffsetDateTime::parse(value.as_str().expect("a time"), &Rfc3339).expect("RFC 3339")
}

fn rates(read: &Value) -> &[Value] {
    read["replica"]["taxas"].as_array().expect("rates")
}

fn sum(read: &Value, field: &str) -> u64 {
    let numbers = rates(read)
        .iter()
        .map(|rate| rate[field].as_u64().expect("a number"));
    numbers.sum()
}

#[tokio::test]
async fn totals_and_states_are_read_without_counting() {
    let world = World::new();
    let service = world.serve().await;
    for _ in 0..3 {
        service.visit().await;
    }
    world.sql("insert into visitas default values").await;
    eventually("the monitor has read both stores", SOON, async || {
        let read = read(&service).await;
        read["total_registros_db"] == 4 && read["visitas_redis"] == 3
    })
    .await;
    let answer = service.get("/visitas").await;
    let start = r#"{"db_status":"ok","redis_status":"ok","total_registros_db":4,"visitas_redis":3,"atualizado_em":""#;
    assert!(answer.body.starts_with(start), "{}", answer.body);
    assert!(answer.body.ends_with("}\n"), "{}", answer.body);
    assert_eq!(world.rows().await, 4);
    assert_eq!(world.redis_visits().await, 3);
}

#[tokio::test]
async fn answered_visit_is_in_the_totals_at_once() {
    let world = World::new();
    let service = world.serve().await;
    for _ in 0..100 {
        let (total, redis) = service.visit().await;
        let read = read(&service).await;
        let totals = (&read["total_registros_db"], &read["visitas_redis"]);
        assert_eq!(totals, (&json!(total), &json!(redis)));
    }
}

#[tokio::test]
async fn replica_has_an_id_a_start_and_ten_minutes_of_rates() {
    let world = World::new();
    let service = world.serve().await;
    let first = read(&service).await;
    let replica = first["replica"].as_object().expect("an object");
    let fields: Vec<_> = replica.keys().map(String::as_str).collect();
    assert_eq!(fields, ["desde", "id", "taxas"]);
    let age = time(&first["atualizado_em"]) - time(&first["replica"]["desde"]);
    assert!(age.is_positive() && age < Duration::from_mins(5), "{age}");
    let id = first["replica"]["id"].as_str().expect("an id");
    assert_eq!(id.len(), 36);
    let rates = rates(&first);
    assert_eq!(rates.len(), 120);
    for pair in rates.windows(2) {
        let (before, after) = (time(&pair[0]["em"]), time(&pair[1]["em"]));
        assert_eq!(after - before, Duration::from_secs(5));
        assert_eq!(before.unix_timestamp() % 5, 0);
    }
    let last = rates.last().unwrap();
    let since = time(&first["atualizado_em"]) - time(&last["em"]);
    assert!(
        since >= Duration::from_secs(5) && since < Duration::from_secs(11),
        "{since}"
    );
    assert_eq!(
        rates[0],
        json!({"em": rates[0]["em"], "visitas": 0, "falhas": 0, "p50_ms": null, "p99_ms": null})
    );
    let (other, again) = (world.serve().await, read(&service).await);
    assert_eq!(again["replica"]["id"], id);
    assert_ne!(read(&other).await["replica"]["id"], id);
}

#[tokio::test]
async fn stores_that_are_down_have_no_total() {
    let service = without_stores(&[]).await;
    let read = read(&service).await;
    for (field, value) in [
        ("db_status", json!("erro")),
        ("redis_status", json!("erro")),
        ("total_registros_db", Value::Null),
        ("visitas_redis", Value::Null),
    ] {
        assert_eq!(read[field], value, "{field}");
    }
}

#[tokio::test]
#[ignore = "takes long: make faults"]
async fn rates_are_those_of_the_traffic() {
    let world = World::of_its_own();
    let service = world.serve().await;
    for _ in 0..40 {
        service.visit().await;
    }
    eventually("the visits' interval is over", SOON, async || {
        sum(&read(&service).await, "visitas") == 40
    })
    .await;
    let calm = read(&service).await;
    assert_eq!(sum(&calm, "falhas"), 0);
    let took = |rate: &Value, field: &str| rate[field].as_f64();
    for rate in rates(&calm) {
        let visits = rate["visitas"].as_u64().expect("a number");
        let (p50, p99) = (took(rate, "p50_ms"), took(rate, "p99_ms"));
        assert_eq!(visits > 0, p50.is_some() && p99.is_some(), "{rate}");
        assert!(p50 <= p99 && p50 != Some(0.0), "{rate}");
    }
    world.postgres.kill().expect("Postgres ends");
    service.until_health("unavailable").await;
    for _ in 0..7 {
        let answer = service.get("/").await;
        assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE);
    }
    eventually("the failures' interval is over", SOON, async || {
        sum(&read(&service).await, "falhas") == 7
    })
    .await;
    assert_eq!(sum(&read(&service).await, "visitas"), 40);
}
