//! Random values of everything that travels.

use std::time::Duration;

use bytes::Bytes;
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::select;

use crate::kv::{Dtype, HeadRange, KvLayout, LayerLayout, Plane, PlaneRole};
use crate::wire::*;
use crate::wire::{FabricKind, LaneAddress, RemoteKey};

pub(in crate::wire) fn incarnation() -> impl Strategy<Value = Incarnation> {
    any::<[u8; 16]>().prop_map(Incarnation)
}

fn rkey() -> impl Strategy<Value = RemoteKey> {
    any::<u32>().prop_map(RemoteKey)
}

fn lane_address() -> impl Strategy<Value = LaneAddress> {
    vec(any::<u8>(), 0..=LaneAddress::MAX)
        .prop_map(|bytes| LaneAddress::new(bytes).expect("within the limit"))
}

fn text(limit: usize) -> impl Strategy<Value = String> {
    ".{0,600}".prop_map(move |mut text| {
        while text.len() > limit {
            text.pop();
        }
        text
    })
}

fn fabric() -> impl Strategy<Value = FabricKind> {
    select(vec![
        FabricKind::Sim,
        FabricKind::Tcp,
        FabricKind::Verbs,
        FabricKind::Shm,
    ])
}

pub(in crate::wire) fn address() -> impl Strategy<Value = String> {
    (
        prop_oneof!["[a-z0-9.-]{1,60}", Just("[fe80::1]".to_owned())],
        1..=u16::MAX,
    )
        .prop_map(|(host, port)| format!("{host}:{port}"))
}

fn heads() -> impl Strategy<Value = HeadRange> {
    (any::<u32>(), any::<u32>()).prop_map(|(first, count)| HeadRange { first, count })
}

fn plane() -> impl Strategy<Value = Plane> {
    (
        (1u8..=6, 1u8..=8, any::<u16>(), any::<u64>()),
        (any::<u64>(), any::<u64>(), any::<u64>(), any::<u32>()),
        heads(),
    )
        .prop_map(|(a, b, heads)| Plane {
            role: PlaneRole::from_wire(a.0).expect("known"),
            dtype: Dtype::from_wire(a.1).expect("known"),
            region: a.2,
            offset: a.3,
            page_stride: b.0,
            token_stride: b.1,
            head_stride: b.2,
            head_bytes: b.3,
            heads,
        })
}

/// Runs of similar layers and single ones.
pub(in crate::wire) fn layout() -> impl Strategy<Value = KvLayout> {
    let layer =
        (any::<u32>(), vec(plane(), 0..=8)).prop_map(|(tokens_per_page, planes)| LayerLayout {
            tokens_per_page,
            planes,
        });
    let run = (layer, 1usize..6, any::<u16>(), any::<u64>()).prop_map(
        |(layer, count, region_step, offset_step)| {
            let mut layers = vec![layer];
            for _ in 1..count {
                let mut next = layers.last().expect("one at least").clone();
                for plane in &mut next.planes {
                    plane.region = plane.region.wrapping_add(region_step);
                    plane.offset = plane.offset.wrapping_add(offset_step);
                }
                layers.push(next);
            }
            layers
        },
    );
    (any::<u32>(), vec(run, 0..5)).prop_map(|(pages, runs)| KvLayout {
        pages,
        layers: runs.concat(),
    })
}

fn region_keys() -> impl Strategy<Value = Vec<RegionKey>> {
    let key = (any::<u8>(), any::<u64>(), any::<u64>(), vec(rkey(), 0..=5)).prop_map(
        |(rail, address, extent, rkeys)| RegionKey {
            rail,
            address,
            extent,
            rkeys,
        },
    );
    vec(key, 0..=16)
}

pub(in crate::wire) fn pool() -> impl Strategy<Value = PoolDescriptor> {
    let region =
        (any::<u64>(), region_keys()).prop_map(|(length, keys)| RegionDescriptor { length, keys });
    let distances = vec(any::<u8>(), 0..=16);
    (any::<u32>(), layout(), vec(region, 0..20), distances).prop_map(
        |(pool, layout, regions, distances)| PoolDescriptor {
            pool: PoolId(pool),
            layout,
            regions,
            distances,
        },
    )
}

