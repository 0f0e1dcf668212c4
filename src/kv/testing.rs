//! Random layouts for the property tests of this layer, and the naive reading of a layout they are compared with.

use proptest::prelude::*;

use super::{Dtype, HeadRange, KvLayout, LayerLayout, Plane, PlaneRole};

/// What both sides of a push have in common.
#[derive(Clone, Debug)]
pub(super) struct Model {
    /// Tokens of a page, for each layer.
    pub(super) tokens: Vec<u32>,
    pub(super) roles: Vec<(PlaneRole, u32)>,
    /// The heads to push.
    pub(super) heads: HeadRange,
}

/// How one side puts the model in memory.
#[derive(Clone, Debug)]
pub(super) struct Memory {
    pub(super) pages: u32,
    /// Heads held before and after those of the model.
    more_heads: (u32, u32),
    /// Axes from the innermost: 0 head, 1 token, 2 page.
    pub(super) order: [usize; 3],
    /// Padding before each axis repeats.
    pads: [u64; 3],
    /// How many axes are inside of the interleaving of planes.
    level: usize,
    fuse: Fuse,
    offset: u64,
    gap: u64,
    /// Whether everything lies in one region.
    one_region: bool,
    /// Whether the planes of a layer lie in the opposite order.
    reversed: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fuse {
    /// Each plane for itself.
    Planes,
    /// The planes of a layer interleaved.
    Layer,
    /// All planes of all layers interleaved.
    All,
}

pub(super) fn model() -> impl Strategy<Value = Model> {
    use PlaneRole::{Auxiliary, Key, KeyScale, Latent, Value};
    let roles = prop::sample::select(vec![
        vec![(Key, 6), (Value, 6)],
        vec![(Latent, 7)],
        vec![(Key, 4), (Value, 4), (KeyScale, 2)],
        vec![(Value, 3), (Auxiliary, 2), (Key, 5)],
    ]);
    let tokens = prop_oneof![
        prop::collection::vec(1u32..=5, 1..=3),
        (1u32..=5, 1usize..=3).prop_map(|(tokens, layers)| vec![tokens; layers]),
    ];
    (roles, tokens, 2u32..5, 1u32..=4).prop_map(|(roles, tokens, first, count)| Model {
        heads: if roles[0].0 == Latent {
            HeadRange::new(0, 1)
        } else {
            HeadRange::new(first, count)
        },
        tokens,
        roles,
    })
}

pub(super) fn memory() -> impl Strategy<Value = Memory> {
    let orders = vec![
        [0, 1, 2],
        [1, 0, 2],
        [0, 2, 1],
        [1, 2, 0],
        [2, 0, 1],
        [2, 1, 0],
    ];
    let order =
        prop_oneof![2 => Just([0, 1, 2]), 1 => Just([1, 0, 2]), 1 => prop::sample::select(orders)];
    let pads = prop_oneof![2 => Just([0; 3]), 1 => [0u64..3, 0u64..3, 0u64..5]];
    let fuse = prop::sample::select(vec![Fuse::Planes, Fuse::Layer, Fuse::All]);
    let more = prop_oneof![Just((0, 0)), (0u32..3, 0u32..3)];
    (
        (1u32..=9, more, order, pads),
        (0usize..=3, fuse, 0u64..9, 0u64..9, any::<[bool; 2]>()),
    )
        .prop_map(
            |(
                (pages, more_heads, order, pads),
                (level, fuse, offset, gap, [one_region, reversed]),
            )| Memory {
                pages,
                more_heads,
                order,
                pads,
                level,
                fuse,
                offset,
                gap,
                one_region,
                reversed,
            },
        )
}

impl Memory {
    /// The layout of `model`, with lengths of its regions.
    pub(super) fn layout(&self, model: &Model) -> (KvLayout, Vec<u64>) {
        let heads_of = |role| match role {
            PlaneRole::Latent | PlaneRole::Auxiliary => HeadRange::new(0, 1),
            _ => HeadRange::new(
                model.heads.first - self.more_heads.0,
                model.heads.count + self.more_heads.0 + self.more_heads.1,
            ),
        };
        let plane = |&(role, head_bytes): &(PlaneRole, u32)| Plane {
            role,
            dtype: Dtype::U8,
            region: 0,
            offset: 0,
            page_stride: 0,
            token_stride: 0,
            head_stride: 0,
            head_bytes,
            heads: heads_of(role),
        };
        let mut layers: Vec<LayerLayout> = model
            .tokens
            .iter()
            .map(|&tokens_per_page| LayerLayout {
                tokens_per_page,
                planes: model.roles.iter().map(plane).collect(),
            })
            .collect();

        if self.reversed {
            layers.iter_mut().for_each(|layer| layer.planes.reverse());
        }

        // Planes are interleaved only with planes of the same shape.
        let mut groups: Vec<Vec<(usize, usize)>> = Vec::new();
        for (l, layer) in layers.iter().enumerate() {
            for (p, plane) in layer.planes.iter().enumerate() {
                let joins = |&(ol, op): &(usize, usize)| {
                    let (other_layer, other) = (&layers[ol], &layers[ol].planes[op]);
                    let allowed = match self.fuse {
                        Fuse::Planes => false,
                        Fuse::Layer => ol == l,
                        Fuse::All => true,
                    };
                    allowed
                        && other_layer.tokens_per_page == layer.tokens_per_page
                        && other.heads == plane.heads
                };
                match groups.iter_mut().find(|group| joins(&group[0])) {
                    Some(group) => group.push((l, p)),
                    None => groups.push(vec![(l, p)]),
                }
            }
        }

        let mut lengths = vec![0u64];
        for group in groups {
            let tokens = layers[group[0].0].tokens_per_page;
            let heads = layers[group[0].0].planes[group[0].1].heads.count;
            let counts = [u64::from(heads), u64::from(tokens), u64::from(self.pages)];
            if !self.one_region && lengths[lengths.len() - 1] != 0 {
                lengths.push(0);
            }
            let region = lengths.len() - 1;
            let mut start = lengths[region]
                + if lengths[region] == 0 {
                    self.offset
                } else {
                    self.gap
                };
            let group_start = start;
            // Each plane by itself up to `level`, side by side, then all together.
            for &(l, p) in &group {
                let plane = &mut layers[l].planes[p];
                let mut extent = u64::from(plane.head_bytes);
                plane.region = region as u16;
                plane.offset = start;
                for &axis in &self.order[..self.level] {
                    extent = repeat(plane, axis, counts[axis], extent + self.pads[axis], extent);
                }
                start += extent;
            }
            let mut extent = start - group_start;
            for &axis in &self.order[self.level..] {
                let stride = extent + self.pads[axis];
                let whole = stride * (counts[axis] - 1) + extent;
                for &(l, p) in &group {
                    repeat(&mut layers[l].planes[p], axis, counts[axis], stride, extent);
                }
                extent = whole;
            }
            lengths[region] = group_start + extent;
        }
        let layout = KvLayout {
            pages: self.pages,
            layers,
        };
        (layout, lengths)
    }
}

fn repeat(plane: &mut Plane, axis: usize, count: u64, stride: u64, extent: u64) -> u64 {
    match axis {
        0 => plane.head_stride = stride,
        1 => plane.token_stride = stride,
        _ => plane.page_stride = stride,
    }
    stride * (count - 1) + extent
}

/// The first byte of one head of one token, by the definition of a layout.
pub(super) fn head_offset(plane: &Plane, page: u32, token: u32, head: u32) -> u64 {
    plane.offset
        + u64::from(page) * plane.page_stride
        + u64::from(token) * plane.token_stride
        + u64::from(head - plane.heads.first) * plane.head_stride
}

/// All bytes of a layout as (region, offset), by its definition.
pub(super) fn all_bytes(layout: &KvLayout) -> Vec<(u16, u64)> {
    let mut bytes = Vec::new();
    for layer in &layout.layers {
        for plane in &layer.planes {
            for page in 0..layout.pages {
                for token in 0..layer.tokens_per_page {
                    for head in plane.heads.first..plane.heads.end() as u32 {
                        let first = head_offset(plane, page, token, head);
                        bytes.extend(
                            (0..u64::from(plane.head_bytes)).map(|b| (plane.region, first + b)),
                        );
                    }
                }
            }
        }
    }
    bytes
}
