//! Names for the words of the page that a visitor reads; `english` and `portuguese` have the words.
//!
//! Must not know: where a text stands on the page.

/// The page's texts in one language.
#[derive(Debug)]
pub(super) struct Texts {
    pub(super) title: &'static str,
    pub(super) your_visit: &'static str,
    pub(super) not_recorded: &'static str,
    pub(super) other_language: &'static str,
}
