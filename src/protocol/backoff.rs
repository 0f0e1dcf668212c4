//! When a failed lane is made again.
//!
//! The first time at once: most failures are single. If it fails again before it has been good for a while, the wait
//! doubles up to a limit, so a link that flaps costs a few attempts a second however fast it flaps. The jitter comes
//! from a seed, so that the lanes of many peers do not come back in step and a test runs the same every time.

use std::time::Duration;

use super::Time;

/// The wait after the second failure in a row.
const BASE: Duration = Duration::from_millis(10);
/// The longest wait, before jitter.
const MOST: Duration = Duration::from_secs(2);
/// A lane that has worked for this long, and has carried something, counts as good.
const GOOD: Duration = Duration::from_secs(1);
/// Attempts that a port makes by becoming active are at least this far apart.
const HURRY: Duration = Duration::from_millis(100);

/// See the module's documentation.
#[derive(Clone, Debug)]
pub(crate) struct Backoff {
    seed: u64,
    /// Failures since the lane was last good.
    failures: u32,
    up_since: Option<Time>,
    /// Whether something has been acknowledged since it is up.
    proven: bool,
    attempted: Option<Time>,
    due: Time,
}

impl Backoff {
    /// Of a lane that works since `now`.
    pub(crate) fn new(seed: u64, now: Time) -> Self {
        Self {
            seed,
            failures: 0,
            up_since: Some(now),
            proven: false,
            attempted: None,
            due: Time(0),
        }
    }

    /// The lane works.
    pub(crate) fn up(&mut self, now: Time) {
        self.up_since = Some(now);
        self.proven = false;
    }

    /// It has carried something.
    pub(crate) fn proven(&mut self) {
        self.proven = true;
    }

    /// The lane has failed, or an attempt to make it again. Returns when to try (again).
    pub(crate) fn failed(&mut self, now: Time) -> Time {
        let was_good = self.proven
            && self
                .up_since
                .take()
                .is_some_and(|since| now - since >= GOOD);
        self.up_since = None;
        self.failures = match was_good {
            true => 1,
            false => self.failures.saturating_add(1),
        };
        self.due = now + self.delay();
        self.due
    }

    /// When to try, if not before `now`.
    pub(crate) fn due(&self, now: Time) -> Time {
        self.due.max(now)
    }

    /// An attempt is made.
    pub(crate) fn attempt(&mut self, now: Time) {
        self.attempted = Some(now);
    }

    /// Something has happened that makes success likely: when to try at the earliest.
    pub(crate) fn hurry(&self, now: Time) -> Time {
        self.attempted
            .map_or(now, |attempted| now.max(attempted + HURRY))
    }

    /// Until when a lane that has failed several times gets work only if no other lane works.
    pub(crate) fn suspect_until(&self) -> Time {
        match self.up_since {
            Some(since) if self.failures > 1 && !self.proven => since + self.delay(),
            _ => Time(0),
        }
    }

    fn delay(&self) -> Duration {
        let Some(doublings) = self.failures.checked_sub(2) else {
            return Duration::ZERO;
        };
        let delay = BASE.saturating_mul(1 << doublings.min(16)).min(MOST);
        // Three quarters to five quarters.
        let jitter = mix(self.seed ^ u64::from(self.failures)) % 512;
        delay * (768 + jitter as u32) / 1024
    }
}

/// Spreads the bits of a seed (the finalizer of SplitMix64).
fn mix(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_first_attempt_is_immediate_and_the_wait_grows_to_a_limit() {
        let mut backoff = Backoff::new(1, Time(0));
        assert_eq!(backoff.failed(Time(5)), Time(5));
        let mut last = Duration::ZERO;
        for _ in 0..30 {
            let wait = backoff.failed(Time(5)) - Time(5);
            assert!(wait >= last.min(MOST) / 2 && wait <= MOST * 5 / 4);
            last = wait;
        }
        assert!(last >= MOST * 3 / 4);
    }

    #[test]
    fn only_a_lane_that_carried_something_for_a_while_is_forgiven() {
        let later = Time(0) + GOOD;
        for (proven, until, forgiven) in [
            (true, later, true),
            (false, later, false),
            (true, Time(later.0 - 1), false),
        ] {
            let mut backoff = Backoff::new(1, Time(0));
            backoff.failed(Time(0));
            backoff.failed(Time(0));
            backoff.up(Time(0));
            assert_ne!(backoff.suspect_until(), Time(0));
            if proven {
                backoff.proven();
            }
            assert_eq!(backoff.failed(until) == until, forgiven, "{proven} {until}");
        }
    }

    proptest! {
        /// Whatever a port does, attempts are few: one for each `HURRY`, and those of the backoff.
        #[test]
        fn a_flapping_port_does_not_storm(gaps in prop::collection::vec(1u64..50_000_000, 200..400)) {
            let (mut now, mut backoff) = (Time(0), Backoff::new(7, Time(0)));
            let (mut due, mut attempts) = (backoff.failed(now), 0u64);
            for gap in gaps {
                now = now + Duration::from_nanos(gap);
                due = due.min(backoff.hurry(now));
                if due <= now {
                    attempts += 1;
                    backoff.attempt(now);
                    due = backoff.failed(now);
                }
            }
            let most = now.0 / HURRY.as_nanos() as u64 + 8;
            prop_assert!(attempts <= most, "{attempts} attempts in {now}");
        }
    }
}
