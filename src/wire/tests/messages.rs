//! Every message survives the wire, and damaged ones are refused without a panic.

use proptest::prelude::*;

use super::strategies;
use crate::kv::{Dtype, HeadRange, KvLayout, LayerLayout, Plane, PlaneRole};
use crate::wire::RemoteKey;
use crate::wire::*;

proptest! {
    #[test]
    fn roundtrip(message in strategies::message()) {
        let bytes = message.encode().expect("within the limits");
        prop_assert_eq!(Message::decode(&bytes), Ok(message));
    }

    #[test]
    fn truncated_or_extended_is_refused(message in strategies::message()) {
        let bytes = message.encode().expect("within the limits");
        // Large ones in steps, or the test would be quadratic.
        for cut in (0..bytes.len()).step_by(1 + bytes.len() / 512) {
            prop_assert!(Message::decode(&bytes[..cut]).is_err(), "cut at {}", cut);
        }
        let mut longer = bytes;
        longer.push(0);
        let error = Message::decode(&longer).expect_err("one byte too many");
        prop_assert_eq!(error.kind, WireErrorKind::Trailing(1));
    }

    #[test]
    fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        // What is accepted is at least stable: it decodes from its own encoding.
        if let Ok(message) = Message::decode(&bytes) {
            let again = message.encode().expect("what was accepted is within the limits");
            prop_assert_eq!(Message::decode(&again), Ok(message));
        }
    }

    #[test]
    fn tails_and_immediates(slot in any::<u16>(), part in any::<u32>(), wire in any::<u32>()) {
        let fits = slot < Imm::SLOTS && part < Imm::PARTS;
        let imm = Imm::new(slot, part);
        prop_assert_eq!(imm.is_some(), fits);
        if let Some(imm) = imm {
            let back = Imm::from_wire(imm.to_wire());
            prop_assert_eq!((back.slot(), back.part()), (slot, part));
        }
        prop_assert_eq!(Imm::from_wire(wire).to_wire(), wire);
    }
}

#[test]
fn tail_header_is_checked_against_its_buffer() {
    let mut buffer = TailHeader::new(7, 3).to_bytes().to_vec();
    assert_eq!(buffer, [7, 0, 0, 0, 3, 0, 0, 0]);
    buffer.extend_from_slice(b"abcd");
    assert_eq!(TailHeader::payload(&buffer, 7), Some(&b"abc"[..]));
    assert_eq!(TailHeader::payload(&buffer, 8), None, "another generation");
    assert_eq!(TailHeader::payload(&buffer[..10], 7), None, "cut");
    assert_eq!(TailHeader::payload(&buffer[..5], 7), None, "cut header");
}

#[test]
fn errors_name_message_field_and_limit() {
    let message = Message::Hello(Hello {
        incarnation: Incarnation([0; 16]),
        name: "x".repeat(256),
        fabric: crate::wire::FabricKind::Tcp,
        supported: 2,
        rails: Vec::new(),
        lanes: Vec::new(),
        keepalive_ms: 0,
    });
    let error = message.encode().expect_err("the name is too long");
    assert_eq!(
        error.to_string(),
        "Hello: name: 256 exceeds the limit of 255"
    );
    let mut bytes = Message::Revoke(Revoke {
        push: 1,
        reason: RevokeReason::Requested,
    })
    .encode()
    .unwrap();
    *bytes.last_mut().unwrap() = 9;
    let error = Message::decode(&bytes).expect_err("no such reason");
    assert_eq!(error.to_string(), "Revoke: reason: unknown value 2305");
}

#[test]
fn long_explanations_are_cut_at_a_character() {
    let message = Message::Goodbye(Goodbye {
        code: GoodbyeCode::Error,
        detail: format!("x{}", "é".repeat(400)),
    });
    let Ok(Message::Goodbye(back)) = Message::decode(&message.encode().unwrap()) else {
        panic!("another message came back");
    };
    assert_eq!(back.detail, format!("x{}", "é".repeat(255)));
}

fn plane(role: PlaneRole, region: u16, offset: u64) -> Plane {
    Plane {
        role,
        dtype: Dtype::Bf16,
        region,
        offset,
        page_stride: 1 << 16,
        token_stride: 1 << 12,
        head_stride: 256,
        head_bytes: 256,
        heads: HeadRange { first: 0, count: 8 },
    }
}

