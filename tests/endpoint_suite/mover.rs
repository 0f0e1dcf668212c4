//! What a push must do, said in the simplest way: row by row, straight from the definition of a layout.

use kvpush::kv::{HeadRange, KvLayout};

/// Copies `heads` of every layer of `pages` (source, destination) from `source` to `destination`.
pub(crate) fn copy(
    (source_layout, source): (&KvLayout, &[Vec<u8>]),
    (layout, destination): (&KvLayout, &mut [Vec<u8>]),
    pages: &[(u32, u32)],
    heads: HeadRange,
) {
    for layer in 0..layout.layers.len() {
        copy_layer(
            (source_layout, source),
            (layout, destination),
            layer,
            pages,
            heads,
        );
    }
}

/// Copies `heads` of one layer.
pub(crate) fn copy_layer(
    (source_layout, source): (&KvLayout, &[Vec<u8>]),
    (layout, destination): (&KvLayout, &mut [Vec<u8>]),
    layer: usize,
    pages: &[(u32, u32)],
    heads: HeadRange,
) {
    let tokens = u64::from(layout.layers[layer].tokens_per_page);
    for to in &layout.layers[layer].planes {
        let from = source_layout.layers[layer]
            .planes
            .iter()
            .find(|p| p.role == to.role)
            .unwrap();
        for &(source_page, page) in pages {
            for token in 0..tokens {
                for head in heads.first..heads.first + heads.count {
                    let at = |plane: &kvpush::kv::Plane, page: u32| {
                        (plane.offset
                            + u64::from(page) * plane.page_stride
                            + token * plane.token_stride
                            + u64::from(head - plane.heads.first) * plane.head_stride)
                            as usize
                    };
                    let bytes = to.head_bytes as usize;
                    let (a, b) = (at(from, source_page), at(to, page));
                    let row = &source[usize::from(from.region)][a..a + bytes];
                    destination[usize::from(to.region)][b..b + bytes].copy_from_slice(row);
                }
            }
        }
    }
}

/// Says where two sets of regions differ first.
#[track_caller]
pub(crate) fn assert_same(found: &[Vec<u8>], expected: &[Vec<u8>]) {
    assert_eq!(found.len(), expected.len());
    for (region, (found, expected)) in found.iter().zip(expected).enumerate() {
        if let Some(at) = found.iter().zip(expected).position(|(a, b)| a != b) {
            let differing = found.iter().zip(expected).filter(|(a, b)| a != b).count();
            panic!(
                "region {region}: {differing} bytes differ, first at {at}: {:#x} instead of {:#x}",
                found[at], expected[at]
            );
        }
        assert_eq!(found.len(), expected.len());
    }
}

#[test]
fn a_single_wrong_byte_is_found() {
    let expected = vec![vec![1; 100], vec![2; 100]];
    let mut found = expected.clone();
    assert_same(&found, &expected);
    found[1][99] = 3;
    assert!(std::panic::catch_unwind(|| assert_same(&found, &expected)).is_err());
}
