//! The block pool: who uses which block, and which blocks hold which prefix.
//!
//! Invariants: a block is in exactly one state. A block in use or granted is never handed out and never evicted. A hash
//! names at most one block, and only one that is cached or in use. Each change of what can be found by hash is told,
//! in order. A granted block comes back only by [`Pool::arrived`] or [`Pool::fenced`].

use std::collections::HashMap;

use super::{BlockHash, BlockStats, KvChange};
use crate::request::{BlockId, TokenId};

const NOBODY: BlockId = BlockId::MAX;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Nothing is in it.
    Free,
    /// Nobody uses it, but it can be found by its hash. In the list of the least recently used.
    Cached,
    /// That many use it.
    Used(u32),
    /// A peer writes to it.
    Granted,
    /// A peer may still write to it, or read it.
    Lost,
}

struct Block {
    state: State,
    hash: Option<BlockHash>,
    /// A peer may still read it: it is lost once nobody uses it.
    is_tainted: bool,
    /// Neighbours in the list of cached blocks.
    older: BlockId,
    newer: BlockId,
}

/// See the module.
pub(super) struct Pool {
    blocks: Vec<Block>,
    free: Vec<BlockId>,
    found_by: HashMap<BlockHash, BlockId>,
    oldest: BlockId,
    newest: BlockId,
    counts: BlockStats,
    evicted: u64,
    block_tokens: usize,
    changes: Vec<KvChange>,
}

impl Pool {
    pub(super) fn new(blocks: u32, block_tokens: usize) -> Self {
        let empty = |_| Block {
            state: State::Free,
            hash: None,
            is_tainted: false,
            older: NOBODY,
            newer: NOBODY,
        };
        let total = blocks as usize;
        Self {
            blocks: (0..blocks).map(empty).collect(),
            free: (0..blocks).rev().collect(),
            found_by: HashMap::new(),
            oldest: NOBODY,
            newest: NOBODY,
            counts: BlockStats {
                total,
                free: total,
                ..BlockStats::default()
            },
            evicted: 0,
            block_tokens,
            changes: Vec::new(),
        }
    }

    pub(super) fn counts(&self) -> BlockStats {
        self.counts
    }

    /// Blocks evicted so far.
    pub(super) fn evicted(&self) -> u64 {
        self.evicted
    }

    /// What has changed since the last call.
    pub(super) fn take_changes(&mut self) -> Vec<KvChange> {
        std::mem::take(&mut self.changes)
    }

    /// A block for one user: a free one, or the least recently used cached one.
    pub(super) fn allocate(&mut self) -> Option<BlockId> {
        self.take(State::Used(1))
    }

    /// `count` blocks for a peer to write to, or none.
    pub(super) fn grant(&mut self, count: usize) -> Option<Vec<BlockId>> {
        if self.counts.available() < count {
            return None;
        }
        (0..count).map(|_| self.take(State::Granted)).collect()
    }

    fn take(&mut self, state: State) -> Option<BlockId> {
        let block = match self.free.last() {
            Some(&block) => block,
            None => self.evict()?,
        };
        self.free.pop();
        self.set(block, state);
        Some(block)
    }

    /// Makes the least recently used cached block the last free one.
    fn evict(&mut self) -> Option<BlockId> {
        let block = self.oldest;
        if block == NOBODY {
            return None;
        }
        self.unlink(block);
        self.forget(block);
        self.evicted += 1;
        self.set(block, State::Free);
        self.free.push(block);
        Some(block)
    }

    /// The block with this prefix; it has one user more.
    pub(super) fn find(&mut self, hash: &BlockHash) -> Option<BlockId> {
        let block = *self.found_by.get(hash)?;
        self.share(block);
        Some(block)
    }

    /// How many of `hashes`, from the first on, could be found, and how many of these are cached: taking them leaves
    /// fewer available.
    pub(super) fn peek(&self, hashes: &[BlockHash]) -> (usize, usize) {
        let (mut found, mut cached) = (0, 0);
        for block in hashes.iter().map_while(|hash| self.found_by.get(hash)) {
            found += 1;
            cached += usize::from(self.blocks[*block as usize].state == State::Cached);
        }
        (found, cached)
    }

