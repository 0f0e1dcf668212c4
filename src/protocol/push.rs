//! The writer's side of one grant.
//!
//! ```text
//!            accepted             finish            nothing queued or in flight
//!  Opening ───────────▶ Active ───────────▶ Finishing ────────────────────────▶ Ended(Completed)
//!     │                   │ revoke, cancel,     │
//!     │ refused           │ deadline, failure   │
//!     ▼                   ▼                     ▼
//!   Ended              Draining(end) ──nothing in flight──▶ Ended(end)
//!                         └── drain deadline: fence the lanes, which abandons what is in flight
//! ```
//!
//! Invariants: exactly one end is ever reported; no request is posted once draining has begun; the end is reported
//! only when nothing of the push is in flight, so that its source pages may be reused.

use std::time::Duration;

use super::Time;

/// How a push ended. `F` is the caller's type of failure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum PushEnd<F> {
    /// Everything has been placed in the peer's memory.
    Completed,
    /// The writer's own caller cancelled it.
    Cancelled,
    /// The reader took the grant back, for the reason it gave.
    Revoked(u16),
    /// The deadline passed.
    Expired,
    /// It failed.
    Failed(F),
}

/// What the driver must do now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum PushAction<F> {
    /// Nothing.
    None,
    /// Drop what is queued; do not post for this push again.
    StopPosting,
    /// The peer takes too long to acknowledge: fence the lanes that hold requests of this push.
    Fence,
    /// The push is over. Tell the peer so if `tell_peer`, then the caller.
    End {
        /// How.
        end: PushEnd<F>,
        /// Whether the peer holds the grant open and must be told that nothing is in flight.
        tell_peer: bool,
    },
}

#[derive(Debug, PartialEq, Eq)]
enum State<F> {
    Opening { until: Time },
    Active { deadline: Time },
    Finishing { deadline: Time },
    Draining { end: PushEnd<F>, fence_at: Time },
    Ended,
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct PushMachine<F> {
    state: State<F>,
    /// Pieces of work accepted from the caller and not yet wholly posted.
    queued: u64,
    /// Requests posted and not yet retired.
    in_flight: u64,
    drain: Duration,
}

impl<F> PushMachine<F> {
    /// A push whose opening must succeed by `until`, and which waits `drain` for requests in flight before it fences.
    pub(crate) fn new(until: Time, drain: Duration) -> Self {
        Self {
            state: State::Opening { until },
            queued: 0,
            in_flight: 0,
            drain,
        }
    }

    /// Whether requests may be posted.
    pub(crate) fn may_post(&self) -> bool {
        matches!(self.state, State::Active { .. } | State::Finishing { .. })
    }

    /// Whether the peer has not answered yet.
    pub(crate) fn is_opening(&self) -> bool {
        matches!(self.state, State::Opening { .. })
    }

    /// Whether the end has been reported.
    #[cfg(test)]
    pub(crate) fn is_ended(&self) -> bool {
        matches!(self.state, State::Ended)
    }

    /// Requests in flight.
    #[cfg(test)]
    pub(crate) fn in_flight(&self) -> u64 {
        self.in_flight
    }

    /// When [`PushMachine::tick`] must be called next.
    pub(crate) fn next_deadline(&self) -> Option<Time> {
        match &self.state {
            State::Opening { until } => Some(*until),
            State::Active { deadline } | State::Finishing { deadline } => Some(*deadline),
            State::Draining { fence_at, .. } => Some(*fence_at),
            State::Ended => None,
        }
    }

    /// The peer accepted and keeps the grant open for `remaining`. Returns `false` if that was not awaited, in which
    /// case the peer must be told that this push is over.
    pub(crate) fn accepted(&mut self, now: Time, remaining: Duration) -> bool {
        if self.is_opening() {
            self.state = State::Active {
                deadline: now + remaining,
            };
            return true;
        }
        false
    }

    /// The caller handed over one more piece of work, or one that was posted may have to be posted again. The latter is
    /// said before its requests are [retired](PushMachine::retired), so that the push does not end in between.
    pub(crate) fn queue(&mut self) {
        self.queued += 1;
    }

    /// One piece of work has been wholly posted.
    pub(crate) fn dequeue(&mut self) {
        self.queued = self.queued.saturating_sub(1);
    }

    /// One piece of work need not be posted (again): the peer has it.
    pub(crate) fn not_needed(&mut self) -> PushAction<F> {
        self.dequeue();
        self.settle()
    }

    /// `requests` have been posted.
    pub(crate) fn posted(&mut self, requests: u32) {
        debug_assert!(self.may_post());
        self.in_flight += u64::from(requests);
    }

    /// `requests` are no longer in flight: completed, flushed or abandoned with their lane.
    pub(crate) fn retired(&mut self, requests: u32) -> PushAction<F> {
        debug_assert!(self.in_flight >= u64::from(requests));
        self.in_flight = self.in_flight.saturating_sub(u64::from(requests));
        self.settle()
    }

    /// The caller has handed over everything, the tail included.
    pub(crate) fn finish(&mut self) -> PushAction<F> {
        if let State::Active { deadline } = self.state {
            self.state = State::Finishing { deadline };
        }
        self.settle()
    }

