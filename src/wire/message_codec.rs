//! Encoding and decoding of [`Message`]: a tag byte and the fields in the order of the structures.

use super::MAX_MESSAGE;
use super::codec::{Reader, WireError, WireErrorKind, Writer};
use super::ids::{Digest, GrantId, Incarnation, PoolId};
use super::message::*;
use super::pool::{MAX_RAILS, PoolDescriptor, RegionKey};
use super::windows::GrantWindows;
use crate::wire::{FabricKind, RemoteKey};

mod tag {
    pub(super) const HELLO: u8 = 1;
    pub(super) const HELLO_ACK: u8 = 2;
    pub(super) const HELLO_REJECT: u8 = 3;
    pub(super) const OPEN: u8 = 4;
    pub(super) const ACCEPT: u8 = 5;
    pub(super) const REFUSE: u8 = 6;
    pub(super) const CREDITS: u8 = 7;
    pub(super) const REVOKE: u8 = 8;
    pub(super) const DRAINED: u8 = 9;
    pub(super) const CANCEL: u8 = 10;
    pub(super) const DONE: u8 = 11;
    pub(super) const OPEN_REGION: u8 = 12;
    pub(super) const REGION_ACCEPT: u8 = 13;
    pub(super) const REGION_REFUSE: u8 = 14;
    pub(super) const PING: u8 = 15;
    pub(super) const PONG: u8 = 16;
    pub(super) const GOODBYE: u8 = 17;
    pub(super) const LANE_LOST: u8 = 18;
    pub(super) const LANE_DOWN: u8 = 19;
    pub(super) const LANE_FENCED: u8 = 20;
    pub(super) const LANE_RENEW: u8 = 21;
    pub(super) const LANE_RENEWED: u8 = 22;
    pub(super) const LANE_REFUSED: u8 = 23;
}

