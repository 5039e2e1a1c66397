//! When the next batch leaves while others are in flight.
//!
//! Batches take turns on the count's lock in Postgres, which is held until the commit is flushed. So
//! what overlaps is the network: the next statement can travel while the one before holds the lock.
//! It leaves so that it arrives when the lock is free. Sent earlier it would wait for the lock with
//! fewer visits than it could have, and later the lock would be idle.
//!
//! Where the stores are near there is no time to gain, so one batch is in flight at a time. Must not
//! know: visits and stores.

use std::time::Duration;

use tokio::time::Instant;

/// Maximum number of batches in flight, from the statement that records one to its replies. Each
/// has a connection to one of the stores.
pub(super) const MOST_IN_FLIGHT: u32 = 4;

/// Batches overlap if at least this share of a batch's time is spent on the network. With stores on
/// the same machine it is less than a tenth under load, with stores in another zone a third or more.
const NETWORK_SHARE: f64 = 0.25;
/// Stores whose networks take less than this time together, in seconds, are near: it is several
/// times what messages within a machine take, and a third of a round trip to another zone.
const NEAR: f64 = 0.000_3;
/// The first batches do not overlap: the first calls open connections and prepare
/// statements, which takes as long near the stores as a network would.
const FIRST_BATCHES: u32 = 8;

/// The weight of a batch in the averages.
const WEIGHT: f64 = 0.125;

/// What the last batches took, and when the last one left. Times are in seconds.
#[derive(Debug)]
pub(super) struct Pace {
    left: Option<Instant>,
    /// The batches that were recorded, up to [`FIRST_BATCHES`].
    recorded: u32,
    /// What the call to Postgres usually takes.
    postgres: f64,
    /// What the call to Redis usually takes; zero while Redis is skipped or fails.
    redis: f64,
    /// The shortest call to Redis so far, which hardly takes longer than the network: a machine
    /// under load delays messages for long, but not each of them.
    shortest_redis: f64,
    /// What both calls usually take, with the wait for a turn in Redis.
    both: f64,
}

/// Whether a batch can leave now, and when that changes if no batch ends before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Turn {
    pub(super) is_open: bool,
    pub(super) changes: Option<Instant>,
}

impl Turn {
    pub(super) const OPEN: Self = Self {
        is_open: true,
        changes: None,
    };
    const CLOSED: Self = Self {
        is_open: false,
        changes: None,
    };
}

impl Pace {
    pub(super) fn new() -> Self {
        Self {
            left: None,
            recorded: 0,
            postgres: 0.0,
            redis: 0.0,
            shortest_redis: f64::INFINITY,
            both: 0.0,
        }
    }

    /// Notes that a batch leaves.
    pub(super) fn leave(&mut self, now: Instant) {
        self.left = Some(now);
    }

    /// Notes how long the calls of a recorded batch took, each and both together; no time for Redis
    /// if it was skipped or failed.
    pub(super) fn arrive(&mut self, postgres: Duration, redis: Option<Duration>, both: Duration) {
        let weight = if self.recorded == 0 { 1.0 } else { WEIGHT };
        self.recorded = (self.recorded + 1).min(FIRST_BATCHES);
        if let Some(redis) = redis {
            self.shortest_redis = self.shortest_redis.min(redis.as_secs_f64());
        }
        let average = |usual: &mut f64, took: Duration| {
            *usual += (took.as_secs_f64() - *usual) * weight;
        };
        average(&mut self.postgres, postgres);
        average(&mut self.redis, redis.unwrap_or_default());
        average(&mut self.both, both);
    }

    /// Whether a batch can leave now, with so many in flight. `round_trip` is what a message to
    /// Postgres and its reply take on the network.
    pub(super) fn turn(&self, now: Instant, in_flight: usize, round_trip: Duration) -> Turn {
        if in_flight == 0 {
            return Turn::OPEN;
        }
        let (Some(left), Some(gap)) = (self.left, self.gap(round_trip.as_secs_f64())) else {
            return Turn::CLOSED;
        };
        if in_flight >= MOST_IN_FLIGHT as usize {
            return Turn::CLOSED;
        }
        let opens = left + Duration::from_secs_f64(gap);
        // The last batch waits for the lock, or holds it: another one would only wait behind it.
        let closes = left + Duration::from_secs_f64(2.0 * self.both);
        if now < opens {
            Turn {
                changes: Some(opens),
                ..Turn::CLOSED
            }
        } else if now < closes {
            Turn {
                changes: Some(closes),
                ..Turn::OPEN
            }
        } else {
            Turn::CLOSED
        }
    }

