//! Wakes tasks when something has changed, in the order in which they began to wait: the channels of
//! tokio that could do it wake them in a random order.

use tokio::sync::Notify;

#[derive(Debug, Default)]
pub(super) struct Signal(Notify);

impl Signal {
    /// Lets every task look again that waits.
    pub(super) fn send(&self) {
        self.0.notify_waiters();
    }

    /// Waits until a condition holds, which is looked at again after each signal.
    pub(super) async fn until(&self, holds: impl Fn() -> bool) {
        loop {
            let signal = self.0.notified();
            if holds() {
                return;
            }
            signal.await;
        }
    }
}
