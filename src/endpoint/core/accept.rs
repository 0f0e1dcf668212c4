//! The accepting side's half of the handshake: lanes of the fabric that is offered, or a reason why not.

use super::{
    Core,
    session::{Phase, Role},
};
use crate::{
    endpoint::control::ConnId,
    wire::{Hello, HelloAck, HelloReject, Imm, LaneAnswer, Message, RejectCode},
};

impl Core {
    /// A peer offers lanes: connect them, or say why not.
    pub(super) fn hello(&mut self, conn: ConnId, hello: Hello) {
        let Some(session) = self.sessions.get_mut(&conn) else {
            return;
        };
        if session.phase != Phase::Connecting {
            self.violation(conn, "a second offer of lanes");
            return;
        }
        session.peer_name = hello.name.clone();
        let own = hello.incarnation == self.incarnation;
        let result = if own {
            Err((
                RejectCode::SelfConnect,
                "this endpoint dialled itself".to_owned(),
            ))
        } else {
            self.may_join(&hello)
                .and_then(|()| self.answer(conn, &hello))
        };
        match result {
            Ok(lanes) => {
                let ack = HelloAck {
                    incarnation: self.incarnation,
                    name: self.config.name.clone(),
                    receives_per_lane: self
                        .sessions
                        .get(&conn)
                        .and_then(|s| s.lanes.iter().map(|lane| lane.config.receive_depth).min())
                        .unwrap_or(0),
                    lanes,
                    keepalive_ms: self.keepalive_ms(),
                };
                self.tell_ready(conn);
                self.send(conn, &Message::HelloAck(ack));
                self.watch(conn, hello.keepalive_ms);
            }
            Err((code, detail)) => {
                tracing::warn!(peer = hello.name, %code, detail, "session refused");
                let supported = self.supported();
                self.send(
                    conn,
                    &Message::HelloReject(HelloReject {
                        code,
                        supported,
                        detail,
                    }),
                );
            }
        }
    }

    fn answer(
        &mut self,
        conn: ConnId,
        hello: &Hello,
    ) -> Result<Vec<LaneAnswer>, (RejectCode, String)> {
        let rails = self.rails_of(hello.fabric);
        if rails.is_empty() || hello.lanes.is_empty() {
            return Err((
                RejectCode::NoCommonFabric,
                format!("no {} rail here", hello.fabric),
            ));
        }
        let Some(host) = self
            .sessions
            .get(&conn)
            .and_then(|s| s.peer)
            .map(|peer| peer.ip())
        else {
            return Err((RejectCode::Other, "no address".to_owned()));
        };
        let mut lanes = Vec::new();
        let mut answers = Vec::new();
        for offer in &hello.lanes {
            let rail = rails[usize::from(offer.remote_rail) % rails.len()];
            let made =
                self.create_lane(Role::Acceptor, rail, offer.rail)
                    .and_then(|(lane, address)| {
                        let id = lane.id;
                        lanes.push(lane);
                        answers.push(LaneAnswer {
                            rail: rail as u8,
                            speed_bits: self.rails[rail].device.info().bits_per_second,
                            address,
                        });
                        self.rails[rail]
                            .context
                            .connect_lane(id, &offer.address, host, false)
                    });
            if let Err(error) = made {
                // Nothing has gone through them; an error has been logged and the rail set aside.
                let _ = self.destroy_lanes(&mut lanes);
                return Err((RejectCode::LaneSetup, error.to_string()));
            }
        }
        self.adopt_lanes(conn, lanes);
        if let Some(session) = self.sessions.get_mut(&conn) {
            session.phase = Phase::Ready;
            session.kind = Some(hello.fabric);
            session.incarnation = Some(hello.incarnation);
            session.slots = vec![None; usize::from(Imm::SLOTS)];
        }
        Ok(answers)
    }
}
