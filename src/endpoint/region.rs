//! Regions: memory registered with every rail of an endpoint.
//!
//! A region owns its memory, so the memory outlives every registration of it. Registration runs on the caller's
//! thread, because pinning gigabytes takes long; deregistration runs on the thread that owns the contexts.

use std::sync::Arc;

use crate::{
    fabric::{Access, Device, FabricError, FileRange, MemoryKeys},
    memory::Memory,
};

/// One piece of memory and its keys on each rail.
#[derive(Debug)]
pub(crate) struct Region {
    memory: Arc<dyn Memory>,
    access: Access,
    keys: Vec<MemoryKeys>,
}

impl Region {
    /// Registers `memory` with every device of `rails`, in their order.
    ///
    /// # Errors
    ///
    /// The error of the first rail that refuses. Registrations made before that one stay until the
    /// caller hands the returned keys to [`crate::fabric::Context::deregister`], so they are returned with the error.
    pub(crate) fn register(
        memory: Arc<dyn Memory>,
        access: Access,
        rails: &[Arc<dyn Device>],
    ) -> Result<Self, Box<(FabricError, Self)>> {
        let mut region = Self {
            memory,
            access,
            keys: Vec::with_capacity(rails.len()),
        };
        for device in rails {
            // SAFETY: `Memory` promises the range until the value is dropped; this region holds it, and the driver
            // deregisters every key before it drops the region.
            match unsafe { Self::register_with(&**device, &*region.memory, access) } {
                Ok(keys) => region.keys.push(keys),
                Err(error) => return Err(Box::new((error, region))),
            }
        }
        Ok(region)
    }

    /// # Safety
    ///
    /// As for [`Device::register`] of all of `memory`.
    unsafe fn register_with(
        device: &dyn Device,
        memory: &dyn Memory,
        access: Access,
    ) -> Result<MemoryKeys, FabricError> {
        let (address, length) = (memory.address(), memory.length());
        match memory.file() {
            Some((fd, offset)) => {
                let range = FileRange {
                    fd,
                    offset,
                    address,
                    length,
                };
                // SAFETY: the caller's promise; `Memory::file` says that the memory maps the file.
                unsafe { device.register_file(&range, access) }
            }
            // SAFETY: the caller's promise.
            None => unsafe { device.register(address, length, access) },
        }
    }

    /// Address of the first byte.
    pub(crate) fn address(&self) -> u64 {
        self.memory.address()
    }

    /// Bytes.
    pub(crate) fn length(&self) -> u64 {
        self.memory.length()
    }

    /// What peers may do.
    pub(crate) fn access(&self) -> Access {
        self.access
    }

    /// The keys, one for each rail in the endpoint's order.
    pub(crate) fn keys(&self) -> &[MemoryKeys] {
        &self.keys
    }
}
