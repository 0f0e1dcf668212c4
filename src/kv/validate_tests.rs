//! Validation against a count of every byte, and each error by name.

use std::collections::HashSet;

use proptest::prelude::*;

use super::testing::{all_bytes, memory, model};
use super::*;

/// A plane of arbitrary small strides, most of them impossible.
fn arbitrary_plane(role: PlaneRole) -> impl Strategy<Value = Plane> {
    let stride = || prop_oneof![0u64..10, 0u64..40];
    (
        0u16..2,
        0u64..60,
        stride(),
        stride(),
        stride(),
        1u32..5,
        1u32..4,
    )
        .prop_map(
            move |(region, offset, page_stride, token_stride, head_stride, head_bytes, heads)| {
                Plane {
                    role,
                    dtype: Dtype::U8,
                    region,
                    offset,
                    page_stride,
                    token_stride,
                    head_stride,
                    head_bytes,
                    heads: HeadRange::new(3, heads),
                }
            },
        )
}

prop_compose! {
    /// Two layers of two planes. To meet interlocked planes often, the second layer may be the first moved on a bit.
    fn arbitrary_layout()(
        planes in (
            arbitrary_plane(PlaneRole::Key), arbitrary_plane(PlaneRole::Value),
            arbitrary_plane(PlaneRole::Key), arbitrary_plane(PlaneRole::Value),
        ),
        same in any::<[bool; 3]>(),
        moved in 0u64..20,
        pages in 1u32..4,
        tokens in (1u32..4, 1u32..4),
    ) -> KvLayout {
        let (a, mut b, mut c, mut d) = planes;
        for (plane, same) in [(&mut b, same[0]), (&mut c, same[1]), (&mut d, same[2])] {
            if same {
                let role = plane.role;
                *plane = Plane { role, offset: a.offset + plane.offset % (moved + 1), ..a };
            }
        }
        let layer = |tokens_per_page, planes| LayerLayout { tokens_per_page, planes };
        KvLayout { pages, layers: vec![layer(tokens.0, vec![a, b]), layer(tokens.1, vec![c, d])] }
    }
}

fn meets_itself(layout: &KvLayout) -> bool {
    let mut seen = HashSet::new();
    !all_bytes(layout).into_iter().all(|byte| seen.insert(byte))
}

fn ends(layout: &KvLayout) -> Vec<u64> {
    let mut ends = vec![0; 2];
    for (region, byte) in all_bytes(layout) {
        let end = &mut ends[usize::from(region)];
        *end = byte.max(*end - u64::from(*end > 0)) + 1;
    }
    ends
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn nothing_that_overlaps_passes(layout in arbitrary_layout()) {
        match layout.validate(&[1 << 20, 1 << 20]) {
            Ok(()) => {
                prop_assert!(!meets_itself(&layout));
                let ends = ends(&layout);
                prop_assert_eq!(layout.validate(&ends), Ok(()));
                for short in 0..2 {
                    if ends[short] > 0 {
                        let mut ends = ends.clone();
                        ends[short] -= 1;
                        let too_short = matches!(
                            layout.validate(&ends),
                            Err(LayoutError::RegionTooShort { needed, have, .. }) if needed == have + 1
                        );
                        prop_assert!(too_short);
                    }
                }
            }
            Err(LayoutError::Stride { .. } | LayoutError::PlanesOverlap { .. }) => {}
            Err(other) => prop_assert!(false, "{}", other),
        }
    }

    /// What an allocator could have made passes, and needs what it takes.
    #[test]
    fn sensible_layouts_pass(model in model(), memory in memory()) {
        let (layout, lengths) = memory.layout(&model);
        prop_assert!(!meets_itself(&layout));
        prop_assert_eq!(layout.validate(&lengths), Ok(()));
        prop_assert_eq!(region_lengths(&layout).unwrap(), lengths);
    }

    #[test]
    fn nothing_from_a_peer_panics(
        layout in arbitrary_layout(),
        extreme in prop::collection::vec(
            (0usize..2, 0usize..2, 0usize..9, prop::sample::select(vec![0, 1, u64::MAX, u64::MAX / 2, 1 << 33])), 1..4),
        pages in prop::sample::select(vec![0, 1, 2, u32::MAX]),
    ) {
        let mut layout = layout;
        layout.pages = pages;
        for (layer, plane, field, value) in extreme {
            let layer = &mut layout.layers[layer];
            let plane = &mut layer.planes[plane];
            match field {
                0 => plane.offset = value,
                1 => plane.page_stride = value,
                2 => plane.token_stride = value,
                3 => plane.head_stride = value,
                4 => plane.head_bytes = value as u32,
                5 => plane.heads.first = value as u32,
                6 => plane.heads.count = value as u32,
                7 => plane.region = value as u16,
                _ => layer.tokens_per_page = value as u32,
            }
        }
        let _ = layout.validate(&[u64::MAX, u64::MAX]);
        let _ = region_lengths(&layout);
        let limits = PlanLimits { max_sge: 1, max_write: 1 };
        if let Ok(planner) = Planner::new(&layout, &layout, HeadRange::new(3, 1), limits) {
            // Only a few bytes: a page may be huge, and is cut into writes of one.
            if planner.bytes_per_page(0).unwrap() < 10_000 {
                let last = layout.pages - 1;
                let mut plan = Plan::default();
                planner.plan(0, &[last], &[last], &mut plan).unwrap();
            }
        }
    }
}