    /// The time between two batches; `None` if they should not overlap.
    fn gap(&self, round_trip: f64) -> Option<f64> {
        let network = round_trip + self.redis.min(self.shortest_redis);
        let is_far = network >= NEAR.max(NETWORK_SHARE * self.both);
        if self.recorded < FIRST_BATCHES || !is_far {
            return None;
        }
        // A statement that waits for the lock makes this longer, until none waits.
        let in_the_database = self.postgres - round_trip;
        // Redis counts one batch after another.
        let longest = in_the_database.max(self.redis);
        Some(longest.max(self.both / f64::from(MOST_IN_FLIGHT)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn millis(millis: f64) -> Duration {
        Duration::from_secs_f64(millis / 1e3)
    }

    /// Notes many batches that took so long in Postgres and in Redis.
    fn arrive(pace: &mut Pace, postgres: f64, redis: f64) {
        for _ in 0..100 {
            let both = millis(postgres + redis);
            pace.arrive(millis(postgres), Some(millis(redis)), both);
        }
    }

    fn pace(postgres: f64, redis: f64) -> (Pace, Instant) {
        let mut pace = Pace::new();
        arrive(&mut pace, postgres, redis);
        let now = Instant::now();
        pace.leave(now);
        (pace, now)
    }

    #[test]
    fn nothing_in_flight_means_no_wait() {
        let now = Instant::now();
        assert_eq!(Pace::new().turn(now, 0, millis(1.0)), Turn::OPEN);
        assert_eq!(pace(3.0, 1.0).0.turn(now, 0, millis(1.0)), Turn::OPEN);
    }

    #[test]
    fn first_batches_do_not_overlap() {
        let mut pace = Pace::new();
        let now = Instant::now();
        pace.leave(now);
        for _ in 0..FIRST_BATCHES {
            assert_eq!(pace.turn(now + millis(3.0), 1, millis(1.0)), Turn::CLOSED);
            pace.arrive(millis(3.0), Some(millis(1.0)), millis(4.0));
        }
        assert!(pace.turn(now + millis(3.0), 1, millis(1.0)).is_open);
    }

    #[test]
    fn batches_to_near_stores_do_not_overlap() {
        for (postgres, redis, round_trip) in [(0.36, 0.1, 0.1), (1.3, 0.1, 0.1), (2.0, 0.3, 0.1)] {
            let (pace, now) = pace(postgres, redis);
            let turn = pace.turn(now + millis(postgres), 1, millis(round_trip));
            assert_eq!(turn, Turn::CLOSED);
        }
    }

    #[test]
    fn next_batch_arrives_when_the_one_before_releases_the_lock() {
        // A commit takes 2.4 ms of the 3.4, the rest is the network.
        let (pace, now) = pace(3.4, 1.0);
        let at = |time| pace.turn(now + millis(time), 1, millis(1.0));
        let early = at(2.39);
        assert!(!early.is_open);
        assert!(
            early
                .changes
                .is_some_and(|opens| opens <= now + millis(2.41))
        );
        assert!(at(2.41).is_open);
    }

    #[test]
    fn batches_are_evenly_spaced_where_the_network_takes_longest() {
        let (pace, now) = pace(18.0, 2.0);
        let at = |time| pace.turn(now + millis(time), 3, millis(17.8)).is_open;
        assert!(!at(4.9));
        assert!(at(5.1));
        let turn = pace.turn(now + millis(5.1), MOST_IN_FLIGHT as usize, millis(10.0));
        assert_eq!(turn, Turn::CLOSED);
    }

    #[test]
    fn turn_opens_at_the_very_moment_that_it_names() {
        let (pace, now) = pace(3.4, 1.0);
        let opens = pace.turn(now, 1, millis(1.0)).changes.expect("a moment");
        assert!(pace.turn(opens, 1, millis(1.0)).is_open);
    }

    #[test]
    fn one_slow_batch_changes_the_pace_little() {
        let (mut pace, now) = pace(3.4, 1.0);
        pace.arrive(millis(10.0), Some(millis(1.0)), millis(11.0));
        assert!(pace.turn(now + millis(3.5), 1, millis(1.0)).is_open);
    }

    #[test]
    fn no_batch_joins_one_that_waits_for_the_lock() {
        let (pace, now) = pace(2.0, 1.0);
        let turn = pace.turn(now + millis(5.9), 1, millis(1.0));
        assert!(turn.is_open);
        let closes = turn.changes.expect("an end");
        assert_eq!(pace.turn(closes, 1, millis(1.0)), Turn::CLOSED);
        assert!(closes <= now + millis(6.1));
    }

    #[test]
    fn near_stores_under_load_are_not_taken_for_distant_ones() {
        let (mut pace, now) = pace(1.3, 0.1);
        arrive(&mut pace, 4.0, 3.0);
        let turn = pace.turn(now + millis(4.0), 1, millis(0.1));
        assert_eq!(turn, Turn::CLOSED);
    }

    #[test]
    fn distant_ledger_alone_is_enough() {
        let mut pace = Pace::new();
        let now = Instant::now();
        for _ in 0..FIRST_BATCHES {
            pace.arrive(millis(2.0), None, millis(2.0));
        }
        pace.leave(now);
        assert!(pace.turn(now + millis(1.1), 1, millis(1.0)).is_open);
    }

    #[test]
    fn batches_do_not_queue_for_slow_calls_to_redis() {
        let (mut pace, now) = pace(2.0, 1.0);
        arrive(&mut pace, 2.0, 9.0);
        let turn = pace.turn(now + millis(8.9), 1, millis(1.5));
        assert!(!turn.is_open);
    }
}
