//! Checks on lists of page numbers, done once for each list. Any thread; nothing here panics on a peer's input.

/// Why a list of pages is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PageError {
    /// A page the pool does not have.
    #[error("page {page} (position {position}) is out of range, the pool has {pages} pages")]
    OutOfRange {
        /// The page.
        page: u32,
        /// Where in the list.
        position: usize,
        /// Pages of the pool.
        pages: u32,
    },
    /// A page that is named twice.
    #[error("page {page} is named twice, at positions {first} and {second}")]
    Duplicate {
        /// The page.
        page: u32,
        /// Where first.
        first: usize,
        /// Where again.
        second: usize,
    },
}

impl PageError {
    /// Whether the same call may succeed later: never, the list is wrong for good.
    pub const fn is_retryable(&self) -> bool {
        false
    }
}

/// Checks that all of `pages` are below `limit`, the number of pages in the pool.
///
/// # Errors
/// [`PageError::OutOfRange`] for the first that is not.
pub fn check_range(pages: &[u32], limit: u32) -> Result<(), PageError> {
    // The maximum first, because that is a loop the compiler vectorises.
    if pages.iter().copied().max().is_none_or(|max| max < limit) {
        return Ok(());
    }
    match pages.iter().position(|&page| page >= limit) {
        Some(position) => Err(PageError::OutOfRange {
            page: pages[position],
            position,
            pages: limit,
        }),
        None => Ok(()),
    }
}

/// Checks that all of `pages` are below `limit` and that none occurs twice.
///
/// Uses a bitmap of `limit` bits, or a sorted copy where the list is so short that the bitmap would be the larger.
///
/// # Errors
/// [`PageError::OutOfRange`] first, else [`PageError::Duplicate`].
pub fn check_unique(pages: &[u32], limit: u32) -> Result<(), PageError> {
    check_range(pages, limit)?;
    let words = (limit as usize).div_ceil(64);
    let repeated = if words * 2 > pages.len().saturating_mul(4).max(1024) {
        repeated_by_sorting(pages)
    } else {
        repeated_by_bitmap(pages, words)
    };
    let Some(page) = repeated else { return Ok(()) };
    let mut positions = pages
        .iter()
        .enumerate()
        .filter(|&(_, &p)| p == page)
        .map(|(i, _)| i);
    match (positions.next(), positions.next()) {
        (Some(first), Some(second)) => Err(PageError::Duplicate {
            page,
            first,
            second,
        }),
        _ => Ok(()),
    }
}

fn repeated_by_bitmap(pages: &[u32], words: usize) -> Option<u32> {
    let mut seen = vec![0u64; words];
    pages.iter().copied().find(|&page| {
        let (word, bit) = (page as usize / 64, 1 << (page % 64));
        let again = seen[word] & bit != 0;
        seen[word] |= bit;
        again
    })
}

fn repeated_by_sorting(pages: &[u32]) -> Option<u32> {
    let mut sorted = pages.to_vec();
    sorted.sort_unstable();
    sorted
        .windows(2)
        .find(|pair| pair[0] == pair[1])
        .map(|pair| pair[0])
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    #[test]
    fn both_ways_find_the_same_repetition() {
        for limit in [100, u32::MAX] {
            assert_eq!(
                check_unique(&[3, 7, 9, 7, 1], limit),
                Err(PageError::Duplicate {
                    page: 7,
                    first: 1,
                    second: 3
                })
            );
            assert_eq!(check_unique(&[3, 7, 9, 1], limit), Ok(()));
            assert_eq!(check_unique(&[], limit), Ok(()));
        }
        assert_eq!(check_unique(&[], 0), Ok(()));
    }

    #[test]
    fn range_is_checked_first() {
        assert_eq!(
            check_unique(&[5, 5, 10], 10),
            Err(PageError::OutOfRange {
                page: 10,
                position: 2,
                pages: 10
            })
        );
        assert!(check_range(&[0], 0).is_err());
    }

    proptest! {
        #[test]
        fn agrees_with_a_set(pages in prop::collection::vec(0u32..5000, 0..300), limit in 1u32..6000) {
            let verdict = check_unique(&pages, limit);
            if pages.iter().any(|&page| page >= limit) {
                let out_of_range = matches!(verdict, Err(PageError::OutOfRange { .. }));
                prop_assert!(out_of_range);
            } else {
                let distinct: HashSet<_> = pages.iter().collect();
                prop_assert_eq!(verdict.is_ok(), distinct.len() == pages.len());
            }
            prop_assert_eq!(repeated_by_sorting(&pages).is_some(), repeated_by_bitmap(&pages, 100).is_some());
        }
    }
}
