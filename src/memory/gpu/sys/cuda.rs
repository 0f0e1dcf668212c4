//! libcuda, the driver API: `cuda.h`.
//!
//! The header renames functions to versions (`_v2`); the names here are those that the library exports.

use std::ffi::{c_char, c_int, c_uint, c_ulonglong, c_void};

use super::super::Runtime;
use super::library::{constants, table};

pub type CUresult = c_int;
pub type CUdevice = c_int;
pub type CUdeviceptr = u64;
pub type CUcontext = *mut c_void;
pub type CUstream = *mut c_void;
pub type CUevent = *mut c_void;

pub type CUdevice_attribute = c_int;
pub type CUpointer_attribute = c_int;
pub type CUmemRangeHandleType = c_int;
pub type CUflushGPUDirectRDMAWritesTarget = c_int;
pub type CUflushGPUDirectRDMAWritesScope = c_int;

constants! {
    CUDA_SUCCESS: CUresult = 0;
    CUDA_ERROR_INVALID_VALUE: CUresult = 1;
    CUDA_ERROR_OUT_OF_MEMORY: CUresult = 2;
    CUDA_ERROR_NO_DEVICE: CUresult = 100;
    CUDA_ERROR_NOT_READY: CUresult = 600;
    CUDA_ERROR_NOT_SUPPORTED: CUresult = 801;
    CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_FLUSH_WRITES_OPTIONS: CUdevice_attribute = 117;
    CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WRITES_ORDERING: CUdevice_attribute = 118;
    CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED: CUdevice_attribute = 124;
    CU_FLUSH_GPU_DIRECT_RDMA_WRITES_OPTION_HOST: c_int = 1;
    CU_GPU_DIRECT_RDMA_WRITES_ORDERING_OWNER: c_int = 100;
    CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TARGET_CURRENT_CTX: CUflushGPUDirectRDMAWritesTarget = 0;
    CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TO_OWNER: CUflushGPUDirectRDMAWritesScope = 100;
    CU_POINTER_ATTRIBUTE_MEMORY_TYPE: CUpointer_attribute = 2;
    CU_POINTER_ATTRIBUTE_IS_MANAGED: CUpointer_attribute = 8;
    CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL: CUpointer_attribute = 9;
    CU_MEMORYTYPE_DEVICE: c_uint = 2;
    CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD: CUmemRangeHandleType = 1;
    CU_STREAM_NON_BLOCKING: c_uint = 1;
    CU_EVENT_DISABLE_TIMING: c_uint = 2;
    CU_MEMHOSTREGISTER_PORTABLE: c_uint = 1;
}

/// File names under which the library is looked for.
pub const LIBRARY_NAMES: &[&str] = &["libcuda.so.1"];

table! {
    /// libcuda, opened.
    Cuda of Runtime::Cuda;
    required {
        cuInit: fn(flags: c_uint) -> CUresult;
        cuDriverGetVersion: fn(version: *mut c_int) -> CUresult;
        cuDeviceGetCount: fn(count: *mut c_int) -> CUresult;
        cuDeviceGet: fn(device: *mut CUdevice, ordinal: c_int) -> CUresult;
        cuDeviceGetName: fn(name: *mut c_char, length: c_int, device: CUdevice) -> CUresult;
        cuDeviceTotalMem_v2: fn(bytes: *mut usize, device: CUdevice) -> CUresult;
        cuDeviceGetAttribute: fn(value: *mut c_int, attribute: CUdevice_attribute, device: CUdevice) -> CUresult;
        cuDeviceGetPCIBusId: fn(name: *mut c_char, length: c_int, device: CUdevice) -> CUresult;
        cuDevicePrimaryCtxRetain: fn(context: *mut CUcontext, device: CUdevice) -> CUresult;
        cuDevicePrimaryCtxRelease_v2: fn(device: CUdevice) -> CUresult;
        cuCtxPushCurrent_v2: fn(context: CUcontext) -> CUresult;
        cuCtxPopCurrent_v2: fn(context: *mut CUcontext) -> CUresult;
        cuPointerGetAttribute:
            fn(data: *mut c_void, attribute: CUpointer_attribute, pointer: CUdeviceptr) -> CUresult;
        cuMemGetAddressRange_v2:
            fn(base: *mut CUdeviceptr, size: *mut usize, pointer: CUdeviceptr) -> CUresult;
        cuMemAlloc_v2: fn(pointer: *mut CUdeviceptr, size: usize) -> CUresult;
        cuMemFree_v2: fn(pointer: CUdeviceptr) -> CUresult;
        cuMemcpyDtoH_v2: fn(to: *mut c_void, from: CUdeviceptr, size: usize) -> CUresult;
        cuMemcpyHtoD_v2: fn(to: CUdeviceptr, from: *const c_void, size: usize) -> CUresult;
        cuMemcpyDtoHAsync_v2:
            fn(to: *mut c_void, from: CUdeviceptr, size: usize, stream: CUstream) -> CUresult;
        cuMemcpyHtoDAsync_v2:
            fn(to: CUdeviceptr, from: *const c_void, size: usize, stream: CUstream) -> CUresult;
        cuStreamCreate: fn(stream: *mut CUstream, flags: c_uint) -> CUresult;
        cuStreamSynchronize: fn(stream: CUstream) -> CUresult;
        cuStreamDestroy_v2: fn(stream: CUstream) -> CUresult;
        cuEventCreate: fn(event: *mut CUevent, flags: c_uint) -> CUresult;
        cuEventRecord: fn(event: CUevent, stream: CUstream) -> CUresult;
        cuEventQuery: fn(event: CUevent) -> CUresult;
        cuEventDestroy_v2: fn(event: CUevent) -> CUresult;
        cuMemHostRegister_v2: fn(pointer: *mut c_void, size: usize, flags: c_uint) -> CUresult;
        cuMemHostUnregister: fn(pointer: *mut c_void) -> CUresult;
        cuGetErrorName: fn(error: CUresult, text: *mut *const c_char) -> CUresult;
    }
    optional {
        cuMemGetHandleForAddressRange: fn(
            handle: *mut c_void,
            pointer: CUdeviceptr,
            size: usize,
            kind: CUmemRangeHandleType,
            flags: c_ulonglong,
        ) -> CUresult;
        cuFlushGPUDirectRDMAWrites: fn(
            target: CUflushGPUDirectRDMAWritesTarget,
            scope: CUflushGPUDirectRDMAWritesScope,
        ) -> CUresult;
    }
}
