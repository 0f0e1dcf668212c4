//! Known pools, and how many writes and runs they must take.

use super::checker::{Case, check_merged};
use super::{WIDE, shape};
use crate::kv::plan::PlanLimits;
use crate::kv::presets::{Arrangement, HeadOrder, KvShape, Stacking};
use crate::kv::{HeadRange, region_lengths};

/// Presets against presets, whole pools and shards.
fn preset_case(
    from: (KvShape, Arrangement, HeadOrder, Stacking),
    to: (KvShape, Arrangement, HeadOrder, Stacking),
    pages: (Vec<u32>, Vec<u32>),
    limits: PlanLimits,
) -> Case {
    let pool = |(shape, arrangement, order, stacking): (KvShape, _, _, _)| {
        let layout = shape.layout(6, arrangement, order, stacking).unwrap();
        let lengths = region_lengths(&layout).unwrap();
        (layout, lengths)
    };
    let (source, source_lengths) = pool(from);
    let (destination, destination_lengths) = pool(to);
    Case {
        source,
        destination,
        source_lengths,
        destination_lengths,
        heads: from.0.heads.intersection(to.0.heads).unwrap(),
        limits,
        layer: 1,
        source_pages: pages.0,
        destination_pages: pages.1,
    }
}

const ARRANGEMENTS: [Arrangement; 3] = [
    Arrangement::KeysThenValues,
    Arrangement::Separate,
    Arrangement::Interleaved,
];
const ORDERS: [HeadOrder; 2] = [HeadOrder::TokenMajor, HeadOrder::HeadMajor];
const STACKINGS: [Stacking; 3] = [
    Stacking::RegionPerLayer,
    Stacking::LayerMajor,
    Stacking::PageMajor,
];

#[test]
fn every_preset_to_every_preset_at_every_split() {
    let pools = || {
        ARRANGEMENTS
            .into_iter()
            .flat_map(|a| ORDERS.into_iter().map(move |o| (a, o)))
            .flat_map(|(a, o)| STACKINGS.into_iter().map(move |s| (a, o, s)))
    };
    let shards = [
        ((0, 4), (0, 4)),
        // From two ranks to four, and back.
        ((0, 4), (2, 2)),
        ((2, 2), (0, 4)),
    ];
    for (from, to) in pools().flat_map(|from| pools().map(move |to| (from, to))) {
        for ((a, b), (c, d)) in shards {
            let case = preset_case(
                (shape(HeadRange::new(a, b)), from.0, from.1, from.2),
                (shape(HeadRange::new(c, d)), to.0, to.1, to.2),
                (vec![5, 0, 1, 2], vec![1, 3, 4, 2]),
                WIDE,
            );
            let plan = case.plan();
            case.check(&plan).unwrap();
            check_merged(&plan, WIDE).unwrap();
        }
    }
}

#[test]
fn contiguous_memory_takes_the_fewest_writes() {
    let all: Vec<u32> = (0..6).collect();
    let heads = HeadRange::new(0, 4);
    // Bytes of one layer, keys and values.
    let bytes: u32 = 2 * 6 * 4 * 4 * 16;
    for arrangement in [Arrangement::KeysThenValues, Arrangement::Interleaved] {
        for order in ORDERS {
            for max_write in [1, 7, 100, 512, bytes - 1, bytes, bytes + 1, u32::MAX] {
                let limits = PlanLimits {
                    max_sge: 1,
                    max_write,
                };
                let pool = (shape(heads), arrangement, order, Stacking::RegionPerLayer);
                let case = preset_case(pool, pool, (all.clone(), all.clone()), limits);
                let plan = case.plan();
                case.check(&plan).unwrap();
                assert_eq!(plan.writes.len() as u32, bytes.div_ceil(max_write));
            }
        }
    }
}

#[test]
fn scattered_sources_are_gathered() {
    let pool = (
        shape(HeadRange::new(0, 4)),
        Arrangement::Interleaved,
        HeadOrder::TokenMajor,
        Stacking::RegionPerLayer,
    );
    let pages = (vec![5, 3, 1, 0, 4], vec![1, 2, 3, 4, 5]);
    for (max_sge, writes) in [(1, 5), (2, 3), (3, 2), (4, 2), (5, 1), (30, 1)] {
        let limits = PlanLimits { max_sge, ..WIDE };
        let case = preset_case(pool, pool, pages.clone(), limits);
        let plan = case.plan();
        case.check(&plan).unwrap();
        assert_eq!((plan.writes.len(), plan.sources.len()), (writes, 5));
    }
    // Keys and values of a page are one run even where the pages are not neighbours.
    let case = preset_case(pool, pool, (vec![0, 2, 4], vec![4, 2, 0]), WIDE);
    assert_eq!(
        (case.plan().writes.len(), case.plan().sources.len()),
        (3, 3)
    );
    // From keys and values apart, each write gathers both.
    let apart = (pool.0, Arrangement::Separate, pool.2, pool.3);
    let case = preset_case(apart, pool, (vec![0, 2, 4], vec![4, 2, 0]), WIDE);
    assert_eq!(
        (case.plan().writes.len(), case.plan().sources.len()),
        (3, 6)
    );
}

/// `[tokens, pages, head_dim]`: pages are the inner axis, so their neighbours merge token by token.
#[test]
fn pages_inside_of_tokens_are_merged() {
    let heads = HeadRange::new(0, 1);
    let mut layout = shape(heads).mla(6).unwrap();
    for plane in layout.layers.iter_mut().flat_map(|layer| &mut layer.planes) {
        (plane.page_stride, plane.token_stride) = (16, 6 * 16);
    }
    let lengths = region_lengths(&layout).unwrap();
    for (pages, writes) in [(0..6, 1), (1..4, 4)] {
        let case = Case {
            source: layout.clone(),
            destination: layout.clone(),
            source_lengths: lengths.clone(),
            destination_lengths: lengths.clone(),
            heads,
            limits: WIDE,
            layer: 1,
            source_pages: pages.clone().collect(),
            destination_pages: pages.collect(),
        };
        let plan = case.plan();
        case.check(&plan).unwrap();
        assert_eq!((plan.writes.len(), plan.sources.len()), (writes, writes));
    }
}

#[test]
fn a_smaller_destination_shard_is_gathered_and_a_larger_one_is_written_by_token() {
    let pool = |first, count| {
        (
            shape(HeadRange::new(first, count)),
            Arrangement::Separate,
            HeadOrder::TokenMajor,
            Stacking::RegionPerLayer,
        )
    };
    let pages = || (vec![3], vec![2]);
    let plan = preset_case(pool(0, 4), pool(2, 2), pages(), WIDE).plan();
    assert_eq!((plan.writes.len(), plan.sources.len()), (2, 8));
    let plan = preset_case(pool(2, 2), pool(0, 4), pages(), WIDE).plan();
    assert_eq!((plan.writes.len(), plan.sources.len()), (8, 8));
    // Heads outside of tokens: a shard is contiguous at both ends.
    let hnd = |first, count| {
        let (shape, arrangement, _, stacking) = pool(first, count);
        (shape, arrangement, HeadOrder::HeadMajor, stacking)
    };
    let plan = preset_case(hnd(2, 2), hnd(0, 4), pages(), WIDE).plan();
    assert_eq!((plan.writes.len(), plan.sources.len()), (2, 2));
}
