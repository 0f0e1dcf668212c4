//! Peers that belong here but do not keep to the protocol: they harm nobody's transfers but their own.

use std::{sync::Arc, time::Duration};

use super::world::{Tamper, World};
use crate::{
    endpoint::{
        AccessError, ArrivalError, PeerError, PushError,
        config::Config,
        core::{AccessOp, ControlEvent},
        shared::AccessShared,
    },
    fabric::Access,
    kv::{Dtype, HeadRange, KvLayout, presets::KvShape},
    memory::Memory,
    protocol::Time,
    wire::{
        Accept, Message, PoolDescriptor, Refuse, RefuseCode, RegionAccept, RegionKey, RegionRefuse,
    },
};

/// Pushes have small numbers, so a reader can name those to other readers. It must not be able to end them.
#[test]
fn a_reader_cannot_refuse_the_grants_of_others() {
    let layout = layout();
    let config = Config {
        max_transfers: 8,
        ..Config::default()
    };
    let mut world = World::new(1, 3, &config);
    let (source, _source_memory) = world.nodes[0].pool(&layout, 1);
    let readers: Vec<_> = [1, 2].map(|node| world.nodes[node].pool(&layout, 0)).into();
    let deadline = Duration::from_secs(10);
    let arrivals: Vec<_> = readers
        .iter()
        .map(|(pool, _)| pool.grant("x", &[1, 2], deadline).unwrap())
        .collect();
    // Their numbers are 1 and 2.
    let pushes: Vec<_> = arrivals
        .iter()
        .map(|arrival| {
            let shared = &world.nodes[0].shared;
            let grant = arrival.grant().clone();
            shared.start_push(&source, grant, None).unwrap()
        })
        .collect();
    world.run(Duration::from_millis(20), |_| {});
    for push in &pushes {
        assert_eq!(push.poll_opened(), Some(Ok(())));
        push.layer(0, &[1, 2]).unwrap();
    }

    let hostile = world.nodes[2].shared.incarnation;
    let refusals = [1, 2].map(|push| {
        let refuse = Refuse {
            push,
            code: RefuseCode::Other,
            detail: "hostile".to_owned(),
        };
        let conn = world.nodes[0].core.dialled[&hostile];
        let bytes = Message::Refuse(refuse).encode().unwrap();
        ControlEvent::Message { conn, bytes }
    });
    let now = Time(world.now);
    let mut events = refusals.into();
    world.nodes[0].core.step(now, &mut Vec::new(), &mut events);
    world.run(Duration::from_millis(20), |_| {});
    assert_eq!(pushes[0].poll_ended(), None, "that of the other reader");
    match pushes[1].poll_ended() {
        Some(Err(PushError::Refused { detail, .. })) => assert_eq!(detail, "hostile"),
        other => panic!("its own: {other:?}"),
    }

    pushes[0].layer(1, &[1, 2]).unwrap();
    pushes[0].start_finish("end").unwrap();
    world.run(Duration::from_millis(20), |_| {});
    assert!(matches!(pushes[0].poll_ended(), Some(Ok(_))));
    assert_eq!(arrivals[0].poll_complete().unwrap().unwrap(), "end");
}

fn layout() -> KvLayout {
    let shape = KvShape {
        layers: 2,
        tokens_per_page: 4,
        heads: HeadRange::new(0, 2),
        head_dim: 16,
        dtype: Dtype::Bf16,
    };
    shape.vllm_flash(8).unwrap()
}

/// Changes each acceptance that node 1 sends.
fn change_accepts(mut change: impl FnMut(&mut Accept) + 'static) -> Tamper {
    Box::new(move |from, bytes| match Message::decode(&bytes).unwrap() {
        Message::Accept(mut accept) if from == 1 => {
            change(&mut accept);
            vec![Message::Accept(accept).encode().unwrap()]
        }
        _ => vec![bytes],
    })
}

fn change_pool(mut change: impl FnMut(&mut PoolDescriptor) + 'static) -> Tamper {
    change_accepts(move |accept| change(accept.pool.as_mut().expect("it was wanted")))
}

