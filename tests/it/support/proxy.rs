//! A way to a server that is longer, on which one can listen, or that loses what is sent on it.

use std::time::Duration;

use lab::proxy::{Protocol, Proxy};

/// A port that leads to another one here.
pub(crate) struct Way {
    pub(crate) port: u16,
    proxy: Proxy,
}

impl Way {
    /// Opens a way on which one can listen.
    pub(crate) async fn to(port: u16) -> Self {
        let server = ([127, 0, 0, 1], port).into();
        let proxy = Proxy::recording(server, Protocol::Other).await;
        let proxy = proxy.expect("a free port");
        Self {
            port: proxy.port(),
            proxy,
        }
    }

    /// Opens a way on which everything from a client arrives late.
    pub(crate) async fn with_delay(port: u16, delay: Duration) -> Self {
        let way = Self::to(port).await;
        way.delay(delay);
        way
    }

    /// From now on everything from a client arrives that late.
    pub(crate) fn delay(&self, delay: Duration) {
        self.proxy.change(|rules| rules.delay_to_server = delay);
    }

    /// From now on all that a client sends on the connections that are open is lost, without an error.
    pub(crate) fn fall_silent(&self) {
        self.proxy.lose_established();
    }

    /// From now on all that a client sends is lost, over new connections too, without an error.
    pub(crate) fn fall_silent_for_good(&self) {
        self.proxy.change(|rules| rules.lost_below = u64::MAX);
    }

    /// From now on the connections that are open carry nothing in either direction.
    pub(crate) fn hold(&self) {
        self.proxy.silence_established();
    }

    /// From now on no connection carries anything in either direction, new ones included.
    pub(crate) fn hold_all(&self) {
        self.proxy.change(|rules| rules.silent_below = u64::MAX);
    }

    /// Ends [`Self::hold`] and [`Self::hold_all`].
    pub(crate) fn release(&self) {
        self.proxy.change(|rules| rules.silent_below = 0);
    }

    /// Resets the connections that are open.
    pub(crate) fn reset(&self) {
        self.proxy.reset_established();
    }

    /// What each client has said so far.
    pub(crate) fn said(&self) -> Vec<Vec<u8>> {
        self.proxy.record()
    }
}
