//! Where tickets and held prefills meet, whichever comes first.
//!
//! In the relay and room dialects the router talks to both engines and carries nothing between them. The decode engine
//! posts its ticket to the prefill engine under the room's name; the router's prefill request names the same room.
//!
//! Invariants: bounded (rooms, bytes, time); a ticket is answered when the prefill engine has taken it, when the
//! prefill has ended, or at its deadline. A room's end is remembered for a while, so that a late ticket fails at once.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use axum::http::StatusCode;
use parking_lot::Mutex;
use tokio::sync::oneshot;

use super::error::ApiError;

/// Rooms at most.
const MAX_ROOMS: usize = 4096;
/// Bytes of waiting tickets at most.
const MAX_BYTES: usize = 64 << 20;
/// How long the end of a room is remembered.
const REMEMBERED: Duration = Duration::from_secs(60);
/// A sweep of all rooms happens not more often.
const SWEEP: Duration = Duration::from_secs(1);

/// What a ticket's sender is told.
pub type Taken = Result<(), ApiError>;

/// The rooms of an engine.
#[derive(Default)]
pub struct Rooms {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    rooms: HashMap<String, Room>,
    bytes: usize,
    swept: Option<Instant>,
}

enum Room {
    /// The ticket came first.
    Ticket {
        ticket: Vec<u8>,
        taken: oneshot::Sender<Taken>,
        expires: Instant,
    },
    /// The prefill came first: its request's id.
    Held { request: String },
    /// The prefill has ended.
    Ended { error: ApiError, expires: Instant },
}

/// A ticket that waited.
pub struct Waiting {
    /// The ticket.
    pub ticket: Vec<u8>,
    /// To be told what became of it.
    pub taken: oneshot::Sender<Taken>,
}

/// What to do with a ticket.
pub enum Arrival {
    /// Give it to this request.
    Held(String),
    /// Wait for the prefill.
    Wait(oneshot::Receiver<Taken>),
}

impl Rooms {
    /// Takes the ticket that waits for `room`, if there is one.
    pub fn take(&self, room: &str) -> Option<Waiting> {
        let mut state = self.state.lock();
        state.sweep(Instant::now());
        state.take(room)
    }

    /// The prefill of `room` is under way as `request`. A ticket that has come meanwhile is returned.
    ///
    /// # Errors
    ///
    /// 409: the room is in use. 429: there are too many.
    pub fn hold(&self, room: &str, request: &str) -> Result<Option<Waiting>, ApiError> {
        let mut state = self.state.lock();
        state.sweep(Instant::now());
        if matches!(state.rooms.get(room), Some(Room::Held { .. })) {
            return Err(in_use(room));
        }
        let waiting = state.take(room);
        state.admit()?;
        state.rooms.insert(
            room.to_owned(),
            Room::Held {
                request: request.to_owned(),
            },
        );
        Ok(waiting)
    }

    /// The prefill of `room` has ended, or never began. A ticket that waits, and those that come later, are told `error`.
    pub fn end(&self, room: &str, error: ApiError) {
        let mut state = self.state.lock();
        if let Some(waiting) = state.take(room) {
            // Its sender may have gone.
            let _ = waiting.taken.send(Err(error.clone()));
        }
        let expires = Instant::now() + REMEMBERED;
        state.rooms.remove(room);
        if state.admit().is_ok() {
            state
                .rooms
                .insert(room.to_owned(), Room::Ended { error, expires });
        }
    }

    /// A ticket has come.
    ///
    /// # Errors
    ///
    /// 409: there is another for the room. 429: too many wait. Or what the prefill has ended with.
    pub fn arrive(
        &self,
        room: &str,
        ticket: Vec<u8>,
        patience: Duration,
    ) -> Result<Arrival, ApiError> {
        let now = Instant::now();
        let mut state = self.state.lock();
        state.sweep(now);
        match state.rooms.get(room) {
            Some(Room::Held { request }) => return Ok(Arrival::Held(request.clone())),
            Some(Room::Ended { error, .. }) => return Err(error.clone()),
            Some(Room::Ticket { taken, .. }) if !taken.is_closed() => return Err(in_use(room)),
            Some(Room::Ticket { .. }) | None => {}
        }
        state.take(room);
        if state.bytes + ticket.len() > MAX_BYTES {
            return Err(too_many());
        }
        state.admit()?;
        state.bytes += ticket.len();
        let (taken, wait) = oneshot::channel();
        state.rooms.insert(
            room.to_owned(),
            Room::Ticket {
                ticket,
                taken,
                expires: now + patience,
            },
        );
        Ok(Arrival::Wait(wait))
    }

    /// Whether a ticket waits there.
    #[cfg(test)]
    pub(super) fn waits(&self, room: &str) -> bool {
        matches!(self.state.lock().rooms.get(room), Some(Room::Ticket { .. }))
    }

    /// Forgets a ticket that nobody waits for any more.
    pub fn forget(&self, room: &str) {
        let mut state = self.state.lock();
        let gone = |room: &Room| matches!(room, Room::Ticket { taken, .. } if taken.is_closed());
        if state.rooms.get(room).is_some_and(gone) {
            state.take(room);
        }
    }
}

