//! The dialling side's half of the handshake: one connection, lanes offered fabric by fabric, the best first.

use std::{net::SocketAddr, time::Duration};

use super::{
    Core,
    session::{Phase, Role, Session},
};
use crate::{
    endpoint::{PeerError, control::ConnId, telemetry::EventKind},
    fabric::{FabricError, FabricErrorKind, FabricKind},
    protocol::SendCredits,
    wire::{
        GoodbyeCode, Hello, HelloAck, HelloReject, Incarnation, LaneOffer, Message, RailOffer,
        RejectCode,
    },
};

impl Core {
    /// The session to `incarnation`, dialled if there is none.
    pub(super) fn session_to(
        &mut self,
        incarnation: Incarnation,
        addresses: &[String],
        timeout: Duration,
    ) -> ConnId {
        if let Some(&conn) = self.dialled.get(&incarnation) {
            return conn;
        }
        let conn = self.dial(Some(incarnation), addresses, timeout);
        self.dialled.insert(incarnation, conn);
        conn
    }

    /// Dials `addresses`, expecting `expected` there if given.
    pub(super) fn dial(
        &mut self,
        expected: Option<Incarnation>,
        addresses: &[String],
        timeout: Duration,
    ) -> ConnId {
        let conn = self.allocate_conn();
        let usable = self.rails.iter().filter(|rail| rail.is_usable());
        let mut kinds: Vec<FabricKind> = usable.map(|rail| rail.kind).collect();
        kinds.sort_unstable();
        kinds.dedup();
        let session = Session::dialled(expected, addresses.join(", "), kinds);
        self.sessions.insert(conn, session);
        self.tell_session(conn, EventKind::SessionDialled);
        self.control.connect(conn, addresses.to_vec(), timeout);
        conn
    }

    /// The control connection stands.
    pub(super) fn connected(&mut self, conn: ConnId, peer: SocketAddr) {
        let Some(session) = self.sessions.get_mut(&conn) else {
            return;
        };
        session.peer = Some(peer);
        session.peer_name.clear();
        // A fabric of one host is not offered to another host.
        let rails = &self.rails;
        session.untried.retain(|&kind| {
            let mut of_kind = rails.iter().filter(|rail| rail.kind == kind);
            of_kind.any(|rail| rail.device.may_reach(peer.ip()))
        });
        self.offer(conn);
    }

    /// Offers lanes of the best fabric that has not been tried.
    fn offer(&mut self, conn: ConnId) {
        let mut failures = Vec::new();
        loop {
            let Some(session) = self.sessions.get_mut(&conn) else {
                return;
            };
            let peer = session.name();
            let Some(kind) = session.untried.pop() else {
                let detail = if failures.is_empty() {
                    "no fabric in common".to_owned()
                } else {
                    failures.join("; ")
                };
                let error = PeerError::Rejected {
                    peer,
                    code: RejectCode::NoCommonFabric,
                    detail,
                };
                self.end_session(conn, error, Some((GoodbyeCode::Error, "no usable fabric")));
                return;
            };
            match self.offer_kind(conn, kind) {
                Ok(()) => return,
                Err(error) => {
                    tracing::warn!(peer, fabric = %kind, %error, "no lanes over this fabric");
                    failures.push(error.to_string());
                }
            }
        }
    }

