//! The command line: commands, flags, help and what is printed.

use super::*;
use crate::config::{REVISION, VERSION};

#[test]
fn flag_wins_over_variable() {
    let config = serve("--db-host flag", &[("DB_HOST", "variable")]);
    assert_eq!(config.postgres.host, "flag");
}

#[test]
fn flag_is_the_same_before_and_after_the_command() {
    assert_eq!(serve("--db-host=a serve", &[]).postgres.host, "a");
    assert_eq!(serve("serve --db-host=a", &[]).postgres.host, "a");
}

#[test]
fn config_lists_every_setting_in_order_with_its_origin() {
    let file = file("listing", CANARY);
    let environment = [
        ("DB_PASSWORD_FILE", file.path()),
        ("REDIS_PASSWORD", CANARY),
    ];
    let listing = printed("config --db-host=db", &environment);
    let listed: Vec<&str> = listing
        .lines()
        .filter_map(|line| line.split('=').next())
        .collect();
    let expected: Vec<&str> = all().iter().map(|(about, _)| about.variable).collect();
    assert_eq!(listed, expected);
    assert!(!listing.contains(CANARY), "{listing}");
    assert_lines(
        &listing,
        &[
            "DB_HOST=db # flag",
            "DB_PORT=5432 # default",
            "DB_PASSWORD=**** # DB_PASSWORD_FILE",
            "REDIS_PASSWORD=**** # environment",
            "METRICS_ADDR=(none) # default",
            "LOG_FORMAT=json # default",
        ],
    );
}

#[test]
fn secret_has_no_flag_and_the_error_says_what_to_do() {
    for (about, _) in all().into_iter().filter(|(about, _)| about.secret) {
        let line = error_of(&["visitas", &format!("--{}={CANARY}", about.flag())], &[]);
        assert!(
            line.contains(about.variable) && line.contains("environment"),
            "{line}"
        );
        let line = error_of(&["visitas", &format!("--{}", about.flag()), CANARY], &[]);
        assert!(
            line.contains(about.variable) && line.contains("environment"),
            "{line}"
        );
    }
}

#[test]
fn unknown_arguments_are_one_line_that_points_to_the_help() {
    for arguments in [
        "--nope",
        "nope",
        "migrate --url=x",
        "--db-host",
        "--db-port=1 --db-port=2",
    ] {
        let line = error(arguments, &[]);
        assert!(line.ends_with("see visitas --help"), "{line}");
        assert!(!line.contains('\n'), "{line}");
    }
    assert!(error("--db-hots=x", &[]).contains("did you mean --db-host?"));
}

#[test]
fn help_has_every_setting_with_variable_flag_and_default() {
    let help = printed("--help", &[]);
    let words: Vec<&str> = help.split_whitespace().collect();
    let help = words.join(" ");
    for (about, accepts) in all() {
        let (Fallback::Value(fallback) | Fallback::Absent(fallback)) = about.fallback;
        let entry = format!("{accepts}. [env: {}] [default: {fallback}]", about.variable);
        assert!(help.contains(&entry), "{entry}");
        let flag = format!(" --{} <", about.flag());
        assert_eq!(help.contains(&flag), !about.secret, "{flag}");
    }
}

#[test]
fn help_has_every_command() {
    let help = printed("-h", &[]);
    for command in [
        "serve",
        "migrate",
        "healthcheck",
        "reconcile",
        "recount",
        "config",
    ] {
        assert!(help.contains(&format!("\n  {command}\n")), "{command}");
        assert!(
            printed(&format!("{command} --help"), &[]).contains("--db-host"),
            "{command}"
        );
    }
}

#[test]
fn version_has_the_revision() {
    let expected = format!("visitas {VERSION} ({REVISION})\n");
    assert_eq!(printed("--version", &[]), expected);
    assert_eq!(printed("serve -V", &[]), expected);
}

#[test]
fn healthcheck_asks_this_host_at_the_bound_port() {
    let url = |arguments: &str, address: &str| match run(arguments, &[("BIND_ADDR", address)]) {
        Ok(Command::Healthcheck { url }) => url.to_string(),
        other => panic!("{other:?}"),
    };
    assert_eq!(url("healthcheck", ""), "http://127.0.0.1:5000/health");
    assert_eq!(url("healthcheck", "[::]:80"), "http://[::1]:80/health");
    assert_eq!(
        url("healthcheck", "10.1.2.3:81"),
        "http://10.1.2.3:81/health"
    );
    assert_eq!(
        url("healthcheck --url http://x:1/y", "nonsense"),
        "http://x:1/y"
    );
}

#[test]
fn healthcheck_needs_a_url_that_it_can_ask() {
    for url in ["https://x/health", "x:5000", "/health", ""] {
        let line = error(&format!("healthcheck --url={url}"), &[]);
        assert!(line.starts_with("--url="), "{line}");
    }
    let line = error("healthcheck", &[("BIND_ADDR", "0.0.0.0:0")]);
    assert!(
        line.starts_with("BIND_ADDR=") && line.contains("--url"),
        "{line}"
    );
}

#[test]
fn command_reads_only_the_settings_that_it_uses() {
    let (database, cache, log) = (("DB_PORT", "x"), ("REDIS_PORT", "x"), ("RUST_LOG", "a=b"));
    let telemetry = ("OTEL_SDK_DISABLED", "x");
    assert!(run("healthcheck", &[database, cache, log, telemetry]).is_ok());
    for command in ["migrate", "recount"] {
        assert!(run(command, &[cache, telemetry]).is_ok());
        assert!(run(command, &[database]).is_err());
        assert!(run(command, &[log]).is_err());
    }
    assert!(run("reconcile", &[telemetry]).is_ok());
    for (command, bad) in [
        ("reconcile", cache),
        ("config", telemetry),
        ("serve", telemetry),
    ] {
        assert!(run(command, &[bad]).is_err());
    }
}

#[test]
fn every_command_is_recognised() {
    assert!(matches!(run("", &[]), Ok(Command::Serve(_))));
    assert!(matches!(run("serve", &[]), Ok(Command::Serve(_))));
    assert!(matches!(run("migrate", &[]), Ok(Command::Migrate { .. })));
    assert!(matches!(
        run("reconcile", &[]),
        Ok(Command::Reconcile { .. })
    ));
    assert!(matches!(run("recount", &[]), Ok(Command::Recount { .. })));
    assert!(matches!(run("config", &[]), Ok(Command::Print(_))));
}