fn is_protocol(error: &PushError) -> bool {
    matches!(error, PushError::Peer(PeerError::Protocol { .. }))
}

fn is_mismatch(error: &PushError) -> bool {
    matches!(error, PushError::Mismatch(_))
}

/// Node 0 pushes into a pool of node 1, whose acceptance `tamper` changes, after `before` pushes to the honest one over
/// a session that has ended since. The push must fail as `expected`, and nothing may be written.
fn push_fails(before: usize, tamper: Tamper, expected: impl Fn(&PushError) -> bool) {
    let layout = layout();
    let mut world = World::new(2, 2, &Config::default());
    let (source, _source_memory) = world.nodes[0].pool(&layout, 7);
    let (pool, memory) = world.nodes[1].pool(&layout, 0);
    assert_eq!(memory.len(), 2, "a region for each layer");
    let deadline = Duration::from_secs(10);
    let transfer = |world: &mut World| {
        let arrival = pool.grant("x", &[1, 2], deadline).unwrap();
        let shared = &world.nodes[0].shared;
        let push = shared.start_push(&source, arrival.grant().clone(), None);
        world.run(Duration::from_millis(20), |_| {});
        (arrival, push.unwrap())
    };
    let succeeds = |world: &mut World| {
        let (arrival, push) = transfer(world);
        for layer in 0..2 {
            push.layer(layer, &[1, 2]).unwrap();
        }
        push.start_finish("end").unwrap();
        world.run(Duration::from_millis(20), |_| {});
        assert_eq!(arrival.poll_complete().unwrap().unwrap(), "end");
    };
    (0..before).for_each(|_| succeeds(&mut world));
    world.cut(0);
    world.run(Duration::from_millis(20), |_| {});
    for memory in &memory {
        memory.fill(0, memory.length(), 0).unwrap();
    }

    world.tamper = Some(tamper);
    let (arrival, push) = transfer(&mut world);
    if push.poll_opened() == Some(Ok(())) {
        // It must not be; see what that leads to.
        drop(push.layer(0, &[1, 2]).and_then(|()| push.layer(1, &[1, 2])));
        drop(push.start_finish("end"));
        world.run(Duration::from_millis(20), |_| {});
    }
    let end = push.poll_ended().expect("it has ended");
    assert!(end.as_ref().is_err_and(expected), "{end:?}");
    let end = arrival.poll_complete();
    assert!(
        matches!(end, Some(Err(ArrivalError::Abandoned { .. }))),
        "{end:?}"
    );
    for memory in &memory {
        let mut bytes = vec![1; memory.length() as usize];
        memory.read(0, &mut bytes).unwrap();
        assert!(bytes.iter().all(|&byte| byte == 0), "it was written to");
    }
    assert_eq!(pool.granted_pages(), 0);

    // One grant was harmed, and nothing else.
    world.tamper = None;
    succeeds(&mut world);
}

#[test]
fn a_region_outside_of_the_address_space_is_refused() {
    for region in 0..2 {
        let tamper = change_pool(move |pool| {
            pool.regions[region].keys[0].address = u64::MAX - pool.regions[region].length + 1;
        });
        push_fails(0, tamper, is_protocol);
    }
}

#[test]
fn a_rail_with_two_keys_for_one_region_and_none_for_another_is_refused() {
    for (twice, never) in [(0, 1), (1, 0)] {
        let tamper = change_pool(move |pool| {
            let mut other = std::mem::take(&mut pool.regions[never].keys);
            pool.regions[twice].keys.append(&mut other);
        });
        push_fails(0, tamper, is_protocol);
    }
}

#[test]
fn a_tail_outside_of_the_address_space_is_refused() {
    let tamper = change_accepts(|accept| accept.tail.address = u64::MAX - 100);
    push_fails(0, tamper, is_protocol);
    // The payload ends where the address space does, the header is too much.
    let wraps = change_accepts(|accept| {
        accept.tail.address = u64::MAX - u64::from(accept.tail.capacity);
    });
    push_fails(0, wraps, is_protocol);
    let tamper = change_accepts(|accept| accept.tail.capacity -= 1);
    push_fails(0, tamper, is_protocol);
}

