//! Tickets from strangers: typed errors, no panic, no push.

use kvpush::{fabric::FabricKind, kv::HeadRange};
use kvpush_engine::transfer::{
    Ticket, Transfers,
    ticket::{MAX_TICKET, TicketError, TicketFields},
};
use sha2::{Digest, Sha256};

use super::fixture::{Lay, PATIENCE, Prompt, Side};

fn issued() -> (Side, Ticket) {
    let mut decode = Side::new("decode", FabricKind::Tcp, 3, Lay::Flash);
    let ticket = decode
        .reserve(1, &Prompt::new(7, 9, 2), 2, PATIENCE)
        .unwrap();
    (decode, ticket)
}

#[test]
fn it_says_what_was_said() {
    let (_decode, ticket) = issued();
    let fields = TicketFields::decode(&ticket.0).unwrap();
    assert_eq!((fields.tokens, fields.blocks, fields.held), (35, 9, 2));
    assert_eq!((fields.prefill_tp, fields.decode_tp), (2, 3));
    assert_eq!((fields.prompt, fields.id.as_str()), ([7; 32], "request"));
    assert_eq!(fields.valid_for, PATIENCE);
    assert_eq!(fields.grants.len(), 4);
    assert_eq!(fields.encode().unwrap(), ticket);
}

#[test]
fn every_flip_and_every_cut_is_refused() {
    let (_decode, ticket) = issued();
    for index in 0..ticket.0.len() {
        let mut bytes = ticket.0.clone();
        bytes[index] ^= 1 << (index % 8);
        assert!(TicketFields::decode(&bytes).is_err(), "byte {index}");
        assert!(
            TicketFields::decode(&ticket.0[..index]).is_err(),
            "cut at {index}"
        );
    }
    let mut longer = ticket.0.clone();
    longer.push(0);
    assert!(TicketFields::decode(&longer).is_err());
    let huge = vec![b'K'; MAX_TICKET + 1];
    assert!(matches!(
        TicketFields::decode(&huge),
        Err(TicketError::TooLong(_))
    ));
    assert!(matches!(
        TicketFields::decode(b""),
        Err(TicketError::Length(_))
    ));
    assert!(matches!(
        TicketFields::decode(&[0; 64]),
        Err(TicketError::Magic)
    ));
}

/// One who knows the format can seal what he likes: nothing of it may be taken on trust.
#[test]
fn sealed_nonsense() {
    let (_decode, ticket) = issued();
    let body = ticket.0.len() - 32;
    let mut refused = 0;
    for index in 6..body {
        for value in [0, 1, 0x7f, 0xff] {
            let mut bytes = ticket.0[..body].to_vec();
            if bytes[index] == value {
                continue;
            }
            bytes[index] = value;
            let digest = Sha256::digest(&bytes);
            bytes.extend_from_slice(&digest);
            refused += usize::from(TicketFields::decode(&bytes).is_err());
        }
    }
    assert!(refused > 500, "{refused}");
    let version = {
        let mut bytes = ticket.0[..body].to_vec();
        bytes[4] = 2;
        let digest = Sha256::digest(&bytes);
        bytes.extend_from_slice(&digest);
        bytes
    };
    assert!(matches!(
        TicketFields::decode(&version),
        Err(TicketError::Version(2))
    ));
}

#[test]
fn contradictions() {
    let (_decode, ticket) = issued();
    let fields = TicketFields::decode(&ticket.0).unwrap();
    type Change = fn(&mut TicketFields);
    let changes: [Change; 11] = [
        |fields| fields.prefill_tp = 0,
        |fields| fields.prefill_tp = 1,
        |fields| fields.decode_tp = 257,
        |fields| fields.identity.block_tokens = 0,
        |fields| fields.identity.kv_heads = 7,
        |fields| fields.tokens = 0,
        |fields| fields.tokens = 37,
        |fields| fields.held = 9,
        |fields| fields.held = 1,
        |fields| fields.grants.swap(0, 1),
        |fields| fields.grants[0].pair.heads = HeadRange::new(0, 3),
    ];
    for (index, change) in changes.iter().enumerate() {
        let mut fields = fields.clone();
        change(&mut fields);
        assert!(fields.encode().is_err(), "change {index}");
    }
    let (_other, foreign) = issued();
    let foreign = TicketFields::decode(&foreign.0).unwrap();
    let mut mixed = fields;
    mixed.grants[2].grant = foreign.grants[2].grant.clone();
    assert!(matches!(mixed.encode(), Err(TicketError::Value { .. })));
}

#[test]
fn nonsense_opens_nothing() {
    let mut prefill = Side::new("prefill", FabricKind::Tcp, 2, Lay::Flash);
    let prompt = Prompt::new(7, 9, 2);
    for bytes in [&b""[..], b"KVTK", &[0xff; 300]] {
        let ticket = Ticket(bytes.to_vec());
        assert!(!prefill.open(9, &prompt, &ticket).unwrap_err().is_retryable);
        prefill.transfers.reject(&ticket);
    }
    assert_eq!(prefill.transfers.live(), 0);
}
