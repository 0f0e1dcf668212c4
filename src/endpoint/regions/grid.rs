//! Where the registrations of one region begin and end: the arithmetic of extents, for both sides.
//!
//! A device may register less than a region is long. The region is then registered in extents that end at multiples of
//! one size in the address space of the rail, so the extent of a byte is found by division, and the boundaries are
//! those of pages. Pure; the peer's numbers are checked by [`Grid::peer`].

use crate::wire::MAX_EXTENTS;

/// How a region is cut on one rail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Grid {
    /// How requests and peers name the first byte.
    pub(crate) address: u64,
    /// Bytes between two boundaries; 0 if the region is not cut.
    pub(crate) size: u64,
}

impl Grid {
    /// Of a region that a rail does not reach.
    pub(crate) const NOWHERE: Self = Self {
        address: 0,
        size: 0,
    };

    /// A region of `length` bytes at `address`, cut if it is longer than `limit`. `None` if it cannot be: the limit is
    /// less than a page, or there would be more extents than a peer can be told of.
    pub(crate) fn new(address: u64, length: u64, limit: u64, page: u64) -> Option<Self> {
        if length <= limit {
            return Some(Self { address, size: 0 });
        }
        let size = limit - limit % page.max(1);
        let grid = Self { address, size };
        (size > 0 && grid.count(length)? <= MAX_EXTENTS as u64).then_some(grid)
    }

    /// What a peer says: nothing unless the range exists and `keys` is the number of its extents.
    pub(crate) fn peer(address: u64, size: u64, length: u64, keys: usize) -> Option<Self> {
        let grid = Self { address, size };
        (grid.count(length)? == keys as u64).then_some(grid)
    }

    fn count(&self, length: u64) -> Option<u64> {
        let end = self.address.checked_add(length)?;
        match self.size {
            0 => Some(1),
            // An empty region has its one extent, too.
            size => Some(end.saturating_sub(1).max(self.address) / size - self.address / size + 1),
        }
    }

    /// Whether there is one extent only, without need to ask which.
    pub(crate) fn is_whole(&self) -> bool {
        self.size == 0
    }

    /// The extent that holds the byte at `offset`.
    #[inline]
    pub(crate) fn index(&self, offset: u64) -> usize {
        match self.size {
            0 => 0,
            // Below the number of extents for an offset in the region, so it fits.
            size => ((self.address + offset) / size - self.address / size) as usize,
        }
    }

    /// Bytes from `offset` to the end of its extent; the end of the region is not looked at.
    #[inline]
    pub(crate) fn rest(&self, offset: u64) -> u64 {
        match self.size {
            0 => u64::MAX,
            size => size - (self.address + offset) % size,
        }
    }

    /// The extents of a region of `length` bytes: offset and bytes of each.
    pub(crate) fn extents(self, length: u64) -> impl Iterator<Item = (u64, u64)> {
        let mut next = 0;
        std::iter::from_fn(move || {
            let offset = next;
            let bytes = self.rest(offset).min(length - offset);
            next += bytes;
            (bytes > 0).then_some((offset, bytes))
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_fits_is_not_cut() {
        let grid = Grid::new(0x1234, 4096, 4096, 4096).unwrap();
        assert!(grid.is_whole());
        assert_eq!(grid.extents(4096).collect::<Vec<_>>(), [(0, 4096)]);
        assert_eq!(grid.index(4095), 0);
    }

    #[test]
    fn too_many_extents_are_refused() {
        assert!(Grid::new(0, 1 << 40, 4096, 4096).is_none());
        assert!(Grid::new(0, 8192, 4095, 4096).is_none());
        assert!(Grid::new(u64::MAX - 10, 8192, 4096, 4096).is_none());
    }

    #[test]
    fn a_peer_cannot_lie_about_the_number_of_keys() {
        assert!(Grid::peer(0, 0, 100, 1).is_some());
        assert!(Grid::peer(0, 0, 100, 2).is_none());
        assert!(Grid::peer(50, 100, 100, 2).is_some());
        assert!(Grid::peer(50, 100, 100, 1).is_none());
        assert!(Grid::peer(u64::MAX, 0, 1, 1).is_none());
        assert!(Grid::peer(u64::MAX - 1, 1, 1, 1).is_some());
    }

    proptest! {
        #[test]
        fn extents_cover_the_region_once(
            address in 0u64..1 << 40,
            pages in 1u64..300,
            odd in 0u64..4096,
            limit in 4096u64..100_000,
        ) {
            let length = pages * 4096 - odd;
            let grid = Grid::new(address, length, limit, 4096).unwrap();
            let mut next = 0;
            for (index, (offset, bytes)) in grid.extents(length).enumerate() {
                prop_assert_eq!(offset, next);
                prop_assert!(bytes <= limit);
                prop_assert_eq!(grid.index(offset), index);
                prop_assert_eq!(grid.index(offset + bytes - 1), index);
                next += bytes;
                // Every boundary inside is one of pages.
                prop_assert!(next == length || (address + next) % 4096 == 0);
            }
            prop_assert_eq!(next, length);
            let keys = grid.extents(length).count();
            prop_assert_eq!(Grid::peer(address, grid.size, length, keys), Some(grid));
            prop_assert!(Grid::peer(address, grid.size, length, keys + 1).is_none());
        }
    }
}
