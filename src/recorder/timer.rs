//! A timer that is precise to microseconds, since batches are less than a millisecond apart.
//!
//! The runtime's own timers end at whole milliseconds. Must not know: what is timed.

use tokio::time::Instant;

/// A timer for one task.
#[derive(Debug)]
pub(super) struct Timer {
    #[cfg(target_os = "linux")]
    precise: Option<precise::Timer>,
}

impl Timer {
    /// Must be called inside the runtime.
    pub(super) fn new() -> Self {
        Self {
            // A paused clock, as in tests, moves only the runtime's timers.
            #[cfg(target_os = "linux")]
            precise: (!cfg!(test)).then(precise::Timer::new).flatten(),
        }
    }

    /// Waits until a moment, or for ever.
    pub(super) async fn wait_until(&self, moment: Option<Instant>) {
        let Some(moment) = moment else {
            return std::future::pending().await;
        };
        #[cfg(target_os = "linux")]
        if let Some(timer) = &self.precise {
            let wait = moment.saturating_duration_since(Instant::now());
            if wait.is_zero() || timer.wait(wait).await.is_ok() {
                return;
            }
        }
        tokio::time::sleep_until(moment).await;
    }
}

#[cfg(target_os = "linux")]
mod precise {
    use std::io;
    use std::os::fd::OwnedFd;
    use std::time::Duration;

    use rustix::time::{
        Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
        timerfd_settime,
    };
    use tokio::io::Interest;
    use tokio::io::unix::AsyncFd;

    /// A kernel timer that the runtime polls like a socket.
    #[derive(Debug)]
    pub(super) struct Timer(AsyncFd<OwnedFd>);

    impl Timer {
        /// A timer, if a file can be opened for it.
        #[expect(
            deprecated,
            reason = "unsound only for a descriptor that its owner can close, and this one is owned"
        )]
        pub(super) fn new() -> Option<Self> {
            let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
            let timer = timerfd_create(TimerfdClockId::Monotonic, flags).ok()?;
            let timer = AsyncFd::with_interest(timer, Interest::READABLE).ok()?;
            Some(Self(timer))
        }

        /// Waits for this long. A wait that is dropped ends with the next one.
        pub(super) async fn wait(&self, time: Duration) -> io::Result<()> {
            let once = Itimerspec {
                it_interval: Timespec::default(),
                it_value: Timespec::try_from(time).map_err(io::Error::other)?,
            };
            timerfd_settime(&self.0, TimerfdTimerFlags::empty(), &once)?;
            loop {
                let mut ready = self.0.readable().await?;
                let mut expirations = [0; 8];
                let read = ready.try_io(|timer| Ok(rustix::io::read(timer, &mut expirations)?));
                if let Ok(read) = read {
                    return read.map(drop);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use futures_util::FutureExt as _;

    use super::*;

    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn precise_timer_ends_after_its_time_and_not_a_millisecond_later() {
        let timer = precise::Timer::new().expect("a timer");
        // A wait that is dropped leaves nothing behind.
        let polled = timer.wait(Duration::from_millis(8)).now_or_never();
        assert!(polled.is_none(), "it is over: {polled:?}");
        let wait = Duration::from_micros(300);
        let mut shortest = Duration::MAX;
        for _ in 0..50 {
            let began = Instant::now();
            timer.wait(wait).await.expect("a wait");
            let took = began.elapsed();
            assert!(took >= wait, "{took:?}");
            shortest = shortest.min(took);
        }
        assert!(shortest < Duration::from_micros(900), "{shortest:?}");
    }
}
