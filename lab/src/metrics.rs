//! Reads the service's metrics in Prometheus' text format.
//!
//! It compares series names and labels as text: it knows no type, no exemplar and no escape.

use std::net::SocketAddr;

use anyhow::{Context as _, Result};

use crate::client;

/// A scrape.
#[derive(Clone, Debug)]
pub struct Metrics(pub String);

impl Metrics {
    /// Scrapes a service.
    pub fn scrape(address: SocketAddr) -> Result<Self> {
        Ok(Self(client::get(address, "/metrics")?.body))
    }

    /// The value of a series, by its name and labels as they are written.
    pub fn value(&self, series: &str) -> Option<f64> {
        self.series("")
            .find_map(|(name, value)| (name == series).then_some(value))
    }

    /// The number of visits with this outcome.
    pub fn visits(&self, outcome: &str) -> Result<u64> {
        let series = format!("visitas_visits_total{{outcome=\"{outcome}\"}}");
        let count = self.value(&series);
        let count = count.with_context(|| format!("no {series}"))?;
        whole(count)
    }

    /// The series whose names begin with `start`, with their labels and values.
    pub fn series(&self, start: &str) -> impl Iterator<Item = (&str, f64)> {
        self.0.lines().filter_map(move |line| {
            let (series, value) = line.rsplit_once(' ')?;
            let wanted = series.starts_with(start) && !series.starts_with('#');
            wanted.then_some((series, value.parse().ok()?))
        })
    }
}

/// The value of a counter as a whole number.
pub fn whole(value: f64) -> Result<u64> {
    Ok(format!("{value:.0}").parse()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn series_are_found_by_name_and_labels() {
        let text = "# HELP visitas_rows Rows.\nvisitas_rows NaN\n\
                    visitas_visits_total{outcome=\"ok\"} 7\n\
                    visitas_visits_total{outcome=\"failed\"} 2\n";
        let metrics = Metrics(text.to_owned());
        assert!(metrics.value("visitas_rows").is_some_and(f64::is_nan));
        assert_eq!(metrics.visits("ok").unwrap(), 7);
        assert!(metrics.visits("shed").is_err());
        assert_eq!(metrics.series("visitas_visits").count(), 2);
        assert_eq!(metrics.value("visitas_visits_total"), None);
    }
}
