//! Registrations of one device, and the only code of the simulation that touches registered memory.
//!
//! A key is a slot and the slot's generation, masked by a number of the device, differently for local and remote use:
//! a stale key, a key of another device or a local key used as a remote one is refused rather than right by accident.
//! No key is ever given out twice by one device.

use std::sync::Arc;

use super::rng::Rng;
use crate::fabric::{
    Access, LaneId, LocalKey, MemoryKeys, MrId, RemoteKey, Sge, Window, WindowBind, WindowId,
    mapping::{Mapping, Touch},
};

/// What an access needs of its registration.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Need {
    LocalRead,
    LocalWrite,
    RemoteRead,
    RemoteWrite,
}

struct Region {
    /// How requests and peers name the first byte.
    address: u64,
    length: u64,
    access: Access,
    /// Where it is in this process: a dmabuf where it is mapped, other memory where its address says.
    host: u64,
    mapping: Option<Arc<Mapping>>,
    window: Option<WindowOf>,
}

/// What makes a slot a window rather than a registration.
#[derive(Clone, Copy)]
struct WindowOf {
    lane: LaneId,
    /// The registration.
    parent: u32,
    bound: bool,
}

struct Slot {
    generation: u16,
    region: Option<Region>,
}

/// A range that a key allows: proof that the checks were made.
#[derive(Clone)]
pub(super) struct Span {
    /// In this process.
    address: u64,
    /// What keeps it there, if it is in a dmabuf.
    mapping: Option<Arc<Mapping>>,
    length: usize,
    /// Where it lies in its registration.
    pub(super) offset: u64,
}

impl Span {
    /// The part `[offset, offset + length)`, or nothing if that is not inside.
    pub(super) fn part(self, offset: u64, length: usize) -> Option<Self> {
        let end = offset.checked_add(length as u64)?;
        (end <= self.length as u64).then_some(Self {
            address: self.address + offset,
            length,
            offset: self.offset + offset,
            mapping: self.mapping,
        })
    }

    pub(super) fn len(&self) -> usize {
        self.length
    }

    /// Appends the bytes to `out`.
    pub(super) fn read(self, out: &mut Vec<u8>) {
        out.reserve(self.length);
        self.sync(Touch::Read, false);
        let source = self.address as *const u8;
        // SAFETY: the span lies inside a live registration, which by the contract of `Device::register` stays mapped
        // and readable, or is an inline element, which the caller of `read_inline` promises to be readable; `out` has
        // `length` bytes of spare capacity, which the copy initialises. Others may write registered memory meanwhile,
        // as they may under a NIC's DMA; every value of a byte is valid.
        unsafe {
            let end = out.as_mut_ptr().add(out.len());
            std::ptr::copy_nonoverlapping(source, end, self.length);
            out.set_len(out.len() + self.length);
        }
        self.sync(Touch::Read, true);
    }

    /// Writes `data`, which must be as long as the span.
    pub(super) fn write(self, data: &[u8]) {
        debug_assert_eq!(data.len(), self.length);
        let length = self.length.min(data.len());
        self.sync(Touch::Write, false);
        // SAFETY: the span lies inside a live registration with a writing access, which by the contract of
        // `Device::register` stays mapped and writable and is under no Rust reference; `data` is our own memory, so
        // the two do not overlap.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), self.address as *mut u8, length) }
        self.sync(Touch::Write, true);
    }

    /// Tells the exporter of a dmabuf of the CPU's access.
    fn sync(&self, touch: Touch, end: bool) {
        let Some(mapping) = &self.mapping else { return };
        let result = match end {
            true => mapping.end(touch),
            false => mapping.begin(touch),
        };
        // A simulated device has no caches whose state could matter; the access itself is as good as it gets.
        if let Err(error) = result {
            tracing::warn!(%error, "DMA_BUF_IOCTL_SYNC");
        }
    }
}

