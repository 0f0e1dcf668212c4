//! How transfers end when not all goes well: each once, with the truth about who may still touch the blocks, and with
//! the other side released.

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    time::Duration,
};

use kvpush::{Auth, Endpoint, fabric::FabricKind};
use kvpush_engine::transfer::{Outcome, TransferError, Transfers};

use super::fixture::{Cache, LAYERS, Lay, PATIENCE, Prompt, Side};

/// Longer than the tests have patience: what ends within it has not ended by its deadline.
const HOUR: Duration = Duration::from_secs(3600);

fn sides() -> (Side, Side) {
    (
        Side::new("prefill", FabricKind::Tcp, 2, Lay::Flash),
        Side::new("decode", FabricKind::Tcp, 3, Lay::Flash),
    )
}

fn not_arrived(side: &mut Side) -> TransferError {
    match side.outcome() {
        Outcome::NotArrived {
            request: 1,
            error,
            is_fenced: true,
        } => error,
        other => panic!("{other:?}"),
    }
}

fn not_pushed(side: &mut Side) -> TransferError {
    match side.outcome() {
        Outcome::NotPushed {
            request: 9,
            error,
            is_fenced: true,
        } => error,
        other => panic!("{other:?}"),
    }
}

/// The same blocks can be granted and pushed again, whatever happened before.
fn again(prefill: &mut Side, decode: &mut Side) {
    let prompt = Prompt::new(77, 9, 0);
    let ticket = decode.reserve(2, &prompt, 2, PATIENCE).unwrap();
    prefill.open(8, &prompt, &ticket).unwrap();
    prefill.hand_over(8, &prompt, 9);
    prefill.transfers.finish(8, b"").unwrap();
    assert!(matches!(
        prefill.outcome(),
        Outcome::Pushed { request: 8, .. }
    ));
    assert!(matches!(
        decode.outcome(),
        Outcome::Arrived { request: 2, .. }
    ));
    assert_eq!((prefill.transfers.live(), decode.transfers.live()), (0, 0));
}

#[test]
fn given_up_by_decode() {
    let (mut prefill, mut decode) = sides();
    let prompt = Prompt::new(77, 9, 0);
    let ticket = decode.reserve(1, &prompt, 2, HOUR).unwrap();
    prefill.open(9, &prompt, &ticket).unwrap();
    prefill.hand_over(9, &prompt, 9);
    while decode.transfers.arrived_layers(1) != Some(LAYERS as u32) {
        prefill.go_on();
        decode.go_on();
    }
    decode.transfers.cancel(1);
    assert_eq!(not_arrived(&mut decode).message, "given up by this engine");
    let error = not_pushed(&mut prefill);
    assert!(error.message.contains("taken back"), "{error}");
    again(&mut prefill, &mut decode);
}

#[test]
fn given_up_by_prefill() {
    let (mut prefill, mut decode) = sides();
    let prompt = Prompt::new(77, 9, 0);
    let ticket = decode.reserve(1, &prompt, 2, HOUR).unwrap();
    prefill.open(9, &prompt, &ticket).unwrap();
    prefill
        .transfers
        .layer(9, 0, 0..4, &prompt.source[..4])
        .unwrap();
    until_open(&mut prefill, &decode);
    prefill.transfers.cancel(9);
    assert_eq!(not_pushed(&mut prefill).message, "given up by this engine");
    let error = not_arrived(&mut decode);
    assert!(error.message.contains("gave up"), "{error}");
    again(&mut prefill, &mut decode);
}

/// Until some part has arrived.
fn until_open(prefill: &mut Side, decode: &Side) {
    prefill.until("a part arrives", |_| {
        let peers = decode.endpoint.stats().peers;
        let mut rails = peers.iter().flat_map(|peer| &peer.rails);
        rails.any(|rail| rail.parts > 0)
    });
}

/// Cancelled before there is a session: the reader hears of it all the same.
#[test]
fn given_up_before_it_is_open() {
    let (mut prefill, mut decode) = sides();
    let prompt = Prompt::new(77, 9, 0);
    let ticket = decode.reserve(1, &prompt, 2, HOUR).unwrap();
    prefill.open(9, &prompt, &ticket).unwrap();
    prefill.transfers.cancel(9);
    assert_eq!(not_pushed(&mut prefill).message, "given up by this engine");
    prefill.until("the ticket is given back", |side| {
        side.transfers.live() == 0
    });
    let error = not_arrived(&mut decode);
    assert!(error.message.contains("gave up"), "{error}");
    again(&mut prefill, &mut decode);
}

