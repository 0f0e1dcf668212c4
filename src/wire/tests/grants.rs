//! Grants and region tokens: canonical, small, and refused after any change.

use std::time::Duration;

use base64::Engine as _;
use bytes::Bytes;
use proptest::prelude::*;

use super::strategies;
use crate::kv::HeadRange;
use crate::wire::ids::Digest;
use crate::wire::*;

pub(super) fn fields(pages: Vec<u32>) -> GrantFields {
    GrantFields {
        issuer: Incarnation([7; 16]),
        addresses: vec!["decode-3:7700".into(), "[fe80::1]:7700".into()],
        pool: PoolId(2),
        id: GrantId {
            slot: 5,
            generation: 9,
        },
        nonce: [0xc3; 16],
        heads: HeadRange { first: 8, count: 8 },
        parts_per_layer: 2,
        tail_capacity: 4096,
        valid_for: Duration::from_secs(30),
        request: Bytes::from_static(b"request-1"),
        pages,
    }
}

pub(super) fn grant(pages: Vec<u32>) -> Grant {
    Grant::new(fields(pages)).expect("within the limits")
}

/// Replaces the digest, as a malicious issuer would.
fn reseal(bytes: &mut Vec<u8>) {
    bytes.truncate(bytes.len() - 16);
    let digest = Digest::of(bytes);
    bytes.extend_from_slice(digest.as_bytes());
}

/// The grant whose page list is `encoded`.
fn with_page_list(encoded: &[u8]) -> Vec<u8> {
    let mut bytes = grant(Vec::new()).encode().to_vec();
    bytes.truncate(bytes.len() - 17);
    bytes.extend_from_slice(encoded);
    bytes.extend_from_slice(&[0; 16]);
    reseal(&mut bytes);
    bytes
}

/// Numbers that look random, the same in every run.
fn scattered(count: usize, below: u32) -> Vec<u32> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % u64::from(below)) as u32
    };
    (0..count).map(|_| next()).collect()
}

proptest! {
    #[test]
    fn grants_are_canonical(fields in strategies::grant_fields()) {
        let grant = Grant::new(fields.clone()).expect("within the limits");
        let bytes = grant.encode();
        let back = Grant::decode(&bytes).expect("just encoded");
        prop_assert_eq!(&back, &grant);
        prop_assert_eq!(back.pages(), fields.pages.as_slice());
        prop_assert_eq!(back.digest(), grant.digest());
        // Not through the cached bytes: from the decoded fields.
        let again = Grant::new(back_fields(&back, fields.nonce)).expect("within the limits");
        prop_assert_eq!(again.encode(), bytes);
    }

    #[test]
    fn whatever_is_accepted_is_canonical(list in proptest::collection::vec(any::<u8>(), 1..24)) {
        let bytes = with_page_list(&list);
        if let Ok(grant) = Grant::decode(&bytes) {
            let again = Grant::new(fields(grant.pages().to_vec())).expect("was accepted");
            prop_assert_eq!(again.encode(), Bytes::from(bytes));
        }
    }

    #[test]
    fn truncated_grants_are_refused(fields in strategies::grant_fields()) {
        let bytes = Grant::new(fields).expect("within the limits").encode();
        for cut in 0..bytes.len() {
            prop_assert!(Grant::decode(&bytes[..cut]).is_err(), "cut at {}", cut);
            // The same with a digest that fits, so that the body's own checks are reached.
            if cut >= 22 {
                let mut body = bytes[..cut - 16].to_vec();
                body.extend_from_slice(&[0; 16]);
                reseal(&mut body);
                prop_assert!(Grant::decode(&body).is_err(), "resealed at {}", cut);
            }
        }
    }

    #[test]
    fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let mut bytes = bytes;
        prop_assert!(Grant::decode(&bytes).is_err());
        prop_assert!(RegionToken::decode(&bytes).is_err());
        let mut prefixed = b"KVPG\x01\x00".to_vec();
        prefixed.append(&mut bytes);
        prefixed.extend_from_slice(&[0; 16]);
        reseal(&mut prefixed);
        prop_assert!(Grant::decode(&prefixed).is_err(), "no random header holds an address");
    }

    #[test]
    fn tokens_roundtrip_and_any_flip_is_refused(
        fields in strategies::token_fields(),
        bit in 0u8..8,
    ) {
        let token = RegionToken::new(fields).expect("within the limits");
        let mut bytes = token.encode().to_vec();
        prop_assert_eq!(RegionToken::decode(&bytes), Ok(token));
        for at in 0..bytes.len() {
            bytes[at] ^= 1 << bit;
            prop_assert!(RegionToken::decode(&bytes).is_err(), "flip at {}", at);
            bytes[at] ^= 1 << bit;
        }
    }
}

