//! Registered memory of the software fabrics that run in real time (TCP, shared memory): a table that any thread extends
//! and that the context reads without a lock. A fabric may keep something of its own (`T`) with each registration.
//!
//! Writers build a new immutable table and bump a version; the context keeps the last table it saw and fetches a newer
//! one only when the version moved. Keys are never reused, so a stale key names nothing.
//!
//! Windows belong to the context, so they need no table: what it takes back is gone when the call returns. Their keys
//! are of a half of the key space of their own, which is gone through as a whole before a key comes again.

use std::{
    collections::HashMap,
    hash::{BuildHasher, RandomState},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use parking_lot::Mutex;

use super::{
    Access, FabricErrorKind, LaneId, LocalKey, MemoryKeys, MrId, RemoteKey, Window, WindowBind,
    WindowCaps, WindowId, mapping::Mapping,
};

/// One registration.
#[derive(Clone, Debug)]
pub(super) struct Region<T = ()> {
    keys: MemoryKeys,
    /// How requests and peers name the first byte.
    address: u64,
    length: u64,
    access: Access,
    /// Where it is in this process: a dmabuf where it is mapped, other memory where its address says.
    host: u64,
    mapping: Option<Arc<Mapping>>,
    /// For a window: how far into its registration it begins.
    skipped: u64,
    own: T,
}

/// A range that a key allows.
#[derive(Clone, Copy, Debug)]
pub(super) struct Found<'a, T = ()> {
    /// Where it is in this process.
    pub(super) host: u64,
    /// What keeps it there, if it is in a dmabuf.
    pub(super) mapping: Option<&'a Arc<Mapping>>,
    /// How far into the registration it begins.
    pub(super) offset: u64,
    /// What the fabric keeps with the registration.
    pub(super) own: &'a T,
}

impl<T> Region<T> {
    fn contains(&self, address: u64, length: u64) -> bool {
        address
            .checked_sub(self.address)
            .and_then(|offset| offset.checked_add(length))
            .is_some_and(|end| end <= self.length)
    }

