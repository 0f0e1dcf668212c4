//! With other ranks on the other side, the pages that arrive are those of the source, re-sharded.

use kvpush::fabric::FabricKind;

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

/// In a guest: `cargo xtask rxe`.
mod verbs {
    use super::*;

    #[test]
    #[ignore = "needs an RDMA device: cargo xtask rxe"]
    fn fake() {
        let wanted = reshard(Weights::Fake, FabricKind::Verbs, (4, 2), 512);
        assert!(reshard(Weights::Fake, FabricKind::Verbs, (1, 3), 32) == wanted);
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
