//! A piece of a GPU's memory: allocated here, or wrapped where an engine has allocated it.
//!
//! Invariants: everything is checked when the value is made, so that a wrong address is refused before it can reach a
//! NIC; the device's current-ness is changed only within a call.

use std::{path::Path, sync::Arc};

use super::{
    Cuda, GpuError, Hip, Runtime, copier::GpuCopier, driver::Driver, offsets, peer_memory,
};
use crate::memory::{
    Copier, DeviceMemory, Direction, Dmabuf, Memory, MemoryError, MemoryKind, PciAddress, Span,
    Visibility,
};

/// Memory of an AMD GPU.
pub type HipMemory = GpuMemory<Hip>;
/// Memory of an NVIDIA GPU.
pub type CudaMemory = GpuMemory<Cuda>;

/// A range of a GPU's memory; see [`HipMemory`] and [`CudaMemory`].
#[derive(Debug)]
pub struct GpuMemory<D: Driver> {
    driver: D,
    device: u32,
    span: Span,
    /// Ours to free.
    is_owned: bool,
    allocation: Option<Span>,
    location: Option<PciAddress>,
    visibility: Visibility,
}

impl HipMemory {
    /// Allocates on a device, with the process's HIP.
    ///
    /// # Errors
    ///
    /// No HIP, no such device, or too little memory.
    pub fn new(device: u32, length: u64) -> Result<Self, MemoryError> {
        Self::allocate(&Hip::shared()?, device, length)
    }
}

impl CudaMemory {
    /// Allocates on a device, with the process's CUDA driver.
    ///
    /// # Errors
    ///
    /// No driver, no such device, or too little memory.
    pub fn new(device: u32, length: u64) -> Result<Self, MemoryError> {
        Self::allocate(&Cuda::shared()?, device, length)
    }
}

impl<D: Driver> GpuMemory<D> {
    /// Allocates `length` bytes on a device.
    ///
    /// # Errors
    ///
    /// No such device, too little memory, or a runtime that does not answer for what it has allocated.
    pub fn allocate(driver: &D, device: u32, length: u64) -> Result<Self, MemoryError> {
        if length == 0 || usize::try_from(length).is_err() {
            return Err(MemoryError::BadLength { length });
        }
        exists(driver, device)?;
        let current = driver.current(device)?;
        let address = driver.allocate(device, length)?;
        let span = Span { address, length };
        // Frees the allocation if one of the questions below fails.
        let mut memory = Self {
            driver: driver.clone(),
            device,
            span,
            is_owned: true,
            allocation: Some(span),
            location: None,
            visibility: Visibility::ReadBack,
        };
        memory.look()?;
        drop(current);
        Ok(memory)
    }

    /// Wraps memory that somebody else has allocated on the device, with the same runtime: an engine's cache, or a part
    /// of it.
    ///
    /// # Errors
    ///
    /// Memory that is managed, the host's, another device's, or unknown to the runtime.
    ///
    /// # Safety
    ///
    /// `[address, address + length)` must stay allocated until the value and everything it was registered with have been
    /// dropped, and hold only what peers may read or write.
    pub unsafe fn from_raw(
        driver: &D,
        device: u32,
        address: u64,
        length: u64,
    ) -> Result<Self, MemoryError> {
        let span = Span { address, length };
        let (Some(end), true) = (span.end(), length > 0) else {
            return Err(MemoryError::BadLength { length });
        };
        exists(driver, device)?;
        let current = driver.current(device)?;
        driver.check(device, address)?;
        driver.check(device, end - 1)?;
        let mut memory = Self {
            driver: driver.clone(),
            device,
            span,
            is_owned: false,
            allocation: None,
            location: None,
            visibility: Visibility::ReadBack,
        };
        memory.look()?;
        drop(current);
        Ok(memory)
    }

    /// Learns what is reported later. The device is current.
    fn look(&mut self) -> Result<(), GpuError> {
        let (driver, device) = (&self.driver, self.device);
        driver.check(device, self.span.address)?;
        // Memory that is mapped from several pieces is no allocation for the runtime; it is exported by itself then.
        let around = driver.allocation(device, self.span.address);
        self.allocation = around.ok().filter(|found| found.contains(self.span));
        self.location = driver
            .location(device)
            .inspect_err(|error| tracing::warn!(%error, device, "no PCI address"))
            .ok();
        self.visibility = driver.visibility(device);
        Ok(())
    }

    /// The device's number.
    pub fn device_number(&self) -> u32 {
        self.device
    }

