//! Layouts of the pools that engines allocate.
//!
//! A pool is a [`KvShape`] put in memory by an [`Arrangement`] (how keys and values of a layer lie), a [`HeadOrder`] and
//! a [`Stacking`] (how layers lie). Shapes below are row-major, outermost axis first. Each has a constructor named after
//! the engine that allocates it.

use super::{Dtype, HeadRange, KvLayout, LayerLayout, LayoutError, Plane, PlaneRole};

/// What one shard of a cache holds, wherever it lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct KvShape {
    /// Layers.
    pub layers: u32,
    /// Tokens in one page (vLLM: `block_size`, SGLang: `page_size`).
    pub tokens_per_page: u32,
    /// Heads of this shard.
    pub heads: HeadRange,
    /// Elements of a head.
    pub head_dim: u32,
    /// Element type.
    pub dtype: Dtype,
}

/// How keys and values of one layer lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Arrangement {
    /// All keys, then all values, in one tensor: `[2, pages, page]`. vLLM's FlashAttention back end.
    KeysThenValues,
    /// Two tensors, `[pages, page]` each. SGLang's `k_buffer` and `v_buffer`.
    Separate,
    /// Keys and values of a page together: `[pages, 2, page]`. vLLM's FlashInfer and Triton back ends.
    Interleaved,
    /// One latent plane: `[pages, tokens, head_dim]`. MLA, in vLLM and SGLang.
    Latent,
}

/// How a page of one plane lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HeadOrder {
    /// `[tokens, heads, head_dim]` (NHD).
    TokenMajor,
    /// `[heads, tokens, head_dim]` (HND).
    HeadMajor,
}

/// How layers lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stacking {
    /// Each layer in a region of its own ([`Arrangement::Separate`]: first all layers' keys, then all values').
    RegionPerLayer,
    /// One region, layer after layer: `[layers, ...]` ([`Arrangement::Separate`]: one region for keys, one for values).
    LayerMajor,
    /// One region, all layers of a page together: `[pages, layers, ...]`. SGLang's `page_first`; with
    /// [`Arrangement::Interleaved`] and NHD also vLLM's cross-layer blocks. With [`Arrangement::KeysThenValues`] it is
    /// `[2, pages, layers, page]`.
    PageMajor,
}

impl KvShape {
    /// The layout of a pool of this shape with `pages` pages.
    ///
    /// # Errors
    /// As [`KvLayout::validate`]: an empty or too large shape, or sizes beyond 64 bits.
    pub fn layout(
        &self,
        pages: u32,
        arrangement: Arrangement,
        order: HeadOrder,
        stacking: Stacking,
    ) -> Result<KvLayout, LayoutError> {
        use Arrangement::{Interleaved, KeysThenValues, Latent, Separate};

        let roles: &[PlaneRole] = match arrangement {
            Latent => &[PlaneRole::Latent],
            _ => &[PlaneRole::Key, PlaneRole::Value],
        };
        let role = roles[0];
        let overflow = LayoutError::Overflow { layer: 0, role };
        let limit = super::limits::LAYERS;
        if u64::from(self.layers) > limit {
            return Err(LayoutError::Limit {
                what: "layers",
                value: u64::from(self.layers),
                limit,
            });
        }
        let product = |a: u64, b: u32| a.checked_mul(u64::from(b)).ok_or_else(|| overflow.clone());

        let head = u64::from(self.dtype.bytes()) * u64::from(self.head_dim);
        let head_bytes = u32::try_from(head).map_err(|_| overflow.clone())?;
        let (token_stride, head_stride) = match order {
            HeadOrder::TokenMajor => (product(head, self.heads.count)?, head),
            HeadOrder::HeadMajor => (head, product(head, self.tokens_per_page)?),
        };
        // Bytes of one page of one plane, and of one layer of a page where its planes are kept together.
        let plane_page = product(product(head, self.heads.count)?, self.tokens_per_page)?;
        let layer_page = match arrangement {
            Interleaved => product(plane_page, 2)?,
            KeysThenValues | Separate | Latent => plane_page,
        };
        let page_stride = match stacking {
            Stacking::PageMajor => product(layer_page, self.layers)?,
            _ => layer_page,
        };
        // Bytes of all pages along `page_stride`, and from one layer to the next in the same region.
        let tensor = product(page_stride, pages)?;
        let layer_stride = match (stacking, arrangement) {
            (Stacking::RegionPerLayer, _) => 0,
            (Stacking::LayerMajor, KeysThenValues) => product(tensor, 2)?,
            (Stacking::LayerMajor, _) => tensor,
            (Stacking::PageMajor, _) => layer_page,
        };
        let second_plane = match arrangement {
            KeysThenValues => tensor,
            Interleaved => plane_page,
            Separate | Latent => 0,
        };

        let mut layers = Vec::with_capacity(self.layers as usize);
        for layer in 0..self.layers {
            let mut planes = Vec::with_capacity(roles.len());
            for (index, &role) in (0u32..).zip(roles) {
                let region = match (stacking, arrangement) {
                    (Stacking::RegionPerLayer, Separate) => index * self.layers + layer,
                    (Stacking::RegionPerLayer, _) => layer,
                    (_, Separate) => index,
                    _ => 0,
                };
                let offset =
                    product(layer_stride, layer)?.checked_add(product(second_plane, index)?);
                planes.push(Plane {
                    role,
                    dtype: self.dtype,
                    // At most twice the limit of layers.
                    region: region as u16,
                    offset: offset.ok_or_else(|| overflow.clone())?,
                    page_stride,
                    token_stride,
                    head_stride,
                    head_bytes,
                    heads: self.heads,
                });
            }
            layers.push(LayerLayout {
                tokens_per_page: self.tokens_per_page,
                planes,
            });
        }
        let layout = KvLayout { pages, layers };
        layout.check()?;
        Ok(layout)
    }

