//! What a request asks for by its headers: a format, a language, or a page that no person has opened
//! yet (RFC 9110, section 12; Fetch, section 2.2.5 on `Sec-Purpose`).
//!
//! Must not know: how a response is made.

use http::header::{ACCEPT, ACCEPT_LANGUAGE};
use http::{HeaderMap, HeaderName, HeaderValue};
use mediatype::{MediaType, Name, ReadParams as _};

use super::language::Language;

/// What a request asks for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Wanted {
    /// The language of the page, for a request that prefers it to JSON.
    pub(super) page: Option<Language>,
    /// Whether this is a prefetch or a prerender: no person has opened the page yet.
    pub(super) prefetch: bool,
}

impl Wanted {
    /// Reads what a request asks for, in one pass over its headers unless it names HTML. Allocates
    /// nothing.
    pub(super) fn by(headers: &HeaderMap) -> Self {
        let (mut names_html, mut prefetch) = (false, false);
        for (name, value) in headers {
            match name.as_str() {
                "accept" => names_html |= names_text(value),
                // The others are what browsers sent before there was `Sec-Purpose`.
                "sec-purpose" | "purpose" | "x-moz" => prefetch |= is_prefetch(value),
                _ => {}
            }
        }
        let prefers_html = names_html && prefers_html(headers);
        Self {
            page: prefers_html.then(|| language(headers)),
            prefetch,
        }
    }
}

/// How much a client wants a media range, from 0 (not at all) to 1.
pub(super) fn weight(media: &MediaType<'_>) -> f32 {
    media
        .get_param(Name::new_unchecked("q"))
        .map_or(Some(1.0), |weight| weight.as_str().parse().ok())
        .unwrap_or(0.0)
}

/// The media ranges of all `Accept` lines. What is no media range is left out.
pub(super) fn accepted(headers: &HeaderMap) -> impl Iterator<Item = MediaType<'_>> {
    let lines = headers.get_all(ACCEPT).into_iter();
    let ranges = lines.flat_map(|line| readable(line.as_bytes().split(unquoted_comma())));
    ranges.filter_map(|range| MediaType::parse(range).ok())
}

/// The elements of all lines of a header whose elements have no quoted strings.
pub(super) fn elements(headers: &HeaderMap, name: HeaderName) -> impl Iterator<Item = &str> {
    let lines = headers.get_all(name).into_iter();
    lines.flat_map(|line| readable(line.as_bytes().split(|byte| *byte == b',')))
}

/// The elements of a list that are ASCII, without the white space around them. A byte beyond ASCII,
/// which HTTP allows in a header (`obs-text`; RFC 9110, section 5.5), costs the element that has it
/// and no other.
fn readable<'a>(elements: impl Iterator<Item = &'a [u8]>) -> impl Iterator<Item = &'a str> {
    elements
        .filter(|element| element.is_ascii())
        .filter_map(|element| std::str::from_utf8(element.trim_ascii()).ok())
}

/// Tells which commas separate elements: those outside of quoted strings. Wants each byte of a line
/// in turn.
fn unquoted_comma() -> impl FnMut(&u8) -> bool {
    let (mut is_quoted, mut is_escaped) = (false, false);
    move |byte| {
        match byte {
            _ if is_escaped => is_escaped = false,
            b'\\' if is_quoted => is_escaped = true,
            b'"' => is_quoted = !is_quoted,
            _ => return *byte == b',' && !is_quoted,
        }
        false
    }
}

/// Whether a line of `Accept` can name `text/html`: whether it has `text/`.
fn names_text(line: &HeaderValue) -> bool {
    let text = b"text/";
    let mut parts = line.as_bytes().windows(text.len());
    parts.any(|part| part.eq_ignore_ascii_case(text))
}

/// Whether a client names HTML, by itself or as `text/*`, and prefers it to JSON. Of two ranges that
/// match a type the more specific one counts. At equal weights a client that names only one of the
/// two prefers that one, and one that names both gets JSON.
fn prefers_html(headers: &HeaderMap) -> bool {
    let (mut html, mut json) = (Preference::default(), Preference::default());
    for media in accepted(headers) {
        html.note(&media, "text", "html");
        json.note(&media, "application", "json");
    }
    html.specificity > 0 && html.weight > 0.0 && html.rank() > json.rank()
}

/// How much a client wants one type.
#[derive(Debug, Clone, Copy, Default)]
struct Preference {
    /// Of the range that counts: 3 with a charset, 2 for the type itself, 1 for `main/*`, 0 for
    /// `*/*`.
    specificity: u8,
    weight: f32,
}

