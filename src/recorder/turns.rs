//! In which order Redis counts the batches that Postgres has recorded.
//!
//! With one replica, both stores should number visits alike, although the reply to a batch can be
//! overtaken by the reply to the next one. Must not know: visits and stores.

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, Semaphore, SemaphorePermit};
use tokio::time::timeout;

/// The turns of the batches of one writer. Its batches wait in one task, so what they do between two
/// waits is not interrupted by another batch.
#[derive(Debug)]
pub(super) struct Turns {
    state: Mutex<State>,
    /// Woken by each reply of Postgres.
    replied: Notify,
    /// First come, first served.
    turn: Semaphore,
}

#[derive(Debug, Default)]
struct State {
    /// How many batches have left.
    left: u64,
    /// The batches that Postgres has not replied to.
    awaited: BTreeSet<u64>,
    /// The total of the last batch in line.
    last: i64,
}

/// A batch that has left.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ticket(u64);

impl Turns {
    pub(super) fn new() -> Self {
        Self {
            state: Mutex::default(),
            replied: Notify::new(),
            turn: Semaphore::new(1),
        }
    }

    /// Notes that a batch leaves for Postgres.
    pub(super) fn leave(&self) -> Ticket {
        let mut state = self.state();
        state.left += 1;
        let number = state.left;
        state.awaited.insert(number);
        Ticket(number)
    }

    /// Notes the reply of Postgres to a batch, or that there will be none.
    pub(super) fn reply(&self, Ticket(number): Ticket) {
        self.state().awaited.remove(&number);
        self.replied.notify_waiters();
    }

    /// Waits for the turn of a batch that recorded the visits after `before`, up to `total`. The
    /// next batch in the order of Postgres follows at once. After a gap, which another replica can
    /// have left, the batch waits until Postgres has replied to all that left earlier. Once in line,
    /// it waits until the one before is counted, and gets no permit if that takes long. Neither wait
    /// takes longer than `limit`: counting matters more than order.
    pub(super) async fn wait(
        &self,
        Ticket(number): Ticket,
        before: i64,
        total: i64,
        limit: Duration,
    ) -> Option<SemaphorePermit<'_>> {
        let in_line = async {
            loop {
                let replied = self.replied.notified();
                if self.line_up(number, before, total) {
                    break;
                }
                replied.await;
            }
        };
        if timeout(limit, in_line).await.is_err() {
            self.state().last = total;
        }
        // The next batch in line can stand behind this one now.
        self.replied.notify_waiters();
        timeout(limit, self.turn.acquire()).await.ok()?.ok()
    }

    fn line_up(&self, number: u64, before: i64, total: i64) -> bool {
        let mut state = self.state();
        let is_next = state.last == before;
        let is_first = state.awaited.first().is_none_or(|first| *first > number);
        if is_next || is_first {
            state.last = total;
        }
        is_next || is_first
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_millis(60);

    async fn is_open(turns: &Turns, ticket: Ticket, before: i64, total: i64) -> bool {
        let wait = turns.wait(ticket, before, total, LIMIT);
        timeout(Duration::from_millis(1), wait).await.is_ok()
    }

    #[tokio::test(start_paused = true)]
    async fn overtaken_reply_is_waited_for() {
        let turns = Turns::new();
        let (first, second) = (turns.leave(), turns.leave());
        turns.reply(second);
        assert!(!is_open(&turns, second, 3, 5).await);
        turns.reply(first);
        assert!(is_open(&turns, first, 0, 3).await);
        assert!(is_open(&turns, second, 3, 5).await);
    }

    #[tokio::test(start_paused = true)]
    async fn batch_that_postgres_recorded_first_does_not_wait_for_one_that_left_first() {
        let turns = Turns::new();
        let (first, second) = (turns.leave(), turns.leave());
        turns.reply(second);
        assert!(is_open(&turns, second, 0, 2).await);
        turns.reply(first);
        assert!(is_open(&turns, first, 2, 5).await);
    }

    #[tokio::test(start_paused = true)]
    async fn batches_in_the_order_of_postgres_follow_at_once_while_an_earlier_one_is_awaited() {
        let turns = Turns::new();
        let (_first, second, third) = (turns.leave(), turns.leave(), turns.leave());
        turns.reply(second);
        turns.reply(third);
        assert!(is_open(&turns, second, 0, 2).await);
        assert!(is_open(&turns, third, 2, 4).await);
    }

    #[tokio::test(start_paused = true)]
    async fn visits_of_another_replica_delay_nothing() {
        let turns = Turns::new();
        let first = turns.leave();
        turns.reply(first);
        let second = turns.leave();
        assert!(is_open(&turns, first, 7, 9).await);
        turns.reply(second);
        assert!(is_open(&turns, second, 20, 21).await);
    }

    #[tokio::test(start_paused = true)]
    async fn batch_without_a_reply_is_not_waited_for() {
        let turns = Turns::new();
        let (first, second) = (turns.leave(), turns.leave());
        turns.reply(second);
        assert!(!is_open(&turns, second, 3, 5).await);
        // It failed.
        turns.reply(first);
        assert!(is_open(&turns, second, 3, 5).await);
    }

    #[tokio::test(start_paused = true)]
    async fn late_reply_is_not_waited_for() {
        let turns = Turns::new();
        let (_first, second) = (turns.leave(), turns.leave());
        turns.reply(second);
        let wait = timeout(2 * LIMIT, turns.wait(second, 3, 5, LIMIT));
        assert!(wait.await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn batches_have_their_turns_one_after_another() {
        let turns = Turns::new();
        let (first, second) = (turns.leave(), turns.leave());
        turns.reply(first);
        turns.reply(second);
        let turn = turns.wait(first, 0, 3, LIMIT).await;
        assert!(!is_open(&turns, second, 3, 5).await);
        drop(turn);
        assert!(is_open(&turns, second, 3, 5).await);
    }

    #[tokio::test(start_paused = true)]
    async fn long_turn_is_not_waited_for() {
        let turns = Turns::new();
        let (first, second) = (turns.leave(), turns.leave());
        turns.reply(first);
        turns.reply(second);
        let _turn = turns.wait(first, 0, 3, LIMIT).await;
        let wait = timeout(2 * LIMIT, turns.wait(second, 3, 5, LIMIT));
        assert!(wait.await.is_ok());
    }
}
