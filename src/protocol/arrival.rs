//! The reader's side of one grant.
//!
//! ```text
//!            opened            all parts
//!  Granted ──────────▶ Open ──────────────▶ Ended(Completed)
//!     │                 │ revoke, deadline
//!     │ revoke,         ▼
//!     │ deadline     Draining(end) ── peer says it is drained, or its lanes are fenced ──▶ Ended(end)
//!     ▼                 └── fence deadline: fence the lanes
//!   Ended
//! ```
//!
//! Invariants: exactly one end is ever reported; once it is reported, no write of the grant can land, because either
//! no peer was ever told where to write, or the peer has nothing in flight and says so, or the lanes are fenced.

use std::time::Duration;

use super::Time;

/// How an arrival ended. `F` is the caller's type of failure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ArrivalEnd<F> {
    /// Everything is there.
    Completed,
    /// The reader's caller took the grant back.
    Revoked,
    /// The deadline passed.
    Expired,
    /// It failed, or the writer gave up.
    Failed(F),
}

/// What the driver must do now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ArrivalAction<F> {
    /// Nothing.
    None,
    /// Ask the writer to stop and to say when it has drained.
    SendRevoke {
        /// Whether the deadline is the cause, rather than the caller.
        expired: bool,
    },
    /// The writer is silent: fence its lanes, then call [`ArrivalMachine::unreachable`].
    Fence,
    /// The arrival is over.
    End(ArrivalEnd<F>),
}

#[derive(Debug, PartialEq, Eq)]
enum State<F> {
    Granted,
    Open,
    Draining { end: ArrivalEnd<F>, fence_at: Time },
    Ended,
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct ArrivalMachine<F> {
    state: State<F>,
    deadline: Time,
    grace: Duration,
}

impl<F> ArrivalMachine<F> {
    /// A grant that lapses at `deadline`; a writer that is asked to stop has `grace` to answer.
    pub(crate) fn new(deadline: Time, grace: Duration) -> Self {
        Self {
            state: State::Granted,
            deadline,
            grace,
        }
    }

    /// When [`ArrivalMachine::tick`] must be called next.
    pub(crate) fn next_deadline(&self) -> Option<Time> {
        match &self.state {
            State::Granted | State::Open => Some(self.deadline),
            State::Draining { fence_at, .. } => Some(*fence_at),
            State::Ended => None,
        }
    }

    /// Whether a writer may open it.
    pub(crate) fn is_granted(&self) -> bool {
        matches!(self.state, State::Granted)
    }

    /// Whether parts are counted.
    pub(crate) fn is_open(&self) -> bool {
        matches!(self.state, State::Open)
    }

    /// Whether the end has been reported.
    #[cfg(test)]
    pub(crate) fn is_ended(&self) -> bool {
        matches!(self.state, State::Ended)
    }

    /// A writer was told where to write. Returns the time it has, or `None` if the grant is not to be had (any more).
    pub(crate) fn open(&mut self, now: Time) -> Option<Duration> {
        if !matches!(self.state, State::Granted) || self.deadline <= now {
            return None;
        }
        self.state = State::Open;
        Some(now.until(self.deadline))
    }

    /// Every part has arrived.
    pub(crate) fn completed(&mut self) -> ArrivalAction<F> {
        match self.state {
            State::Open => self.end(ArrivalEnd::Completed),
            _ => ArrivalAction::None,
        }
    }

    /// The caller wants the pages back.
    pub(crate) fn revoke(&mut self, now: Time) -> ArrivalAction<F> {
        self.stop(now, ArrivalEnd::Revoked, false)
    }

    /// The arrival has to fail although the writer may still be writing.
    pub(crate) fn fail(&mut self, now: Time, failure: F) -> ArrivalAction<F> {
        self.stop(now, ArrivalEnd::Failed(failure), false)
    }

    /// The writer says that nothing is in flight, having given up by itself for `failure`.
    pub(crate) fn given_up(&mut self, failure: F) -> ArrivalAction<F> {
        match self.state {
            State::Open => self.end(ArrivalEnd::Failed(failure)),
            _ => self.drained(),
        }
    }

    /// The writer says that nothing is in flight, as it was asked to.
    pub(crate) fn drained(&mut self) -> ArrivalAction<F> {
        match std::mem::replace(&mut self.state, State::Ended) {
            State::Draining { end, .. } => ArrivalAction::End(end),
            unchanged => {
                self.state = unchanged;
                ArrivalAction::None
            }
        }
    }

