//! Facts about settings by flag and by file. clap reads the process's own environment, so
//! `tests/it/settings.rs` tests variables, with the real program.

mod property;
mod urls;

use std::ffi::OsString;
use std::io::Write as _;
use std::path::Path;

use expect_test::expect_file;
use tempfile::NamedTempFile;

use super::telemetry::format_for;
use super::*;

/// Every secret in these tests contains this text, and no output may contain it.
const CANARY: &str = "c4nary";

/// `UPDATE_EXPECT=1` writes the file.
#[test]
fn settings_are_documented() {
    expect_file!["../../docs/settings.md"].assert_eq(&documentation());
}

#[test]
fn secret_has_no_flag_and_the_error_says_what_to_do() {
    let settings = Config::augment_args(clap::Command::default());
    assert_eq!(secrets(&settings).count(), 6);
    for secret in secrets(&settings) {
        let flag = format!("--{}", secret.get_long().expect("a flag"));
        for arguments in [&[&*flag, CANARY][..], &[&format!("{flag}={CANARY}")]] {
            let error = error(arguments);
            assert!(error.contains(&variable_of(secret)), "{error}");
            assert!(error.contains("environment"), "{error}");
        }
        assert!(
            !printed(&["--help"]).contains(&format!("{flag} ")),
            "{flag}"
        );
    }
}

#[test]
fn error_names_a_secret_by_its_variable() {
    let secret = file("c4nary");
    let by_file = format!("--redis-password-file={}", path(&secret));
    for (arguments, names) in [
        (
            &["--db-password=c4nary", "--database-url=c4nary"][..],
            ["DB_PASSWORD", "DATABASE_URL"],
        ),
        (
            &["--db-host=db", "--db-port=1", "--database-url=c4nary"],
            ["DB_HOST", "DATABASE_URL"],
        ),
        (
            &["--redis-url=c4nary", "--redis-host=a", "--redis-port=1"],
            ["REDIS_HOST", "REDIS_URL"],
        ),
        (
            &["--redis-password=c4nary", &by_file],
            ["REDIS_PASSWORD", "--redis-password-file"],
        ),
        (&["--db-passwort=c4nary"], ["--db-passwort", "DB_PASSWORD"]),
        (&["--database-url"], ["DATABASE_URL", "DATABASE_URL"]),
    ] {
        let error = error(arguments);
        for name in names {
            assert!(error.contains(name), "{name} in {error}");
        }
        let settings = Config::augment_args(clap::Command::default());
        for secret in secrets(&settings) {
            let flag = format!("--{}", secret.get_long().expect("a flag"));
            let mut after = error.split(&flag).skip(1);
            assert!(
                !after.any(|after| after.starts_with([' ', '\''])),
                "{error}"
            );
        }
    }
}

#[test]
fn port_that_kubernetes_sets_is_explained() {
    let why = error(&["--redis-port=tcp://10.0.0.1:6379"]);
    assert!(
        why.contains("--redis-port <REDIS_PORT>") && why.contains("enableServiceLinks"),
        "{why}"
    );
    assert!(!error(&["--redis-port=0"]).contains("Kubernetes"));
}

#[test]
fn help_of_a_command_has_the_settings_that_it_uses() {
    for (command, used, unused) in [
        ("serve", "--otel-sdk-disabled", "--url"),
        ("migrate", "--db-host", "--redis-host"),
        ("reconcile", "--redis-host", "--bind-addr"),
        ("healthcheck", "--bind-addr", "--db-host"),
    ] {
        for help in ["-h", "--help"] {
            let help = printed(&[command, help]);
            assert!(help.contains(&format!("      {used} <")), "{command}");
            assert!(!help.contains(&format!("      {unused} <")), "{command}");
        }
    }
    assert!(
        printed(&["-h"]).contains("Timeout of one call")
            && printed(&["-h"]).contains("\n  migrate\n")
    );
}

#[test]
fn values_in_errors_are_cut_and_have_no_password() {
    for typed in [
        "--db-host=postgres://ana:c4nary@db",
        "--db-host=ana:c4nary@db/?next=http://x@y",
        "--otel-exporter-otlp-endpoint=http://ana:c4nary@db",
        "postgres://ana:c4nary@db",
    ] {
        assert!(error(&[typed]).contains("****@"), "{typed}");
    }
    assert!(error(&["--db-hots=c4nary"]).contains("'--db-host'"));
    assert!(error(&["--db-port", &"9".repeat(100_000)]).len() < 300);
}

