//! The endpoint without its threads: everything that happens, as a function of what came in and of the time.
//!
//! [`Core`] drives the state machines of [`crate::protocol`] over the contexts of [`crate::fabric`] and over a
//! [`Control`] that carries messages. It never blocks, sleeps or looks at a clock, so a test can run any number of
//! cores in one thread under simulated time. One thread owns a core.
//!
//! | File | What |
//! |---|---|
//! | `session` | lanes to one peer: made, connected, fenced |
//! | `dial` | the dialling side of the handshake |
//! | `accept` | the accepting side of the handshake |
//! | `connect` | sessions made ahead of the first push |
//! | `writer` | the dialling side: open, plan, queue, finish |
//! | `remote` | what the peer told of its pool, checked |
//! | `pump` | from queued work to posted requests |
//! | `cut` | writes between regions of several registrations |
//! | `reader` | the accepting side: grants, arrivals, revocation |
//! | `windows` | keys to what one grant opens, bound and taken back |
//! | `recovery` | lanes that fail and are made again, rails that come and go |
//! | `access` | one-sided reads and writes of exported regions |
//! | `drain` | going away in good order |
//! | `limits` | what a peer can make this side hold |
//! | `liveness` | whether a peer is still there |
//! | `staging` | pushes of memory that a rail cannot reach |
//! | `watch` | what is told of all this: counters, events, the log |
//! | `timers` | what must be looked at when |
//!
//! # Order of work
//!
//! A step takes the control events that are there, *then* commands, *then* completions, and only then handles the
//! events. So a grant is known before a peer can ask for it, and when a writer says that it has drained, every
//! completion of what it wrote before has been counted.

mod accept;
mod access;
mod command;
mod connect;
mod cut;
mod dial;
mod drain;
mod limits;
mod liveness;
mod pump;
mod reader;
mod recovery;
mod remote;
mod session;
mod staging;
mod timers;
mod watch;
mod windows;
mod writer;

#[cfg(test)]
mod tests;

use std::{collections::BTreeMap, sync::Arc};

pub(crate) use self::{
    access::{AccessEntry, AccessOp, ExportRecord, RegionKeys},
    command::{Command, Control, ControlEvent},
    connect::ConnectEntry,
    reader::ArrivalEntry,
    staging::landing_bytes,
    writer::PushEntry,
};
use self::{
    drain::Draining,
    pump::Scratch,
    session::{LaneState, Role, Session},
    staging::Staging,
    timers::Timers,
};
use super::{
    config::Config,
    control::ConnId,
    error::PeerError,
    regions::Region,
    shared::{PoolRecord, TailArena},
    telemetry::{EventKind, Levels, Telemetry},
};
use crate::{
    fabric::{Completion, CompletionKind, Context, Device, FabricKind, LaneId, RailEvent, Status},
    protocol::Time,
    wire::{Goodbye, GoodbyeCode, Incarnation, Message, PoolId},
};

/// Most polls before control events are handled. A poll takes at least 32 completions if they are there.
const MAX_POLLS: usize = 4096;

/// One opened rail and what is left of its completion queue.
pub(super) struct Rail {
    pub(super) device: Arc<dyn Device>,
    pub(super) context: Box<dyn Context>,
    pub(super) kind: FabricKind,
    /// Completion-queue entries that no lane has reserved.
    pub(super) completions_free: u32,
    /// Memory windows that no grant has.
    pub(super) windows_free: u32,
    /// It cannot be polled any more.
    pub(super) dead: bool,
    /// It did not fence a lane: what runs on it goes on, but nothing new does.
    pub(super) distrusted: bool,
    /// Since when its port is down.
    pub(super) down_since: Option<Time>,
    /// Since when it is up again.
    pub(super) up_since: Time,
}

impl Rail {
    /// Whether new lanes may be made on it.
    pub(super) fn is_usable(&self) -> bool {
        !self.dead && !self.distrusted
    }
}

/// A device, its context, and the completion-queue entries it was opened with.
pub(crate) type OpenRail = (Arc<dyn Device>, Box<dyn Context>, u32);

