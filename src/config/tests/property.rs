//! Properties of every text that a setting can get, and of every password.

use std::net::{IpAddr, SocketAddr};
use std::os::unix::ffi::OsStringExt as _;
use std::time::Duration;

use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use proptest::prelude::*;
use proptest::sample::select;

use super::*;
use crate::config::telemetry::headers_in;
use crate::config::value::{duration, host, pairs};
use crate::property::property_config;

/// Pieces that have a meaning for some parser, separated by bars.
const PIECES: &str = "postgres|redis|http|://|//|/|@|:|?|#|&|=|,|;|%|%2|%41|%00|%ff|[|]|::1|\\|\"|'| |\
    \t|\r|\n|\0|\u{7}|\u{85}|\u{2028}|é|…|0|1|65535|-|+|.|..|ms|s|h|sslmode|sslrootcert|require|****";

/// Any text, sometimes close to one that a setting accepts.
fn text() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        select(PIECES.split('|').collect::<Vec<_>>()).prop_map(str::to_owned),
        any::<char>().prop_map(String::from),
        "[a-z0-9]{1,4}",
    ];
    prop::collection::vec(piece, 0..10).prop_map(|pieces| pieces.concat())
}

/// Names that Postgres accepts: at most 63 bytes, in any script.
fn name() -> impl Strategy<Value = String> {
    let printable = any::<char>().prop_filter("printable", |character| !character.is_control());
    prop::collection::vec(printable, 1..=15)
        .prop_map(String::from_iter)
        // In a URL's path these segments mean the path itself and its parent.
        .prop_filter("no dots alone", |name| name != "." && name != "..")
}

/// A password in one line that holds the canary.
fn password() -> impl Strategy<Value = String> {
    (text(), text()).prop_map(|(before, after)| {
        format!("{before}{CANARY}{after}").replace(['\0', '\r', '\n'], "")
    })
}