impl Preference {
    fn note(&mut self, range: &MediaType<'_>, main: &str, sub: &str) {
        // Every other parameter asks for a variant that there is not.
        let mut others = range.params().filter(|(name, _)| *name != "q");
        let is_charset = |(name, value): (Name<'_>, mediatype::Value<'_>)| {
            name == "charset" && value.unquoted_str().eq_ignore_ascii_case("utf-8")
        };
        let (has_charset, fits) = match (others.next(), others.next()) {
            (None, _) => (false, true),
            (Some(parameter), None) => (true, is_charset(parameter)),
            _ => (true, false),
        };
        let specificity = match (range.ty == main, range.subty == sub) {
            (true, true) if has_charset => 3,
            (true, true) => 2,
            (true, false) if range.subty == "*" => 1,
            (false, _) if range.ty == "*" && range.subty == "*" => 0,
            _ => return,
        };
        if !fits || specificity < self.specificity {
            return;
        }
        // A range that is listed twice counts as often as it is wanted most.
        let listed = if specificity == self.specificity {
            self.weight
        } else {
            0.0
        };
        *self = Self {
            specificity,
            weight: weight(range).max(listed),
        };
    }

    /// Larger for the type that is preferred.
    fn rank(self) -> (u16, bool) {
        // Weights have three places (RFC 9110, section 12.4.2).
        let weight = (self.weight.clamp(0.0, 1.0) * 1000.0).round();
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "from 0 to 1000"
        )]
        let weight = weight as u16;
        (weight, self.specificity >= 2)
    }
}

/// Portuguese for a client that prefers it to English, otherwise English.
pub(super) fn language(headers: &HeaderMap) -> Language {
    let (mut portuguese, mut english, mut others) = (None, None, None);
    for range in elements(headers, ACCEPT_LANGUAGE) {
        let (tag, weight) = match range.split_once(';') {
            None => (range, Some(1.0)),
            Some((tag, parameter)) => (tag, parameter_weight(parameter)),
        };
        let primary = tag.trim_ascii().split('-').next().unwrap_or_default();
        let named: &mut Option<f32> = match primary {
            "*" => &mut others,
            primary if primary.eq_ignore_ascii_case("pt") => &mut portuguese,
            primary if primary.eq_ignore_ascii_case("en") => &mut english,
            _ => continue,
        };
        *named = Some(weight.unwrap_or(0.0).max(named.unwrap_or(0.0)));
    }
    let portuguese = portuguese.or(others).unwrap_or(0.0);
    if portuguese > english.or(others).unwrap_or(0.0) {
        Language::Portuguese
    } else {
        Language::English
    }
}

/// The weight in a parameter such as `q=0.5`.
pub(super) fn parameter_weight(parameter: &str) -> Option<f32> {
    let (_q, weight) = parameter.trim_ascii().split_once('=')?;
    weight.parse().ok()
}

/// Whether a header's value is the token `prefetch` or `prerender`, with or without parameters such
/// as `;prerender` (RFC 8941, items).
fn is_prefetch(value: &HeaderValue) -> bool {
    readable(value.as_bytes().split(|byte| *byte == b','))
        .map(|item| item.split(';').next().unwrap_or_default().trim_ascii())
        .any(|token| {
            token.eq_ignore_ascii_case("prefetch") || token.eq_ignore_ascii_case("prerender")
        })
}

#[cfg(test)]
mod tests {
    use http::HeaderName;

    use super::*;

    fn headers(lines: &[(HeaderName, &str)]) -> HeaderMap {
        let value = |text: &str| HeaderValue::from_bytes(text.as_bytes()).expect("a value");
        lines
            .iter()
            .map(|(name, text)| (name.clone(), value(text)))
            .collect()
    }

    fn by_accept(lines: &[&str]) -> Option<Language> {
        let lines: Vec<_> = lines.iter().map(|line| (ACCEPT, *line)).collect();
        Wanted::by(&headers(&lines)).page
    }

    fn by_language(lines: &[&str]) -> Language {
        let lines: Vec<_> = lines.iter().map(|line| (ACCEPT_LANGUAGE, *line)).collect();
        language(&headers(&lines))
    }

    #[test]
    fn page_is_for_a_client_that_prefers_html() {
        for accepted in [
            // Chromium, Firefox and Safari.
            "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,\
             image/apng,*/*;q=0.8,application/signed-exchange;v=b3;q=0.7",
            "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8",
            // Internet Explorer, Lynx, and Java.
            "text/html, application/xhtml+xml, */*",
            "text/html, text/plain, text/sgml, text/css, application/xhtml+xml, */*;q=0.01",
            "text/html, image/gif, image/jpeg, *; q=.2, */*; q=.2",
            "text/html",
            "Text/HTML",
            "text/html;charset=UTF-8",
            "text/html; charset=\"utf-8\"",
            "text/html;q=0.001",
            "text/*",
            "text/*, application/json;q=0.9",
            "text/html;q=0.5, application/json;q=0.4",
            "text/html;Q=0.5, application/json;q=0.4",
            "text/html;q=0.5, application/*;q=0.4, */*;q=0.3",
            "text/html;q=0.5, */*;q=0.5",
            "text/html, application/json;q=0",
            "text/html;q=0, text/html",
            "text/*;q=0.2, text/html;q=0.8, application/json;q=0.5",
            "application/json;q=0.2, application/*, text/html;q=0.5",
            "nonsense, text/html",
            "text/html;q=1.000, application/json;q=0.999",
            // A byte beyond ASCII costs the element that has it.
            "a\u{e7}\u{e3}o, text/html",
            "text/html, a\u{e7}\u{e3}o",
            "text/html, application/json\u{e9}",
            "application/json;x=\"\u{e9}, application/json\", text/html",
        ] {
            assert!(by_accept(&[accepted]).is_some(), "{accepted}");
        }
        assert!(by_accept(&["application/json;q=0.5", "text/html"]).is_some());
    }

