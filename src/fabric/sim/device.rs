//! One simulated rail: its handle, and registration.

use std::sync::Arc;

use parking_lot::Mutex;

use super::{
    completion::{CompletionQueue, Waker},
    context::SimContext,
    world::{PORT, World},
};
use crate::{
    fabric::{
        Access, Context, Device, DeviceInfo, DmabufRange, FabricError, FabricErrorKind, FabricKind,
        LinkState, MemoryKeys,
        mapping::{Mapping, page_size},
    },
    memory::PciAddress,
};

/// A handle of a device of a [`SimNet`](super::SimNet). When the last one and the device's context are dropped, the
/// device and its registrations are gone.
pub struct SimDevice {
    pub(super) world: Arc<Mutex<World>>,
    pub(super) index: usize,
    /// Tells the nets of one process apart.
    pub(super) net: u64,
    info: DeviceInfo,
}

impl SimDevice {
    pub(super) fn new(
        world: Arc<Mutex<World>>,
        net: u64,
        name: &str,
        pci: Option<PciAddress>,
    ) -> Self {
        let mut guard = world.lock();
        let index = guard.device(name);
        let info = DeviceInfo {
            kind: FabricKind::Sim,
            name: name.to_owned(),
            port: PORT,
            address: format!("sim:{name}"),
            link: LinkState::Active,
            bits_per_second: guard.devices[index].bits_per_second,
            pci,
            caps: guard.config.caps.clone(),
        };
        drop(guard);
        Self {
            world,
            index,
            net,
            info,
        }
    }

    fn insert(
        &self,
        operation: &'static str,
        address: u64,
        length: u64,
        access: Access,
        mapping: Option<Mapping>,
    ) -> Result<MemoryKeys, FabricError> {
        if access.remote_write && !access.local_write {
            // As ibv_reg_mr(3) requires.
            let what = "remote write access needs local write access";
            return Err(self.error(operation, FabricErrorKind::Memory(what.to_owned())));
        }
        let mut world = self.world.lock();
        let device = world.devices.get_mut(self.index);
        let device =
            device.ok_or_else(|| self.error(operation, FabricErrorKind::Os(libc::ENODEV)))?;
        device.alive(operation)?;
        let keys = device.regions.register(address, length, access, mapping);
        keys.ok_or_else(|| self.error(operation, FabricErrorKind::Os(libc::ENOMEM)))
    }

    pub(super) fn error(&self, operation: &'static str, kind: FabricErrorKind) -> FabricError {
        FabricError {
            device: self.info.name.clone(),
            port: PORT,
            operation,
            kind,
            hint: None,
        }
    }

    pub(super) fn limit(
        &self,
        operation: &'static str,
        what: &'static str,
        value: u64,
        limit: u64,
    ) -> Result<(), FabricError> {
        if value <= limit {
            return Ok(());
        }
        let kind = FabricErrorKind::Limit { what, value, limit };
        Err(self.error(operation, kind))
    }
}

impl Drop for SimDevice {
    fn drop(&mut self) {
        let mut world = self.world.lock();
        let Some(device) = world.devices.get_mut(self.index) else {
            return;
        };
        device.handles -= 1;
        if device.handles == 0 {
            world.remove_device(self.index, "dropped".to_owned());
        }
    }
}

impl Device for SimDevice {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    unsafe fn register(
        &self,
        address: u64,
        length: u64,
        access: Access,
    ) -> Result<MemoryKeys, FabricError> {
        const OPERATION: &str = "register";
        let refuse = |why: &str| {
            let kind = FabricErrorKind::Memory(why.to_owned());
            Err(self.error(OPERATION, kind))
        };
        self.limit(OPERATION, "registration", length, self.info.caps.max_mr)?;
        if length == 0 {
            return refuse("an empty range");
        }
        if address == 0 || address.checked_add(length).is_none() {
            return refuse("a range that cannot be mapped");
        }
        self.insert(OPERATION, address, length, access, None)
    }

    unsafe fn register_dmabuf(
        &self,
        range: &DmabufRange<'_>,
        access: Access,
    ) -> Result<MemoryKeys, FabricError> {
        const OPERATION: &str = "register a dmabuf";
        let limit = self.info.caps.max_mr;
        self.limit(OPERATION, "registration", range.length, limit)?;
        if !self.info.caps.dmabuf {
            return Err(self.error(OPERATION, FabricErrorKind::Os(libc::EOPNOTSUPP)));
        }
        if range.offset % page_size() != range.address % page_size() {
            // As ibv_reg_dmabuf_mr(3) requires.
            let what = "offset and address differ in their place within a page";
            return Err(self.error(OPERATION, FabricErrorKind::Memory(what.to_owned())));
        }
        let write = access.local_write || access.remote_write;
        let mapping = Mapping::new(range, write).map_err(|(kind, hint)| FabricError {
            hint,
            ..self.error(OPERATION, kind)
        })?;
        let (address, length) = (range.address, range.length);
        self.insert(OPERATION, address, length, access, Some(mapping))
    }

    fn open_context(
        self: Arc<Self>,
        completion_depth: u32,
    ) -> Result<Box<dyn Context>, FabricError> {
        const OPERATION: &str = "open context";
        let limit = u64::from(self.info.caps.max_completions);
        let depth = u64::from(completion_depth);
        self.limit(OPERATION, "completion queue depth", depth, limit)?;
        let waker = Waker::new().map_err(|error| {
            let errno = error.raw_os_error().unwrap_or(libc::EIO);
            self.error(OPERATION, FabricErrorKind::Os(errno))
        })?;
        let waker = Arc::new(waker);
        {
            let mut world = self.world.lock();
            let device = world
                .devices
                .get_mut(self.index)
                .ok_or_else(|| self.error(OPERATION, FabricErrorKind::Os(libc::ENODEV)))?;
            device.alive(OPERATION)?;
            if device.queue.is_some() {
                return Err(device.error(OPERATION, FabricErrorKind::Os(libc::EBUSY)));
            }
            device.queue = Some(CompletionQueue::new(completion_depth, Arc::clone(&waker)));
        }
        Ok(Box::new(SimContext::new(self, waker)))
    }
}
