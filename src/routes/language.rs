//! The two languages of the page, and how each writes numbers.
//!
//! Must not know: how a visitor chooses a language, and what the page says.

/// The page's language.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Language {
    English,
    Portuguese,
}

impl Language {
    /// The language's tag, for `lang` and `Content-Language`.
    pub(super) const fn tag(self) -> &'static str {
        match self {
            Self::English => "en",
            Self::Portuguese => "pt-BR",
        }
    }

    /// A whole number with its digits in groups of three.
    pub(super) fn number(self, number: i64) -> String {
        let separator = match self {
            Self::English => ',',
            Self::Portuguese => '.',
        };
        let digits = number.unsigned_abs().to_string();
        let mut text = String::from(if number < 0 { "-" } else { "" });
        for (place, digit) in digits.char_indices() {
            if place > 0 && (digits.len() - place).is_multiple_of(3) {
                text.push(separator);
            }
            text.push(digit);
        }
        text
    }

    /// A number of milliseconds with one place.
    pub(super) fn milliseconds(self, milliseconds: f64) -> String {
        let text = format!("{milliseconds:.1}");
        match self {
            Self::English => text,
            Self::Portuguese => text.replace('.', ","),
        }
    }
}
