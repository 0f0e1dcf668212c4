//! Whether a layout is possible at all: every byte of every page inside its region, and no byte used twice.
//!
//! Invariant: once a layout has passed, `offset + page * page_stride + token * token_stride + head * head_stride +
//! head_bytes` cannot overflow for any valid page, token and head. The planner computes unchecked on that ground.
//! Layouts arrive from peers, so nothing here may panic, and the work is bounded by [`limits`].

use std::fmt;

use super::layout::{KvLayout, Plane, PlaneRole};
use super::overlap::{self, Owner};

/// What a layout may have at most. They bound the work a peer's layout can cause; real caches are far below.
pub mod limits {
    /// Layers of a layout.
    pub const LAYERS: u64 = 1024;
    /// Planes of a layer.
    pub const PLANES: u64 = 8;
    /// Regions of a pool.
    pub const REGIONS: u64 = 4096;
    /// Tokens of a page.
    pub const TOKENS_PER_PAGE: u64 = 1 << 20;
    /// One past the highest head number.
    pub const HEADS: u64 = 1 << 16;
}

/// An axis of a plane along which it has a stride.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dimension {
    /// Page to page.
    Page,
    /// Token to token.
    Token,
    /// Head to head.
    Head,
}

impl fmt::Display for Dimension {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Page => "page",
            Self::Token => "token",
            Self::Head => "head",
        })
    }
}

/// Why a layout is refused. Layers, regions and bytes are counted from 0.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// More of something than [`limits`] allow.
    #[error("{value} {what}, at most {limit} are allowed")]
    Limit {
        /// What there are too many of.
        what: &'static str,
        /// How many.
        value: u64,
        /// The limit.
        limit: u64,
    },
    /// No pages or no layers.
    #[error("the layout has no {what}")]
    Empty {
        /// What is missing.
        what: &'static str,
    },
    /// A layer without tokens or planes.
    #[error("layer {layer} has no {what}")]
    EmptyLayer {
        /// The layer.
        layer: u32,
        /// What is missing.
        what: &'static str,
    },
    /// A plane without heads or whose heads have no bytes.
    #[error("layer {layer}, {role} plane: no {what}")]
    EmptyPlane {
        /// The layer.
        layer: u32,
        /// The plane.
        role: PlaneRole,
        /// What is missing.
        what: &'static str,
    },
    /// Two planes of a layer have the same role, so that they could not be told apart.
    #[error("layer {layer} has two {role} planes")]
    DuplicateRole {
        /// The layer.
        layer: u32,
        /// The role.
        role: PlaneRole,
    },
    /// A head is not a whole number of elements.
    #[error(
        "layer {layer}, {role} plane: {head_bytes} bytes per head are no multiple of the element's {element}"
    )]
    PartialElement {
        /// The layer.
        layer: u32,
        /// The plane.
        role: PlaneRole,
        /// Bytes of a head.
        head_bytes: u32,
        /// Bytes of an element.
        element: u32,
    },
    /// A plane lies in a region the pool does not have.
    #[error("layer {layer}, {role} plane: region {region} does not exist, the pool has {regions}")]
    NoSuchRegion {
        /// The layer.
        layer: u32,
        /// The plane.
        role: PlaneRole,
        /// The region named.
        region: u16,
        /// Regions there are.
        regions: u64,
    },
    /// A region ends before the plane does.
    #[error(
        "layer {layer}, {role} plane: needs {needed} bytes of region {region}, which has {have}"
    )]
    RegionTooShort {
        /// The layer.
        layer: u32,
        /// The plane.
        role: PlaneRole,
        /// The region.
        region: u16,
        /// Bytes from the start of the region to the plane's end.
        needed: u64,
        /// Bytes of the region.
        have: u64,
    },
    /// The end of a plane is beyond 2^64 bytes.
    #[error("layer {layer}, {role} plane: offset and strides exceed 64 bits")]
    Overflow {
        /// The layer.
        layer: u32,
        /// The plane.
        role: PlaneRole,
    },
    /// A stride is less than what lies between two steps of it. Planes whose strides interlock without sharing a byte
    /// (such as 2 and 3) are refused too: no tensor is laid out so.
    #[error(
        "layer {layer}, {role} plane: {dimension} stride is {stride} bytes but steps over {needed}"
    )]
    Stride {
        /// The layer.
        layer: u32,
        /// The plane.
        role: PlaneRole,
        /// The axis.
        dimension: Dimension,
        /// Its stride.
        stride: u64,
        /// The least stride that would do.
        needed: u64,
    },
    /// Two planes share bytes of a region, or cannot be shown not to.
    #[error(
        "region {region}: the {} plane of layer {} and the {} plane of layer {} overlap, or interlock in no known way",
        first.1, first.0, second.1, second.0
    )]
    PlanesOverlap {
        /// The region.
        region: u16,
        /// Layer and role of one plane.
        first: (u32, PlaneRole),
        /// Layer and role of the other.
        second: (u32, PlaneRole),
    },
}