/// Copies the payload of an inline request during the post. As in verbs, there is no key to check it by.
///
/// # Safety
///
/// The elements must be readable, and nobody may be writing them, during the call.
pub(super) unsafe fn read_inline(sges: &[Sge]) -> Vec<u8> {
    let mut data = Vec::new();
    for sge in sges.iter().filter(|sge| sge.length > 0) {
        let span = Span {
            address: sge.address,
            length: sge.length as usize,
            offset: 0,
            mapping: None,
        };
        span.read(&mut data);
    }
    data
}

pub(super) struct Regions {
    slots: Vec<Slot>,
    free: Vec<u16>,
    windows: u32,
    local_mask: u32,
    remote_mask: u32,
}

impl Regions {
    pub(super) fn new(rng: &mut Rng) -> Self {
        Self {
            slots: Vec::new(),
            free: Vec::new(),
            windows: 0,
            local_mask: rng.next_u32(),
            remote_mask: rng.next_u32(),
        }
    }

    /// Nothing if all slots are used. The caller has checked that the range does not wrap.
    pub(super) fn register(
        &mut self,
        address: u64,
        length: u64,
        access: Access,
        mapping: Option<Mapping>,
    ) -> Option<MemoryKeys> {
        let raw = self.insert(Region {
            address,
            length,
            access,
            host: mapping.as_ref().map_or(address, Mapping::first),
            mapping: mapping.map(Arc::new),
            window: None,
        })?;
        Some(MemoryKeys {
            mr: MrId(u64::from(raw)),
            local: LocalKey(raw ^ self.local_mask),
            remote: RemoteKey(raw ^ self.remote_mask),
        })
    }

    fn insert(&mut self, region: Region) -> Option<u32> {
        let index = match self.free.pop() {
            Some(index) => index,
            None => {
                let index = u16::try_from(self.slots.len()).ok()?;
                self.slots.push(Slot {
                    generation: 0,
                    region: None,
                });
                index
            }
        };
        let slot = self.slots.get_mut(usize::from(index))?;
        slot.region = Some(region);
        Some(u32::from(index) << 16 | u32::from(slot.generation))
    }

    /// False if there is no such registration.
    pub(super) fn deregister(&mut self, mr: MrId) -> bool {
        match u32::try_from(mr.0) {
            Ok(raw) if self.registration(raw).is_some() => self.remove(raw),
            _ => false,
        }
    }

    /// Whether there are windows into a registration.
    pub(super) fn has_windows(&self, mr: MrId) -> bool {
        self.windows > 0
            && self.slots.iter().any(|slot| {
                let window = slot.region.as_ref().and_then(|region| region.window);
                window.is_some_and(|window| u64::from(window.parent) == mr.0)
            })
    }

    /// How many windows there are.
    pub(super) fn windows(&self) -> u32 {
        self.windows
    }

