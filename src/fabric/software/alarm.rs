//! The deadlines of a context: one timer, whose descriptor wakes whoever waits.

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
    time::{Duration, Instant},
};

/// The earliest deadline, and a timer that is set for it.
#[derive(Debug)]
pub(in crate::fabric) struct Alarm {
    timer: Timer,
    /// When the timer fires.
    at: Option<Instant>,
}

impl Alarm {
    pub(in crate::fabric) fn new() -> io::Result<Self> {
        Timer::new().map(|timer| Self { timer, at: None })
    }

    /// Makes sure that it goes off no later than `at`.
    pub(in crate::fabric) fn no_later_than(&mut self, at: Option<Instant>) {
        let Some(at) = at else { return };
        if self.at.is_none_or(|current| at < current) {
            self.at = Some(at);
            if let Err(error) = self.timer.set(at.saturating_duration_since(Instant::now())) {
                // Only possible with an invalid descriptor or time; deadlines are then found by later polls.
                tracing::warn!(%error, "timerfd_settime");
            }
        }
    }

    /// The time, if the alarm should have gone off by now. It is not set any more then.
    pub(in crate::fabric) fn ring(&mut self) -> Option<Instant> {
        let at = self.at?;
        let now = Instant::now();
        (now >= at).then(|| {
            self.at = None;
            now
        })
    }
}

impl AsRawFd for Alarm {
    fn as_raw_fd(&self) -> RawFd {
        self.timer.0.as_raw_fd()
    }
}

/// A one-shot timer whose descriptor becomes readable when it expires (`timerfd_create(2)`).
#[derive(Debug)]
struct Timer(OwnedFd);

impl Timer {
    fn new() -> io::Result<Self> {
        // SAFETY: no pointers.
        let fd = unsafe {
            libc::timerfd_create(
                libc::CLOCK_MONOTONIC,
                libc::TFD_NONBLOCK | libc::TFD_CLOEXEC,
            )
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a fresh descriptor that nobody else owns.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Fires once, `after` from now.
    fn set(&self, after: Duration) -> io::Result<()> {
        // A zero value would disarm it.
        let after = after.max(Duration::from_nanos(1));
        let spec = libc::itimerspec {
            it_interval: libc::timespec {
                tv_sec: 0,
                tv_nsec: 0,
            },
            it_value: libc::timespec {
                tv_sec: after.as_secs().try_into().unwrap_or(libc::time_t::MAX),
                tv_nsec: after.subsec_nanos().into(),
            },
        };
        // SAFETY: `spec` lives through the call; the old value is not asked for.
        let rc =
            unsafe { libc::timerfd_settime(self.0.as_raw_fd(), 0, &spec, std::ptr::null_mut()) };
        if rc == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }
}
