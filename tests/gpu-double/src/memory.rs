//! Allocations of the devices: memory files, mapped.

use std::{
    collections::BTreeMap,
    ffi::c_int,
    sync::{Mutex, MutexGuard, PoisonError},
};

use crate::control::script;

/// A piece of a device's memory.
pub(crate) struct Allocation {
    pub(crate) length: usize,
    pub(crate) device: c_int,
    fd: c_int,
    /// Where in the file the first byte lies.
    pub(crate) offset: u64,
    mapped: (usize, usize),
}

static ALLOCATIONS: Mutex<BTreeMap<usize, Allocation>> = Mutex::new(BTreeMap::new());

pub(crate) fn allocations() -> MutexGuard<'static, BTreeMap<usize, Allocation>> {
    ALLOCATIONS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What lies at an address: base, and the allocation.
pub(crate) fn with_allocation<T>(
    address: usize,
    with: impl FnOnce(usize, &Allocation) -> T,
) -> Option<T> {
    let all = allocations();
    let (base, found) = all.range(..=address).next_back()?;
    (address < base + found.length).then(|| with(*base, found))
}

/// Allocates. `lead`: bytes of the file before the allocation, which must be whole pages. `skew`: bytes of the mapping
/// before it, so that it begins in the middle of a page.
pub(crate) fn allocate(length: usize, device: c_int) -> Option<usize> {
    let (lead, skew) = script(|script| (script.value("lead", 0), script.value("skew", 0)));
    let mapped = (length + skew as usize).checked_next_multiple_of(4096)?;
    // SAFETY: a new file and a new mapping; nothing that exists is touched.
    let (fd, base) = unsafe {
        let fd = libc::memfd_create(c"gpu-double".as_ptr(), libc::MFD_CLOEXEC);
        if fd < 0 || libc::ftruncate(fd, (lead as usize + mapped) as libc::off_t) != 0 {
            return None;
        }
        let base = libc::mmap(
            std::ptr::null_mut(),
            mapped,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            fd,
            lead as libc::off_t,
        );
        (fd, base)
    };
    if base == libc::MAP_FAILED {
        return None;
    }
    let address = base as usize + skew as usize;
    let allocation = Allocation {
        length,
        device,
        fd,
        offset: lead + skew,
        mapped: (base as usize, mapped),
    };
    allocations().insert(address, allocation);
    Some(address)
}

/// Frees; whether there was such an allocation.
pub(crate) fn free(address: usize) -> bool {
    let Some(gone) = allocations().remove(&address) else {
        return false;
    };
    // SAFETY: mapped and opened by `allocate`, and forgotten here.
    unsafe {
        libc::munmap(gone.mapped.0 as *mut _, gone.mapped.1);
        libc::close(gone.fd);
    }
    true
}

impl Allocation {
    /// A descriptor of the allocation's file.
    pub(crate) fn export(&self) -> c_int {
        // SAFETY: duplicates a descriptor of ours.
        unsafe { libc::fcntl(self.fd, libc::F_DUPFD_CLOEXEC, 0) }
    }
}

/// # Safety
///
/// Both ranges are mapped.
pub(crate) unsafe fn copy(to: usize, from: usize, length: usize) {
    // SAFETY: by this function's contract; they may overlap.
    unsafe { std::ptr::copy(from as *const u8, to as *mut u8, length) }
}

/// Writes a C string to a buffer.
///
/// # Safety
///
/// There is room for `room` bytes.
pub(crate) unsafe fn put(text: &str, to: *mut std::ffi::c_char, room: c_int) {
    let length = text.len().min((room - 1).max(0) as usize);
    // SAFETY: by this function's contract, with the end cut to what there is room for.
    unsafe {
        std::ptr::copy_nonoverlapping(text.as_ptr(), to.cast(), length);
        *to.add(length) = 0;
    }
}