    /// Ends the push as `end` as soon as nothing of it is in flight. The first cause wins.
    pub(crate) fn stop(&mut self, now: Time, end: PushEnd<F>) -> PushAction<F> {
        match self.state {
            State::Opening { .. } => {
                // Nothing has been posted, and the peer may or may not have opened it: it is told if it answers.
                self.state = State::Ended;
                PushAction::End {
                    end,
                    tell_peer: false,
                }
            }
            State::Active { .. } | State::Finishing { .. } => {
                self.state = State::Draining {
                    end,
                    fence_at: now + self.drain,
                };
                match self.settle() {
                    PushAction::None => PushAction::StopPosting,
                    over => over,
                }
            }
            State::Draining { .. } | State::Ended => PushAction::None,
        }
    }

    /// Time has passed.
    pub(crate) fn tick(&mut self, now: Time) -> PushAction<F> {
        match &mut self.state {
            State::Opening { until } if *until <= now => self.stop(now, PushEnd::Expired),
            State::Active { deadline } | State::Finishing { deadline } if *deadline <= now => {
                self.stop(now, PushEnd::Expired)
            }
            State::Draining { fence_at, .. } if *fence_at <= now => {
                *fence_at = Time(u64::MAX);
                PushAction::Fence
            }
            _ => PushAction::None,
        }
    }

    fn settle(&mut self) -> PushAction<F> {
        if self.in_flight > 0 {
            return PushAction::None;
        }
        match std::mem::replace(&mut self.state, State::Ended) {
            State::Finishing { .. } if self.queued == 0 => PushAction::End {
                end: PushEnd::Completed,
                tell_peer: false,
            },
            State::Draining { end, .. } => PushAction::End {
                end,
                tell_peer: true,
            },
            unchanged => {
                self.state = unchanged;
                PushAction::None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DRAIN: Duration = Duration::from_nanos(50);

    #[derive(Clone, Debug)]
    enum Event {
        Accept,
        Queue,
        Post(u32),
        Retire(u32),
        Finish,
        Revoke,
        Cancel,
        Fail,
        Pass(u64),
    }

    fn event() -> impl Strategy<Value = Event> {
        prop_oneof![
            2 => Just(Event::Accept),
            4 => Just(Event::Queue),
            6 => (1u32..5).prop_map(Event::Post),
            6 => (1u32..5).prop_map(Event::Retire),
            1 => Just(Event::Finish),
            1 => Just(Event::Revoke),
            1 => Just(Event::Cancel),
            1 => Just(Event::Fail),
            2 => (1u64..80).prop_map(Event::Pass),
        ]
    }

    proptest! {
        #[test]
        fn one_end_and_never_with_requests_in_flight(events in prop::collection::vec(event(), 0..80)) {
            let mut now = Time(0);
            let mut push = PushMachine::<u8>::new(Time(100), DRAIN);
            let (mut ends, mut queued, mut in_flight) = (0, 0u32, 0u32);
            // After the schedule everything is let run out; the push must then have ended.
            let tail = std::iter::repeat_n([Event::Pass(1000), Event::Retire(u32::MAX)], 4).flatten();
            for event in events.into_iter().chain(tail) {
                let action = match event {
                    Event::Accept => { push.accepted(now, Duration::from_nanos(300)); PushAction::None }
                    Event::Queue if push.may_post() => { push.queue(); queued += 1; PushAction::None }
                    Event::Post(n) if push.may_post() && queued > 0 => {
                        push.posted(n);
                        push.dequeue();
                        queued -= 1;
                        in_flight += n;
                        PushAction::None
                    }
                    Event::Retire(n) => {
                        let n = n.min(in_flight);
                        in_flight -= n;
                        push.retired(n)
                    }
                    Event::Finish => push.finish(),
                    Event::Revoke => push.stop(now, PushEnd::Revoked(1)),
                    Event::Cancel => push.stop(now, PushEnd::Cancelled),
                    Event::Fail => push.stop(now, PushEnd::Failed(7)),
                    Event::Pass(by) => { now = now + Duration::from_nanos(by); push.tick(now) }
                    Event::Queue | Event::Post(_) => PushAction::None,
                };
                match action {
                    PushAction::End { end, .. } => {
                        ends += 1;
                        prop_assert_eq!(in_flight, 0);
                        prop_assert!(push.is_ended());
                        if end == PushEnd::Completed { prop_assert_eq!(queued, 0); }
                    }
                    PushAction::Fence => {
                        // The driver destroys the lanes: all in flight is abandoned.
                        let all = std::mem::take(&mut in_flight);
                        let over = push.retired(all);
                        let ended = matches!(over, PushAction::End { tell_peer: true, .. });
                        prop_assert!(ended);
                        ends += 1;
                    }
                    PushAction::StopPosting => prop_assert!(!push.may_post()),
                    PushAction::None => {}
                }
                prop_assert_eq!(u64::from(in_flight), push.in_flight());
            }
            prop_assert_eq!(ends, 1, "ends exactly once");
        }
    }

    #[test]
    fn the_first_cause_wins() {
        let mut push = PushMachine::<u8>::new(Time(100), DRAIN);
        assert!(push.accepted(Time(0), Duration::from_nanos(500)));
        push.queue();
        push.posted(1);
        push.dequeue();
        assert_eq!(
            push.stop(Time(1), PushEnd::Revoked(3)),
            PushAction::StopPosting
        );
        assert_eq!(push.stop(Time(2), PushEnd::Failed(1)), PushAction::None);
        assert_eq!(
            push.retired(1),
            PushAction::End {
                end: PushEnd::Revoked(3),
                tell_peer: true
            }
        );
        assert_eq!(push.tick(Time(10_000)), PushAction::None);
    }
}