impl Message {
    /// Its name, for logs and errors.
    pub(crate) const fn name(&self) -> &'static str {
        match self {
            Self::Hello(_) => "Hello",
            Self::HelloAck(_) => "HelloAck",
            Self::HelloReject(_) => "HelloReject",
            Self::Open(_) => "Open",
            Self::Accept(_) => "Accept",
            Self::Refuse(_) => "Refuse",
            Self::Credits(_) => "Credits",
            Self::Revoke(_) => "Revoke",
            Self::Drained { .. } => "Drained",
            Self::Cancel(_) => "Cancel",
            Self::Done { .. } => "Done",
            Self::OpenRegion(_) => "OpenRegion",
            Self::RegionAccept(_) => "RegionAccept",
            Self::RegionRefuse(_) => "RegionRefuse",
            Self::LaneLost(_) => "LaneLost",
            Self::LaneDown(_) => "LaneDown",
            Self::LaneFenced(_) => "LaneFenced",
            Self::LaneRenew(_) => "LaneRenew",
            Self::LaneRenewed(_) => "LaneRenewed",
            Self::LaneRefused(_) => "LaneRefused",
            Self::Ping { .. } => "Ping",
            Self::Pong { .. } => "Pong",
            Self::Goodbye(_) => "Goodbye",
        }
    }

    /// The bytes. Fails only if a field exceeds its limit; explanations are cut instead.
    pub(crate) fn encode(&self) -> Result<Vec<u8>, WireError> {
        let mut writer = Writer::new(self.name());
        let w = &mut writer;
        match self {
            Self::Hello(hello) => {
                w.u8(tag::HELLO);
                w.raw(&hello.incarnation.0);
                w.bytes("name", MAX_NAME, hello.name.as_bytes())?;
                w.u8(hello.fabric as u8);
                w.u8(hello.supported);
                w.list("rails", MAX_RAILS, &hello.rails, |w, rail| {
                    w.u8(rail.rail);
                    w.u64(rail.speed_bits);
                    w.bytes("rail address", MAX_RAIL_ADDRESS, rail.address.as_bytes())
                })?;
                w.list("lanes", MAX_LANES, &hello.lanes, |w, lane| {
                    w.u8(lane.rail);
                    w.u8(lane.remote_rail);
                    w.lane_address("lane address", &lane.address)
                })?;
                w.u32(hello.keepalive_ms);
            }
            Self::HelloAck(ack) => {
                w.u8(tag::HELLO_ACK);
                w.raw(&ack.incarnation.0);
                w.bytes("name", MAX_NAME, ack.name.as_bytes())?;
                w.list("lanes", MAX_LANES, &ack.lanes, |w, lane| {
                    w.u8(lane.rail);
                    w.u64(lane.speed_bits);
                    w.lane_address("lane address", &lane.address)
                })?;
                w.u32(ack.receives_per_lane);
                w.u32(ack.keepalive_ms);
            }
            Self::HelloReject(reject) => {
                w.u8(tag::HELLO_REJECT);
                w.u16(reject.code as u16);
                w.u8(reject.supported);
                w.detail("detail", MAX_DETAIL, &reject.detail)?;
            }
            Self::Open(open) => {
                w.u8(tag::OPEN);
                w.u64(open.push);
                w.u32(open.grant.slot);
                w.u32(open.grant.generation);
                w.u32(open.pool.0);
                w.raw(&open.incarnation.0);
                w.raw(&open.digest.0);
                w.bool(open.want_pool);
            }
            Self::Accept(accept) => {
                w.u8(tag::ACCEPT);
                w.u64(accept.push);
                w.u16(accept.slot);
                w.u64(accept.remaining_ns);
                write_tail(w, &accept.tail)?;
                w.bool(accept.windows.is_some());
                if let Some(windows) = &accept.windows {
                    windows.write(w)?;
                }
                for pool in [&accept.pool, &accept.landing] {
                    w.bool(pool.is_some());
                    if let Some(pool) = pool {
                        pool.write(w)?;
                    }
                }
            }
            Self::Refuse(refuse) => {
                w.u8(tag::REFUSE);
                w.u64(refuse.push);
                w.u16(refuse.code as u16);
                w.detail("detail", MAX_DETAIL, &refuse.detail)?;
            }
            Self::Credits(credits) => {
                w.u8(tag::CREDITS);
                w.u16(credits.lane);
                w.u32(credits.epoch);
                w.u64(credits.total);
            }
            Self::Revoke(revoke) => {
                w.u8(tag::REVOKE);
                w.u64(revoke.push);
                w.u16(revoke.reason as u16);
            }
            Self::Drained { push } => {
                w.u8(tag::DRAINED);
                w.u64(*push);
            }
            Self::Cancel(cancel) => {
                w.u8(tag::CANCEL);
                w.u64(cancel.push);
                w.u16(cancel.code);
                w.detail("detail", MAX_DETAIL, &cancel.detail)?;
            }
            Self::Done { push } => {
                w.u8(tag::DONE);
                w.u64(*push);
            }
            Self::OpenRegion(open) => {
                w.u8(tag::OPEN_REGION);
                w.u64(open.request);
                w.u32(open.region);
                w.raw(&open.nonce);
                w.raw(&open.incarnation.0);
            }
            Self::RegionAccept(accept) => {
                w.u8(tag::REGION_ACCEPT);
                w.u64(accept.request);
                w.u64(accept.length);
                w.bool(accept.read);
                w.bool(accept.write);
                RegionKey::write_list(w, &accept.keys)?;
            }
            Self::RegionRefuse(refuse) => {
                w.u8(tag::REGION_REFUSE);
                w.u64(refuse.request);
                w.u16(refuse.code as u16);
                w.detail("detail", MAX_DETAIL, &refuse.detail)?;
            }
            Self::LaneLost(lost) => {
                w.u8(tag::LANE_LOST);
                w.u16(lost.lane);
                w.u32(lost.epoch);
                w.detail("detail", MAX_DETAIL, &lost.detail)?;
            }
            Self::LaneDown(down) => {
                w.u8(tag::LANE_DOWN);
                w.u16(down.lane);
                w.u32(down.epoch);
                let (limit, list) = (MAX_UNACKNOWLEDGED, &down.unacknowledged);
                w.list("unacknowledged", limit, list, |w, &(push, part)| {
                    w.u64(push);
                    w.u32(part);
                    Ok(())
                })?;
            }
            Self::LaneFenced(fenced) => {
                w.u8(tag::LANE_FENCED);
                w.u16(fenced.lane);
                w.u32(fenced.epoch);
                w.list("counted", MAX_UNACKNOWLEDGED, &fenced.counted, |w, &bit| {
                    w.bool(bit);
                    Ok(())
                })?;
            }
            Self::LaneRenew(renew) => {
                w.u8(tag::LANE_RENEW);
                w.u16(renew.lane);
                w.u32(renew.epoch);
                w.u8(renew.rail);
                w.u8(renew.remote_rail);
                w.lane_address("lane address", &renew.address)?;
            }
            Self::LaneRenewed(renewed) => {
                w.u8(tag::LANE_RENEWED);
                w.u16(renewed.lane);
                w.u32(renewed.epoch);
                w.u8(renewed.rail);
                w.u64(renewed.speed_bits);
                w.lane_address("lane address", &renewed.address)?;
                w.u32(renewed.receives);
            }
            Self::LaneRefused(refused) => {
                w.u8(tag::LANE_REFUSED);
                w.u16(refused.lane);
                w.u32(refused.epoch);
                w.u16(refused.code as u16);
                w.detail("detail", MAX_DETAIL, &refused.detail)?;
            }
            Self::Ping { nonce } => {
                w.u8(tag::PING);
                w.u64(*nonce);
            }
            Self::Pong { nonce } => {
                w.u8(tag::PONG);
                w.u64(*nonce);
            }
            Self::Goodbye(goodbye) => {
                w.u8(tag::GOODBYE);
                w.u16(goodbye.code as u16);
                w.detail("detail", MAX_DETAIL, &goodbye.detail)?;
            }
        }
        let bytes = writer.finish();
        check_size(self.name(), bytes.len())?;
        Ok(bytes)
    }

    /// The message in `bytes`, all of which it must fill.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        check_size("message", bytes.len())?;
        let mut reader = Reader::new("message", bytes);
        let tag = reader.u8("tag")?;
        let r = &mut reader;
        let message = match tag {
            tag::HELLO => {
                r.rename("Hello");
                Self::Hello(read_hello(r)?)
            }
            tag::HELLO_ACK => {
                r.rename("HelloAck");
                Self::HelloAck(HelloAck {
                    incarnation: Incarnation(r.array("incarnation")?),
                    name: r.string("name", MAX_NAME)?,
                    lanes: r.list("lanes", MAX_LANES, |r| {
                        Ok(LaneAnswer {
                            rail: r.u8("rail")?,
                            speed_bits: r.u64("rail speed")?,
                            address: r.lane_address("lane address")?,
                        })
                    })?,
                    receives_per_lane: r.u32("receives per lane")?,
                    keepalive_ms: r.u32("keepalive")?,
                })
            }
            tag::HELLO_REJECT => {
                r.rename("HelloReject");
                let code = r.u16("code")?;
                Self::HelloReject(HelloReject {
                    code: r.known("code", code, RejectCode::from_wire)?,
                    supported: r.u8("supported")?,
                    detail: r.string("detail", MAX_DETAIL)?,
                })
            }
            tag::OPEN => {
                r.rename("Open");
                Self::Open(Open {
                    push: r.u64("push")?,
                    grant: GrantId {
                        slot: r.u32("grant slot")?,
                        generation: r.u32("grant generation")?,
                    },
                    pool: PoolId(r.u32("pool")?),
                    incarnation: Incarnation(r.array("incarnation")?),
                    digest: Digest(r.array("digest")?),
                    want_pool: r.bool("want pool")?,
                })
            }
            tag::ACCEPT => {
                r.rename("Accept");
                Self::Accept(Box::new(Accept {
                    push: r.u64("push")?,
                    slot: r.u16("slot")?,
                    remaining_ns: r.u64("remaining")?,
                    tail: read_tail(r)?,
                    windows: match r.bool("has windows")? {
                        true => Some(GrantWindows::read(r)?),
                        false => None,
                    },
                    pool: match r.bool("has pool")? {
                        true => Some(PoolDescriptor::read(r)?),
                        false => None,
                    },
                    landing: match r.bool("has landing")? {
                        true => Some(PoolDescriptor::read(r)?),
                        false => None,
                    },
                }))
            }
            tag::REFUSE => {
                r.rename("Refuse");
                let push = r.u64("push")?;
                let code = r.u16("code")?;
                Self::Refuse(Refuse {
                    push,
                    code: r.known("code", code, RefuseCode::from_wire)?,
                    detail: r.string("detail", MAX_DETAIL)?,
                })
            }
            tag::CREDITS => {
                r.rename("Credits");
                Self::Credits(Credits {
                    lane: r.u16("lane")?,
                    epoch: r.u32("epoch")?,
                    total: r.u64("total")?,
                })
            }
            tag::REVOKE => {
                r.rename("Revoke");
                let push = r.u64("push")?;
                let reason = r.u16("reason")?;
                Self::Revoke(Revoke {
                    push,
                    reason: r.known("reason", reason, RevokeReason::from_wire)?,
                })
            }
            tag::DRAINED => {
                r.rename("Drained");
                Self::Drained {
                    push: r.u64("push")?,
                }
            }
            tag::CANCEL => {
                r.rename("Cancel");
                Self::Cancel(Cancel {
                    push: r.u64("push")?,
                    code: r.u16("code")?,
                    detail: r.string("detail", MAX_DETAIL)?,
                })
            }
            tag::DONE => {
                r.rename("Done");
                Self::Done {
                    push: r.u64("push")?,
                }
            }
            tag::OPEN_REGION => {
                r.rename("OpenRegion");
                Self::OpenRegion(OpenRegion {
                    request: r.u64("request")?,
                    region: r.u32("region")?,
                    nonce: r.array("nonce")?,
                    incarnation: Incarnation(r.array("incarnation")?),
                })
            }
            tag::REGION_ACCEPT => {
                r.rename("RegionAccept");
                Self::RegionAccept(RegionAccept {
                    request: r.u64("request")?,
                    length: r.u64("length")?,
                    read: r.bool("read")?,
                    write: r.bool("write")?,
                    keys: RegionKey::read_list(r)?,
                })
            }
            tag::REGION_REFUSE => {
                r.rename("RegionRefuse");
                let request = r.u64("request")?;
                let code = r.u16("code")?;
                Self::RegionRefuse(RegionRefuse {
                    request,
                    code: r.known("code", code, RefuseCode::from_wire)?,
                    detail: r.string("detail", MAX_DETAIL)?,
                })
            }
            tag::LANE_LOST => {
                r.rename("LaneLost");
                Self::LaneLost(LaneLost {
                    lane: r.u16("lane")?,
                    epoch: r.u32("epoch")?,
                    detail: r.string("detail", MAX_DETAIL)?,
                })
            }
            tag::LANE_DOWN => {
                r.rename("LaneDown");
                Self::LaneDown(LaneDown {
                    lane: r.u16("lane")?,
                    epoch: r.u32("epoch")?,
                    unacknowledged: r.list("unacknowledged", MAX_UNACKNOWLEDGED, |r| {
                        Ok((r.u64("push")?, r.u32("part")?))
                    })?,
                })
            }
            tag::LANE_FENCED => {
                r.rename("LaneFenced");
                Self::LaneFenced(LaneFenced {
                    lane: r.u16("lane")?,
                    epoch: r.u32("epoch")?,
                    counted: r.list("counted", MAX_UNACKNOWLEDGED, |r| r.bool("counted"))?,
                })
            }
            tag::LANE_RENEW => {
                r.rename("LaneRenew");
                Self::LaneRenew(LaneRenew {
                    lane: r.u16("lane")?,
                    epoch: r.u32("epoch")?,
                    rail: r.u8("rail")?,
                    remote_rail: r.u8("remote rail")?,
                    address: r.lane_address("lane address")?,
                })
            }
            tag::LANE_RENEWED => {
                r.rename("LaneRenewed");
                Self::LaneRenewed(LaneRenewed {
                    lane: r.u16("lane")?,
                    epoch: r.u32("epoch")?,
                    rail: r.u8("rail")?,
                    speed_bits: r.u64("rail speed")?,
                    address: r.lane_address("lane address")?,
                    receives: r.u32("receives")?,
                })
            }
            tag::LANE_REFUSED => {
                r.rename("LaneRefused");
                let (lane, epoch) = (r.u16("lane")?, r.u32("epoch")?);
                let code = r.u16("code")?;
                Self::LaneRefused(LaneRefused {
                    lane,
                    epoch,
                    code: r.known("code", code, LaneRefusal::from_wire)?,
                    detail: r.string("detail", MAX_DETAIL)?,
                })
            }
            tag::PING => {
                r.rename("Ping");
                Self::Ping {
                    nonce: r.u64("nonce")?,
                }
            }
            tag::PONG => {
                r.rename("Pong");
                Self::Pong {
                    nonce: r.u64("nonce")?,
                }
            }
            tag::GOODBYE => {
                r.rename("Goodbye");
                let code = r.u16("code")?;
                Self::Goodbye(Goodbye {
                    code: r.known("code", code, GoodbyeCode::from_wire)?,
                    detail: r.string("detail", MAX_DETAIL)?,
                })
            }
            other => return Err(r.error("tag", WireErrorKind::Unknown(other.into()))),
        };
        reader.finish()?;
        Ok(message)
    }
}