    /// One user more of a block that is in use or cached.
    pub(super) fn share(&mut self, block: BlockId) {
        match self.blocks[block as usize].state {
            State::Cached => {
                self.unlink(block);
                self.set(block, State::Used(1));
            }
            State::Used(users) => self.set(block, State::Used(users + 1)),
            state => unreachable!("block {block} is shared while it is {state:?}"),
        }
    }

    /// Whether more than one use it.
    pub(super) fn is_shared(&self, block: BlockId) -> bool {
        matches!(self.blocks[block as usize].state, State::Used(users) if users > 1)
    }

    /// One user less. A block that holds a prefix stays findable.
    pub(super) fn release(&mut self, block: BlockId) {
        match self.blocks[block as usize].state {
            State::Used(1) if self.blocks[block as usize].hash.is_some() => {
                self.set(block, State::Cached);
                self.link(block);
            }
            State::Used(1) if self.blocks[block as usize].is_tainted => {
                self.set(block, State::Lost);
            }
            State::Used(1) => self.give_back(block),
            State::Used(users) => self.set(block, State::Used(users - 1)),
            state => unreachable!("block {block} is released while it is {state:?}"),
        }
    }

    /// One user less of each. The last ones are evicted first: prefixes are found from the front.
    pub(super) fn release_all(&mut self, blocks: impl DoubleEndedIterator<Item = BlockId>) {
        for block in blocks.rev() {
            self.release(block);
        }
    }

    /// `block`, which is in use and full, can be found from now on, unless another one is found already.
    pub(super) fn publish(
        &mut self,
        block: BlockId,
        hash: BlockHash,
        parent: Option<BlockHash>,
        tokens: &[TokenId],
    ) {
        let entry = &mut self.blocks[block as usize];
        if entry.hash.is_some() || entry.is_tainted || self.found_by.contains_key(&hash) {
            return;
        }
        entry.hash = Some(hash);
        self.found_by.insert(hash, block);
        if let Some(KvChange::Stored {
            hashes,
            tokens: all,
            ..
        }) = self.changes.last_mut()
            && hashes.last().copied() == parent
        {
            hashes.push(hash);
            all.extend_from_slice(tokens);
        } else {
            self.changes.push(KvChange::Stored {
                hashes: vec![hash],
                parent,
                tokens: tokens.to_vec(),
                block_size: self.block_tokens,
            });
        }
    }

    /// A granted block has been written; it has one user.
    pub(super) fn arrived(&mut self, block: BlockId) {
        self.leave_grant(block, State::Used(1));
    }

    /// No write can land in a granted block any more.
    pub(super) fn fenced(&mut self, block: BlockId) {
        self.leave_grant(block, State::Free);
        self.free.push(block);
    }

    /// A granted block may still be written.
    pub(super) fn lose_granted(&mut self, block: BlockId) {
        self.leave_grant(block, State::Lost);
    }

    fn leave_grant(&mut self, block: BlockId, to: State) {
        let state = self.blocks[block as usize].state;
        assert!(
            state == State::Granted,
            "block {block} is {state:?}, not granted"
        );
        self.set(block, to);
    }

    /// A block that was pushed from may still be read: it must not change any more. It has one user less, is found no
    /// more, and is lost after its last user.
    pub(super) fn lose_used(&mut self, block: BlockId) {
        self.forget(block);
        self.blocks[block as usize].is_tainted = true;
        self.release(block);
    }

    /// Nothing is found any more. Blocks in use stay with their users.
    pub(super) fn clear(&mut self) {
        while self.oldest != NOBODY {
            let block = self.oldest;
            self.unlink(block);
            self.blocks[block as usize].hash = None;
            self.give_back(block);
        }
        for (_, block) in self.found_by.drain() {
            self.blocks[block as usize].hash = None;
        }
        self.changes.push(KvChange::Cleared);
    }

    fn give_back(&mut self, block: BlockId) {
        self.set(block, State::Free);
        self.free.push(block);
    }