fn hello() -> impl Strategy<Value = Message> {
    let rail =
        (any::<u8>(), any::<u64>(), text(128)).prop_map(|(rail, speed_bits, address)| RailOffer {
            rail,
            speed_bits,
            address,
        });
    let lane =
        (any::<u8>(), any::<u8>(), lane_address()).prop_map(|(rail, remote_rail, address)| {
            LaneOffer {
                rail,
                remote_rail,
                address,
            }
        });
    (
        incarnation(),
        text(255),
        fabric(),
        any::<u8>(),
        vec(rail, 0..=16),
        vec(lane, 0..=64),
        any::<u32>(),
    )
        .prop_map(
            |(incarnation, name, fabric, supported, rails, lanes, keepalive_ms)| {
                Message::Hello(Hello {
                    incarnation,
                    name,
                    fabric,
                    supported,
                    rails,
                    lanes,
                    keepalive_ms,
                })
            },
        )
}

fn hello_ack() -> impl Strategy<Value = Message> {
    let lane =
        (any::<u8>(), any::<u64>(), lane_address()).prop_map(|(rail, speed_bits, address)| {
            LaneAnswer {
                rail,
                speed_bits,
                address,
            }
        });
    (
        incarnation(),
        text(255),
        vec(lane, 0..=64),
        any::<u32>(),
        any::<u32>(),
    )
        .prop_map(
            |(incarnation, name, lanes, receives_per_lane, keepalive_ms)| {
                Message::HelloAck(HelloAck {
                    incarnation,
                    name,
                    lanes,
                    receives_per_lane,
                    keepalive_ms,
                })
            },
        )
}

fn open() -> impl Strategy<Value = Message> {
    (
        any::<u64>(),
        any::<(u32, u32, u32)>(),
        incarnation(),
        any::<[u8; 16]>(),
        any::<bool>(),
    )
        .prop_map(
            |(push, (slot, generation, pool), incarnation, digest, want_pool)| {
                Message::Open(Open {
                    push,
                    grant: GrantId { slot, generation },
                    pool: PoolId(pool),
                    incarnation,
                    digest: Digest(digest),
                    want_pool,
                })
            },
        )
}

fn windows() -> impl Strategy<Value = GrantWindows> {
    let range = any::<(u16, u64, u64)>().prop_map(|(region, offset, length)| WindowRange {
        region,
        offset,
        length,
    });
    let lane = (rkey(), vec((any::<u64>(), rkey()), 0..8))
        .prop_map(|(tail, keys)| LaneWindows { tail, keys });
    (vec(range, 0..8), vec(lane, 0..8)).prop_map(|(ranges, lanes)| GrantWindows { ranges, lanes })
}

fn accept() -> impl Strategy<Value = Message> {
    let tail = (
        any::<u64>(),
        vec((any::<u8>(), rkey()), 0..=16),
        any::<u32>(),
    )
        .prop_map(|(address, keys, capacity)| TailTarget {
            address,
            keys,
            capacity,
        });
    (
        any::<u64>(),
        any::<u16>(),
        any::<u64>(),
        tail,
        option::of(windows()),
        option::of(pool()),
        option::of(pool()),
    )
        .prop_map(|(push, slot, remaining_ns, tail, windows, pool, landing)| {
            Message::Accept(Box::new(Accept {
                push,
                slot,
                remaining_ns,
                tail,
                windows,
                pool,
                landing,
            }))
        })
}

/// Every message.
pub(in crate::wire) fn message() -> impl Strategy<Value = Message> {
    let push = any::<u64>;
    let refuse = || (push(), select(RefuseCode::ALL), text(512));
    prop_oneof![
        hello(),
        hello_ack(),
        (select(RejectCode::ALL), any::<u8>(), text(512)).prop_map(|(code, supported, detail)| {
            Message::HelloReject(HelloReject {
                code,
                supported,
                detail,
            })
        }),
        open(),
        accept(),
        refuse().prop_map(|(push, code, detail)| Message::Refuse(Refuse { push, code, detail })),
        (any::<u16>(), any::<u32>(), any::<u64>())
            .prop_map(|(lane, epoch, total)| Message::Credits(Credits { lane, epoch, total })),
        lane_message(),
        (push(), select(RevokeReason::ALL))
            .prop_map(|(push, reason)| Message::Revoke(Revoke { push, reason })),
        push().prop_map(|push| Message::Drained { push }),
        (push(), any::<u16>(), text(512))
            .prop_map(|(push, code, detail)| Message::Cancel(Cancel { push, code, detail })),
        push().prop_map(|push| Message::Done { push }),
        (push(), any::<u32>(), any::<[u8; 16]>(), incarnation()).prop_map(
            |(request, region, nonce, incarnation)| Message::OpenRegion(OpenRegion {
                request,
                region,
                nonce,
                incarnation
            })
        ),
        (push(), any::<(u64, bool, bool)>(), region_keys()).prop_map(
            |(request, (length, read, write), keys)| Message::RegionAccept(RegionAccept {
                request,
                length,
                read,
                write,
                keys
            })
        ),
        refuse().prop_map(
            |(request, code, detail)| Message::RegionRefuse(RegionRefuse {
                request,
                code,
                detail
            })
        ),
        push().prop_map(|nonce| Message::Ping { nonce }),
        push().prop_map(|nonce| Message::Pong { nonce }),
        (select(GoodbyeCode::ALL), text(512))
            .prop_map(|(code, detail)| Message::Goodbye(Goodbye { code, detail })),
    ]
}