/// See the module's documentation.
///
/// Its maps are ordered: where one is walked through, two cores to which the same has happened do the same, in the same
/// order. A schedule of the simulation repeats exactly because of that.
pub(crate) struct Core {
    config: Arc<Config>,
    incarnation: Incarnation,
    now: Time,
    rails: Vec<Rail>,
    control: Box<dyn Control>,
    next_conn: u64,
    sessions: BTreeMap<ConnId, Session>,
    /// Sessions that this side dialled, by whom it expects there.
    dialled: BTreeMap<Incarnation, ConnId>,
    lanes: BTreeMap<(usize, LaneId), (ConnId, usize)>,
    pools: BTreeMap<PoolId, Arc<PoolRecord>>,
    arrivals: BTreeMap<u32, ArrivalEntry>,
    pushes: BTreeMap<u64, PushEntry>,
    exports: BTreeMap<u32, Arc<ExportRecord>>,
    accesses: BTreeMap<u64, AccessEntry>,
    connects: BTreeMap<ConnId, ConnectEntry>,
    next_request: u64,
    /// Asked so far whether a peer is there.
    pings: u64,
    tails: Arc<TailArena>,
    telemetry: Arc<Telemetry>,
    /// Levels as they were told last.
    told: [u64; Levels::COUNT],
    timers: Timers,
    staging: Staging,
    /// Nothing new begins.
    draining: Option<Draining>,
    scratch: Scratch,
    completions: Vec<Completion>,
    rail_events: Vec<RailEvent>,
    /// Reader's lanes to be ended once all completions at hand have been looked at: session, lane, epoch.
    failing: Vec<(ConnId, usize, u32)>,
    /// Lanes offered again since the start.
    renewals: u64,
}

impl Core {
    pub(crate) fn new(
        config: Arc<Config>,
        incarnation: Incarnation,
        rails: Vec<OpenRail>,
        control: Box<dyn Control>,
        tails: Arc<TailArena>,
    ) -> Self {
        let names = rails
            .iter()
            .map(|(device, ..)| watch::rail_name(device.info()));
        let telemetry = Telemetry::new(names.collect(), config.metric_peers);
        let rails = rails
            .into_iter()
            .map(|(device, context, completions_free)| Rail {
                kind: device.info().kind,
                windows_free: device.info().caps.windows.map_or(0, |caps| caps.max),
                device,
                context,
                completions_free,
                dead: false,
                distrusted: false,
                down_since: None,
                up_since: Time(0),
            })
            .collect();
        Self {
            config,
            incarnation,
            now: Time(0),
            rails,
            control,
            next_conn: 0,
            sessions: BTreeMap::new(),
            dialled: BTreeMap::new(),
            lanes: BTreeMap::new(),
            pools: BTreeMap::new(),
            arrivals: BTreeMap::new(),
            pushes: BTreeMap::new(),
            exports: BTreeMap::new(),
            accesses: BTreeMap::new(),
            connects: BTreeMap::new(),
            next_request: 0,
            pings: 0,
            tails,
            telemetry: Arc::new(telemetry),
            told: [0; Levels::COUNT],
            timers: Timers::default(),
            staging: Staging::default(),
            draining: None,
            scratch: Scratch::default(),
            completions: Vec::new(),
            rail_events: Vec::new(),
            failing: Vec::new(),
            renewals: 0,
        }
    }

    /// One step at time `now`. `events` must have been received before `commands` were. Returns whether anything
    /// happened.
    pub(crate) fn step(
        &mut self,
        now: Time,
        commands: &mut Vec<Command>,
        events: &mut Vec<ControlEvent>,
    ) -> bool {
        self.now = now;
        let mut active = !commands.is_empty() || !events.is_empty();
        for command in commands.drain(..) {
            self.command(command);
        }
        // Likewise before a deadline is found to have passed: what is there must have been counted.
        let due = self.timers.next().is_some_and(|time| time <= now);
        if events.is_empty() && !due {
            active |= self.poll_rails();
        } else {
            // Bounded by what completion queues can hold, so that a steady stream does not starve the events.
            (0..MAX_POLLS).take_while(|_| self.poll_rails()).count();
        }
        for event in events.drain(..) {
            self.event(event);
            self.end_failing();
        }
        active |= self.run_timers();
        active |= self.step_staging();
        self.settle_drain();
        if active {
            self.tell_levels();
        }
        active
    }

