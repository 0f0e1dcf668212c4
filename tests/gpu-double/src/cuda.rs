//! libcuda.

use std::ffi::{c_char, c_int, c_uint, c_void};

use crate::{
    control::{called, script},
    memory::{allocate, copy, free, put, with_allocation},
};

const INVALID_VALUE: c_int = 1;
const OUT_OF_MEMORY: c_int = 2;
const NO_DEVICE: c_int = 100;
const INVALID_DEVICE: c_int = 101;
const INVALID_CONTEXT: c_int = 201;
/// Handles are not numbers of devices, and contexts not handles, so that mixing them up is found.
const HANDLE: c_int = 40;
const CONTEXT: usize = 0xc000;

fn call(name: &str, body: impl FnOnce() -> c_int) -> c_int {
    match called(name) {
        0 => body(),
        code => code,
    }
}

/// As `call`, with a context on the stack.
fn call_in_context(name: &str, body: impl FnOnce(c_int) -> c_int) -> c_int {
    call(name, || {
        match script(|script| script.contexts.last().copied()) {
            Some(context) => body((context - CONTEXT) as c_int),
            None => INVALID_CONTEXT,
        }
    })
}

fn devices() -> c_int {
    script(|script| script.value("devices", 2)) as c_int
}

fn is_handle(device: c_int) -> bool {
    (HANDLE..HANDLE + devices()).contains(&device)
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuInit(flags: c_uint) -> c_int {
    call("cuInit", || match (flags, devices()) {
        (0, 0) => NO_DEVICE,
        (0, _) => 0,
        _ => INVALID_VALUE,
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuDriverGetVersion(version: *mut c_int) -> c_int {
    call("cuDriverGetVersion", || {
        // SAFETY: out pointers are the caller's, here and below.
        unsafe { *version = 12_090 };
        0
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuDeviceGetCount(count: *mut c_int) -> c_int {
    call("cuDeviceGetCount", || {
        // SAFETY: as above.
        unsafe { *count = devices() };
        0
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuDeviceGet(device: *mut c_int, ordinal: c_int) -> c_int {
    call("cuDeviceGet", || {
        if !(0..devices()).contains(&ordinal) {
            return INVALID_DEVICE;
        }
        // SAFETY: as above.
        unsafe { *device = HANDLE + ordinal };
        0
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuDeviceGetName(
    name: *mut c_char,
    length: c_int,
    device: c_int,
) -> c_int {
    call("cuDeviceGetName", || {
        if !is_handle(device) {
            return INVALID_DEVICE;
        }
        // SAFETY: the caller's buffer and its length.
        unsafe { put(&format!("Double H100 {}", device - HANDLE), name, length) };
        0
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuDeviceTotalMem_v2(bytes: *mut usize, _device: c_int) -> c_int {
    call("cuDeviceTotalMem", || {
        // SAFETY: as above.
        unsafe { *bytes = 80 << 30 };
        0
    })
}

/// `dmabufs`, `options`, `ordering`.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuDeviceGetAttribute(
    value: *mut c_int,
    attribute: c_int,
    device: c_int,
) -> c_int {
    call("cuDeviceGetAttribute", || {
        let (name, default) = match attribute {
            117 => ("options", 1),
            118 => ("ordering", 0),
            124 => ("dmabufs", 1),
            _ => return INVALID_VALUE,
        };
        if !is_handle(device) {
            return INVALID_DEVICE;
        }
        // SAFETY: as above.
        unsafe { *value = script(|script| script.value(name, default)) as c_int };
        0
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuDeviceGetPCIBusId(
    name: *mut c_char,
    length: c_int,
    device: c_int,
) -> c_int {
    call("cuDeviceGetPCIBusId", || {
        // SAFETY: the caller's buffer and its length.
        unsafe {
            put(
                &format!("0000:{:02X}:00.0", 0x1b + device - HANDLE),
                name,
                length,
            )
        };
        0
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuDevicePrimaryCtxRetain(
    context: *mut *mut c_void,
    device: c_int,
) -> c_int {
    call("cuDevicePrimaryCtxRetain", || {
        if !is_handle(device) {
            return INVALID_DEVICE;
        }
        let device = (device - HANDLE) as usize;
        // SAFETY: as above.
        unsafe { *context = (CONTEXT + device) as *mut c_void };
        0
    })
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuDevicePrimaryCtxRelease_v2(device: c_int) -> c_int {
    call("cuDevicePrimaryCtxRelease", || match is_handle(device) {
        true => 0,
        false => INVALID_DEVICE,
    })
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuCtxPushCurrent_v2(context: *mut c_void) -> c_int {
    call("cuCtxPushCurrent", || {
        script(|script| script.contexts.push(context as usize));
        0
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuCtxPopCurrent_v2(context: *mut *mut c_void) -> c_int {
    call("cuCtxPopCurrent", || {
        match script(|script| script.contexts.pop()) {
            // SAFETY: as above.
            Some(popped) => unsafe {
                *context = popped as *mut c_void;
                0
            },
            None => INVALID_CONTEXT,
        }
    })
}

/// `kind` 0: device memory, else that number; `managed` 1: managed.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuPointerGetAttribute(
    data: *mut c_void,
    attribute: c_int,
    pointer: u64,
) -> c_int {
    call("cuPointerGetAttribute", || {
        let Some(device) = with_allocation(pointer as usize, |_, found| found.device) else {
            return INVALID_VALUE;
        };
        let (kind, managed) =
            script(|script| (script.value("kind", 0), script.value("managed", 0)));
        // SAFETY: the caller has made room for the attribute's type.
        unsafe {
            match attribute {
                2 => *data.cast::<u32>() = if kind == 0 { 2 } else { kind as u32 },
                8 => *data.cast::<u8>() = managed as u8,
                9 => *data.cast::<c_int>() = device,
                _ => return INVALID_VALUE,
            }
        }
        0
    })
}

/// `range` other than 0: allocations look that long.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuMemGetAddressRange_v2(
    base: *mut u64,
    size: *mut usize,
    pointer: u64,
) -> c_int {
    call("cuMemGetAddressRange", || {
        let Some((start, length)) =
            with_allocation(pointer as usize, |start, found| (start, found.length))
        else {
            return INVALID_VALUE;
        };
        let range = script(|script| script.value("range", 0)) as usize;
        // SAFETY: as above.
        unsafe {
            *base = start as u64;
            *size = if range == 0 { length } else { range };
        }
        0
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuMemAlloc_v2(pointer: *mut u64, size: usize) -> c_int {
    call_in_context("cuMemAlloc", |device| match allocate(size, device) {
        // SAFETY: as above.
        Some(address) => unsafe {
            *pointer = address as u64;
            0
        },
        None => OUT_OF_MEMORY,
    })
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuMemFree_v2(pointer: u64) -> c_int {
    call_in_context("cuMemFree", |_| match free(pointer as usize) {
        true => 0,
        false => INVALID_VALUE,
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuMemcpyDtoH_v2(to: *mut c_void, from: u64, size: usize) -> c_int {
    call_in_context("cuMemcpyDtoH", |_| {
        // SAFETY: the caller's ranges, here and in the three below.
        unsafe { copy(to as usize, from as usize, size) };
        0
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuMemcpyHtoD_v2(
    to: u64,
    from: *const c_void,
    size: usize,
) -> c_int {
    call_in_context("cuMemcpyHtoD", |_| {
        // SAFETY: see above.
        unsafe { copy(to as usize, from as usize, size) };
        0
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuMemcpyDtoHAsync_v2(
    to: *mut c_void,
    from: u64,
    size: usize,
    _stream: *mut c_void,
) -> c_int {
    call_in_context("cuMemcpyDtoHAsync", |_| {
        // SAFETY: see above.
        unsafe { copy(to as usize, from as usize, size) };
        0
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuMemcpyHtoDAsync_v2(
    to: u64,
    from: *const c_void,
    size: usize,
    _stream: *mut c_void,
) -> c_int {
    call_in_context("cuMemcpyHtoDAsync", |_| {
        // SAFETY: see above.
        unsafe { copy(to as usize, from as usize, size) };
        0
    })
}

fn make(to: *mut *mut c_void) -> c_int {
    // SAFETY: the caller's out pointer.
    unsafe { *to = script(|script| script.make()) as *mut c_void };
    0
}

fn destroy(what: *mut c_void) -> c_int {
    match script(|script| script.live.remove(&(what as usize))) {
        true => 0,
        false => INVALID_VALUE,
    }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuStreamCreate(to: *mut *mut c_void, _flags: c_uint) -> c_int {
    call_in_context("cuStreamCreate", |_| make(to))
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuStreamSynchronize(_stream: *mut c_void) -> c_int {
    call_in_context("cuStreamSynchronize", |_| 0)
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuStreamDestroy_v2(stream: *mut c_void) -> c_int {
    call_in_context("cuStreamDestroy", |_| destroy(stream))
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuEventCreate(to: *mut *mut c_void, _flags: c_uint) -> c_int {
    call_in_context("cuEventCreate", |_| make(to))
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuEventRecord(_event: *mut c_void, _stream: *mut c_void) -> c_int {
    call_in_context("cuEventRecord", |_| 0)
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuEventQuery(_event: *mut c_void) -> c_int {
    call_in_context("cuEventQuery", |_| 0)
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuEventDestroy_v2(event: *mut c_void) -> c_int {
    call_in_context("cuEventDestroy", |_| destroy(event))
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuMemHostRegister_v2(
    pointer: *mut c_void,
    _size: usize,
    _flags: c_uint,
) -> c_int {
    call_in_context("cuMemHostRegister", |_| {
        script(|script| script.live.insert(pointer as usize));
        0
    })
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuMemHostUnregister(pointer: *mut c_void) -> c_int {
    call_in_context("cuMemHostUnregister", |_| destroy(pointer))
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuGetErrorName(_code: c_int, text: *mut *const c_char) -> c_int {
    // SAFETY: as above.
    unsafe { *text = c"CUDA_ERROR_OF_THE_DOUBLE".as_ptr() };
    0
}

/// Exports whole host pages that begin where an allocation's do.
#[cfg(not(feature = "old"))]
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuMemGetHandleForAddressRange(
    handle: *mut c_void,
    pointer: u64,
    size: usize,
    kind: c_int,
    flags: std::ffi::c_ulonglong,
) -> c_int {
    call("cuMemGetHandleForAddressRange", || {
        if !pointer.is_multiple_of(4096) || !size.is_multiple_of(4096) || kind != 1 || flags != 0 {
            return INVALID_VALUE;
        }
        // An allocation may begin in the middle of its first page.
        let inside = with_allocation(pointer as usize + 4095, |base, found| {
            let at_start = base - found.offset as usize == pointer as usize;
            (at_start && size >= 4096).then(|| found.export())
        });
        match inside.flatten() {
            // SAFETY: for this kind of handle the out pointer is to an `int`.
            Some(fd) => unsafe { *handle.cast::<c_int>() = fd },
            None => return INVALID_VALUE,
        }
        0
    })
}

#[cfg(not(feature = "old"))]
#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuFlushGPUDirectRDMAWrites(target: c_int, scope: c_int) -> c_int {
    call_in_context("cuFlushGPUDirectRDMAWrites", |_| match (target, scope) {
        (0, 100) => 0,
        _ => INVALID_VALUE,
    })
}
