//! Compiles two layouts into the pieces a page falls into.
//!
//! Matching planes whose destination pages alternate in memory (K and V interleaved by page or finer) form a *group*,
//! so that their pieces can be put in destination order and merged. A group's pieces are relative to the page, and
//! layers of the same geometry share them. Invariant: `pieces` is sorted by destination, and no two neighbours are
//! contiguous at both ends.

use std::collections::HashMap;
use std::sync::Arc;

use super::{PlanError, PlanLimits, Side};
use crate::kv::{HeadRange, KvLayout, LayerLayout, Plane, PlaneRole};

/// Pieces over all distinct geometries of a planner: bounds memory (32 bytes each) and work for a peer's layout. A page
/// of 1024 tokens and 128 heads in the opposite head order, K and V, is 2^18.
const MAX_PIECES: usize = 1 << 20;

/// One layer.
#[derive(Debug)]
pub(super) struct LayerPlan {
    pub(super) groups: Vec<Group>,
    /// Bytes of a page.
    pub(super) bytes: u64,
    /// Upper bound of source runs of a page.
    pub(super) pieces: u64,
}

/// Planes of a layer whose destination pages alternate.
#[derive(Debug)]
pub(super) struct Group {
    pub(super) region: u16,
    pub(super) base: u64,
    pub(super) page_stride: u64,
    /// Where pieces come from; [`Piece::slot`] says which.
    pub(super) slots: Vec<Slot>,
    pub(super) pieces: Arc<[Piece]>,
    /// Every piece is followed by its own of the next page, so pages are the inner loop.
    pub(super) page_inner: bool,
}

/// Source planes that advance together: same region, same page stride.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slot {
    pub(super) region: u16,
    pub(super) base: u64,
    pub(super) page_stride: u64,
}

/// A range of a page that is contiguous at both ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    /// From the group's base.
    pub(super) destination: u64,
    /// From the slot's base.
    pub(super) source: u64,
    pub(super) length: u64,
    pub(super) slot: u8,
}

/// Two planes of the same role, and the heads that go from one to the other.
struct Match<'a> {
    source: &'a Plane,
    destination: &'a Plane,
    heads: HeadRange,
    tokens: u32,
}

impl Match<'_> {
    /// First byte of page 0 that goes.
    fn start(&self, plane: &Plane) -> u64 {
        plane.offset + u64::from(self.heads.first - plane.heads.first) * plane.head_stride
    }

    fn destination_start(&self) -> u64 {
        self.start(self.destination)
    }

    /// Bytes of the destination from the first to one past the last byte of a page.
    fn destination_span(&self) -> u64 {
        u64::from(self.tokens - 1) * stride(self.tokens, self.destination.token_stride)
            + u64::from(self.heads.count - 1)
                * stride(self.heads.count, self.destination.head_stride)
            + u64::from(self.destination.head_bytes)
    }

    fn bytes(&self) -> u64 {
        u64::from(self.tokens) * u64::from(self.heads.count) * u64::from(self.source.head_bytes)
    }
}

/// The stride of an axis, 0 if it has one step: then the value was never checked and means nothing.
fn stride(count: u32, stride: u64) -> u64 {
    if count > 1 { stride } else { 0 }
}

/// A match without what does not shape its pieces.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Geometry {
    slot: u8,
    destination: u64,
    source: u64,
    bytes: u64,
    /// (count, destination stride, source stride).
    tokens: (u32, u64, u64),
    heads: (u32, u64, u64),
}

type Cache = HashMap<Vec<Geometry>, Arc<[Piece]>>;

/// Compiles all layers of two layouts that have passed [`KvLayout::check`].
pub(super) fn layers(
    source: &KvLayout,
    destination: &KvLayout,
    heads: HeadRange,
    limits: PlanLimits,
) -> Result<Vec<LayerPlan>, PlanError> {
    if source.layers.len() != destination.layers.len() {
        return Err(PlanError::LayerCount(
            source.layers.len(),
            destination.layers.len(),
        ));
    }
    let mut cache = Cache::new();
    let mut budget = MAX_PIECES;
    let mut plans = Vec::with_capacity(source.layers.len());
    for (layer, (from, to)) in (0u32..).zip(source.layers.iter().zip(&destination.layers)) {
        let mut matches = matches(layer, from, to, heads)?;
        let bytes = matches
            .iter()
            .map(Match::bytes)
            .fold(0, u64::saturating_add);
        let period = |m: &Match<'_>| stride(destination.pages, m.destination.page_stride);
        matches.sort_by_key(|m| (m.destination.region, period(m), m.destination_start()));
        let mut groups = Vec::new();
        let mut rest = matches.as_slice();
        while !rest.is_empty() {
            let (members, others) = rest.split_at(group_size(rest, destination.pages));
            rest = others;
            let too_many = PlanError::TooManyPieces {
                layer,
                limit: MAX_PIECES,
            };
            groups.push(group(members, &mut cache, &mut budget).ok_or(too_many)?);
        }
        // A piece is cut at most once per `max_write` bytes, and once more where it meets a fuller write.
        let pieces = groups
            .iter()
            .flat_map(|group| group.pieces.iter())
            .map(|piece| piece.length / u64::from(limits.max_write) + 2)
            .fold(0, u64::saturating_add);
        plans.push(LayerPlan {
            groups,
            bytes,
            pieces,
        });
    }
    Ok(plans)
}

