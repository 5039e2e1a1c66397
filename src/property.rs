//! How the property tests of this crate run.
//!
//! Knows no property.

use proptest::test_runner::Config;

/// 256 cases, or as many as `PROPTEST_CASES` says. What fails is printed, shrunk; no file keeps it.
pub(crate) fn bounded() -> Config {
    Config {
        failure_persistence: None,
        ..Config::default()
    }
}
