//! What an `Open` must say, word for word, before a reader tells where its memory is.

use std::{cell::RefCell, rc::Rc, time::Duration};

use super::world::World;
use crate::{
    endpoint::{ArrivalError, PeerError, config::Config},
    kv::{Dtype, HeadRange, KvLayout, presets::KvShape},
    wire::{Digest, Imm, Incarnation, Message, Open, PoolId, RefuseCode},
};

/// The name of the push that is opened by hand.
const PUSH: u64 = 999;

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

/// What a reader answers to an `Open` of a living grant after `change`; nothing is an acceptance.
fn answer(change: impl Fn(&mut Open)) -> Option<RefuseCode> {
    let layout = layout();
    let mut world = World::new(9, 2, &Config::default());
    let (source, _source_memory) = world.nodes[0].pool(&layout, 1);
    let (pool, _memory) = world.nodes[1].pool(&layout, 0);
    let deadline = Duration::from_secs(1);
    // For the session.
    let first = pool.grant("first", &[0], deadline).unwrap();
    let shared = &world.nodes[0].shared;
    let push = shared.start_push(&source, first.grant().clone(), None);
    let push = push.unwrap();
    world.run(Duration::from_millis(20), |_| {});
    assert_eq!(push.poll_opened(), Some(Ok(())));

    let second = pool.grant("second", &[1], deadline).unwrap();
    let grant = second.grant();
    let mut open = Open {
        push: PUSH,
        grant: grant.id(),
        pool: grant.pool(),
        incarnation: grant.issuer(),
        digest: grant.digest(),
        want_pool: false,
    };
    change(&mut open);
    let answers = Rc::new(RefCell::new(Vec::new()));
    let heard = Rc::clone(&answers);
    world.tamper = Some(Box::new(move |node, bytes| {
        match Message::decode(&bytes) {
            Ok(Message::Accept(accept)) if node == 1 && accept.push == PUSH => {
                heard.borrow_mut().push(None);
            }
            Ok(Message::Refuse(refuse)) if node == 1 && refuse.push == PUSH => {
                heard.borrow_mut().push(Some(refuse.code));
            }
            _ => {}
        }
        vec![bytes]
    }));
    let conn = world.conns_of(1)[0];
    world.inject(1, conn, &Message::Open(open));
    world.run(Duration::from_millis(1), |_| {});
    let answers = answers.borrow();
    assert_eq!(answers.len(), 1, "{answers:?}");
    answers[0]
}

#[test]
fn a_grant_is_opened_only_as_it_was_issued() {
    assert_eq!(answer(|_| {}), None, "as it was issued");
    let refused = |change: &dyn Fn(&mut Open)| answer(change).expect("it was accepted");
    let code = refused(&|open| open.incarnation = Incarnation([7; 16]));
    assert_eq!(code, RefuseCode::WrongIncarnation);
    let code = refused(&|open| open.digest = Digest([7; 16]));
    assert_eq!(code, RefuseCode::DigestMismatch);
    let code = refused(&|open| open.pool = PoolId(77));
    assert_eq!(code, RefuseCode::DigestMismatch);
    let code = refused(&|open| open.grant.generation += 1);
    assert_ne!(code, RefuseCode::DigestMismatch, "the generation says it");
    let code = refused(&|open| open.grant.slot += 1);
    assert_eq!(code, RefuseCode::UnknownGrant);
}

/// A writer that announces a part that the grant does not have is not to be trusted with the rest.
#[test]
fn a_part_beyond_the_grant_ends_the_session() {
    let layout = layout();
    let mut world = World::new(10, 2, &Config::default());
    let (source, _source_memory) = world.nodes[0].pool(&layout, 1);
    let (pool, _memory) = world.nodes[1].pool(&layout, 0);
    let arrival = pool.grant("x", &[0], Duration::from_secs(1)).unwrap();
    let shared = &world.nodes[0].shared;
    let push = shared.start_push(&source, arrival.grant().clone(), None);
    let push = push.unwrap();
    world.run(Duration::from_millis(20), |_| {});
    assert_eq!(push.poll_opened(), Some(Ok(())));
    let conn = world.conns_of(1)[0];
    // The first slot, and one layer of one part and the tail.
    let beyond = Imm::new(0, 2).unwrap().to_wire();
    world.nodes[1].core.part_arrived(conn, 0, beyond);
    world.run(Duration::from_millis(1), |_| {});
    let end = arrival.poll_complete();
    let accused = matches!(
        end,
        Some(Err(ArrivalError::Peer(PeerError::Protocol { .. })))
    );
    assert!(accused, "{end:?}");
}
