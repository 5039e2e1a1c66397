//! The stores: URLs and their parts, secrets and certificates.

use super::*;

#[test]
fn server_side_timeouts_are_shares_of_the_deadline_in_whole_milliseconds() {
    let postgres = serve("--db-timeout=1s", &[]).postgres;
    assert_eq!(postgres.lock_timeout(), Duration::from_millis(700));
    assert_eq!(postgres.statement_timeout(), Duration::from_millis(850));
    let postgres = serve("--db-timeout=15ms --redis-timeout=1ms", &[]).postgres;
    assert_eq!(postgres.lock_timeout(), Duration::from_millis(10));
}

#[test]
fn redis_call_must_end_before_the_lock_is_given_up() {
    let line = error("reconcile", &[("REDIS_TIMEOUT", "700ms")]);
    assert!(line.contains("REDIS_TIMEOUT=\"700ms\""), "{line}");
    assert!(line.contains("DB_TIMEOUT=\"1s\" (default)"), "{line}");
    assert!(line.ends_with("700ms"), "{line}");
    serve("--redis-timeout=699ms", &[]);
}

#[test]
fn secret_and_its_file_contradict_each_other() {
    let file = file("both", CANARY);
    for variable in ["DB_PASSWORD", "DATABASE_URL", "REDIS_PASSWORD", "REDIS_URL"] {
        let file_variable = format!("{variable}_FILE");
        let line = error("", &[(variable, CANARY), (&file_variable, file.path())]);
        assert!(
            line.starts_with(variable) && line.contains(&file_variable),
            "{line}"
        );
    }
}

#[test]
fn secret_file_loses_the_newline_at_its_end() {
    for end in ["", "\n", "\r\n"] {
        let file = file("newline", format!("c4nary {end}"));
        let config = serve("", &[("DB_PASSWORD_FILE", file.path())]);
        let password = config.postgres.password.expect("a password");
        assert_eq!(password.expose(), "c4nary ", "{end:?}");
    }
}

#[test]
fn secret_file_may_be_named_by_flag() {
    let file = file("flag", "redis://:c4nary@cache/2\r\n");
    let redis = serve(&format!("--redis-url-file={}", file.path()), &[]).redis;
    assert_eq!((redis.host.as_str(), redis.database), ("cache", 2));
}

#[test]
fn unreadable_secret_file_is_an_error_with_path_user_and_cause() {
    let line = error("", &[("DB_PASSWORD_FILE", "/nonexistent/password")]);
    let uid = rustix::process::geteuid().as_raw();
    assert!(
        line.starts_with("DB_PASSWORD_FILE=\"/nonexistent/password\""),
        "{line}"
    );
    assert!(
        line.contains(&format!("by uid {uid}: No such file")),
        "{line}"
    );
}

#[test]
fn secret_in_a_file_is_checked_and_never_shown() {
    let file = file("checked", "mysql://c4nary@db");
    let line = error("", &[("DATABASE_URL_FILE", file.path())]);
    assert!(
        line.starts_with("DATABASE_URL from DATABASE_URL_FILE"),
        "{line}"
    );
}

#[test]
fn database_url_contradicts_each_of_its_parts() {
    let url = ("DATABASE_URL", "postgres://ana:c4nary@db/visitas");
    for (variable, value) in [
        ("DB_HOST", "db"),
        ("DB_PORT", "5432"),
        ("DB_USER", "ana"),
        ("DB_PASSWORD", CANARY),
        ("DB_PASSWORD_FILE", "/nonexistent"),
        ("DB_NAME", "visitas"),
        ("DB_SSLMODE", "prefer"),
    ] {
        let line = error("migrate", &[url, (variable, value)]);
        assert!(line.starts_with(variable) && line.contains(url.0), "{line}");
    }
}

#[test]
fn redis_url_contradicts_each_of_its_parts() {
    let url = ("REDIS_URL", "redis://:c4nary@cache");
    for (variable, value) in [
        ("REDIS_HOST", "cache"),
        ("REDIS_PORT", "6379"),
        ("REDIS_PASSWORD", CANARY),
        ("REDIS_PASSWORD_FILE", "/nonexistent"),
    ] {
        let line = error("reconcile", &[url, (variable, value)]);
        assert!(line.starts_with(variable) && line.contains(url.0), "{line}");
    }
}

#[test]
fn database_url_is_taken_apart_and_decoded() {
    let url = "postgresql://an%40:c4%3Anary%2F@[::1]:6543/vis%20itas?sslmode=require";
    let postgres = serve("", &[("DATABASE_URL", url)]).postgres;
    assert_eq!((postgres.host.as_str(), postgres.port), ("::1", 6543));
    assert_eq!(
        (postgres.user.as_str(), postgres.database.as_str()),
        ("an@", "vis itas")
    );
    assert_eq!(postgres.password.expect("a password").expose(), "c4:nary/");
    assert_eq!(postgres.ssl_mode, SslMode::Require);
}