#[test]
fn durations_have_units_and_reach_their_bounds() {
    for (text, timeout) in [
        ("100ms", 100),
        ("1500ms", 1500),
        ("2m", 120_000),
        ("1h", 3_600_000),
    ] {
        let config = serve(&[&format!("--idle-timeout={text}")]);
        assert_eq!(config.http.idle_timeout.as_millis(), timeout);
    }
    for text in "99ms 3600001ms 1 s 1S 1d 1m30s 1.5s -1s 99999999999999999999h".split(' ') {
        let error = error(&[&format!("--idle-timeout={text}")]);
        assert!(error.contains("expected 100ms to 1h"), "{error}");
    }
}

#[test]
fn error_says_that_a_duration_lacks_its_unit_or_has_one_too_many() {
    let lacking = "lacks a unit (ms, s, m or h); expected ";
    for (argument, range) in [
        ("--db-timeout=500", "10ms to 1m"),
        ("--redis-timeout=250", "1ms to 30s"),
        ("--visit-timeout=2", "10ms to 2m"),
        ("--header-timeout=5", "100ms to 5m"),
        ("--shutdown-delay=0", "0s to 10m"),
        ("--access-slow=500", "0s to 1h"),
    ] {
        let error = error(&[argument]);
        assert!(error.contains(&format!("{lacking}{range}")), "{error}");
    }
    for unit in ["500ms", "5s"] {
        let error = error(&[&format!("--otel-bsp-schedule-delay={unit}")]);
        assert!(
            error.contains("has a unit: write milliseconds without one; expected 1 to 600000"),
            "{error}"
        );
    }
    for other in [
        "--db-timeout=5ms",
        "--db-timeout=1d",
        "--otel-bsp-schedule-delay=0",
    ] {
        let error = error(&[other]);
        assert!(!error.contains("unit"), "{error}");
    }
}

#[test]
fn settings_that_just_fit_together_are_accepted() {
    serve(&["--db-timeout=1750ms"]);
    serve(&["--visit-timeout=1250ms"]);
    serve(&["--redis-timeout=699ms"]);
    serve(&["--metrics-addr=0.0.0.0:0", "--bind-addr=0.0.0.0:0"]);
    serve(&["--otel-bsp-max-queue-size=512"]);
    let error = error(&["--otel-bsp-max-queue-size=511"]);
    assert!(
        error.contains("OTEL_BSP_MAX_EXPORT_BATCH_SIZE (512)"),
        "{error}"
    );
    assert!(error.contains("OTEL_BSP_MAX_QUEUE_SIZE (511)"), "{error}");
}

#[test]
fn server_side_timeouts_are_shares_of_the_timeout_in_whole_milliseconds() {
    for (timeout, lock, statement) in [("1s", 700, 850), ("15ms", 10, 12)] {
        let timeout = format!("--db-timeout={timeout}");
        let postgres = serve(&[&timeout, "--redis-timeout=1ms"]).postgres;
        assert_eq!(postgres.lock_timeout().as_millis(), lock);
        assert_eq!(postgres.statement_timeout().as_millis(), statement);
    }
}

#[test]
fn log_settings_are_read_in_any_case_and_without_whitespace() {
    assert_eq!((format_for(true), format_for(false)), ("pretty", "json"));
    let log = serve(&["--log-format=JSON", "--rust-log=info, visitas=debug"])
        .telemetry
        .log;
    assert_eq!(
        (log.log_format, &*log.rust_log),
        (LogFormat::Json, "info,visitas=debug")
    );
    let log = serve(&["--log-format=pretty", "--rust-log=\u{2003}\u{e9}=info\n"])
        .telemetry
        .log;
    assert_eq!(
        (log.log_format, &*log.rust_log),
        (LogFormat::Pretty, "\u{e9}=info")
    );
    error(&["--rust-log=\u{2003}"]);
}

#[test]
fn malformed_pairs_are_refused() {
    for pairs in "a a=b, =b a=% a=%zz a=%ff a=b,a=c".split(' ') {
        error(&["--otel-resource-attributes", pairs]);
    }
}

