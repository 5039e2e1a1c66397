//! How the page writes words, times and sizes of numbers in each language. The sentences themselves
//! stand in `templates/page.html`, both languages side by side, so that neither can be forgotten.
//!
//! Must not know: what a text is about.

use time::OffsetDateTime;

use crate::routes::language::Language;

impl Language {
    /// The text of this language.
    pub(super) const fn say(self, english: &'static str, portuguese: &'static str) -> &'static str {
        match self {
            Self::English => english,
            Self::Portuguese => portuguese,
        }
    }

    /// A number with at most one place, and none from ten up.
    pub(super) fn rate(self, number: f64) -> String {
        let tenths = whole(10.0 * number);
        if number >= 10.0 || tenths % 10 == 0 {
            self.number(whole(number))
        } else {
            self.milliseconds(number)
        }
    }

    /// Milliseconds in two or three digits, with the unit.
    pub(super) fn duration(self, milliseconds: f64) -> String {
        let number = if milliseconds >= 100.0 {
            self.number(whole(milliseconds))
        } else if milliseconds >= 0.1 || milliseconds == 0.0 {
            self.milliseconds(milliseconds)
        } else {
            format!("< {}", self.milliseconds(0.1))
        };
        format!("{number}\u{a0}ms")
    }
}

/// A time as a machine reads it, in the attribute of `<time>`.
pub(super) fn machine(moment: &OffsetDateTime) -> String {
    let (date, (hour, minute, second)) = (moment.date(), moment.to_hms());
    format!("{date}T{hour:02}:{minute:02}:{second:02}Z")
}

/// A time as a person reads it, with the date unless it is the date of `now`. In UTC, because the
/// service cannot know the reader's time zone; the page's script rewrites it.
pub(super) fn clock(moment: &OffsetDateTime, now: &OffsetDateTime) -> String {
    let (hour, minute, second) = moment.to_hms();
    let time = format!("{hour:02}:{minute:02}:{second:02}\u{a0}UTC");
    if moment.date() == now.date() {
        time
    } else {
        format!("{} {time}", moment.date())
    }
}

/// A time on the charts' axis, in UTC.
pub(super) fn hour_and_minute(moment: &OffsetDateTime) -> String {
    format!("{:02}:{:02}", moment.hour(), moment.minute())
}

/// How large a number is printed: by its digits, so that the longest fits on a phone.
pub(super) fn size(number: i64) -> &'static str {
    match number {
        ..10_000_000 => "digits-7",
        10_000_000..10_000_000_000 => "digits-10",
        10_000_000_000..10_000_000_000_000 => "digits-13",
        _ => "digits-19",
    }
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "a float is cut at the bounds of i64"
)]
fn whole(number: f64) -> i64 {
    number.round() as i64
}

#[cfg(test)]
mod tests {
    use time::macros::datetime;

    use super::*;

    #[test]
    fn few_visits_a_second_have_a_place() {
        assert_eq!(Language::English.rate(0.0), "0");
        assert_eq!(Language::English.rate(0.2), "0.2");
        assert_eq!(Language::English.rate(2.0), "2");
        assert_eq!(Language::Portuguese.rate(9.8), "9,8");
        assert_eq!(Language::Portuguese.rate(12_345.4), "12.345");
    }

    #[test]
    fn durations_have_their_unit() {
        assert_eq!(Language::English.duration(0.0), "0.0\u{a0}ms");
        assert_eq!(Language::Portuguese.duration(0.04), "< 0,1\u{a0}ms");
        assert_eq!(Language::Portuguese.duration(1.84), "1,8\u{a0}ms");
        assert_eq!(Language::English.duration(1999.6), "2,000\u{a0}ms");
    }

    #[test]
    fn times_of_another_day_have_their_date() {
        let now = datetime!(2026-11-26 00:00:09 UTC);
        assert_eq!(clock(&now, &now), "00:00:09\u{a0}UTC");
        let before = datetime!(2026-11-25 23:59:59 UTC);
        assert_eq!(clock(&before, &now), "2026-11-25 23:59:59\u{a0}UTC");
        assert_eq!(machine(&before), "2026-11-25T23:59:59Z");
    }
}