    /// vLLM FlashAttention: one tensor `[2, pages, tokens, heads, head_dim]` for each layer.
    ///
    /// # Errors
    /// As [`KvShape::layout`].
    pub fn vllm_flash(&self, pages: u32) -> Result<KvLayout, LayoutError> {
        self.layout(
            pages,
            Arrangement::KeysThenValues,
            HeadOrder::TokenMajor,
            Stacking::RegionPerLayer,
        )
    }

    /// vLLM FlashInfer (and, in NHD, Triton): one tensor for each layer, `[pages, 2, tokens, heads, head_dim]` (NHD) or
    /// `[pages, 2, heads, tokens, head_dim]` (HND, `VLLM_KV_CACHE_LAYOUT=HND`).
    ///
    /// # Errors
    /// As [`KvShape::layout`].
    pub fn vllm_flashinfer(&self, pages: u32, order: HeadOrder) -> Result<KvLayout, LayoutError> {
        self.layout(
            pages,
            Arrangement::Interleaved,
            order,
            Stacking::RegionPerLayer,
        )
    }

    /// SGLang's `MHATokenToKVPool`: for each layer a `k_buffer` and a `v_buffer` of `[slots, heads, head_dim]`, where
    /// page `p` is slots `p * tokens_per_page ..`. SGLang keeps page 0 for padding; `pages` counts it.
    ///
    /// # Errors
    /// As [`KvShape::layout`].
    pub fn sglang(&self, pages: u32) -> Result<KvLayout, LayoutError> {
        self.layout(
            pages,
            Arrangement::Separate,
            HeadOrder::TokenMajor,
            Stacking::RegionPerLayer,
        )
    }