#[test]
fn healthcheck_asks_this_host_at_the_bound_port() {
    let url = |arguments: &[&str]| match run(&[&["healthcheck"], arguments].concat()) {
        Ok(Command::Healthcheck(config)) => config.url().expect("a URL").to_string(),
        other => panic!("{other:?}"),
    };
    assert_eq!(url(&[]), "http://127.0.0.1:5000/health");
    assert_eq!(url(&["--bind-addr=[::]:80"]), "http://127.0.0.1/health");
    assert_eq!(
        url(&["--bind-addr=10.1.2.3:81"]),
        "http://10.1.2.3:81/health"
    );
    assert_eq!(url(&["--url=http://x:1/y"]), "http://x:1/y");
    for bad in [
        "--url=https://x/health",
        "--url=x:5000",
        "--url=/health",
        "--url=http://a@x/",
        "--bind-addr=0.0.0.0:0",
    ] {
        assert!(error(&["healthcheck", bad]).contains("--url"), "{bad}");
    }
}

#[test]
fn secret_of_a_file_loses_the_newline_at_its_end() {
    for end in ["", "\n", "\r\n"] {
        let file = file(format!("c4nary {end}"));
        let config = serve(&["--db-password-file", path(&file)]);
        assert_eq!(
            config.postgres.db_password.expect("a password").expose(),
            "c4nary "
        );
        assert_listed(&config.listing, "DB_PASSWORD=**** # DB_PASSWORD_FILE");
    }
}

#[test]
fn database_url_is_taken_apart_and_decoded() {
    let config =
        by_database_url("postgresql://an%40:c4%3Anary%2F@[::1]:6543/vis%20itas?sslmode=require");
    let postgres = config.postgres;
    assert_eq!((&*postgres.db_host, postgres.db_port), ("::1", 6543));
    assert_eq!(
        (&*postgres.db_user, &*postgres.db_name),
        ("an@", "vis itas")
    );
    assert_eq!(
        postgres.db_password.expect("a password").expose(),
        "c4:nary/"
    );
    for line in [
        "DATABASE_URL=postgresql://an%40:****@[::1]:6543/vis%20itas?sslmode=require # DATABASE_URL_FILE",
        "DB_HOST=::1 # DATABASE_URL",
        "DB_PASSWORD=**** # DATABASE_URL",
        "DB_SSLMODE=require # DATABASE_URL",
    ] {
        assert_listed(&config.listing, line);
    }
    let socket = by_database_url("postgres://ana@%2Frun%2Fpg/visitas").postgres;
    assert_eq!(socket.db_host, "/run/pg");
    assert_eq!(serve(&["--db-host=/run/pg"]).postgres.db_host, "/run/pg");
}

#[test]
fn redis_url_is_taken_apart_and_decoded() {
    let config = by_redis_url("rediss://ana:c4%40nary@cache:6380/3").expect("a URL");
    let redis = config.redis;
    assert_eq!((&*redis.redis_host, redis.redis_port), ("cache", 6380));
    assert_eq!((redis.tls, redis.database), (true, 3));
    assert_eq!(redis.redis_username.as_deref(), Some("ana"));
    assert_eq!(
        redis.redis_password.expect("a password").expose(),
        "c4@nary"
    );
    assert_listed(
        &config.listing,
        "REDIS_URL=rediss://ana:****@cache:6380/3 # REDIS_URL_FILE",
    );
}

#[test]
fn setting_that_a_url_omits_has_its_default() {
    let postgres = by_database_url("postgres://db").postgres;
    assert_eq!((&*postgres.db_host, postgres.db_port), ("db", 5432));
    assert_eq!(
        (&*postgres.db_user, &*postgres.db_name),
        ("usuario", "desafio3db")
    );
    let redis = by_redis_url("redis://cache").expect("a URL").redis;
    assert_eq!((&*redis.redis_host, redis.redis_port), ("cache", 6379));
    assert_eq!((redis.database, redis.tls), (0, false));
}

