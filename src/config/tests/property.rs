//! What holds for every text that a setting may be given, and every password that a secret may be.

use std::net::{IpAddr, SocketAddr};

use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use proptest::prelude::*;
use proptest::sample::select;

use super::*;
use crate::config::kind::{Durations, Headers, Host, Kind, Pairs, in_words, percent_decoded};
use crate::config::read::healthcheck_url;
use crate::property::bounded;

/// Pieces that mean something to one parser or another, between bars.
const PIECES: &str = "postgres|redis|http|://|//|/|@|:|?|#|&|=|,|;|%|%2|%41|%00|%ff|[|]|::1|\\|\"|'| |\
    \t|\r|\n|\0|\u{7}|\u{85}|\u{2028}|é|…|0|1|65535|-|+|.|..|ms|s|h|sslmode|sslrootcert|require|****";

/// Any text, which now and then is nearly what some setting takes.
fn text() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        select(PIECES.split('|').collect::<Vec<_>>()).prop_map(str::to_owned),
        any::<char>().prop_map(String::from),
        "[a-z0-9]{1,4}",
    ];
    prop::collection::vec(piece, 0..10).prop_map(|pieces| pieces.concat())
}

/// Names as Postgres has them: of at most 63 bytes, in whatever script.
fn name() -> impl Strategy<Value = String> {
    let printable = any::<char>().prop_filter("printable", |character| !character.is_control());
    prop::collection::vec(printable, 1..=15)
        .prop_map(String::from_iter)
        // A URL's path has no such segments: they mean the path's parents.
        .prop_filter("no dots alone", |name| name != "." && name != "..")
}

/// A password in one line that holds the canary.
fn password() -> impl Strategy<Value = String> {
    (text(), text()).prop_map(|(before, after)| {
        format!("{before}{CANARY}{after}").replace(['\0', '\r', '\n'], "")
    })
}

fn host() -> impl Strategy<Value = String> {
    prop_oneof![
        "[a-zA-Z0-9._-]{1,20}",
        any::<IpAddr>().prop_map(|address| address.to_string()),
    ]
}

fn variable() -> impl Strategy<Value = &'static str> {
    select(variables().into_iter().collect::<Vec<_>>())
}

fn secret() -> impl Strategy<Value = &'static str> {
    let secrets = all().into_iter().filter(|(about, _)| about.secret);
    select(secrets.map(|(about, _)| about.variable).collect::<Vec<_>>())
}

fn encoded(text: &str) -> String {
    utf8_percent_encode(text, NON_ALPHANUMERIC).to_string()
}

/// A host as it stands in a URL.
fn in_a_url(host: &str) -> String {
    if host.contains(':') {
        format!("[{host}]")
    } else {
        host.to_owned()
    }
}

/// The settings as `config` lists them, or the line that says what is wrong.
fn listed(environment: &[(&str, &str)]) -> Result<String, String> {
    match run("config", environment) {
        Ok(Command::Print(listing)) => Ok(listing),
        Ok(other) => panic!("{other:?}"),
        Err(error) => {
            assert!(!format!("{error:?}").contains(CANARY), "{error:?}");
            Err(error.to_string())
        }
    }
}

/// What `config` says was given, as one would give it again.
fn given_again(listing: &str) -> Vec<(String, String)> {
    listing
        .lines()
        .filter_map(|line| line.strip_suffix(" # environment")?.split_once('='))
        .map(|(variable, value)| (variable.to_owned(), value.trim_end().to_owned()))
        .collect()
}

