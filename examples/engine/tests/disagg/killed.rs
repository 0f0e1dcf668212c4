//! Engines that are killed in the middle: the other one ends the request cleanly, or computes it itself and counts that,
//! and has all its blocks again.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use kvpush::fabric::FabricKind;
use kvpush_engine::{
    demo::{
        peer::Peer,
        protocol::{Command, Leg, State, Submit, What},
        worker::Options,
    },
    runtime::Role,
};

use super::fixture::{PATIENCE, ack_timeout};

const PROMPT: usize = 200;

fn start(role: Role, fabric: FabricKind, tp: u32, layer_time: Duration) -> Peer {
    let options = Options {
        role,
        tp,
        fabrics: vec![fabric],
        layer_time,
        layers: 6,
        blocks: 64,
        silence: Some(Duration::from_secs(2)),
        ack_timeout: ack_timeout(fabric),
        ..Options::default()
    };
    let program = Path::new(env!("CARGO_BIN_EXE_kvpush-engine"));
    Peer::start(program, &options, "killed", PATIENCE).unwrap()
}

fn submit(id: &str, leg: Leg) -> Command {
    Command::Submit(Submit {
        id: id.to_owned(),
        prompt: (0..PROMPT as u32).map(|token| token * 7 % 255).collect(),
        max_tokens: 8,
        logprobs: None,
        ignore_eos: true,
        deadline_ms: PATIENCE.as_millis() as u64,
        leg,
    })
}

/// Begins a request, up to its ticket.
fn reserve(decode: &mut Peer, id: &str, recompute: bool) -> Vec<u8> {
    let leg = Leg::Decode {
        prefill_tp: 2,
        recompute,
    };
    decode.send(&submit(id, leg)).unwrap();
    match decode.event(PATIENCE).unwrap() {
        (_, _, What::Reserved(ticket)) => ticket,
        other => panic!("{other:?}"),
    }
}

/// Polls until `done` says so.
fn until(peer: &mut Peer, what: &str, done: impl Fn(&State) -> bool) -> State {
    let end = Instant::now() + PATIENCE;
    loop {
        let state = peer.state(PATIENCE).unwrap();
        if done(&state) {
            return state;
        }
        assert!(Instant::now() < end, "never: {what}: {state:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// All blocks are back, and so is everything of kvpush.
fn is_clean(peer: &mut Peer) -> State {
    until(peer, "everything is released", |state| {
        let blocks = state.blocks;
        state.live == 0
            && state.transfers == 0
            && blocks.lost == 0
            && blocks.available == blocks.total
    })
}

/// The end of a request, and its tokens.
fn end(peer: &mut Peer) -> (Vec<u32>, What) {
    let mut tokens = Vec::new();
    loop {
        match peer.event(PATIENCE).unwrap().2 {
            What::Token { id, .. } => tokens.push(id),
            end @ (What::Done { .. } | What::Failed { .. }) => return (tokens, end),
            _ => {}
        }
    }
}

/// A whole request over both engines.
fn works(prefill: &mut Peer, decode: &mut Peer, id: &str) -> Vec<u32> {
    let ticket = reserve(decode, id, false);
    prefill.send(&submit(id, Leg::Prefill(ticket))).unwrap();
    assert!(matches!(end(prefill).1, What::Done { .. }));
    match end(decode) {
        (tokens, What::Done { recomputed: 0, .. }) => tokens,
        other => panic!("{other:?}"),
    }
}

/// In the middle: some bytes are on their way, and not all.
fn in_the_middle(prefill: &mut Peer) {
    until(prefill, "some layers are pushed", |state| {
        state.layers.iter().any(|end| end.posted > 0)
    });
}

fn prefill_dies(fabric: FabricKind, recompute: bool) {
    let slow = Duration::from_millis(150);
    let mut decode = start(Role::Decode, fabric, 3, Duration::ZERO);
    let mut prefill = start(Role::Prefill, fabric, 2, slow);
    let ticket = reserve(&mut decode, "dies", recompute);
    prefill.send(&submit("dies", Leg::Prefill(ticket))).unwrap();
    in_the_middle(&mut prefill);
    prefill.kill().unwrap();
    let (tokens, how) = end(&mut decode);
    match how {
        What::Failed {
            is_retryable,
            message,
        } => {
            assert!(!recompute, "{message}");
            assert!(is_retryable, "{message}");
            assert_eq!(tokens.len(), 0, "never on partial pages");
            assert_eq!(is_clean(&mut decode).recomputed_tokens, 0);
        }
        What::Done { recomputed, .. } => {
            assert!(recompute);
            assert_eq!(recomputed, PROMPT);
            assert_eq!(is_clean(&mut decode).recomputed_tokens, PROMPT as u64);
        }
        other => panic!("{other:?}"),
    }
    // Another prefill engine takes its place.
    let mut prefill = start(Role::Prefill, fabric, 2, Duration::ZERO);
    let again = works(&mut prefill, &mut decode, "again");
    if recompute {
        assert_eq!(tokens, again, "what was recomputed is the same");
    }
    is_clean(&mut prefill);
    is_clean(&mut decode);
    prefill.stop().unwrap();
    decode.stop().unwrap();
}

fn decode_dies(fabric: FabricKind) {
    let slow = Duration::from_millis(150);
    let mut decode = start(Role::Decode, fabric, 3, Duration::ZERO);
    let mut prefill = start(Role::Prefill, fabric, 2, slow);
    let ticket = reserve(&mut decode, "dies", false);
    prefill.send(&submit("dies", Leg::Prefill(ticket))).unwrap();
    in_the_middle(&mut prefill);
    decode.kill().unwrap();
    match end(&mut prefill) {
        (
            _,
            What::Failed {
                is_retryable,
                message,
            },
        ) => assert!(is_retryable, "{message}"),
        other => panic!("{other:?}"),
    }
    is_clean(&mut prefill);
    let mut decode = start(Role::Decode, fabric, 3, Duration::ZERO);
    works(&mut prefill, &mut decode, "again");
    is_clean(&mut prefill);
    is_clean(&mut decode);
}

#[test]
fn prefill_over_tcp() {
    prefill_dies(FabricKind::Tcp, false);
}

#[test]
fn prefill_over_shared_memory() {
    prefill_dies(FabricKind::Shm, false);
}

#[test]
fn prefill_and_decode_recomputes() {
    prefill_dies(FabricKind::Tcp, true);
}

#[test]
fn decode_over_tcp() {
    decode_dies(FabricKind::Tcp);
}

#[test]
fn decode_over_shared_memory() {
    decode_dies(FabricKind::Shm);
}

/// In a guest: `cargo xtask rxe`.
mod verbs {
    use super::*;

    #[test]
    #[ignore = "needs an RDMA device: cargo xtask rxe"]
    fn prefill() {
        prefill_dies(FabricKind::Verbs, false);
    }

    #[test]
    #[ignore = "needs an RDMA device: cargo xtask rxe"]
    fn decode() {
        decode_dies(FabricKind::Verbs);
    }
}
