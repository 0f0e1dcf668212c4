//! The properties that fuzzers check, for cargo-fuzz (`fuzz/`) and for the short run of every `cargo test`. Each
//! function panics if the property does not hold for its input.

// Public only for the fuzz targets.
#![cfg_attr(not(fuzzing), allow(unreachable_pub))]

use super::auth::Auth;
use super::channel::Channel;
use super::codec::{Reader, Writer};
use super::grant::Grant;
use super::ids::Digest;
use super::imm::Imm;
use super::message::Message;
use super::pool::PoolDescriptor;
use super::token::RegionToken;

/// Grants and region tokens: what is accepted encodes to the same bytes, with and without a digest that fits.
pub fn grant(bytes: &[u8]) {
    check_grant(bytes);
    // A fuzzer does not find digests; a malicious issuer makes them.
    if let Some((body, _)) = bytes.split_last_chunk::<16>() {
        let mut sealed = body.to_vec();
        sealed.extend_from_slice(Digest::of(body).as_bytes());
        check_grant(&sealed);
    }
}

fn check_grant(bytes: &[u8]) {
    if let Ok(grant) = Grant::decode(bytes) {
        let again = Grant::new(grant.fields().clone()).expect("accepted, so within the limits");
        assert_eq!(again.encode(), bytes, "two encodings of one grant");
        assert!(grant.pages().len() <= Grant::MAX_PAGES);
    }
    if let Ok(token) = RegionToken::decode(bytes) {
        let again = RegionToken::new(token.fields().clone()).expect("accepted");
        assert_eq!(again.encode(), bytes, "two encodings of one token");
    }
}

/// Messages: what is accepted survives another round.
pub fn message(bytes: &[u8]) {
    if let Ok(message) = Message::decode(bytes) {
        let again = message.encode().expect("accepted, so within the limits");
        assert_eq!(Message::decode(&again), Ok(message));
    }
}

/// Descriptions of pools: what is accepted survives another round, and looking at its layout does not panic, however
/// absurd it is.
pub fn pool(bytes: &[u8]) {
    let mut reader = Reader::new("pool", bytes);
    let Ok(pool) = PoolDescriptor::read(&mut reader) else {
        return;
    };
    let lengths: Vec<u64> = pool.regions.iter().map(|region| region.length).collect();
    // Either answer is one.
    let _ = pool.layout.validate(&lengths);
    let mut writer = Writer::new("pool");
    pool.write(&mut writer)
        .expect("accepted, so within the limits");
    let bytes = writer.finish();
    let again = PoolDescriptor::read(&mut Reader::new("pool", &bytes));
    assert_eq!(again.as_ref(), Ok(&pool));
}

/// Immediates: every value is a slot and a part, and only one value is these.
pub fn immediate(bytes: &[u8]) {
    for bytes in bytes.as_chunks::<4>().0 {
        let value = u32::from_le_bytes(*bytes);
        let imm = Imm::from_wire(value);
        let again = Imm::new(imm.slot(), imm.part()).expect("within the limits");
        assert_eq!(again.to_wire(), value);
    }
}

/// Channels: the first byte chooses the case, the second the size of the pieces, the rest is what an attacker does.
///
/// * 0: the rest is what a peer says to a responder that wants a key;
/// * 1: the same to an initiator;
/// * 2: the same to one in plaintext;
/// * 3: the rest changes a valid encrypted stream, three bytes for each change (position, difference). What arrives
///   must be the beginning of what was sent, and all of it if nothing was changed.
pub fn channel(bytes: &[u8]) {
    let Some((&[case, pieces], rest)) = bytes.split_first_chunk() else {
        return;
    };
    let auth = match case % 4 {
        2 => Auth::insecure_plaintext(),
        _ => Auth::psk([9; 32]),
    };
    let pieces = usize::from(pieces) + 1;
    match case % 4 {
        0 => listen(
            Channel::responder(&auth).expect("random numbers"),
            rest,
            pieces,
            false,
        ),
        1 => listen(
            Channel::initiator(&auth).expect("random numbers"),
            rest,
            pieces,
            false,
        ),
        2 => listen(
            Channel::responder(&auth).expect("random numbers"),
            rest,
            pieces,
            true,
        ),
        _ => tamper(&auth, rest, pieces),
    }
}

fn listen(mut channel: Channel, bytes: &[u8], pieces: usize, may_establish: bool) {
    let mut messages = Vec::new();
    for piece in bytes.chunks(pieces) {
        let failed = channel.read(piece, &mut messages).is_err();
        assert!(
            !failed || channel.read(b"more", &mut messages).is_err(),
            "errors are final"
        );
        channel.take_output();
    }
    assert!(may_establish || (!channel.is_established() && messages.is_empty()));
    let received: usize = messages.iter().map(Vec::len).sum();
    assert!(received <= bytes.len());
}

fn tamper(auth: &Auth, changes: &[u8], pieces: usize) {
    let mut a = Channel::initiator(auth).expect("random numbers");
    let mut b = Channel::responder(auth).expect("random numbers");
    let mut none = Vec::new();
    while !b.is_established() {
        b.read(&a.take_output(), &mut none).expect("an honest peer");
        a.read(&b.take_output(), &mut none).expect("an honest peer");
    }
    let sent: Vec<Vec<u8>> = (0..8u8).map(|i| vec![i; 40 * usize::from(i)]).collect();
    let mut stream = Vec::new();
    for message in &sent {
        a.write(message, &mut stream).expect("small");
    }
    let honest = stream.clone();
    for change in changes.as_chunks::<3>().0 {
        let [low, high, difference] = *change;
        let at = usize::from(u16::from_le_bytes([low, high])) % stream.len();
        if let Some(byte) = stream.get_mut(at) {
            *byte ^= difference;
        }
    }
    let mut received = Vec::new();
    for piece in stream.chunks(pieces) {
        if b.read(piece, &mut received).is_err() {
            break;
        }
    }
    assert!(
        sent.starts_with(&received),
        "a changed message was accepted"
    );
    assert!(
        stream != honest || received == sent,
        "an unchanged message was lost"
    );
}