proptest! {
    #![proptest_config(bounded())]

    #[test]
    fn any_bytes_are_accepted_or_refused_in_one_line_that_names_the_setting(
        variable in variable(),
        bytes in prop_oneof![
            text().prop_map(String::into_bytes),
            prop::collection::vec(any::<u8>(), 1..40),
        ],
        by_flag in any::<bool>(),
    ) {
        let value = OsString::from_vec(bytes);
        let flag = variable.to_ascii_lowercase().replace('_', "-");
        let mut arguments = vec![OsString::from("visitas")];
        if by_flag {
            let mut argument = OsString::from(format!("--{flag}="));
            argument.push(&value);
            arguments.push(argument);
        }
        let environment = |name: &str| (!by_flag && name == variable).then(|| value.clone());
        if let Err(error) = parse(arguments, &environment, false) {
            let line = error.to_string();
            prop_assert!(line.contains(variable) || line.contains(&flag), "{line}");
            prop_assert!(!line.contains(char::is_control), "{line:?}");
            prop_assert!(line.chars().count() < 1500, "{line}");
        }
    }

    #[test]
    fn any_command_line_is_understood_or_refused_in_one_line(
        arguments in prop::collection::vec(
            prop_oneof![
                select(&["serve", "migrate", "config", "healthcheck", "--url", "--help", "-V"][..])
                    .prop_map(OsString::from),
                text().prop_map(OsString::from),
                text().prop_map(|text| OsString::from(format!("--{text}"))),
                prop::collection::vec(any::<u8>(), 0..8).prop_map(OsString::from_vec),
            ],
            0..4,
        ),
    ) {
        let arguments = [OsString::from("visitas")].into_iter().chain(arguments);
        if let Err(error) = parse(arguments, &|_| None, false) {
            prop_assert!(!error.to_string().contains(char::is_control), "{error:?}");
        }
    }

    #[test]
    fn text_of_a_secret_is_never_shown(
        variable in secret(),
        in_a_file in any::<bool>(),
        before in text(),
        after in text(),
    ) {
        let text = format!("{before}{CANARY}{after}");
        let file = file("secret-text", &text);
        let file_variable = format!("{variable}_FILE");
        let in_a_file = in_a_file && variables().contains(&*file_variable);
        let outcome = if in_a_file {
            listed(&[(&file_variable, file.path())])
        } else {
            listed(&[(variable, &text)])
        };
        match outcome {
            // A URL's user, host and database are no secrets.
            Ok(_) if variable.ends_with("_URL") => {}
            Ok(listing) => prop_assert!(!listing.contains(CANARY), "{listing}"),
            Err(line) => {
                prop_assert!(line.starts_with(variable), "{line}");
                prop_assert!(!line.contains(CANARY), "{line}");
            }
        }
    }

    #[test]
    fn password_is_taken_as_it_is_by_variable_and_file(password in password()) {
        let file = file("password", format!("{password}\n"));
        for variable in [("DB_PASSWORD", &*password), ("DB_PASSWORD_FILE", file.path())] {
            let taken = serve("", &[variable]).postgres.password.expect("a password");
            prop_assert_eq!(taken.expose(), &*password);
        }
    }

    #[test]
    fn any_file_holds_one_line_of_utf8_or_no_secret(
        contents in prop_oneof![
            prop::collection::vec(any::<u8>(), 0..20),
            text().prop_map(String::into_bytes),
            (16_382_usize..16_388).prop_map(|length| vec![b'x'; length]),
        ],
    ) {
        let file = file("any", &contents);
        let text = String::from_utf8(contents.clone()).ok();
        let line = text.as_deref().map(|text| text.trim_end_matches(['\r', '\n']));
        let secret = line.filter(|line| {
            contents.len() <= 16_384 && !line.is_empty() && !line.contains(['\0', '\r', '\n'])
        });
        match (run("", &[("REDIS_PASSWORD_FILE", file.path())]), secret) {
            (Ok(Command::Serve(config)), Some(secret)) => {
                let password = config.redis.password.expect("a password");
                prop_assert_eq!(password.expose(), secret);
            }
            (Err(error), None) => prop_assert!(error.to_string().starts_with("REDIS_PASSWORD")),
            (other, expected) => {
                let failure = format!("{other:?} and not {expected:?}");
                return Err(TestCaseError::fail(failure));
            }
        }
    }

    #[test]
    fn database_url_means_what_was_encoded_into_it(
        user in name(), password in password(), host in host(), port in 1..=u16::MAX, name in name(),
    ) {
        let url = format!(
            "postgres://{}:{}@{}:{port}/{}",
            encoded(&user), encoded(&password), in_a_url(&host), encoded(&name),
        );
        let environment = [("DATABASE_URL", url.as_str())];
        let config = serve("", &environment);
        let by_itself = serve("", &[("DB_HOST", &host)]).postgres.host;
        prop_assert_eq!(config.postgres.host.parse::<IpAddr>().ok(), by_itself.parse().ok());
        prop_assert!(by_itself.contains(':') || config.postgres.host == by_itself);
        prop_assert_eq!(config.postgres.port, port);
        prop_assert_eq!(&config.postgres.user, &user);
        prop_assert_eq!(&config.postgres.database, &name);
        prop_assert_eq!(config.postgres.password.as_ref().expect("a password").expose(), &*password);
        let listing = listed(&environment).expect("settings");
        prop_assert!(!format!("{config:?}{listing}").contains(CANARY), "{listing}");
    }

    #[test]
    fn redis_url_means_what_was_encoded_into_it(
        user in prop_oneof![Just(String::new()), name()],
        password in password(), host in host(), port in 1..=u16::MAX, database in any::<u32>(),
    ) {
        let url = format!(
            "redis://{}:{}@{}:{port}/{database}",
            encoded(&user), encoded(&password), in_a_url(&host),
        );
        let environment = [("REDIS_URL", url.as_str())];
        let config = serve("", &environment);
        prop_assert_eq!(config.redis.port, port);
        prop_assert_eq!(config.redis.username.as_deref().unwrap_or_default(), &*user);
        prop_assert_eq!(config.redis.database, i64::from(database));
        prop_assert_eq!(config.redis.password.as_ref().expect("a password").expose(), &*password);
        let listing = listed(&environment).expect("settings");
        prop_assert!(!format!("{config:?}{listing}").contains(CANARY), "{listing}");
    }

    #[test]
    fn password_that_was_not_encoded_is_not_taken_for_something_else(
        before in prop_oneof!["[0-9]{0,2}[/?#@:&=%]{0,2}", text()],
        after in text(),
        with_a_path in any::<bool>(),
    ) {
        let password = format!("{before}{CANARY}{after}");
        let (database, number) = if with_a_path { ("/visitas", "/1") } else { ("", "") };
        for (variable, url) in [
            ("DATABASE_URL", format!("postgres://ana:{password}@db{database}")),
            ("REDIS_URL", format!("redis://ana:{password}@cache{number}")),
            ("REDIS_URL", format!("redis://:{password}@cache{number}")),
        ] {
            let environment = [(variable, url.as_str())];
            let shown = match listed(&environment) {
                Ok(listing) => format!("{listing}{:?}", serve("", &environment)),
                Err(line) => line,
            };
            prop_assert!(!shown.contains(CANARY), "{shown}");
        }
    }

    #[test]
    fn password_of_a_url_in_another_setting_is_hidden(
        scheme in prop_oneof![Just(""), Just("postgres://"), Just("redis://")],
        before in text(), after in text(), rest in text(),
    ) {
        // Without a scheme of its own, what precedes the first :// is one.
        let after = if scheme.is_empty() { after.replace("//", "") } else { after };
        let shown = displayed(&format!("{scheme}{before}{CANARY}{after}@{rest}"));
        prop_assert!(!shown.contains(CANARY), "{shown}");
        prop_assert!(!shown.contains(char::is_control), "{shown:?}");
    }

    #[test]
    fn settings_as_they_are_listed_are_the_settings_that_were_given(
        host in host(), port in 1..=u16::MAX, user in name(), service in name(),
        address in any::<(IpAddr, u16)>(), idle in 100_u64..3_600_000, capacity in 1..=1_000_000_usize,
        ratio in 0.0..=1.0_f64,
    ) {
        let attributes = format!("service.name={},team=a%2Cb", encoded(service.trim()));
        let given = [
            ("DB_HOST", host), ("DB_PORT", port.to_string()), ("DB_USER", user.trim().to_owned()),
            ("BIND_ADDR", SocketAddr::from(address).to_string()),
            ("IDLE_TIMEOUT", in_words(Duration::from_millis(idle))),
            ("QUEUE_CAPACITY", capacity.to_string()),
            ("OTEL_TRACES_SAMPLER", "traceidratio".to_owned()),
            ("OTEL_TRACES_SAMPLER_ARG", ratio.to_string()),
            ("OTEL_RESOURCE_ATTRIBUTES", attributes),
        ];
        let given = given.each_ref().map(|(variable, value)| (*variable, value.as_str()));
        let again = given_again(&listed(&given).expect("settings"));
        let again: Vec<_> = again.iter().map(|(name, value)| (&**name, &**value)).collect();
        let (first, second) = (serve("", &given), serve("", &again));
        prop_assert_eq!(first.http.idle_timeout, Duration::from_millis(idle));
        prop_assert_eq!(first.http.bind_addr, SocketAddr::from(address));
        prop_assert_eq!(format!("{first:?}"), format!("{second:?}"));
    }

    #[test]
    fn duration_is_a_number_with_a_unit_within_bounds(
        number in prop_oneof![0..10_000_u64, any::<u64>()],
        (unit, milliseconds) in select(&[("ms", 1), ("s", 1_000), ("m", 60_000), ("h", 3_600_000_u64)][..]),
    ) {
        let (min, max) = (Duration::from_millis(10), Duration::from_hours(1));
        let expected = number.checked_mul(milliseconds).map(Duration::from_millis);
        let expected = expected.filter(|duration| (min..=max).contains(duration));
        let parsed = Durations { min, max }.parse(&format!("{number}{unit}"));
        prop_assert_eq!(parsed.ok(), expected);
    }

    #[test]
    fn duration_in_words_is_that_duration(
        number in 0..100_000_u64,
        unit in select(&[1, 1_000, 60_000, 3_600_000_u64][..]),
    ) {
        let (min, max) = (Duration::ZERO, Duration::MAX);
        let duration = Duration::from_millis(number * unit);
        prop_assert_eq!(Durations { min, max }.parse(&in_words(duration)).ok(), Some(duration));
    }

    #[test]
    fn host_that_is_accepted_is_one_name_or_one_address(text in text()) {
        if let Ok(host) = (Host { sockets: false }).parse(&text) {
            let url = format!("http://{}/", in_a_url(&host));
            prop_assert!(url.parse::<http::Uri>().is_ok(), "{host}");
            prop_assert!(!host.contains(['/', '@', '[', ']', ' ']), "{host}");
        }
    }

    #[test]
    fn pairs_mean_what_was_encoded_into_them(
        pairs in prop::collection::btree_map(text().prop_filter("a key", |key| !key.is_empty()), text(), 1..5),
    ) {
        let text: Vec<_> = pairs
            .iter()
            .map(|(key, value)| format!(" {}={} ", encoded(key), encoded(value)))
            .collect();
        let parsed = Pairs.parse(&text.join(","));
        prop_assert_eq!(parsed.ok(), Some(Vec::from_iter(pairs)));
    }

    #[test]
    fn headers_that_are_accepted_can_be_sent(text in text(), value in text()) {
        let token = format!("authorization={}", encoded(&value));
        for text in [text, token] {
            for (name, value) in Headers.parse(&text).unwrap_or_default() {
                prop_assert!(http::HeaderName::from_bytes(name.as_bytes()).is_ok());
                prop_assert!(http::HeaderValue::from_str(value.expose()).is_ok());
            }
        }
    }

    #[test]
    fn decoding_undoes_encoding_and_refuses_what_no_encoding_makes(original in text(), raw in text()) {
        prop_assert_eq!(percent_decoded(&encoded(&original)).ok(), Some(original));
        let reference = percent_encoding::percent_decode_str(&raw).decode_utf8().ok();
        match percent_decoded(&raw) {
            Ok(decoded) => prop_assert_eq!(reference.as_deref(), Some(&*decoded)),
            Err(_) => prop_assert!(raw.contains('%')),
        }
    }

    #[test]
    fn health_is_asked_only_at_an_http_url_with_a_host(text in text(), host in host()) {
        let url = format!("http://{}/health", in_a_url(&host));
        prop_assert!(healthcheck_url(&url).is_ok(), "{url}");
        match healthcheck_url(&text) {
            Ok(url) => prop_assert!(url.scheme_str() == Some("http") && url.host().is_some()),
            Err(error) => prop_assert!(error.to_string().starts_with("--url=")),
        }
    }
}
