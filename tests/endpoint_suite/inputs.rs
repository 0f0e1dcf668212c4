//! Bad input gets a typed error with the reason, and nothing is written.

use std::{sync::Arc, time::Duration};

use kvpush::{
    Auth, Grant, GrantError, RefuseCode,
    endpoint::{EndpointError, GrantOptions, IssueError, PeerError, PushError, PushInputError},
    kv::{HeadRange, pages::PageError},
    memory::HostMemory,
};

use crate::{
    fixture::{Cache, Fabric, LONG, POISON},
    mover,
    transfers::{plain, push, shape},
};

fn assert_untouched(cache: &Cache) {
    let all_poison = cache.bytes().iter().flatten().all(|&byte| byte == POISON);
    assert!(all_poison, "something was written");
}

pub(crate) fn wrong_grants_are_not_issued(fabric: &Fabric) {
    let decode = fabric.endpoint("decode");
    let cache = Cache::poisoned(&decode, &plain(2, 16));
    let pool = &cache.pool;
    let issue = |pages: &[u32]| pool.grant("x", pages, LONG).map(|_| ()).unwrap_err();
    assert!(matches!(issue(&[]), IssueError::Size { pages: 0, .. }));
    assert!(matches!(
        issue(&[16]),
        IssueError::Page(PageError::OutOfRange { page: 16, .. })
    ));
    assert!(matches!(
        issue(&[1, 2, 1]),
        IssueError::Page(PageError::Duplicate { page: 1, .. })
    ));
    assert!(matches!(
        pool.grant("x", &[1], Duration::ZERO),
        Err(IssueError::NoTime)
    ));
    assert!(matches!(
        pool.grant(vec![0; 257], &[1], LONG),
        Err(IssueError::Encode(_))
    ));
    let foreign = GrantOptions::new("x", LONG).heads(HeadRange::new(3, 2));
    assert!(matches!(
        pool.grant_with(&[1], foreign),
        Err(IssueError::Heads { layer: 0, .. })
    ));
    assert_eq!(pool.granted_pages(), 0, "nothing is reserved by a refusal");

    let held = pool.grant("x", &[4, 5], LONG).unwrap();
    assert_eq!(issue(&[6, 5]), IssueError::PageBusy { page: 5 });
    assert!(issue(&[6, 5]).is_retryable());
    assert_eq!(pool.granted_pages(), 2);
    held.revoke_blocking(LONG).unwrap();
    assert!(pool.grant("x", &[6, 5], LONG).is_ok());
}

pub(crate) fn wrong_pages_are_not_pushed(fabric: &Fabric) {
    let (prefill, decode) = fabric.pair();
    let layout = plain(2, 16);
    let source = Cache::filled(&prefill, &layout, 1);
    let destination = Cache::poisoned(&decode, &layout);
    let arrival = destination.pool.grant("x", &[1, 2, 3], LONG).unwrap();
    let push = prefill
        .push_blocking(&source.pool, arrival.grant().clone(), LONG)
        .unwrap();
    let input = |result: Result<(), PushError>| match result {
        Err(PushError::Input(error)) => error,
        other => panic!("{other:?}"),
    };
    assert!(matches!(
        input(push.layer(2, &[1, 2, 3])),
        PushInputError::Layer { layer: 2, .. }
    ));
    assert!(matches!(
        input(push.layer(0, &[1, 2])),
        PushInputError::Positions { .. }
    ));
    assert!(matches!(
        input(push.layer_from(0, 2, &[1, 2])),
        PushInputError::Positions { .. }
    ));
    assert!(matches!(
        input(push.layer(0, &[1, 2, 16])),
        PushInputError::Page(_)
    ));
    assert!(matches!(
        input(push.layer(0, &[1, 2, 2])),
        PushInputError::Page(_)
    ));
    assert!(matches!(
        input(push.start_finish("")),
        PushInputError::Incomplete {
            layer: 0,
            missing: 3
        }
    ));
    assert!(matches!(
        input(push.start_finish(vec![0; 5000])),
        PushInputError::Tail { .. }
    ));
    std::thread::sleep(Duration::from_millis(30));
    assert_untouched(&destination);
    // None of that has harmed the push.
    push.layer(1, &[4, 5, 6]).unwrap();
    assert!(matches!(
        input(push.layer_from(1, 1, &[7])),
        PushInputError::Repeated { .. }
    ));
    push.layer(0, &[4, 5, 6]).unwrap();
    push.finish_blocking("done", LONG).unwrap().unwrap();
    assert_eq!(arrival.complete_blocking(LONG).unwrap().unwrap(), "done");
    assert!(matches!(
        push.layer(0, &[4, 5, 6]),
        Err(PushError::Input(PushInputError::Finished))
    ));
}