    fn offer_kind(&mut self, conn: ConnId, kind: FabricKind) -> Result<(), FabricError> {
        let rails = self.rails_of(kind);
        if rails.is_empty() {
            return Err(FabricError {
                device: kind.to_string(),
                port: 0,
                operation: "make lanes",
                kind: FabricErrorKind::Unavailable("every rail has failed".to_owned()),
                hint: None,
            });
        }
        let mut lanes = Vec::new();
        let mut offers = Vec::new();
        for &rail in &rails {
            for _ in 0..self.config.lanes_per_rail {
                let remote_rail = rails.iter().position(|&r| r == rail).unwrap_or(0) as u8;
                match self.create_lane(Role::Dialler, rail, remote_rail) {
                    Ok((lane, address)) => {
                        lanes.push(lane);
                        offers.push(LaneOffer {
                            rail: rail as u8,
                            remote_rail,
                            address,
                        });
                    }
                    Err(error) => {
                        // Nothing has gone through them; an error has been logged and the rail set aside.
                        let _ = self.destroy_lanes(&mut lanes);
                        return Err(error);
                    }
                }
            }
        }
        let rails = rails
            .iter()
            .map(|&rail| {
                let info = self.rails[rail].device.info();
                RailOffer {
                    rail: rail as u8,
                    speed_bits: info.bits_per_second,
                    address: info.address.chars().take(64).collect(),
                }
            })
            .collect();
        self.adopt_lanes(conn, lanes);
        let hello = Hello {
            incarnation: self.incarnation,
            name: self.config.name.clone(),
            fabric: kind,
            supported: self.supported(),
            rails,
            lanes: offers,
            keepalive_ms: self.keepalive_ms(),
        };
        self.send(conn, &Message::Hello(hello));
        let Some(session) = self.sessions.get_mut(&conn) else {
            return Ok(());
        };
        session.phase = Phase::Offered;
        let pushes: Vec<u64> = session.pushes.iter().copied().collect();
        for push in pushes {
            self.send_open(conn, push);
        }
        self.resend_region_opens(conn);
        Ok(())
    }

    /// The peer has connected its lanes; now ours.
    pub(super) fn hello_ack(&mut self, conn: ConnId, ack: HelloAck) {
        let Some(session) = self.sessions.get_mut(&conn) else {
            return;
        };
        if session.phase != Phase::Offered || ack.lanes.len() != session.lanes.len() {
            self.violation(
                conn,
                "an answer to no offer, or with another number of lanes",
            );
            return;
        }
        session.peer_name = ack.name;
        session.incarnation = Some(ack.incarnation);
        let peer = session.name();
        let Some(address) = session.peer else { return };
        if let Some(expected) = session
            .expected
            .filter(|&expected| expected != ack.incarnation)
        {
            let error = PeerError::Restarted {
                peer,
                found: ack.incarnation,
                expected,
            };
            self.end_session(
                conn,
                error,
                Some((GoodbyeCode::Error, "you have restarted")),
            );
            return;
        }
        for (lane, answer) in session.lanes.iter_mut().zip(&ack.lanes) {
            lane.remote_rail = answer.rail;
            lane.home = answer.rail;
            lane.speed = slower(lane.speed, answer.speed_bits);
            lane.peer_receives = ack.receives_per_lane;
            lane.send = SendCredits::new(lane.config.send_depth, ack.receives_per_lane);
            let context = &mut self.rails[lane.rail].context;
            if let Err(source) = context.connect_lane(lane.id, &answer.address, address.ip(), true)
            {
                let error = PeerError::Fabric {
                    peer,
                    source: source.into(),
                };
                self.end_session(
                    conn,
                    error,
                    Some((GoodbyeCode::Error, "lanes do not connect")),
                );
                return;
            }
        }
        session.phase = Phase::Ready;
        self.tell_ready(conn);
        self.watch(conn, ack.keepalive_ms);
        self.connect_ready(conn, ack.incarnation);
    }

    /// The peer does not want these lanes: try the next fabric that it has.
    pub(super) fn hello_reject(&mut self, conn: ConnId, reject: HelloReject) {
        let Some(session) = self.sessions.get_mut(&conn) else {
            return;
        };
        if session.phase != Phase::Offered {
            self.violation(conn, "a refusal of no offer");
            return;
        }
        session
            .untried
            .retain(|&kind| reject.supported & kind as u8 != 0);
        let mut lanes = std::mem::take(&mut session.lanes);
        let may_retry = matches!(
            reject.code,
            RejectCode::NoCommonFabric | RejectCode::LaneSetup
        ) && !session.untried.is_empty();
        let peer = session.name();
        // Nothing has gone through them; an error has been logged and the rail set aside.
        let _ = self.destroy_lanes(&mut lanes);
        if may_retry {
            tracing::info!(peer, code = %reject.code, detail = reject.detail, "next fabric");
            self.offer(conn);
        } else {
            let error = PeerError::Rejected {
                peer,
                code: reject.code,
                detail: reject.detail,
            };
            self.end_session(conn, error, None);
        }
    }
}

/// The slower of two speeds, 0 if one is unknown.
pub(super) fn slower(a: u64, b: u64) -> u64 {
    a.min(b)
}
