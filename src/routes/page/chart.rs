//! The page's two charts as paths of SVG, for the first view and for browsers without JavaScript.
//!
//! No charting library: two lines, an area and some bands are a hundred lines, here and in
//! `assets/page.js`, which redraws them from the stream in the same way. A library would be ten
//! times as large as the whole page, would draw nothing before its script has run, and most set
//! inline styles, which the page's security policy forbids.
//!
//! Must not know: words, and where rates come from.

use std::fmt::Write as _;

use time::{Duration, OffsetDateTime};

use crate::routes::snapshot::{Rate, Snapshot};

/// The charts' width: one unit is one second of ten minutes.
const SECONDS: f64 = 600.0;

/// The charts' height in units.
const HEIGHT: f64 = 100.0;

/// The length of an interval in seconds.
const INTERVAL: f64 = 5.0;
const HALF: f64 = INTERVAL / 2.0;

/// Both charts. They share their axis of time, and each has its own scale.
#[derive(Debug)]
pub(super) struct Charts {
    pub(super) start: OffsetDateTime,
    pub(super) middle: OffsetDateTime,
    pub(super) end: OffsetDateTime,
    /// The newest interval; `None` if there is none.
    pub(super) newest: Option<Rate>,
    /// Visits a second: the line, and the area beneath it.
    pub(super) visits: String,
    pub(super) visits_area: String,
    pub(super) visits_top: f64,
    /// Milliseconds, with gaps where nothing was recorded.
    pub(super) median: String,
    pub(super) p99: String,
    pub(super) milliseconds_top: f64,
    /// Where visits failed: bands over the charts' height.
    pub(super) failures: String,
}

impl Charts {
    /// Draws the rates of a snapshot.
    pub(super) fn of(snapshot: &Snapshot) -> Self {
        let rates = &snapshot.replica.taxas;
        let newest = rates.last().copied();
        let end = newest.as_ref().map_or(snapshot.atualizado_em, |rate| {
            rate.em + Duration::seconds_f64(INTERVAL)
        });
        // The middle of an interval stands for it.
        let place = |rate: &Rate| SECONDS - (end - rate.em).as_seconds_f64() + HALF;
        let points = |value: &dyn Fn(&Rate) -> Option<f64>| {
            let point = |rate: &Rate| (place(rate), value(rate));
            rates.iter().map(point).collect::<Vec<_>>()
        };
        // Before the replica began there were no visits to count, which is not the same as none.
        let began = snapshot.replica.desde - Duration::seconds_f64(INTERVAL);
        let visits = points(&|rate| (rate.em > began).then(|| visits_a_second(rate)));
        let (median, p99) = (points(&|rate| rate.p50_ms), points(&|rate| rate.p99_ms));
        let visits_top = top(&visits, 1.0);
        let milliseconds_top = top(&p99, 1.0);
        let line_of_visits = line(&visits, visits_top);
        Self {
            start: end - Duration::seconds_f64(SECONDS),
            middle: end - Duration::seconds_f64(SECONDS / 2.0),
            end,
            newest,
            visits_area: area(&line_of_visits, &visits),
            visits: line_of_visits,
            visits_top,
            median: line(&median, milliseconds_top),
            p99: line(&p99, milliseconds_top),
            milliseconds_top,
            failures: bands(rates, place),
        }
    }
}

/// The visits of an interval, for each second.
pub(super) fn visits_a_second(rate: &Rate) -> f64 {
    rate.visitas as f64 / INTERVAL
}

/// The failed visits of an interval, for each second.
pub(super) fn failures_a_second(rate: &Rate) -> f64 {
    rate.falhas as f64 / INTERVAL
}

/// The top of a scale: the lowest of 1, 2, 5, 10, … that no value exceeds, and at least `least`.
fn top(points: &[(f64, Option<f64>)], least: f64) -> f64 {
    let values = points.iter().filter_map(|&(_, value)| value);
    let highest = values.fold(least, f64::max);
    let power = 10_f64.powf(highest.log10().floor());
    let steps = [1.0, 2.0, 5.0, 10.0].map(|step| step * power);
    let fits = steps.into_iter().find(|&step| step >= highest);
    fits.unwrap_or(highest)
}

