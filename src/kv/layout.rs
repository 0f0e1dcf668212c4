//! The layout of one KV cache shard: layers, planes, strides.
//!
//! A *plane* is one tensor of a layer: its keys, its values, or the single latent tensor of MLA. The bytes of token
//! `t` and head `h` of page `p` in a plane are the `head_bytes` bytes at
//! `offset + p * page_stride + t * token_stride + (h - heads.first) * head_stride` of region `region`. Every known
//! pool (vLLM, SGLang, interleaved K/V, MLA) is a choice of these strides.

use std::fmt;

use super::Dtype;

/// A range of KV heads by their number in the whole model, so that shards can be compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HeadRange {
    /// First head.
    pub first: u32,
    /// Number of heads.
    pub count: u32,
}

impl HeadRange {
    /// Heads `first .. first + count`.
    pub const fn new(first: u32, count: u32) -> Self {
        Self { first, count }
    }

    /// One past the last head; wider than a head number, so that it cannot overflow.
    pub const fn end(self) -> u64 {
        self.first as u64 + self.count as u64
    }

    /// Whether every head of `other` is in this range. An empty `other` is not.
    pub const fn contains(self, other: Self) -> bool {
        other.count > 0 && self.first <= other.first && other.end() <= self.end()
    }

    /// The heads in both ranges, or nothing if there are none.
    pub fn intersection(self, other: Self) -> Option<Self> {
        let first = self.first.max(other.first);
        let end = self.end().min(other.end());
        let count = end
            .checked_sub(u64::from(first))
            .filter(|&count| count > 0)?;
        // Not longer than either range, so it fits.
        Some(Self::new(first, u32::try_from(count).ok()?))
    }
}

impl fmt::Display for HeadRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "heads {}..{}", self.first, self.end())
    }
}

/// What a plane holds. Planes of two layouts correspond by role.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
#[non_exhaustive]
pub enum PlaneRole {
    /// Keys.
    Key = 1,
    /// Values.
    Value = 2,
    /// The compressed latent with its rotary part (multi-head latent attention); one head.
    Latent = 3,
    /// Scales of quantised keys.
    KeyScale = 4,
    /// Scales of quantised values.
    ValueScale = 5,
    /// Anything else that is kept per page and token, such as an indexer cache.
    Auxiliary = 6,
}

impl PlaneRole {
    /// The role encoded as `value` on the wire.
    pub const fn from_wire(value: u8) -> Option<Self> {
        Some(match value {
            1 => Self::Key,
            2 => Self::Value,
            3 => Self::Latent,
            4 => Self::KeyScale,
            5 => Self::ValueScale,
            6 => Self::Auxiliary,
            _ => return None,
        })
    }
}

impl fmt::Display for PlaneRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Key => "key",
            Self::Value => "value",
            Self::Latent => "latent",
            Self::KeyScale => "key scale",
            Self::ValueScale => "value scale",
            Self::Auxiliary => "auxiliary",
        })
    }
}

/// One tensor of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Plane {
    /// What it holds.
    pub role: PlaneRole,
    /// Element type.
    pub dtype: Dtype,
    /// Index of the region in the pool.
    pub region: u16,
    /// First byte of page 0, token 0, first head within the region.
    pub offset: u64,
    /// Bytes from one page to the next.
    pub page_stride: u64,
    /// Bytes from one token of a page to the next.
    pub token_stride: u64,
    /// Bytes from one head of a token to the next.
    pub head_stride: u64,
    /// Bytes of one head of one token.
    pub head_bytes: u32,
    /// Heads held.
    pub heads: HeadRange,
}

/// One layer: all planes have the same number of tokens to a page; layers may differ.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct LayerLayout {
    /// Tokens in one page.
    pub tokens_per_page: u32,
    /// Tensors, at most one for each role.
    pub planes: Vec<Plane>,
}

/// One shard's whole cache. Page numbers are common to all layers.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct KvLayout {
    /// Pages in the pool: valid numbers are `0 .. pages`.
    pub pages: u32,
    /// Layers, in model order.
    pub layers: Vec<LayerLayout>,
}