    fn forget(&mut self, block: BlockId) {
        let Some(hash) = self.blocks[block as usize].hash.take() else {
            return;
        };
        self.found_by.remove(&hash);
        if let Some(KvChange::Removed { hashes }) = self.changes.last_mut() {
            hashes.push(hash);
        } else {
            let hashes = vec![hash];
            self.changes.push(KvChange::Removed { hashes });
        }
    }

    fn set(&mut self, block: BlockId, state: State) {
        let before = std::mem::replace(&mut self.blocks[block as usize].state, state);
        *self.count(before) -= 1;
        *self.count(state) += 1;
    }

    fn count(&mut self, state: State) -> &mut usize {
        match state {
            State::Free => &mut self.counts.free,
            State::Cached => &mut self.counts.cached,
            State::Used(_) => &mut self.counts.used,
            State::Granted => &mut self.counts.granted,
            State::Lost => &mut self.counts.lost,
        }
    }

    fn link(&mut self, block: BlockId) {
        let newest = std::mem::replace(&mut self.newest, block);
        let entry = &mut self.blocks[block as usize];
        (entry.older, entry.newer) = (newest, NOBODY);
        match newest {
            NOBODY => self.oldest = block,
            newest => self.blocks[newest as usize].newer = block,
        }
    }

    fn unlink(&mut self, block: BlockId) {
        let entry = &mut self.blocks[block as usize];
        let (older, newer) = (entry.older, entry.newer);
        (entry.older, entry.newer) = (NOBODY, NOBODY);
        match older {
            NOBODY => self.oldest = newer,
            older => self.blocks[older as usize].newer = newer,
        }
        match newer {
            NOBODY => self.newest = older,
            newer => self.blocks[newer as usize].older = older,
        }
    }
}

#[cfg(test)]
impl Pool {
    /// Panics unless every block is in one place, and `users` is what its count says.
    pub(super) fn check(&self, users: &HashMap<BlockId, u32>, granted: &[BlockId]) {
        let mut counted = BlockStats {
            total: self.blocks.len(),
            ..BlockStats::default()
        };
        let mut listed = Vec::new();
        let mut next = self.oldest;
        while next != NOBODY {
            listed.push(next);
            next = self.blocks[next as usize].newer;
        }
        for (id, block) in (0..).zip(&self.blocks) {
            let is_free = self.free.contains(&id);
            assert_eq!(is_free, block.state == State::Free, "block {id}");
            let is_listed = listed.contains(&id);
            assert_eq!(is_listed, block.state == State::Cached, "block {id}");
            let is_granted = granted.contains(&id);
            assert_eq!(is_granted, block.state == State::Granted, "block {id}");
            let expected = users.get(&id).copied().unwrap_or(0);
            match block.state {
                State::Used(count) => assert_eq!(count, expected, "users of block {id}"),
                _ => assert_eq!(expected, 0, "block {id} is {:?}", block.state),
            }
            if let Some(hash) = block.hash {
                assert_eq!(self.found_by.get(&hash), Some(&id), "block {id}");
                assert!(matches!(block.state, State::Cached | State::Used(_)));
            } else {
                assert_ne!(block.state, State::Cached, "block {id}");
            }
            match block.state {
                State::Free => counted.free += 1,
                State::Cached => counted.cached += 1,
                State::Used(_) => counted.used += 1,
                State::Granted => counted.granted += 1,
                State::Lost => counted.lost += 1,
            }
        }
        assert_eq!(counted, self.counts);
        let hashed = self.blocks.iter().filter(|b| b.hash.is_some()).count();
        assert_eq!(hashed, self.found_by.len());
    }

