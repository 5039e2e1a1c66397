//! An error and its causes in one line.
//!
//! Must not know: any error.

use std::error::Error;

/// The error and its causes, outermost first. Many errors of drivers end with the text of their own
/// cause, which the line has once nevertheless.
#[must_use]
pub fn line(error: &(dyn Error + 'static)) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(source) = cause {
        let text = source.to_string();
        if !line.ends_with(&text) {
            line.push_str(": ");
            line.push_str(&text);
        }
        cause = source.source();
    }
    line
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("connecting")]
    struct Outer(#[source] Repeating);

    #[derive(Debug, thiserror::Error)]
    #[error("driver failed: {0}")]
    struct Repeating(#[source] io::Error);

    #[test]
    fn text_that_an_error_repeats_from_its_cause_is_there_once() {
        let error = Outer(Repeating(io::Error::other("refused")));
        assert_eq!(line(&error), "connecting: driver failed: refused");
    }
}