fn read_hello(r: &mut Reader<'_>) -> Result<Hello, WireError> {
    let incarnation = Incarnation(r.array("incarnation")?);
    let name = r.string("name", MAX_NAME)?;
    let fabric = r.u8("fabric")?;
    Ok(Hello {
        incarnation,
        name,
        fabric: r.known("fabric", fabric, FabricKind::from_wire)?,
        supported: r.u8("supported")?,
        rails: r.list("rails", MAX_RAILS, |r| {
            Ok(RailOffer {
                rail: r.u8("rail")?,
                speed_bits: r.u64("rail speed")?,
                address: r.string("rail address", MAX_RAIL_ADDRESS)?,
            })
        })?,
        lanes: r.list("lanes", MAX_LANES, |r| {
            Ok(LaneOffer {
                rail: r.u8("rail")?,
                remote_rail: r.u8("remote rail")?,
                address: r.lane_address("lane address")?,
            })
        })?,
        keepalive_ms: r.u32("keepalive")?,
    })
}

fn write_tail(w: &mut Writer, tail: &TailTarget) -> Result<(), WireError> {
    w.u64(tail.address);
    w.list("tail keys", MAX_RAILS, &tail.keys, |w, (rail, rkey)| {
        w.u8(*rail);
        w.u32(rkey.0);
        Ok(())
    })?;
    w.u32(tail.capacity);
    Ok(())
}

fn read_tail(r: &mut Reader<'_>) -> Result<TailTarget, WireError> {
    Ok(TailTarget {
        address: r.u64("tail address")?,
        keys: r.list("tail keys", MAX_RAILS, |r| {
            Ok((r.u8("rail")?, RemoteKey(r.u32("rkey")?)))
        })?,
        capacity: r.u32("tail capacity")?,
    })
}

fn check_size(item: &'static str, size: usize) -> Result<(), WireError> {
    if size <= MAX_MESSAGE {
        return Ok(());
    }
    Err(WireError {
        item,
        field: "message",
        kind: WireErrorKind::Limit {
            value: size as u64,
            limit: MAX_MESSAGE as u64,
        },
    })
}
