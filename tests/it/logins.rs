//! Logging in to Postgres. psql is the reference: where it opens a session, the program does, and
//! where the program does not, its error says what was tried and what to check.

use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use devstack::{PostgresOptions, RedisOptions};
use http::StatusCode;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};

use crate::support::{Ended, HeldCount, SOON, Service, World, eventually, program, settings};

const ROLE: &str = "visitante";
const PASSWORD: &str = "s3nha";

#[tokio::test(flavor = "multi_thread")]
async fn modes_open_and_encrypt_the_sessions_that_psql_does() {
    let gate = Gate::new(&[]);
    let scram = |how: &str| format!("{how} all all all scram-sha-256\n");
    let rules = [
        ("either way", scram("host"), PASSWORD),
        ("only with TLS", scram("hostssl"), PASSWORD),
        ("only without TLS", scram("hostnossl"), PASSWORD),
        (
            "TLS is rejected",
            format!("hostssl all all all reject\n{}", scram("hostnossl")),
            PASSWORD,
        ),
        (
            "no TLS is rejected",
            format!("hostnossl all all all reject\n{}", scram("hostssl")),
            PASSWORD,
        ),
        ("neither", String::new(), PASSWORD),
        ("wrong password", scram("host"), "wrong"),
        (
            "wrong password, trusted without TLS",
            format!("{}hostnossl all all all trust\n", scram("hostssl")),
            "wrong",
        ),
        (
            "wrong password, trusted with TLS",
            format!("{}hostssl all all all trust\n", scram("hostnossl")),
            "wrong",
        ),
        (
            // The server has no ssl_ca_file, and refuses with F0000.
            "certificates that the server cannot check",
            format!(
                "hostssl all all all scram-sha-256 clientcert=verify-ca\n{}",
                scram("hostnossl")
            ),
            PASSWORD,
        ),
    ];
    let servers = [
        ("TLS", "reset all"),
        ("no TLS", "set ssl = off"),
        // Neither libpq nor the driver accepts it.
        ("TLS 1.1", "set ssl_max_protocol_version = 'TLSv1.1'"),
    ];
    let mut opened = 0;
    for (server, setting) in servers {
        if server == "TLS 1.1" {
            gate.alter("set ssl_min_protocol_version = 'TLSv1'").await;
        }
        gate.alter(setting).await;
        for (rule, lines, password) in &rules {
            gate.admit(lines).await;
            for mode in ["disable", "allow", "prefer", "require"] {
                let psql = gate.psql(&format!("password={password} sslmode={mode}"), &[]);
                let expected = psql.as_deref().ok().map(|text| text == "t");
                let given = [("DB_SSLMODE", mode), ("DB_PASSWORD", password)];
                let ours = gate.opens(&given).await;
                assert_eq!(
                    ours, expected,
                    "{mode}, {server}, {rule}: psql says {psql:?}"
                );
                opened += u32::from(ours.is_some());
            }
        }
    }
    // Half of the combinations and more open a session at all.
    assert!(opened > 40, "{opened}");
}

