//! Regions: memory registered with every rail of an endpoint.
//!
//! A region owns its memory, so the memory outlives every registration of it. Registration runs on the caller's
//! thread, because pinning gigabytes takes long; deregistration runs on the thread that owns the contexts.

use std::sync::Arc;

use super::{Memory, MemoryError};
use crate::fabric::{Access, Device, MemoryKeys};

/// One piece of memory and its keys on each rail.
#[derive(Debug)]
pub struct Region {
    memory: Arc<dyn Memory>,
    access: Access,
    keys: Vec<MemoryKeys>,
}

impl Region {
    /// Registers `memory` with every device of `rails`, in their order.
    ///
    /// # Errors
    ///
    /// [`MemoryError::Register`] names the first rail that refused. Registrations made before that one stay until the
    /// caller hands the returned keys to [`crate::fabric::Context::deregister`], so they are returned with the error.
    pub(crate) fn register(
        memory: Arc<dyn Memory>,
        access: Access,
        rails: &[Arc<dyn Device>],
    ) -> Result<Self, Box<(MemoryError, Self)>> {
        let mut region = Self {
            memory,
            access,
            keys: Vec::with_capacity(rails.len()),
        };
        for device in rails {
            // SAFETY: `Memory` promises the range until the value is dropped; this region holds it, and the driver
            // deregisters every key before it drops the region.
            match unsafe {
                device.register(region.memory.address(), region.memory.length(), access)
            } {
                Ok(keys) => region.keys.push(keys),
                Err(error) => return Err(Box::new((error.into(), region))),
            }
        }
        Ok(region)
    }

    /// Address of the first byte.
    pub fn address(&self) -> u64 {
        self.memory.address()
    }

    /// Bytes.
    pub fn length(&self) -> u64 {
        self.memory.length()
    }

    /// What peers may do.
    pub fn access(&self) -> Access {
        self.access
    }

    /// The memory.
    pub fn memory(&self) -> &Arc<dyn Memory> {
        &self.memory
    }

    /// The keys, one for each rail in the endpoint's order.
    pub(crate) fn keys(&self) -> &[MemoryKeys] {
        &self.keys
    }
}
