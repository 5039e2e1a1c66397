//! The program, run to its end, and what it left behind.

use std::process::Stdio;

use super::{SOON, program};

/// A run that is over.
#[derive(Debug)]
pub(crate) struct Ended {
    /// The exit status; `None` after a signal.
    pub(crate) code: Option<i32>,
    pub(crate) output: String,
    pub(crate) errors: String,
}

impl Ended {
    /// Runs the program with these settings alone until it ends by itself.
    pub(crate) async fn of(arguments: &[&str], settings: &[(String, String)]) -> Self {
        let mut command = tokio::process::Command::from(program(arguments, settings));
        command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        let ended = tokio::time::timeout(SOON, command.output()).await;
        let ended = ended
            .unwrap_or_else(|_| panic!("{arguments:?} goes on"))
            .expect("the program starts");
        let text = |bytes| String::from_utf8(bytes).expect("text");
        Self {
            code: ended.status.code(),
            output: text(ended.stdout),
            errors: text(ended.stderr),
        }
    }

    /// The one line of a failure.
    pub(crate) fn error(&self) -> &str {
        let line = self.errors.strip_suffix('\n').expect("a line");
        assert!(!line.contains('\n'), "more than a line: {line}");
        line
    }
}

/// Settings as [`Ended::of`] and [`super::Service::start`] take them.
pub(crate) fn settings(settings: &[(&str, &str)]) -> Vec<(String, String)> {
    settings
        .iter()
        .map(|&(name, value)| (name.to_owned(), value.to_owned()))
        .collect()
}
