//! libhsa-runtime64: `hsa/hsa.h` and `hsa/hsa_ext_amd.h`. Used for one thing: exporting dmabufs.

use std::ffi::{c_char, c_int, c_void};

use super::super::Runtime;
use super::library::table;

pub type hsa_status_t = c_int;

pub const HSA_STATUS_SUCCESS: hsa_status_t = 0;
pub const HSA_SYSTEM_INFO_VERSION_MAJOR: c_int = 0;
pub const HSA_SYSTEM_INFO_VERSION_MINOR: c_int = 1;
/// A `bool`; older runtimes do not know it.
pub const HSA_AMD_SYSTEM_INFO_DMABUF_SUPPORTED: c_int = 0x204;

/// File names under which the library is looked for.
pub const LIBRARY_NAMES: &[&str] = &["libhsa-runtime64.so.1"];

table! {
    /// libhsa-runtime64, opened.
    Hsa of Runtime::Hsa;
    required {
        hsa_init: fn() -> hsa_status_t;
        hsa_status_string: fn(status: hsa_status_t, text: *mut *const c_char) -> hsa_status_t;
        hsa_system_get_info: fn(attribute: c_int, value: *mut c_void) -> hsa_status_t;
    }
    optional {
        hsa_amd_portable_export_dmabuf: fn(
            pointer: *const c_void,
            size: usize,
            dmabuf: *mut c_int,
            offset: *mut u64,
        ) -> hsa_status_t;
    }
}
