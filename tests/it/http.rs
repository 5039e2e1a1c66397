//! Every row of the table of requests and answers.

use reqwest::StatusCode;

use crate::support::World;

#[tokio::test]
async fn second_visit_counts_two() {
    let world = World::new();
    let service = world.serve().await;
    assert_eq!(service.visit().await, (1, 1));
    assert_eq!(service.visit().await, (2, 2));
    assert_eq!(world.rows().await, 2);
    assert_eq!(world.redis_visits().await, 2);
}

#[tokio::test]
async fn visit_answers_the_four_fields_in_order() {
    let world = World::new();
    let answer = world.serve().await.get("/").await;
    assert_eq!(answer.status, StatusCode::OK);
    assert_eq!(answer.header("content-type"), "application/json");
    assert_eq!(answer.header("cache-control"), "no-store");
    assert_eq!(
        answer.body,
        r#"{"db_status":"ok","redis_status":"ok","total_registros_db":1,"visitas_redis":1}"#
    );
}
