//! What a peer can make this side hold has an end, and the end is an answer and not a failure of others.

use std::{collections::BTreeSet, time::Duration};

use super::{
    super::limits::{MAX_REMOTE_POOLS, MAX_SESSIONS_OF_PEER},
    world::World,
};
use crate::{
    endpoint::{PeerError, PushError, config::Config},
    kv::{Dtype, HeadRange, KvLayout, presets::KvShape},
    wire::{Message, RejectCode},
};

const LONG: Duration = Duration::from_secs(600);
const SOON: Duration = Duration::from_millis(20);

fn layout() -> KvLayout {
    let shape = KvShape {
        layers: 1,
        tokens_per_page: 4,
        heads: HeadRange::new(0, 1),
        head_dim: 8,
        dtype: Dtype::Bf16,
    };
    shape.vllm_flash(4).unwrap()
}

#[test]
fn one_peer_has_few_sessions() {
    let mut world = World::new(5, 3, &Config::default());
    let reader = vec!["node-2:7700".to_owned()];
    for _ in 0..3 * MAX_SESSIONS_OF_PEER {
        world.nodes[0].core.dial(None, &reader, LONG);
        world.run(SOON, |_| {});
    }
    assert_eq!(world.nodes[2].core.sessions.len(), MAX_SESSIONS_OF_PEER);
    assert_eq!(world.nodes[0].core.sessions.len(), MAX_SESSIONS_OF_PEER);
    // Others are let in, and so is the same one when it has left.
    world.nodes[1].core.dial(None, &reader, LONG);
    world.run(SOON, |_| {});
    assert_eq!(world.nodes[2].core.sessions.len(), MAX_SESSIONS_OF_PEER + 1);
    let peer = world.nodes[2].shared.incarnation;
    world.nodes[0].core.disconnect(peer);
    world.run(SOON, |_| {});
    assert_eq!(world.nodes[2].core.sessions.len(), 1);
    world.nodes[0].core.dial(None, &reader, LONG);
    world.run(SOON, |_| {});
    assert_eq!(world.nodes[2].core.sessions.len(), 2);
}

#[test]
fn an_endpoint_takes_so_many_peers() {
    let config = Config {
        max_peers: 2,
        ..Config::default()
    };
    let mut world = World::new(6, 4, &config);
    let (pool, _memory) = world.nodes[3].pool(&layout(), 0);
    let mut pushes = Vec::new();
    for node in 0..3 {
        let (source, memory) = world.nodes[node].pool(&layout(), 1);
        let arrival = pool.grant("x", &[node as u32], LONG).unwrap();
        let shared = &world.nodes[node].shared;
        let push = shared.start_push(&source, arrival.grant().clone(), None);
        pushes.push((push.unwrap(), arrival, memory));
        world.run(SOON, |_| {});
    }
    for (push, ..) in &pushes[..2] {
        assert_eq!(push.poll_opened(), Some(Ok(())));
    }
    match pushes[2].0.poll_ended() {
        Some(Err(PushError::Peer(error @ PeerError::Rejected { .. }))) => {
            let busy = matches!(
                &error,
                PeerError::Rejected {
                    code: RejectCode::Busy,
                    ..
                }
            );
            assert!(busy && error.is_retryable(), "{error}");
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(pushes[2].1.poll_complete(), None, "its grant is still good");
    assert_eq!(world.nodes[3].core.sessions.len(), 2);
}

/// A reader whose pools come and go, over a session that stays.
#[test]
fn descriptions_of_pools_do_not_accumulate() {
    let mut world = World::new(7, 2, &Config::default());
    let (source, _memory) = world.nodes[0].pool(&layout(), 1);
    let wanted = std::rc::Rc::new(std::cell::Cell::new(0));
    let count = std::rc::Rc::clone(&wanted);
    world.tamper = Some(Box::new(move |_, bytes| {
        if let Ok(Message::Open(open)) = Message::decode(&bytes) {
            count.set(count.get() + u32::from(open.want_pool));
        }
        vec![bytes]
    }));
    let pools: Vec<_> = (0..MAX_REMOTE_POOLS + 10)
        .map(|_| world.nodes[1].pool(&layout(), 0))
        .collect();
    let transfer = |world: &mut World, pool: usize| {
        let arrival = pools[pool].0.grant("x", &[1], LONG).unwrap();
        let shared = &world.nodes[0].shared;
        let push = shared.start_push(&source, arrival.grant().clone(), None);
        let push = push.unwrap();
        world.run(SOON, |_| {});
        assert_eq!(push.poll_opened(), Some(Ok(())));
        push.layer(0, &[1]).unwrap();
        push.start_finish("end").unwrap();
        world.run(SOON, |_| {});
        assert_eq!(arrival.poll_complete().unwrap().unwrap(), "end");
        let sessions = world.nodes[0].core.sessions.values();
        let known: BTreeSet<usize> = sessions.map(|session| session.remote_pools.len()).collect();
        assert!(known.iter().all(|&known| known <= MAX_REMOTE_POOLS));
    };
    for pool in 0..pools.len() {
        // The first is used again and again, so it is never forgotten.
        transfer(&mut world, pool);
        transfer(&mut world, 0);
    }
    assert_eq!(wanted.get() as usize, pools.len());
    transfer(&mut world, 1);
    assert_eq!(wanted.get() as usize, pools.len() + 1, "it was forgotten");
    assert_eq!(world.nodes[0].core.sessions.len(), 1, "one session for all");
}

/// Forgotten between the opening and the answer: the push still has what its opening relied on.
#[test]
fn a_description_in_use_is_kept() {
    let mut world = World::new(8, 2, &Config::default());
    let (source, _memory) = world.nodes[0].pool(&layout(), 1);
    let (pool, _other) = world.nodes[1].pool(&layout(), 0);
    for round in 0..2 {
        let arrival = pool.grant("x", &[1], LONG).unwrap();
        let shared = &world.nodes[0].shared;
        let push = shared.start_push(&source, arrival.grant().clone(), None);
        let push = push.unwrap();
        if round == 1 {
            world.round();
            for session in world.nodes[0].core.sessions.values_mut() {
                session.remote_pools = Default::default();
            }
        }
        world.run(SOON, |_| {});
        assert_eq!(push.poll_opened(), Some(Ok(())), "round {round}");
        push.layer(0, &[1]).unwrap();
        push.start_finish("end").unwrap();
        world.run(SOON, |_| {});
        assert_eq!(arrival.poll_complete().unwrap().unwrap(), "end");
    }
}