#[test]
fn bad_url_never_appears_in_its_error() {
    for url in [
        "c4nary",
        "postgres:c4nary",
        "postgres://ana:c4nary/x@db/visitas",
        "postgres://ana:@x#c4nary@db/visitas",
        "postgres://ana:c4nary/@db/visitas",
        "postgres://ana:12?c4nary",
        "postgres://ana:x@db/visitas?c4nary",
        "postgres://ana:x@db/visitas?c4n/c4nary=1",
        "postgres://ana:x@c4nary,c4nary/visitas",
        "postgres://ana:x@db/visitas?options=-c%20search_path%3Dc4nary",
        "postgres://ana:x@db/visitas?service=c4nary",
        "postgres://ana:c4nary%@db/visitas",
        "postgres://ana:c4nary@db:0/visitas",
        "postgres://ana:12/c4nary@db",
        "postgres://ana:/c4nary@db",
        "postgres://ana:x@c4nary!/visitas",
        "postgres://ana:x@db/c4nary/c4nary",
        "postgres://ana:x@db/visitas?sslmode=c4nary",
        "postgres://ana:x@db/visitas?sslmode=require&sslmode=disable",
        "postgres://ana:x@db/visitas?sslmode=verify-full&sslrootcert=/c4nary",
        "postgres:///c4nary",
        "postgres://ana:c4nary @db/visitas",
    ] {
        let error = error(&["--database-url-file", path(&file(url))]);
        assert!(
            error.starts_with("error: DATABASE_URL (value hidden"),
            "{error}"
        );
    }
    for url in [
        "redis://c4nary@cache",
        "redis://:c4nary@cache/-1",
        "redis://:x@cache?c4nary",
        "redis://:x@cache#insecure",
    ] {
        assert!(
            by_redis_url(url)
                .expect_err(url)
                .starts_with("error: REDIS_URL ")
        );
    }
}

#[test]
fn root_certificates_need_a_mode_that_verifies() {
    let ca = ca();
    for mode in [
        "disable",
        "allow",
        "prefer",
        "require",
        "verify-ca",
        "verify-full",
    ] {
        let arguments = [
            "migrate",
            "--db-sslrootcert",
            path(&ca),
            "--db-sslmode",
            mode,
        ];
        let refusal = run(&arguments).err();
        let verifies = mode == "require" || mode.starts_with("verify");
        assert_eq!(refusal.is_none(), verifies, "{refusal:?}");
        assert!(
            refusal.is_none_or(|error| error.contains("DB_SSLROOTCERT") && error.contains(mode))
        );
    }
    let url = format!(
        "postgres://ana@db?sslmode=verify-full&sslrootcert={}",
        path(&ca)
    );
    let certificates = by_database_url(&url).postgres.db_sslrootcert;
    assert_eq!(certificates.expect("certificates").path, ca.path());
    let url = file(url);
    error(&[
        "--database-url-file",
        path(&url),
        "--db-sslrootcert",
        path(&ca),
    ]);
    assert!(error(&["--redis-tls-ca", path(&ca)]).contains("rediss://"));
    let url = file("rediss://cache");
    serve(&["--redis-tls-ca", path(&ca), "--redis-url-file", path(&url)]);
}

#[test]
fn systems_roots_are_handed_to_clients_that_do_not_find_them() {
    let (ca, url) = (ca(), file("rediss://cache"));
    let roots = |environment: &[(&str, &str)]| {
        let arguments = [
            "--redis-url-file",
            path(&url),
            "--otel-exporter-otlp-endpoint=https://c",
        ];
        let Ok(Command::Serve(config)) = parsed(&arguments, environment) else {
            panic!("a bad setting");
        };
        let exporter = config
            .telemetry
            .traces()
            .and_then(|traces| traces.exporter.clone());
        let of_exporter = exporter.expect("an exporter").roots.map(|roots| roots.pem);
        let of_redis = config
            .redis
            .roots()
            .expect("readable")
            .map(|roots| roots.pem);
        assert_eq!(of_exporter, of_redis);
        of_redis.map(|pem| String::from_utf8(pem).expect("text").replace('\n', ""))
    };
    let hidden = ("SSL_CERT_FILE", "/dev/null");
    let handed = ("VISITAS_SYSTEM_CERT_FILE", path(&ca));
    let expected = include_str!("tests/ca.pem").replace('\n', "");
    assert_eq!(roots(&[hidden, handed]), Some(expected));
    // Without paths a client gets an empty list. If libraries find the certificates, it gets none.
    assert_eq!(roots(&[hidden]).as_deref(), Some(""));
    assert_eq!(roots(&[handed, ("SSL_CERT_FILE", path(&ca))]), None);
    assert_eq!(roots(&[handed, hidden, ("SSL_CERT_DIR", "/")]), None);
}

