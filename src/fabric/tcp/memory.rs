//! Registered memory: a table that any thread extends and that the context reads without a lock.
//!
//! Writers build a new immutable table and bump a version; the context keeps the last table it saw and fetches a newer
//! one only when the version moved. Keys are never reused, so a stale key names nothing.

use std::{
    hash::{BuildHasher, RandomState},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use parking_lot::Mutex;

use super::super::{Access, LocalKey, MemoryKeys, MrId, RemoteKey, mapping::Mapping};

/// One registration.
#[derive(Clone, Debug)]
pub(super) struct Region {
    keys: MemoryKeys,
    /// How requests and peers name the first byte.
    address: u64,
    length: u64,
    access: Access,
    /// Where a dmabuf is in this process; other memory is where its address says.
    mapping: Option<Arc<Mapping>>,
}

/// A range that a key allows.
#[derive(Clone, Copy, Debug)]
pub(super) struct Found<'a> {
    /// Where it is in this process.
    pub(super) host: u64,
    /// What keeps it there, if it is in a dmabuf.
    pub(super) mapping: Option<&'a Arc<Mapping>>,
}

impl Region {
    fn contains(&self, address: u64, length: u64) -> bool {
        address
            .checked_sub(self.address)
            .and_then(|offset| offset.checked_add(length))
            .is_some_and(|end| end <= self.length)
    }

    fn find(&self, address: u64, length: u64, intent: Intent) -> Option<Found<'_>> {
        (self.contains(address, length) && intent.allowed(self.access)).then(|| Found {
            host: self.host() + (address - self.address),
            mapping: self.mapping.as_ref(),
        })
    }

    fn host(&self) -> u64 {
        self.mapping.as_ref().map_or(self.address, |m| m.first())
    }

    /// Whether bytes of this process at `[first, first + length)` are of it.
    pub(super) fn holds(&self, first: u64, length: u64) -> bool {
        let end = self.host().saturating_add(self.length);
        first < end && first.saturating_add(length) > self.host()
    }
}

/// What a request wants to do to memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Intent {
    /// The local side sends from it.
    LocalRead,
    /// The local side places the answer to its own read.
    LocalWrite,
    /// A peer writes it.
    RemoteWrite,
    /// A peer reads it.
    RemoteRead,
}

impl Intent {
    fn allowed(self, access: Access) -> bool {
        match self {
            Self::LocalRead => true,
            Self::LocalWrite => access.local_write,
            Self::RemoteWrite => access.remote_write,
            Self::RemoteRead => access.remote_read,
        }
    }
}

/// All registrations, sorted by local and by remote key.
#[derive(Clone, Debug, Default)]
struct Table {
    local: Vec<Region>,
    remote: Vec<Region>,
}

/// Keys without repetition and without a pattern: a pseudo-random permutation (Luby and Rackoff, 1988: four Feistel
/// rounds over a keyed hash) of a counter.
#[derive(Debug)]
struct KeySequence {
    secret: RandomState,
    next: u32,
}

impl KeySequence {
    /// The next non-zero key, or nothing once all have been given out.
    fn draw(&mut self) -> Option<u32> {
        loop {
            let counter = self.next;
            self.next = counter.checked_add(1)?;
            let (mut left, mut right) = ((counter >> 16) as u16, counter as u16);
            for round in 0u8..4 {
                let mixed = left ^ self.secret.hash_one((round, right)) as u16;
                (left, right) = (right, mixed);
            }
            let key = u32::from(left) << 16 | u32::from(right);
            if key != 0 {
                return Some(key);
            }
        }
    }
}

/// The registrations of a device. Any thread may call.
#[derive(Debug)]
pub(super) struct Registry {
    version: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    keys: KeySequence,
    next_mr: u64,
    table: Arc<Table>,
}

impl Registry {
    pub(super) fn new() -> Self {
        Self {
            version: AtomicU64::new(0),
            state: Mutex::new(State {
                keys: KeySequence {
                    secret: RandomState::new(),
                    next: 0,
                },
                next_mr: 1,
                table: Arc::default(),
            }),
        }
    }

    /// Adds a range that the caller has checked. Nothing if all keys have been used.
    pub(super) fn insert(
        &self,
        address: u64,
        length: u64,
        access: Access,
        mapping: Option<Mapping>,
    ) -> Option<MemoryKeys> {
        let mut state = self.state.lock();
        let keys = MemoryKeys {
            mr: MrId(state.next_mr),
            local: LocalKey(state.keys.draw()?),
            remote: RemoteKey(state.keys.draw()?),
        };
        state.next_mr += 1;
        let region = Region {
            keys,
            address,
            length,
            access,
            mapping: mapping.map(Arc::new),
        };
        let mut table = Table::clone(&state.table);
        let at = table
            .local
            .partition_point(|r| r.keys.local.0 < keys.local.0);
        table.local.insert(at, region.clone());
        let at = table
            .remote
            .partition_point(|r| r.keys.remote.0 < keys.remote.0);
        table.remote.insert(at, region);
        self.publish(&mut state, table);
        Some(keys)
    }

