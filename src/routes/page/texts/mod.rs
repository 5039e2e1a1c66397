//! Every word of the page that a visitor reads, in one file for each language.
//!
//! Must not know: where a text stands on the page.

mod en;
mod pt;

use super::view::Language;

/// The page's texts in one language.
#[derive(Debug)]
pub(super) struct Texts {
    pub(super) title: &'static str,
    pub(super) your_visit: &'static str,
    pub(super) not_recorded: &'static str,
    pub(super) other_language: &'static str,
}

impl Texts {
    pub(super) fn of(language: Language) -> &'static Self {
        match language {
            Language::English => &en::TEXTS,
            Language::Portuguese => &pt::TEXTS,
        }
    }
}
