//! With other ranks on the other side, the pages that arrive are those of the source, re-sharded.

use kvpush::fabric::FabricKind;

use kvpush_engine::model::WeightMode;

use super::fixture::{Ask, Chosen, Pair, Weights, block_bytes, content};

fn reshard(weights: Weights, fabric: FabricKind, ranks: (u32, u32), chunk: usize) -> Vec<Chosen> {
    let pair = Pair::new(weights, fabric, ranks, chunk);
    let ask = Ask::new(11, 75, 10);
    let (answer, usage) = pair.ask("request", &ask);
    let source = {
        let seen = pair.prefill.seen.lock();
        let mut positions = 0..;
        let in_order = seen
            .pushed
            .iter()
            .all(|(position, _)| positions.next() == Some(*position));
        assert!(in_order, "{:?}", seen.pushed);
        let blocks: Vec<_> = seen.pushed.iter().map(|(_, block)| *block).collect();
        assert_eq!(blocks.len(), ask.prompt.len().div_ceil(16));
        content(&pair.prefill.shards, &blocks)
    };
    let arrived = pair.decode.seen.lock().arrived.take().expect("it arrived");
    assert!(source.iter().any(|&byte| byte != 0));
    assert!(
        source == arrived,
        "{weights:?}, {ranks:?}: the pages differ"
    );
    assert_eq!(usage.pushed_tokens, ask.prompt.len());
    let (prefill, decode) = (pair.prefill.is_idle(), pair.decode.is_idle());
    let planned = block_bytes(&pair.decode.shards) * ask.prompt.len().div_ceil(16) as u64;
    assert_eq!(
        (prefill.bytes_pushed, decode.bytes_arrived),
        (planned, planned)
    );
    assert_eq!(prefill.recomputed_tokens + decode.recomputed_tokens, 0);
    answer.tokens[0].clone()
}

/// The largest difference of log probabilities that another order of sums over ranks may make; far more than rounding
/// does, far less than a wrong page.
const BOUND: f32 = 1e-3;

/// Sums over ranks are taken in another order, so logits differ by rounding. The same words, and close probabilities.
fn agrees(weights: Weights, fabric: FabricKind, ranks: (u32, u32)) {
    let wanted = reshard(weights, fabric, (1, 1), 512);
    let found = reshard(weights, fabric, ranks, 32);
    for (place, (found, wanted)) in found.iter().zip(&wanted).enumerate() {
        assert_eq!(found.0, wanted.0, "{weights:?}, {ranks:?}, token {place}");
        let bits = |all: &[(u32, u32)], id| {
            let found = all.iter().find(|(other, _)| *other == id);
            found.map(|(_, bits)| f32::from_bits(*bits))
        };
        // The unlikeliest may have changed places with those that are not listed.
        for (id, value) in wanted.1.iter().take(100) {
            let value = f32::from_bits(*value);
            let found = bits(&found.1, *id).expect("it is among the likeliest");
            let difference = (found - value).abs();
            assert!(
                difference <= BOUND,
                "{weights:?}, {ranks:?}, token {place}: {found} for {value}"
            );
        }
    }
}

#[test]
fn tiny_over_tcp() {
    agrees(Weights::Tiny(WeightMode::F32), FabricKind::Tcp, (4, 2));
    agrees(Weights::Tiny(WeightMode::F32), FabricKind::Tcp, (2, 4));
    agrees(Weights::TinyThree(WeightMode::F32), FabricKind::Tcp, (3, 1));
}

#[test]
fn tiny_over_shared_memory() {
    agrees(Weights::TinyThree(WeightMode::F32), FabricKind::Shm, (1, 3));
    agrees(Weights::Tiny(WeightMode::F32), FabricKind::Shm, (4, 1));
}

/// In a guest: `cargo xtask rxe`.
mod verbs {
    use super::*;

    #[test]
    #[ignore = "needs an RDMA device: cargo xtask rxe"]
    fn fake() {
        let wanted = reshard(Weights::Fake, FabricKind::Verbs, (4, 2), 512);
        assert!(reshard(Weights::Fake, FabricKind::Verbs, (1, 3), 32) == wanted);
    }

    #[test]
    #[ignore = "needs an RDMA device: cargo xtask rxe"]
    fn tiny() {
        agrees(Weights::Tiny(WeightMode::F32), FabricKind::Verbs, (4, 2));
        agrees(
            Weights::TinyThree(WeightMode::F32),
            FabricKind::Verbs,
            (1, 3),
        );
    }
}

#[test]
fn fake() {
    let wanted = reshard(Weights::Fake, FabricKind::Tcp, (1, 1), 512);
    for ranks in [(3, 1), (1, 3), (4, 2), (2, 4), (4, 6)] {
        for fabric in [FabricKind::Tcp, FabricKind::Shm] {
            // Hashes do not round: they are the same whatever the ranks.
            let found = reshard(Weights::Fake, fabric, ranks, 32);
            assert!(found == wanted, "{ranks:?}");
        }
    }
}
