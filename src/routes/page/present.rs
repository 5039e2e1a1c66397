//! What the page's template asks of its view model: which of a sentence's forms holds, and values
//! as text.
//!
//! Must not know: HTTP, and where a value comes from.

use time::OffsetDateTime;

use super::chart::Charts;
use super::view::{Page, Timing, Visit};
use crate::routes::language::Language;

impl Page<'_> {
    /// The title of the browser's tab: the visit's number, or what is wrong.
    pub(super) fn title(&self) -> String {
        let text = match (&self.visit, &self.snapshot.total_registros_db) {
            (Some(Visit::Recorded { total, .. }), _) | (None, Some(total)) => {
                self.language.number(*total)
            }
            _ => self.language.say("outage", "fora do ar").to_owned(),
        };
        format!("{text} · visitas")
    }

    /// How the request's visit ended: `data-visit` in the template.
    pub(super) fn visit_state(&self) -> &'static str {
        match &self.visit {
            Some(Visit::Recorded { .. }) => "recorded",
            Some(Visit::Refused { in_doubt: true, .. }) => "doubt",
            Some(Visit::Refused { .. }) => "failed",
            None => "none",
        }
    }

    /// A store's total, or the last one that is known.
    pub(super) fn count(
        &self,
        total: Option<&i64>,
        last: Option<&(i64, OffsetDateTime)>,
    ) -> String {
        let unknown = || self.language.say("unknown", "desconhecido").to_owned();
        let total = total.or(last.map(|(total, _)| total));
        total.map_or_else(unknown, |total| self.language.number(*total))
    }

    /// How the stores' totals compare: `data-difference` in the template.
    pub(super) fn difference_state(&self) -> &'static str {
        match self.visits_that_redis_lacks() {
            Some(0) => "same",
            Some(1..) => "behind",
            Some(_) => "ahead",
            None => "unknown",
        }
    }

    /// The difference of the stores' totals, without a sign.
    pub(super) fn difference(&self) -> String {
        let difference = self.visits_that_redis_lacks().unwrap_or_default();
        self.language.number(difference.saturating_abs())
    }

    fn visits_that_redis_lacks(&self) -> Option<i64> {
        let (rows, redis) = (
            self.snapshot.total_registros_db?,
            self.snapshot.visitas_redis?,
        );
        Some(rows.saturating_sub(redis))
    }

    /// The path of this page as it is now, which records no visit.
    pub(super) fn refresh(&self) -> &'static str {
        match self.language {
            Language::English => "/visitas?lang=en",
            Language::Portuguese => "/visitas?lang=pt",
        }
    }

    pub(super) fn charts(&self) -> Charts {
        Charts::of(self.snapshot)
    }

    /// The newest interval's p99 or median.
    pub(super) fn newest(&self, p99: bool) -> String {
        let newest = self.snapshot.replica.taxas.last();
        let milliseconds = newest.and_then(|rate| if p99 { rate.p99_ms } else { rate.p50_ms });
        milliseconds.map_or_else(|| "–".to_owned(), |value| self.language.duration(value))
    }
}

/// The parts of a visit's time, in thousandths of it.
#[derive(Debug)]
pub(super) struct Shares {
    pub(super) queue: f64,
    pub(super) postgres: f64,
    pub(super) redis: f64,
}

impl Timing {
    /// Divides a visit's time.
    pub(super) fn shares(&self) -> Shares {
        // A visit of no measurable time has no parts.
        let total = self.total_ms().max(f64::MIN_POSITIVE);
        let share = |milliseconds: f64| (1000.0 * milliseconds / total).round();
        Shares {
            queue: share(self.queue_ms),
            postgres: share(self.postgres_ms),
            redis: share(self.redis_ms),
        }
    }
}
