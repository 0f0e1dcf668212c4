//! libamdhip64.

use std::ffi::{c_char, c_int, c_uint, c_void};

use crate::{
    control::{called, script},
    memory::{allocate, copy, free, put, with_allocation},
};

const INVALID_VALUE: c_int = 1;
const OUT_OF_MEMORY: c_int = 2;
const INVALID_DEVICE: c_int = 101;

/// Where the HDP register of the double is; what is written there has no effect but to be seen.
static HDP: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);

/// Ends a call: keeps its code as the thread's last error, as HIP does.
fn end(code: c_int) -> c_int {
    if code != 0 {
        script(|script| script.last_error = code);
    }
    code
}

/// Runs `body` unless the script makes the call fail.
fn call(name: &str, body: impl FnOnce() -> c_int) -> c_int {
    let code = called(name);
    end(if code == 0 { body() } else { code })
}

fn exists(device: c_int) -> bool {
    let devices = script(|script| script.value("devices", 2));
    device >= 0 && (device as u64) < devices
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn hipRuntimeGetVersion(version: *mut c_int) -> c_int {
    call("hipRuntimeGetVersion", || {
        // SAFETY: out pointers are the caller's, here and below.
        unsafe { *version = script(|script| script.value("version", 60_443_484)) as c_int };
        0
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn hipGetDeviceCount(count: *mut c_int) -> c_int {
    call("hipGetDeviceCount", || {
        // SAFETY: as above.
        unsafe { *count = script(|script| script.value("devices", 2)) as c_int };
        0
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn hipGetDevice(device: *mut c_int) -> c_int {
    call("hipGetDevice", || {
        // SAFETY: as above.
        unsafe { *device = script(|script| script.device) };
        0
    })
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn hipSetDevice(device: c_int) -> c_int {
    call("hipSetDevice", || {
        if !exists(device) {
            return INVALID_DEVICE;
        }
        script(|script| script.device = device);
        0
    })
}

/// Knows one attribute, the register of the HDP; `hdp` 0 is a device without.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn hipDeviceGetAttribute(
    value: *mut c_int,
    attribute: c_int,
    device: c_int,
) -> c_int {
    call("hipDeviceGetAttribute", || {
        if attribute != 10005 || !exists(device) {
            return INVALID_VALUE;
        }
        let has_register = script(|script| script.value("hdp", 1)) != 0;
        let register = if has_register {
            HDP.as_ptr()
        } else {
            std::ptr::null_mut()
        };
        // SAFETY: the caller has made room for a pointer, as the attribute asks.
        unsafe { value.cast::<*mut u32>().write_unaligned(register) };
        0
    })
}

/// What was last written to the HDP register; reading it sets it back.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn double_hdp() -> u64 {
    HDP.swap(0, std::sync::atomic::Ordering::SeqCst).into()
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn hipDeviceGetName(
    name: *mut c_char,
    length: c_int,
    device: c_int,
) -> c_int {
    call("hipDeviceGetName", || {
        // SAFETY: the caller's buffer and its length.
        unsafe { put(&format!("Double Instinct {device}"), name, length) };
        0
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn hipDeviceTotalMem(bytes: *mut usize, _device: c_int) -> c_int {
    call("hipDeviceTotalMem", || {
        // SAFETY: as above.
        unsafe { *bytes = 192 << 30 };
        0
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn hipDeviceGetPCIBusId(
    name: *mut c_char,
    length: c_int,
    device: c_int,
) -> c_int {
    call("hipDeviceGetPCIBusId", || {
        // SAFETY: the caller's buffer and its length.
        unsafe { put(&format!("0000:{:02x}:00.0", 0x0c + device), name, length) };
        0
    })
}

#[repr(C)]
pub(crate) struct PointerAttribute {
    kind: c_int,
    device: c_int,
    device_pointer: *mut c_void,
    host_pointer: *mut c_void,
    is_managed: c_int,
    flags: c_uint,
}

/// `kind` 0: device memory, numbered as the version does; else that number. `managed` 1: managed.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn hipPointerGetAttributes(
    attributes: *mut PointerAttribute,
    pointer: *const c_void,
) -> c_int {
    call("hipPointerGetAttributes", || {
        let (version, kind, managed) = script(|script| {
            (
                script.value("version", 60_443_484),
                script.value("kind", 0) as c_int,
                script.value("managed", 0) as c_int,
            )
        });
        let is_new = version >= 60_000_000;
        let device = with_allocation(pointer as usize, |_, found| found.device);
        let (kind, device) = match device {
            None if !is_new => return INVALID_VALUE,
            None => (0, 0),
            Some(device) if kind == 0 => (if is_new { 2 } else { 1 }, device),
            Some(device) => (kind, device),
        };
        // SAFETY: the caller's structure.
        unsafe {
            *attributes = PointerAttribute {
                kind,
                device,
                device_pointer: pointer.cast_mut(),
                host_pointer: std::ptr::null_mut(),
                is_managed: managed,
                flags: 0,
            };
        }
        0
    })
}

/// `range` other than 0: allocations look that long.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn hipMemGetAddressRange(
    base: *mut *mut c_void,
    size: *mut usize,
    pointer: *mut c_void,
) -> c_int {
    call("hipMemGetAddressRange", || {
        let Some((start, length)) =
            with_allocation(pointer as usize, |start, found| (start, found.length))
        else {
            return INVALID_VALUE;
        };
        let range = script(|script| script.value("range", 0)) as usize;
        // SAFETY: as above.
        unsafe {
            *base = start as *mut c_void;
            *size = if range == 0 { length } else { range };
        }
        0
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn hipMalloc(pointer: *mut *mut c_void, size: usize) -> c_int {
    call("hipMalloc", || {
        let device = script(|script| script.device);
        match allocate(size, device) {
            // SAFETY: as above.
            Some(address) => unsafe { *pointer = address as *mut c_void },
            None => return OUT_OF_MEMORY,
        }
        0
    })
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn hipFree(pointer: *mut c_void) -> c_int {
    call("hipFree", || {
        if free(pointer as usize) {
            0
        } else {
            INVALID_VALUE
        }
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn hipMemcpy(
    to: *mut c_void,
    from: *const c_void,
    size: usize,
    _kind: c_int,
) -> c_int {
    call("hipMemcpy", || {
        // SAFETY: the caller's ranges.
        unsafe { copy(to as usize, from as usize, size) };
        0
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn hipMemcpyAsync(
    to: *mut c_void,
    from: *const c_void,
    size: usize,
    _kind: c_int,
    stream: *mut c_void,
) -> c_int {
    call("hipMemcpyAsync", || {
        if !script(|script| script.live.contains(&(stream as usize))) {
            return INVALID_VALUE;
        }
        // SAFETY: the caller's ranges.
        unsafe { copy(to as usize, from as usize, size) };
        0
    })
}

fn make(to: *mut *mut c_void) -> c_int {
    // SAFETY: the caller's out pointer.
    unsafe { *to = script(|script| script.make()) as *mut c_void };
    0
}

/// Destroys; a second time is an error.
fn destroy(what: *mut c_void) -> c_int {
    match script(|script| script.live.remove(&(what as usize))) {
        true => 0,
        false => INVALID_VALUE,
    }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn hipStreamCreateWithFlags(
    to: *mut *mut c_void,
    _flags: c_uint,
) -> c_int {
    call("hipStreamCreateWithFlags", || make(to))
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn hipStreamSynchronize(_stream: *mut c_void) -> c_int {
    call("hipStreamSynchronize", || 0)
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn hipStreamDestroy(stream: *mut c_void) -> c_int {
    call("hipStreamDestroy", || destroy(stream))
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn hipEventCreateWithFlags(
    to: *mut *mut c_void,
    _flags: c_uint,
) -> c_int {
    call("hipEventCreateWithFlags", || make(to))
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn hipEventRecord(_event: *mut c_void, _stream: *mut c_void) -> c_int {
    call("hipEventRecord", || 0)
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn hipEventQuery(_event: *mut c_void) -> c_int {
    call("hipEventQuery", || 0)
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn hipEventDestroy(event: *mut c_void) -> c_int {
    call("hipEventDestroy", || destroy(event))
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn hipHostRegister(
    pointer: *mut c_void,
    _size: usize,
    _flags: c_uint,
) -> c_int {
    call("hipHostRegister", || {
        script(|script| script.live.insert(pointer as usize));
        0
    })
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn hipHostUnregister(pointer: *mut c_void) -> c_int {
    call("hipHostUnregister", || destroy(pointer))
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn hipGetErrorName(_code: c_int) -> *const c_char {
    c"hipErrorOfTheDouble".as_ptr()
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn hipGetLastError() -> c_int {
    script(|script| std::mem::take(&mut script.last_error))
}

/// Exports whole objects only, and tells no offset.
#[cfg(not(feature = "old"))]
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn hipMemGetHandleForAddressRange(
    handle: *mut c_void,
    pointer: *mut c_void,
    size: usize,
    kind: c_int,
    flags: std::ffi::c_ulonglong,
) -> c_int {
    call("hipMemGetHandleForAddressRange", || {
        let exported = with_allocation(pointer as usize, |base, found| {
            let is_whole = base == pointer as usize && size == found.length && found.offset == 0;
            (is_whole && kind == 1 && flags == 0).then(|| found.export())
        });
        match exported.flatten() {
            // SAFETY: for this kind of handle the out pointer is to an `int`.
            Some(fd) => unsafe { *handle.cast::<c_int>() = fd },
            None => return INVALID_VALUE,
        }
        0
    })
}

/// `flush` 0: a device that the runtime cannot flush.
#[cfg(not(feature = "old"))]
#[unsafe(no_mangle)]
pub(crate) extern "C" fn hipDeviceFlushGPUDirectRDMAWrites(target: c_int, scope: c_int) -> c_int {
    const NOT_SUPPORTED: c_int = 801;
    call("hipDeviceFlushGPUDirectRDMAWrites", || {
        match script(|script| script.value("flush", 1)) {
            0 => NOT_SUPPORTED,
            _ if target == 0 && scope == 100 => 0,
            _ => INVALID_VALUE,
        }
    })
}
