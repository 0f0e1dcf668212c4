//! Why two caches cannot be matched, or pages cannot be planned.

use std::fmt;

use super::PlanLimits;
use crate::kv::{Dtype, HeadRange, LayoutError, PlaneRole};

/// One of the two caches of a push.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// Where the bytes come from.
    Source,
    /// Where they go.
    Destination,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Source => "source",
            Self::Destination => "destination",
        })
    }
}

/// Why there is no plan. Values are given as source, then destination.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// A layout is impossible.
    #[error("{side} layout: {error}")]
    Layout {
        /// Whose.
        side: Side,
        /// Why.
        error: LayoutError,
    },
    /// A limit is 0.
    #[error("a write must be allowed at least one source and one byte: {limits:?}")]
    Limits {
        /// What was asked for.
        limits: PlanLimits,
    },
    /// The models differ.
    #[error("{} layers cannot go to {}", _0, _1)]
    LayerCount(
        /// Of the source.
        usize,
        /// Of the destination.
        usize,
    ),
    /// Pages of different token counts.
    #[error("layer {layer}: pages of {} tokens cannot go to pages of {}", tokens.0, tokens.1)]
    TokensPerPage {
        /// The layer.
        layer: u32,
        /// Tokens of a page.
        tokens: (u32, u32),
    },
    /// One side has a plane the other lacks.
    #[error("layer {layer}: the {missing_at} has no {role} plane")]
    MissingPlane {
        /// The layer.
        layer: u32,
        /// The plane.
        role: PlaneRole,
        /// The side that lacks it.
        missing_at: Side,
    },
    /// Different element types.
    #[error("layer {layer}, {role} plane: {:?} cannot go to {:?}; a push does not convert", dtypes.0, dtypes.1)]
    Dtype {
        /// The layer.
        layer: u32,
        /// The plane.
        role: PlaneRole,
        /// The types.
        dtypes: (Dtype, Dtype),
    },
    /// Heads of different sizes.
    #[error("layer {layer}, {role} plane: heads of {} bytes cannot go to heads of {}", bytes.0, bytes.1)]
    HeadBytes {
        /// The layer.
        layer: u32,
        /// The plane.
        role: PlaneRole,
        /// Bytes of a head.
        bytes: (u32, u32),
    },
    /// A side does not hold all of the heads, or none were asked for.
    #[error("layer {layer}, {role} plane: {wanted} are asked for, the {side} holds {have}")]
    Heads {
        /// The layer.
        layer: u32,
        /// The plane.
        role: PlaneRole,
        /// The side that lacks some.
        side: Side,
        /// What was asked for.
        wanted: HeadRange,
        /// What it holds.
        have: HeadRange,
    },
    /// The layouts differ so finely, or so differently from layer to layer, that the mapping would be too large.
    #[error("layer {layer}: the layouts match only in more than {limit} separate pieces of a page")]
    TooManyPieces {
        /// The layer.
        layer: u32,
        /// Pieces allowed.
        limit: usize,
    },
    /// A layer beyond the last.
    #[error("layer {layer} does not exist, there are {layers}")]
    NoSuchLayer {
        /// The layer.
        layer: u32,
        /// Layers there are.
        layers: u32,
    },
    /// The lists of pages do not correspond.
    #[error("{_0} source pages for {_1} destination pages")]
    PageCount(
        /// In the source list.
        usize,
        /// In the destination list.
        usize,
    ),
    /// A page the pool does not have.
    #[error("{side} page {page} is out of range, the pool has {pages} pages")]
    PageOutOfRange {
        /// Whose.
        side: Side,
        /// The page.
        page: u32,
        /// Pages of the pool.
        pages: u32,
    },
    /// More pieces than a plan can number; plan fewer pages at a time.
    #[error("{pages} pages are too many for one plan; plan them in parts")]
    TooLarge {
        /// Pages given.
        pages: usize,
    },
}

impl PlanError {
    /// Whether the same call may succeed later: never, the input is wrong for good.
    pub const fn is_retryable(&self) -> bool {
        false
    }
}