    /// Copies bytes out, and waits for it.
    ///
    /// # Errors
    ///
    /// Bytes outside of the memory, or the runtime refuses.
    pub fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), MemoryError> {
        let host = out.as_mut_ptr() as u64;
        // SAFETY: `out` is borrowed mutably for the call.
        unsafe { self.copy_now(Direction::ToHost, offset, host, out.len() as u64) }
    }

    /// Copies bytes in, and waits for it.
    ///
    /// # Errors
    ///
    /// As [`GpuMemory::read`].
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), MemoryError> {
        let host = bytes.as_ptr() as u64;
        // SAFETY: `bytes` is borrowed for the call.
        unsafe { self.copy_now(Direction::ToDevice, offset, host, bytes.len() as u64) }
    }

    /// # Safety
    ///
    /// The host's range is mapped, and nobody has a reference to it if it is the destination.
    unsafe fn copy_now(
        &self,
        direction: Direction,
        offset: u64,
        host: u64,
        length: u64,
    ) -> Result<(), MemoryError> {
        let capacity = self.span.length;
        if offset.checked_add(length).is_none_or(|end| end > capacity) {
            return Err(MemoryError::OutOfRange {
                offset,
                length,
                capacity,
            });
        }
        if length == 0 {
            return Ok(());
        }
        let _current = self.driver.current(self.device)?;
        let at = self.span.address + offset;
        // SAFETY: the device's range is within the memory; the host's by this function's contract.
        unsafe {
            self.driver
                .copy_now(self.device, direction, at, host, length)?;
        }
        Ok(())
    }

    fn export_span(&self, span: Span) -> Result<Dmabuf, GpuError> {
        let _current = self.driver.current(self.device)?;
        self.driver.export(self.device, span)
    }
}

/// Refuses a device that is not there, before the runtime is asked to make it current.
fn exists<D: Driver>(driver: &D, device: u32) -> Result<(), GpuError> {
    let count = driver.device_count()?;
    if device >= count {
        return Err(GpuError::NoDevice {
            runtime: D::RUNTIME,
            device,
            count,
        });
    }
    Ok(())
}

// SAFETY: device memory stays where it is until it is freed, which happens on drop or is excluded by the contract of
// `from_raw`; it is mapped for the device, and no Rust reference can be made from its address by safe code.
unsafe impl<D: Driver> Memory for GpuMemory<D> {
    fn address(&self) -> u64 {
        self.span.address
    }

    fn length(&self) -> u64 {
        self.span.length
    }

    fn kind(&self) -> MemoryKind {
        match D::RUNTIME {
            Runtime::Hip | Runtime::Hsa => MemoryKind::Hip(self.device),
            Runtime::Cuda => MemoryKind::Cuda(self.device),
        }
    }

    fn device(&self) -> Option<&dyn DeviceMemory> {
        Some(self)
    }
}

impl<D: Driver> DeviceMemory for GpuMemory<D> {
    fn is_host_accessible(&self) -> bool {
        // With a large BAR it may be, but slowly and without a promise of coherence.
        false
    }

    fn location(&self) -> Option<PciAddress> {
        self.location
    }

    fn export(&self) -> Result<Dmabuf, MemoryError> {
        let Some(allocation) = self.allocation.filter(|whole| *whole != self.span) else {
            return Ok(self.export_span(self.span)?);
        };
        let whole = match self.export_span(allocation) {
            Ok(whole) => whole,
            // What is mapped from several pieces may look like one allocation and not be exportable as one.
            Err(error) => return self.export_span(self.span).map_err(|_| error.into()),
        };
        let offset = offsets::offset_within(allocation, whole.offset, self.span).ok_or(
            GpuError::BadRange {
                what: "the runtime exported a file that cannot hold the memory",
                address: self.span.address,
                length: self.span.length,
            },
        )?;
        Ok(Dmabuf {
            fd: whole.fd,
            offset,
        })
    }

    fn allocation(&self) -> Option<Span> {
        self.allocation
    }

    fn export_allocation(&self) -> Result<Dmabuf, MemoryError> {
        Ok(self.export_span(self.allocation.unwrap_or(self.span))?)
    }

    fn peer_memory(&self) -> Result<(), MemoryError> {
        Ok(peer_memory(Path::new("/sys"), D::RUNTIME)?)
    }

    fn copier(&self) -> Result<Box<dyn Copier>, MemoryError> {
        Ok(Box::new(GpuCopier::new(
            self.driver.clone(),
            self.device,
            self.span,
        )?))
    }

    fn visibility(&self) -> Visibility {
        self.visibility
    }

    fn flush(&self) -> Result<(), MemoryError> {
        if self.visibility == Visibility::Ordered {
            return Ok(());
        }
        let _current = self.driver.current(self.device)?;
        let last = self.span.address + (self.span.length - 1);
        // SAFETY: the last byte of memory that lives as long as `self`.
        unsafe { self.driver.flush(self.device, self.visibility, last)? };
        Ok(())
    }
}

impl<D: Driver> Drop for GpuMemory<D> {
    fn drop(&mut self) {
        if !self.is_owned {
            return;
        }
        let freed = self.driver.current(self.device).and_then(|_current| {
            // SAFETY: allocated here, freed once. Registrations and copiers hold the value, so none is left.
            unsafe { self.driver.free(self.device, self.span.address) }
        });
        if let Err(error) = freed {
            tracing::warn!(%error, "GPU memory could not be freed");
        }
    }
}

/// Shared ownership is how memory is registered.
const _: fn() = || {
    fn assert_shareable<T: Memory + 'static>() {}
    assert_shareable::<HipMemory>();
    assert_shareable::<CudaMemory>();
    let _: fn(Arc<HipMemory>) -> Arc<dyn Memory> = |memory| memory;
};
