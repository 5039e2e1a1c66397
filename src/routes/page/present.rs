//! What the page's template asks of its view model: which of a sentence's forms holds, and values
//! as text.
//!
//! Must not know: HTTP, and where a value comes from.

use time::OffsetDateTime;

use super::chart::Charts;
use super::view::{Page, Timing, Visit};
use crate::routes::language::Language;
use crate::routes::snapshot::Status;

impl Page<'_> {
    /// Whether a form of a text is true as the page is sent. `assets/page.js` decides this again
    /// with each event.
    pub(super) fn holds(&self, form: &str) -> bool {
        let postgres = self.snapshot.db_status == Status::Ok;
        let redis = self.snapshot.redis_status == Status::Ok;
        let is_refused = matches!(self.visit, Some(Visit::Refused { .. }));
        match form {
            "postgres-up" => postgres,
            "postgres-down" => !postgres,
            "postgres-down-alone" => !postgres && redis,
            "both-down" => !postgres && !redis,
            "postgres-news" => !postgres || is_refused,
            "postgres-fine" | "visit-again" => postgres && is_refused,
            "redis-up" => redis,
            "redis-down" => !redis,
            "redis-news" | "redis-down-alone" => !redis && postgres,
            "same" | "behind" | "ahead" => form == self.difference_state(),
            "still" => true,
            "no-rates" => !self.has_rates(),
            "failures" => self
                .snapshot
                .replica
                .taxas
                .iter()
                .any(|rate| rate.falhas > 0),
            // Live news, and stores that have come back: only the script sees them.
            _ => false,
        }
    }

    /// The attribute of an element that is there for its forms, while none of them holds.
    pub(super) fn hidden(&self, form: &str) -> &'static str {
        if self.holds(form) { "" } else { "hidden" }
    }

    /// Whether there is something to draw.
    pub(super) fn has_rates(&self) -> bool {
        let mut rates = self.snapshot.replica.taxas.iter();
        rates.any(|rate| rate.visitas + rate.falhas > 0)
    }

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

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    /// What stands between `start` and the quotation mark after it, wherever `start` does.
    fn named<'a>(text: &'a str, start: &str) -> Vec<&'a str> {
        let ends = text.split(start).skip(1);
        ends.filter_map(|end| Some(end.split_once('"')?.0))
            .collect()
    }

    #[test]
    fn script_decides_about_the_forms_of_the_template() {
        let template = include_str!("../../../templates/page.html");
        let mut used = BTreeSet::new();
        for start in ["form(\"span\", \"", "form(\"p\", \"", "data-if=\""] {
            used.extend(named(template, start));
        }
        used.remove("{{ name }}");
        let script = include_str!("../../../assets/page.js");
        let (_, forms) = script.split_once("const forms = {\n").expect("the table");
        let (forms, _) = forms.split_once("};").expect("its end");
        let names = forms.lines().filter_map(|line| line.split_once(": "));
        let decided = names.map(|(name, _)| name.trim().trim_matches('"'));
        assert_eq!(used, decided.collect());
        assert_eq!(
            template.matches("call form(").count(),
            named(template, "call form(\"").len()
        );
    }
}