/// Every way to refuse a ticket tells its issuer.
#[test]
fn refused_tickets_are_given_back() {
    let (mut prefill, mut decode) = sides();
    let prompt = Prompt::new(77, 9, 0);
    type Refuse = fn(&mut Side, &Prompt, &kvpush_engine::transfer::Ticket);
    let refusals: [Refuse; 4] = [
        |prefill, prompt, ticket| {
            let mut other = prompt.clone();
            other.digest[0] ^= 1;
            let error = prefill.open(9, &other, ticket).unwrap_err();
            assert!(error.message.contains("the prompt is"), "{error}");
        },
        |prefill, prompt, ticket| {
            let mut other = prompt.clone();
            other.tokens -= 1;
            let error = prefill.open(9, &other, ticket).unwrap_err();
            assert!(error.message.contains("tokens is 35"), "{error}");
        },
        |prefill, _, ticket| prefill.transfers.reject(ticket),
        |prefill, _, ticket| {
            prefill.transfers.reject(ticket);
            prefill.transfers.reject(ticket);
        },
    ];
    for refuse in refusals {
        let ticket = decode.reserve(1, &prompt, 2, HOUR).unwrap();
        refuse(&mut prefill, &prompt, &ticket);
        prefill.until("the ticket is given back", |side| {
            side.transfers.live() == 0
        });
        let error = not_arrived(&mut decode);
        assert!(error.message.contains("gave up"), "{error}");
    }
    let ticket = decode.reserve(1, &prompt, 3, HOUR).unwrap();
    let error = prefill.open(9, &prompt, &ticket).unwrap_err();
    assert!(error.message.contains("prefill ranks is 3"), "{error}");
    prefill.until("the ticket is given back", |side| {
        side.transfers.live() == 0
    });
    not_arrived(&mut decode);
    again(&mut prefill, &mut decode);
}

/// Another model's engine may have a cache of the same shape, or of another; it never pushes.
#[test]
fn another_model() {
    let (_, mut decode) = sides();
    let cache = Cache::new(2, Lay::Flash).with_digest([8; 32]);
    let mut prefill = Side::with(super::fixture::endpoint("prefill", FabricKind::Tcp), cache);
    let prompt = Prompt::new(77, 9, 0);
    let ticket = decode.reserve(1, &prompt, 2, HOUR).unwrap();
    let error = prefill.open(9, &prompt, &ticket).unwrap_err();
    assert!(error.message.contains("the model is"), "{error}");
    assert!(!error.is_retryable);
    prefill.until("the ticket is given back", |side| {
        side.transfers.live() == 0
    });
    not_arrived(&mut decode);
}

#[test]
fn nobody_comes() {
    let (_, mut decode) = sides();
    let prompt = Prompt::new(77, 9, 0);
    decode
        .reserve(1, &prompt, 2, Duration::from_millis(30))
        .unwrap();
    let error = not_arrived(&mut decode);
    assert!(error.message.contains("deadline"), "{error}");
    assert!(error.is_retryable);
    assert_eq!(decode.transfers.live(), 0);
}

/// Each side has a deadline of its own, and the shorter ends both.
#[test]
fn too_slow() {
    let (mut prefill, mut decode) = sides();
    let prompt = Prompt::new(77, 9, 0);
    for (reader, writer) in [
        (HOUR, Duration::from_millis(200)),
        (Duration::from_millis(200), HOUR),
    ] {
        let ticket = decode.reserve(1, &prompt, 2, reader).unwrap();
        let opened = prefill
            .transfers
            .open(9, &ticket, prompt.tokens, prompt.digest, writer);
        opened.unwrap();
        prefill
            .transfers
            .layer(9, 0, 0..4, &prompt.source[..4])
            .unwrap();
        not_pushed(&mut prefill);
        not_arrived(&mut decode);
    }
    again(&mut prefill, &mut decode);
}

#[test]
fn the_decode_engine_goes() {
    let (mut prefill, mut decode) = sides();
    let prompt = Prompt::new(77, 9, 0);
    let ticket = decode.reserve(1, &prompt, 2, HOUR).unwrap();
    prefill.open(9, &prompt, &ticket).unwrap();
    prefill
        .transfers
        .layer(9, 0, 0..4, &prompt.source[..4])
        .unwrap();
    until_open(&mut prefill, &decode);
    decode.endpoint.shutdown();
    not_arrived(&mut decode);
    assert!(not_pushed(&mut prefill).is_retryable);
}

#[test]
fn the_prefill_engine_goes() {
    let (mut prefill, mut decode) = sides();
    let prompt = Prompt::new(77, 9, 0);
    let ticket = decode.reserve(1, &prompt, 2, HOUR).unwrap();
    prefill.open(9, &prompt, &ticket).unwrap();
    prefill
        .transfers
        .layer(9, 0, 0..4, &prompt.source[..4])
        .unwrap();
    until_open(&mut prefill, &decode);
    prefill.endpoint.shutdown();
    not_pushed(&mut prefill);
    not_arrived(&mut decode);
}

