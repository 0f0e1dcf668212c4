//! What is in the prefix cache, told to others: changes with sequence numbers, and a bounded history of them.
//!
//! Invariant: who applies all events in order has the set of hashes that the pool finds.

use std::{
    collections::{HashMap, VecDeque},
    fmt,
};

use tokio::sync::broadcast;

use crate::request::TokenId;

/// Name of a full block and of everything before it: the same for the same model, salt and tokens.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockHash(pub [u8; 32]);

impl fmt::Display for BlockHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for BlockHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A change of the prefix cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvEvent {
    /// From 1 on, without gaps.
    pub sequence: u64,
    /// What has changed.
    pub change: KvChange,
}

/// What has changed in the prefix cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KvChange {
    /// Consecutive blocks of one prefix can be found.
    Stored {
        /// The blocks, in order.
        hashes: Vec<BlockHash>,
        /// What comes before the first of them; nothing at the beginning.
        parent: Option<BlockHash>,
        /// Their tokens, `block_size` for each.
        tokens: Vec<TokenId>,
        /// Tokens of a block.
        block_size: usize,
    },
    /// Blocks can no longer be found.
    Removed {
        /// The blocks.
        hashes: Vec<BlockHash>,
    },
    /// None can be found any more.
    Cleared,
}

/// Part of the history.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replay {
    /// The events from the sequence number asked for on, as far as they are kept.
    pub events: Vec<KvEvent>,
    /// Whether none in between are missing. If some are, start again from a [`Snapshot`].
    pub is_complete: bool,
}

/// What can be found, and since when.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// The last event that is part of it.
    pub sequence: u64,
    /// The blocks, in no order.
    pub blocks: Vec<StoredBlock>,
}

/// A block that can be found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredBlock {
    /// Its name.
    pub hash: BlockHash,
    /// What comes before it; nothing at the beginning.
    pub parent: Option<BlockHash>,
    /// Its tokens.
    pub tokens: Vec<TokenId>,
}

/// The history, and those who listen.
pub(super) struct KvEvents {
    history: VecDeque<KvEvent>,
    limit: usize,
    last: u64,
    /// What the events so far say.
    present: HashMap<BlockHash, StoredBlock>,
    listeners: broadcast::Sender<KvEvent>,
}

impl KvEvents {
    pub(super) fn new(limit: usize) -> Self {
        Self {
            history: VecDeque::new(),
            limit,
            last: 0,
            present: HashMap::new(),
            listeners: broadcast::Sender::new(limit.clamp(1, 1 << 16)),
        }
    }

    /// Tells `changes`, in order.
    pub(super) fn publish(&mut self, changes: impl IntoIterator<Item = KvChange>) {
        for change in changes {
            self.last += 1;
            self.apply(&change);
            let event = KvEvent {
                sequence: self.last,
                change,
            };
            if self.limit > 0 {
                if self.history.len() == self.limit {
                    self.history.pop_front();
                }
                self.history.push_back(event.clone());
            }
            // An error only says that nobody listens.
            let _ = self.listeners.send(event);
        }
    }

    fn apply(&mut self, change: &KvChange) {
        match change {
            KvChange::Stored {
                hashes,
                parent,
                tokens,
                block_size,
            } => {
                let mut parent = *parent;
                for (&hash, tokens) in hashes.iter().zip(tokens.chunks((*block_size).max(1))) {
                    let tokens = tokens.to_vec();
                    let block = StoredBlock {
                        hash,
                        parent,
                        tokens,
                    };
                    self.present.insert(hash, block);
                    parent = Some(hash);
                }
            }
            KvChange::Removed { hashes } => {
                hashes
                    .iter()
                    .for_each(|hash| drop(self.present.remove(hash)));
            }
            KvChange::Cleared => self.present.clear(),
        }
    }

    pub(super) fn snapshot(&self) -> Snapshot {
        Snapshot {
            sequence: self.last,
            blocks: self.present.values().cloned().collect(),
        }
    }

    pub(super) fn subscribe(&self) -> broadcast::Receiver<KvEvent> {
        self.listeners.subscribe()
    }

    pub(super) fn replay(&self, from: u64) -> Replay {
        let kept_from = self.last + 1 - self.history.len() as u64;
        let skipped = from.max(1).saturating_sub(kept_from);
        let skipped = usize::try_from(skipped).unwrap_or(usize::MAX);
        Replay {
            events: self.history.iter().skip(skipped).cloned().collect(),
            is_complete: from.max(1) >= kept_from && from <= self.last + 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_history_is_bounded_and_says_what_is_missing() {
        let mut events = KvEvents::new(3);
        let mut listener = events.subscribe();
        assert!(events.replay(1).is_complete && events.replay(0).is_complete);
        events.publish((0..5).map(|_| KvChange::Cleared));

        let numbers = |replay: Replay| replay.events.iter().map(|e| e.sequence).collect::<Vec<_>>();
        assert!(!events.replay(2).is_complete);
        assert_eq!(numbers(events.replay(2)), [3, 4, 5]);
        assert!(events.replay(3).is_complete);
        assert_eq!(numbers(events.replay(4)), [4, 5]);
        assert!(events.replay(6).is_complete && numbers(events.replay(6)).is_empty());
        // From an earlier start of the engine.
        assert!(!events.replay(7).is_complete);

        // The listener was slower than its channel, which is no longer than a power of two.
        assert!(matches!(
            listener.try_recv(),
            Err(broadcast::error::TryRecvError::Lagged(_))
        ));
        assert_eq!(listener.try_recv().map(|event| event.sequence), Ok(2));
    }

    #[test]
    fn a_snapshot_is_what_the_events_say() {
        let hash = |n| BlockHash([n; 32]);
        let mut events = KvEvents::new(1);
        let stored = KvChange::Stored {
            hashes: vec![hash(1), hash(2)],
            parent: None,
            tokens: vec![5, 6, 7, 8],
            block_size: 2,
        };
        events.publish([
            stored.clone(),
            KvChange::Removed {
                hashes: vec![hash(1)],
            },
        ]);
        assert_eq!(
            events.snapshot(),
            Snapshot {
                sequence: 2,
                blocks: vec![StoredBlock {
                    hash: hash(2),
                    parent: Some(hash(1)),
                    tokens: vec![7, 8],
                }],
            }
        );
        events.publish([KvChange::Cleared]);
        assert!(events.snapshot().blocks.is_empty());
    }
}