    /// Makes a window, which is not bound yet. Why not, if it cannot be.
    pub(super) fn add_window(
        &mut self,
        lane: LaneId,
        bind: &WindowBind,
    ) -> Result<Window, &'static str> {
        let parent = u32::try_from(bind.mr.0).map_err(|_| "no such registration")?;
        let region = self.registration(parent).ok_or("no such registration")?;
        if (bind.access.remote_write && !region.access.remote_write)
            || (bind.access.remote_read && !region.access.remote_read)
        {
            return Err("a right that the registration has not");
        }
        let offset = bind.address.checked_sub(region.address);
        let end = offset.and_then(|offset| offset.checked_add(bind.length));
        if bind.length == 0 || end.is_none_or(|end| end > region.length) {
            return Err("a range outside of the registration");
        }
        let window = Region {
            address: bind.address,
            length: bind.length,
            access: bind.access,
            host: region.host + (bind.address - region.address),
            mapping: region.mapping.clone(),
            window: Some(WindowOf {
                lane,
                parent,
                bound: false,
            }),
        };
        let raw = self.insert(window).ok_or("no slot is left")?;
        self.windows += 1;
        Ok(Window {
            id: WindowId(u64::from(raw)),
            remote: RemoteKey(raw ^ self.remote_mask),
        })
    }

    /// Whether `lane` has that window.
    pub(super) fn is_window_of(&self, lane: LaneId, id: WindowId) -> bool {
        u32::try_from(id.0)
            .ok()
            .and_then(|raw| self.region(raw)?.window)
            .is_some_and(|window| window.lane == lane)
    }

    /// From now on its key opens it.
    pub(super) fn open_window(&mut self, id: WindowId) {
        let slot = usize::try_from(id.0 >> 16).ok();
        let slot = slot.and_then(|index| self.slots.get_mut(index));
        if let Some(slot) = slot
            && u64::from(slot.generation) == id.0 & 0xffff
            && let Some(window) = slot.region.as_mut().and_then(|r| r.window.as_mut())
        {
            window.bound = true;
        }
    }

    /// From now on it does not.
    pub(super) fn remove_window(&mut self, id: WindowId) {
        if let Ok(raw) = u32::try_from(id.0)
            && self
                .region(raw)
                .is_some_and(|region| region.window.is_some())
        {
            self.windows -= 1;
            self.remove(raw);
        }
    }

    /// All windows of a lane are gone.
    pub(super) fn remove_windows_of(&mut self, lane: LaneId) {
        if self.windows == 0 {
            return;
        }
        for index in 0..self.slots.len() {
            let Some(slot) = self.slots.get(index) else {
                break;
            };
            let window = slot.region.as_ref().and_then(|region| region.window);
            if window.is_some_and(|window| window.lane == lane) {
                let raw = (index as u32) << 16 | u32::from(slot.generation);
                self.remove_window(WindowId(raw.into()));
            }
        }
    }

    fn remove(&mut self, raw: u32) -> bool {
        let index = (raw >> 16) as u16;
        let Some(slot) = self.slots.get_mut(usize::from(index)) else {
            return false;
        };
        slot.region = None;
        // A slot whose generations are used up is retired.
        if let Some(next) = slot.generation.checked_add(1) {
            slot.generation = next;
            self.free.push(index);
        }
        true
    }

    pub(super) fn clear(&mut self) {
        self.free.clear();
        self.slots.clear();
        self.windows = 0;
    }

    /// What the peer of `lane` may reach with `key`.
    pub(super) fn remote(
        &self,
        lane: LaneId,
        key: RemoteKey,
        address: u64,
        length: u64,
        need: Need,
    ) -> Option<Span> {
        let raw = key.0 ^ self.remote_mask;
        let region = self.region(raw)?;
        if region
            .window
            .is_some_and(|window| !window.bound || window.lane != lane)
        {
            return None;
        }
        Self::span(region, address, length, need)
    }

    /// As [`Regions::region`], but not a window.
    fn registration(&self, raw: u32) -> Option<&Region> {
        self.region(raw).filter(|region| region.window.is_none())
    }

    fn region(&self, raw: u32) -> Option<&Region> {
        let slot = self.slots.get((raw >> 16) as usize)?;
        let region = slot.region.as_ref()?;
        (u32::from(slot.generation) == raw & 0xffff).then_some(region)
    }

    fn span(region: &Region, address: u64, length: u64, need: Need) -> Option<Span> {
        let allowed = match need {
            Need::LocalRead => true,
            Need::LocalWrite => region.access.local_write,
            Need::RemoteRead => region.access.remote_read,
            Need::RemoteWrite => region.access.remote_write,
        };
        let offset = address.checked_sub(region.address)?;
        let end = offset.checked_add(length)?;
        let length = usize::try_from(length).ok()?;
        (allowed && end <= region.length).then(|| Span {
            address: region.host + offset,
            length,
            offset,
            mapping: region.mapping.clone(),
        })
    }

    /// The spans that hold bytes `[offset, offset + length)` of a gather list, or nothing if one is refused. An element
    /// must lie in its registration as a whole.
    pub(super) fn local(
        &self,
        sges: &[Sge],
        offset: u64,
        length: u64,
        need: Need,
    ) -> Option<Vec<Span>> {
        let mut spans = Vec::new();
        let (mut skip, mut left) = (offset, length);
        for sge in sges {
            let size = u64::from(sge.length);
            if skip >= size {
                skip -= size;
                continue;
            }
            if left == 0 {
                break;
            }
            let region = self.registration(sge.key.0 ^ self.local_mask)?;
            let whole = Self::span(region, sge.address, size, need)?;
            let take = left.min(size - skip);
            spans.push(whole.part(skip, take as usize)?);
            skip = 0;
            left -= take;
        }
        (left == 0).then_some(spans)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys_at(regions: &mut Regions, memory: &mut [u8], access: Access) -> MemoryKeys {
        regions
            .register(
                memory.as_mut_ptr() as u64,
                memory.len() as u64,
                access,
                None,
            )
            .unwrap()
    }

    #[test]
    fn keys_are_never_repeated_and_stale_ones_refused() {
        let mut regions = Regions::new(&mut Rng::new(1));
        let mut memory = [0u8; 16];
        let address = memory.as_ptr() as u64;
        let mut seen = std::collections::HashSet::new();
        let mut last: Option<RemoteKey> = None;
        for _ in 0..70_000 {
            let keys = keys_at(&mut regions, &mut memory, Access::REMOTE_WRITE);
            assert!(seen.insert(keys.remote.0));
            if let Some(stale) = last {
                assert!(
                    regions
                        .remote(LaneId(1), stale, address, 1, Need::RemoteWrite)
                        .is_none()
                );
            }
            assert!(
                regions
                    .remote(LaneId(1), keys.remote, address, 16, Need::RemoteWrite)
                    .is_some()
            );
            assert!(regions.deregister(keys.mr));
            assert!(!regions.deregister(keys.mr));
            last = Some(keys.remote);
        }
    }

    #[test]
    fn ranges_rights_and_kinds_of_key_are_checked() {
        let mut regions = Regions::new(&mut Rng::new(2));
        let mut memory = [0u8; 16];
        let base = memory.as_ptr() as u64;
        let keys = keys_at(&mut regions, &mut memory, Access::REMOTE_WRITE);
        let ask = |key, address, length, need| {
            regions
                .remote(LaneId(1), key, address, length, need)
                .is_some()
        };
        assert!(ask(keys.remote, base, 16, Need::RemoteWrite));
        assert!(!ask(keys.remote, base, 17, Need::RemoteWrite));
        assert!(!ask(keys.remote, base - 1, 2, Need::RemoteWrite));
        assert!(!ask(keys.remote, base + 8, u64::MAX, Need::RemoteWrite));
        assert!(!ask(keys.remote, base, 1, Need::RemoteRead));
        assert!(!ask(RemoteKey(keys.local.0), base, 1, Need::RemoteWrite));
    }

    #[test]
    fn a_window_of_a_gather_list_is_cut_at_the_elements() {
        let mut regions = Regions::new(&mut Rng::new(3));
        let mut memory: Vec<u8> = (0..16).collect();
        let base = memory.as_ptr() as u64;
        let keys = keys_at(&mut regions, &mut memory, Access::LOCAL);
        let sge = |offset, length| Sge {
            address: base + offset,
            length,
            key: keys.local,
        };
        let list = [sge(8, 3), sge(0, 0), sge(0, 4), sge(12, 4)];
        let spans = regions.local(&list, 2, 7, Need::LocalRead).unwrap();
        let mut out = Vec::new();
        spans.into_iter().for_each(|span| span.read(&mut out));
        assert_eq!(out, [10, 0, 1, 2, 3, 12, 13]);
        assert!(regions.local(&list, 2, 10, Need::LocalRead).is_none());
        assert!(
            regions
                .local(&[sge(12, 5)], 0, 1, Need::LocalRead)
                .is_none()
        );
    }
}
