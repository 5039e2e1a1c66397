//! Splits the URLs of stores into their parts.
//!
//! No error from here repeats any part of a URL: a part that looks like a host can belong to a
//! password that was not percent-encoded. Must not know: which setting a part sets.

use std::collections::BTreeSet;

use url::Url;

use super::value::{Pairs, Secret, percent_decoded};

/// A store's URL, taken apart and decoded.
pub(super) struct StoreUrl {
    pub(super) scheme: String,
    pub(super) user: Option<String>,
    pub(super) password: Option<Secret>,
    pub(super) host: String,
    pub(super) port: Option<u16>,
    /// The database.
    pub(super) path: Option<String>,
    pub(super) query: Pairs,
    /// The URL without its password.
    pub(super) masked: String,
}

impl StoreUrl {
    /// Splits a URL.
    ///
    /// # Errors
    /// Why the URL is refused, to follow the variable's name.
    pub(super) fn parse(url: &Secret, schemes: &[&str]) -> Result<Self, String> {
        let text = url.expose();
        let not_a_url = || format!("is not a {}:// URL", schemes.join(":// or "));
        let url = Url::parse(text).map_err(|error| match error {
            url::ParseError::InvalidPort => {
                "has a port that is not a number (or a password that is not percent-encoded)"
                    .to_owned()
            }
            _ => not_a_url(),
        })?;
        let has_blanks =
            text.contains(|character: char| character.is_whitespace() || character.is_control());
        if has_blanks || !schemes.contains(&url.scheme()) {
            return Err(not_a_url());
        }
        if url.fragment().is_some() {
            return Err("has a fragment (in a password, encode # as %23)".to_owned());
        }
        if url.path().contains('@') || url.path().matches('/').count() > 1 {
            return Err(
                "has an @ or a second / in its path (in a password, encode @ as %40 and / as %2F)"
                    .to_owned(),
            );
        }
        let query: Pairs = url.query_pairs().into_owned().collect();
        let names: BTreeSet<&String> = query.iter().map(|(name, _)| name).collect();
        if names.len() < query.len() {
            return Err("has a query parameter twice".to_owned());
        }
        let decoded = |text: &str| match text {
            "" => Ok(None),
            text => percent_decoded(text).map(Some),
        };
        // A URL that cannot have a password has no host either.
        let mut masked = url.clone();
        if url.password().is_some() && masked.set_password(Some(Secret::MASK)).is_err() {
            return Err(not_a_url());
        }
        Ok(Self {
            scheme: url.scheme().to_owned(),
            user: decoded(url.username())?,
            password: decoded(url.password().unwrap_or_default())?.map(Secret::from),
            host: decoded(url.host_str().unwrap_or_default())?.ok_or("has no host")?,
            port: url.port(),
            path: decoded(url.path().trim_start_matches('/'))?,
            query,
            masked: masked.into(),
        })
    }
}