#[test]
fn what_a_url_leaves_out_has_its_default() {
    let environment = [
        ("DATABASE_URL", "postgres://db"),
        ("REDIS_URL", "redis://cache"),
    ];
    let config = serve("", &environment);
    assert_eq!(
        (config.postgres.host.as_str(), config.postgres.port),
        ("db", 5432)
    );
    assert_eq!(config.postgres.user, "usuario");
    assert_eq!(config.postgres.database, "desafio3db");
    assert_eq!(
        (config.redis.host.as_str(), config.redis.port),
        ("cache", 6379)
    );
    assert_eq!((config.redis.database, config.redis.tls), (0, false));
}

#[test]
fn socket_directory_may_be_the_database_host() {
    assert_eq!(serve("--db-host=/run/pg", &[]).postgres.host, "/run/pg");
    let url = [("DATABASE_URL", "postgres://ana@%2Frun%2Fpg/visitas")];
    assert_eq!(serve("", &url).postgres.host, "/run/pg");
}

#[test]
fn redis_url_is_taken_apart_and_decoded() {
    let redis = serve("", &[("REDIS_URL", "rediss://ana:c4%40nary@cache:6380/3")]).redis;
    assert_eq!((redis.host.as_str(), redis.port), ("cache", 6380));
    assert_eq!((redis.tls, redis.database), (true, 3));
    assert_eq!(redis.username.as_deref(), Some("ana"));
    assert_eq!(redis.password.expect("a password").expose(), "c4@nary");
}

#[test]
fn bad_store_url_is_hidden_whatever_is_wrong_with_it() {
    for url in [
        "c4nary",
        "postgres:c4nary",
        "postgres://ana:c4nary/x@db/visitas",
        "postgres://ana:1?c4nary=@db/visitas",
        "postgres://ana:c4nary#@db/visitas",
        "postgres://ana:c4nary%@db/visitas",
        "postgres://ana:c4nary@db:0/visitas",
        "postgres://ana:12/c4nary@db",
        "postgres://ana:/c4nary@db",
        "postgres://ana:x@c4nary!/visitas",
        "postgres://ana:x@db/c4nary/c4nary",
        "postgres://ana:x@db/visitas?sslmode=c4nary",
        "postgres://ana:x@db/visitas?sslmode=require&sslmode=c4nary",
        "postgres://ana:x@db/visitas?sslmode=verify-full&sslrootcert=/c4nary",
        "postgres:///c4nary",
        "postgres://ana:c4nary @db/visitas",
    ] {
        let line = error("", &[("DATABASE_URL", url)]);
        assert!(line.starts_with("DATABASE_URL"), "{line}");
    }
    for url in [
        "redis://c4nary@cache",
        "redis://:c4nary@cache/-1",
        "redis://:x@cache?c4nary",
    ] {
        let line = error("", &[("REDIS_URL", url)]);
        assert!(line.starts_with("REDIS_URL"), "{line}");
    }
}

#[test]
fn unsupported_parameter_of_a_database_url_is_named() {
    let url = "postgres://ana:c4nary@db/visitas?channel_binding=require";
    assert!(error("", &[("DATABASE_URL", url)]).contains("channel_binding"));
}

#[test]
fn password_of_a_url_in_the_wrong_variable_is_hidden() {
    let line = error("", &[("DB_HOST", "postgres://ana:c4nary@db")]);
    assert!(line.starts_with("DB_HOST=\"postgres://****@db\""), "{line}");
    error("postgres://ana:c4nary@db", &[]);
    error("", &[("DB_HOST", "ana:c4nary@db/?next=http://x")]);
    error("", &[("DB_HOST", "ana:c4nary@db/?next=http://x@y")]);
    error(
        "",
        &[(
            "OTEL_EXPORTER_OTLP_ENDPOINT",
            "http://ana:c4nary@jaeger:4318",
        )],
    );
}

