//! How this crate's property tests run.
//!
//! Must not know: any property.

use proptest::test_runner::Config;

/// 256 cases, or `PROPTEST_CASES`. A failing case is printed, shrunk, and kept in no file.
pub(crate) fn property_config() -> Config {
    Config {
        failure_persistence: None,
        ..Config::default()
    }
}
