//! What is counted: the parts of a grant.
//!
//! The pages of a grant, in its own order, are cut into at most `parts_per_layer` *blocks* of equal size. One block of
//! one layer is a *part*; one more part is the tail. The writer sends all of a part over one lane and ends it with one
//! immediate, so whatever number of lanes and rails carry the parts, and in whatever order they end, the reader knows
//! exactly which bytes it holds. A part that is sent twice counts once.

/// How the pages of a grant are cut into blocks. Both sides compute the same from the grant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Blocks {
    layers: u32,
    pages: u32,
    block_pages: u32,
    per_layer: u32,
}

impl Blocks {
    /// The largest number of parts, bounded by the bits of an immediate.
    pub(crate) const MAX_PARTS: u32 = 1 << 20;

    /// Cuts `pages` pages of `layers` layers into at most `parts_per_layer` blocks each. `None` if there is nothing to
    /// cut or the parts (with the tail) would exceed [`Blocks::MAX_PARTS`].
    pub(crate) fn new(layers: u32, pages: u32, parts_per_layer: u16) -> Option<Self> {
        if layers == 0 || pages == 0 || parts_per_layer == 0 {
            return None;
        }
        let block_pages = pages.div_ceil(u32::from(parts_per_layer));
        let per_layer = pages.div_ceil(block_pages);
        let parts = layers.checked_mul(per_layer)?.checked_add(1)?;
        (parts <= Self::MAX_PARTS).then_some(Self {
            layers,
            pages,
            block_pages,
            per_layer,
        })
    }

    /// Layers.
    pub(crate) fn layers(&self) -> u32 {
        self.layers
    }

    /// Blocks of each layer.
    pub(crate) fn per_layer(&self) -> u32 {
        self.per_layer
    }

    /// Number of parts, the tail included.
    pub(crate) fn parts(&self) -> u32 {
        self.layers * self.per_layer + 1
    }

    /// The number of the tail's part.
    pub(crate) fn tail(&self) -> u32 {
        self.layers * self.per_layer
    }

    /// The part that block `block` of `layer` is.
    pub(crate) fn part(&self, layer: u32, block: u32) -> u32 {
        debug_assert!(layer < self.layers && block < self.per_layer);
        layer * self.per_layer + block
    }

    /// The layer of a part, `None` for the tail.
    pub(crate) fn layer_of(&self, part: u32) -> Option<u32> {
        (part < self.tail()).then(|| part / self.per_layer)
    }

    /// The block that holds position `position` of the grant's page list.
    pub(crate) fn block_of(&self, position: u32) -> u32 {
        position / self.block_pages
    }

    /// The positions of block `block`: first and one past the last.
    pub(crate) fn positions(&self, block: u32) -> (u32, u32) {
        let first = block * self.block_pages;
        (first, (first + self.block_pages).min(self.pages))
    }
}

/// What an announced part was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PartOutcome {
    /// No such part: the peer broke the protocol.
    Unknown,
    /// It had been counted before.
    Duplicate,
    /// Counted; more of its layer is missing.
    Counted,
    /// Counted, and this layer is now whole.
    LayerComplete(u32),
    /// Counted: it was the tail.
    Tail,
}

/// Which parts have arrived.
#[derive(Debug)]
pub(crate) struct PartMap {
    blocks: Blocks,
    arrived: Vec<u64>,
    missing_of_layer: Vec<u32>,
    missing: u32,
}

impl PartMap {
    pub(crate) fn new(blocks: Blocks) -> Self {
        Self {
            blocks,
            arrived: vec![0; blocks.parts().div_ceil(64) as usize],
            missing_of_layer: vec![blocks.per_layer(); blocks.layers() as usize],
            missing: blocks.parts(),
        }
    }

    /// Counts `part`, once.
    pub(crate) fn arrive(&mut self, part: u32) -> PartOutcome {
        if part >= self.blocks.parts() {
            return PartOutcome::Unknown;
        }
        let (word, bit) = ((part / 64) as usize, 1u64 << (part % 64));
        if self.arrived[word] & bit != 0 {
            return PartOutcome::Duplicate;
        }
        self.arrived[word] |= bit;
        self.missing -= 1;
        match self.blocks.layer_of(part) {
            None => PartOutcome::Tail,
            Some(layer) => {
                let missing = &mut self.missing_of_layer[layer as usize];
                *missing -= 1;
                if *missing == 0 {
                    PartOutcome::LayerComplete(layer)
                } else {
                    PartOutcome::Counted
                }
            }
        }
    }

    /// Whether `part` has been counted; `None` if there is no such part.
    pub(crate) fn has(&self, part: u32) -> Option<bool> {
        (part < self.blocks.parts())
            .then(|| self.arrived[(part / 64) as usize] & 1 << (part % 64) != 0)
    }

    /// Whether every part, the tail included, has arrived.
    pub(crate) fn is_complete(&self) -> bool {
        self.missing == 0
    }

    /// Parts that have not arrived.
    pub(crate) fn missing(&self) -> u32 {
        self.missing
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn blocks_cover_every_position_once(layers in 1u32..200, pages in 1u32..5000, parts in 1u16..70) {
            let blocks = Blocks::new(layers, pages, parts).unwrap();
            prop_assert!(blocks.per_layer() <= u32::from(parts));
            let mut next = 0;
            for block in 0..blocks.per_layer() {
                let (first, end) = blocks.positions(block);
                prop_assert_eq!(first, next);
                prop_assert!(end > first);
                for position in first..end {
                    prop_assert_eq!(blocks.block_of(position), block);
                }
                next = end;
            }
            prop_assert_eq!(next, pages);
        }

        #[test]
        fn any_order_and_any_repetition_counts_once(
            layers in 1u32..6,
            pages in 1u32..40,
            parts in 1u16..8,
            order in prop::collection::vec(any::<prop::sample::Index>(), 0..300),
        ) {
            let blocks = Blocks::new(layers, pages, parts).unwrap();
            let mut map = PartMap::new(blocks);
            let mut model = std::collections::BTreeSet::new();
            for index in order {
                let part = index.index(blocks.parts() as usize) as u32;
                let fresh = model.insert(part);
                prop_assert_eq!(map.has(part), Some(!fresh));
                let outcome = map.arrive(part);
                prop_assert_eq!(fresh, outcome != PartOutcome::Duplicate);
                if let PartOutcome::LayerComplete(layer) = outcome {
                    prop_assert!((0..blocks.per_layer()).all(|b| model.contains(&blocks.part(layer, b))));
                }
                prop_assert_eq!(map.missing() as usize, blocks.parts() as usize - model.len());
                prop_assert_eq!(map.is_complete(), model.len() == blocks.parts() as usize);
            }
        }
    }

    #[test]
    fn parts_beyond_the_immediate_are_refused() {
        assert!(Blocks::new(1 << 10, 1 << 20, 1 << 10).is_none());
        assert!(Blocks::new(0, 1, 1).is_none());
        assert!(Blocks::new(1, 0, 1).is_none());
        let mut map = PartMap::new(Blocks::new(1, 1, 1).unwrap());
        assert_eq!((map.has(1), map.has(2)), (Some(false), None));
        assert_eq!(map.arrive(2), PartOutcome::Unknown);
    }
}