/// The fields of a decoded grant, through its public face where there is one.
fn back_fields(grant: &Grant, nonce: Nonce) -> GrantFields {
    GrantFields {
        issuer: grant.issuer(),
        addresses: grant.addresses().to_vec(),
        pool: grant.pool(),
        id: grant.id(),
        nonce,
        heads: grant.heads(),
        parts_per_layer: grant.parts_per_layer(),
        tail_capacity: grant.tail_capacity(),
        valid_for: grant.valid_for(),
        request: grant.request().clone(),
        pages: grant.pages().to_vec(),
    }
}

#[test]
fn every_flip_of_every_bit_is_refused() {
    let mut bytes = grant((10..90).chain([5, 5, 1 << 31]).collect())
        .encode()
        .to_vec();
    for at in 0..bytes.len() {
        for bit in 0..8 {
            bytes[at] ^= 1 << bit;
            let error = Grant::decode(&bytes).expect_err("changed");
            match at {
                0..4 => assert_eq!(error, GrantError::NotOne("grant")),
                4..6 => assert!(matches!(error, GrantError::VersionMismatch { ours: 1, .. })),
                _ => assert_eq!(error, GrantError::Damaged { what: "grant" }),
            }
            bytes[at] ^= 1 << bit;
        }
    }
    assert!(Grant::decode(&bytes).is_ok(), "the original still is one");
}

#[test]
fn sizes() {
    let empty = grant(Vec::new()).encode().len();
    let run = grant((5000..20_000).collect()).encode().len();
    assert!(
        run - empty <= 6,
        "15,000 consecutive pages took {}",
        run - empty
    );
    let random = grant(scattered(15_000, 1 << 20)).encode().len();
    assert!(random < 128 << 10, "15,000 scattered pages took {random}");
    let all = grant((0..1 << 20).collect());
    assert!(all.encode().len() < 256);
    assert_eq!(Grant::decode(&all.encode()), Ok(all));
    // Far apart in both directions: the largest grant there can be.
    let worst: Vec<u32> = (0..1 << 20)
        .map(|i: u32| if i.is_multiple_of(2) { i } else { u32::MAX - i })
        .collect();
    let worst = grant(worst);
    assert_eq!(Grant::decode(&worst.encode()), Ok(worst));
}