impl LayoutError {
    /// Whether the same call may succeed later: never, a layout is wrong for good.
    pub const fn is_retryable(&self) -> bool {
        false
    }
}

/// The bytes of a plane as a nest of strides: blocks of `block` bytes repeated along `steps`, innermost first. Axes of
/// one step are left out and dense inner axes are folded into the block.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lattice {
    pub(super) start: u64,
    pub(super) block: u64,
    /// (count, stride); count is at least 2 for the first `depth`.
    pub(super) steps: [(u32, u64); 3],
    pub(super) depth: usize,
}

impl Lattice {
    /// Bytes from the first to one past the last.
    pub(super) fn extent(&self) -> u64 {
        self.steps[..self.depth]
            .iter()
            .fold(self.block, |extent, &(count, stride)| {
                extent + u64::from(count - 1) * stride
            })
    }
}

fn lattice(plane: &Plane, layer: u32, pages: u32, tokens: u32) -> Result<Lattice, LayoutError> {
    let role = plane.role;
    let overflow = LayoutError::Overflow { layer, role };
    let mut axes = [
        (plane.heads.count, plane.head_stride, Dimension::Head),
        (tokens, plane.token_stride, Dimension::Token),
        (pages, plane.page_stride, Dimension::Page),
    ];
    axes.sort_by_key(|&(_, stride, _)| stride);
    let mut lattice = Lattice {
        start: plane.offset,
        block: u64::from(plane.head_bytes),
        steps: [(0, 0); 3],
        depth: 0,
    };
    let mut extent = lattice.block;
    for (count, stride, dimension) in axes {
        if count <= 1 {
            continue;
        }
        if stride < extent {
            return Err(LayoutError::Stride {
                layer,
                role,
                dimension,
                stride,
                needed: extent,
            });
        }
        let dense = lattice.depth == 0 && stride == extent;
        extent = stride
            .checked_mul(u64::from(count - 1))
            .and_then(|steps| steps.checked_add(extent))
            .ok_or_else(|| overflow.clone())?;
        if dense {
            lattice.block = extent;
        } else {
            lattice.steps[lattice.depth] = (count, stride);
            lattice.depth += 1;
        }
    }
    lattice.start.checked_add(extent).ok_or(overflow)?;
    Ok(lattice)
}

impl KvLayout {
    /// Checks that the layout is possible in regions of these lengths (bytes, by region index).
    ///
    /// Every head of every token of every page of every plane lies in its region, planes of a layer have distinct
    /// roles, and no byte belongs to two (plane, page, token, head): a layout that passes never makes two writes meet.
    ///
    /// The converse is not exact. Within a plane, each stride must step over all that the smaller strides span. Of
    /// planes in one region, those pass that lie apart, or that repeat with the same stride and lie apart within one
    /// period, to any depth (K/V interleaved by page, token or head; layers inside pages). Planes that interlock with
    /// different strides are refused without further proof. So are planes that share memory on purpose, as in vLLM's
    /// hybrid allocator, where layers of different groups take turns in one tensor: make a pool of each group.
    ///
    /// # Errors
    /// The first fault found, with its layer and plane.
    pub fn validate(&self, region_lengths: &[u64]) -> Result<(), LayoutError> {
        let regions = region_lengths.len() as u64;
        limit("regions", regions, limits::REGIONS)?;
        for (owner, plane, lattice) in self.check()? {
            let (layer, role) = owner;
            let region = plane.region;
            let have =
                *region_lengths
                    .get(usize::from(region))
                    .ok_or(LayoutError::NoSuchRegion {
                        layer,
                        role,
                        region,
                        regions,
                    })?;
            let needed = lattice.start + lattice.extent();
            if needed > have {
                return Err(LayoutError::RegionTooShort {
                    layer,
                    role,
                    region,
                    needed,
                    have,
                });
            }
        }
        Ok(())
    }

