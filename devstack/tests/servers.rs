//! The servers, as tests of other crates use them.

mod processes;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Command;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use devstack::{DATABASE, Data, Postgres, PostgresOptions, Redis, RedisOptions};
use processes::{assert_gone, family, processes, wait_until};

#[test]
fn postgres_keeps_its_rows_and_its_port_over_a_kill() {
    let postgres = Postgres::start(PostgresOptions::default()).unwrap();
    let port = postgres.port();
    postgres
        .sql(DATABASE, "create table t as select 42 as n")
        .unwrap();
    let processes = family(postgres.pid().unwrap());
    postgres.kill().unwrap();
    assert_gone(&processes);
    assert!(postgres.sql(DATABASE, "select 1").is_err());
    postgres.start_again().unwrap();
    assert_eq!(
        (
            postgres.port(),
            postgres.sql(DATABASE, "select n from t").unwrap()
        ),
        (port, "42".into())
    );
}

#[test]
fn kept_data_is_there_for_the_next_server() {
    let folder = tempfile::tempdir().unwrap();
    let options = || PostgresOptions {
        data: Data::Kept(folder.path().into()),
        ..Default::default()
    };
    Postgres::start(options())
        .unwrap()
        .sql(DATABASE, "create table t as select 42 as n")
        .unwrap();
    assert_eq!(
        Postgres::start(options())
            .unwrap()
            .sql(DATABASE, "select n from t")
            .unwrap(),
        "42"
    );
}

#[test]
fn kept_data_in_use_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let options = || RedisOptions {
        data: Data::Kept(folder.path().into()),
        ..Default::default()
    };
    let _first = Redis::start(options()).unwrap();
    let error = Redis::start(options()).err().unwrap().to_string();
    assert!(error.contains("is in use"), "{error}");
}

#[test]
fn dropped_server_leaves_neither_process_nor_data() {
    for data in [Data::Temporary, Data::InMemory] {
        let postgres = Postgres::start(PostgresOptions {
            data: data.clone(),
            ..Default::default()
        });
        let redis = Redis::start(RedisOptions {
            data,
            ..Default::default()
        });
        let (postgres, redis) = (postgres.unwrap(), redis.unwrap());
        let folders = [postgres.folder().to_owned(), redis.folder().to_owned()];
        let pids = [
            family(postgres.pid().unwrap()),
            family(redis.pid().unwrap()),
        ]
        .concat();
        assert!(folders.iter().all(|folder| folder.exists()));
        drop((postgres, redis));
        assert_gone(&pids);
        assert!(folders.iter().all(|folder| !folder.exists()));
    }
}

#[test]
fn quick_login_takes_the_same_password_hashed_once() {
    let postgres = Postgres::start(PostgresOptions {
        quick_login: true,
        ..Default::default()
    })
    .unwrap();
    // `sql` logs in with it.
    let kept = postgres
        .sql(
            DATABASE,
            "select rolpassword from pg_authid where rolcanlogin",
        )
        .unwrap();
    assert!(kept.starts_with("SCRAM-SHA-256$1:"), "{kept}");
}

#[test]
fn query_to_a_paused_postgres_hangs_until_it_is_resumed() {
    let postgres = Arc::new(Postgres::start(PostgresOptions::default()).unwrap());
    postgres.pause().unwrap();
    let response = in_background({
        let postgres = Arc::clone(&postgres);
        move || postgres.sql(DATABASE, "select 42").unwrap()
    });
    assert!(response.recv_timeout(Duration::from_millis(300)).is_err());
    postgres.resume().unwrap();
    assert_eq!(response.recv_timeout(Duration::from_secs(9)).unwrap(), "42");
}

#[test]
fn pause_stops_connected_backends() {
    let postgres = Arc::new(Postgres::start(PostgresOptions::default()).unwrap());
    let done = in_background({
        let postgres = Arc::clone(&postgres);
        move || {
            postgres
                .sql(DATABASE, "select count(*) from generate_series(1, 1e10)")
                .is_err()
        }
    });
    let busy =
        "select pid from pg_stat_activity where query like '%1e10%' and pid <> pg_backend_pid()";
    let mut backend = String::new();
    wait_until("the query runs", || {
        backend = postgres.sql(DATABASE, busy).unwrap();
        !backend.is_empty()
    });
    postgres.pause().unwrap();
    let family = family(postgres.pid().unwrap());
    assert!(family.contains(&backend.parse().unwrap()));
    wait_until("all are stopped", || {
        processes()
            .iter()
            .filter(|process| family.contains(&process.id))
            .all(|process| "TZ".contains(process.state))
    });
    postgres.kill().unwrap();
    assert!(
        done.recv_timeout(Duration::from_secs(9)).unwrap(),
        "the client of a killed backend sees an error"
    );
}

