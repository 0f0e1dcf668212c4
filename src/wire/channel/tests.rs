//! Two channels back to back: what goes in comes out, whatever the pieces; everything else is a typed error.

use proptest::prelude::*;

use super::*;

fn key(byte: u8) -> Auth {
    Auth::psk([byte; 32])
}

type Outcome = Result<(), ChannelError>;

/// Carries everything both ways until nothing moves; the result of each side.
fn exchange(
    a: &mut Channel,
    b: &mut Channel,
    messages: &mut (Vec<Vec<u8>>, Vec<Vec<u8>>),
) -> (Outcome, Outcome) {
    let (mut result_a, mut result_b) = (Ok(()), Ok(()));
    loop {
        let (from_a, from_b) = (a.take_output(), b.take_output());
        if from_a.is_empty() && from_b.is_empty() {
            return (result_a, result_b);
        }
        result_b = result_b.and_then(|()| b.read(&from_a, &mut messages.1));
        result_a = result_a.and_then(|()| a.read(&from_b, &mut messages.0));
    }
}

fn outcome(a: &Auth, b: &Auth) -> (Outcome, Outcome) {
    let mut a = Channel::initiator(a).unwrap();
    let mut b = Channel::responder(b).unwrap();
    let result = exchange(&mut a, &mut b, &mut Default::default());
    assert_eq!(a.is_established(), result.0.is_ok());
    assert_eq!(b.is_established(), result.1.is_ok());
    result
}

fn pair(auth: &Auth) -> (Channel, Channel) {
    let mut a = Channel::initiator(auth).unwrap();
    let mut b = Channel::responder(auth).unwrap();
    let result = exchange(&mut a, &mut b, &mut Default::default());
    assert_eq!(result, (Ok(()), Ok(())));
    assert!(a.is_established() && b.is_established());
    (a, b)
}

#[test]
fn same_secret_connects_and_another_does_not() {
    let ok = (Ok(()), Ok(()));
    assert_eq!(outcome(&key(1), &key(1)), ok);
    assert_eq!(outcome(&Auth::passphrase("x"), &Auth::passphrase("x")), ok);
    let plain = Auth::insecure_plaintext;
    assert_eq!(outcome(&plain(), &plain()), ok);
    let failed = |told_by_peer| Err(ChannelError::Authentication { told_by_peer });
    assert_eq!(outcome(&key(1), &key(2)), (failed(true), failed(false)));
    let result = outcome(&Auth::passphrase("x"), &Auth::passphrase("y"));
    assert_eq!(result, (failed(true), failed(false)));
}

#[test]
fn a_plaintext_peer_is_told_apart_from_a_wrong_key() {
    let mismatch = |theirs, ours| Err(ChannelError::AuthModeMismatch { theirs, ours });
    let plain = Auth::insecure_plaintext();
    assert_eq!(outcome(&plain, &key(1)), (mismatch(1, 0), mismatch(0, 1)));
    assert_eq!(outcome(&key(1), &plain), (mismatch(0, 1), mismatch(1, 0)));
}

#[test]
fn foreign_protocols_and_versions_are_typed() {
    for auth in [key(1), Auth::insecure_plaintext()] {
        let read = |bytes: &[u8]| {
            let mut channel = Channel::responder(&auth).unwrap();
            let first = channel.read(bytes, &mut Vec::new());
            // Failed for good.
            assert_eq!(channel.read(b"more", &mut Vec::new()), first);
            assert_eq!(channel.write(b"more", &mut Vec::new()), first);
            first
        };
        assert_eq!(
            read(b"GET / HTTP/1.1\r\n"),
            Err(ChannelError::NotKvpush {
                received: *b"GET / "
            })
        );
        assert_eq!(
            read(b"KVPUSH\x09\x00\x01"),
            Err(ChannelError::Version {
                theirs: 9,
                ours: PROTOCOL_VERSION
            })
        );
        assert!(matches!(
            read(b"KVPUSH\x01\x00\x07"),
            Err(ChannelError::AuthModeMismatch { theirs: 7, .. })
        ));
    }
}

#[test]
fn a_changed_preamble_breaks_the_handshake() {
    let mut a = Channel::initiator(&key(1)).unwrap();
    let mut b = Channel::responder(&key(1)).unwrap();
    let other = build(&[1; 32], b"another prologue", false).unwrap();
    b.state = State::Preamble(Some(Box::new(other)));
    let error = b.read(&a.take_output(), &mut Vec::new());
    assert_eq!(
        error,
        Err(ChannelError::Authentication {
            told_by_peer: false
        })
    );
}

