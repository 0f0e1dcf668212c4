//! The planner against a naive byte mover.
//!
//! Memory is modelled with a unique number in the place of each byte, so that a wrong byte cannot pass for the right
//! one. [`check`] is what judges plans; `faults_are_found` proves that it can say no.

use proptest::prelude::*;

use super::*;
use crate::kv::models;
use crate::kv::presets::{Arrangement, HeadOrder, KvShape, Stacking};
use crate::kv::testing::{Memory, Model, head_offset, memory, model};
use crate::kv::{Dtype, KvLayout, PlaneRole, region_lengths};

type Cells = Vec<Vec<u64>>;

const POISON: u64 = u64::MAX;

fn numbered_cells(lengths: &[u64]) -> Cells {
    let mut next = 0..;
    lengths
        .iter()
        .map(|&length| next.by_ref().take(length as usize).collect())
        .collect()
}

fn poisoned_cells(lengths: &[u64]) -> Cells {
    lengths
        .iter()
        .map(|&length| vec![POISON; length as usize])
        .collect()
}

struct Case {
    source: KvLayout,
    destination: KvLayout,
    source_lengths: Vec<u64>,
    destination_lengths: Vec<u64>,
    heads: HeadRange,
    limits: PlanLimits,
    layer: u32,
    source_pages: Vec<u32>,
    destination_pages: Vec<u32>,
}

/// What has to be written: for each cell of the destination the source's number and the page's position.
struct Expected {
    cells: Cells,
    positions: Cells,
}

impl Case {
    fn plan(&self) -> Plan {
        let planner =
            Planner::new(&self.source, &self.destination, self.heads, self.limits).unwrap();
        let mut plan = Plan::default();
        planner
            .plan(
                self.layer,
                &self.source_pages,
                &self.destination_pages,
                &mut plan,
            )
            .unwrap();
        let bytes = planner.bytes_per_page(self.layer).unwrap();
        assert_eq!(plan.bytes(), bytes * self.source_pages.len() as u64);
        plan
    }

    /// Moves byte by byte, from the definition of a layout.
    fn naive(&self) -> Expected {
        let from = numbered_cells(&self.source_lengths);
        let mut cells = poisoned_cells(&self.destination_lengths);
        let mut positions = cells.clone();
        let layer = self.layer as usize;
        for (position, (&sp, &dp)) in self
            .source_pages
            .iter()
            .zip(&self.destination_pages)
            .enumerate()
        {
            for source in &self.source.layers[layer].planes {
                let destination = &self.destination.layers[layer].planes;
                let destination = destination
                    .iter()
                    .find(|plane| plane.role == source.role)
                    .unwrap();
                let whole = source.role == PlaneRole::Auxiliary;
                let heads = if whole { source.heads } else { self.heads };
                for head in heads.first..heads.end() as u32 {
                    for token in 0..self.source.layers[layer].tokens_per_page {
                        for byte in 0..u64::from(source.head_bytes) {
                            let s = (head_offset(source, sp, token, head) + byte) as usize;
                            let d = (head_offset(destination, dp, token, head) + byte) as usize;
                            let region = usize::from(destination.region);
                            assert_eq!(
                                cells[region][d], POISON,
                                "the case itself writes a byte twice"
                            );
                            cells[region][d] = from[usize::from(source.region)][s];
                            positions[region][d] = position as u64;
                        }
                    }
                }
            }
        }
        Expected { cells, positions }
    }

    /// Applies the plan and compares with the naive mover.
    fn check(&self, plan: &Plan) -> Result<(), String> {
        let expected = self.naive();
        let from = numbered_cells(&self.source_lengths);
        let mut cells = poisoned_cells(&self.destination_lengths);
        let mut used = vec![false; plan.sources.len()];
        for write in &plan.writes {
            let sources = plan.sources_of(write);
            if sources.len() != write.source_count as usize {
                return Err(format!("{write:?} has sources outside of the plan"));
            }
            let first = write.first_source as usize;
            for used in &mut used[first..first + sources.len()] {
                if std::mem::replace(used, true) {
                    return Err(format!("{write:?} shares a source with another"));
                }
            }
            let total: u64 = sources.iter().map(|run| u64::from(run.length)).sum();
            let in_limits = (1..=self.limits.max_sge).contains(&write.source_count)
                && (1..=self.limits.max_write).contains(&write.length);
            if total != u64::from(write.length)
                || !in_limits
                || sources.iter().any(|run| run.length == 0)
            {
                return Err(format!(
                    "{write:?} breaks {:?} or its sources' sum {total}",
                    self.limits
                ));
            }
            let positions = expected.positions.get(usize::from(write.region));
            if positions.and_then(|p| p.get(write.offset as usize))
                != Some(&u64::from(write.first_page))
            {
                return Err(format!("{write:?} does not begin in that page"));
            }
            let mut at = write.offset as usize;
            for run in sources {
                for i in 0..run.length as usize {
                    let number = from
                        .get(usize::from(run.region))
                        .and_then(|region| region.get(run.offset as usize + i))
                        .ok_or(format!("{run:?} is outside of its region"))?;
                    let cell = cells
                        .get_mut(usize::from(write.region))
                        .and_then(|region| region.get_mut(at))
                        .ok_or(format!("{write:?} is outside of its region"))?;
                    if *cell != POISON {
                        return Err(format!("{write:?} writes byte {at} again"));
                    }
                    *cell = *number;
                    at += 1;
                }
            }
        }
        if used.contains(&false) {
            return Err("sources without a write".into());
        }
        for (region, (have, want)) in cells.iter().zip(&expected.cells).enumerate() {
            if let Some(at) = have.iter().zip(want).position(|(have, want)| have != want) {
                return Err(format!(
                    "byte {at} of region {region} is {} and should be {}",
                    have[at], want[at]
                ));
            }
        }
        Ok(())
    }