    /// MLA: one tensor `[pages, tokens, head_dim]` for each layer, with `head_dim` the latent and its rotary part
    /// together (vLLM `MLACommonBackend`, SGLang `MLATokenToKVPool`).
    ///
    /// # Errors
    /// As [`KvShape::layout`].
    pub fn mla(&self, pages: u32) -> Result<KvLayout, LayoutError> {
        self.layout(
            pages,
            Arrangement::Latent,
            HeadOrder::TokenMajor,
            Stacking::RegionPerLayer,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::testing::head_offset;
    use crate::kv::{models, region_lengths};

    const PAGES: u32 = 5;
    const SHAPE: KvShape = KvShape {
        layers: 3,
        tokens_per_page: 4,
        heads: HeadRange::new(2, 6),
        head_dim: 8,
        dtype: Dtype::Bf16,
    };

    /// The byte of an element of a row-major tensor, given (index, size) of each axis, outermost first.
    fn row_major(axes: &[(u32, u32)]) -> u64 {
        let element = axes.iter().fold(0, |at, &(index, size)| {
            at * u64::from(size) + u64::from(index)
        });
        element * 2
    }

    /// Compares a layout with `tensor(layer, plane, page, token, head)`: a region and the axes within it.
    fn compare<const N: usize>(
        layout: &KvLayout,
        tensor: impl Fn(u32, u32, u32, u32, u32) -> (u32, [(u32, u32); N]),
    ) {
        for (l, layer) in (0..).zip(&layout.layers) {
            for (p, plane) in (0..).zip(&layer.planes) {
                for (page, token, head) in [
                    (0, 0, 0),
                    (1, 0, 0),
                    (0, 1, 0),
                    (0, 0, 1),
                    (4, 3, 5),
                    (2, 1, 4),
                ] {
                    let (region, axes) = tensor(l, p, page, token, head);
                    assert_eq!(u32::from(plane.region), region);
                    assert_eq!(head_offset(plane, page, token, 2 + head), row_major(&axes));
                    assert_eq!(plane.head_bytes, 16);
                }
            }
        }
    }

    #[test]
    fn engines_shapes() {
        // Sizes: 3 layers, 5 pages, 4 tokens, 6 heads, 8 elements.
        compare(&SHAPE.vllm_flash(PAGES).unwrap(), |l, kv, p, t, h| {
            (l, [(kv, 2), (p, 5), (t, 4), (h, 6), (0, 8)])
        });
        let flashinfer = |order| SHAPE.vllm_flashinfer(PAGES, order).unwrap();
        compare(&flashinfer(HeadOrder::TokenMajor), |l, kv, p, t, h| {
            (l, [(p, 5), (kv, 2), (t, 4), (h, 6), (0, 8)])
        });
        compare(&flashinfer(HeadOrder::HeadMajor), |l, kv, p, t, h| {
            (l, [(p, 5), (kv, 2), (h, 6), (t, 4), (0, 8)])
        });
        compare(&SHAPE.sglang(PAGES).unwrap(), |l, kv, p, t, h| {
            (kv * 3 + l, [(p * 4 + t, 20), (h, 6), (0, 8)])
        });
    }

    #[test]
    fn stacked_layers() {
        use Arrangement::{Interleaved, KeysThenValues, Separate};
        use HeadOrder::{HeadMajor, TokenMajor};
        use Stacking::{LayerMajor, PageMajor};

        let pool = |arrangement, order, stacking| {
            SHAPE.layout(PAGES, arrangement, order, stacking).unwrap()
        };
        compare(
            &pool(KeysThenValues, TokenMajor, LayerMajor),
            |l, kv, p, t, h| (0, [(l, 3), (kv, 2), (p, 5), (t, 4), (h, 6), (0, 8)]),
        );
        compare(
            &pool(KeysThenValues, TokenMajor, PageMajor),
            |l, kv, p, t, h| (0, [(kv, 2), (p, 5), (l, 3), (t, 4), (h, 6), (0, 8)]),
        );
        compare(
            &pool(Interleaved, HeadMajor, LayerMajor),
            |l, kv, p, t, h| (0, [(l, 3), (p, 5), (kv, 2), (h, 6), (t, 4), (0, 8)]),
        );
        compare(
            &pool(Interleaved, TokenMajor, PageMajor),
            |l, kv, p, t, h| (0, [(p, 5), (l, 3), (kv, 2), (t, 4), (h, 6), (0, 8)]),
        );
        compare(&pool(Separate, TokenMajor, LayerMajor), |l, kv, p, t, h| {
            (kv, [(l, 3), (p, 5), (t, 4), (h, 6), (0, 8)])
        });
        compare(&pool(Separate, HeadMajor, PageMajor), |l, kv, p, t, h| {
            (kv, [(p, 5), (l, 3), (h, 6), (t, 4), (0, 8)])
        });
    }

    /// Bytes of one token over all layers, as the models' papers and the engines' logs give them.
    #[test]
    fn models_take_the_known_room() {
        let total = |layout: KvLayout| region_lengths(&layout).unwrap().iter().sum::<u64>();
        for (model, bytes_per_token) in [
            (models::LLAMA_3_1_8B, 128 << 10),
            (models::LLAMA_3_1_70B, 320 << 10),
            (models::QWEN3_32B, 256 << 10),
            (models::QWEN3_235B_A22B, 188 << 10),
            (models::DEEPSEEK_R1, 70_272),
            (models::DEEPSEEK_R1_FP8, 35_136),
        ] {
            assert_eq!(models::Model::by_name(model.name), Some(&model));
            let layout = |tp| {
                let shape = model.shard(16, tp, tp - 1).unwrap();
                if model.mla {
                    shape.mla(10).unwrap()
                } else {
                    shape.vllm_flash(10).unwrap()
                }
            };
            assert_eq!(total(layout(1)), bytes_per_token * 160);
            let shard = if model.mla {
                bytes_per_token
            } else {
                bytes_per_token / 2
            };
            assert_eq!(total(layout(2)), shard * 160);
        }
        assert_eq!(models::Model::by_name("no such"), None);
    }

    #[test]
    fn impossible_shapes_are_refused() {
        let refuse = |change: &dyn Fn(&mut KvShape)| {
            let mut shape = SHAPE;
            change(&mut shape);
            for arrangement in [
                Arrangement::KeysThenValues,
                Arrangement::Separate,
                Arrangement::Interleaved,
            ] {
                for stacking in [
                    Stacking::RegionPerLayer,
                    Stacking::LayerMajor,
                    Stacking::PageMajor,
                ] {
                    let layout =
                        shape.layout(u32::MAX, arrangement, HeadOrder::TokenMajor, stacking);
                    assert!(layout.is_err(), "{shape:?}");
                }
            }
        };
        refuse(&|shape| shape.layers = 0);
        refuse(&|shape| shape.layers = u32::MAX);
        refuse(&|shape| shape.tokens_per_page = 0);
        refuse(&|shape| shape.tokens_per_page = u32::MAX);
        refuse(&|shape| shape.heads.count = 0);
        refuse(&|shape| shape.heads.count = u32::MAX);
        refuse(&|shape| shape.head_dim = 0);
        refuse(&|shape| shape.head_dim = u32::MAX);
        assert!(SHAPE.vllm_flash(0).is_err());
    }
}