fn matches<'a>(
    layer: u32,
    from: &'a LayerLayout,
    to: &'a LayerLayout,
    heads: HeadRange,
) -> Result<Vec<Match<'a>>, PlanError> {
    if from.tokens_per_page != to.tokens_per_page {
        return Err(PlanError::TokensPerPage {
            layer,
            tokens: (from.tokens_per_page, to.tokens_per_page),
        });
    }
    let find = |planes: &'a [Plane], role| planes.iter().find(|plane| plane.role == role);
    if let Some(plane) = to
        .planes
        .iter()
        .find(|plane| find(&from.planes, plane.role).is_none())
    {
        return Err(PlanError::MissingPlane {
            layer,
            role: plane.role,
            missing_at: Side::Source,
        });
    }
    let mut matches = Vec::with_capacity(from.planes.len());
    for source in &from.planes {
        let role = source.role;
        let destination = find(&to.planes, role).ok_or(PlanError::MissingPlane {
            layer,
            role,
            missing_at: Side::Destination,
        })?;
        if source.dtype != destination.dtype {
            let dtypes = (source.dtype, destination.dtype);
            return Err(PlanError::Dtype {
                layer,
                role,
                dtypes,
            });
        }
        if source.head_bytes != destination.head_bytes {
            let bytes = (source.head_bytes, destination.head_bytes);
            return Err(PlanError::HeadBytes { layer, role, bytes });
        }
        let whole = role == PlaneRole::Auxiliary;
        let wanted = if whole { source.heads } else { heads };
        for (side, plane) in [(Side::Source, source), (Side::Destination, destination)] {
            if !plane.heads.contains(wanted) || (whole && plane.heads != wanted) {
                let have = plane.heads;
                return Err(PlanError::Heads {
                    layer,
                    role,
                    side,
                    wanted,
                    have,
                });
            }
        }
        matches.push(Match {
            source,
            destination,
            heads: wanted,
            tokens: from.tokens_per_page,
        });
    }
    Ok(matches)
}

/// How many of the matches, sorted by destination, lie in the same page-long stretch of the same region as the first.
fn group_size(matches: &[Match<'_>], pages: u32) -> usize {
    let Some(first) = matches.first() else {
        return 0;
    };
    let (plane, start) = (first.destination, first.destination_start());
    let fits = |m: &&Match<'_>| {
        m.destination.region == plane.region
            && (pages == 1
                || m.destination.page_stride == plane.page_stride
                    && m.destination_start() - start + m.destination_span() <= plane.page_stride)
    };
    1 + matches[1..].iter().take_while(fits).count()
}

/// Nothing if the pieces exceed the budget.
fn group(members: &[Match<'_>], cache: &mut Cache, budget: &mut usize) -> Option<Group> {
    let first = members.first()?;
    let base = first.destination_start();
    let mut slots: Vec<Slot> = Vec::new();
    let mut geometry = Vec::with_capacity(members.len());
    for m in members {
        let (region, page_stride, start) =
            (m.source.region, m.source.page_stride, m.start(m.source));
        let same = |slot: &Slot| slot.region == region && slot.page_stride == page_stride;
        let slot = slots.iter().position(same).unwrap_or_else(|| {
            slots.push(Slot {
                region,
                base: start,
                page_stride,
            });
            slots.len() - 1
        });
        slots[slot].base = slots[slot].base.min(start);
        let axis = |count, to, from| (count, stride(count, to), stride(count, from));
        geometry.push(Geometry {
            slot: slot as u8,
            destination: m.destination_start() - base,
            source: start,
            bytes: u64::from(m.source.head_bytes),
            tokens: axis(m.tokens, m.destination.token_stride, m.source.token_stride),
            heads: axis(
                m.heads.count,
                m.destination.head_stride,
                m.source.head_stride,
            ),
        });
    }
    for g in &mut geometry {
        g.source -= slots[usize::from(g.slot)].base;
    }
    let pieces = match cache.get(&geometry) {
        Some(pieces) => pieces.clone(),
        None => {
            let pieces: Arc<[Piece]> = pieces(&geometry, budget)?.into();
            cache.insert(geometry, pieces.clone());
            pieces
        }
    };
    let page_stride = first.destination.page_stride;
    Some(Group {
        region: first.destination.region,
        base,
        page_stride,
        slots,
        page_inner: pieces.len() > 1 && pieces.iter().all(|piece| piece.length == page_stride),
        pieces,
    })
}

/// All pieces of a page, in destination order, merged. Nothing if there are more than `budget`, which is used up.
fn pieces(geometry: &[Geometry], budget: &mut usize) -> Option<Vec<Piece>> {
    let mut all = Vec::new();
    for g in geometry {
        let mut axes = [g.tokens, g.heads];
        axes.sort_by_key(|&(_, destination, _)| destination);
        let mut length = g.bytes;
        for (count, to, from) in &mut axes {
            if *count > 1 && *to == length && *from == length {
                length *= u64::from(*count);
                *count = 1;
            } else if *count > 1 {
                break;
            }
        }
        let [inner, outer] = axes;
        let expanded = usize::try_from(u64::from(inner.0) * u64::from(outer.0)).ok()?;
        *budget = budget.checked_sub(expanded)?;
        for o in 0..u64::from(outer.0) {
            all.extend((0..u64::from(inner.0)).map(|i| Piece {
                destination: g.destination + o * outer.1 + i * inner.1,
                source: g.source + o * outer.2 + i * inner.2,
                length,
                slot: g.slot,
            }));
        }
    }
    all.sort_by_key(|piece| piece.destination);
    let merge = |next: &mut Piece, last: &mut Piece| {
        let contiguous = next.slot == last.slot
            && next.destination == last.destination + last.length
            && next.source == last.source + last.length;
        if contiguous {
            last.length += next.length;
        }
        contiguous
    };
    all.dedup_by(merge);
    Some(all)
}