    /// The lanes of the writer have been fenced, because it is lost or silent: no write can land any more.
    pub(crate) fn unreachable(&mut self, failure: F) -> ArrivalAction<F> {
        match self.state {
            State::Open => self.end(ArrivalEnd::Failed(failure)),
            State::Draining { .. } => self.drained(),
            State::Granted | State::Ended => ArrivalAction::None,
        }
    }

    /// Time has passed.
    pub(crate) fn tick(&mut self, now: Time) -> ArrivalAction<F> {
        match &mut self.state {
            State::Granted | State::Open if self.deadline <= now => {
                self.stop(now, ArrivalEnd::Expired, true)
            }
            State::Draining { fence_at, .. } if *fence_at <= now => {
                *fence_at = Time(u64::MAX);
                ArrivalAction::Fence
            }
            _ => ArrivalAction::None,
        }
    }

    fn stop(&mut self, now: Time, end: ArrivalEnd<F>, expired: bool) -> ArrivalAction<F> {
        match self.state {
            State::Granted => self.end(end),
            State::Open => {
                self.state = State::Draining {
                    end,
                    fence_at: now + self.grace,
                };
                ArrivalAction::SendRevoke { expired }
            }
            State::Draining { .. } | State::Ended => ArrivalAction::None,
        }
    }

    fn end(&mut self, end: ArrivalEnd<F>) -> ArrivalAction<F> {
        self.state = State::Ended;
        ArrivalAction::End(end)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GRACE: Duration = Duration::from_nanos(50);

    proptest! {
        /// A model writer that may write exactly while it has been told where and has neither drained nor been fenced.
        #[test]
        fn one_end_and_no_writer_left(events in prop::collection::vec((0u8..8, 1u64..60), 0..60)) {
            let mut now = Time(0);
            let mut arrival = ArrivalMachine::<u8>::new(Time(200), GRACE);
            let (mut ends, mut may_write, mut asked) = (0, false, false);
            let tail = std::iter::repeat_n((7u8, 500u64), 3);
            for (event, by) in events.into_iter().chain(tail) {
                let mut action = match event {
                    0 => { if arrival.open(now).is_some() { may_write = true; } ArrivalAction::None }
                    // A writer stops by itself once all is written.
                    1 if may_write && arrival.is_open() => { may_write = false; arrival.completed() }
                    2 => arrival.revoke(now),
                    3 if asked && may_write => { may_write = false; arrival.drained() }
                    4 if may_write => { may_write = false; arrival.given_up(1) }
                    5 => { may_write = false; arrival.unreachable(2) }
                    6 => arrival.fail(now, 3),
                    7 => { now = now + Duration::from_nanos(by); arrival.tick(now) }
                    _ => ArrivalAction::None,
                };
                if action == ArrivalAction::Fence {
                    may_write = false;
                    action = arrival.unreachable(9);
                    let ended = matches!(action, ArrivalAction::End(_));
                    prop_assert!(ended);
                }
                match action {
                    ArrivalAction::End(_) => { ends += 1; prop_assert!(!may_write, "a write could still land"); }
                    ArrivalAction::SendRevoke { .. } => asked = true,
                    ArrivalAction::Fence | ArrivalAction::None => {}
                }
                prop_assert_eq!(arrival.is_ended(), ends == 1);
            }
            prop_assert_eq!(ends, 1, "ends exactly once, at the latest by its deadline and the grace");
        }
    }

    #[test]
    fn a_lapsed_grant_cannot_be_opened() {
        let mut arrival = ArrivalMachine::<u8>::new(Time(10), GRACE);
        assert_eq!(arrival.open(Time(10)), None);
        assert_eq!(
            arrival.tick(Time(10)),
            ArrivalAction::End(ArrivalEnd::Expired)
        );
        assert_eq!(arrival.open(Time(5)), None);
    }

    #[test]
    fn a_grant_is_opened_once() {
        let mut arrival = ArrivalMachine::<u8>::new(Time(10), GRACE);
        assert_eq!(arrival.open(Time(4)), Some(Duration::from_nanos(6)));
        assert_eq!(arrival.open(Time(4)), None);
    }
}
