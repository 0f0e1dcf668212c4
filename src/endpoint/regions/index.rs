//! Which region holds an address, in O(log n). Regions may overlap; the shortest that holds the address is meant, and
//! of equally short ones the latest.
//!
//! Pure. The index is made once for a set of regions: their boundaries cut the address space into segments, and each
//! segment has one answer.

use std::{cmp::Reverse, collections::BTreeSet};

/// One region.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry {
    pub(crate) address: u64,
    pub(crate) length: u64,
    /// Later ones are greater.
    pub(crate) rank: u64,
}

/// See the module's documentation.
#[derive(Debug, Default)]
pub(crate) struct AddressIndex {
    /// Where each segment begins, and the entry that holds it.
    segments: Vec<(u64, Option<usize>)>,
}

impl AddressIndex {
    /// The index of `entries`; answers are positions in it.
    pub(crate) fn new(entries: &[Entry]) -> Self {
        let mut edges: Vec<(u64, bool, usize)> = Vec::with_capacity(entries.len() * 2);
        for (at, entry) in entries.iter().enumerate().filter(|(_, e)| e.length > 0) {
            edges.push((entry.address, true, at));
            // A region that ends with the address space has no end to pass.
            if let Some(end) = entry.address.checked_add(entry.length) {
                edges.push((end, false, at));
            }
        }
        edges.sort_unstable_by_key(|edge| edge.0);
        let mut active = BTreeSet::new();
        let mut segments: Vec<(u64, Option<usize>)> = Vec::new();
        let mut edges = edges.into_iter().peekable();
        while let Some((place, begins, at)) = edges.next() {
            let entry = &entries[at];
            let key = (entry.length, Reverse(entry.rank), at);
            match begins {
                true => active.insert(key),
                false => active.remove(&key),
            };
            if edges.peek().is_none_or(|next| next.0 != place) {
                let holder = active.first().map(|&(_, _, at)| at);
                segments.push((place, holder));
            }
        }
        Self { segments }
    }

    /// The entry that holds `address`.
    pub(crate) fn find(&self, address: u64) -> Option<usize> {
        let behind = self
            .segments
            .partition_point(|segment| segment.0 <= address);
        self.segments.get(behind.checked_sub(1)?)?.1
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn by_looking_at_all(entries: &[Entry], address: u64) -> Option<usize> {
        let holds = |entry: &Entry| {
            entry.length > 0 && entry.address <= address && address - entry.address < entry.length
        };
        (0..entries.len())
            .filter(|&at| holds(&entries[at]))
            .min_by_key(|&at| (entries[at].length, Reverse(entries[at].rank)))
    }

    #[test]
    fn the_last_byte_of_the_address_space_is_found() {
        let index = AddressIndex::new(&[Entry {
            address: u64::MAX,
            length: 1,
            rank: 0,
        }]);
        assert_eq!(index.find(u64::MAX), Some(0));
        assert_eq!(index.find(u64::MAX - 1), None);
    }

    proptest! {
        #[test]
        fn the_answer_is_that_of_looking_at_all(
            ranges in vec((0u64..64, 0u64..24), 0..20),
        ) {
            let entries: Vec<Entry> = (0..)
                .zip(&ranges)
                .map(|(rank, &(address, length))| Entry { address, length, rank })
                .collect();
            let index = AddressIndex::new(&entries);
            for address in 0..96 {
                prop_assert_eq!(index.find(address), by_looking_at_all(&entries, address));
            }
        }
    }
}