    /// When [`Core::step`] must be called at the latest, if nothing happens before.
    pub(crate) fn next_deadline(&self) -> Option<Time> {
        let staging = self.staging_deadline();
        self.timers.next().into_iter().chain(staging).min()
    }

    /// The contexts, for waiting on them.
    pub(crate) fn contexts(&mut self) -> impl Iterator<Item = &mut Box<dyn Context>> {
        self.rails
            .iter_mut()
            .filter(|rail| !rail.dead)
            .map(|rail| &mut rail.context)
    }

    /// Ends everything: sessions are told, lanes fenced, all waiting callers answered.
    pub(crate) fn shutdown(&mut self) {
        self.begin_cut();
        let conns: Vec<_> = self.sessions.keys().copied().collect();
        for conn in conns {
            self.end_session(
                conn,
                PeerError::Closed,
                Some((GoodbyeCode::Shutdown, "shut down")),
            );
        }
        self.close_arrivals();
        self.close_pushes();
        self.end_staging();
        self.close_accesses();
        self.close_drain();
        self.tell_levels();
    }

    fn command(&mut self, command: Command) {
        match command {
            Command::AddPool(pool) => {
                self.pools.insert(pool.id, pool);
            }
            Command::ReleasePool(pool) => {
                if let Some(pool) = self.pools.remove(&pool) {
                    pool.regions
                        .iter()
                        .for_each(|region| self.deregister(region));
                }
            }
            Command::AddGrant(entry) if self.is_draining() => self.late_grant(*entry),
            Command::AddGrant(entry) => self.add_grant(*entry),
            Command::Revoke(id) => self.revoke(id),
            // Their entries say so when they are dropped.
            Command::Connect(_) | Command::Access(_) if self.is_draining() => {}
            Command::OpenPush(entry) if self.is_draining() => Self::late_push(&entry),
            Command::Connect(entry) => self.connect(entry),
            Command::OpenPush(entry) => self.open_push(*entry),
            Command::Pages { push, layer, list } => self.queue_pages(push, layer, &list),
            Command::Finish { push, tail } => self.finish_push(push, &tail),
            Command::Cancel { push } => self.cancel_push(push),
            Command::Deregister(region) => self.deregister(&region),
            Command::AddExport(record) => {
                self.exports.insert(record.id, record);
            }
            Command::ReleaseExport(record) => {
                self.exports.remove(&record.id);
                self.deregister(&record.region);
            }
            Command::Access(entry) => self.start_access(*entry),
            Command::Disconnect(peer) => self.disconnect(peer),
            Command::Drain(entry) => self.drain(entry),
        }
    }

    fn event(&mut self, event: ControlEvent) {
        match event {
            ControlEvent::Accepted { conn, peer } => {
                self.sessions.insert(conn, Session::accepted(peer));
                self.tell_session(conn, EventKind::SessionAccepted);
                self.await_hello(conn);
            }
            ControlEvent::Connected { conn, peer } => self.connected(conn, peer),
            ControlEvent::Message { conn, bytes } => {
                self.heard(conn, bytes.len());
                match Message::decode(&bytes) {
                    Ok(message) => self.message(conn, message),
                    Err(error) => self.violation(conn, &error.to_string()),
                }
            }
            ControlEvent::Closed { conn, reason } => {
                let Some(session) = self.sessions.get(&conn) else {
                    return;
                };
                let error = PeerError::Control {
                    peer: session.name(),
                    reason,
                };
                self.end_session(conn, error, None);
            }
        }
    }