#[test]
fn limits_hold_on_both_sides() {
    let refused = |change: fn(&mut GrantFields)| {
        let mut fields = fields(vec![1]);
        change(&mut fields);
        match Grant::new(fields) {
            Err(GrantError::Malformed(error)) => error.field,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(refused(|f| f.pages = vec![0; (1 << 20) + 1]), "pages");
    assert_eq!(refused(|f| f.request = vec![0; 257].into()), "request");
    assert_eq!(refused(|f| f.addresses.clear()), "addresses");
    assert_eq!(
        refused(|f| f.addresses = vec!["a:1".into(); 5]),
        "addresses"
    );
    assert_eq!(
        refused(|f| f.addresses = vec![format!("{}:1", "a".repeat(254))]),
        "addresses"
    );
    for bad in [
        "a", "a:", ":1", "a:0", "a:65536", "a:+1", "a b:1", "::1:7", "[]:1", "a\n:1",
    ] {
        let mut fields = fields(vec![1]);
        fields.addresses = vec![bad.into()];
        assert!(Grant::new(fields).is_err(), "{bad:?}");
    }
}

#[test]
fn page_lists_have_one_form_and_bounded_size() {
    let kind = |list: &[u8]| match Grant::decode(&with_page_list(list)) {
        Err(GrantError::Malformed(error)) => {
            assert_eq!(error.field, "pages");
            error.kind
        }
        other => panic!("{other:?}"),
    };
    let good = |list: &[u8]| Grant::decode(&with_page_list(list)).map(|g| g.pages().to_vec());
    assert_eq!(good(&[3, 1, 1]), Ok(vec![0, 1, 2]));
    assert_eq!(good(&[1, 4]), Ok(vec![1]));
    // Count, token and run length not in the shortest form.
    assert_eq!(kind(&[0x81, 0, 4]), WireErrorKind::NotCanonical);
    assert_eq!(kind(&[1, 0x84, 0]), WireErrorKind::NotCanonical);
    assert_eq!(kind(&[3, 1, 0x81, 0]), WireErrorKind::NotCanonical);
    // A run written as two.
    assert_eq!(kind(&[2, 4, 0]), WireErrorKind::NotCanonical);
    assert_eq!(kind(&[4, 1, 0, 1, 0]), WireErrorKind::NotCanonical);
    // A varint of more than 64 bits.
    assert_eq!(
        kind(&[1, 255, 255, 255, 255, 255, 255, 255, 255, 255, 2]),
        WireErrorKind::NotCanonical
    );
    // Runs beyond the count, a count beyond the limit, pages below 0 and beyond 32 bits.
    assert!(matches!(
        kind(&[
            3, 1, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 1
        ]),
        WireErrorKind::Limit { limit: 3, .. }
    ));
    assert!(matches!(
        kind(&[0x81, 0x80, 0x40]),
        WireErrorKind::Limit { value, .. } if value == (1 << 20) + 1
    ));
    assert!(matches!(kind(&[1, 2]), WireErrorKind::Limit { .. }));
    let huge = [1, 0xfe, 255, 255, 255, 255, 255, 255, 255, 255, 1];
    assert!(matches!(kind(&huge), WireErrorKind::Limit { .. }));
    // The last page there is; one run past it.
    assert_eq!(good(&[1, 0xfc, 255, 255, 255, 0x3f]), Ok(vec![u32::MAX]));
    assert!(matches!(
        kind(&[2, 0xfd, 255, 255, 255, 0x3f, 0]),
        WireErrorKind::Limit { .. }
    ));
}

#[test]
fn survives_base64_in_json() {
    let grant = grant(scattered(2000, 1 << 20));
    let engine = base64::engine::general_purpose::STANDARD;
    let json = serde_json::json!({ "kv": engine.encode(grant.encode()) }).to_string();
    let value: serde_json::Value = serde_json::from_str(&json).unwrap();
    let bytes = engine.decode(value["kv"].as_str().unwrap()).unwrap();
    assert_eq!(Grant::decode(&bytes), Ok(grant));
}

#[test]
fn printing_never_tells_the_secret() {
    let grant = grant(vec![1, 2, 3]);
    let token = RegionToken::new(RegionTokenFields {
        issuer: Incarnation([7; 16]),
        addresses: vec!["a:1".into()],
        region: 4,
        nonce: [0xc3; 16],
        length: 100,
        read: true,
        write: false,
    })
    .unwrap();
    let open = Message::OpenRegion(OpenRegion {
        request: 1,
        region: 4,
        nonce: [0xc3; 16],
        incarnation: Incarnation([7; 16]),
    });
    let printed = format!(
        "{grant} {grant:?} {token} {token:?} {open:?} {:?}",
        grant.digest()
    );
    assert!(
        !printed.contains("c3c3") && !printed.contains("195"),
        "{printed}"
    );
    let digest: String = grant
        .digest()
        .as_bytes()
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect();
    assert!(!printed.contains(&digest), "{printed}");
    assert!(
        printed.contains("grant 5.9 of 0707070707070707: 3 pages of pool 2"),
        "{printed}"
    );
}