    /// All of [`KvLayout::validate`] that does not need the regions. Returns the planes with their extents.
    pub(super) fn check(&self) -> Result<Vec<(Owner, &Plane, Lattice)>, LayoutError> {
        limit("layers", self.layers.len() as u64, limits::LAYERS)?;
        if self.pages == 0 {
            return Err(LayoutError::Empty { what: "pages" });
        }
        if self.layers.is_empty() {
            return Err(LayoutError::Empty { what: "layers" });
        }
        let mut planes = Vec::new();
        for (layer, layout) in (0u32..).zip(&self.layers) {
            limit(
                "planes in a layer",
                layout.planes.len() as u64,
                limits::PLANES,
            )?;
            limit(
                "tokens in a page",
                u64::from(layout.tokens_per_page),
                limits::TOKENS_PER_PAGE,
            )?;
            if layout.tokens_per_page == 0 {
                return Err(LayoutError::EmptyLayer {
                    layer,
                    what: "tokens",
                });
            }
            if layout.planes.is_empty() {
                return Err(LayoutError::EmptyLayer {
                    layer,
                    what: "planes",
                });
            }
            for (index, plane) in layout.planes.iter().enumerate() {
                check_plane(layer, plane)?;
                if layout.planes[..index]
                    .iter()
                    .any(|other| other.role == plane.role)
                {
                    return Err(LayoutError::DuplicateRole {
                        layer,
                        role: plane.role,
                    });
                }
                let lattice = lattice(plane, layer, self.pages, layout.tokens_per_page)?;
                planes.push(((layer, plane.role), plane, lattice));
            }
        }
        overlap::check(&planes)?;
        Ok(planes)
    }
}

fn check_plane(layer: u32, plane: &Plane) -> Result<(), LayoutError> {
    let role = plane.role;
    limit("heads", plane.heads.end(), limits::HEADS)?;
    if plane.heads.count == 0 {
        return Err(LayoutError::EmptyPlane {
            layer,
            role,
            what: "heads",
        });
    }
    if plane.head_bytes == 0 {
        return Err(LayoutError::EmptyPlane {
            layer,
            role,
            what: "bytes per head",
        });
    }
    let element = plane.dtype.bytes();
    if !plane.head_bytes.is_multiple_of(element) {
        return Err(LayoutError::PartialElement {
            layer,
            role,
            head_bytes: plane.head_bytes,
            element,
        });
    }
    if u64::from(plane.region) >= limits::REGIONS {
        return Err(LayoutError::NoSuchRegion {
            layer,
            role,
            region: plane.region,
            regions: limits::REGIONS,
        });
    }
    Ok(())
}

fn limit(what: &'static str, value: u64, limit: u64) -> Result<(), LayoutError> {
    if value > limit {
        return Err(LayoutError::Limit { what, value, limit });
    }
    Ok(())
}

/// The bytes each region needs for the layout to fit, by region index; 0 for an index that no plane uses.
///
/// # Errors
/// If the layout fails [`KvLayout::validate`] whatever the regions.
pub fn region_lengths(layout: &KvLayout) -> Result<Vec<u64>, LayoutError> {
    let mut lengths = Vec::new();
    for (_, plane, lattice) in layout.check()? {
        let region = usize::from(plane.region);
        if lengths.len() <= region {
            lengths.resize(region + 1, 0);
        }
        lengths[region] = lengths[region].max(lattice.start + lattice.extent());
    }
    Ok(lengths)
}
