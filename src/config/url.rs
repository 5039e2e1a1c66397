//! Splits the URLs of stores into their parts, nearly as libpq does.
//!
//! A password that was not percent-encoded can look like a host, a path or a query. The user and
//! the password end at the last @ before the first slash, where libpq takes the first @: what it
//! then takes for a host has an @, which no host has. No @ may stand behind them unless it is
//! encoded, so nothing behind them belongs to a password. No error from here repeats any part of a
//! URL. Must not know: which setting a part sets.

use super::value::{Accept, Pairs, Secret, percent_decoded};

/// A store's URL, taken apart and decoded.
pub(super) struct StoreUrl {
    /// In lower case.
    pub(super) scheme: String,
    pub(super) user: Option<String>,
    /// Empty if nothing follows the colon.
    pub(super) password: Option<Secret>,
    pub(super) host: Option<String>,
    pub(super) port: Option<String>,
    pub(super) query: Pairs,
    pub(super) fragment: Option<String>,
    /// The path as it was written, without the slash before it and one at its end.
    path: String,
    /// The URL up to its query as it was written, without the password.
    written: String,
}

/// Why a URL of several hosts is refused.
pub(super) const SEVERAL_HOSTS: &str = "names several hosts, and the service uses one: expected \
    the server that accepts writes, or a name that leads to it";

const UNENCODED: &str = "has an @ that can belong to the password (in a password, encode @ as %40, \
    / as %2F, ? as %3F and # as %23)";

impl StoreUrl {
    /// Splits a URL.
    ///
    /// # Errors
    /// Why the URL is refused, to follow the variable's name.
    pub(super) fn parse(url: &Secret) -> Result<Self, String> {
        let text = alone(url.expose());
        let (scheme, rest) = text.split_once("://").ok_or("is not a URL")?;
        let is_scheme = |byte: u8| byte.is_ascii_alphanumeric() || b"+-.:".contains(&byte);
        if !scheme.bytes().all(is_scheme) {
            return Err(
                "has more than a URL, such as a command before it: expected the URL alone"
                    .to_owned(),
            );
        }
        if text.contains(|character: char| character == ' ' || character.is_control()) {
            return Err("has a blank or a control character (encode a blank as %20)".to_owned());
        }
        let (login, rest) = split_login(rest)?;
        let (before_fragment, fragment) = split_off(rest, '#');
        let (before_query, query) = split_off(before_fragment, '?');
        let (authority, path) = split_off(before_query, '/');
        let (host, port) = split_port(authority)?;
        let (user, password) = login.map_or((None, None), |login| {
            let (user, password) = split_off(login, ':');
            (Some(user), password)
        });
        if user.is_some_and(|user| user.contains(['?', '#', '[', ']'])) {
            return Err(UNENCODED.to_owned());
        }
        let mask = password.map_or(String::new(), |_| format!(":{}", Secret::MASK));
        let login = user.map_or(String::new(), |user| format!("{user}{mask}@"));
        let written = format!("{scheme}://{login}{before_query}");
        let decoded_unless_empty = |text: Option<&str>| match text {
            None | Some("") => Ok(None),
            Some(text) => decoded(text).map(Some),
        };
        Ok(Self {
            scheme: scheme.to_ascii_lowercase(),
            user: decoded_unless_empty(user)?,
            password: password.map(decoded).transpose()?.map(Secret::from),
            host: decoded_unless_empty(Some(host))?,
            port: port.filter(|port| !port.is_empty()).map(str::to_owned),
            query: pairs(query.unwrap_or_default())?,
            fragment: fragment.map(str::to_owned),
            path: without_slash(path.unwrap_or_default()).to_owned(),
            written,
        })
    }

    /// The path as the name of a database.
    ///
    /// # Errors
    /// If it has more than one segment.
    pub(super) fn database(&self) -> Result<Option<String>, String> {
        if self.path.contains('/') {
            return Err("has a second / in its path (encode / as %2F)".to_owned());
        }
        // A parameter taken for a name would be lost, and shown.
        if self.path.contains(['&', '=']) {
            return Err(
                "has a parameter in its path: parameters begin with ? (encode & as %26, = as %3D)"
                    .to_owned(),
            );
        }
        let name = Some(&self.path).filter(|name| !name.is_empty());
        name.map(|name| decoded(name)).transpose()
    }

