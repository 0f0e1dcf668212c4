//! Registered memory: a table that any thread extends and that the context reads without a lock.
//!
//! Writers build a new immutable table and bump a version; the context keeps the last table it saw and fetches a newer
//! one only when the version moved. Keys are never reused, so a stale key names nothing.
//!
//! Memory that lies in a file which a peer can map safely (a sealed memory file, a dmabuf) is named by file and offset;
//! a peer maps each file once, for reading. All other memory is named by its address in this process.

use std::{
    hash::{BuildHasher, RandomState},
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use parking_lot::Mutex;

use super::{
    super::{Access, LocalKey, MemoryKeys, MrId, RemoteKey},
    wire::Location,
};

/// A file that peers may map.
#[derive(Debug)]
pub(super) struct SharedFile {
    /// Its number, the same on all lanes.
    pub(super) number: u32,
    /// Opened for reading only.
    pub(super) fd: OwnedFd,
    pub(super) length: u64,
    identity: (u64, u64),
}

/// Where a registration lies in a file.
#[derive(Clone, Debug)]
pub(super) struct InFile {
    pub(super) file: Arc<SharedFile>,
    /// Offset of the registration's first byte.
    pub(super) offset: u64,
}

/// One registration.
#[derive(Clone, Debug)]
pub(super) struct Region {
    keys: MemoryKeys,
    /// How requests and peers name the first byte.
    pub(super) address: u64,
    pub(super) length: u64,
    access: Access,
    /// Where the first byte is in this process, if that is another number.
    mapped_at: u64,
    pub(super) file: Option<InFile>,
    /// What keeps it mapped, where the device itself has mapped it.
    _mapping: Option<Arc<dyn Send + Sync + std::fmt::Debug>>,
}

impl Region {
    fn contains(&self, address: u64, length: u64) -> bool {
        address
            .checked_sub(self.address)
            .and_then(|offset| offset.checked_add(length))
            .is_some_and(|end| end <= self.length)
    }

    /// Whether it has a byte of `[address, address + length)`.
    pub(super) fn overlaps(&self, address: u64, length: u64) -> bool {
        let (end, other) = (
            self.address.saturating_add(self.length),
            address.saturating_add(length),
        );
        address < end && self.address < other
    }

    /// Where `address`, which it contains, is in this process.
    pub(super) fn pointer(&self, address: u64) -> u64 {
        self.mapped_at.wrapping_add(address - self.address)
    }

    /// How a peer finds `address`, which it contains.
    pub(super) fn location(&self, address: u64) -> Location {
        match &self.file {
            Some(InFile { file, offset }) => Location {
                file: file.number,
                place: offset + (address - self.address),
            },
            None => Location {
                file: 0,
                place: self.pointer(address),
            },
        }
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

/// A range to register.
#[derive(Debug)]
pub(super) struct NewRegion {
    pub(super) address: u64,
    pub(super) length: u64,
    pub(super) access: Access,
    pub(super) mapped_at: u64,
    /// A descriptor for reading, what is known of it, and where in it the range begins.
    pub(super) file: Option<(OwnedFd, super::sys::FileFacts, u64)>,
    pub(super) mapping: Option<Arc<dyn Send + Sync + std::fmt::Debug>>,
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
    next_file: u32,
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
                next_file: 1,
                table: Arc::default(),
            }),
        }
    }

    /// Adds a range that the caller has checked. Nothing if all keys have been used.
    pub(super) fn insert(&self, new: NewRegion) -> Option<MemoryKeys> {
        let mut state = self.state.lock();
        let keys = MemoryKeys {
            mr: MrId(state.next_mr),
            local: LocalKey(state.keys.draw()?),
            remote: RemoteKey(state.keys.draw()?),
        };
        let file = match new.file {
            Some((fd, facts, offset)) => {
                let same = |region: &Region| {
                    let known = &region.file.as_ref()?.file;
                    let fits = known.identity == facts.identity && known.length >= facts.length;
                    fits.then(|| Arc::clone(known))
                };
                let file = match state.table.local.iter().find_map(same) {
                    Some(file) => file,
                    None => {
                        let number = state.next_file;
                        state.next_file = number.checked_add(1)?;
                        Arc::new(SharedFile {
                            number,
                            fd,
                            length: facts.length,
                            identity: facts.identity,
                        })
                    }
                };
                Some(InFile { file, offset })
            }
            None => None,
        };
        state.next_mr += 1;
        let region = Region {
            keys,
            address: new.address,
            length: new.length,
            access: new.access,
            mapped_at: new.mapped_at,
            file,
            _mapping: new.mapping,
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

    /// Removes a registration and returns what it was, and whether no other is in its file.
    fn remove(&self, mr: MrId) -> Option<(Region, bool)> {
        let mut state = self.state.lock();
        let mut table = Table::clone(&state.table);
        let at = table.local.iter().position(|r| r.keys.mr == mr)?;
        let region = table.local.remove(at);
        table.remote.retain(|r| r.keys.mr != mr);
        let number = |region: &Region| region.file.as_ref().map(|f| f.file.number);
        let last = !table.local.iter().any(|r| number(r) == number(&region));
        self.publish(&mut state, table);
        Some((region, last))
    }

    /// Whether peers can map all that has been registered so far.
    pub(super) fn only_files(&self) -> bool {
        let table = &self.state.lock().table;
        table.local.iter().all(|region| region.file.is_some())
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

    /// The registration that local key `key` names, if it holds `[address, address + length)` and allows `intent`.
    pub(super) fn local(
        &mut self,
        key: LocalKey,
        address: u64,
        length: u64,
        intent: Intent,
    ) -> Option<&Region> {
        self.refresh();
        let table = &self.table.local;
        let found = table.binary_search_by_key(&key.0, |r| r.keys.local.0);
        let region = table.get(found.ok()?)?;
        (region.contains(address, length) && intent.allowed(region.access)).then_some(region)
    }

    /// The same for the remote key `key`.
    pub(super) fn remote(
        &mut self,
        key: u32,
        address: u64,
        length: u64,
        intent: Intent,
    ) -> Option<&Region> {
        self.refresh();
        let table = &self.table.remote;
        let found = table.binary_search_by_key(&key, |r| r.keys.remote.0);
        let region = table.get(found.ok()?)?;
        (region.contains(address, length) && intent.allowed(region.access)).then_some(region)
    }

    /// Ends a registration; later lookups do not find it. Also says whether no other is in its file.
    pub(super) fn remove(&mut self, mr: MrId) -> Option<(Region, bool)> {
        let removed = self.registry.remove(mr);
        self.refresh();
        removed
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
    use super::*;

    fn plain(address: u64, length: u64, access: Access) -> NewRegion {
        NewRegion {
            address,
            length,
            access,
            mapped_at: address,
            file: None,
            mapping: None,
        }
    }

    #[test]
    fn keys_run_out_rather_than_repeat() {
        let mut keys = KeySequence {
            secret: RandomState::new(),
            next: 0,
        };
        let drawn: std::collections::HashSet<u32> =
            (0..50_000).filter_map(|_| keys.draw()).collect();
        assert_eq!(drawn.len(), 50_000);
        keys.next = u32::MAX;
        assert_eq!(keys.draw(), None);
    }

    #[test]
    fn bounds_use_checked_arithmetic() {
        let registry = Arc::new(Registry::new());
        let mut view = MemoryView::new(Arc::clone(&registry));
        let keys = registry
            .insert(plain(0x1000, 0x1000, Access::REMOTE_WRITE))
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
        let ask =
            |view: &mut MemoryView, key, intent| view.remote(key, 0x1000, 1, intent).is_some();
        assert!(!ask(&mut view, keys.remote.0, Intent::RemoteRead));
        assert!(!ask(&mut view, keys.local.0, Intent::RemoteWrite));
        assert!(
            view.local(keys.local, 0x1000, 1, Intent::LocalWrite)
                .is_some()
        );
        assert!(view.remove(keys.mr).is_some());
        assert!(!ask(&mut view, keys.remote.0, Intent::RemoteWrite));
        assert!(view.remove(keys.mr).is_none());
    }
}