    /// Removes a registration and returns what it was.
    pub(super) fn remove(&self, mr: MrId) -> Option<Region> {
        let mut state = self.state.lock();
        let mut table = Table::clone(&state.table);
        let at = table.local.iter().position(|r| r.keys.mr == mr)?;
        let region = table.local.remove(at);
        table.remote.retain(|r| r.keys.mr != mr);
        self.publish(&mut state, table);
        Some(region)
    }

    fn publish(&self, state: &mut State, table: Table) {
        state.table = Arc::new(table);
        self.version.fetch_add(1, Ordering::Release);
    }
}

/// The context's view of a [`Registry`]. Owned by the context's thread.
#[derive(Debug)]
pub(super) struct MemoryView {
    registry: Arc<Registry>,
    version: u64,
    table: Arc<Table>,
}

impl MemoryView {
    pub(super) fn new(registry: Arc<Registry>) -> Self {
        let mut view = Self {
            registry,
            version: u64::MAX,
            table: Arc::default(),
        };
        view.refresh();
        view
    }

    /// Where `[address, address + length)` is, if it lies in the registration that local key `key` names, which allows
    /// `intent`.
    pub(super) fn local(
        &mut self,
        key: LocalKey,
        address: u64,
        length: u64,
        intent: Intent,
    ) -> Option<Found<'_>> {
        self.refresh();
        let table = &self.table.local;
        let found = table.binary_search_by_key(&key.0, |r| r.keys.local.0);
        found
            .ok()
            .and_then(|at| table.get(at))?
            .find(address, length, intent)
    }

    /// The same for the remote key `key`.
    pub(super) fn remote(
        &mut self,
        key: u32,
        address: u64,
        length: u64,
        intent: Intent,
    ) -> Option<Found<'_>> {
        self.refresh();
        let table = &self.table.remote;
        let found = table.binary_search_by_key(&key, |r| r.keys.remote.0);
        found
            .ok()
            .and_then(|at| table.get(at))?
            .find(address, length, intent)
    }

    /// Ends a registration; later lookups do not find it.
    pub(super) fn remove(&mut self, mr: MrId) -> Option<Region> {
        let region = self.registry.remove(mr);
        self.refresh();
        region
    }

    fn refresh(&mut self) {
        let version = self.registry.version.load(Ordering::Acquire);
        if version != self.version {
            // The table may be newer than the version just read; then the next call fetches it once more.
            self.version = version;
            self.table = Arc::clone(&self.registry.state.lock().table);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn keys_do_not_repeat() {
        let mut keys = KeySequence {
            secret: RandomState::new(),
            next: 0,
        };
        let drawn: HashSet<u32> = (0..100_000).filter_map(|_| keys.draw()).collect();
        assert_eq!(drawn.len(), 100_000);
        assert!(!drawn.contains(&0));
    }

    #[test]
    fn keys_run_out_rather_than_repeat() {
        let mut keys = KeySequence {
            secret: RandomState::new(),
            next: u32::MAX,
        };
        assert_eq!(keys.draw(), None);
        assert_eq!(keys.draw(), None);
    }

    #[test]
    fn bounds_use_checked_arithmetic() {
        let registry = Arc::new(Registry::new());
        let mut view = MemoryView::new(Arc::clone(&registry));
        let keys = registry
            .insert(0x1000, 0x1000, Access::REMOTE_WRITE, None)
            .unwrap();
        let mut ask = |address, length| {
            view.remote(keys.remote.0, address, length, Intent::RemoteWrite)
                .is_some()
        };
        assert!(ask(0x1000, 0x1000));
        assert!(ask(0x2000, 0));
        assert!(!ask(0x0fff, 1));
        assert!(!ask(0x1fff, 2));
        assert!(!ask(0x1800, u64::MAX));
        assert!(!ask(u64::MAX, 1));
        assert!(
            view.remote(keys.remote.0, 0x1000, 1, Intent::RemoteRead)
                .is_none()
        );
        assert!(
            view.remote(keys.local.0, 0x1000, 1, Intent::RemoteWrite)
                .is_none()
        );
        assert!(
            view.local(keys.local, 0x1000, 1, Intent::LocalWrite)
                .is_some()
        );
        assert!(view.remove(keys.mr).is_some());
        assert!(
            view.remote(keys.remote.0, 0x1000, 1, Intent::RemoteWrite)
                .is_none()
        );
        assert!(view.remove(keys.mr).is_none());
    }
}