/// A line through the points that have a value, broken where they have none. Each part is drawn
/// from its first interval's start to its last one's end, so that a lone value is a dash.
fn line(points: &[(f64, Option<f64>)], top: f64) -> String {
    let mut path = String::new();
    let mut is_drawing = false;
    for (index, &(x, value)) in points.iter().enumerate() {
        if let Some(value) = value {
            let y = HEIGHT * (1.0 - value / top);
            if !is_drawing {
                // A String takes every write.
                write!(path, "M{} {y:.1}", x - HALF).ok();
            }
            write!(path, "L{x} {y:.1}").ok();
            let next = points.get(index + 1).and_then(|&(_, value)| value);
            if next.is_none() {
                write!(path, "h{HALF}").ok();
            }
        }
        is_drawing = value.is_some();
    }
    path
}

/// The area beneath a line that is unbroken from its first value on.
fn area(line: &str, points: &[(f64, Option<f64>)]) -> String {
    let first = points.iter().find(|(_, value)| value.is_some());
    first.map_or_else(String::new, |(x, _)| {
        format!("{line}V{HEIGHT}H{}Z", x - HALF)
    })
}

/// A rectangle of the charts' height for each interval in which visits failed.
fn bands(rates: &[Rate], place: impl Fn(&Rate) -> f64) -> String {
    let failed = rates.iter().filter(|rate| rate.falhas > 0);
    failed.fold(String::new(), |mut path, rate| {
        let x = place(rate) - HALF;
        write!(path, "M{x} 0h{INTERVAL}v{HEIGHT}h-{INTERVAL}Z").ok();
        path
    })
}

#[cfg(test)]
mod tests {
    use time::macros::datetime;

    use super::*;
    use crate::routes::snapshot::{Replica, Status};

    fn drawn(rates: &[(u64, u64, Option<f64>)]) -> Charts {
        Charts::of(&snapshot(rates))
    }

    fn snapshot(rates: &[(u64, u64, Option<f64>)]) -> Snapshot {
        let start = datetime!(2026-11-26 12:00:00 UTC);
        let rate = |(place, &(visitas, falhas, milliseconds)): (i32, _)| Rate {
            em: start + 5 * place * Duration::SECOND,
            visitas,
            falhas,
            p50_ms: milliseconds,
            p99_ms: milliseconds,
        };
        Snapshot {
            db_status: Status::Ok,
            redis_status: Status::Ok,
            total_registros_db: None,
            visitas_redis: None,
            atualizado_em: start,
            replica: Replica {
                id: "id",
                desde: start,
                taxas: (0..).zip(rates).map(rate).collect(),
            },
        }
    }

    #[test]
    fn newest_interval_stands_at_the_right_edge() {
        let charts = drawn(&[(5, 0, Some(2.0)), (10, 0, Some(4.0))]);
        assert_eq!(charts.visits, "M590 50.0L592.5 50.0L597.5 0.0h2.5");
        assert_eq!(
            charts.visits_area,
            "M590 50.0L592.5 50.0L597.5 0.0h2.5V100H590Z"
        );
        assert_eq!(charts.median, "M590 60.0L592.5 60.0L597.5 20.0h2.5");
        assert_eq!(charts.end, datetime!(2026-11-26 12:00:10 UTC));
    }

    #[test]
    fn nothing_is_drawn_before_the_replica_began() {
        let mut snapshot = snapshot(&[(0, 0, None), (0, 0, None), (5, 0, None)]);
        snapshot.replica.desde += 7 * Duration::SECOND;
        let charts = Charts::of(&snapshot);
        assert_eq!(charts.visits, "M590 100.0L592.5 100.0L597.5 0.0h2.5");
        assert_eq!(
            charts.visits_area,
            "M590 100.0L592.5 100.0L597.5 0.0h2.5V100H590Z"
        );
    }

    #[test]
    fn line_is_broken_where_nothing_was_recorded() {
        let charts = drawn(&[(5, 0, Some(1.0)), (0, 3, None), (5, 0, Some(1.0))]);
        assert_eq!(charts.p99, "M585 0.0L587.5 0.0h2.5M595 0.0L597.5 0.0h2.5");
        assert_eq!(charts.failures, "M590 0h5v100h-5Z");
    }

    #[test]
    fn scale_ends_at_a_round_number() {
        let top_of = |visits| drawn(&[(visits, 0, None)]).visits_top.to_string();
        assert_eq!(
            [0, 5, 6, 500, 501].map(top_of),
            ["1", "1", "2", "100", "200"]
        );
    }

    #[test]
    fn no_rates_draw_nothing() {
        let charts = drawn(&[]);
        assert_eq!((charts.visits, charts.visits_area), Default::default());
    }
}