#[test]
fn a_replayed_initiator_is_never_trusted() {
    let mut a = Channel::initiator(&key(1)).unwrap();
    let mut b = Channel::responder(&key(1)).unwrap();
    let first = a.take_output();
    b.read(&first, &mut Vec::new()).unwrap();
    a.read(&b.take_output(), &mut Vec::new()).unwrap();
    let second = a.take_output();
    // The same bytes again, to another connection of the same endpoint.
    let mut again = Channel::responder(&key(1)).unwrap();
    again.read(&first, &mut Vec::new()).unwrap();
    assert!(
        !again.is_established(),
        "the first message alone proves nothing"
    );
    let error = again.read(&second, &mut Vec::new());
    assert_eq!(
        error,
        Err(ChannelError::Authentication {
            told_by_peer: false
        })
    );
    assert_eq!(b.read(&second, &mut Vec::new()), Ok(()));
    assert!(b.is_established());
}

#[test]
fn every_change_of_an_established_stream_is_found() {
    let (mut a, _) = pair(&key(1));
    let mut bytes = Vec::new();
    a.write(b"a message", &mut bytes).unwrap();
    for at in 0..bytes.len() {
        // Each attempt needs a fresh pair: failure is final.
        let (mut a, mut b) = pair(&key(1));
        let mut bytes = Vec::new();
        a.write(b"a message", &mut bytes).unwrap();
        bytes[at] ^= 1;
        bytes.extend_from_slice(&[0; 1024]);
        let mut messages = Vec::new();
        let result = b.read(&bytes, &mut messages);
        assert!(messages.is_empty(), "changed at {at}");
        // A length that grew waits for more; all others are errors.
        assert!(
            result == Err(ChannelError::Decrypt) || at < 2,
            "at {at}: {result:?}"
        );
    }
    // Records repeated or left out.
    let (mut a, mut b) = pair(&key(1));
    let mut bytes = Vec::new();
    a.write(b"one", &mut bytes).unwrap();
    b.read(&bytes, &mut Vec::new()).unwrap();
    assert_eq!(b.read(&bytes, &mut Vec::new()), Err(ChannelError::Decrypt));
}

#[test]
fn messages_wait_for_the_handshake_in_order_and_in_bounds() {
    for auth in [key(1), Auth::insecure_plaintext()] {
        let mut a = Channel::initiator(&auth).unwrap();
        let mut b = Channel::responder(&auth).unwrap();
        let mut out = Vec::new();
        for i in 0..100u8 {
            a.write(&vec![i; 1000 * usize::from(i)], &mut out).unwrap();
            b.write(&[i], &mut out).unwrap();
        }
        assert!(out.is_empty());
        let mut messages = Default::default();
        assert_eq!(exchange(&mut a, &mut b, &mut messages), (Ok(()), Ok(())));
        let (to_a, to_b) = messages;
        assert!((0..100).eq(to_a.iter().map(|m| m[0])));
        assert!(
            to_b.iter()
                .zip(0u8..)
                .all(|(m, i)| *m == vec![i; 1000 * usize::from(i)])
        );
        assert_eq!(to_b.len(), 100);
    }
    let mut a = Channel::initiator(&key(1)).unwrap();
    a.write(&vec![0; MAX_MESSAGE], &mut Vec::new()).unwrap();
    let error = a.write(&vec![0; MAX_MESSAGE], &mut Vec::new());
    assert_eq!(error, Err(ChannelError::HeldTooMuch { limit: MAX_HELD }));
}

