//! Checks that a request names its host as HTTP requires (RFC 9112, section 3.2), and makes the
//! response to a request that does not.
//!
//! Any host is served, as long as the request names exactly one: if a proxy and this service could
//! read different hosts, an attacker could deceive one of them. Must not know: which hosts lead
//! here.

use std::net::Ipv6Addr;

use axum::body::Body;
use axum::response::Response;
use http::header::{CACHE_CONTROL, CONTENT_TYPE, HOST};
use http::{HeaderMap, HeaderValue, StatusCode, Uri, Version};

/// The body of [`bad_request`].
const PROBLEM: &str = r#"{"type":"about:blank","title":"Bad Request","status":400}"#;

/// Whether a request of HTTP/1.1 has exactly one valid `Host`, and one of HTTP/1.0 at most one.
/// A request target in absolute form does not make up for it, and has no user information (RFC
/// 9110, section 4.2.4).
pub(super) fn names_one_host(version: Version, target: &Uri, headers: &HeaderMap) -> bool {
    let mut hosts = headers.get_all(HOST).iter();
    let named = match (hosts.next(), hosts.next()) {
        (None, _) => version == Version::HTTP_10,
        (Some(host), None) => is_valid(host.as_bytes()),
        (Some(_), Some(_)) => false,
    };
    named
        && target
            .authority()
            .is_none_or(|authority| is_valid(authority.as_str().as_bytes()))
}

/// The response to a request that does not name its host. The request never reaches the router,
/// whose layers make the other problem documents.
pub(super) fn bad_request() -> Response {
    let mut response = Response::new(Body::from(PROBLEM));
    *response.status_mut() = StatusCode::BAD_REQUEST;
    let headers = response.headers_mut();
    let problem = HeaderValue::from_static("application/problem+json");
    headers.insert(CONTENT_TYPE, problem);
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

/// `uri-host [ ":" port ]` (RFC 9110, section 7.2, and RFC 3986, section 3.2). A client sends an
/// empty host if its target has no authority.
fn is_valid(value: &[u8]) -> bool {
    if let Some(literal) = value.strip_prefix(b"[") {
        let Some(end) = literal.iter().position(|&byte| byte == b']') else {
            return false;
        };
        return is_ip_literal(&literal[..end]) && is_port(&literal[end + 1..]);
    }
    let end = value.iter().position(|&byte| byte == b':');
    let (name, port) = value.split_at(end.unwrap_or(value.len()));
    is_registered_name(name) && is_port(port)
}

/// Nothing, or a colon and any number of digits, even none.
fn is_port(value: &[u8]) -> bool {
    value
        .split_first()
        .is_none_or(|(&colon, digits)| colon == b':' && digits.iter().all(u8::is_ascii_digit))
}

fn is_registered_name(name: &[u8]) -> bool {
    let mut rest = name;
    while let Some((&byte, after)) = rest.split_first() {
        rest = match after {
            [high, low, after @ ..] if byte == b'%' => {
                if !high.is_ascii_hexdigit() || !low.is_ascii_hexdigit() {
                    return false;
                }
                after
            }
            _ if is_name_byte(byte) => after,
            _ => return false,
        };
    }
    true
}

/// `unreserved` and `sub-delims`.
fn is_name_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=".contains(&byte)
}

/// The text between brackets: an IPv6 address, or one of a later version.
fn is_ip_literal(literal: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(literal) else {
        return false;
    };
    let Some(later) = text.strip_prefix(['v', 'V']) else {
        return text.parse::<Ipv6Addr>().is_ok();
    };
    let is_address_byte = |byte| is_name_byte(byte) || byte == b':';
    later.split_once('.').is_some_and(|(version, address)| {
        !version.is_empty()
            && version.bytes().all(|byte| byte.is_ascii_hexdigit())
            && !address.is_empty()
            && address.bytes().all(is_address_byte)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_of_the_grammar_are_valid() {
        for host in [
            "",
            ":",
            ":80",
            "a",
            "localhost:5000",
            "127.0.0.1",
            "xn--bcher-kva.example.",
            "a_b-c~d!$&'()*+,;=e",
            "b%C3%BCcher",
            "host:",
            "host:65536",
            "[::1]",
            "[::1]:5000",
            "[2001:db8::192.0.2.1]:",
            "[v1.fe80::a+en1]",
        ] {
            assert!(is_valid(host.as_bytes()), "{host}");
        }
    }

    #[test]
    fn hosts_outside_the_grammar_are_not() {
        for host in [
            "a b",
            "a, b",
            "a/b",
            "a?b",
            "a#b",
            "a@b",
            "user:password@host",
            "http://a",
            "a\\b",
            "a:b",
            "a:80:80",
            "a:+80",
            "a:-1",
            "%",
            "%4",
            "%zz",
            "a\tb",
            "b\u{fc}cher",
            "\"a\"",
            "<a>",
            "a|b",
            "::1",
            "[::1",
            "::1]",
            "[]",
            "[::1]a",
            "[::1]:a",
            "[::1%25eth0]",
            "[127.0.0.1]",
            "[a]",
            "[v.a]",
            "[v1.]",
            "[vg.a]",
            "a[::1]",
        ] {
            assert!(!is_valid(host.as_bytes()), "{host}");
        }
    }
}