fn host_name() -> impl Strategy<Value = String> {
    prop_oneof![
        "[a-zA-Z0-9._-]{1,20}",
        any::<IpAddr>().prop_map(|address| address.to_string()),
    ]
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

proptest! {
    // Each case reads whole command lines, which takes milliseconds.
    #![proptest_config({ let all = property_config(); ProptestConfig { cases: all.cases / 4, ..all } })]

    #[test]
    fn any_bytes_are_accepted_or_refused_by_the_name_of_the_setting(
        setting in select(Config::augment_args(clap::Command::default()).get_arguments().cloned().collect::<Vec<_>>()),
        bytes in prop_oneof![text().prop_map(String::into_bytes), prop::collection::vec(any::<u8>(), 1..40)],
    ) {
        let mut flag = OsString::from(format!("--{}=", setting.get_long().expect("a flag")));
        let is_text = std::str::from_utf8(&bytes).is_ok();
        flag.push(OsString::from_vec(bytes));
        if let Err(error) = parse(["visitas".into(), flag], &|_| None) {
            let error = error.to_string();
            prop_assert!(!is_text || error.contains(&variable_of(&setting)), "{error}");
            prop_assert!(!error.replace('\n', "").contains(char::is_control), "{error:?}");
            prop_assert!(error.chars().count() < 1500, "{error}");
        }
    }

    #[test]
    fn any_command_line_is_understood_or_refused(
        arguments in prop::collection::vec(
            prop_oneof![
                select(&["serve", "migrate", "config", "healthcheck", "--url", "--help", "-V"][..]).prop_map(OsString::from),
                text().prop_map(OsString::from),
                text().prop_map(|text| OsString::from(format!("--{text}"))),
                prop::collection::vec(any::<u8>(), 0..8).prop_map(OsString::from_vec),
            ],
            0..4,
        ),
    ) {
        let arguments = [OsString::from("visitas")].into_iter().chain(arguments);
        if let Err(error) = parse(arguments, &|_| None) {
            prop_assert!(!error.to_string().replace('\n', "").contains(char::is_control), "{error:?}");
        }
    }

    #[test]
    fn password_of_a_file_is_taken_as_it_is_and_never_shown(
        contents in prop_oneof![
            password().prop_map(String::into_bytes),
            prop::collection::vec(any::<u8>(), 0..20),
            (16_382_usize..16_388).prop_map(|length| vec![b'x'; length]),
        ],
    ) {
        let file = file(&contents);
        let text = String::from_utf8(contents.clone()).ok();
        let line = text.as_deref()
            .map(|text| text.strip_prefix('\u{feff}').unwrap_or(text).trim_end_matches(['\r', '\n']));
        let secret = line.filter(|line| {
            contents.len() <= 16_384 && !line.is_empty() && !line.contains(['\0', '\r', '\n'])
        });
        match (run(&["--redis-password-file", path(&file)]), secret) {
            (Ok(Command::Serve(config)), Some(secret)) => {
                let shown = format!("{config:?}");
                prop_assert!(!shown.contains(CANARY), "{shown}");
                let password = config.redis.redis_password.expect("a password");
                prop_assert_eq!(password.expose(), secret);
            }
            (Err(error), None) => {
                prop_assert!(error.contains("REDIS_PASSWORD") && !error.contains(CANARY), "{error}");
            }
            other => return Err(TestCaseError::fail(format!("{other:?}"))),
        }
    }

    #[test]
    fn url_means_what_was_encoded_into_it(
        user in name(), password in password(), host in host_name(), port in 1..=u16::MAX, name in name(), number in any::<u32>(),
    ) {
        let (user_part, password_part, host_part) = (encoded(&user), encoded(&password), in_a_url(&host));
        let postgres = by_database_url(&format!(
            "postgres://{user_part}:{password_part}@{host_part}:{port}/{}", encoded(&name),
        ));
        let redis = by_redis_url(&format!("redis://{user_part}:{password_part}@{host_part}:{port}/{number}"));
        let redis = redis.expect("a URL");
        for config in [&postgres, &redis] {
            prop_assert!(!format!("{config:?}").contains(CANARY), "{config:?}");
        }
        let (postgres, redis) = (postgres.postgres, redis.redis);
        let by_itself = serve(&[&format!("--db-host={host}")]).postgres.db_host;
        prop_assert_eq!(postgres.db_host.parse::<IpAddr>().ok(), by_itself.parse().ok());
        prop_assert!(by_itself.contains(':') || postgres.db_host == by_itself);
        prop_assert_eq!((postgres.db_port, &postgres.db_user, &postgres.db_name), (port, &user, &name));
        prop_assert_eq!(postgres.db_password.as_ref().map(Secret::expose), Some(&*password));
        prop_assert_eq!((redis.redis_port, redis.database), (port, i64::from(number)));
        prop_assert_eq!(redis.redis_username.as_ref(), Some(&user));
        prop_assert_eq!(redis.redis_password.as_ref().map(Secret::expose), Some(&*password));
    }

    #[test]
    fn password_that_was_not_encoded_is_not_taken_for_something_else(
        before in prop_oneof!["[0-9]{0,2}[/?#@:&=%]{0,2}", text()],
        after in text(),
        with_a_path in any::<bool>(),
    ) {
        let password = format!("{before}{CANARY}{after}");
        let (database, number) = if with_a_path { ("/visitas", "/1") } else { ("", "") };
        for (flag, url) in [
            ("--database-url-file", format!("postgres://ana:{password}@db{database}")),
            ("--redis-url-file", format!("redis://ana:{password}@cache{number}")),
            ("--redis-url-file", format!("redis://:{password}@cache{number}")),
        ] {
            let shown = format!("{:?}", run(&[flag, path(&file(&url))]));
            prop_assert!(!shown.contains(CANARY), "{shown}");
        }
    }

    #[test]
    fn password_of_a_url_in_another_setting_is_hidden(before in text(), after in text(), rest in text()) {
        let shown = displayed(&format!("{before}{CANARY}{after}@{rest}"));
        prop_assert!(!shown.contains(CANARY), "{shown}");
        prop_assert!(!shown.contains(char::is_control), "{shown:?}");
    }

    #[test]
    fn settings_as_they_are_listed_are_the_settings_that_were_given(
        host in host_name(), port in 1..=u16::MAX, user in name(), service in name(),
        address in any::<(IpAddr, u16)>(), idle in 100_u64..3_600_000, ratio in 0.0..=1.0_f64,
    ) {
        let given = [
            format!("--db-host={host}"),
            format!("--db-port={port}"),
            format!("--db-user=u{}", user.trim_end()),
            format!("--bind-addr={}", SocketAddr::from(address)),
            format!("--idle-timeout={idle}ms"),
            "--otel-traces-sampler=traceidratio".to_owned(),
            format!("--otel-traces-sampler-arg={ratio}"),
            format!("--otel-resource-attributes=service.name={},team=a%2Cb", encoded(service.trim())),
        ];
        let first = serve(&given.each_ref().map(String::as_str));
        let again: Vec<String> = first.listing.lines()
            .filter_map(|line| line.strip_suffix(" # flag")?.split_once('='))
            .map(|(variable, value)| {
                format!("--{}={}", variable.to_lowercase().replace('_', "-"), value.trim_end())
            })
            .collect();
        let second = serve(&again.iter().map(String::as_str).collect::<Vec<_>>());
        prop_assert_eq!(first.http.idle_timeout, Duration::from_millis(idle));
        prop_assert_eq!(first.http.listen.bind_addr, SocketAddr::from(address));
        prop_assert_eq!(format!("{first:?}"), format!("{second:?}"));
    }

    #[test]
    fn duration_is_a_number_with_a_unit(
        number in prop_oneof![0..10_000_u64, any::<u64>()],
        (unit, milliseconds) in select(&[("ms", 1), ("s", 1_000), ("m", 60_000), ("h", 3_600_000_u64)][..]),
    ) {
        let expected = number.checked_mul(milliseconds).map(Duration::from_millis);
        prop_assert_eq!(duration(&format!("{number}{unit}")), expected);
    }

    #[test]
    fn host_that_is_accepted_is_one_name_or_one_address(text in text()) {
        if let Some(host) = host(&text) {
            let url = format!("http://{}/", in_a_url(&host));
            prop_assert!(url.parse::<::http::Uri>().is_ok(), "{host}");
            prop_assert!(!host.contains(['/', '@', '[', ']', ' ']), "{host}");
        }
    }

    #[test]
    fn pairs_mean_what_was_encoded_into_them(
        pairs_in in prop::collection::btree_map(text().prop_filter("a key", |key| !key.is_empty()), text(), 1..5),
        raw in text(),
    ) {
        let text: Vec<_> = pairs_in.iter()
            .map(|(key, value)| format!(" {}={} ", encoded(key), encoded(value)))
            .collect();
        prop_assert_eq!(pairs(&text.join(",")).ok(), Some(Vec::from_iter(pairs_in)));
        let reference = percent_encoding::percent_decode_str(&raw).decode_utf8().ok();
        if let Ok([(_, value)]) = pairs(&format!("key={raw}")).as_deref() {
            let reference = reference.as_deref().map(str::trim);
            prop_assert!(raw.contains(',') || raw != raw.trim() || reference == Some(value.trim()));
        }
    }

    #[test]
    fn headers_that_are_accepted_can_be_sent(text in text(), value in text()) {
        let token = format!("authorization={}", encoded(&value));
        for text in [text, token] {
            for (name, value) in headers_in(&text).unwrap_or_default() {
                prop_assert!(::http::HeaderName::from_bytes(name.as_bytes()).is_ok());
                prop_assert!(::http::HeaderValue::from_str(value.expose()).is_ok());
            }
        }
    }
}