#[test]
fn sizes_are_bounded() {
    for auth in [key(1), Auth::insecure_plaintext()] {
        let (mut a, mut b) = pair(&auth);
        let mut messages = Vec::new();
        for size in [
            0,
            1,
            MAX_RECORD - TAG - 4,
            MAX_RECORD - TAG - 3,
            MAX_MESSAGE,
        ] {
            let mut bytes = Vec::new();
            a.write(&vec![7; size], &mut bytes).unwrap();
            b.read(&bytes, &mut messages).unwrap();
            assert_eq!(messages.pop().map(|m| m.len()), Some(size));
        }
        let oversize = Err(ChannelError::Oversize {
            length: 1 + MAX_MESSAGE as u64,
        });
        assert_eq!(
            a.write(&vec![7; MAX_MESSAGE + 1], &mut Vec::new()),
            oversize
        );
    }
    // A peer that claims more.
    let (_, mut b) = pair(&Auth::insecure_plaintext());
    let claim = (1 + MAX_MESSAGE as u32).to_le_bytes();
    assert!(matches!(
        b.read(&claim, &mut Vec::new()),
        Err(ChannelError::Oversize { .. })
    ));
    // One that claims the most but sends little holds little.
    let (_, mut b) = pair(&Auth::insecure_plaintext());
    b.read(&(MAX_MESSAGE as u32).to_le_bytes(), &mut Vec::new())
        .unwrap();
    let held = b.frames.capacity();
    assert!(held <= 128 << 10, "{held} bytes reserved for a claim");
}

#[test]
fn an_unauthenticated_peer_holds_next_to_nothing() {
    let mut prefix = Channel::initiator(&key(1)).unwrap().take_output();
    prefix.truncate(PREAMBLE);
    for flood in [
        vec![0xff; 1 << 20],
        vec![48; 1 << 20],
        [prefix, vec![255; 1 << 20]].concat(),
    ] {
        let mut b = Channel::responder(&key(1)).unwrap();
        for byte in flood.chunks(1000) {
            let _ = b.read(byte, &mut Vec::new());
            let held = b.unit.capacity() + b.frames.capacity() + b.output.capacity();
            assert!(held < 512, "holds {held} bytes");
        }
    }
}

#[test]
fn debug_never_prints_keys() {
    let auth = Auth::psk([0xab; 32]);
    let (a, _) = pair(&auth);
    let printed = format!("{auth:?} {a:?} {:?}", Auth::passphrase("secret"));
    assert!(!printed.contains("ab, ab") && !printed.contains("171") && !printed.contains("secret"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_pieces_give_the_same_messages(
        sizes in proptest::collection::vec(prop_oneof![0usize..300, 65_000usize..140_000], 1..8),
        pieces in proptest::collection::vec(1usize..70_000, 1..20),
        plain in any::<bool>(),
        early in any::<bool>(),
    ) {
        let auth = if plain { Auth::insecure_plaintext() } else { key(3) };
        let mut a = Channel::initiator(&auth).unwrap();
        let mut b = Channel::responder(&auth).unwrap();
        let sent: Vec<Vec<u8>> = (0u8..).zip(&sizes).map(|(i, size)| vec![i; *size]).collect();
        let mut stream = Vec::new();
        if !early {
            prop_assert_eq!(exchange(&mut a, &mut b, &mut Default::default()), (Ok(()), Ok(())));
        }
        for message in &sent {
            a.write(message, &mut stream).unwrap();
        }
        if early {
            // The handshake in single bytes.
            while !a.is_established() {
                for byte in a.take_output() {
                    b.read(&[byte], &mut Vec::new()).unwrap();
                }
                for byte in b.take_output() {
                    a.read(&[byte], &mut Vec::new()).unwrap();
                }
            }
            stream = a.take_output();
        }
        let mut got = Vec::new();
        let mut rest = stream.as_slice();
        for size in pieces.iter().cycle() {
            let (now, later) = rest.split_at((*size).min(rest.len()));
            b.read(now, &mut got).unwrap();
            rest = later;
            if rest.is_empty() {
                break;
            }
        }
        prop_assert_eq!(got, sent);
    }

    #[test]
    fn random_bytes_never_panic(
        valid in 0usize..200,
        bytes in proptest::collection::vec(any::<u8>(), 0..300),
        plain in any::<bool>(),
    ) {
        let auth = if plain { Auth::insecure_plaintext() } else { key(3) };
        let mut a = Channel::initiator(&auth).unwrap();
        let mut b = Channel::responder(&auth).unwrap();
        let mut first = a.take_output();
        first.truncate(valid);
        first.extend_from_slice(&bytes);
        let _ = b.read(&first, &mut Vec::new());
        let mut reply = b.take_output();
        reply.truncate(valid);
        reply.extend_from_slice(&bytes);
        let _ = a.read(&reply, &mut Vec::new());
        prop_assert!(plain || !b.is_established());
    }
}