    fn find(&self, address: u64, length: u64, intent: Intent) -> Option<Found<'_, T>> {
        (self.contains(address, length) && intent.allowed(self.access)).then(|| Found {
            host: self.host + (address - self.address),
            mapping: self.mapping.as_ref(),
            offset: self.skipped + (address - self.address),
            own: &self.own,
        })
    }

    /// What the fabric keeps with it.
    pub(super) fn own(&self) -> &T {
        &self.own
    }

    /// Whether requests that name `[address, address + length)` name a byte of it.
    pub(super) fn names(&self, address: u64, length: u64) -> bool {
        let end = self.address.saturating_add(self.length);
        address < end && address.saturating_add(length) > self.address
    }

    /// Whether bytes of this process at `[first, first + length)` are of it.
    pub(super) fn holds(&self, first: u64, length: u64) -> bool {
        let end = self.host.saturating_add(self.length);
        first < end && first.saturating_add(length) > self.host
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
#[derive(Clone, Debug)]
struct Table<T> {
    local: Vec<Region<T>>,
    remote: Vec<Region<T>>,
}

impl<T> Default for Table<T> {
    fn default() -> Self {
        Self {
            local: Vec::new(),
            remote: Vec::new(),
        }
    }
}

/// Keys without repetition and without a pattern: a pseudo-random permutation (Luby and Rackoff, 1988: four Feistel
/// rounds over a keyed hash) of a counter.
#[derive(Debug)]
struct KeySequence {
    secret: RandomState,
    next: u32,
}

impl KeySequence {
    fn new() -> Self {
        Self {
            secret: RandomState::new(),
            next: 0,
        }
    }

    /// The next non-zero key for a registration, or nothing once all have been given out.
    fn draw(&mut self) -> Option<u32> {
        loop {
            let counter = self.next;
            self.next = counter.checked_add(1)?;
            let key = self.key(counter);
            if key != 0 && key & WINDOW == 0 {
                return Some(key);
            }
        }
    }

    /// The next key for a window; it comes again after all others have been given out.
    fn draw_for_window(&mut self) -> u32 {
        loop {
            let counter = self.next;
            self.next = counter.wrapping_add(1);
            let key = self.key(counter);
            if key & WINDOW != 0 {
                return key;
            }
        }
    }

    fn key(&self, counter: u32) -> u32 {
        let (mut left, mut right) = ((counter >> 16) as u16, counter as u16);
        for round in 0u8..4 {
            let mixed = left ^ self.secret.hash_one((round, right)) as u16;
            (left, right) = (right, mixed);
        }
        u32::from(left) << 16 | u32::from(right)
    }
}

/// The bit that tells keys of windows from those of registrations.
const WINDOW: u32 = 1 << 31;

/// A window that is bound.
#[derive(Clone, Debug)]
struct WindowRange<T> {
    lane: LaneId,
    /// The part of the registration, with the rights of the window.
    range: Region<T>,
}

/// The windows of a context. The identifier of one is a counter, and its key's name in the table.
#[derive(Debug)]
struct Windows<T> {
    keys: KeySequence,
    next: u64,
    by_key: HashMap<u32, WindowRange<T>>,
    by_id: HashMap<WindowId, u32>,
}

impl<T> Windows<T> {
    fn remove(&mut self, id: WindowId) -> Option<WindowRange<T>> {
        let key = self.by_id.remove(&id)?;
        self.by_key.remove(&key)
    }
}

/// The registrations of a device. Any thread may call.
#[derive(Debug)]
pub(super) struct Registry<T = ()> {
    version: AtomicU64,
    state: Mutex<State<T>>,
}

#[derive(Debug)]
struct State<T> {
    keys: KeySequence,
    next_mr: u64,
    table: Arc<Table<T>>,
}

impl<T: Clone> Registry<T> {
    pub(super) fn new() -> Self {
        Self {
            version: AtomicU64::new(0),
            state: Mutex::new(State {
                keys: KeySequence::new(),
                next_mr: 1,
                table: Arc::default(),
            }),
        }
    }

    /// Adds a range that the caller has checked. An error if all keys have been used.
    pub(super) fn insert(
        &self,
        address: u64,
        length: u64,
        access: Access,
        mapping: Option<Mapping>,
        own: T,
    ) -> Result<MemoryKeys, FabricErrorKind> {
        let mut state = self.state.lock();
        let mut draw = || {
            state.keys.draw().ok_or(FabricErrorKind::Limit {
                what: "registrations since the device was opened",
                value: 1 << 31,
                limit: (1 << 31) - 1,
            })
        };
        let (local, remote) = (LocalKey(draw()?), RemoteKey(draw()?));
        let keys = MemoryKeys {
            mr: MrId(state.next_mr),
            local,
            remote,
        };
        state.next_mr += 1;
        let region = Region {
            keys,
            address,
            length,
            access,
            host: mapping.as_ref().map_or(address, Mapping::first),
            mapping: mapping.map(Arc::new),
            skipped: 0,
            own,
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
        Ok(keys)
    }

    /// Removes a registration and returns what it was.
    pub(super) fn remove(&self, mr: MrId) -> Option<Region<T>> {
        let mut state = self.state.lock();
        let mut table = Table::clone(&state.table);
        let at = table.local.iter().position(|r| r.keys.mr == mr)?;
        let region = table.local.remove(at);
        table.remote.retain(|r| r.keys.mr != mr);
        self.publish(&mut state, table);
        Some(region)
    }

    /// Whether what the fabric keeps with each registration is as `like` says.
    pub(super) fn all(&self, like: impl Fn(&T) -> bool) -> bool {
        let table = Arc::clone(&self.state.lock().table);
        table.local.iter().all(|region| like(&region.own))
    }

    fn publish(&self, state: &mut State<T>, table: Table<T>) {
        state.table = Arc::new(table);
        self.version.fetch_add(1, Ordering::Release);
    }
}

/// The context's view of a [`Registry`]. Owned by the context's thread.
#[derive(Debug)]
pub(super) struct MemoryView<T = ()> {
    registry: Arc<Registry<T>>,
    version: u64,
    table: Arc<Table<T>>,
    windows: Windows<T>,
}

impl<T: Clone> MemoryView<T> {
    pub(super) fn new(registry: Arc<Registry<T>>) -> Self {
        let mut view = Self {
            registry,
            version: u64::MAX,
            table: Arc::default(),
            windows: Windows {
                keys: KeySequence::new(),
                next: 1,
                by_key: HashMap::new(),
                by_id: HashMap::new(),
            },
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
    ) -> Option<Found<'_, T>> {
        self.refresh();
        let table = &self.table.local;
        let found = table.binary_search_by_key(&key.0, |r| r.keys.local.0);
        found
            .ok()
            .and_then(|at| table.get(at))?
            .find(address, length, intent)
    }

    /// The same for the remote key `key` in the hands of the peer of `lane`.
    pub(super) fn remote(
        &mut self,
        lane: LaneId,
        key: u32,
        address: u64,
        length: u64,
        intent: Intent,
    ) -> Option<Found<'_, T>> {
        if key & WINDOW != 0 {
            let window = self.windows.by_key.get(&key)?;
            let its_own = window.lane == lane;
            return its_own.then(|| window.range.find(address, length, intent))?;
        }
        self.refresh();
        let table = &self.table.remote;
        let found = table.binary_search_by_key(&key, |r| r.keys.remote.0);
        found
            .ok()
            .and_then(|at| table.get(at))?
            .find(address, length, intent)
    }

    /// Whether there are windows into a registration.
    fn has_windows(&self, mr: MrId) -> bool {
        self.windows
            .by_key
            .values()
            .any(|window| window.range.keys.mr == mr)
    }

    /// Makes a window, if the device of `caps` may have one more.
    pub(super) fn bind(
        &mut self,
        lane: LaneId,
        bind: &WindowBind,
        caps: Option<&WindowCaps>,
    ) -> Result<Window, FabricErrorKind> {
        let max = caps.map_or(0, |caps| caps.max);
        let value = self.windows.by_key.len() as u64 + 1;
        if value > u64::from(max) {
            let (what, limit) = ("number of windows", max.into());
            return Err(FabricErrorKind::Limit { what, value, limit });
        }
        self.open_window(lane, bind)
            .map_err(|why| FabricErrorKind::Memory(why.to_owned()))
    }

    fn open_window(&mut self, lane: LaneId, bind: &WindowBind) -> Result<Window, &'static str> {
        self.refresh();
        let mut regions = self.table.local.iter();
        let region = regions
            .find(|region| region.keys.mr == bind.mr)
            .ok_or("no such registration")?;
        if (bind.access.remote_write && !region.access.remote_write)
            || (bind.access.remote_read && !region.access.remote_read)
        {
            return Err("a right that the registration has not");
        }
        if bind.length == 0 || !region.contains(bind.address, bind.length) {
            return Err("a range outside of the registration");
        }
        let key = loop {
            // There are fewer windows than keys.
            let key = self.windows.keys.draw_for_window();
            if !self.windows.by_key.contains_key(&key) {
                break key;
            }
        };
        let id = WindowId(self.windows.next);
        self.windows.next += 1;
        let range = Region {
            address: bind.address,
            length: bind.length,
            access: bind.access,
            host: region.host + (bind.address - region.address),
            skipped: bind.address - region.address,
            ..region.clone()
        };
        self.windows.by_key.insert(key, WindowRange { lane, range });
        self.windows.by_id.insert(id, key);
        Ok(Window {
            id,
            remote: RemoteKey(key),
        })
    }

    /// Whether `lane` has that window.
    fn is_window_of(&self, lane: LaneId, id: WindowId) -> bool {
        let key = self.windows.by_id.get(&id);
        key.and_then(|key| self.windows.by_key.get(key))
            .is_some_and(|window| window.lane == lane)
    }

    /// Takes a window of `lane` back; later lookups do not find it. Returns its range if the peer might read from it.
    pub(super) fn unbind(
        &mut self,
        lane: LaneId,
        id: WindowId,
    ) -> Result<Option<Region<T>>, FabricErrorKind> {
        if !self.is_window_of(lane, id) {
            return Err(FabricErrorKind::Memory(format!("no window {}", id.0)));
        }
        let window = self.windows.remove(id).map(|window| window.range);
        Ok(window.filter(|range| range.access.remote_read))
    }

    /// Takes all windows of a lane back.
    pub(super) fn unbind_all(&mut self, lane: LaneId) {
        let windows = &mut self.windows;
        windows.by_key.retain(|_, window| window.lane != lane);
        let left = &windows.by_key;
        windows.by_id.retain(|_, key| left.contains_key(key));
    }

    /// Ends a registration that no window is into.
    pub(super) fn deregister(&mut self, mr: MrId) -> Result<Region<T>, FabricErrorKind> {
        if self.has_windows(mr) {
            return Err(FabricErrorKind::Os(libc::EBUSY));
        }
        let gone = || FabricErrorKind::Memory(format!("no registration {}", mr.0));
        self.remove(mr).ok_or_else(gone)
    }

    /// Ends a registration; later lookups do not find it.
    fn remove(&mut self, mr: MrId) -> Option<Region<T>> {
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

    const LANE: LaneId = LaneId(1);

    /// Stale keys of windows name nothing until half the key space has been gone through, which also wraps.
    #[test]
    fn keys_of_windows_are_of_their_own_and_wrap() {
        let mut keys = KeySequence::new();
        keys.next = u32::MAX - 50_000;
        let drawn: HashSet<u32> = (0..50_000).map(|_| keys.draw_for_window()).collect();
        assert_eq!(drawn.len(), 50_000);
        assert!(drawn.iter().all(|key| key & WINDOW != 0));
        let mut keys = KeySequence::new();
        assert!((0..1000).all(|_| keys.draw().is_some_and(|key| key & WINDOW == 0)));
    }

    #[test]
    fn keys_do_not_repeat() {
        let mut keys = KeySequence::new();
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
        let registry = Arc::new(Registry::<()>::new());
        let mut view = MemoryView::new(Arc::clone(&registry));
        let keys = registry
            .insert(0x1000, 0x1000, Access::REMOTE_WRITE, None, ())
            .unwrap();
        let mut ask = |address, length| {
            view.remote(LANE, keys.remote.0, address, length, Intent::RemoteWrite)
                .is_some()
        };
        assert!(ask(0x1000, 0x1000));
        assert!(ask(0x2000, 0));
        assert!(!ask(0x0fff, 1));
        assert!(!ask(0x1fff, 2));
        assert!(!ask(0x1800, u64::MAX));
        assert!(!ask(u64::MAX, 1));
        assert!(
            view.remote(LANE, keys.remote.0, 0x1000, 1, Intent::RemoteRead)
                .is_none()
        );
        assert!(
            view.remote(LANE, keys.local.0, 0x1000, 1, Intent::RemoteWrite)
                .is_none()
        );
        assert!(
            view.local(keys.local, 0x1000, 1, Intent::LocalWrite)
                .is_some()
        );
        assert!(view.remove(keys.mr).is_some());
        assert!(
            view.remote(LANE, keys.remote.0, 0x1000, 1, Intent::RemoteWrite)
                .is_none()
        );
        assert!(view.remove(keys.mr).is_none());
    }
}
