//! libhsa-runtime64: `hsa/hsa.h` and `hsa/hsa_ext_amd.h`. Used for one thing: exporting dmabufs.

use std::ffi::{c_char, c_int, c_void};

use super::super::Runtime;
use super::library::{constants, table};

pub type hsa_status_t = c_int;

pub type hsa_system_info_t = c_int;

constants! {
    HSA_STATUS_SUCCESS: hsa_status_t = 0;
    HSA_SYSTEM_INFO_VERSION_MAJOR: hsa_system_info_t = 0;
    HSA_SYSTEM_INFO_VERSION_MINOR: hsa_system_info_t = 1;
}

/// A `bool`. Newer than Debian's header; older runtimes do not know it.
pub const HSA_AMD_SYSTEM_INFO_DMABUF_SUPPORTED: hsa_system_info_t = 0x204;

/// File names under which the library is looked for.
pub const LIBRARY_NAMES: &[&str] = &["libhsa-runtime64.so.1"];

table! {
    /// libhsa-runtime64, opened.
    Hsa of Runtime::Hsa;
    required {
        hsa_init: fn() -> hsa_status_t;
        hsa_status_string: fn(status: hsa_status_t, text: *mut *const c_char) -> hsa_status_t;
        hsa_system_get_info: fn(attribute: hsa_system_info_t, value: *mut c_void) -> hsa_status_t;
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