    /// What can be found.
    pub(super) fn hashes(&self) -> std::collections::BTreeSet<BlockHash> {
        self.found_by.keys().copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(n: u8) -> BlockHash {
        BlockHash([n; 32])
    }

    /// A cached block for each of these.
    fn cache(pool: &mut Pool, hashes: &[u8]) -> Vec<BlockId> {
        let blocks: Vec<_> = hashes
            .iter()
            .map(|&n| {
                let block = pool.allocate().expect("a block");
                pool.publish(block, hash(n), None, &[0, 0]);
                block
            })
            .collect();
        pool.release_all(blocks.iter().copied());
        pool.take_changes();
        blocks
    }

    #[test]
    fn the_least_recently_used_is_evicted_and_the_end_of_a_prefix_before_its_beginning() {
        let mut pool = Pool::new(4, 2);
        let prefix = cache(&mut pool, &[1, 2, 3]);
        cache(&mut pool, &[4]);
        // Block 3 is used again: it is younger than all.
        assert_eq!(pool.find(&hash(3)), Some(prefix[2]));
        pool.release(prefix[2]);

        let order: Vec<_> = (0..4).map(|_| pool.allocate()).collect();
        assert!(order.iter().all(Option::is_some));
        let hashes = [2, 1, 4, 3].map(hash).to_vec();
        assert_eq!(pool.take_changes(), [KvChange::Removed { hashes }]);
        assert_eq!(pool.allocate(), None);
        assert_eq!(pool.evicted(), 4);
    }

    #[test]
    fn what_is_used_or_granted_is_never_evicted() {
        let mut pool = Pool::new(3, 2);
        cache(&mut pool, &[1]);
        let locked = pool.find(&hash(1)).expect("cached");
        assert_eq!(pool.grant(3), None);
        let granted = pool.grant(2).expect("two blocks");
        assert_eq!(pool.allocate(), None);
        assert_eq!(pool.grant(1), None);
        pool.check(&HashMap::from([(locked, 1)]), &granted);

        pool.fenced(granted[0]);
        assert_eq!(pool.allocate(), Some(granted[0]));
        pool.lose_granted(granted[1]);
        assert_eq!(pool.allocate(), None);
        assert_eq!(pool.counts().lost, 1);
    }

    #[test]
    fn a_hash_names_one_block() {
        let mut pool = Pool::new(2, 2);
        let (a, b) = (pool.allocate().expect("one"), pool.allocate().expect("two"));
        pool.publish(a, hash(1), None, &[7, 8]);
        pool.publish(b, hash(1), None, &[7, 8]);
        assert_eq!(pool.take_changes().len(), 1);
        pool.release(a);
        pool.release(b);
        // The second one is not found, so it is free.
        assert_eq!((pool.counts().cached, pool.counts().free), (1, 1));
        assert_eq!(pool.find(&hash(1)), Some(a));
    }

    #[test]
    fn consecutive_blocks_are_told_as_one_run() {
        let mut pool = Pool::new(3, 2);
        for (n, parent) in [(1, None), (2, Some(hash(1))), (3, None)] {
            let block = pool.allocate().expect("a block");
            pool.publish(block, hash(n), parent, &[n.into(), 0]);
        }
        let stored = |hashes: &[u8], tokens: &[TokenId]| KvChange::Stored {
            hashes: hashes.iter().map(|&n| hash(n)).collect(),
            parent: None,
            tokens: tokens.to_vec(),
            block_size: 2,
        };
        assert_eq!(
            pool.take_changes(),
            [stored(&[1, 2], &[1, 0, 2, 0]), stored(&[3], &[3, 0])]
        );
    }

    #[test]
    fn clearing_leaves_used_blocks_to_their_users() {
        let mut pool = Pool::new(2, 2);
        cache(&mut pool, &[1, 2]);
        let used = pool.find(&hash(1)).expect("cached");
        pool.clear();
        assert_eq!(pool.take_changes(), [KvChange::Cleared]);
        pool.check(&HashMap::from([(used, 1)]), &[]);
        pool.release(used);
        assert_eq!(pool.counts().free, 2);
    }

    #[test]
    fn blocks_that_may_still_be_read_are_not_used_again() {
        let mut pool = Pool::new(2, 2);
        cache(&mut pool, &[1]);
        let block = pool.find(&hash(1)).expect("cached");
        pool.share(block);
        pool.lose_used(block);
        assert_eq!(pool.find(&hash(1)), None);
        assert_eq!(pool.counts().used, 1);
        pool.release(block);
        assert_eq!((pool.counts().lost, pool.counts().free), (1, 1));
    }
}