fn pool() -> KvLayout {
    let shape = presets::KvShape {
        layers: 3,
        tokens_per_page: 4,
        heads: HeadRange::new(2, 2),
        head_dim: 8,
        dtype: Dtype::Bf16,
    };
    shape.vllm_flash(10).unwrap()
}

fn refused(change: impl Fn(&mut KvLayout)) -> LayoutError {
    let mut layout = pool();
    change(&mut layout);
    layout.validate(&[2 * 10 * 4 * 32; 3]).unwrap_err()
}

#[test]
fn each_fault_has_its_error() {
    let (layer, role) = (1, PlaneRole::Value);
    assert_eq!(pool().validate(&[2 * 10 * 4 * 32; 3]), Ok(()));
    assert_eq!(
        refused(|l| l.pages = 0),
        LayoutError::Empty { what: "pages" }
    );
    assert_eq!(
        refused(|l| l.layers.clear()),
        LayoutError::Empty { what: "layers" }
    );
    assert_eq!(
        refused(|l| l.layers[1].tokens_per_page = 0),
        LayoutError::EmptyLayer {
            layer,
            what: "tokens"
        }
    );
    assert_eq!(
        refused(|l| l.layers[1].planes.clear()),
        LayoutError::EmptyLayer {
            layer,
            what: "planes"
        }
    );
    assert_eq!(
        refused(|l| l.layers[1].planes[1].heads.count = 0),
        LayoutError::EmptyPlane {
            layer,
            role,
            what: "heads"
        }
    );
    assert_eq!(
        refused(|l| l.layers[1].planes[1].head_bytes = 0),
        LayoutError::EmptyPlane {
            layer,
            role,
            what: "bytes per head"
        }
    );
    assert_eq!(
        refused(|l| l.layers[1].planes[1].head_bytes = 15),
        LayoutError::PartialElement {
            layer,
            role,
            head_bytes: 15,
            element: 2
        }
    );
    assert_eq!(
        refused(|l| l.layers[1].planes[0].role = role),
        LayoutError::DuplicateRole { layer, role }
    );
    assert_eq!(
        refused(|l| l.layers[1].planes[1].region = 3),
        LayoutError::NoSuchRegion {
            layer,
            role,
            region: 3,
            regions: 3
        }
    );
    assert_eq!(
        refused(|l| l.layers[1].planes[1].offset += 1),
        LayoutError::RegionTooShort {
            layer,
            role,
            region: 1,
            needed: 2561,
            have: 2560
        }
    );
    assert_eq!(
        refused(|l| l.layers[1].planes[1].page_stride = u64::MAX / 4),
        LayoutError::Overflow { layer, role }
    );
    assert_eq!(
        refused(|l| l.layers[1].planes[1].token_stride = 31),
        LayoutError::Stride {
            layer,
            role,
            dimension: Dimension::Token,
            stride: 31,
            needed: 32
        }
    );
    assert_eq!(
        refused(|l| l.layers[1].planes[1].offset -= 1),
        LayoutError::PlanesOverlap {
            region: 1,
            first: (1, PlaneRole::Key),
            second: (1, role)
        }
    );
}

#[test]
fn limits_hold() {
    let limit = |error| match error {
        LayoutError::Limit { what, value, limit } if value == limit + 1 => what,
        other => panic!("{other}"),
    };
    let what = |change: &dyn Fn(&mut KvLayout)| limit(refused(change));
    assert_eq!(
        what(&|l| l.layers = vec![l.layers[0].clone(); 1025]),
        "layers"
    );
    assert_eq!(
        what(&|l| l.layers[1].planes = vec![l.layers[1].planes[0]; 9]),
        "planes in a layer"
    );
    assert_eq!(
        what(&|l| l.layers[0].tokens_per_page = (1 << 20) + 1),
        "tokens in a page"
    );
    assert_eq!(
        what(&|l| l.layers[0].planes[0].heads = HeadRange::new(65_535, 2)),
        "heads"
    );
    assert_eq!(limit(pool().validate(&[0; 4097]).unwrap_err()), "regions");
    let beyond = refused(|l| l.layers[0].planes[0].region = 4096);
    assert!(matches!(
        beyond,
        LayoutError::NoSuchRegion { region: 4096, .. }
    ));
}

/// A layout that folds as deep as possible is refused in time.
#[test]
fn hostile_nesting_is_bounded() {
    let layers = (0..1024u64)
        .map(|layer| LayerLayout {
            tokens_per_page: 2,
            planes: vec![Plane {
                role: PlaneRole::Key,
                dtype: Dtype::U8,
                region: 0,
                offset: 1024 - layer,
                page_stride: 1 << 30,
                token_stride: 4096 + layer,
                head_stride: 0,
                head_bytes: 1,
                heads: HeadRange::new(0, 1),
            }],
        })
        .collect();
    let layout = KvLayout {
        pages: u32::MAX,
        layers,
    };
    let _ = layout.validate(&[u64::MAX]);
    assert!(matches!(
        layout.validate(&[1]),
        Err(LayoutError::PlanesOverlap { .. } | LayoutError::RegionTooShort { .. })
    ));
}
