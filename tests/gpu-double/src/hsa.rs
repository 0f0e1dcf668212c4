//! libhsa-runtime64.

use std::ffi::{c_char, c_int, c_void};

use crate::control::{called, script};
#[cfg(not(feature = "old"))]
use crate::memory::with_allocation;

#[unsafe(no_mangle)]
pub(crate) extern "C" fn hsa_init() -> c_int {
    called("hsa_init")
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn hsa_status_string(
    _status: c_int,
    text: *mut *const c_char,
) -> c_int {
    // SAFETY: the caller's out pointer; so below.
    unsafe { *text = c"HSA_STATUS_OF_THE_DOUBLE".as_ptr() };
    0
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn hsa_system_get_info(attribute: c_int, value: *mut c_void) -> c_int {
    let code = called("hsa_system_get_info");
    if code == 0 {
        let dmabufs = script(|script| script.value("hsa_dmabufs", 1));
        // SAFETY: see above; 16 bits for the versions, a byte for the other.
        unsafe {
            match attribute {
                0x204 => *value.cast::<u8>() = dmabufs as u8,
                _ => *value.cast::<u16>() = 1,
            }
        }
    }
    code
}

/// Exports what lies within one allocation, and tells where in the file it lies.
#[cfg(not(feature = "old"))]
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn hsa_amd_portable_export_dmabuf(
    pointer: *const c_void,
    size: usize,
    dmabuf: *mut c_int,
    offset: *mut u64,
) -> c_int {
    const INVALID_ALLOCATION: c_int = 0x1003;
    let code = called("hsa_amd_portable_export_dmabuf");
    if code != 0 {
        return code;
    }
    let address = pointer as usize;
    let found = with_allocation(address, |base, found| {
        let at = address - base;
        (at + size <= found.length).then(|| (found.export(), found.offset + at as u64))
    });
    let Some((fd, at)) = found.flatten() else {
        return INVALID_ALLOCATION;
    };
    // SAFETY: the caller's out pointers.
    unsafe {
        *dmabuf = fd;
        *offset = at;
    }
    0
}
