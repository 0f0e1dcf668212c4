//! The layout of a landing: the granted heads of the granted pages of a pool, densely packed.
//!
//! Pure. The landing has the pool's layers, planes and order of tokens and heads, so that a writer plans for it as for
//! the pool itself, but page `i` of it is the grant's position `i`, and nothing lies between what the writer writes.

use crate::kv::{HeadRange, KvLayout, LayerLayout, Plane, PlaneRole};

/// Where planes begin: multiples of this.
const ALIGN: u64 = 64;

/// Bytes of a landing; more than there are in the world if they cannot be counted.
pub(crate) fn landing_bytes(layout: &KvLayout, pages: usize, heads: HeadRange) -> u64 {
    let pages = u32::try_from(pages).ok();
    let landing = pages.and_then(|pages| packed(layout, pages, heads));
    landing.map_or(u64::MAX, |(_, bytes)| bytes)
}

/// The landing of `pages` pages with `heads` of `layout`, and its bytes. `None` if they are more than there can be.
pub(super) fn packed(layout: &KvLayout, pages: u32, heads: HeadRange) -> Option<(KvLayout, u64)> {
    let mut next: u64 = 0;
    let mut layers = Vec::with_capacity(layout.layers.len());
    for layer in &layout.layers {
        let tokens = u64::from(layer.tokens_per_page);
        let mut planes = Vec::with_capacity(layer.planes.len());
        for plane in &layer.planes {
            let held = match plane.role {
                // They have no heads in the model's sense, and go whole.
                PlaneRole::Auxiliary => plane.heads,
                _ => heads,
            };
            let head = u64::from(plane.head_bytes);
            let row = head.checked_mul(held.count.into())?;
            let page = row.checked_mul(tokens)?;
            let (token_stride, head_stride) = match plane.head_stride > plane.token_stride {
                true => (head, head.checked_mul(tokens)?),
                false => (row, head),
            };
            planes.push(Plane {
                region: 0,
                offset: next,
                page_stride: page,
                token_stride,
                head_stride,
                heads: held,
                ..*plane
            });
            let bytes = page.checked_mul(pages.into())?;
            next = next.checked_add(bytes)?.checked_next_multiple_of(ALIGN)?;
        }
        layers.push(LayerLayout {
            tokens_per_page: layer.tokens_per_page,
            planes,
        });
    }
    Some((KvLayout { pages, layers }, next))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::{Dtype, PlanLimits, Planner, presets::KvShape};

    fn shape() -> KvShape {
        KvShape {
            layers: 3,
            tokens_per_page: 16,
            heads: HeadRange::new(2, 6),
            head_dim: 32,
            dtype: Dtype::Bf16,
        }
    }

    #[test]
    fn a_landing_holds_what_is_granted_and_no_more() {
        let pool = shape().vllm_flash(100).unwrap();
        let heads = HeadRange::new(3, 2);
        let (landing, bytes) = packed(&pool, 7, heads).unwrap();
        landing.validate(&[bytes]).unwrap();
        // Keys and values of 16 tokens, 2 heads, 32 numbers of 2 bytes.
        assert_eq!(bytes, 3 * 2 * 7 * 16 * 2 * 64);
        let limits = PlanLimits {
            max_sge: 16,
            max_write: 1 << 30,
        };
        let planner = Planner::new(&landing, &pool, heads, limits).unwrap();
        assert_eq!(planner.bytes_per_page_all_layers() * 7, bytes);
    }
}
