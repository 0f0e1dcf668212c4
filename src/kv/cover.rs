//! Which bytes of a pool's regions a list of pages lies in, as few ranges.
//!
//! All heads of a page count, and whatever lies between its tokens and heads. So ranges are coarser than what a push
//! writes, but no page that is not on the list is in them, as long as pages do not interleave.

use super::{KvLayout, Plane};

/// A range of one region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Range {
    /// The region.
    pub(crate) region: u16,
    /// Its first byte.
    pub(crate) offset: u64,
    /// Bytes.
    pub(crate) length: u64,
}

impl Range {
    fn end(&self) -> u64 {
        self.offset.saturating_add(self.length)
    }
}

/// Pieces that are sorted and merged. If the pages fall into more, finding the fewest ranges costs more than it brings.
const MOST_PIECES: u64 = 16_384;

/// The ranges that `pages` of a valid layout lie in, sorted, and whether they hold nothing else: if there would be more
/// than `most`, it is one for each region, from the first page in it to the last.
pub(crate) fn cover(layout: &KvLayout, pages: &[u32], most: usize) -> (Vec<Range>, bool) {
    let mut sorted = pages.to_vec();
    sorted.sort_unstable();
    sorted.dedup();
    let (Some(&first), Some(&last)) = (sorted.first(), sorted.last()) else {
        return (Vec::new(), true);
    };
    let runs = runs(&sorted);
    let planes = || {
        let layers = layout.layers.iter();
        layers.flat_map(|layer| {
            layer
                .planes
                .iter()
                .map(|p| (p, span(p, layer.tokens_per_page)))
        })
    };
    let pieces = planes().fold(0u64, |sum, (plane, span)| {
        let count = match span >= plane.page_stride {
            true => runs.len(),
            false => sorted.len(),
        };
        sum.saturating_add(count as u64)
    });
    if pieces <= MOST_PIECES {
        let mut ranges = Vec::with_capacity(pieces as usize);
        for (plane, span) in planes() {
            if span >= plane.page_stride {
                ranges.extend(runs.iter().map(|&(from, to)| range(plane, span, from, to)));
            } else {
                ranges.extend(sorted.iter().map(|&page| range(plane, span, page, page)));
            }
        }
        let ranges = merged(ranges);
        if ranges.len() <= most {
            return (ranges, true);
        }
    }
    let bounds = planes().map(|(plane, span)| range(plane, span, first, last));
    let mut by_region: Vec<Range> = Vec::new();
    for bound in bounds {
        match by_region.binary_search_by_key(&bound.region, |range| range.region) {
            Err(at) => by_region.insert(at, bound),
            Ok(at) => {
                let known = by_region[at];
                let offset = known.offset.min(bound.offset);
                by_region[at] = Range {
                    offset,
                    length: known.end().max(bound.end()) - offset,
                    ..known
                };
            }
        }
    }
    (by_region, false)
}

/// Maximal runs of a sorted list: first and last page of each.
fn runs(sorted: &[u32]) -> Vec<(u32, u32)> {
    let mut runs: Vec<(u32, u32)> = Vec::new();
    for &page in sorted {
        match runs.last_mut() {
            Some((_, last)) if last.checked_add(1) == Some(page) => *last = page,
            _ => runs.push((page, page)),
        }
    }
    runs
}

/// Bytes from the first of a page to its last, in one plane.
fn span(plane: &Plane, tokens: u32) -> u64 {
    let last = |count: u32, stride: u64| u64::from(count.saturating_sub(1)).saturating_mul(stride);
    last(tokens, plane.token_stride)
        .saturating_add(last(plane.heads.count, plane.head_stride))
        .saturating_add(plane.head_bytes.into())
}

/// Where pages `from ..= to` are in a plane.
fn range(plane: &Plane, span: u64, from: u32, to: u32) -> Range {
    let start = |page: u32| {
        let skip = u64::from(page).saturating_mul(plane.page_stride);
        plane.offset.saturating_add(skip)
    };
    Range {
        region: plane.region,
        offset: start(from),
        length: (start(to) - start(from)).saturating_add(span),
    }
}

/// The union, as maximal ranges.
fn merged(mut ranges: Vec<Range>) -> Vec<Range> {
    ranges.sort_unstable();
    let mut union: Vec<Range> = Vec::new();
    for range in ranges {
        match union.last_mut() {
            Some(last) if last.region == range.region && range.offset <= last.end() => {
                last.length = last.end().max(range.end()) - last.offset;
            }
            _ => union.push(range),
        }
    }
    union
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::kv::{Dtype, HeadRange, presets::KvShape};

    fn shape(tokens: u32) -> KvShape {
        KvShape {
            layers: 3,
            tokens_per_page: tokens,
            heads: HeadRange::new(0, 2),
            head_dim: 16,
            dtype: Dtype::Bf16,
        }
    }

    #[test]
    fn consecutive_pages_are_one_range_for_each_plane() {
        let layout = shape(4).vllm_flash(64).unwrap();
        let (ranges, exact) = cover(&layout, &[7, 5, 6], 64);
        assert!(exact);
        let planes: usize = layout.layers.iter().map(|layer| layer.planes.len()).sum();
        assert_eq!(ranges.len(), planes);
        let (ranges, exact) = cover(&layout, &[5, 7], 2 * planes - 1);
        assert!(!exact);
        // Coarser: page 6 is in between.
        let (bounds, _) = cover(&layout, &[5, 6, 7], usize::MAX);
        let first = |ranges: &[Range]| ranges.first().map(|range| (range.region, range.offset));
        assert_eq!(first(&ranges), first(&bounds));
    }

    #[test]
    fn no_pages_need_no_range() {
        let layout = shape(4).vllm_flash(64).unwrap();
        assert_eq!(cover(&layout, &[], 64), (Vec::new(), true));
    }

    proptest! {
        /// Every byte of the pages is covered, and if the cover is exact no byte of another page.
        #[test]
        fn the_cover_holds_the_pages_and_no_other(
            pages in prop::collection::btree_set(0u32..40, 1..12),
            most in 1usize..80,
        ) {
            let layout = shape(4).vllm_flash(40).unwrap();
            let pages: Vec<u32> = pages.into_iter().collect();
            let (ranges, exact) = cover(&layout, &pages, most);
            let sorted = ranges.windows(2).all(|pair| {
                pair[0].region < pair[1].region || pair[0].end() < pair[1].offset
            });
            prop_assert!(sorted);
            for layer in &layout.layers {
                for plane in &layer.planes {
                    let span = span(plane, layer.tokens_per_page);
                    for page in 0..layout.pages {
                        let own = range(plane, span, page, page);
                        let touches = ranges.iter().any(|range| {
                            range.region == own.region
                                && range.offset < own.end()
                                && own.offset < range.end()
                        });
                        let inside = ranges.iter().any(|range| {
                            range.region == own.region
                                && range.offset <= own.offset
                                && own.end() <= range.end()
                        });
                        match pages.contains(&page) {
                            true => prop_assert!(inside, "page {page} is not covered"),
                            false => prop_assert!(!exact || !touches, "page {page} is open"),
                        }
                    }
                }
            }
        }
    }
}
