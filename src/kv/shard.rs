//! Which KV heads a tensor-parallel rank holds, and which ranks of two groups have to meet.
//!
//! The convention is vLLM's and SGLang's: with no more ranks than heads, rank `r` of `tp` holds the `r`-th of `tp` equal
//! runs of heads; with more ranks than heads, each head is held by `tp / kv_heads` neighbouring ranks. MLA has one
//! latent "head", which every rank holds.

use super::HeadRange;

/// The largest tensor-parallel group that is accepted.
pub const MAX_TP: u32 = 1 << 16;

/// Two ranks that have heads to exchange.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Pair {
    /// Rank that sends.
    pub source_rank: u32,
    /// Rank that receives.
    pub destination_rank: u32,
    /// What it sends.
    pub heads: HeadRange,
}

/// Why heads cannot be shared out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ShardError {
    /// No heads, no ranks, or more ranks than [`MAX_TP`].
    #[error("{kv_heads} KV heads over {tp} ranks: both must be at least 1, ranks at most {MAX_TP}")]
    Count {
        /// Heads.
        kv_heads: u32,
        /// Ranks.
        tp: u32,
    },
    /// Neither number is a multiple of the other.
    #[error("{kv_heads} KV heads cannot be shared out evenly over {tp} ranks")]
    Indivisible {
        /// Heads.
        kv_heads: u32,
        /// Ranks.
        tp: u32,
    },
    /// No such rank.
    #[error("rank {rank} does not exist in a group of {tp}")]
    Rank {
        /// The rank.
        rank: u32,
        /// Ranks there are.
        tp: u32,
    },
}

impl ShardError {
    /// Whether the same call may succeed later: never, the numbers are wrong for good.
    pub const fn is_retryable(&self) -> bool {
        false
    }
}

/// A group of ranks as heads see it: `shards` different runs of `width` heads, each held by `replicas` ranks.
#[derive(Clone, Copy)]
struct Split {
    shards: u32,
    width: u32,
    replicas: u32,
}

impl Split {
    fn new(kv_heads: u32, tp: u32) -> Result<Self, ShardError> {
        if kv_heads == 0 || tp == 0 || tp > MAX_TP {
            return Err(ShardError::Count { kv_heads, tp });
        }
        let shards = tp.min(kv_heads);
        if !kv_heads.is_multiple_of(shards) || !tp.is_multiple_of(shards) {
            return Err(ShardError::Indivisible { kv_heads, tp });
        }
        Ok(Self {
            shards,
            width: kv_heads / shards,
            replicas: tp / shards,
        })
    }

    fn heads(self, shard: u32) -> HeadRange {
        HeadRange::new(shard * self.width, self.width)
    }
}

/// The heads that `rank` of `tp` holds, of `kv_heads` in the model.
///
/// # Errors
/// [`ShardError::Indivisible`] unless one number is a multiple of the other; a number or the rank is out of range.
pub fn shard_heads(kv_heads: u32, tp: u32, rank: u32) -> Result<HeadRange, ShardError> {
    let split = Split::new(kv_heads, tp)?;
    if rank >= tp {
        return Err(ShardError::Rank { rank, tp });
    }
    Ok(split.heads(rank / split.replicas))
}

