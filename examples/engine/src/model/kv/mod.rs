//! A rank's keys and values: pages in kvpush memory.
//!
//! One region, `[layer][page]`; a page of a layer is contiguous: keys, values, then (FP8) their scales, each
//! `[head][token][element]`. Heads outermost, so that pages of different ranks merge in few writes when they are
//! re-sharded.
//!
//! No reference into the memory is made (a peer may write other pages meanwhile): vectors are copied in and out. Any
//! thread may call; that no two write the same place is up to the forward pass.

pub(crate) mod fp8;

use std::sync::Arc;

use kvpush::{
    kv::{Dtype, HeadRange, KvLayout, LayerLayout, Plane, PlaneRole},
    memory::HostMemory,
};
use zerocopy::IntoBytes;

use super::{KvDtype, KvShard, ModelError};
use crate::request::BlockId;

/// Keys or values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    Key,
    Value,
}

/// What a rank's cache holds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) layers: usize,
    pub(crate) heads: HeadRange,
    pub(crate) head_dim: usize,
    pub(crate) block_tokens: usize,
    pub(crate) blocks: u32,
    pub(crate) dtype: KvDtype,
}

impl Shape {
    /// Bytes of one head of one token.
    fn head_bytes(&self) -> usize {
        match self.dtype {
            KvDtype::F32 => 4 * self.head_dim,
            KvDtype::Fp8E4m3 => self.head_dim,
        }
    }

    /// Bytes of all keys, or all values, of a page of a layer.
    fn plane_bytes(&self) -> usize {
        self.heads.count as usize * self.block_tokens * self.head_bytes()
    }

    fn scale_bytes(&self) -> usize {
        match self.dtype {
            KvDtype::F32 => 0,
            KvDtype::Fp8E4m3 => self.heads.count as usize * self.block_tokens * 4,
        }
    }

    fn page_bytes(&self) -> usize {
        2 * (self.plane_bytes() + self.scale_bytes())
    }

    /// Bytes of one block, over all layers.
    pub(crate) fn block_bytes(&self) -> usize {
        self.layers * self.page_bytes()
    }

    fn layout(&self) -> KvLayout {
        let page = self.page_bytes() as u64;
        let plane = |role, dtype, within: usize, head_bytes: usize| Plane {
            role,
            dtype,
            region: 0,
            offset: within as u64,
            page_stride: page,
            token_stride: head_bytes as u64,
            head_stride: (head_bytes * self.block_tokens) as u64,
            head_bytes: head_bytes as u32,
            heads: self.heads,
        };
        let (bytes, values) = (self.head_bytes(), self.plane_bytes());
        let planes = match self.dtype {
            KvDtype::F32 => vec![
                plane(PlaneRole::Key, Dtype::F32, 0, bytes),
                plane(PlaneRole::Value, Dtype::F32, values, bytes),
            ],
            KvDtype::Fp8E4m3 => vec![
                plane(PlaneRole::Key, Dtype::F8E4M3, 0, bytes),
                plane(PlaneRole::Value, Dtype::F8E4M3, values, bytes),
                plane(PlaneRole::KeyScale, Dtype::F32, 2 * values, 4),
                plane(
                    PlaneRole::ValueScale,
                    Dtype::F32,
                    2 * values + self.scale_bytes(),
                    4,
                ),
            ],
        };
        let layer = |index: usize| LayerLayout {
            tokens_per_page: self.block_tokens as u32,
            planes: planes
                .iter()
                .map(|plane| Plane {
                    offset: plane.offset + index as u64 * u64::from(self.blocks) * page,
                    ..*plane
                })
                .collect(),
        };
        KvLayout {
            pages: self.blocks,
            layers: (0..self.layers).map(layer).collect(),
        }
    }
}

/// The cache of one rank.
pub(crate) struct Cache {
    shape: Shape,
    memory: Arc<HostMemory>,
    layout: KvLayout,
}

impl Cache {
    pub(crate) fn new(shape: Shape, rank: usize) -> Result<Self, ModelError> {
        let layout = shape.layout();
        layout
            .validate(&[(shape.block_bytes() * shape.blocks as usize) as u64])
            .map_err(|error| ModelError::Options(format!("the KV cache: {error}")))?;
        let length = (shape.block_bytes() * shape.blocks as usize) as u64;
        let memory = HostMemory::memfd(&format!("kvpush-engine-kv-{rank}"), length)?;
        Ok(Self {
            shape,
            memory: Arc::new(memory),
            layout,
        })
    }

    pub(crate) fn shard(&self) -> KvShard {
        KvShard {
            layout: self.layout.clone(),
            memory: vec![Arc::clone(&self.memory)],
        }
    }

    pub(crate) fn block_tokens(&self) -> usize {
        self.shape.block_tokens
    }

    /// Where head `head` (of this rank's) of token `slot` of a page begins, and where its scale is.
    fn place(&self, layer: usize, role: Role, head: usize, block: BlockId, slot: usize) -> (u64, u64) {
        let shape = &self.shape;
        let index = head * shape.block_tokens + slot;
        let page = (layer * shape.blocks as usize + block as usize) * shape.page_bytes();
        let (plane, scale) = match role {
            Role::Key => (0, 0),
            Role::Value => (shape.plane_bytes(), shape.scale_bytes()),
        };
        let scales = page + 2 * shape.plane_bytes() + scale;
        (
            (page + plane + index * shape.head_bytes()) as u64,
            (scales + index * 4) as u64,
        )
    }

    /// Stores one head of one token. `values` may be changed.
    pub(crate) fn store(
        &self,
        (layer, role, head): (usize, Role, usize),
        (block, slot): (BlockId, usize),
        values: &[f32],
    ) -> Result<(), ModelError> {
        let (at, scale_at) = self.place(layer, role, head, block, slot);
        match self.shape.dtype {
            KvDtype::F32 => self.memory.write(at, values.as_bytes())?,
            KvDtype::Fp8E4m3 => {
                let mut bytes = [0; MAX_HEAD_DIM];
                let bytes = &mut bytes[..values.len()];
                let scale = fp8::quantise(values, bytes);
                self.memory.write(at, bytes)?;
                self.memory.write(scale_at, scale.as_bytes())?;
            }
        }
        Ok(())
    }

    /// Loads the first `tokens` tokens of a page: `[token][element]`.
    pub(crate) fn load(
        &self,
        (layer, role, head): (usize, Role, usize),
        block: BlockId,
        tokens: usize,
        out: &mut [f32],
    ) -> Result<(), ModelError> {
        let (at, scale_at) = self.place(layer, role, head, block, 0);
        let dim = self.shape.head_dim;
        let out = &mut out[..tokens * dim];
        match self.shape.dtype {
            KvDtype::F32 => self.memory.read(at, out.as_mut_bytes())?,
            KvDtype::Fp8E4m3 => {
                let mut scale = 0.0f32;
                let mut bytes = [0; MAX_HEAD_DIM];
                for (token, out) in out.chunks_mut(dim).enumerate() {
                    let bytes = &mut bytes[..dim];
                    self.memory.read(at + (token * dim) as u64, bytes)?;
                    self.memory
                        .read(scale_at + (token * 4) as u64, scale.as_mut_bytes())?;
                    fp8::dequantise(bytes, scale, out);
                }
            }
        }
        Ok(())
    }
}

/// Larger heads are refused when a model is loaded.
pub(crate) const MAX_HEAD_DIM: usize = 256;
