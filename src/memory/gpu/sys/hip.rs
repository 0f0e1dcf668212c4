//! libamdhip64: `hip/hip_runtime_api.h` and `hip/driver_types.h`.
//!
//! What is required has been there, with this signature, since HIP 5.0. `hipGetDeviceProperties` and its structure are
//! left alone on purpose: they changed with every major release.

use std::ffi::{c_char, c_int, c_uint, c_ulonglong, c_void};

use super::super::Runtime;
use super::library::{constants, table};

pub type hipError_t = c_int;
pub type hipStream_t = *mut c_void;
pub type hipEvent_t = *mut c_void;
pub type hipDeviceptr_t = *mut c_void;

pub type hipDeviceAttribute_t = c_int;
pub type hipMemcpyKind = c_int;
pub type hipMemRangeHandleType = c_int;
pub type hipFlushGPUDirectRDMAWritesTarget = c_int;
pub type hipFlushGPUDirectRDMAWritesScope = c_int;

constants! {
    hipSuccess: hipError_t = 0;
    hipErrorInvalidValue: hipError_t = 1;
    hipErrorOutOfMemory: hipError_t = 2;
    hipErrorNoDevice: hipError_t = 100;
    hipErrorNotReady: hipError_t = 600;
    hipErrorNotSupported: hipError_t = 801;
    hipMemcpyHostToDevice: hipMemcpyKind = 1;
    hipMemcpyDeviceToHost: hipMemcpyKind = 2;
    hipStreamNonBlocking: c_uint = 1;
    hipEventDisableTiming: c_uint = 2;
    hipHostRegisterPortable: c_uint = 1;
    /// The answer is a pointer, although the function takes an `int *`.
    hipDeviceAttributeHdpMemFlushCntl: hipDeviceAttribute_t = 10005;
}

/// These three are newer than Debian's headers; the first is in the bindings of `cubecl-hip-sys` 7.14, the others are
/// from the description of their function.
pub const hipMemRangeHandleTypeDmaBufFd: hipMemRangeHandleType = 1;
pub const hipFlushGPUDirectRDMAWritesTargetCurrentDevice: hipFlushGPUDirectRDMAWritesTarget = 0;
pub const hipFlushGPUDirectRDMAWritesToOwner: hipFlushGPUDirectRDMAWritesScope = 100;

/// The same layout in all releases, but the numbers in `memoryType` changed with HIP 6: see [`memory_type`].
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct hipPointerAttribute_t {
    pub memoryType: c_int,
    pub device: c_int,
    pub devicePointer: *mut c_void,
    pub hostPointer: *mut c_void,
    pub isManaged: c_int,
    pub allocationFlags: c_uint,
}

/// `hipMemoryType` until HIP 5 and from HIP 6 on.
pub mod memory_type {
    use std::ffi::c_int;

    pub const HOST_5: c_int = 0;
    pub const DEVICE_5: c_int = 1;
    pub const UNREGISTERED_6: c_int = 0;
    pub const HOST_6: c_int = 1;
    pub const DEVICE_6: c_int = 2;
    pub const MANAGED_6: c_int = 3;
}

/// File names under which the library is looked for; ROCm 7, 6 and 5 have these.
pub const LIBRARY_NAMES: &[&str] = &[
    "libamdhip64.so.7",
    "libamdhip64.so.6",
    "libamdhip64.so.5",
    "libamdhip64.so",
];

table! {
    /// libamdhip64, opened.
    Hip of Runtime::Hip;
    required {
        hipRuntimeGetVersion: fn(version: *mut c_int) -> hipError_t;
        hipGetDeviceCount: fn(count: *mut c_int) -> hipError_t;
        hipGetDevice: fn(device: *mut c_int) -> hipError_t;
        hipSetDevice: fn(device: c_int) -> hipError_t;
        hipDeviceGetAttribute: fn(value: *mut c_int, attribute: hipDeviceAttribute_t, device: c_int) -> hipError_t;
        hipDeviceGetName: fn(name: *mut c_char, length: c_int, device: c_int) -> hipError_t;
        hipDeviceTotalMem: fn(bytes: *mut usize, device: c_int) -> hipError_t;
        hipDeviceGetPCIBusId: fn(name: *mut c_char, length: c_int, device: c_int) -> hipError_t;
        hipPointerGetAttributes:
            fn(attributes: *mut hipPointerAttribute_t, pointer: *const c_void) -> hipError_t;
        hipMemGetAddressRange:
            fn(base: *mut hipDeviceptr_t, size: *mut usize, pointer: hipDeviceptr_t) -> hipError_t;
        hipMalloc: fn(pointer: *mut *mut c_void, size: usize) -> hipError_t;
        hipFree: fn(pointer: *mut c_void) -> hipError_t;
        hipMemcpy:
            fn(to: *mut c_void, from: *const c_void, size: usize, kind: hipMemcpyKind) -> hipError_t;
        hipMemcpyAsync: fn(
            to: *mut c_void,
            from: *const c_void,
            size: usize,
            kind: hipMemcpyKind,
            stream: hipStream_t,
        ) -> hipError_t;
        hipStreamCreateWithFlags: fn(stream: *mut hipStream_t, flags: c_uint) -> hipError_t;
        hipStreamSynchronize: fn(stream: hipStream_t) -> hipError_t;
        hipStreamDestroy: fn(stream: hipStream_t) -> hipError_t;
        hipEventCreateWithFlags: fn(event: *mut hipEvent_t, flags: c_uint) -> hipError_t;
        hipEventRecord: fn(event: hipEvent_t, stream: hipStream_t) -> hipError_t;
        hipEventQuery: fn(event: hipEvent_t) -> hipError_t;
        hipEventDestroy: fn(event: hipEvent_t) -> hipError_t;
        hipHostRegister: fn(pointer: *mut c_void, size: usize, flags: c_uint) -> hipError_t;
        hipHostUnregister: fn(pointer: *mut c_void) -> hipError_t;
        hipGetErrorName: fn(error: hipError_t) -> *const c_char;
        hipGetLastError: fn() -> hipError_t;
    }
    optional {
        hipMemGetHandleForAddressRange: fn(
            handle: *mut c_void,
            pointer: hipDeviceptr_t,
            size: usize,
            kind: hipMemRangeHandleType,
            flags: c_ulonglong,
        ) -> hipError_t;
        hipDeviceFlushGPUDirectRDMAWrites: fn(
            target: hipFlushGPUDirectRDMAWritesTarget,
            scope: hipFlushGPUDirectRDMAWritesScope,
        ) -> hipError_t;
    }
}
