//! The planner: which bytes of a source cache go where in a destination cache, as few, large writes.
//!
//! [`Planner::new`] compares two layouts once and compiles, for each layer, how a page of one maps to a page of the
//! other. [`Planner::plan`] then turns lists of pages into writes. Each write is one contiguous range of a destination
//! region, gathered from a few contiguous ranges (*runs*) of source regions.
//!
//! Invariants: every byte of the heads asked for, of every page given, is written exactly once and no other byte is;
//! every write keeps the [`PlanLimits`]; on an error nothing is appended. Planning the same amount again into a
//! cleared [`Plan`] allocates nothing. A planner is immutable and may be shared between threads.

mod compile;
mod emit;
mod error;
#[cfg(test)]
mod tests;
mod translation;

pub use error::{PlanError, Side};
pub(crate) use translation::Translation;

use super::{HeadRange, KvLayout};
use compile::LayerPlan;
use emit::Emitter;

/// What one write may be at most: the least of what the devices on its way allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PlanLimits {
    /// Source runs of one write (scatter/gather elements; `max_sge` of `ibv_query_device(3)`), at least 1.
    pub max_sge: u32,
    /// Bytes of one write (at most `max_msg_sz` of the port), at least 1.
    pub max_write: u32,
}

/// One contiguous range of a destination region, written from `sources[first_source ..][.. source_count]` of the same
/// [`Plan`], one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlannedWrite {
    /// Destination region.
    pub region: u16,
    /// First byte in it.
    pub offset: u64,
    /// Bytes; the sum of its sources' lengths.
    pub length: u32,
    /// First source run.
    pub first_source: u32,
    /// Number of source runs.
    pub source_count: u32,
    /// Position, in the lists given to [`Planner::plan`], of the page its first byte belongs to.
    pub first_page: u32,
}

/// One contiguous range of a source region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SourceRun {
    /// Source region.
    pub region: u16,
    /// First byte in it.
    pub offset: u64,
    /// Bytes.
    pub length: u32,
}

/// Writes and the runs they gather. Keep one and [`Plan::clear`] it between uses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// The writes, in no promised order.
    pub writes: Vec<PlannedWrite>,
    /// The runs of all writes.
    pub sources: Vec<SourceRun>,
}

impl Plan {
    /// Forgets the writes and keeps the memory.
    pub fn clear(&mut self) {
        self.writes.clear();
        self.sources.clear();
    }

    /// The runs that `write` gathers; nothing if it is not of this plan.
    pub fn sources_of(&self, write: &PlannedWrite) -> &[SourceRun] {
        let first = write.first_source as usize;
        first
            .checked_add(write.source_count as usize)
            .and_then(|end| self.sources.get(first..end))
            .unwrap_or_default()
    }

    /// Bytes of all writes.
    pub fn bytes(&self) -> u64 {
        self.writes
            .iter()
            .map(|write| u64::from(write.length))
            .sum()
    }
}

/// The compiled mapping from one layout to another.
#[derive(Debug)]
pub struct Planner {
    source_pages: u32,
    destination_pages: u32,
    limits: PlanLimits,
    layers: Vec<LayerPlan>,
}

impl Planner {
    /// Compiles how `heads` of every layer go from `source` to `destination`.
    ///
    /// Planes are matched by role. `heads` selects from all planes but auxiliary ones, which have no heads in the
    /// model's sense: they go whole, and both sides must hold the same of them.
    ///
    /// # Errors
    /// Either layout is impossible ([`PlanError::Layout`]), they differ in a way that no copy can bridge, a side does
    /// not hold all of `heads`, a limit is 0, or a page falls into too many pieces ([`PlanError::TooManyPieces`]).
    pub fn new(
        source: &KvLayout,
        destination: &KvLayout,
        heads: HeadRange,
        limits: PlanLimits,
    ) -> Result<Self, PlanError> {
        if limits.max_sge == 0 || limits.max_write == 0 {
            return Err(PlanError::Limits { limits });
        }
        for (side, layout) in [(Side::Source, source), (Side::Destination, destination)] {
            layout
                .check()
                .map_err(|error| PlanError::Layout { side, error })?;
        }
        Ok(Self {
            source_pages: source.pages,
            destination_pages: destination.pages,
            limits,
            layers: compile::layers(source, destination, heads, limits)?,
        })
    }

    /// Makes `out` say where the writes and runs of a plan of layer `from` lie when the same pages of layer `to` are
    /// meant. Returns whether one is the other, moved; otherwise `out` says nothing.
    pub(crate) fn translate(&self, from: u32, to: u32, out: &mut Translation) -> bool {
        let layer = |layer: u32| self.layers.get(layer as usize);
        match (layer(from), layer(to)) {
            (Some(from), Some(to)) => out.fill(from, to),
            _ => false,
        }
    }

    /// Number of layers.
    pub fn layers(&self) -> u32 {
        self.layers.len() as u32
    }

    /// The limits given to [`Planner::new`].
    pub fn limits(&self) -> PlanLimits {
        self.limits
    }

    /// Bytes that go from a page to a page of `layer`; nothing if there is no such layer.
    pub fn bytes_per_page(&self, layer: u32) -> Option<u64> {
        self.layers.get(layer as usize).map(|layer| layer.bytes)
    }

    /// Bytes that go from a page to a page, over all layers.
    pub fn bytes_per_page_all_layers(&self) -> u64 {
        self.layers
            .iter()
            .fold(0, |sum: u64, layer| sum.saturating_add(layer.bytes))
    }

    /// Appends to `out` the writes that carry page `source_pages[i]` to page `destination_pages[i]` of `layer`, for
    /// every `i`.
    ///
    /// Pages are taken in the order given; neighbours in it that are neighbours in the destination too become one
    /// write, so ascending destination pages merge best. A destination page must not occur twice, which is not checked
    /// here but once for a grant with [`check_unique`](super::pages::check_unique).
    ///
    /// # Errors
    /// No such layer, lists of different lengths, a page out of range, or a plan of more than 2^32 pieces. Nothing is
    /// appended then.
    pub fn plan(
        &self,
        layer: u32,
        source_pages: &[u32],
        destination_pages: &[u32],
        out: &mut Plan,
    ) -> Result<(), PlanError> {
        let layers = self.layers();
        let layer = self
            .layers
            .get(layer as usize)
            .ok_or(PlanError::NoSuchLayer { layer, layers })?;
        let count = destination_pages.len();
        if source_pages.len() != count {
            return Err(PlanError::PageCount(source_pages.len(), count));
        }
        check_pages(Side::Source, source_pages, self.source_pages)?;
        check_pages(Side::Destination, destination_pages, self.destination_pages)?;
        // Positions, and indices into the sources, are 32 bits wide.
        (count as u64)
            .checked_mul(layer.pieces)
            .and_then(|pieces| pieces.checked_add(out.sources.len() as u64))
            .filter(|&pieces| pieces <= u64::from(u32::MAX))
            .ok_or(PlanError::TooLarge { pages: count })?;

        let mut emitter = Emitter::new(out, self.limits);
        for group in &layer.groups {
            emitter.group(group, source_pages, destination_pages);
        }
        emitter.finish();
        Ok(())
    }
}

fn check_pages(side: Side, pages: &[u32], limit: u32) -> Result<(), PlanError> {
    super::pages::check_range(pages, limit).map_err(|_| PlanError::PageOutOfRange {
        side,
        page: pages
            .iter()
            .copied()
            .find(|&page| page >= limit)
            .unwrap_or(limit),
        pages: limit,
    })
}