pub(crate) fn pools_that_do_not_match(fabric: &Fabric) {
    let (prefill, decode) = fabric.pair();
    let layout = plain(2, 8);
    let destination = Cache::poisoned(&decode, &layout);
    let more_layers = plain(3, 8);
    let other_heads = shape(2, HeadRange::new(4, 4)).vllm_flash(8).unwrap();
    let other_page = {
        let mut shape = shape(2, HeadRange::new(0, 4));
        shape.tokens_per_page = 8;
        shape.vllm_flash(8).unwrap()
    };
    for layout in [more_layers, other_heads, other_page] {
        let source = Cache::filled(&prefill, &layout, 1);
        let arrival = destination.pool.grant("x", &[1, 2], LONG).unwrap();
        let result = prefill.push_blocking(&source.pool, arrival.grant().clone(), LONG);
        assert!(matches!(result, Err(PushError::Mismatch(_))), "{result:?}");
        // The reader is told, so the pages do not stay reserved until the deadline.
        assert!(arrival.complete_blocking(LONG).expect("no hang").is_err());
    }
    assert_untouched(&destination);
    assert_eq!(destination.pool.granted_pages(), 0);
}

pub(crate) fn damaged_and_foreign_grants(fabric: &Fabric) {
    let (prefill, decode) = fabric.pair();
    let layout = plain(2, 8);
    let source = Cache::filled(&prefill, &layout, 1);
    let destination = Cache::poisoned(&decode, &layout);
    let arrival = destination.pool.grant("x", &[1, 2], LONG).unwrap();
    let bytes = arrival.grant().encode();
    for at in 0..bytes.len() {
        let mut damaged = bytes.to_vec();
        damaged[at] ^= 0x10;
        assert!(
            Grant::decode(&damaged).is_err(),
            "a flip in byte {at} is not noticed"
        );
        assert!(
            Grant::decode(&bytes[..at]).is_err(),
            "a cut at {at} is not noticed"
        );
    }
    assert!(matches!(
        Grant::decode(b"{}"),
        Err(GrantError::NotOne(_) | GrantError::Length { .. })
    ));

    // A grant that was changed by somebody who knows the format and can compute the digest: other pages.
    let grant = arrival.grant();
    let forgeries: Vec<Grant> = forgeries(&grant.encode())
        .filter(|forged| forged.pages() != grant.pages() && forged.issuer() == grant.issuer())
        .collect();
    assert!(
        !forgeries.is_empty(),
        "no forgery is a grant: the test is worth nothing"
    );
    for forged in forgeries {
        let result = prefill.push_blocking(&source.pool, forged, LONG);
        let refused = matches!(
            result,
            Err(PushError::Refused {
                code: RefuseCode::DigestMismatch,
                ..
            })
        );
        assert!(refused, "{result:?}");
    }
    assert_untouched(&destination);

    push(&prefill, &source, &arrival, &[1, 2], b"");
    arrival.complete_blocking(LONG).unwrap().unwrap();
}

/// All grants that differ from `bytes` in one bit near the end, where the pages are, and have the right digest.
fn forgeries(bytes: &[u8]) -> impl Iterator<Item = Grant> {
    use blake2::{Blake2s, Digest, digest::consts::U16};
    let body = bytes.len() - 16;
    (body - 8..body)
        .flat_map(|at| (0..8).map(move |bit| (at, bit)))
        .filter_map(move |(at, bit)| {
            let mut forged = bytes.to_vec();
            forged[at] ^= 1 << bit;
            let digest = Blake2s::<U16>::digest(&forged[..body]);
            forged[body..].copy_from_slice(&digest);
            Grant::decode(&forged).ok()
        })
}

