//! The number of connections that each listener can have open, within the limit on open files.
//!
//! Must not know: how connections are accepted.

/// Descriptors for everything that is not a client connection.
const OTHER_FILES: usize = 64;
/// Maximum number of scrapers' connections, if `METRICS_ADDR` gives them a listener of their own.
const SCRAPERS_MAX: usize = 64;

/// The number of connections that each listener can have open. Each connection is an open file, so
/// their sum stays below the limit on open files.
#[derive(Debug, Clone, Copy)]
pub struct Capacity {
    /// For visitors.
    pub visitors: usize,
    /// For scrapers; 0 if they have no listener of their own.
    pub scrapers: usize,
}

impl Capacity {
    /// Raises the limit on open files as far as needed and allowed, and divides it.
    #[must_use]
    pub fn new(max_connections: usize, with_scrapers: bool) -> Self {
        let scrapers = if with_scrapers { SCRAPERS_MAX } else { 0 };
        let wanted = max_connections + scrapers + OTHER_FILES;
        let limit = match rlimit::increase_nofile_limit(wanted as u64) {
            Ok(limit) => usize::try_from(limit).unwrap_or(usize::MAX),
            Err(error) => {
                tracing::warn!(
                    error = error.to_string(),
                    "cannot raise the limit on open files"
                );
                wanted
            }
        };
        let capacity = Self::within(limit, max_connections, scrapers);
        if capacity.visitors < max_connections {
            tracing::warn!(
                limit,
                wanted,
                connections = capacity.visitors,
                "the limit on open files is below HTTP_MAX_CONNECTIONS"
            );
        }
        capacity
    }

    /// Scrapers get a quarter at most, and each listener gets at least one.
    fn within(limit: usize, max_connections: usize, scrapers: usize) -> Self {
        let files = limit.saturating_sub(OTHER_FILES);
        let scrapers = scrapers.min((files / 4).max(1));
        Self {
            visitors: max_connections.min(files.saturating_sub(scrapers).max(1)),
            scrapers,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listeners_together_fit_the_file_limit() {
        for limit in [66, 70, 100, 128, 1024, 16_511, 16_512, 1 << 20] {
            for (max_connections, scrapers) in
                [(1, 0), (300, 0), (16_384, 0), (16_384, 64), (3, 64)]
            {
                let capacity = Capacity::within(limit, max_connections, scrapers);
                assert!(
                    capacity.visitors + capacity.scrapers + OTHER_FILES <= limit,
                    "{capacity:?}"
                );
                assert!(capacity.visitors >= 1 && capacity.scrapers >= scrapers.min(1));
            }
        }
        let roomy = Capacity::within(1 << 20, 16_384, 64);
        assert_eq!((roomy.visitors, roomy.scrapers), (16_384, 64));
    }
}
