//! Peers that belong here but do not keep to the protocol: they harm nobody's transfers but their own.

use std::time::Duration;

use super::world::World;
use crate::{
    endpoint::{PushError, config::Config, core::ControlEvent},
    kv::{Dtype, HeadRange, presets::KvShape},
    protocol::Time,
    wire::{Message, Refuse, RefuseCode},
};

/// Pushes have small numbers, so a reader can name those to other readers. It must not be able to end them.
#[test]
fn a_reader_cannot_refuse_the_grants_of_others() {
    let shape = KvShape {
        layers: 2,
        tokens_per_page: 4,
        heads: HeadRange::new(0, 2),
        head_dim: 16,
        dtype: Dtype::Bf16,
    };
    let layout = shape.vllm_flash(8).unwrap();
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