    /// The path as the path of a file.
    ///
    /// # Errors
    /// If it cannot be decoded.
    pub(super) fn file(&self) -> Result<String, String> {
        decoded(&self.path).map(|path| format!("/{path}"))
    }

    /// The URL without its password and without the values of the parameters that `shows` refuses.
    pub(super) fn masked(&self, shows: impl Fn(&str) -> bool) -> String {
        let mut masked = self.written.clone();
        for (number, (name, value)) in self.query.iter().enumerate() {
            masked.push(if number == 0 { '?' } else { '&' });
            masked += name;
            masked.push('=');
            masked += if shows(name) { value } else { Secret::MASK };
        }
        masked
    }
}

/// Reads a part with the rules of the setting that it sets.
///
/// # Errors
/// What is accepted, without the part.
pub(super) fn read_part<T>(variable: &str, part: &str, accept: &Accept<T>) -> Result<T, String> {
    let refused = |expected| format!("has a part for {variable} that is not accepted: {expected}");
    accept.read(part).map_err(refused)
}

/// A URL without the blanks and the quotes that were copied with it.
fn alone(text: &str) -> &str {
    let text = text.trim();
    let quoted = |quote| text.strip_prefix(quote)?.strip_suffix(quote);
    quoted('\'').or_else(|| quoted('"')).unwrap_or(text)
}

fn without_slash(path: &str) -> &str {
    path.strip_suffix('/').unwrap_or(path)
}

/// Splits user and password from what follows them.
fn split_login(text: &str) -> Result<(Option<&str>, &str), String> {
    let (before_slash, _) = split_off(text, '/');
    let Some(last) = before_slash.rfind('@') else {
        if text.contains('@') {
            return Err(UNENCODED.to_owned());
        }
        return Ok((None, text));
    };
    let first = before_slash.find('@').unwrap_or(last);
    let (login, rest) = (&text[..last], &text[last + 1..]);
    // With a ? between two @ the password can end at either.
    if rest.contains('@') || login[first..].contains(['?', '#']) {
        return Err(UNENCODED.to_owned());
    }
    Ok((Some(login), rest))
}

/// Splits a host, in brackets if it is an IPv6 address, from the port.
fn split_port(authority: &str) -> Result<(&str, Option<&str>), String> {
    if authority.contains(',') {
        return Err(SEVERAL_HOSTS.to_owned());
    }
    if authority.starts_with('[') && authority.contains('%') {
        return Err(
            "has an IPv6 address with a zone such as %eth0, which is not supported: expected an \
             address without a zone, or a host name"
                .to_owned(),
        );
    }
    if !authority.starts_with('[') && authority.matches(':').count() > 1 {
        return Err(
            "has more than one : in its host (an IPv6 address stands in brackets, as in \
             [::1]:5432; in a password, encode @ as %40 and : as %3A)"
                .to_owned(),
        );
    }
    let end_of_host = match authority.find(']') {
        Some(bracket) if authority.starts_with('[') => bracket + 1,
        _ => authority.find(':').unwrap_or(authority.len()),
    };
    let (host, port) = authority.split_at(end_of_host);
    let port = match port.strip_prefix(':') {
        None if port.is_empty() => None,
        Some(port) if port.bytes().all(|byte| byte.is_ascii_digit()) => Some(port),
        _ => {
            return Err(
                "has a port that is not a number (or a password that is not percent-encoded)"
                    .to_owned(),
            );
        }
    };
    Ok((host, port))
}

/// The text before the first `separator`, and the text after it if there is one.
fn split_off(text: &str, separator: char) -> (&str, Option<&str>) {
    match text.split_once(separator) {
        Some((before, after)) => (before, Some(after)),
        None => (text, None),
    }
}

fn pairs(query: &str) -> Result<Pairs, String> {
    let mut pairs = Pairs::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = split_off(pair, '=');
        let pair = (decoded(name)?, decoded(value.unwrap_or_default())?);
        if pairs.contains(&pair) {
            continue;
        }
        if pairs.iter().any(|(earlier, _)| *earlier == pair.0) {
            return Err("has a query parameter twice, with two values".to_owned());
        }
        pairs.push(pair);
    }
    Ok(pairs)
}

fn decoded(text: &str) -> Result<String, String> {
    let text = percent_decoded(text)?;
    if text.contains('\0') {
        return Err("contains %00".to_owned());
    }
    Ok(text)
}
