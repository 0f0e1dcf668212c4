//! The flight recorder: the last changes of state of an endpoint, for the question "what happened just before?".
//!
//! A ring of plain values in memory that is taken once; recording is a copy under a lock that is held for nothing else.
//! Events are changes of state of sessions, lanes, pushes and arrivals, never requests or pages, so their number does
//! not grow with what is moved.

use std::{fmt, sync::Arc, time::Duration};

use parking_lot::Mutex;

/// Events that are remembered.
pub(crate) const EVENTS: usize = 1024;
/// Most events that travel with an error.
pub(crate) const TAIL: usize = 24;

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum EventKind {
    /// The ring has nothing here. Never seen by callers.
    Nothing,
    /// This side dials a peer.
    SessionDialled,
    /// A peer has dialled and authenticated itself.
    SessionAccepted,
    /// Lanes are connected; `value` is their number.
    SessionReady,
    /// It is over; `code` says whether by an error (1) or not (0).
    SessionEnded,
    /// The peer was silent for `value` milliseconds.
    PeerSilent,
    /// A lane failed; `code` is the verbs status, where it is known.
    LaneFailed,
    /// Lanes were fenced because the peer did not answer in time.
    FenceForced,
    /// A device refused to end a lane.
    FenceFailed,
    /// A rail cannot be used any more.
    RailFailed,
    /// A push begins.
    PushOpening,
    /// The reader has agreed.
    PushOpen,
    /// Nothing more is posted for it.
    PushStopping,
    /// It is over; `code` is its outcome (0 completed, 1 cancelled, 2 revoked, 3 expired, 4 refused, 5 failed, 6 not
    /// fenced) and `value` the bytes posted.
    PushEnded,
    /// A grant was issued; `value` is the number of its pages.
    GrantIssued,
    /// A grant was refused; `code` is the refuse code of the protocol.
    GrantRefused,
    /// A writer has opened a grant.
    ArrivalOpen,
    /// A grant is being taken back; `code` is 1 if that is because of its deadline.
    ArrivalRevoking,
    /// It is over; `code` as for a push, and `value` the parts that were missing.
    ArrivalEnded,
    /// The endpoint begins to drain; `value` is its time in milliseconds.
    Draining,
    /// A lane was set aside, by whatever showed that it does not work.
    LaneDown,
    /// A lane was replaced by a new one.
    LaneRenewed,
    /// Parts were posted again; `value` says how many.
    PartsReplayed,
}

/// One change of state. What does not apply is 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Event {
    /// Since the endpoint was started.
    pub at: Duration,
    /// What.
    pub kind: EventKind,
    /// The session, by the number of its control connection.
    pub session: u64,
    /// The push, by the writer's number.
    pub push: u64,
    /// The grant's slot.
    pub slot: u32,
    /// The grant's generation.
    pub generation: u32,
    /// Our rail.
    pub rail: u16,
    /// The lane, by its place in the session.
    pub lane: u16,
    /// See [`EventKind`].
    pub code: u32,
    /// See [`EventKind`].
    pub value: u64,
}

impl Event {
    pub(crate) const NONE: Self = Self {
        at: Duration::ZERO,
        kind: EventKind::Nothing,
        session: 0,
        push: 0,
        slot: 0,
        generation: 0,
        rail: 0,
        lane: 0,
        code: 0,
        value: 0,
    };

    pub(crate) fn new(kind: EventKind, at: Duration) -> Self {
        Self {
            kind,
            at,
            ..Self::NONE
        }
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.6} {:?}", self.at.as_secs_f64(), self.kind)?;
        let fields = [
            ("session", self.session & !(1 << 63)),
            ("push", self.push),
            ("slot", u64::from(self.slot)),
            ("generation", u64::from(self.generation)),
            ("rail", u64::from(self.rail)),
            ("lane", u64::from(self.lane)),
            ("code", u64::from(self.code)),
            ("value", self.value),
        ];
        for (name, value) in fields.into_iter().filter(|(_, value)| *value != 0) {
            write!(f, " {name}={value}")?;
        }
        Ok(())
    }
}

/// The last events of an endpoint, oldest first. `Display` gives one line for each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FlightRecord {
    events: Vec<Event>,
    forgotten: u64,
}

impl FlightRecord {
    /// Oldest first.
    pub fn events(&self) -> &[Event] {
        &self.events
    }

    /// Events that happened before and are not remembered any more.
    pub fn forgotten(&self) -> u64 {
        self.forgotten
    }
}

impl fmt::Display for FlightRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.forgotten > 0 {
            writeln!(f, "({} events before)", self.forgotten)?;
        }
        self.events
            .iter()
            .try_for_each(|event| writeln!(f, "{event}"))
    }
}

/// The ring.
#[derive(Debug)]
pub(crate) struct Recorder(Mutex<Ring>);

#[derive(Debug)]
struct Ring {
    events: Box<[Event]>,
    /// Events so far.
    count: u64,
}

impl Recorder {
    pub(crate) fn new() -> Self {
        Self(Mutex::new(Ring {
            events: vec![Event::NONE; EVENTS].into_boxed_slice(),
            count: 0,
        }))
    }

    /// Remembers `event` in the place of the oldest.
    pub(crate) fn record(&self, event: Event) {
        let mut ring = self.0.lock();
        let at = (ring.count % EVENTS as u64) as usize;
        ring.events[at] = event;
        ring.count += 1;
    }

    /// All that is remembered.
    pub(crate) fn snapshot(&self) -> FlightRecord {
        let ring = self.0.lock();
        FlightRecord {
            events: ring.in_order().copied().collect(),
            forgotten: ring.count.saturating_sub(EVENTS as u64),
        }
    }

    /// The last events that `concerns` says yes to, oldest first.
    pub(crate) fn tail(&self, concerns: impl Fn(&Event) -> bool) -> Arc<[Event]> {
        let ring = self.0.lock();
        let found = ring.in_order().filter(|event| concerns(event));
        let skip = found.clone().count().saturating_sub(TAIL);
        found.skip(skip).copied().collect()
    }
}

impl Ring {
    fn in_order(&self) -> impl Iterator<Item = &Event> + Clone {
        let used = self.count.min(EVENTS as u64) as usize;
        let oldest = match used == EVENTS {
            true => (self.count % EVENTS as u64) as usize,
            false => 0,
        };
        let (newer, older) = self.events[..used].split_at(oldest);
        older.iter().chain(newer)
    }
}