#[test]
fn spans_are_exported_only_to_an_endpoint() {
    let endpoint = "--otel-exporter-otlp-endpoint=https://jaeger:4318/base/";
    let exporter =
        |arguments: &[&str]| traces(arguments).exporter.map(|exporter| exporter.endpoint);
    assert_eq!(exporter(&[]), None);
    assert_eq!(exporter(&[endpoint, "--otel-traces-exporter=none"]), None);
    assert_eq!(
        exporter(&[endpoint]).as_deref(),
        Some("https://jaeger:4318/base/v1/traces")
    );
    let specific = "--otel-exporter-otlp-traces-endpoint=http://tempo/as/is/";
    assert_eq!(
        exporter(&[endpoint, specific]).as_deref(),
        Some("http://tempo/as/is/")
    );
    let disabled = serve(&["--otel-sdk-disabled=TRUE", "--otel-propagators=none"]).telemetry;
    assert!(disabled.traces().is_none() && !disabled.trace_context());
}

#[test]
fn settings_for_traces_win_over_general_ones() {
    let general = [
        "--otel-exporter-otlp-endpoint=http://jaeger:4318",
        "--otel-exporter-otlp-timeout=7",
        "--otel-exporter-otlp-compression=gzip",
        "--otel-attribute-value-length-limit=100",
    ];
    let specific = [
        "--otel-exporter-otlp-traces-timeout=8",
        "--otel-exporter-otlp-traces-compression=none",
        "--otel-span-attribute-value-length-limit=200",
    ];
    for (arguments, timeout, compression, limit) in [
        (&general[..], 7, Compression::Gzip, 100),
        (
            &[&general[..], &specific].concat(),
            8,
            Compression::None,
            200,
        ),
        (
            &[&general[..], &["--otel-bsp-export-timeout=6"]].concat(),
            6,
            Compression::Gzip,
            100,
        ),
    ] {
        let traces = traces(arguments);
        assert_eq!(traces.value_length_limit(), limit);
        let exporter = traces.exporter.expect("an exporter");
        assert_eq!(
            (exporter.timeout.as_millis(), exporter.compression),
            (timeout, compression)
        );
    }
    let listing = serve(&general).listing;
    assert_listed(
        &listing,
        "OTEL_EXPORTER_OTLP_TRACES_COMPRESSION=gzip # flag",
    );
    assert_listed(
        &listing,
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=http://jaeger:4318/v1/traces # flag",
    );
}

#[test]
fn sampler_takes_a_ratio_only_if_it_is_one_of_ratios() {
    let sampler = |arguments: &[&str]| traces(arguments).otel_traces_sampler;
    let (parent_based, root) = (true, Root::AlwaysOn);
    assert_eq!(sampler(&[]), Sampler { parent_based, root });
    let by_ratio = "--otel-traces-sampler=traceidratio";
    assert_eq!(sampler(&[by_ratio]).root, Root::Ratio(1.0));
    let ratio = "--otel-traces-sampler-arg=0.25";
    let (parent_based, root) = (false, Root::Ratio(0.25));
    assert_eq!(sampler(&[by_ratio, ratio]), Sampler { parent_based, root });
    assert!(error(&[ratio]).contains("OTEL_TRACES_SAMPLER_ARG (0.25)"));
}

#[test]
fn service_name_is_the_setting_then_the_attribute() {
    let attributes = "--otel-resource-attributes=service.name=attribute,team=a%2Cb";
    let by_attribute = serve(&[attributes]);
    assert_listed(&by_attribute.listing, "OTEL_SERVICE_NAME=attribute # flag");
    let by_attribute = traces(&[attributes]);
    assert_eq!(by_attribute.otel_service_name, "attribute");
    let others: Vec<_> = by_attribute.resource_attributes().cloned().collect();
    assert_eq!(others, [("team".to_owned(), "a,b".to_owned())]);
    let by_setting = traces(&[attributes, "--otel-service-name=setting"]);
    assert_eq!(by_setting.otel_service_name, "setting");
    let empty = traces(&["--otel-resource-attributes=service.name=,team=a"]);
    assert_eq!(empty.otel_service_name, "visitas");
    let control = error(&["--otel-resource-attributes=service.name=a%07"]);
    assert!(control.contains("OTEL_RESOURCE_ATTRIBUTES: service.name must be 1 to 255"));
}

