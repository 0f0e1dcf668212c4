//! At equal ranks, two engines give the logits of one, bit by bit.

use kvpush::fabric::FabricKind;
use kvpush_engine::model::WeightMode;

use super::fixture::{Ask, Node, Pair, Weights, block_bytes};

const BLOCK: usize = 16;

/// The same requests, one after the other, of both kinds of deployment.
fn same(weights: Weights, fabric: FabricKind, tp: u32, chunk: usize) {
    let pair = Pair::new(weights, fabric, (tp, tp), chunk);
    let both = Node::alone(weights.load(tp), chunk);
    let mut pushed = 0;
    let mut sampled = Ask::new(5, 70, 12);
    sampled.sampling.temperature = 0.8;
    sampled.sampling.seed = Some(42);
    let mut several = Ask::new(6, 50, 9);
    several.sampling.n = 4;
    several.sampling.temperature = 1.0;
    several.sampling.seed = Some(7);
    let asks = [
        Ask::new(1, 1, 4),
        Ask::new(2, BLOCK, 20),
        Ask::new(3, BLOCK + 1, 20),
        Ask::new(4, 100, 30),
        sampled,
        // One prompt, a batch of four sequences.
        several,
    ];
    for (index, ask) in asks.iter().enumerate() {
        let id = format!("request-{index}");
        let (wanted, _) = both.ask(&id, ask);
        let (found, usage) = pair.ask(&id, ask);
        found.is(
            &wanted,
            &format!("{weights:?}, {tp} ranks, chunks of {chunk}, request {index}"),
        );
        assert_eq!(usage.pushed_tokens, ask.prompt.len());
        let blocks = ask.prompt.len().div_ceil(BLOCK) as u64;
        pushed += blocks * block_bytes(&pair.prefill.shards);
    }
    let (prefill, decode) = (pair.prefill.is_idle(), pair.decode.is_idle());
    both.is_idle();
    // What was moved is what was planned, and nothing was computed twice.
    assert_eq!(
        (prefill.bytes_pushed, decode.bytes_arrived),
        (pushed, pushed)
    );
    assert_eq!(
        (prefill.recomputed_tokens, decode.recomputed_tokens),
        (0, 0)
    );
    assert_eq!(decode.pushed_tokens, decode.prompt_tokens);
}

/// Both sides find the beginning of a prompt in their caches.
fn prefixes(weights: Weights, fabric: FabricKind) {
    let pair = Pair::new(weights, fabric, (1, 1), 512);
    let both = Node::alone(weights.load(1), 512);
    let short = Ask::new(9, 3 * BLOCK + 5, 10);
    let long = Ask::new(9, 6 * BLOCK + 3, 10);
    assert_eq!(short.prompt[..], long.prompt[..short.prompt.len()]);
    let mut moved = 0;
    for (index, (ask, held)) in [(&short, 0), (&long, 3), (&long, 6)]
        .into_iter()
        .enumerate()
    {
        let id = format!("request-{index}");
        let (wanted, usage) = both.ask(&id, ask);
        assert_eq!(usage.cached_tokens, held * BLOCK);
        let (found, usage) = pair.ask(&id, ask);
        found.is(&wanted, &format!("{weights:?}, request {index}"));
        assert_eq!(usage.cached_tokens, held * BLOCK);
        assert_eq!(usage.pushed_tokens, ask.prompt.len() - held * BLOCK);
        let blocks = ask.prompt.len().div_ceil(BLOCK) - held;
        moved += blocks as u64 * block_bytes(&pair.prefill.shards);
        assert_eq!(pair.prefill.is_idle().bytes_pushed, moved);
    }
    let (prefill, decode) = (pair.prefill.is_idle(), pair.decode.is_idle());
    assert_eq!(decode.bytes_arrived, moved);
    assert_eq!(prefill.recomputed_tokens + decode.recomputed_tokens, 0);
    assert_eq!(prefill.cached_tokens, decode.cached_tokens);
}

/// Many at once: each gets its own pages and its own first token.
fn at_once(weights: Weights, fabric: FabricKind) {
    let pair = Pair::new(weights, fabric, (2, 2), 32);
    let both = Node::alone(weights.load(2), 32);
    let asks: Vec<_> = (0..8)
        .map(|index| Ask::new(index, 20 + 7 * index as usize, 8))
        .collect();
    let begun: Vec<_> = asks
        .iter()
        .enumerate()
        .map(|(index, ask)| pair.begin(&format!("request-{index}"), ask))
        .collect();
    for ((index, ask), [prefill, decode]) in asks.iter().enumerate().zip(begun) {
        let (found, _) = pair.end(ask, prefill, decode);
        let (wanted, _) = both.ask(&format!("request-{index}"), ask);
        let words = |answer: &super::fixture::Answer| -> Vec<u32> {
            answer.tokens[0].iter().map(|(id, _)| *id).collect()
        };
        assert_eq!(
            words(&found),
            words(&wanted),
            "{weights:?}, request {index}"
        );
    }
    pair.prefill.is_idle();
    pair.decode.is_idle();
}

#[test]
fn tiny_in_f32() {
    same(Weights::Tiny(WeightMode::F32), FabricKind::Tcp, 1, 512);
    same(Weights::Tiny(WeightMode::F32), FabricKind::Shm, 2, 24);
}

#[test]
fn tiny_in_q8_0() {
    same(Weights::Tiny(WeightMode::Q8_0), FabricKind::Shm, 1, 512);
    same(Weights::Tiny(WeightMode::Q8_0), FabricKind::Tcp, 4, 24);
}

#[test]
fn three_ranks() {
    same(Weights::TinyThree(WeightMode::F32), FabricKind::Tcp, 3, 512);
}

#[test]
fn tiny_with_prefixes() {
    prefixes(Weights::Tiny(WeightMode::F32), FabricKind::Tcp);
    prefixes(Weights::Tiny(WeightMode::Q8_0), FabricKind::Shm);
}

#[test]
fn tiny_at_once() {
    at_once(Weights::Tiny(WeightMode::F32), FabricKind::Shm);
}

/// In a guest: `cargo xtask rxe`.
mod verbs {
    use super::*;

    #[test]
    #[ignore = "needs an RDMA device: cargo xtask rxe"]
    fn fake() {
        same(Weights::Fake, FabricKind::Verbs, 2, 512);
    }

    #[test]
    #[ignore = "needs an RDMA device: cargo xtask rxe"]
    fn tiny() {
        same(Weights::Tiny(WeightMode::F32), FabricKind::Verbs, 2, 512);
    }

    #[test]
    #[ignore = "needs an RDMA device: cargo xtask rxe"]
    fn with_prefixes() {
        prefixes(Weights::Tiny(WeightMode::F32), FabricKind::Verbs);
    }
}

#[test]
fn fake_over_tcp() {
    for tp in [1, 2, 4] {
        same(Weights::Fake, FabricKind::Tcp, tp, 512);
    }
}

#[test]
fn fake_over_shared_memory_in_chunks() {
    for (tp, chunk) in [(1, 16), (3, 24), (2, 7)] {
        same(Weights::Fake, FabricKind::Shm, tp, chunk);
    }
}

#[test]
fn fake_with_prefixes() {
    prefixes(Weights::Fake, FabricKind::Tcp);
    prefixes(Weights::Fake, FabricKind::Shm);
}

#[test]
fn fake_at_once() {
    at_once(Weights::Fake, FabricKind::Tcp);
}
