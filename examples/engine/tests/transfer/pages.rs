//! What arrives is what was there, re-sharded, and nothing else.

use kvpush::fabric::FabricKind;
use kvpush_engine::transfer::{Outcome, Transfers};

use super::fixture::{BLOCKS, Lay, PATIENCE, Prompt, Side, block_bytes};

/// Ranks of prefill and decode: equal, fewer, more, with widths that do not divide each other, and with replicas.
const GROUPS: [(u32, u32); 9] = [
    (1, 1),
    (3, 3),
    (3, 1),
    (1, 3),
    (4, 2),
    (2, 4),
    (4, 6),
    (1, 24),
    (24, 12),
];

fn move_pages(fabric: FabricKind, (prefill_tp, decode_tp): (u32, u32), chunk: usize, held: usize) {
    let mut prefill = Side::new("prefill", fabric, prefill_tp, Lay::Flash);
    let mut decode = Side::new("decode", fabric, decode_tp, Lay::PageMajor);
    let prompt = Prompt::new(u64::from(prefill_tp * 100 + decode_tp), 9, held);
    // What must stay as it is: everything that is not granted.
    for block in 0..BLOCKS {
        for layer in 0..super::fixture::LAYERS {
            decode.cache.fill(layer, block, u64::MAX, block as usize);
        }
    }
    let ticket = decode.reserve(1, &prompt, prefill_tp, PATIENCE).unwrap();
    assert_eq!(prefill.open(9, &prompt, &ticket), Ok(held));
    prefill.hand_over(9, &prompt, chunk);
    prefill.transfers.finish(9, b"first token").unwrap();
    // A head that several decode ranks hold goes to each of them.
    let replicas = u64::from(decode_tp.div_ceil(12));
    let moved = block_bytes() * (prompt.source.len() - held) as u64 * replicas;
    match prefill.outcome() {
        Outcome::Pushed { request: 9, bytes } => assert_eq!(bytes, moved),
        other => panic!("{other:?}"),
    }
    match decode.outcome() {
        Outcome::Arrived {
            request: 1,
            tail,
            bytes,
        } => {
            assert_eq!(tail, b"first token");
            assert_eq!(bytes, moved);
        }
        other => panic!("{other:?}"),
    }
    for block in 0..BLOCKS {
        let position = prompt.destination.iter().position(|&other| other == block);
        match position.filter(|&position| position >= held) {
            Some(position) => decode.cache.check(block, prompt.seed, position),
            None => decode.cache.check(block, u64::MAX, block as usize),
        }
    }
    assert_eq!((prefill.transfers.live(), decode.transfers.live()), (0, 0));
}

#[test]
fn every_group_over_tcp() {
    for group in GROUPS {
        move_pages(FabricKind::Tcp, group, 9, 0);
    }
}

#[test]
fn every_group_over_shared_memory() {
    for group in GROUPS {
        move_pages(FabricKind::Shm, group, 9, 0);
    }
}

#[test]
fn in_chunks_and_without_what_is_held() {
    for (chunk, held) in [(1, 0), (2, 3), (4, 4), (9, 8)] {
        move_pages(FabricKind::Tcp, (2, 4), chunk, held);
    }
}

/// Many requests at once, both ways, between the same two engines.
#[test]
fn many_at_once() {
    let mut one = Side::new("one", FabricKind::Tcp, 2, Lay::Flash);
    let mut other = Side::new("other", FabricKind::Tcp, 4, Lay::Flash);
    let prompts: Vec<Prompt> = (0..4)
        .map(|index| {
            let mut prompt = Prompt::new(index, 8, 0);
            let first = index as u32 * 8;
            prompt.source = (first..first + 8).collect();
            prompt.destination = (first..first + 8).rev().collect();
            prompt
        })
        .collect();
    let numbered = || (10..).zip(&prompts);
    let tickets: Vec<_> = numbered()
        .map(|(request, prompt)| other.reserve(request, prompt, 2, PATIENCE).unwrap())
        .collect();
    for ((request, prompt), ticket) in numbered().zip(&tickets) {
        one.open(request, prompt, ticket).unwrap();
    }
    for (request, prompt) in numbered() {
        one.hand_over(request, prompt, 3);
        one.transfers.finish(request, &[request as u8]).unwrap();
    }
    let mut pushed = Vec::new();
    let mut arrived = Vec::new();
    for _ in &prompts {
        match one.any_outcome() {
            Outcome::Pushed { request, .. } => pushed.push(request),
            other => panic!("{other:?}"),
        }
        match other.any_outcome() {
            Outcome::Arrived { request, tail, .. } => {
                assert_eq!(tail, [request as u8]);
                arrived.push(request);
            }
            other => panic!("{other:?}"),
        }
    }
    pushed.sort_unstable();
    arrived.sort_unstable();
    assert_eq!(pushed, [10, 11, 12, 13]);
    assert_eq!(arrived, pushed);
    for prompt in &prompts {
        for (position, &block) in prompt.destination.iter().enumerate() {
            other.cache.check(block, prompt.seed, position);
        }
    }
}
