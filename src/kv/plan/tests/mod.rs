//! The planner against a naive byte mover ([`checker`]), on [`random`] and on [`known`] layouts; below, what it refuses
//! and how it uses memory.

mod checker;
mod known;
mod random;

use super::*;
use crate::kv::models;
use crate::kv::presets::{Arrangement, HeadOrder, KvShape, Stacking};
use crate::kv::{Dtype, KvLayout, PlaneRole};

fn shape(heads: HeadRange) -> KvShape {
    KvShape {
        layers: 2,
        tokens_per_page: 4,
        heads,
        head_dim: 8,
        dtype: Dtype::Bf16,
    }
}

const WIDE: PlanLimits = PlanLimits {
    max_sge: 30,
    max_write: 1 << 30,
};

#[test]
fn layouts_that_do_not_match_are_refused() {
    let heads = HeadRange::new(0, 4);
    let pool = shape(heads).sglang(6).unwrap();
    let refuse = |change: &dyn Fn(&mut KvLayout)| {
        let mut other = pool.clone();
        change(&mut other);
        [
            Planner::new(&pool, &other, heads, WIDE).unwrap_err(),
            Planner::new(&other, &pool, heads, WIDE).unwrap_err(),
        ]
    };
    let (layer, role) = (1, PlaneRole::Value);
    assert_eq!(
        refuse(&|other| other.layers.truncate(1)),
        [PlanError::LayerCount(2, 1), PlanError::LayerCount(1, 2)]
    );
    assert_eq!(
        refuse(&|other| other.layers[1].tokens_per_page = 3),
        [(4, 3), (3, 4)].map(|tokens| PlanError::TokensPerPage { layer, tokens })
    );
    assert_eq!(
        refuse(&|other| other.layers[1].planes.truncate(1)),
        [Side::Destination, Side::Source].map(|missing_at| PlanError::MissingPlane {
            layer,
            role,
            missing_at
        })
    );
    assert_eq!(
        refuse(&|other| other.layers[1].planes[1].dtype = Dtype::F16),
        [(Dtype::Bf16, Dtype::F16), (Dtype::F16, Dtype::Bf16)].map(|dtypes| PlanError::Dtype {
            layer,
            role,
            dtypes
        })
    );
    assert_eq!(
        refuse(&|other| other.layers[1].planes[1].head_bytes = 8),
        [(16, 8), (8, 16)].map(|bytes| PlanError::HeadBytes { layer, role, bytes })
    );
    let have = HeadRange::new(1, 3);
    assert_eq!(
        refuse(&|other| other.layers[1].planes[1].heads = have),
        [Side::Destination, Side::Source].map(|side| PlanError::Heads {
            layer,
            role,
            side,
            wanted: heads,
            have
        })
    );
    let [error, _] = refuse(&|other| other.layers[1].planes[1].token_stride = 0);
    assert!(matches!(
        error,
        PlanError::Layout {
            side: Side::Destination,
            ..
        }
    ));
    let none = Planner::new(&pool, &pool, HeadRange::new(2, 0), WIDE).unwrap_err();
    assert!(matches!(none, PlanError::Heads { .. }));
    for limits in [
        PlanLimits { max_sge: 0, ..WIDE },
        PlanLimits {
            max_write: 0,
            ..WIDE
        },
    ] {
        assert_eq!(
            Planner::new(&pool, &pool, heads, limits).unwrap_err(),
            PlanError::Limits { limits }
        );
    }
}

#[test]
fn a_mapping_too_fine_is_refused() {
    let shape = KvShape {
        layers: 1,
        tokens_per_page: 1 << 14,
        heads: HeadRange::new(0, 128),
        head_dim: 1,
        dtype: Dtype::U8,
    };
    let pool = |order| {
        let layout = shape.layout(2, Arrangement::Separate, order, Stacking::RegionPerLayer);
        layout.unwrap()
    };
    let (rows, columns) = (pool(HeadOrder::TokenMajor), pool(HeadOrder::HeadMajor));
    let error = Planner::new(&rows, &columns, shape.heads, WIDE).unwrap_err();
    assert!(matches!(error, PlanError::TooManyPieces { layer: 0, .. }));
    assert!(Planner::new(&rows, &rows, shape.heads, WIDE).is_ok());
}

#[test]
fn bad_pages_append_nothing() {
    let heads = HeadRange::new(0, 4);
    let (from, to) = (
        shape(heads).sglang(6).unwrap(),
        shape(heads).sglang(9).unwrap(),
    );
    let planner = Planner::new(&from, &to, heads, WIDE).unwrap();
    let mut plan = Plan::default();
    planner.plan(0, &[5], &[8], &mut plan).unwrap();
    let before = plan.clone();
    let mut refuse = |layer, from: &[u32], to: &[u32]| {
        let error = planner.plan(layer, from, to, &mut plan).unwrap_err();
        assert_eq!(plan, before);
        error
    };
    assert_eq!(
        refuse(2, &[0], &[0]),
        PlanError::NoSuchLayer {
            layer: 2,
            layers: 2
        }
    );
    assert_eq!(refuse(0, &[0, 1], &[0]), PlanError::PageCount(2, 1));
    for (from, to, side, page, pages) in [
        ([0, 6, 7], [0, 1, 2], Side::Source, 6, 6),
        ([0, 1, 2], [8, 9, u32::MAX], Side::Destination, 9, 9),
    ] {
        assert_eq!(
            refuse(0, &from, &to),
            PlanError::PageOutOfRange { side, page, pages }
        );
    }
}