impl State {
    fn take(&mut self, room: &str) -> Option<Waiting> {
        if !matches!(self.rooms.get(room), Some(Room::Ticket { .. })) {
            return None;
        }
        match self.rooms.remove(room) {
            Some(Room::Ticket { ticket, taken, .. }) => {
                self.bytes -= ticket.len();
                (!taken.is_closed()).then_some(Waiting { ticket, taken })
            }
            _ => None,
        }
    }

    fn admit(&mut self) -> Result<(), ApiError> {
        if self.rooms.len() < MAX_ROOMS {
            return Ok(());
        }
        self.swept = None;
        self.sweep(Instant::now());
        if self.rooms.len() < MAX_ROOMS {
            Ok(())
        } else {
            Err(too_many())
        }
    }

    fn sweep(&mut self, now: Instant) {
        if self
            .swept
            .is_some_and(|swept| now.duration_since(swept) < SWEEP)
        {
            return;
        }
        self.swept = Some(now);
        let bytes = &mut self.bytes;
        self.rooms.retain(|_, room| match room {
            Room::Held { .. } => true,
            Room::Ended { expires, .. } => *expires > now,
            Room::Ticket {
                ticket,
                taken,
                expires,
            } => {
                let keep = *expires > now && !taken.is_closed();
                if !keep {
                    *bytes -= ticket.len();
                }
                keep
            }
        });
    }
}

fn in_use(room: &str) -> ApiError {
    ApiError::new(
        StatusCode::CONFLICT,
        "room_in_use",
        format!("room {room} is in use"),
    )
}

fn too_many() -> ApiError {
    ApiError::new(
        StatusCode::TOO_MANY_REQUESTS,
        "too_many_rooms",
        "too many rooms are open",
    )
    .with_retry_after(Duration::from_secs(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(60);

    fn wait(rooms: &Rooms, room: &str) -> oneshot::Receiver<Taken> {
        match rooms.arrive(room, b"ticket".to_vec(), PATIENCE) {
            Ok(Arrival::Wait(wait)) => wait,
            _ => panic!("it does not wait"),
        }
    }

    #[test]
    fn the_ticket_may_come_first() {
        let rooms = Rooms::default();
        let mut told = wait(&rooms, "1");
        let waiting = rooms.take("1").unwrap();
        assert_eq!(waiting.ticket, b"ticket");
        waiting.taken.send(Ok(())).unwrap();
        assert_eq!(told.try_recv(), Ok(Ok(())));
        assert_eq!(rooms.state.lock().bytes, 0);
    }

    #[test]
    fn the_prefill_may_come_first() {
        let rooms = Rooms::default();
        assert!(rooms.hold("1", "request").unwrap().is_none());
        match rooms.arrive("1", Vec::new(), PATIENCE) {
            Ok(Arrival::Held(request)) => assert_eq!(request, "request"),
            _ => panic!("it is held"),
        }
        assert_eq!(
            rooms.hold("1", "other").map(|_| ()).unwrap_err().status,
            StatusCode::CONFLICT
        );
    }

    #[test]
    fn a_ticket_that_comes_while_the_prefill_is_submitted_is_found() {
        let rooms = Rooms::default();
        assert!(rooms.take("1").is_none());
        let _told = wait(&rooms, "1");
        assert!(rooms.hold("1", "request").unwrap().is_some());
    }

    #[test]
    fn the_end_is_told_to_tickets_before_and_after() {
        let rooms = Rooms::default();
        let mut told = wait(&rooms, "1");
        let error = ApiError::internal("gone");
        rooms.end("1", error.clone());
        assert_eq!(told.try_recv(), Ok(Err(error.clone())));
        let late = rooms.arrive("1", Vec::new(), PATIENCE);
        assert_eq!(late.map(|_| ()).unwrap_err(), error);
        // The same room may be used again.
        assert!(rooms.hold("1", "request").unwrap().is_none());
    }

    #[test]
    fn a_sender_that_has_gone_leaves_nothing() {
        let rooms = Rooms::default();
        drop(wait(&rooms, "1"));
        rooms.forget("1");
        assert!(rooms.state.lock().rooms.is_empty());
        drop(wait(&rooms, "2"));
        assert!(rooms.take("2").is_none());
        assert_eq!(rooms.state.lock().bytes, 0);
    }

    #[test]
    fn a_second_ticket_is_refused_while_the_first_waits() {
        let rooms = Rooms::default();
        let first = wait(&rooms, "1");
        let second = rooms.arrive("1", Vec::new(), PATIENCE);
        assert_eq!(second.map(|_| ()).unwrap_err().status, StatusCode::CONFLICT);
        drop(first);
        drop(wait(&rooms, "1"));
    }

    #[test]
    fn rooms_are_bounded() {
        let rooms = Rooms::default();
        let held: Vec<_> = (0..MAX_ROOMS)
            .map(|i| wait(&rooms, &i.to_string()))
            .collect();
        let more = rooms.arrive("more", Vec::new(), PATIENCE);
        assert_eq!(
            more.map(|_| ()).unwrap_err().status,
            StatusCode::TOO_MANY_REQUESTS
        );
        drop(held);
        let more = wait(&rooms, "more");
        assert_eq!(rooms.state.lock().rooms.len(), 1);
        drop(more);
    }
}
