//! The arithmetic of a measurement: medians, spreads and ratios. Knows nothing of what is measured.

use std::fmt;

/// Several rounds of one figure.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    /// The middle one.
    pub median: f64,
    /// The lowest.
    pub min: f64,
    /// The highest.
    pub max: f64,
}

impl Spread {
    /// Without rounds, all three are not a number.
    pub fn new(values: impl IntoIterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let middle = values.len() / 2;
        let median = match values.len() {
            0 => f64::NAN,
            odd if odd % 2 == 1 => values[middle],
            _ => f64::midpoint(values[middle - 1], values[middle]),
        };
        Self {
            median,
            min: values.first().copied().unwrap_or(f64::NAN),
            max: values.last().copied().unwrap_or(f64::NAN),
        }
    }

    /// The ratio of two figures in each round. Both figures of a round saw the same speed of the
    /// machine.
    pub fn ratio(of: &[f64], to: &[f64]) -> Self {
        Self::new(of.iter().zip(to).map(|(of, to)| of / to))
    }

    /// Formats median, lowest and highest with the unit's function.
    pub fn format_with(&self, write: impl Fn(f64) -> String) -> String {
        format!(
            "{} ({} – {})",
            write(self.median),
            write(self.min),
            write(self.max)
        )
    }
}

/// Formats a whole number with separated thousands: `46 123`. Below ten it keeps one decimal.
pub fn grouped(number: f64) -> String {
    if !number.is_finite() {
        return "–".to_owned();
    }
    if number.abs() < 9.95 && number.fract() != 0.0 {
        return format!("{number:.1}");
    }
    let digits = format!("{number:.0}");
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(' ');
        }
        text.push(digit);
    }
    text
}

/// Formats a ratio: two decimals below a hundred, none above.
pub fn ratio(number: f64) -> String {
    if number < 100.0 {
        format!("{number:.2}")
    } else {
        grouped(number)
    }
}

/// Formats seconds as milliseconds.
pub fn milliseconds(seconds: f64) -> String {
    let milliseconds = seconds * 1e3;
    match milliseconds {
        ..0.1 => format!("{milliseconds:.3} ms"),
        ..100.0 => format!("{milliseconds:.2} ms"),
        _ => format!("{} ms", grouped(milliseconds)),
    }
}

/// Bytes, in units of 2^20.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Mebibytes(
    /// The number of mebibytes.
    pub f64,
);

impl Mebibytes {
    /// Converts from units of 2^10 bytes.
    pub fn from_kibibytes(kibibytes: u64) -> Self {
        Self(kibibytes as f64 / 1024.0)
    }
}

impl fmt::Display for Mebibytes {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_finite() {
            write!(formatter, "{:.1} MiB", self.0)
        } else {
            formatter.write_str("–")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spread(min: f64, median: f64, max: f64) -> Spread {
        Spread { median, min, max }
    }

    #[test]
    fn median_of_an_odd_number_of_rounds_is_the_middle_one() {
        let measured = Spread::new([30.0, 10.0, 1000.0]);
        assert_eq!(measured, spread(10.0, 30.0, 1000.0));
    }

    #[test]
    fn median_of_an_even_number_of_rounds_lies_between_the_middle_two() {
        let measured = Spread::new([4.0, 1.0, 3.0, 100.0]);
        assert_eq!(measured, spread(1.0, 3.5, 100.0));
    }

    #[test]
    fn spread_of_nothing_is_not_a_number() {
        assert!(Spread::new([]).median.is_nan());
    }

    #[test]
    fn ratio_compares_round_with_round() {
        // The medians' ratio would be 61 %: the machine was twice as fast in the second round.
        let measured = Spread::ratio(&[60.0, 120.0, 61.0], &[100.0, 200.0, 61.0]);
        assert_eq!(measured, spread(0.6, 0.6, 1.0));
    }

    #[test]
    fn numbers_are_written_with_their_thousands_apart() {
        let written = [2.25, 42.0, 999.6, 46_123.4, 1_234_567.0, f64::NAN].map(grouped);
        assert_eq!(written, ["2.2", "42", "1 000", "46 123", "1 234 567", "–"]);
    }
}