pub(crate) fn a_grant_is_used_once(fabric: &Fabric) {
    let (prefill, decode) = fabric.pair();
    let layout = plain(2, 8);
    let source = Cache::filled(&prefill, &layout, 1);
    let destination = Cache::poisoned(&decode, &layout);
    let arrival = destination.pool.grant("x", &[1, 2], LONG).unwrap();
    let refused = |grant: &Grant, code: RefuseCode| {
        let result = prefill.push_blocking(&source.pool, grant.clone(), LONG);
        match result {
            Err(PushError::Refused { code: found, .. }) => assert_eq!(found, code),
            other => panic!("{other:?}"),
        }
    };
    let first = prefill
        .push_blocking(&source.pool, arrival.grant().clone(), LONG)
        .unwrap();
    refused(arrival.grant(), RefuseCode::AlreadyOpened);
    for layer in 0..2 {
        first.layer(layer, &[1, 2]).unwrap();
    }
    first.finish_blocking("", LONG).unwrap().unwrap();
    arrival.complete_blocking(LONG).unwrap().unwrap();
    let before = destination.bytes();
    refused(arrival.grant(), RefuseCode::StaleGeneration);
    // The slot is in use again, by another grant.
    let next = destination.pool.grant("y", &[3, 4], LONG).unwrap();
    refused(arrival.grant(), RefuseCode::StaleGeneration);
    mover::assert_same(&destination.bytes(), &before);
    drop(next);
}

pub(crate) fn memory_too_short_or_unregistered(fabric: &Fabric) {
    let (prefill, decode) = fabric.pair();
    let layout = plain(2, 8);
    let short = Arc::new(HostMemory::new(100).unwrap());
    let result = decode.register_pool(layout.clone(), vec![short.clone(), short]);
    assert!(
        matches!(result, Err(EndpointError::Layout(_))),
        "{result:?}"
    );
    let none = decode.register_pool(layout.clone(), Vec::new());
    assert!(matches!(none, Err(EndpointError::Layout(_))), "{none:?}");
    // A pool of another endpoint is not registered with this one.
    let foreign = Cache::filled(&decode, &layout, 1);
    let destination = Cache::poisoned(&decode, &layout);
    let arrival = destination.pool.grant("x", &[1], LONG).unwrap();
    let result = prefill.push_blocking(&foreign.pool, arrival.grant().clone(), LONG);
    assert!(
        matches!(result, Err(PushError::Input(PushInputError::ForeignPool))),
        "{result:?}"
    );
}

pub(crate) fn another_key_is_refused(fabric: &Fabric) {
    let decode = fabric.endpoint("decode");
    let layout = plain(2, 8);
    let destination = Cache::poisoned(&decode, &layout);
    let arrival = destination.pool.grant("x", &[1], LONG).unwrap();
    for auth in [Auth::psk([8; 32]), Auth::insecure_plaintext()] {
        let stranger = fabric
            .builder("stranger")
            .auth(auth)
            .bind("127.0.0.1:0")
            .unwrap();
        let source = Cache::filled(&stranger, &layout, 1);
        let result = stranger.push_blocking(&source.pool, arrival.grant().clone(), LONG);
        let refused = matches!(&result, Err(PushError::Peer(error @ PeerError::Control { .. })) if !error.is_retryable());
        assert!(refused, "{result:?}");
    }
    assert_untouched(&destination);
    let unauthenticated = kvpush::Endpoint::builder().bind("127.0.0.1:0");
    assert!(matches!(unauthenticated, Err(EndpointError::NoAuth)));
}

pub(crate) fn nobody_there(fabric: &Fabric) {
    let (prefill, decode) = (fabric.endpoint("prefill"), fabric.alone("decode"));
    let layout = plain(2, 8);
    let source = Cache::filled(&prefill, &layout, 1);
    let destination = Cache::poisoned(&decode, &layout);
    let arrival = destination.pool.grant("x", &[1], LONG).unwrap();
    let grant = arrival.grant().clone();
    let address = grant.addresses()[0].clone();
    decode.shutdown();
    let result = prefill.push_blocking(&source.pool, grant, LONG);
    match result {
        Err(PushError::Peer(error @ PeerError::Control { .. })) => {
            assert!(error.is_retryable());
            assert!(
                error.to_string().contains(&address),
                "names who is not there: {error}"
            );
        }
        other => panic!("{other:?}"),
    }
}