    fn message(&mut self, conn: ConnId, message: Message) {
        let Some(session) = self.sessions.get(&conn) else {
            return;
        };
        let peer = session.name();
        match (session.role, message) {
            (_, Message::Ping { nonce }) => self.send(conn, &Message::Pong { nonce }),
            (_, Message::Pong { .. }) => {}
            (_, Message::Goodbye(goodbye)) => {
                let error = PeerError::Goodbye {
                    peer,
                    code: goodbye.code,
                    detail: goodbye.detail,
                };
                self.end_session(conn, error, None);
            }
            (Role::Dialler, Message::HelloAck(ack)) => self.hello_ack(conn, ack),
            (Role::Dialler, Message::HelloReject(reject)) => self.hello_reject(conn, reject),
            (Role::Dialler, Message::Accept(accept)) => self.accepted(conn, *accept),
            (Role::Dialler, Message::Refuse(refuse)) => self.refused(conn, refuse),
            (Role::Dialler, Message::Credits(credits)) => self.credits(conn, credits),
            (Role::Dialler, Message::Revoke(revoke)) => self.revoked(conn, revoke),
            // The writer has the acknowledgements of its own requests, which say the same and sooner.
            (Role::Dialler, Message::Done { .. }) => {}
            (Role::Dialler, Message::RegionAccept(accept)) => self.region_accepted(conn, accept),
            (Role::Dialler, Message::RegionRefuse(refuse)) => self.region_refused(conn, refuse),
            (Role::Dialler, Message::LaneLost(lost)) => self.lane_lost(conn, lost),
            (Role::Dialler, Message::LaneFenced(fenced)) => self.lane_fenced(conn, fenced),
            (Role::Dialler, Message::LaneRenewed(renewed)) => self.lane_renewed(conn, renewed),
            (Role::Dialler, Message::LaneRefused(refused)) => self.lane_refused(conn, refused),
            (Role::Acceptor, Message::LaneDown(down)) => self.lane_down(conn, down),
            (Role::Acceptor, Message::LaneRenew(renew)) => self.lane_renew(conn, renew),
            (Role::Acceptor, Message::Hello(hello)) => self.hello(conn, hello),
            (Role::Acceptor, Message::Open(open)) => self.open(conn, &open),
            (Role::Acceptor, Message::Drained { push }) => self.drained(conn, push),
            (Role::Acceptor, Message::Cancel(cancel)) => self.given_up(conn, cancel),
            (Role::Acceptor, Message::OpenRegion(open)) => self.open_region(conn, &open),
            (role, message) => {
                self.violation(
                    conn,
                    &format!("{} does not go to the {role:?}", message.name()),
                );
            }
        }
    }

    /// Polls every rail once and handles what completed. Returns whether anything did.
    fn poll_rails(&mut self) -> bool {
        let mut active = false;
        for rail in 0..self.rails.len() {
            active |= self.poll_rail(rail);
        }
        self.end_failing();
        active
    }

    /// Polls one rail once. Lanes that fail here must be [ended](Core::end_failing) afterwards.
    fn poll_rail(&mut self, rail: usize) -> bool {
        if self.rails[rail].dead {
            return false;
        }
        let mut completions = std::mem::take(&mut self.completions);
        completions.clear();
        let result = self.rails[rail].context.poll(&mut completions);
        let mut active = !completions.is_empty();
        for completion in &completions {
            self.completion(rail, completion);
        }
        self.completions = completions;
        let mut events = std::mem::take(&mut self.rail_events);
        self.rails[rail].context.events(&mut events);
        active |= !events.is_empty();
        for event in events.drain(..) {
            self.rail_event(rail, event);
        }
        self.rail_events = events;
        if let Err(error) = result {
            self.rail_failed(rail, &error);
            active = true;
        }
        active
    }