#[test]
fn plans_append_and_reuse_memory() {
    let heads = HeadRange::new(0, 4);
    let pool = shape(heads).sglang(500).unwrap();
    let planner = Planner::new(&pool, &pool, heads, WIDE).unwrap();
    let pages: Vec<u32> = (0..250).map(|page| page * 2).collect();
    let mut plan = Plan::default();
    for layer in 0..planner.layers() {
        planner.plan(layer, &pages, &pages, &mut plan).unwrap();
    }
    assert_eq!(plan.writes.len(), 2 * 2 * 250);
    assert_eq!(plan.bytes(), planner.bytes_per_page_all_layers() * 250);
    let once = plan.clone();
    let room = (plan.writes.capacity(), plan.sources.capacity());
    plan.clear();
    for layer in 0..planner.layers() {
        planner.plan(layer, &pages, &pages, &mut plan).unwrap();
    }
    assert_eq!(plan, once);
    assert_eq!((plan.writes.capacity(), plan.sources.capacity()), room);
}

#[test]
fn layers_of_one_geometry_share_their_pieces() {
    let shape = models::LLAMA_3_1_70B.shard(64, 2, 1).unwrap();
    let from = shape.vllm_flashinfer(100, HeadOrder::TokenMajor).unwrap();
    let to = shape.vllm_flashinfer(100, HeadOrder::HeadMajor).unwrap();
    let planner = Planner::new(&from, &to, shape.heads, WIDE).unwrap();
    let first = &planner.layers[0].groups[0].pieces;
    // The last key and the first value are neighbours at both ends.
    assert_eq!(first.len(), 2 * 64 * 4 - 1);
    assert!(
        planner
            .layers
            .iter()
            .all(|l| std::sync::Arc::ptr_eq(&l.groups[0].pieces, first))
    );
    assert_eq!(planner.bytes_per_page(79), Some(2 * 64 * 4 * 256));
    assert_eq!(planner.bytes_per_page(80), None);
}

#[test]
fn a_plan_too_large_to_number_is_refused() {
    let shape = KvShape {
        layers: 1,
        tokens_per_page: 1 << 14,
        heads: HeadRange::new(0, 1),
        head_dim: 64,
        dtype: Dtype::U8,
    };
    let pool = shape.mla(5000).unwrap();
    let bytewise = PlanLimits {
        max_write: 1,
        ..WIDE
    };
    let pages: Vec<u32> = (0..5000).collect();
    let mut plan = Plan::default();
    let planner = Planner::new(&pool, &pool, shape.heads, bytewise).unwrap();
    assert_eq!(
        planner.plan(0, &pages, &pages, &mut plan),
        Err(PlanError::TooLarge { pages: 5000 })
    );
    assert_eq!(plan, Plan::default());
}

/// Every layer of engines' pools is another one moved, however the layers are stacked and sharded.
#[test]
fn layers_of_pools_are_translations_of_each_other() {
    let heads = HeadRange::new(0, 4);
    let shape = KvShape {
        layers: 5,
        ..shape(heads)
    };
    let half = KvShape {
        heads: HeadRange::new(0, 2),
        ..shape
    };
    for stacking in [
        Stacking::RegionPerLayer,
        Stacking::LayerMajor,
        Stacking::PageMajor,
    ] {
        for arrangement in [
            Arrangement::Interleaved,
            Arrangement::KeysThenValues,
            Arrangement::Separate,
        ] {
            for order in [HeadOrder::TokenMajor, HeadOrder::HeadMajor] {
                let pool = |shape: &KvShape, pages| {
                    let layout = shape.layout(pages, arrangement, order, stacking);
                    layout.unwrap()
                };
                let planner =
                    Planner::new(&pool(&half, 9), &pool(&shape, 20), half.heads, WIDE).unwrap();
                let (from, to) = ([0, 1, 2, 8, 4], [3, 4, 5, 19, 2]);
                let plan = |layer| {
                    let mut plan = Plan::default();
                    planner.plan(layer, &from, &to, &mut plan).unwrap();
                    plan
                };
                let mut translation = Translation::default();
                for (a, b) in (0..5).flat_map(|a| (0..5).map(move |b| (a, b))) {
                    assert!(planner.translate(a, b, &mut translation), "{a} to {b}");
                    assert_eq!(plan(a).translated(&translation), plan(b), "{a} to {b}");
                }
            }
        }
    }
}

#[test]
fn layers_of_another_geometry_are_not_translated() {
    let heads = HeadRange::new(0, 4);
    let pool = shape(heads).sglang(6).unwrap();
    let changed = |change: &dyn Fn(&mut KvLayout)| {
        let mut other = pool.clone();
        change(&mut other);
        let planner = Planner::new(&other, &pool, heads, WIDE).unwrap();
        let mut translation = Translation::default();
        let is = planner.translate(0, 1, &mut translation);
        assert!(is || translation == Translation::default());
        (is, planner.translate(0, 2, &mut translation))
    };
    assert_eq!(changed(&|_| ()), (true, false), "there is no layer 2");
    // Keys in the region of the values, so that two regions have become one.
    let merged = |other: &mut KvLayout| {
        let region = other.layers[1].planes[1].region;
        let beyond = 6 * other.layers[1].planes[1].page_stride;
        let keys = &mut other.layers[1].planes[0];
        (keys.region, keys.offset) = (region, beyond);
    };
    assert!(!changed(&merged).0);
    let wider = |other: &mut KvLayout| other.layers[1].planes[0].page_stride *= 2;
    assert!(!changed(&wider).0);
}