#[tokio::test(flavor = "multi_thread")]
async fn password_that_the_driver_cannot_send_is_named_by_its_setting_alone() {
    let gate = Gate::new(&[]);
    let folder = TempDir::new().unwrap();
    // An emoji, TAB, DEL, and letters of both directions; with the characters that must not show.
    for (password, hidden) in [
        ("senha\u{1f510}x", "\u{1f510}"),
        ("tab\there", "\\t"),
        ("del\u{7f}ete", "7f"),
        ("abc\u{5d0}def", "\u{5d0}"),
    ] {
        gate.admit("host all all all scram-sha-256\n").await;
        gate.set_password(password);
        gate.psql(&format!("password='{password}'"), &[])
            .expect("psql accepts the password");
        let file = folder.path().join("password");
        fs::write(&file, password).unwrap();
        let url = gate.url(&percent_encoded(password));
        for (setting, value) in [
            ("DB_PASSWORD", password),
            ("DB_PASSWORD_FILE", file.to_str().unwrap()),
            ("DATABASE_URL", &*url),
        ] {
            let error = gate.refusal(&[(setting, value)]).await;
            assert!(
                error.contains(&format!("the password of {setting} has characters")),
                "{error}"
            );
            assert!(error.contains("SCRAM"), "{error}");
            assert!(
                !error.contains(hidden) && !error.contains("Prohibited"),
                "{error}"
            );
        }
        // Other methods send the password as it is.
        gate.admit("host all all all password\n").await;
        assert!(gate.opens(&[("DB_PASSWORD", password)]).await.is_some());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn role_whose_name_has_a_comma_is_named_as_the_cause() {
    let gate = Gate::new(&[]);
    let name = "ana,bia";
    gate.world
        .sql(&format!(
            "create role \"{name}\" login superuser password '{PASSWORD}'"
        ))
        .await;
    gate.admit("host all all all scram-sha-256\n").await;
    gate.psql(&format!("user='{name}'"), &[])
        .expect("psql accepts the role");
    let error = gate.refusal(&[("DB_USER", name)]).await;
    assert!(error.contains("name has a comma"), "{error}");
    assert!(!error.contains("malformed"), "{error}");
    gate.admit("host all all all password\n").await;
    assert!(gate.opens(&[("DB_USER", name)]).await.is_some());
    // An equals sign is no difficulty.
    gate.world
        .sql(&format!(
            "create role \"a=b\" login superuser password '{PASSWORD}'"
        ))
        .await;
    gate.admit("host all all all scram-sha-256\n").await;
    assert!(gate.opens(&[("DB_USER", "a=b")]).await.is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn error_says_what_was_tried_and_what_to_check() {
    let gate = Gate::new(&[]);
    let (_silent, silence) = silent_at(Ipv4Addr::LOCALHOST, 0).await;
    let silence = silence.to_string();
    let http = http_server().await.to_string();
    let scram = "host all all all scram-sha-256\n";
    for (lines, given, expected) in [
        (
            scram,
            &[("DB_PASSWORD", "wrong")][..],
            &[
                "28P01: password authentication failed",
                "check DB_PASSWORD and the role",
            ][..],
        ),
        (
            scram,
            &[("DB_NAME", "absent")],
            &[
                "3D000: ",
                "\"absent\" does not exist",
                "create the database, or check DB_NAME",
            ],
        ),
        (
            "",
            &[],
            &["28000: with TLS: no pg_hba.conf entry", "and pg_hba.conf"],
        ),
        (
            scram,
            &[("DB_PORT", "1")],
            &[
                "connection failed: Connection refused",
                "check that Postgres is running",
            ],
        ),
        (
            scram,
            &[("DB_HOST", "absent.invalid")],
            &[
                "connection failed: failed to lookup",
                "at absent.invalid:",
                "check DB_HOST, and the DNS",
            ],
        ),
        (
            scram,
            &[("DB_HOST", "/nonexistent")],
            &[
                "No such file",
                "at /nonexistent/.s.PGSQL.",
                "check that Postgres is running",
            ],
        ),
        (
            scram,
            &[("DB_PORT", &silence), ("DB_TIMEOUT", "500ms")],
            &["no session within 475ms: no answer", "check the network"],
        ),
        (
            scram,
            &[("DB_PORT", &http)],
            &[
                "does not answer as Postgres does",
                "check DB_HOST and DB_PORT",
            ],
        ),
        (
            "host all all all scram-sha-256\n",
            &[("DB_SSLMODE", "verify-full"), ("DB_HOST", "127.0.0.1")],
            &[
                "signed by no trusted authority",
                "UnknownIssuer",
                "set DB_SSLROOTCERT",
                "sslmode verify-full",
            ],
        ),
        (
            "host all all all ldap ldapserver=127.0.0.1 ldapport=1 ldapprefix=a\n",
            &[],
            &["28000: ", "and pg_hba.conf"],
        ),
    ] {
        gate.admit(lines).await;
        gate.check_refusal(given, expected).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_and_breaks_before_the_session_is_open_are_explained() {
    let gate = Gate::new(&[]);
    gate.admit("host all all all scram-sha-256\n").await;
    let closing = Impostor::start(&[b""]).await;
    let closing_later = Impostor::start(&[b"N", b""]).await;
    let starting = Impostor::start(&[b"N", STARTING_UP]).await;
    let broken_tls = Impostor::start(&[b"S", b"what is this?"]).await;
    for create in [
        "role sem_login nologin password 's3nha'",
        "role cheio login connection limit 0 password 's3nha'",
        "database fechado allow_connections false",
    ] {
        gate.sql(&format!("create {create}"));
    }
    for (given, expected) in [
        (
            &[("DB_USER", "sem_login")][..],
            &[
                "28000: role \"sem_login\" is not permitted to log in; tried as sem_login at",
                "check that the role exists and has LOGIN",
            ][..],
        ),
        (
            &[("DB_USER", "cheio")],
            &[
                "53300: too many connections for role \"cheio\"; tried as cheio at",
                "the connection limit of the role",
            ],
        ),
        (
            &[("DB_NAME", "fechado")],
            &["55000: database \"fechado\" is not currently accepting connections; tried as"],
        ),
        (
            &[("DB_PORT", &closing)],
            &[
                "connection failed: the server closed the connection before the session was open",
                "check the server's log",
            ],
        ),
        (
            &[("DB_PORT", &closing_later)],
            &[
                "the server closed the connection before the session was open \
                 (unexpected end of file); tried as",
            ],
        ),
        (
            &[("DB_PORT", &starting)],
            &["57P03: the database system is starting up; tried as"],
        ),
        (
            &[("DB_PORT", &broken_tls), ("DB_SSLMODE", "require")],
            &[
                "the TLS handshake failed",
                "check that the server offers TLS",
            ],
        ),
    ] {
        gate.check_refusal(given, expected).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_of_both_ways_are_logged_once_each() {
    let gate = Gate::new(&[]);
    gate.admit("hostssl all all all scram-sha-256\n").await;
    let error = gate.refusal(&[("DB_PASSWORD", "wrong")]).await;
    assert!(
        error.contains("28P01: with TLS: password authentication failed"),
        "{error}"
    );
    assert!(
        error.contains("; without TLS: no pg_hba.conf entry"),
        "{error}"
    );
    gate.admit("hostnossl all all all scram-sha-256\n").await;
    let error = gate.refusal(&[("DB_PASSWORD", "wrong")]).await;
    assert!(
        error.contains("28P01: without TLS: password authentication failed"),
        "{error}"
    );
    gate.admit("host all all all scram-sha-256\n").await;
    let error = gate.refusal(&[("DB_PASSWORD", "wrong")]).await;
    assert_eq!(error.matches("authentication failed").count(), 1, "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn rotated_password_is_used_by_the_next_session() {
    let gate = Gate::new(&[]);
    gate.admit("host all all all scram-sha-256\n").await;
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("secret");
    let path = file.to_str().unwrap();
    for setting in ["DB_PASSWORD_FILE", "DATABASE_URL_FILE"] {
        let secret = |password: &str| match setting {
            "DB_PASSWORD_FILE" => password.to_owned(),
            _ => gate.url(password),
        };
        gate.set_password(PASSWORD);
        fs::write(&file, secret(PASSWORD)).unwrap();
        let service = Service::start(&gate.settings(&[(setting, path)])).await;
        service.until_ready().await;
        let before = service.visit().await.0;

        // A session that is open stays; a new one needs the new password.
        gate.set_password("rotated");
        assert_eq!(service.visit().await.0, before + 1);
        fs::remove_file(&file).unwrap();
        gate.end_sessions();
        eventually("the log names the file", SOON, async || {
            let printed = service.printed();
            printed.contains(setting) && printed.contains(path)
        })
        .await;
        fs::write(&file, "").unwrap();
        fs::write(&file, secret("rotated")).unwrap();
        service.until_ready().await;
        assert_eq!(service.visit().await.0, before + 2);
        assert!(!service.printed().contains("rotated"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn file_that_was_a_pipe_for_a_while_is_read_again() {
    let gate = Gate::new(&[]);
    gate.admit("host all all all scram-sha-256\n").await;
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("secret");
    let path = file.to_str().unwrap();
    fs::write(&file, PASSWORD).unwrap();
    let service = Service::start(&gate.settings(&[("DB_PASSWORD_FILE", path)])).await;
    service.until_ready().await;
    fs::remove_file(&file).unwrap();
    make_pipe(path);
    gate.end_sessions();
    let why = format!("DB_PASSWORD_FILE ({path}) is not a regular file");
    eventually("the log says so", SOON, async || {
        service.printed().contains(&why)
    })
    .await;
    fs::remove_file(&file).unwrap();
    fs::write(&file, PASSWORD).unwrap();
    service.until_ready().await;
    service.visit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pipe_is_read_once_at_the_start() {
    let gate = Gate::new(&[]);
    gate.admit("host all all all scram-sha-256\n").await;
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("secret");
    make_pipe(file.to_str().unwrap());
    let writer = {
        let file = file.clone();
        std::thread::spawn(move || fs::write(file, PASSWORD))
    };
    let given = [("DB_PASSWORD_FILE", file.to_str().unwrap())];
    let service = Service::start(&gate.settings(&given)).await;
    writer.join().unwrap().unwrap();
    service.until_ready().await;
    gate.end_sessions();
    service.until_ready().await;
    service.visit().await;
}

#[tokio::test]
#[ignore = "takes long: make faults"]
async fn pipe_into_which_nothing_is_written_ends_the_start_and_is_named() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("secret");
    let path = file.to_str().unwrap();
    make_pipe(path);
    for (variable, expected) in [
        ("DB_PASSWORD_FILE", "could not be read within 5s"),
        ("REDIS_URL_FILE", "could not be read within 5s"),
        ("DB_SSLROOTCERT", "is not a regular file"),
    ] {
        let ended = Ended::of(&[], &settings(&[(variable, path)])).await;
        assert_eq!(ended.code, Some(2), "{ended:?}");
        for part in [variable, path, expected] {
            assert!(ended.errors.contains(part), "{part} in {ended:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn url_file_that_changes_more_than_the_login_is_refused_without_a_role() {
    let gate = Gate::new(&[]);
    gate.admit("host all all all scram-sha-256\n").await;
    gate.sql(&format!(
        "create role outra login superuser password '{PASSWORD}'"
    ));
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("url");
    let url = gate.url(PASSWORD);
    fs::write(&file, &url).unwrap();
    let given = [("DATABASE_URL_FILE", file.to_str().unwrap())];
    let service = Service::start(&gate.settings(&given)).await;
    service.until_ready().await;
    let other = url.replace(ROLE, "outra");
    for (content, said) in [
        (other.clone() + "_absent", "restart to use it"),
        (url + "_absent", "restart to use it"),
        ("mysql://outra@127.0.0.1/a".to_owned(), "DATABASE_URL_FILE "),
    ] {
        fs::write(&file, &other).unwrap();
        service.until_ready().await;
        let before = service.log().len();
        fs::write(&file, content).unwrap();
        gate.end_sessions();
        eventually("the log says why", SOON, async || {
            let log = service.log();
            log[before..]
                .iter()
                .any(|line| line["error"].to_string().contains(said))
        })
        .await;
        let log = service.log();
        let log = serde_json::to_string(&log[before..]).unwrap();
        assert!(!log.contains("tried as"), "{log}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn session_that_breaks_is_explained() {
    let gate = Gate::new(&[]);
    gate.admit("host all all all scram-sha-256\n").await;
    for mode in ["require", "disable"] {
        let service = Service::start(&gate.settings(&[("DB_SSLMODE", mode)])).await;
        service.until_ready().await;
        let mut held = HeldCount::of(&gate.world).await;
        let visit = service.begin_visit();
        held.until_waited_for().await;
        // After the crash of one of its processes the server sends a notice and ends all sessions.
        let process = "select pid from pg_stat_activity where backend_type = 'walwriter'";
        let killed = Command::new("kill")
            .args(["-9", &gate.sql(process)])
            .status();
        assert!(killed.unwrap().success());
        let response = visit.await.unwrap();
        assert_eq!(response.status, StatusCode::SERVICE_UNAVAILABLE);
        eventually("the log says why", SOON, async || {
            !service.logged("store is down").is_empty()
        })
        .await;
        service.until_ready().await;
        let printed = service.printed();
        for foreign in [
            "sqlx",
            "rustls",
            "close_notify",
            "https://",
            "error communicating",
            "EOF",
        ] {
            assert!(!printed.contains(foreign), "{printed}");
        }
        let why = service.logged("store is down")[0]["error"].to_string();
        assert!(
            why.contains("the server closed the connection") || why.contains("57P0"),
            "{why}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_made_as_the_documentation_says_are_accepted() {
    let gate = Gate::new(&[]);
    let folder = recipe("usuario", ROLE);
    let file = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    gate.present(folder.path()).await;
    let (root, certificate, key) = (file("root.crt"), file("client.crt"), file("client.key"));
    let trusting = [
        ("DB_HOST", "localhost"),
        ("DB_SSLMODE", "verify-full"),
        ("DB_SSLROOTCERT", &root),
    ];
    let presenting = [
        &trusting[..],
        &[("DB_SSLCERT", &certificate), ("DB_SSLKEY", &key)],
    ]
    .concat();
    let client = format!("host=localhost sslmode=verify-full sslrootcert={root}");
    let with_certificate = format!("{client} sslcert={certificate} sslkey={key}");

    gate.admit("hostssl all all all scram-sha-256\n").await;
    gate.psql(&client, &[]).expect("psql trusts the authority");
    assert_eq!(gate.opens(&trusting).await, Some(true));
    for rule in [
        "cert",
        "scram-sha-256 clientcert=verify-full",
        "scram-sha-256 clientcert=verify-ca",
    ] {
        gate.admit(&format!("hostssl all all all {rule}\n")).await;
        gate.psql(&with_certificate, &[])
            .expect("psql presents its certificate");
        assert_eq!(gate.opens(&presenting).await, Some(true), "{rule}");
        gate.psql(&client, &[])
            .expect_err("the certificate is asked for");
        let error = gate.refusal(&trusting).await;
        assert!(
            error.contains("28000: ") && error.contains("client certificate"),
            "{error}"
        );
    }
    // The mode prefer presents it, too, and a URL can name it.
    gate.admit("hostssl all all all cert\n").await;
    let url = format!(
        "{}?sslmode=require&sslcert={certificate}&sslkey={key}",
        gate.url("")
    );
    assert_eq!(gate.opens(&[("DATABASE_URL", &url)]).await, Some(true));

    // Of an authority that the server does not know.
    let other = recipe("usuario", ROLE);
    let file = |name: &str| other.path().join(name).to_str().unwrap().to_owned();
    let (certificate, key) = (file("client.crt"), file("client.key"));
    for mode in ["require", "prefer"] {
        let stranger = format!("sslmode={mode} sslcert={certificate} sslkey={key}");
        gate.psql(&stranger, &[])
            .expect_err("the server knows no such authority");
        let given = [
            ("DB_SSLMODE", mode),
            ("DB_SSLCERT", &certificate),
            ("DB_SSLKEY", &key),
        ];
        let error = gate.refusal(&given).await;
        assert!(error.contains("refuses the client certificate"), "{error}");
        assert!(error.contains("check DB_SSLCERT"), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn certificate_of_another_role_is_named_as_the_cause() {
    let gate = Gate::new(&[]);
    let folder = recipe("usuario", "outra");
    let file = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    gate.present(folder.path()).await;
    let (certificate, key) = (file("client.crt"), file("client.key"));
    let given = [
        ("DB_SSLMODE", "require"),
        ("DB_SSLCERT", &*certificate),
        ("DB_SSLKEY", &*key),
    ];
    for rule in ["cert", "scram-sha-256 clientcert=verify-full"] {
        gate.admit(&format!("hostssl all all all {rule}\n")).await;
        let said = [
            "authentication failed",
            "the CN of DB_SSLCERT's must be the role",
        ];
        gate.check_refusal(&given, &said).await;
    }
    // Without a certificate its name is no reason.
    gate.admit("hostssl all all all scram-sha-256\n").await;
    let error = gate.refusal(&[("DB_PASSWORD", "wrong")]).await;
    assert!(!error.contains("DB_SSLCERT"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_that_only_psql_accepts_are_told_apart() {
    let gate = Gate::new(&[]);
    gate.admit("host all all all scram-sha-256\n").await;
    let folder = TempDir::new().unwrap();
    let server = gate.world.postgres.folder();
    // The commands of PostgreSQL's documentation, section 19.9.5.
    for (commands, root, expected) in [
        (
            "openssl req -new -x509 -days 365 -nodes -text -out server.crt -keyout server.key \
             -subj /CN=localhost",
            "server.crt",
            "CaUsedAsEndEntity",
        ),
        (
            "openssl req -new -nodes -text -out root.csr -keyout root.key -subj /CN=root
             openssl x509 -req -in root.csr -text -days 3650 -extfile /etc/ssl/openssl.cnf \
             -extensions v3_ca -signkey root.key -out root.crt
             openssl req -new -nodes -text -out server.csr -keyout server.key -subj /CN=localhost
             openssl x509 -req -in server.csr -text -days 365 -CA root.crt -CAkey root.key \
             -CAcreateserial -out server.crt",
            "root.crt",
            "",
        ),
    ] {
        shell(&folder, commands);
        for (from, to) in [("server.crt", "server.pem"), ("server.key", "server.key")] {
            fs::copy(folder.path().join(from), server.join(to)).unwrap();
        }
        gate.reload().await;
        let root = folder.path().join(root);
        let root = root.to_str().unwrap();
        for mode in ["verify-ca", "verify-full"] {
            gate.psql(
                &format!("host=localhost sslmode={mode} sslrootcert={root}"),
                &[],
            )
            .expect("psql accepts the certificate");
            let given = [
                ("DB_HOST", "localhost"),
                ("DB_SSLMODE", mode),
                ("DB_SSLROOTCERT", root),
            ];
            let error = gate.refusal(&given).await;
            assert!(error.contains(expected), "{error}");
            assert!(error.contains("connecting.md"), "{error}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn name_whose_first_address_is_silent_leads_to_the_next() {
    let gate = Gate::new(&[("listen_addresses", "127.0.0.1,127.0.0.9")]);
    gate.admit("host all all all scram-sha-256\n").await;
    let port = gate.world.postgres.port();
    let (_queue, _) = silent_at(Ipv4Addr::new(127, 0, 0, 2), port).await;
    let hosts = tempfile::NamedTempFile::new().unwrap();
    fs::write(hosts.path(), "127.0.0.2 localhost\n127.0.0.9 localhost\n").unwrap();
    let program_here = |command: &Command| in_place_of_hosts(&hosts, command);
    let mut getent = Command::new("getent");
    getent.args(["ahostsv4", "localhost"]);
    let names = program_here(&getent).output();
    let names = names.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    if !names
        .as_ref()
        .is_ok_and(|names| names.contains("127.0.0.9"))
    {
        println!("not run: this account may not mount a file of its own on /etc/hosts: {names:?}");
        return;
    }
    assert!(
        names.unwrap().starts_with("127.0.0.2 "),
        "the silent address comes first"
    );

    let ca = gate.world.postgres.ca().unwrap().to_str().unwrap();
    // psql waits for its connect_timeout; the service has a second for all.
    let psql = program_here(&gate.psql_command("host=localhost connect_timeout=2"));
    let said = run(psql);
    assert!(said.status.success(), "{said:?}");
    for given in [
        &[("DB_SSLMODE", "disable")][..],
        &[("DB_SSLMODE", "prefer")],
        // The name of the certificate is checked.
        &[("DB_SSLMODE", "verify-full"), ("DB_SSLROOTCERT", ca)],
    ] {
        let mut all = gate.settings(&[("DB_HOST", "localhost")]);
        all.extend(settings(given));
        let service = Service::spawn(program_here(&program(&["serve"], &all))).await;
        service.until_ready().await;
        let before = service.visit().await.0;
        assert_eq!(service.visit().await.0, before + 1);
        // A session that ends is followed by another.
        gate.end_sessions();
        eventually("visits are recorded again", SOON, async || {
            service.get("/").await.status == 200
        })
        .await;
        service.stop().await;
    }
    // Both are silent or refuse.
    fs::write(hosts.path(), "127.0.0.2 localhost\n127.0.0.3 localhost\n").unwrap();
    let all = gate.settings(&[("DB_HOST", "localhost")]);
    let ended = run(program_here(&program(&["migrate"], &all)));
    let error = String::from_utf8(ended.stderr).unwrap();
    assert!(
        error.contains(&format!(
            "127.0.0.2:{port}: no answer, 127.0.0.3:{port}: Connection refused"
        )),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn first_visit_after_a_restart_of_postgres_while_idle_is_not_in_doubt() {
    let world = World::of_its_own();
    // A busy machine must not make the visit time out.
    let patient = [("DB_TIMEOUT", "5s"), ("VISIT_TIMEOUT", "6s")];
    let service = world.serve_with(&patient).await;
    service.visit().await;
    for _ in 0..3 {
        world.postgres.stop().unwrap();
        world.postgres.start_again().unwrap();
        // A connection that was used less than 50 ms ago is not looked at, and a restart can be faster.
        tokio::time::sleep(Duration::from_millis(60)).await;
        let first = service.get("/").await;
        // The monitor can have found Postgres down meanwhile, and not up yet.
        let is_certain = first.status == 200 || first.header("retry-after") == "1";
        assert!(is_certain, "{first:?}: {}", service.printed());
        service.until_ready().await;
    }
    assert_eq!(service.counted("in_doubt").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "reads a clock: make faults"]
async fn visit_after_its_idle_session_was_ended_is_recorded() {
    let world = World::new();
    let service = world.serve().await;
    for visits in 1..5 {
        assert_eq!(service.visit().await, (visits, visits));
        // A connection that has been idle is what is looked at.
        tokio::time::sleep(Duration::from_millis(120)).await;
        world
            .sql(
                "select pg_terminate_backend(pid, 1000) from pg_stat_activity \
                 where application_name = 'visitas' and datname = current_database()",
            )
            .await;
    }
    assert!(
        service.logged("store is down").is_empty(),
        "{}",
        service.printed()
    );
}

/// A Postgres with TLS whose `pg_hba.conf` tests write, and a role of theirs.
struct Gate {
    world: World,
    rules: PathBuf,
}

fn make_pipe(path: &str) {
    let made = Command::new("mkfifo").arg(path).status().unwrap();
    assert!(made.success());
}

impl Gate {
    fn new(config: &[(&str, &str)]) -> Self {
        let mut options = PostgresOptions {
            tls: true,
            config: vec![("log_connections".to_owned(), "on".to_owned())],
            ..PostgresOptions::default()
        };
        let config = config
            .iter()
            .map(|&(name, value)| (name.to_owned(), value.to_owned()));
        options.config.extend(config);
        let world = World::with(options, RedisOptions::default());
        let rules = world.postgres.sql("postgres", "show hba_file").unwrap();
        let gate = Self {
            rules: rules.into(),
            world,
        };
        let create = format!("create role {ROLE} login superuser password '{PASSWORD}'");
        gate.sql(&create);
        gate
    }

    /// Lets the test itself in, and others by these rules.
    async fn admit(&self, lines: &str) {
        let own = format!("host all {} all scram-sha-256\n", devstack::USER);
        fs::write(&self.rules, own + lines).unwrap();
        self.reload().await;
        let wrong = "select count(*) from pg_hba_file_rules where error is not null";
        assert_eq!(self.sql(wrong), "0", "{lines}");
    }

    /// Has the server present the certificate in `folder`, and trust the authority there. The files
    /// replace devstack's, whose owner and mode suit the server.
    async fn present(&self, folder: &Path) {
        let server = self.world.postgres.folder();
        for (from, to) in [
            ("server.crt", "server.pem"),
            ("server.key", "server.key"),
            ("root.crt", "ca.pem"),
        ] {
            fs::copy(folder.join(from), server.join(to)).unwrap();
        }
        let authority = server.join("ca.pem");
        self.alter(&format!("set ssl_ca_file = '{}'", authority.display()))
            .await;
    }

    async fn alter(&self, setting: &str) {
        let alter = format!("alter system {setting}");
        self.sql(&alter);
        self.reload().await;
    }

    async fn reload(&self) {
        let loaded = "select pg_conf_load_time()";
        let before = self.sql(loaded);
        self.sql("select pg_reload_conf()");
        eventually("Postgres has read its files again", SOON, async || {
            self.sql(loaded) != before
        })
        .await;
    }

    /// One result of the superuser, by psql: it accepts any TLS that the server has.
    fn sql(&self, statement: &str) -> String {
        let result = self.world.postgres.sql(&self.world.database, statement);
        result.expect("the statement succeeds")
    }

    fn set_password(&self, password: &str) {
        self.sql(&format!("alter role {ROLE} password '{password}'"));
    }

    fn end_sessions(&self) {
        let end = "select pg_terminate_backend(pid, 1000) from pg_stat_activity \
                   where application_name = 'visitas'";
        self.sql(end);
    }

    fn url(&self, password: &str) -> String {
        let (port, database) = (self.world.postgres.port(), &self.world.database);
        format!("postgres://{ROLE}:{password}@127.0.0.1:{port}/{database}")
    }

    /// The settings of the role, and these; a URL or a file takes the place of its parts.
    fn settings(&self, given: &[(&str, &str)]) -> Vec<(String, String)> {
        let is_given = |wanted: &str| given.iter().any(|(name, _)| name.starts_with(wanted));
        let mut all = if is_given("DATABASE_URL") {
            self.world.settings_but("DB_", &[])
        } else {
            let mut all = self.world.settings_but("DB_USER", &[("DB_USER", ROLE)]);
            all.retain(|(name, _)| name != "DB_PASSWORD");
            if !is_given("DB_PASSWORD") {
                all.extend(settings(&[("DB_PASSWORD", PASSWORD)]));
            }
            all
        };
        all.retain(|(name, _)| !given.iter().any(|(other, _)| name == other));
        // Room for a handshake on a busy machine.
        if !is_given("DB_TIMEOUT") {
            all.extend(settings(&[("DB_TIMEOUT", "5s"), ("VISIT_TIMEOUT", "6s")]));
        }
        all.extend(settings(given));
        all
    }

    /// Whether the program opens sessions, and then whether they are encrypted.
    async fn opens(&self, given: &[(&str, &str)]) -> Option<bool> {
        let log = self.world.postgres.folder().join("log");
        let before = fs::read(&log).unwrap().len();
        let ended = Ended::of(&["migrate"], &self.settings(given)).await;
        if ended.code != Some(0) {
            assert_eq!(ended.code, Some(1), "{ended:?}");
            return None;
        }
        let mut sessions = Vec::new();
        eventually("the session is in Postgres's log", SOON, async || {
            let text = fs::read(&log).unwrap();
            sessions = String::from_utf8_lossy(&text[before..])
                .lines()
                .filter(|line| line.contains("connection authorized") && line.contains("=visitas"))
                .map(|line| line.contains("SSL enabled"))
                .collect();
            !sessions.is_empty()
        })
        .await;
        assert!(sessions.iter().all(|is| *is == sessions[0]), "{sessions:?}");
        Some(sessions[0])
    }

    /// The error of the program, which must open no session.
    async fn refusal(&self, given: &[(&str, &str)]) -> String {
        let ended = Ended::of(&["migrate"], &self.settings(given)).await;
        assert_eq!(ended.code, Some(1), "{ended:?}");
        ended.error().to_owned()
    }

    /// Checks that the error of the program has these parts, what was tried, and no library's words.
    async fn check_refusal(&self, given: &[(&str, &str)], expected: &[&str]) {
        let error = self.refusal(given).await;
        for part in expected
            .iter()
            .chain(&["tried as ", "database ", "sslmode "])
        {
            assert!(error.contains(part), "{part} is not in {error}");
        }
        for foreign in [
            "error communicating",
            "rustls",
            "https://",
            "EOF",
            "SSLRequest",
            "sqlx",
        ] {
            assert!(!error.contains(foreign), "{error}");
        }
        assert_eq!(error.matches("tried as").count(), 1, "{error}");
        assert_eq!(error.lines().count(), 1, "{error}");
        assert!(!error.contains(PASSWORD), "{error}");
    }

    fn psql_command(&self, connection: &str) -> Command {
        let postgres = &self.world.postgres;
        let mut command = Command::new(postgres.programs().join("psql"));
        let (port, database) = (postgres.port(), &self.world.database);
        let ours = format!("host=127.0.0.1 port={port} dbname={database} user={ROLE} {connection}");
        command
            .env_clear()
            .env("PGPASSWORD", PASSWORD)
            .args(["-XqAt", "-d", &ours, "-c"])
            .arg("select ssl from pg_stat_ssl where pid = pg_backend_pid()");
        command
    }

    /// Whether psql's session is encrypted, or why it opens none.
    fn psql(&self, connection: &str, environment: &[(&str, &str)]) -> Result<String, String> {
        let mut command = self.psql_command(connection);
        command.envs(environment.iter().copied());
        let output = run(command);
        let text = |bytes| String::from_utf8_lossy(bytes).trim_end().to_owned();
        if output.status.success() {
            Ok(text(&output.stdout))
        } else {
            Err(text(&output.stderr))
        }
    }
}

/// The server's message that it does not take sessions yet.
const STARTING_UP: &[u8] = b"E\0\0\0\x3eSFATAL\0VFATAL\0C57P03\0\
    Mthe database system is starting up\0\0";

/// A program that responds to each message with the next of some texts, and closes the connection
/// instead of sending an empty one.
struct Impostor;

impl Impostor {
    /// Returns its port.
    async fn start(responses: &'static [&'static [u8]]) -> String {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                for response in responses {
                    let mut message = [0; 4096];
                    if stream.read(&mut message).await.is_err() || response.is_empty() {
                        break;
                    }
                    if stream.write_all(response).await.is_err() {
                        break;
                    }
                }
            }
        });
        port.to_string()
    }
}

fn run(mut command: Command) -> Output {
    command.output().expect("the program starts")
}

/// The same command with this file in the place of `/etc/hosts`, which needs a mount of its own.
fn in_place_of_hosts(hosts: &tempfile::NamedTempFile, command: &Command) -> Command {
    let mut wrapped = Command::new("unshare");
    wrapped
        .args(["--map-root-user", "--mount", "sh", "-c"])
        .arg("mount --bind \"$0\" /etc/hosts && exec \"$@\"")
        .arg(hosts.path())
        .arg(command.get_program())
        .args(command.get_args())
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    for (name, value) in command.get_envs() {
        wrapped.env(name, value.unwrap_or_default());
    }
    wrapped
}

/// An address here that takes no connection and refuses none, since its queue is full.
async fn silent_at(ip: Ipv4Addr, port: u16) -> (impl Sized, u16) {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind((ip, port).into()).unwrap();
    let listener = socket.listen(0).unwrap();
    let address = listener.local_addr().unwrap();
    let mut queued = Vec::new();
    let short = Duration::from_millis(100);
    while let Ok(stream) = tokio::time::timeout(short, TcpStream::connect(address)).await {
        queued.push(stream);
    }
    ((listener, queued), address.port())
}

/// The port of a server that responds everything as a web server does.
async fn http_server() -> u16 {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            stream
                .write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                .await
                .ok();
        }
    });
    port
}

/// Files made by the commands of `docs/connecting.md`, for another role.
fn recipe(documented: &str, role: &str) -> TempDir {
    let text = include_str!("../../docs/connecting.md");
    let (_, rest) = text
        .split_once("<!-- recipe -->\n```sh\n")
        .expect("the recipe");
    let (commands, _) = rest.split_once("```").expect("its end");
    let commands = commands
        .replace("db.example", "localhost")
        .replace(&format!("/CN={documented}"), &format!("/CN={role}"));
    let folder = TempDir::new().unwrap();
    shell(&folder, &commands);
    folder
}

fn shell(folder: &TempDir, commands: &str) {
    let mut command = Command::new("sh");
    command.args(["-ec", commands]).current_dir(folder.path());
    let output = run(command);
    assert!(output.status.success(), "{output:?}");
}

fn percent_encoded(text: &str) -> String {
    percent_encoding::percent_encode(text.as_bytes(), percent_encoding::NON_ALPHANUMERIC)
        .to_string()
}