/// A later session of the same incarnation describes the same pool differently.
#[test]
fn a_pool_that_has_shrunk_is_refused() {
    let regions = change_pool(|pool| pool.regions.truncate(1));
    push_fails(1, regions, is_mismatch);
    let layers = change_pool(|pool| {
        pool.regions.truncate(1);
        pool.layout.layers.truncate(1);
    });
    push_fails(1, layers, is_mismatch);
    let pages = change_pool(|pool| {
        pool.layout.pages = 2;
    });
    push_fails(1, pages, is_mismatch);
}

const REGION: u64 = 1 << 20;

fn ended(access: &AccessShared) -> Option<Result<(), AccessError>> {
    access.signal.look(Clone::clone)
}

#[test]
fn nothing_a_peer_says_ends_an_access_that_moves_bytes() {
    let mut world = World::new(4, 2, &Config::default());
    let (_exported, token, theirs) = world.nodes[1].export(REGION, Access::ALL);
    let (local, _, ours) = world.nodes[0].export(REGION, Access::LOCAL);
    theirs.fill(0, REGION, 9).unwrap();
    let open = world.nodes[0].access(&token, AccessOp::Open);
    world.run(Duration::from_millis(20), |_| {});
    assert_eq!(ended(&open), Some(Ok(())));
    let keys = open.keys.look(Clone::clone).unwrap();

    let read = AccessOp::Move {
        read: true,
        local,
        local_offset: 0,
        remote: Arc::clone(&keys),
        remote_offset: 0,
        length: REGION,
    };
    let read = world.nodes[0].access(&token, read);
    world.round();
    let request = world.nodes[0].core.next_request;
    let conn = world.nodes[0].core.dialled[&world.nodes[1].shared.incarnation];
    let accept = Message::RegionAccept(RegionAccept {
        request,
        length: REGION,
        read: true,
        write: true,
        keys: keys
            .targets
            .iter()
            .map(|(&rail, target)| RegionKey {
                rail,
                address: target.first().0,
                extent: 0,
                rkeys: vec![target.first().1],
            })
            .collect(),
    });
    let refuse = Message::RegionRefuse(RegionRefuse {
        request,
        code: RefuseCode::Other,
        detail: "hostile".to_owned(),
    });
    for message in [accept, refuse] {
        world.inject(0, conn, &message);
        world.round();
        assert_eq!(ended(&read), None, "{}", message.name());
        assert!(world.nodes[0].core.accesses.contains_key(&request));
    }
    world.run(Duration::from_millis(20), |_| {});
    assert_eq!(ended(&read), Some(Ok(())));
    let mut bytes = vec![0; REGION as usize];
    ours.read(0, &mut bytes).unwrap();
    assert!(bytes.iter().all(|&byte| byte == 9));
}

#[test]
fn an_exported_region_outside_of_the_address_space_is_a_violation() {
    let mut world = World::new(5, 2, &Config::default());
    let (_exported, token, _memory) = world.nodes[1].export(REGION, Access::ALL);
    world.tamper = Some(Box::new(|_, bytes| {
        let mut message = Message::decode(&bytes).unwrap();
        if let Message::RegionAccept(accept) = &mut message {
            accept.keys[0].address = u64::MAX - REGION + 1;
        }
        vec![message.encode().unwrap()]
    }));
    let open = world.nodes[0].access(&token, AccessOp::Open);
    world.run(Duration::from_millis(20), |_| {});
    let end = ended(&open);
    let protocol = matches!(
        end,
        Some(Err(AccessError::Peer(PeerError::Protocol { .. })))
    );
    assert!(protocol, "{end:?}");
    assert!(world.nodes[0].core.sessions.is_empty());
}