    /// The fewest writes if they may be taken in any order, from the map of bytes.
    fn fewest(&self) -> usize {
        let expected = self.naive();
        let (mut writes, mut length, mut runs) = (0, 0, 0);
        for region in &expected.cells {
            let mut last = POISON;
            for &cell in region {
                if cell != POISON {
                    let follows = last != POISON && cell == last + 1;
                    runs += u32::from(!follows);
                    if last == POISON
                        || length == self.limits.max_write
                        || runs > self.limits.max_sge
                    {
                        (writes, length, runs) = (writes + 1, 0, 1);
                    }
                    length += 1;
                }
                last = cell;
            }
        }
        writes
    }
}

/// No write could have taken the beginning of the next, and no run that of the next.
fn check_merged(plan: &Plan, limits: PlanLimits) -> Result<(), String> {
    for pair in plan.writes.windows(2) {
        let adjacent = pair[0].region == pair[1].region
            && pair[0].offset + u64::from(pair[0].length) == pair[1].offset;
        let full = pair[0].length == limits.max_write || pair[0].source_count == limits.max_sge;
        if adjacent && !full {
            return Err(format!("{pair:?} could be one write"));
        }
    }
    for write in &plan.writes {
        for pair in plan.sources_of(write).windows(2) {
            if pair[0].region == pair[1].region
                && pair[0].offset + u64::from(pair[0].length) == pair[1].offset
            {
                return Err(format!("{pair:?} could be one run"));
            }
        }
    }
    Ok(())
}

prop_compose! {
    fn case()(model in model(), from in memory(), to in memory())(
        destination_pages in prop::sample::subsequence((0..to.pages).collect::<Vec<_>>(), 0..=to.pages as usize),
        shuffled in Just((0..to.pages).collect::<Vec<_>>()).prop_shuffle(),
        random in prop::collection::vec(0..from.pages, to.pages as usize),
        style in 0..4,
        layer in 0..model.tokens.len() as u32,
        max_sge in 1u32..=30,
        max_write in prop_oneof![1u32..64, 1u32..5000, Just(u32::MAX)],
        (model, from, to) in Just((model, from, to)),
    ) -> (Case, Memory) {
        build(&model, &from, &to, layer, PlanLimits { max_sge, max_write }, match style {
            0 => (random[..destination_pages.len()].to_vec(), destination_pages),
            1 => (random, shuffled),
            2 => ((0..from.pages.min(to.pages)).collect(), (0..from.pages.min(to.pages)).collect()),
            _ => (vec![random[0]], vec![shuffled[0]]),
        })
    }
}

fn build(
    model: &Model,
    from: &Memory,
    to: &Memory,
    layer: u32,
    limits: PlanLimits,
    (source_pages, destination_pages): (Vec<u32>, Vec<u32>),
) -> (Case, Memory) {
    let (source, source_lengths) = from.layout(model);
    let (destination, destination_lengths) = to.layout(model);
    let case = Case {
        source,
        destination,
        source_lengths,
        destination_lengths,
        heads: model.heads,
        limits,
        layer,
        source_pages,
        destination_pages,
    };
    (case, to.clone())
}

impl std::fmt::Debug for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?} {:?} ", self.heads, self.limits)?;
        write!(
            f,
            "layer {} pages {:?} -> {:?} ",
            self.layer, self.source_pages, self.destination_pages
        )?;
        write!(f, "from {:?} to {:?}", self.source, self.destination)
    }
}

/// Ways to get a plan wrong by a little; `at` chooses the write.
fn spoil(plan: &mut Plan, way: u32, at: usize) {
    let at = at % plan.writes.len();
    let first = plan.writes[at].first_source as usize;
    match way {
        0 => plan.writes[at].offset += 1,
        1 => plan.sources[first].offset += 1,
        2 => {
            plan.writes[at].length -= 1;
            plan.sources[first].length -= 1;
        }
        3 => {
            plan.writes[at].length += 1;
            plan.sources[first].length += 1;
        }
        4 => drop(plan.writes.remove(at)),
        5 => plan.writes.push(plan.writes[at]),
        6 => plan.writes[at].region += 1,
        7 => plan.sources[first].region += 1,
        8 => plan.writes[at].length -= 1,
        9 => plan.writes[at].first_source += 1,
        _ => plan.writes[at].first_page += 1,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn moves_what_the_naive_mover_moves((case, to) in case()) {
        prop_assert_eq!(case.source.validate(&case.source_lengths), Ok(()));
        prop_assert_eq!(case.destination.validate(&case.destination_lengths), Ok(()));
        let plan = case.plan();
        case.check(&plan).map_err(TestCaseError::fail)?;
        check_merged(&plan, case.limits).map_err(TestCaseError::fail)?;
        // One page whose bytes come before those of the next: no order of its pieces is better.
        if case.destination_pages.len() == 1 && (to.order[2] == 2 || to.pages == 1) {
            prop_assert_eq!(plan.writes.len(), case.fewest());
        }
    }

    #[test]
    fn faults_are_found((case, _) in case(), way in 0u32..=10, at in any::<usize>()) {
        let mut plan = case.plan();
        prop_assume!(!plan.writes.is_empty());
        spoil(&mut plan, way, at);
        prop_assert!(case.check(&plan).is_err());
    }
}

fn shape(heads: HeadRange) -> KvShape {
    KvShape {
        layers: 2,
        tokens_per_page: 4,
        heads,
        head_dim: 8,
        dtype: Dtype::Bf16,
    }
}

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

const WIDE: PlanLimits = PlanLimits {
    max_sge: 30,
    max_write: 1 << 30,
};
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