/// The fewest pairs of ranks that bring every destination rank each of its heads once, ordered by destination rank,
/// then by head.
///
/// Where several source ranks hold the same head, the destinations that need it are spread over them evenly and in
/// order: the heads sent by any two source ranks differ by at most one.
///
/// # Errors
/// As [`shard_heads`], for either group.
pub fn pairing(
    kv_heads: u32,
    source_tp: u32,
    destination_tp: u32,
) -> Result<Vec<Pair>, ShardError> {
    let source = Split::new(kv_heads, source_tp)?;
    let destination = Split::new(kv_heads, destination_tp)?;
    let mut pairs = Vec::new();
    for destination_rank in 0..destination_tp {
        let needed = destination.heads(destination_rank / destination.replicas);
        let first = needed.first / source.width;
        let overlapping = (first..source.shards).map_while(|shard| {
            let heads = source.heads(shard).intersection(needed)?;
            Some((shard, heads))
        });
        for (shard, heads) in overlapping {
            // Only shards of one head are replicated, so the ranks that need one are the replicas of one destination
            // shard, or a single rank.
            let turn = destination_rank % destination.replicas;
            let replica =
                u64::from(turn) * u64::from(source.replicas) / u64::from(destination.replicas);
            pairs.push(Pair {
                source_rank: shard * source.replicas + replica as u32,
                destination_rank,
                heads,
            });
        }
    }
    Ok(pairs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Group sizes that divide or are divided by `kv_heads`.
    fn tp_of(kv_heads: u32) -> impl Strategy<Value = u32> {
        let sizes: Vec<u32> = (1..=64)
            .filter(|tp| kv_heads.is_multiple_of(*tp) || tp.is_multiple_of(kv_heads))
            .collect();
        prop::sample::select(sizes)
    }

    fn groups() -> impl Strategy<Value = (u32, u32, u32)> {
        (1u32..=64).prop_flat_map(|heads| (Just(heads), tp_of(heads), tp_of(heads)))
    }

    proptest! {
        #[test]
        fn every_head_arrives_once_and_the_load_is_even((kv_heads, from, to) in groups()) {
            let pairs = pairing(kv_heads, from, to).unwrap();
            let mut arrived = vec![vec![0u32; kv_heads as usize]; to as usize];
            let mut load = vec![0u32; from as usize];
            for pair in &pairs {
                let held = shard_heads(kv_heads, from, pair.source_rank).unwrap();
                prop_assert!(held.contains(pair.heads), "{:?} of {}", pair, held);
                load[pair.source_rank as usize] += pair.heads.count;
                for head in pair.heads.first..pair.heads.first + pair.heads.count {
                    arrived[pair.destination_rank as usize][head as usize] += 1;
                }
            }
            for (rank, arrived) in (0..).zip(&arrived) {
                let needed = shard_heads(kv_heads, to, rank).unwrap();
                for (head, &count) in (0..).zip(arrived) {
                    prop_assert_eq!(count, u32::from(needed.contains(HeadRange::new(head, 1))));
                }
                // Fewest: as many as there are different source shards in the range.
                let width = kv_heads / from.min(kv_heads);
                let shards = (needed.end() as u32 - 1) / width - needed.first / width + 1;
                let used = pairs.iter().filter(|pair| pair.destination_rank == rank).count();
                prop_assert_eq!(used as u32, shards);
            }
            let (least, most) = (load.iter().min().unwrap(), load.iter().max().unwrap());
            prop_assert!(most - least <= 1, "{:?}", load);
        }
    }

    #[test]
    fn known_groups() {
        let pair = |source_rank, destination_rank, first, count| Pair {
            source_rank,
            destination_rank,
            heads: HeadRange::new(first, count),
        };
        let two_to_four = [
            pair(0, 0, 0, 2),
            pair(0, 1, 2, 2),
            pair(1, 2, 4, 2),
            pair(1, 3, 6, 2),
        ];
        assert_eq!(pairing(8, 2, 4).unwrap(), two_to_four);
        let four_to_two = [
            pair(0, 0, 0, 2),
            pair(1, 0, 2, 2),
            pair(2, 1, 4, 2),
            pair(3, 1, 6, 2),
        ];
        assert_eq!(pairing(8, 4, 2).unwrap(), four_to_two);
        // Neither width divides the other.
        let uneven = pairing(12, 4, 6).unwrap();
        assert_eq!(uneven[1..3], [pair(0, 1, 2, 1), pair(1, 1, 3, 1)]);
        // MLA: every destination takes the latent from another source.
        assert_eq!(pairing(1, 8, 4).unwrap()[3], pair(6, 3, 0, 1));
        // Replicas, as vLLM numbers them.
        assert_eq!(shard_heads(4, 8, 5).unwrap(), HeadRange::new(2, 1));
    }

    #[test]
    fn impossible_groups() {
        assert_eq!(
            shard_heads(8, 3, 0),
            Err(ShardError::Indivisible { kv_heads: 8, tp: 3 })
        );
        assert_eq!(
            shard_heads(8, 12, 0),
            Err(ShardError::Indivisible {
                kv_heads: 8,
                tp: 12
            })
        );
        assert_eq!(
            shard_heads(8, 4, 4),
            Err(ShardError::Rank { rank: 4, tp: 4 })
        );
        assert_eq!(
            shard_heads(0, 4, 0),
            Err(ShardError::Count { kv_heads: 0, tp: 4 })
        );
        assert_eq!(
            pairing(8, 0, 1),
            Err(ShardError::Count { kv_heads: 8, tp: 0 })
        );
        assert!(pairing(8, 1, u32::MAX).is_err());
    }
}