#[test]
fn propagators_are_a_list_of_known_names_or_none() {
    let trace_context = |list: &str| {
        serve(&["--otel-propagators", list])
            .telemetry
            .trace_context()
    };
    for list in [
        "tracecontext",
        "baggage, tracecontext",
        "tracecontext,tracecontext",
        "TraceContext",
    ] {
        assert!(trace_context(list), "{list}");
    }
    for list in ["baggage", "none", "None", " none ", "none,none"] {
        assert!(!trace_context(list), "{list}");
    }
    for list in [
        "b3",
        "tracecontext,b3",
        "none,tracecontext",
        "tracecontext,",
        ",",
        " ",
        "tracecontext;baggage",
    ] {
        error(&["--otel-propagators", list]);
        error(&["--otel-propagators", list, "--otel-sdk-disabled=true"]);
    }
}

/// Parses the arguments after the program's name, without the process's own environment.
fn parsed(arguments: &[&str], environment: &[(&str, &str)]) -> Result<Command, String> {
    let lookup = |name: &str| {
        let mut found = environment.iter().filter(|(variable, _)| *variable == name);
        found.next().map(|(_, value)| OsString::from(value))
    };
    let arguments = ["visitas"].iter().chain(arguments).map(OsString::from);
    parse(arguments, &lookup).map_err(|error| {
        assert!(!format!("{error:?}").contains(CANARY), "{error:?}");
        error.to_string()
    })
}

fn run(arguments: &[&str]) -> Result<Command, String> {
    parsed(arguments, &[])
}

fn serve(arguments: &[&str]) -> Config {
    match run(arguments) {
        Ok(Command::Serve(config)) => *config,
        other => panic!("{arguments:?}: {other:?}"),
    }
}

fn by_database_url(url: &str) -> Config {
    serve(&["--database-url-file", path(&file(url))])
}

fn by_redis_url(url: &str) -> Result<Config, String> {
    match run(&["--redis-url-file", path(&file(url))])? {
        Command::Serve(config) => Ok(*config),
        other => panic!("{other:?}"),
    }
}

fn traces(arguments: &[&str]) -> TracesConfig {
    let telemetry = serve(arguments).telemetry;
    telemetry.traces().cloned().expect("traces")
}

/// The help or the version.
fn printed(arguments: &[&str]) -> String {
    run(arguments).expect_err("a text to print")
}

/// The error, which contains no secret.
fn error(arguments: &[&str]) -> String {
    let error = run(arguments).expect_err("a bad setting");
    assert!(error.starts_with("error: "), "{error}");
    assert!(!error.contains(CANARY), "{error}");
    error
}

fn assert_listed(listing: &str, expected: &str) {
    let mut lines = listing
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "));
    assert!(
        lines.any(|line| line == expected),
        "{expected} in {listing}"
    );
}

fn file(contents: impl AsRef<[u8]>) -> NamedTempFile {
    let mut file = NamedTempFile::new().expect("a temporary file");
    file.write_all(contents.as_ref())
        .expect("a file on the disk");
    file
}

fn path(file: &impl AsRef<Path>) -> &str {
    file.as_ref().to_str().expect("a path of ASCII")
}

fn ca() -> NamedTempFile {
    file(include_str!("tests/ca.pem"))
}

/// `docs/settings.md`.
fn documentation() -> String {
    let settings = documented(Config::augment_args(clap::Command::default()));
    let mut last = String::new();
    let mut row = |setting: &Arg| {
        let heading = setting.get_help_heading().unwrap_or_default().to_owned();
        let mut table = String::new();
        if heading != last {
            table = format!("\n## {heading}\n\n| variable | default | |\n| --- | --- | --- |\n");
        }
        last = heading;
        let default = match setting.get_default_values() {
            [value] if !setting.is_hide_default_value_set() => format!("`{}`", value.display()),
            _ => "–".to_owned(),
        };
        let secret = if setting.is_hide_set() {
            "Secret. "
        } else {
            ""
        };
        let help = setting.get_help().cloned().unwrap_or_default();
        let variable = variable_of(setting);
        format!("{table}| `{variable}` | {default} | {secret}{help} |\n")
    };
    let rows: Vec<String> = settings.get_arguments().map(&mut row).collect();
    include_str!("tests/settings.md").to_owned() + &rows.concat()
}