    fn completion(&mut self, rail: usize, completion: &Completion) {
        // A lane that was fenced between the poll and now has no entry any more.
        let Some(&(conn, lane)) = self.lanes.get(&(rail, completion.lane)) else {
            return;
        };
        if let CompletionKind::Received { .. } = completion.kind
            && let Some(lane) = self.sessions.get_mut(&conn).map(|s| &mut s.lanes[lane])
        {
            lane.receives = lane.receives.saturating_sub(1);
        }
        if completion.status != Status::Success {
            let session = self.sessions.get(&conn);
            // A lane that fails completes all it has; the first completion says why.
            if session.is_some_and(|s| !matches!(s.lanes[lane].state, LaneState::Failing)) {
                self.tell_lane_failed(conn, lane, completion);
                let error = self.completion_error(conn, rail, completion);
                self.lane_failed(conn, lane, error);
            }
            return;
        }
        match completion.kind {
            CompletionKind::Sent { id } if windows::is_operation(id) => {
                self.window_done(conn, lane, id);
            }
            CompletionKind::Sent { id } => self.sent(conn, lane, id),
            CompletionKind::Received { imm } => self.part_arrived(conn, lane, imm),
        }
    }

    fn completion_error(&self, conn: ConnId, rail: usize, completion: &Completion) -> PeerError {
        let info = self.rails[rail].device.info();
        let session = self.sessions.get(&conn);
        PeerError::Lane {
            peer: session.map(Session::name).unwrap_or_default(),
            fabric: info.kind,
            device: info.name.clone(),
            lane: completion.lane,
            status: completion.status,
            vendor_error: completion.vendor_error,
        }
    }

    /// The peer broke the protocol: it is not to be trusted any more.
    fn violation(&mut self, conn: ConnId, detail: &str) {
        let Some(session) = self.sessions.get(&conn) else {
            return;
        };
        tracing::warn!(peer = session.name(), detail, "protocol violation");
        let error = PeerError::Protocol {
            peer: session.name(),
            detail: detail.to_owned(),
        };
        self.end_session(conn, error, Some((GoodbyeCode::Protocol, detail)));
    }

    /// Fences the lanes to a peer, ends everything that used them, and closes the connection.
    fn end_session(
        &mut self,
        conn: ConnId,
        error: PeerError,
        goodbye: Option<(GoodbyeCode, &str)>,
    ) {
        let Some(mut session) = self.sessions.remove(&conn) else {
            return;
        };
        self.tell_session_end(conn, &session, &error);
        if let Some((code, detail)) = goodbye {
            self.send(
                conn,
                &Message::Goodbye(Goodbye {
                    code,
                    detail: detail.to_owned(),
                }),
            );
        }
        self.control.close(conn);
        self.dialled.retain(|_, &mut dialled| dialled != conn);
        // From here on no write can land, and nothing of ours is read by a device any more.
        let fenced = self.destroy_lanes(&mut session.lanes);
        match session.role {
            Role::Dialler => {
                // First, because abandoned requests would otherwise look like completed accesses.
                self.stop_accesses(&error, fenced.as_ref().err());
                self.stop_connect(conn, &error);
                self.stop_pushes(&mut session, &error, fenced.as_ref().err());
            }
            Role::Acceptor => self.stop_arrivals(&session, &error, fenced.err().as_ref()),
        }
    }

    fn send(&mut self, conn: ConnId, message: &Message) {
        match message.encode() {
            Ok(bytes) => {
                let session = self.sessions.get(&conn);
                if let Some(meters) = session.and_then(|session| session.meters.as_ref()) {
                    meters.control_sent.add(bytes.len() as u64);
                }
                self.control.send(conn, bytes);
            }
            // Only a descriptor of our own can be too large, and it was checked when the pool was made.
            Err(error) => tracing::error!(%error, "a control message could not be encoded"),
        }
    }

    /// A user of `region` is gone. With the last one its registrations end.
    fn deregister(&mut self, region: &Region) {
        if !region.release() {
            return;
        }
        for (rail, keys) in self.rails.iter_mut().zip(region.rails()) {
            for keys in keys.all() {
                if let Err(error) = rail.context.deregister(keys.mr) {
                    tracing::error!(%error, "deregistration failed");
                }
            }
        }
    }
}