/// A reader that cannot be reached at first: the pushes are begun again, with the same grants.
#[test]
fn begun_again_until_the_reader_is_there() {
    // Nobody listens there until the door is opened.
    let door = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = door.local_addr().unwrap();
    drop(door);
    let endpoint = Endpoint::builder()
        .name("decode")
        .auth(Auth::psk([3; 32]))
        .fabrics([FabricKind::Tcp])
        .advertise([address.to_string()])
        .bind("127.0.0.1:0")
        .unwrap();
    let inside = endpoint.local_address();
    let mut decode = Side::with(endpoint, Cache::new(3, Lay::Flash));
    let mut prefill = Side::new("prefill", FabricKind::Tcp, 2, Lay::Flash);
    let prompt = Prompt::new(77, 9, 0);
    let ticket = decode.reserve(1, &prompt, 2, PATIENCE).unwrap();
    prefill.open(9, &prompt, &ticket).unwrap();
    prefill.hand_over(9, &prompt, 9);
    prefill.transfers.finish(9, b"tail").unwrap();
    prefill.until("every push has failed at least once", |side| {
        let peers = side.endpoint.stats().peers;
        peers.iter().map(|peer| peer.pushes.failed).sum::<u64>() >= 4
    });
    let door = TcpListener::bind(address).unwrap();
    std::thread::spawn(move || forward(&door, inside));
    assert!(matches!(prefill.outcome(), Outcome::Pushed { .. }));
    assert!(matches!(decode.outcome(), Outcome::Arrived { .. }));
    for (position, &block) in prompt.destination.iter().enumerate() {
        decode.cache.check(block, prompt.seed, position);
    }
}

/// Carries the control connection from the door to the endpoint.
fn forward(door: &TcpListener, inside: std::net::SocketAddr) {
    for outer in door.incoming() {
        let (Ok(outer), Ok(inner)) = (outer, TcpStream::connect(inside)) else {
            return;
        };
        for (mut from, mut to) in [
            (outer.try_clone().unwrap(), inner.try_clone().unwrap()),
            (inner, outer),
        ] {
            std::thread::spawn(move || {
                let mut buffer = [0; 4096];
                while let Ok(count @ 1..) = from.read(&mut buffer) {
                    if to.write_all(&buffer[..count]).is_err() {
                        return;
                    }
                }
            });
        }
    }
}

/// A deadline ends the attempts.
#[test]
fn nobody_is_ever_there() {
    let (mut prefill, mut decode) = sides();
    let prompt = Prompt::new(77, 9, 0);
    let ticket = decode.reserve(1, &prompt, 2, HOUR).unwrap();
    decode.endpoint.shutdown();
    let half = Duration::from_millis(500);
    let opened = prefill
        .transfers
        .open(9, &ticket, prompt.tokens, prompt.digest, half);
    opened.unwrap();
    not_pushed(&mut prefill);
    not_arrived(&mut decode);
}

/// Wrong calls are refused and change nothing.
#[test]
fn wrong_calls() {
    let (mut prefill, mut decode) = sides();
    let prompt = Prompt::new(77, 9, 2);
    let ticket = decode.reserve(1, &prompt, 2, PATIENCE).unwrap();
    let error = decode.reserve(1, &prompt, 2, PATIENCE).unwrap_err();
    assert!(error.message.contains("has a transfer already"), "{error}");
    let mut all_held = prompt.clone();
    all_held.held = 9;
    assert!(decode.reserve(5, &all_held, 2, PATIENCE).is_err());
    assert!(decode.reserve(5, &prompt, 0, PATIENCE).is_err());
    assert!(decode.reserve(5, &prompt, 5, PATIENCE).is_err());
    let error = decode.reserve(5, &prompt, 2, PATIENCE).unwrap_err();
    assert!(error.message.contains("belongs to a live grant"), "{error}");
    assert!(error.is_retryable);

    let source = &prompt.source;
    assert!(
        prefill.transfers.layer(9, 0, 0..1, &source[..1]).is_err(),
        "not open"
    );
    prefill.open(9, &prompt, &ticket).unwrap();
    let mut layer = |layer, positions: std::ops::Range<usize>, blocks: &[u32]| {
        prefill
            .transfers
            .layer(9, layer, positions, blocks)
            .map_err(|error| error.message)
    };
    let wrong = |result: Result<(), String>, what: &str| {
        let message = result.unwrap_err();
        assert!(message.contains(what), "{message}");
    };
    wrong(layer(LAYERS, 0..3, &source[..3]), "fewer layers");
    wrong(layer(0, 0..3, &source[..2]), "one block for each");
    wrong(layer(0, 3..5, &source[3..5]), "do not follow");
    wrong(layer(0, 0..10, &[0; 10]), "the prompt has fewer");
    // What is held may be given or not.
    layer(0, 0..3, &source[..3]).unwrap();
    layer(1, 2..3, &source[2..3]).unwrap();
    wrong(layer(0, 2..3, &source[2..3]), "do not follow");
    wrong(layer(2, 2..3, &[39]), "others than those");
    wrong(
        prefill
            .transfers
            .finish(9, b"")
            .map_err(|error| error.message),
        "layer 0 lacks 6 blocks",
    );
    for layer in 0..LAYERS {
        let first = if layer < 2 { 3 } else { 2 };
        prefill
            .transfers
            .layer(9, layer, first..9, &source[first..])
            .unwrap();
    }
    wrong(
        prefill
            .transfers
            .finish(9, &[0; 5000])
            .map_err(|error| error.message),
        "has room for",
    );
    prefill.transfers.finish(9, b"tail").unwrap();
    assert!(matches!(prefill.outcome(), Outcome::Pushed { .. }));
    assert!(matches!(decode.outcome(), Outcome::Arrived { .. }));
}