/// 128 layers; `region` and `offset` say where the keys of a layer are, the values are one region further.
fn descriptor(region: fn(u16) -> u16, offset: fn(u64) -> u64) -> PoolDescriptor {
    let layers = (0..128u16)
        .map(|layer| LayerLayout {
            tokens_per_page: 16,
            planes: vec![
                plane(PlaneRole::Key, region(layer), offset(layer.into())),
                plane(PlaneRole::Value, region(layer) + 1, offset(layer.into())),
            ],
        })
        .collect();
    let keys = (0..8)
        .map(|rail| RegionKey {
            rail,
            address: 0x7000_0000_0000,
            extent: 0,
            rkeys: vec![RemoteKey(77)],
        })
        .collect();
    let region = RegionDescriptor {
        length: 1 << 33,
        keys,
    };
    PoolDescriptor {
        pool: PoolId(3),
        layout: KvLayout {
            pages: 100_000,
            layers,
        },
        regions: vec![region; 256],
        distances: vec![1; 8],
    }
}

fn accept_size(pool: PoolDescriptor) -> usize {
    let message = Message::Accept(Box::new(Accept {
        push: 1,
        slot: 2,
        remaining_ns: 3,
        tail: TailTarget {
            address: 4,
            keys: Vec::new(),
            capacity: 5,
        },
        windows: None,
        pool: Some(pool),
        landing: None,
    }));
    let bytes = message.encode().unwrap();
    assert_eq!(Message::decode(&bytes), Ok(message));
    bytes.len()
}

#[test]
fn descriptors_of_128_layers_are_small() {
    // One region for each layer and plane (vLLM), rising and falling; one region for all.
    let mut separate = descriptor(|layer| 2 * layer, |_| 0);
    assert!(accept_size(separate.clone()) < 64 << 10);
    // All of it is the regions' keys: the layers take one entry.
    separate.regions.clear();
    assert!(accept_size(separate) < 256);
    let mut falling = descriptor(|layer| 254 - 2 * layer, |layer| (127 - layer) << 30);
    falling.regions.clear();
    assert!(accept_size(falling) < 256);
    // No regularity at all.
    let irregular = descriptor(|layer| 2 * layer, |layer| layer * layer * layer * 4096);
    assert!(accept_size(irregular) < 64 << 10);
}

#[test]
fn the_largest_descriptor_fits_a_message() {
    let layers = (0..4096u32)
        .map(|layer| LayerLayout {
            tokens_per_page: layer % 2,
            planes: vec![plane(PlaneRole::Key, 0, 0); 8],
        })
        .collect();
    let key = RegionKey {
        rail: 0,
        address: 0,
        extent: 0,
        rkeys: vec![RemoteKey(0)],
    };
    let region = RegionDescriptor {
        length: 0,
        keys: vec![key; 16],
    };
    let size = accept_size(PoolDescriptor {
        pool: PoolId(0),
        layout: KvLayout { pages: 0, layers },
        regions: vec![region; 4096],
        distances: vec![6; 16],
    });
    assert!(size < MAX_MESSAGE, "{size}");
}

#[test]
fn a_layer_run_cannot_exceed_the_announced_layers() {
    let mut bytes = Message::Accept(Box::new(Accept {
        push: 0,
        slot: 0,
        remaining_ns: 0,
        tail: TailTarget {
            address: 0,
            keys: Vec::new(),
            capacity: 0,
        },
        windows: None,
        pool: None,
        landing: None,
    }))
    .encode()
    .unwrap();
    *bytes.last_mut().unwrap() = 1;
    bytes.extend_from_slice(&[0; 8]); // Pool and number of pages.
    bytes.extend_from_slice(&2u16.to_le_bytes());
    let with_run = |run: u16| {
        let mut bytes = bytes.clone();
        bytes.extend_from_slice(&run.to_le_bytes());
        Message::decode(&bytes).unwrap_err()
    };
    let limit = |value| WireErrorKind::Limit { value, limit: 2 };
    assert_eq!(
        (with_run(3).field, with_run(3).kind),
        ("layer run", limit(3))
    );
    assert_eq!(
        with_run(0).field,
        "layer run",
        "an empty run would loop for ever"
    );
    bytes.truncate(bytes.len() - 2);
    bytes.extend_from_slice(&u16::MAX.to_le_bytes());
    assert_eq!(Message::decode(&bytes).unwrap_err().field, "layers");
}
