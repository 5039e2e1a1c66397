//! The URLs in the tables of `docs/connecting.md`, and their passwords.

use super::*;

const DOCUMENT: &str = include_str!("../../../docs/connecting.md");

/// The rows of the table of URLs beneath a heading: the URL, and what becomes of it.
fn rows(heading: &str) -> Vec<(&'static str, &'static str)> {
    let (_, section) = DOCUMENT.split_once(heading).expect("the heading");
    let (_, table) = section
        .split_once("| from | URL | |\n| --- | --- | --- |\n")
        .expect("a table");
    let rows = table.lines().take_while(|line| line.starts_with('|'));
    rows.map(|row| {
        let mut cells = row.trim_matches('|').split(" | ").map(str::trim).skip(1);
        let url = cells.next().expect("a URL").trim_matches('`');
        (url, cells.next().expect("what becomes of it"))
    })
    .collect()
}

/// The texts between backticks.
fn quoted(cell: &'static str) -> Vec<&'static str> {
    cell.split('`').skip(1).step_by(2).collect()
}

fn assert_as_documented(flag: &str, heading: &str, at_least: usize) {
    let rows = rows(heading);
    assert!(rows.len() >= at_least, "{heading}: {}", rows.len());
    for (url, expected) in rows {
        let run = run(&[flag, path(&file(url))]);
        let shown = match &run {
            Ok(Command::Serve(config)) => format!("{config:?}{}", config.listing),
            other => format!("{other:?}"),
        };
        assert!(!shown.contains("s3cret"), "{url}: {shown}");
        match run {
            Ok(command) => {
                let unenforced = command.unenforced();
                let named: Vec<_> = unenforced.iter().map(|noted| &*noted.parameter).collect();
                assert!(expected.starts_with("accepted"), "{url}: {expected}");
                assert_eq!(named, quoted(expected), "{url}");
            }
            Err(error) => {
                assert!(expected.starts_with("refused: "), "{url}: {error}");
                let why = quoted(expected)[0];
                assert!(error.contains(why), "{url}: {why} in {error}");
            }
        }
    }
}

#[test]
fn urls_of_databases_are_read_as_documented() {
    assert_as_documented("--database-url-file", "### URLs", 60);
}

#[test]
fn urls_of_caches_are_read_as_documented() {
    assert_as_documented("--redis-url-file", "## Redis and Valkey", 35);
}

#[test]
fn parts_of_a_databases_url_are_those_of_libpq() {
    let read = |url: &str| {
        let config = by_database_url(url).postgres;
        let password = config
            .db_password
            .map(|password| password.expose().to_owned());
        (
            config.db_host,
            config.db_port,
            config.db_user,
            password,
            config.db_name,
        )
    };
    let expected = |host: &str, port, user: &str, password: Option<&str>, name: &str| {
        let password = password.map(str::to_owned);
        (
            host.to_owned(),
            port,
            user.to_owned(),
            password,
            name.to_owned(),
        )
    };
    for (url, parts) in [
        (
            "postgres://ana:a@b@db/visitas",
            expected("db", 5432, "ana", Some("a@b"), "visitas"),
        ),
        (
            " 'postgis://ana:'x\"@db/visitas/'\t",
            expected("db", 5432, "ana", Some("'x\""), "visitas"),
        ),
        (
            "postgres://ana:1?2#3:4@db:6543",
            expected("db", 6543, "ana", Some("1?2#3:4"), "desafio3db"),
        ),
        (
            "postgres://ana:🔐é@db?dbname=other&user=eva&port=1",
            expected("db", 1, "eva", Some("🔐é"), "other"),
        ),
        (
            "postgres://ana@server:pw@db/visitas?password=a%2Bb+c",
            expected("db", 5432, "ana@server", Some("a+b+c"), "visitas"),
        ),
        (
            "postgresql://ana:@[::1]:/?host=&dbname=",
            expected("::1", 5432, "ana", None, "desafio3db"),
        ),
        (
            "jdbc:postgresql+psycopg://%2Frun%2Fpg/a%2Fb",
            expected("/run/pg", 5432, "usuario", None, "a/b"),
        ),
        (
            "postgres://db/visitas?username=ana&pass=pw",
            expected("db", 5432, "ana", Some("pw"), "visitas"),
        ),
        (
            "Postgres://other/x?host=/cloudsql/a:b:c",
            expected("/cloudsql/a:b:c", 5432, "usuario", None, "x"),
        ),
    ] {
        assert_eq!(read(url), parts, "{url}");
    }
}

#[test]
fn tls_mode_is_the_one_that_the_url_asks_for() {
    for (query, mode) in [
        ("ssl=true", "Require"),
        ("ssl=1", "Require"),
        ("ssl=false", "Prefer"),
        ("ssl=verify-full", "VerifyFull"),
        ("ssl=true&sslmode=verify-ca", "VerifyCa"),
        ("sslmode=no-verify", "Require"),
        ("ssl-mode=allow", "Allow"),
        ("sslmode=verify_full", "VerifyFull"),
        ("ssl=verify_ca", "VerifyCa"),
        ("sslrootcert=system", "VerifyFull"),
        ("", "Prefer"),
    ] {
        let config = by_database_url(&format!("postgres://db/visitas?{query}"));
        let postgres = config.postgres;
        assert_eq!(format!("{:?}", postgres.db_sslmode), mode, "{query}");
        assert!(postgres.db_sslrootcert.is_none());
    }
    assert_listed(
        &by_database_url("postgres://db?sslrootcert=system").listing,
        "DB_SSLMODE=verify-full # DB_SSLROOTCERT",
    );
    let postgres = serve(&["--db-sslrootcert=system"]).postgres;
    assert_eq!(format!("{:?}", postgres.db_sslmode), "VerifyFull");
    error(&["--db-sslrootcert=system", "--db-sslmode=require"]);
    // As in libpq, an authority is verified in this mode, too.
    let ca = ca();
    let config = serve(&["--db-sslrootcert", path(&ca), "--db-sslmode=require"]);
    assert_eq!(format!("{:?}", config.postgres.db_sslmode), "VerifyCa");
    assert_listed(&config.listing, "DB_SSLMODE=verify-ca # DB_SSLROOTCERT");
}

#[test]
fn parts_of_a_caches_url_are_those_of_its_form() {
    for (url, host, port, number, tls, user, password) in [
        ("redis://cache/3", "cache", 6379, 3, false, None, None),
        (
            "valkeys://:pw@cache:1",
            "cache",
            1,
            0,
            true,
            None,
            Some("pw"),
        ),
        (
            "redis://ana:@cache",
            "cache",
            6379,
            0,
            false,
            Some("ana"),
            Some(""),
        ),
        ("redis://:@cache", "cache", 6379, 0, false, None, None),
        (
            "redis://cache/2?db=2&tls=true",
            "cache",
            6379,
            2,
            true,
            None,
            None,
        ),
        (
            "redis://:a#b?c@cache",
            "cache",
            6379,
            0,
            false,
            None,
            Some("a#b?c"),
        ),
        (
            "unix://ana:pw@/run/a%20b.sock?db=4",
            "/run/a b.sock",
            6379,
            4,
            false,
            Some("ana"),
            Some("pw"),
        ),
        (
            "redis://cache?auth=pw",
            "cache",
            6379,
            0,
            false,
            None,
            Some("pw"),
        ),
        (
            "redis+unix:///run/r.sock?user=ana&pass=p%26w",
            "/run/r.sock",
            6379,
            0,
            false,
            Some("ana"),
            Some("p&w"),
        ),
    ] {
        let file = file(url);
        let redis = serve(&["--redis-url-file", path(&file)]).redis;
        assert_eq!(
            (&*redis.redis_host, redis.redis_port),
            (host, port),
            "{url}"
        );
        assert_eq!((redis.database, redis.tls), (number, tls), "{url}");
        let login = redis.credentials().expect("a URL");
        assert_eq!(login.user.as_deref(), user, "{url}");
        let given = login.password.as_ref().map(Secret::expose);
        assert_eq!(given, password, "{url}");
    }
    for url in [
        "unix://cache/run/r.sock",
        "unix://",
        "unix:///r?tls=true",
        "redis://",
    ] {
        by_redis_url(url).expect_err(url);
    }
    let redis = serve(&["--redis-host=/run/redis.sock", "--redis-username=ana"]).redis;
    assert_eq!(redis.redis_host, "/run/redis.sock");
    assert_eq!(redis.redis_username.as_deref(), Some("ana"));
}

#[test]
fn secrets_of_a_url_are_masked_where_it_is_listed() {
    let config = by_database_url(
        "postgres://ana:c4nary@db:1/x?password=c4nary&sslpassword=c4nary&token=c4nary&sslmode=require",
    );
    assert!(!config.listing.contains(CANARY), "{}", config.listing);
    assert_listed(
        &config.listing,
        "DATABASE_URL=postgres://ana:****@db:1/x?password=****&sslpassword=****&token=****\
         &sslmode=require # DATABASE_URL_FILE",
    );
    for parameters in [
        "options=-c%20app.key%3Dc4nary",
        "application_name=c4nary&sslkeylogfile=c4nary&supa=c4nary&sslfactoryarg=c4nary",
        "oauth_client_id=c4nary&passfile=c4nary&sslidentity=c4nary",
    ] {
        let config = by_database_url(&format!("postgres://db/x?{parameters}"));
        assert!(!config.listing.contains(CANARY), "{}", config.listing);
    }
    for url in [
        "unix://ana:c4nary@/run/r?pass=c4nary&x=c4nary",
        "redis://cache?keyPrefix=c4nary&prefix=c4nary&clientName=c4nary&libname=c4nary",
    ] {
        let config = by_redis_url(url).expect("a URL");
        assert!(!config.listing.contains(CANARY), "{}", config.listing);
    }
}

#[test]
fn password_with_any_character_is_read_or_refused_and_never_shown() {
    for character in [
        "?", "#", "@", "/", ":", "%", "&", "=", "🔐", "\t", " ", "\u{7f}", "é", "+",
    ] {
        for password in [
            format!("{character}c4nary"),
            format!("c4nary{character}"),
            format!("c4{character}c4nary"),
            format!("12{character}c4nary"),
            format!("{character}{character}c4nary{character}"),
        ] {
            for (flag, url) in [
                (
                    "--database-url-file",
                    format!("postgres://ana:{password}@db/visitas"),
                ),
                (
                    "--database-url-file",
                    format!("postgres://ana:{password}@db?sslmode=require"),
                ),
                ("--database-url-file", format!("postgres://{password}@db")),
                ("--redis-url-file", format!("redis://:{password}@cache/1")),
                ("--redis-url-file", format!("redis://{password}@cache")),
                (
                    "--redis-url-file",
                    format!("unix://:{password}@/run/redis.sock"),
                ),
            ] {
                let is_a_user = url.contains(&format!("//{password}@"));
                let shown = match run(&[flag, path(&file(&url))]) {
                    Ok(Command::Serve(config)) => format!("{config:?}{}", config.listing),
                    other => format!("{other:?}"),
                };
                // Without a colon before it the text is a user, which is no secret.
                assert!(is_a_user || !shown.contains(CANARY), "{url}: {shown}");
            }
        }
    }
}

#[test]
fn files_that_are_read_for_a_session_are_named() {
    let (secret, ca) = (file("s3cret\n"), ca());
    let config = serve(&[
        "--db-password-file",
        path(&secret),
        "--db-sslmode=verify-ca",
        "--db-sslrootcert",
        path(&ca),
        "--redis-password-file",
        path(&secret),
    ]);
    let (secret, ca) = (path(&secret), path(&ca));
    assert_eq!(
        config.postgres.files(),
        format!("DB_PASSWORD_FILE ({secret}), DB_SSLROOTCERT ({ca})")
    );
    assert_eq!(
        config.redis.files(),
        format!("REDIS_PASSWORD_FILE ({secret})")
    );
}

#[test]
fn credentials_are_those_that_the_file_holds_now() {
    let rewrite =
        |file: &NamedTempFile, text: &str| std::fs::write(file.path(), text).expect("a file");
    let secret = file("old\n");
    let config = serve(&[
        "--db-password-file",
        path(&secret),
        "--redis-password-file",
        path(&secret),
    ]);
    let passwords = || -> Result<_, String> {
        let of_postgres = config.postgres.credentials()?;
        let of_redis = config.redis.credentials()?;
        assert_eq!((&*of_postgres.user, of_redis.user), ("usuario", None));
        let text = |secret: Option<Secret>| secret.expect("a password").expose().to_owned();
        Ok((text(of_postgres.password), text(of_redis.password)))
    };
    assert_eq!(passwords(), Ok(("old".to_owned(), "old".to_owned())));
    rewrite(&secret, "new\r\n");
    assert_eq!(passwords(), Ok(("new".to_owned(), "new".to_owned())));
    rewrite(&secret, "\u{feff}marked\n");
    assert_eq!(passwords(), Ok(("marked".to_owned(), "marked".to_owned())));
    for bad in ["", "c4nary\nmore", "\n", "\u{feff}"] {
        rewrite(&secret, bad);
        let why = passwords().expect_err(bad);
        assert!(
            why.starts_with("DB_PASSWORD_FILE (") && !why.contains(CANARY),
            "{why}"
        );
    }
    secret.close().expect("the file is gone");
    assert!(
        passwords()
            .expect_err("no file")
            .contains("cannot be read by uid")
    );

    let (database, cache) = (
        file("postgres://ana:old@db/x"),
        file("redis://ana:old@cache/1"),
    );
    let config = serve(&[
        "--database-url-file",
        path(&database),
        "--redis-url-file",
        path(&cache),
    ]);
    rewrite(&database, "postgres://eva:new@db/x\n");
    rewrite(&cache, "redis://:new@cache/1\n");
    let (of_postgres, of_redis) = (config.postgres.credentials(), config.redis.credentials());
    let (of_postgres, of_redis) = (of_postgres.expect("readable"), of_redis.expect("readable"));
    assert_eq!((&*of_postgres.user, of_redis.user), ("eva", None));
    let new = Some(Secret::from("new".to_owned()));
    assert_eq!(
        (of_postgres.password, of_redis.password),
        (new.clone(), new)
    );
    rewrite(&database, "postgres://eva:c4nary@other/x");
    rewrite(&cache, "redis://:c4nary@cache/2");
    for why in [
        config.postgres.credentials().map(drop),
        config.redis.credentials().map(drop),
    ] {
        let why = why.expect_err("another database");
        assert!(why.contains("restart") && !why.contains(CANARY), "{why}");
    }
}

#[test]
fn secret_of_a_pipe_is_read_once() {
    let (reader, mut writer) = std::io::pipe().expect("a pipe");
    writer.write_all(b"c4nary\n").expect("room in the pipe");
    drop(writer);
    let path = format!("/dev/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&reader));
    let config = serve(&["--redis-password-file", &path]);
    for _ in 0..2 {
        let login = config.redis.credentials().expect("the secret of the start");
        assert_eq!(login.password.expect("a password").expose(), CANARY);
    }
}

#[test]
fn byte_order_mark_before_certificates_is_ignored() {
    let (certificate, key) = certificate();
    let marked = |file: &NamedTempFile| {
        let text = std::fs::read_to_string(file.path()).expect("a file");
        self::file(format!("\u{feff}{text}"))
    };
    let (certificate, key) = (marked(&certificate), marked(&key));
    serve(&[
        "--db-sslmode=verify-ca",
        "--db-sslrootcert",
        path(&certificate),
        "--db-sslcert",
        path(&certificate),
        "--db-sslkey",
        path(&key),
    ]);
}

#[test]
fn client_certificate_needs_its_own_key_and_is_read_again() {
    let (one, other) = (certificate(), certificate());
    let pair = |certificate: &NamedTempFile, key: &NamedTempFile| {
        run(&["--db-sslcert", path(certificate), "--db-sslkey", path(key)])
    };
    let Ok(Command::Serve(config)) = pair(&one.0, &one.1) else {
        panic!("a certificate and its key");
    };
    let why = pair(&one.0, &other.1).expect_err("another key");
    assert!(
        why.contains("DB_SSLCERT and DB_SSLKEY do not belong together"),
        "{why}"
    );
    let why = error(&["--db-sslcert", path(&one.0)]);
    assert!(
        why.contains("DB_SSLKEY") && why.contains("expected both or neither"),
        "{why}"
    );
    let why = error(&[
        "--redis-tls-cert",
        path(&one.0),
        "--redis-tls-key",
        path(&one.1),
    ]);
    assert!(why.contains("rediss://"), "{why}");
    error(&[
        "--db-sslcert",
        path(&one.0),
        "--db-sslkey",
        path(&one.1),
        "--db-sslmode=disable",
    ]);
    let shown = format!("{config:?}");
    assert!(
        !shown.contains("PRIVATE KEY") && shown.contains(path(&one.1)),
        "{shown}"
    );

    std::fs::copy(other.0.path(), one.0.path()).expect("a copy");
    let why = config
        .postgres
        .identity()
        .expect_err("the key is another's");
    assert!(
        why.contains(path(&one.0)) && why.contains(path(&one.1)),
        "{why}"
    );
    std::fs::copy(other.1.path(), one.1.path()).expect("a copy");
    let identity = config
        .postgres
        .identity()
        .expect("readable")
        .expect("a certificate");
    assert_eq!(
        identity.key.expose(),
        std::fs::read(other.1.path()).expect("a key")
    );

    let url = format!(
        "postgres://db?sslmode=require&sslcert={}&sslkey={}",
        path(&other.0),
        path(&other.1)
    );
    let config = by_database_url(&url);
    assert!(config.postgres.identity().expect("readable").is_some());
    assert_listed(
        &config.listing,
        &format!("DB_SSLCERT={} # DATABASE_URL", path(&other.0)),
    );
    let url = file(url);
    let why = error(&[
        "--database-url-file",
        path(&url),
        "--db-sslkey",
        path(&other.1),
    ]);
    assert!(why.contains("contradicts DB_SSLKEY"), "{why}");
}

#[test]
fn port_counts_where_no_address_is_set() {
    let listed = |arguments: &[&str]| {
        let config = serve(arguments);
        (config.http.listen.bind_addr.to_string(), config.listing)
    };
    assert_eq!(listed(&[]).0, "[::]:5000");
    let (address, listing) = listed(&["--port=8080"]);
    assert_eq!(address, "[::]:8080");
    assert_listed(&listing, "BIND_ADDR=[::]:8080 # PORT");
    let both = ["--port=8080", "--bind-addr=127.0.0.1:0"];
    assert_eq!(listed(&both).0, "127.0.0.1:0");
    assert!(error(&["--metrics-addr=[::]:8080", "--port=8080"]).contains("METRICS_ADDR"));
    let Ok(Command::Healthcheck(config)) = run(&["healthcheck", "--port=8080"]) else {
        panic!("a healthcheck");
    };
    assert_eq!(
        config.url().expect("a URL").as_str(),
        "http://127.0.0.1:8080/health"
    );
}

/// A self-signed certificate and its key.
fn certificate() -> (NamedTempFile, NamedTempFile) {
    let made = rcgen::generate_simple_self_signed(["ana".to_owned()]).expect("a certificate");
    (
        file(made.cert.pem()),
        file(made.signing_key.serialize_pem()),
    )
}