    #[test]
    fn every_other_client_gets_json() {
        for accepted in [
            "",
            "*/*",
            "*/*, application/xml",
            "application/json",
            "application/json, text/html",
            "text/html, application/json",
            "application/json, text/plain, */*",
            "text/html;q=0.4, application/json",
            "text/html;q=0.4, application/*",
            "text/html;q=0.4, */*",
            "text/html;q=0",
            "text/html;q=0, */*",
            "text/html;q=0, text/*",
            "text/*;q=0.5, */*",
            "text/html;q=much",
            "text/html;q=nan",
            "text/html;q=-1",
            "text/html;level=1",
            "text/html;charset=iso-8859-1",
            "text/html;charset=utf-8;level=1",
            "text/plain",
            "text/htmlx",
            "application/xhtml+xml",
            "text/html\\",
            "\"text/html\"",
            "application/json;x=\"text/html\"",
            "text/html\u{e9}",
            "text/html;charset=\"\u{e9},text/html\"",
            "text/html;charset=\"\\\",text/html\"",
            "text/html, \u{e9}, application/json",
            "text/html;q=0.5, application/json;q=0.500",
        ] {
            assert_eq!(by_accept(&[accepted]), None, "{accepted}");
        }
        assert_eq!(by_accept(&[]), None);
        assert_eq!(by_accept(&["text/html;q=0.5", "*/*"]), None);
    }

    #[test]
    fn portuguese_is_for_a_client_that_prefers_it() {
        for accepted in [
            "pt",
            "pt-BR",
            "PT-br",
            "pt-PT",
            "pt-BR,pt;q=0.9,en-US;q=0.8,en;q=0.7",
            "es, pt;q=0.8, en;q=0.7",
            "fr, pt;q=0.1",
            "en;q=0.5, pt;q=0.6",
            "pt, *;q=0.5",
            "en;q=0, *",
            "pt;q=0.1, pt-BR;q=0.9, en;q=0.5",
            "portugu\u{ea}s, pt",
            "pt, en\u{e9}",
            "en\", pt",
        ] {
            assert_eq!(by_language(&[accepted]), Language::Portuguese, "{accepted}");
        }
        for accepted in [
            "",
            "*",
            "en",
            "en-US,en;q=0.9,pt-BR;q=0.8,pt;q=0.7",
            "pt, en",
            "pt;q=0.5, en;q=0.5",
            "pt;q=0.5, *",
            "pt;q=0",
            "pt;q=nan",
            "pt;q=much",
            "pt;",
            "ptx",
            "fr",
            "x-pt",
            "portugu\u{ea}s",
            "pt\u{e9}, en",
            "pt;q=\u{e9}",
        ] {
            assert_eq!(by_language(&[accepted]), Language::English, "{accepted}");
        }
        assert_eq!(by_language(&[]), Language::English);
        assert_eq!(by_language(&["en;q=0.5", "pt-BR"]), Language::Portuguese);
    }

    #[test]
    fn prefetch_is_told_by_its_purpose() {
        for (name, value) in [
            ("sec-purpose", "prefetch"),
            ("sec-purpose", "prefetch;prerender"),
            ("sec-purpose", "prefetch;anonymous-client-ip"),
            ("sec-purpose", " prefetch ; prerender "),
            ("sec-purpose", "prerender"),
            ("sec-purpose", "preview, prefetch"),
            ("sec-purpose", "pr\u{e9}chargement, prefetch"),
            ("purpose", "prefetch"),
            ("x-moz", "prefetch"),
        ] {
            for accept in ["*/*", "text/html"] {
                let purpose = (HeaderName::from_static(name), value);
                let asked = headers(&[(ACCEPT, accept), purpose]);
                assert!(Wanted::by(&asked).prefetch, "{name}: {value}");
            }
        }
        for value in [
            "",
            "navigate",
            "prefetched",
            "\"prefetch\"",
            ";prefetch",
            "x;prefetch",
        ] {
            let asked = headers(&[(HeaderName::from_static("sec-purpose"), value)]);
            assert!(!Wanted::by(&asked).prefetch, "{value}");
        }
    }
}