#[test]
fn secrets_are_masked_wherever_settings_are_shown() {
    let urls = [
        ("DATABASE_URL", "postgres://ana:c4nary@db/visitas"),
        ("REDIS_URL", "rediss://ana:c4nary@cache:6380/1"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://jaeger:4318"),
        (
            "OTEL_EXPORTER_OTLP_HEADERS",
            "authorization=Bearer%20c4nary",
        ),
    ];
    assert!(!format!("{:?}", serve("", &urls)).contains(CANARY));
    let listing = printed("config", &urls);
    assert!(!listing.contains(CANARY), "{listing}");
    assert_lines(
        &listing,
        &[
            "DATABASE_URL=postgres://ana:****@db/visitas # environment",
            "REDIS_URL=rediss://ana:****@cache:6380/1 # environment",
            "DB_HOST=db # DATABASE_URL",
            "DB_PASSWORD=**** # DATABASE_URL",
            "REDIS_PASSWORD=**** # REDIS_URL",
            "OTEL_EXPORTER_OTLP_TRACES_HEADERS=**** # environment",
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=http://jaeger:4318/v1/traces # environment",
        ],
    );
}

#[test]
fn driver_variables_that_would_be_obeyed_are_refused() {
    for (variable, hint) in [
        ("PGOPTIONS", "not supported"),
        ("PGSSLROOTCERT", "DB_SSLROOTCERT"),
        ("PGSSLCERT", "not supported"),
        ("PGSSLKEY", "not supported"),
    ] {
        let line = error("migrate", &[(variable, CANARY)]);
        assert!(line.starts_with(variable) && line.contains(hint), "{line}");
    }
    let ignored = serve(
        "",
        &[("PGHOST", "x"), ("PGPORT", "x"), ("PGPASSWORD", CANARY)],
    );
    assert_eq!(ignored.postgres.host, "localhost");
    assert_eq!(ignored.postgres.password, None);
}

#[test]
fn root_certificates_are_read_and_need_a_mode_that_verifies() {
    let file = certificate("modes");
    for mode in ["verify-ca", "verify-full"] {
        let environment = [("DB_SSLROOTCERT", file.path()), ("DB_SSLMODE", mode)];
        let postgres = serve("", &environment).postgres;
        assert_eq!(postgres.ssl_root_cert.as_ref(), Some(&file.0));
    }
    for mode in ["disable", "allow", "prefer", "require"] {
        let line = error("", &[("DB_SSLROOTCERT", file.path()), ("DB_SSLMODE", mode)]);
        assert!(
            line.contains("DB_SSLROOTCERT") && line.contains("DB_SSLMODE"),
            "{line}"
        );
    }
}

#[test]
fn root_certificates_come_from_the_url_or_beside_it() {
    let file = certificate("url");
    let url = format!(
        "postgres://ana@db?sslmode=verify-full&sslrootcert={}",
        file.path()
    );
    let postgres = serve("", &[("DATABASE_URL", &url)]).postgres;
    assert_eq!(postgres.ssl_root_cert.as_ref(), Some(&file.0));
    error(
        "",
        &[("DATABASE_URL", &url), ("DB_SSLROOTCERT", file.path())],
    );
    let url = ("DATABASE_URL", "postgres://ana@db?sslmode=verify-full");
    let postgres = serve("", &[url, ("DB_SSLROOTCERT", file.path())]).postgres;
    assert_eq!(postgres.ssl_root_cert.as_ref(), Some(&file.0));
}

#[test]
fn redis_certificates_need_tls() {
    let file = certificate("redis");
    let ca = ("REDIS_TLS_CA", file.path());
    assert!(error("", &[ca]).contains("rediss://"));
    assert!(error("", &[ca, ("REDIS_URL", "redis://cache")]).contains("rediss://"));
    let redis = serve("", &[ca, ("REDIS_URL", "rediss://cache")]).redis;
    assert!(redis.tls_ca.is_some());
}

#[test]
fn systems_roots_are_handed_to_those_who_do_not_find_them() {
    let file = certificate("system");
    let handed = ("VISITAS_SYSTEM_CERT_FILE", file.path());
    let hidden = [
        ("REDIS_URL", "rediss://cache"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "https://collector"),
        ("SSL_CERT_FILE", "/dev/null"),
    ];
    let config = serve("", &[&hidden[..], &[handed]].concat());
    let traces = config.telemetry.traces;
    let exported = traces
        .and_then(|traces| traces.exporter)
        .and_then(|exporter| exporter.roots)
        .map(|roots| roots.pem);
    let cached = config.redis.tls_ca.map(|roots| roots.pem);
    assert_eq!(exported, cached);
    let written = String::from_utf8(cached.expect("certificates")).expect("text");
    let expected = fs::read_to_string(&file.0).expect("the file");
    let unwrapped = |text: &str| text.replace('\n', "");
    assert_eq!(unwrapped(&written), unwrapped(&expected));

    // Nobody's, where there are none; and where libraries find them, they do.
    let none = serve("", &hidden).redis.tls_ca.expect("no certificates");
    assert_eq!(none.pem, b"");
    for visible in [("SSL_CERT_FILE", file.path()), ("SSL_CERT_DIR", "/")] {
        let environment = [&hidden[..2], &[handed, visible]].concat();
        assert!(serve("", &environment).redis.tls_ca.is_none());
    }
    let named = [hidden[0], hidden[2], ("SSL_CERT_DIR", "/")];
    assert!(serve("", &named).redis.tls_ca.is_none());
}