#[test]
fn paused_redis_responds_once_resumed() {
    let redis = Redis::start(RedisOptions::default()).unwrap();
    redis.pause().unwrap();
    let mut client = TcpStream::connect((redis.host(), redis.port())).unwrap();
    client.write_all(b"PING\r\n").unwrap();
    client
        .set_read_timeout(Some(Duration::from_millis(300)))
        .unwrap();
    assert!(client.read(&mut [0; 7]).is_err());
    redis.resume().unwrap();
    client
        .set_read_timeout(Some(Duration::from_secs(9)))
        .unwrap();
    let mut response = [0; 7];
    client.read_exact(&mut response).unwrap();
    assert_eq!(&response, b"+PONG\r\n");
}

#[test]
fn paused_server_can_be_restarted_and_dropped() {
    let redis = Redis::start(RedisOptions::default()).unwrap();
    redis.pause().unwrap();
    redis.restart().unwrap();
    let log = std::fs::read_to_string(redis.folder().join("log")).unwrap();
    assert!(log.contains("Redis is now ready to exit"), "{log}");
    redis.pause().unwrap();
    let pids = family(redis.pid().unwrap());
    drop(redis);
    assert_gone(&pids);
}

#[test]
fn databases_are_created_and_dropped() {
    let postgres = Postgres::start(PostgresOptions::default()).unwrap();
    postgres.create_database("a \"b").unwrap();
    assert!(postgres.create_database("a \"b").is_err());
    postgres.drop_database("a \"b").unwrap();
    assert!(postgres.sql("a \"b", "select 1").is_err());
}

#[test]
fn commits_are_durable_by_default() {
    let settings =
        "select current_setting('fsync') || ' ' || current_setting('synchronous_commit')";
    let postgres = Postgres::start(PostgresOptions::default()).unwrap();
    assert_eq!(postgres.sql(DATABASE, settings).unwrap(), "on on");
    let config = vec![("fsync".to_owned(), "off".to_owned())];
    let postgres = Postgres::start(PostgresOptions {
        config,
        ..Default::default()
    })
    .unwrap();
    assert_eq!(postgres.sql(DATABASE, settings).unwrap(), "off on");
}

#[test]
fn postgres_is_verified_by_a_client_that_trusts_its_ca() {
    let postgres = Postgres::start(PostgresOptions {
        tls: true,
        ..Default::default()
    })
    .unwrap();
    let ca = postgres.ca().unwrap().display();
    let connection = format!(
        "host=localhost hostaddr=127.0.0.1 dbname={DATABASE} sslmode=verify-full sslrootcert={ca}"
    );
    let encrypted = "select ssl from pg_stat_ssl where pid = pg_backend_pid()";
    assert_eq!(postgres.sql(&connection, encrypted).unwrap(), "t");
}

#[test]
fn redis_with_tls_and_password_requires_both() {
    let options = RedisOptions {
        tls: true,
        password: Some("s3 \"x".into()),
        ..Default::default()
    };
    let redis = Redis::start(options).unwrap();
    let ask = |arguments: &[&str]| {
        let port = redis.port().to_string();
        let output = Command::new("redis-cli")
            .args(["-h", "127.0.0.1", "-p", &port])
            .args(arguments)
            .arg("ping")
            .output();
        String::from_utf8(output.unwrap().stdout).unwrap()
    };
    let ca = redis.ca().unwrap().to_str().unwrap();
    assert_eq!(
        ask(&["--tls", "--cacert", ca, "--no-auth-warning", "-a", "s3 \"x"]),
        "PONG\n"
    );
    assert_ne!(ask(&["--tls", "--cacert", ca]), "PONG\n");
    assert_ne!(ask(&["--no-auth-warning", "-a", "s3 \"x"]), "PONG\n");
    assert!(redis.url().starts_with("rediss://:"));
}

#[test]
fn server_that_cannot_start_shows_its_log() {
    let redis = Redis::start(RedisOptions::default()).unwrap();
    let taken = PostgresOptions {
        port: redis.port(),
        ..Default::default()
    };
    let error = Postgres::start(taken).err().unwrap().to_string();
    assert!(error.contains("could not bind"), "{error}");
}

/// Runs a function on another thread and returns a receiver for its result.
fn in_background<T: Send + 'static>(
    function: impl FnOnce() -> T + Send + 'static,
) -> mpsc::Receiver<T> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || sender.send(function()));
    receiver
}