/// Runs, falling runs, scattered and repeated pages.
pub(in crate::wire) fn pages() -> impl Strategy<Value = Vec<u32>> {
    let run = (any::<u32>(), 1u32..40)
        .prop_map(|(first, length)| (first..=first.saturating_add(length - 1)).collect::<Vec<_>>());
    let near = vec(0u32..50, 0..30);
    vec(prop_oneof![run, near], 0..20).prop_map(|runs| runs.concat())
}

pub(in crate::wire) fn grant_fields() -> impl Strategy<Value = GrantFields> {
    (
        (incarnation(), vec(address(), 1..=4), any::<[u8; 16]>()),
        any::<(u32, u32, u32)>(),
        (heads(), any::<u16>(), any::<u32>(), any::<u64>()),
        vec(any::<u8>(), 0..=256),
        pages(),
    )
        .prop_map(
            |((issuer, addresses, nonce), (pool, slot, generation), rest, request, pages)| {
                GrantFields {
                    issuer,
                    addresses,
                    pool: PoolId(pool),
                    id: GrantId { slot, generation },
                    nonce,
                    heads: rest.0,
                    parts_per_layer: rest.1,
                    tail_capacity: rest.2,
                    valid_for: Duration::from_millis(rest.3),
                    request: Bytes::from(request),
                    pages,
                }
            },
        )
}

pub(in crate::wire) fn token_fields() -> impl Strategy<Value = RegionTokenFields> {
    (
        incarnation(),
        vec(address(), 1..=4),
        any::<(u32, [u8; 16], u64, bool, bool)>(),
    )
        .prop_map(
            |(issuer, addresses, (region, nonce, length, read, write))| RegionTokenFields {
                issuer,
                addresses,
                region,
                nonce,
                length,
                read,
                write,
            },
        )
}

/// The messages of a lane that fails and is made again.
fn lane_message() -> impl Strategy<Value = Message> {
    let name = || (any::<u16>(), any::<u32>());
    prop_oneof![
        (name(), text(512)).prop_map(|((lane, epoch), detail)| {
            Message::LaneLost(LaneLost {
                lane,
                epoch,
                detail,
            })
        }),
        (name(), vec((any::<u64>(), any::<u32>()), 0..40)).prop_map(
            |((lane, epoch), unacknowledged)| {
                Message::LaneDown(LaneDown {
                    lane,
                    epoch,
                    unacknowledged,
                })
            }
        ),
        (name(), vec(any::<bool>(), 0..40)).prop_map(|((lane, epoch), counted)| {
            Message::LaneFenced(LaneFenced {
                lane,
                epoch,
                counted,
            })
        }),
        (name(), any::<[u8; 2]>(), lane_address()).prop_map(
            |((lane, epoch), [rail, remote_rail], address)| {
                Message::LaneRenew(LaneRenew {
                    lane,
                    epoch,
                    rail,
                    remote_rail,
                    address,
                })
            }
        ),
        (
            name(),
            any::<u8>(),
            any::<u64>(),
            lane_address(),
            any::<u32>()
        )
            .prop_map(|((lane, epoch), rail, speed_bits, address, receives)| {
                Message::LaneRenewed(LaneRenewed {
                    lane,
                    epoch,
                    rail,
                    speed_bits,
                    address,
                    receives,
                })
            }),
        (name(), select(LaneRefusal::ALL), text(512)).prop_map(|((lane, epoch), code, detail)| {
            Message::LaneRefused(LaneRefused {
                lane,
                epoch,
                code,
                detail,
            })
        }),
    ]
}