/// Keys belong to the session that learnt them, whatever rails a later one of the same incarnation has.
#[test]
fn keys_of_a_session_that_has_ended_lead_nowhere() {
    let mut world = World::with_rails(8, &[1, 2], &Config::default());
    let (_exported, token, _theirs) = world.nodes[1].export(REGION, Access::ALL);
    let (local, _, _ours) = world.nodes[0].export(REGION, Access::LOCAL);
    world.tamper = Some(Box::new(|_, bytes| {
        let mut message = Message::decode(&bytes).unwrap();
        if let Message::RegionAccept(accept) = &mut message {
            let mut other = accept.keys[0].clone();
            other.rail = 1;
            accept.keys.push(other);
        }
        vec![message.encode().unwrap()]
    }));
    let open = world.nodes[0].access(&token, AccessOp::Open);
    world.run(Duration::from_millis(20), |_| {});
    assert_eq!(ended(&open), Some(Ok(())));
    let keys = open.keys.look(Clone::clone).unwrap();
    world.cut(0);
    world.run(Duration::from_millis(20), |_| {});
    world.tamper = Some(Box::new(|_, bytes| {
        let mut message = Message::decode(&bytes).unwrap();
        if let Message::HelloAck(ack) = &mut message {
            ack.lanes.iter_mut().for_each(|lane| lane.rail = 1);
        }
        if let Message::RegionAccept(accept) = &mut message {
            accept.keys[0].rail = 1;
        }
        vec![message.encode().unwrap()]
    }));
    let open = world.nodes[0].access(&token, AccessOp::Open);
    world.run(Duration::from_millis(20), |_| {});
    assert_eq!(ended(&open), Some(Ok(())));
    let write = AccessOp::Move {
        read: false,
        local,
        local_offset: 0,
        remote: keys,
        remote_offset: 100,
        length: 1000,
    };
    let write = world.nodes[0].access(&token, write);
    world.run(Duration::from_millis(20), |_| {});
    let end = ended(&write);
    assert!(
        matches!(
            end,
            Some(Err(AccessError::Peer(PeerError::NoSession { .. })))
        ),
        "{end:?}"
    );
}

/// A peer cannot make a session without lanes.
#[test]
fn an_answer_to_an_offer_of_no_lanes_is_a_violation() {
    let layout = layout();
    let mut world = World::new(9, 2, &Config::default());
    let (source, _source_memory) = world.nodes[0].pool(&layout, 7);
    let (pool, _memory) = world.nodes[1].pool(&layout, 0);
    world.nodes[0].core.rails[0].dead = true;
    let theirs = world.nodes[1].shared.incarnation;
    world.tamper = Some(Box::new(move |from, bytes| {
        let message = Message::decode(&bytes).unwrap();
        if let (1, Message::HelloReject(_)) = (from, &message) {
            let ack = crate::wire::HelloAck {
                incarnation: theirs,
                name: String::new(),
                lanes: vec![],
                receives_per_lane: 1,
                keepalive_ms: 0,
            };
            let accept = Accept {
                push: 1,
                slot: 0,
                remaining_ns: 1_000_000_000,
                tail: crate::wire::TailTarget {
                    address: 0,
                    keys: vec![],
                    capacity: 1016,
                },
                windows: None,
                pool: Some(PoolDescriptor {
                    pool: crate::wire::PoolId(1),
                    layout: layout.clone(),
                    regions: crate::kv::region_lengths(&layout)
                        .unwrap()
                        .into_iter()
                        .map(|length| crate::wire::RegionDescriptor {
                            length,
                            keys: vec![],
                        })
                        .collect(),
                    distances: vec![],
                }),
                landing: None,
            };
            return vec![
                Message::HelloAck(ack).encode().unwrap(),
                Message::Accept(Box::new(accept)).encode().unwrap(),
            ];
        }
        vec![bytes]
    }));
    let arrival = pool.grant("x", &[1, 2], Duration::from_secs(10)).unwrap();
    let shared = &world.nodes[0].shared;
    let push = shared
        .start_push(&source, arrival.grant().clone(), None)
        .unwrap();
    world.run(Duration::from_millis(20), |_| {});
    println!("opened {:?}", push.poll_opened());
    if push.poll_opened() == Some(Ok(())) {
        drop(push.layer(0, &[1, 2]));
        drop(push.start_finish("end"));
        world.run(Duration::from_millis(20), |_| {});
    }
    let end = push.poll_ended();
    assert!(matches!(end, Some(Err(_))), "{end:?}");
}
