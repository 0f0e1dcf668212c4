//! AMD: HIP for memory and copies, HSA for the export that knows its offset.

use std::{
    ffi::{c_int, c_void},
    path::PathBuf,
    ptr,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering, fence},
    },
};

use super::{
    GpuError, Libraries, RocmVersion, Runtime,
    driver::{Driver, Handle, name_in, owned, parse_location, text_of},
    offsets, probe,
    sys::{
        hip::{self as sys, hipSuccess, memory_type},
        hsa::{self, HSA_STATUS_SUCCESS},
        library,
    },
};
use crate::memory::{Direction, Dmabuf, PciAddress, Span, Visibility};

/// AMD's runtime, opened. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Hip(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    hip: sys::Hip,
    version: RocmVersion,
    file: Option<PathBuf>,
    hsa_path: Option<PathBuf>,
    /// Opened and initialised when the first export needs it.
    hsa: OnceLock<Result<hsa::Hsa, GpuError>>,
    warned: AtomicBool,
}

impl Hip {
    /// The process's own, opened when first asked for, from the libraries that the environment names.
    ///
    /// # Errors
    ///
    /// No library, or one that lacks a function. The answer stays the same for the life of the process.
    pub fn shared() -> Result<Self, GpuError> {
        static SHARED: OnceLock<Result<Hip, GpuError>> = OnceLock::new();
        SHARED
            .get_or_init(|| Self::open(&Libraries::from_env()))
            .clone()
    }

    /// Opens the library.
    ///
    /// # Errors
    ///
    /// As [`Hip::shared`].
    pub fn open(libraries: &Libraries) -> Result<Self, GpuError> {
        let hip = sys::Hip::open(libraries.hip.as_deref())?;
        let mut version = 0;
        // SAFETY: the out pointer is valid.
        let code = unsafe { (hip.hipRuntimeGetVersion)(&mut version) };
        if code != hipSuccess {
            // Without devices the runtime may not even say its version; the file's name has to do.
            version = 0;
        }
        let file = hip
            .address("hipRuntimeGetVersion")
            .and_then(library::file_of);
        Ok(Self(Arc::new(Inner {
            version: RocmVersion::new(version, file.as_deref()),
            hip,
            file,
            hsa_path: libraries.hsa.clone(),
            hsa: OnceLock::new(),
            warned: AtomicBool::new(false),
        })))
    }

    /// Its release.
    pub fn version(&self) -> RocmVersion {
        self.0.version
    }

    /// The file of the library, if it can be told.
    pub fn file(&self) -> Option<&std::path::Path> {
        self.0.file.as_deref()
    }

    /// What is known to go wrong with this release, if anything. Also logged, once, at the first export.
    pub fn warning(&self) -> Option<String> {
        self.0.version.warning()
    }

    /// Functions that kvpush would use and the library lacks.
    pub fn missing(&self) -> Vec<&'static str> {
        probe::missing(sys::Hip::SYMBOLS, |name| self.0.hip.address(name).is_some())
    }

    /// The device's name, and the bytes it has.
    ///
    /// # Errors
    ///
    /// The runtime refuses.
    pub fn describe(&self, device: u32) -> Result<(String, u64), GpuError> {
        let hip = &self.0.hip;
        let (mut name, mut bytes) = ([0u8; 256], 0usize);
        // SAFETY: the buffer and its length belong together; both out pointers are valid.
        let (named, sized) = unsafe {
            (
                (hip.hipDeviceGetName)(name.as_mut_ptr().cast(), 256, device as c_int),
                (hip.hipDeviceTotalMem)(&mut bytes, device as c_int),
            )
        };
        self.done("hipDeviceGetName", Some(device), named)?;
        self.done("hipDeviceTotalMem", Some(device), sized)?;
        Ok((name_in(&name), bytes as u64))
    }

    fn done(&self, call: &'static str, device: Option<u32>, code: c_int) -> Result<(), GpuError> {
        if code == hipSuccess {
            return Ok(());
        }
        // SAFETY: hipGetErrorName returns static text for any code; hipGetLastError takes nothing. It clears the
        // thread's last error, which is ours, so that an engine's next check does not find it.
        let name = unsafe {
            (self.0.hip.hipGetLastError)();
            text_of((self.0.hip.hipGetErrorName)(code))
        };
        let hint = match code {
            sys::hipErrorNoDevice => Some("is /dev/kfd there, and may this user open it?"),
            sys::hipErrorOutOfMemory => Some("the device has too little memory left"),
            _ => None,
        };
        Err(GpuError::Call {
            runtime: Runtime::Hip,
            call,
            code,
            name,
            device,
            hint,
        })
    }

    /// HSA, opened and initialised.
    pub(super) fn hsa(&self) -> Result<&hsa::Hsa, GpuError> {
        let open = || {
            let hsa = hsa::Hsa::open(self.0.hsa_path.as_deref())?;
            // SAFETY: takes nothing. The runtime counts its users, and HIP is one for the life of the process; this
            // one is never given back either.
            let status = unsafe { (hsa.hsa_init)() };
            match status {
                HSA_STATUS_SUCCESS => Ok(hsa),
                _ => Err(hsa_error(&hsa, "hsa_init", None, status)),
            }
        };
        self.0.hsa.get_or_init(open).as_ref().map_err(Clone::clone)
    }

    fn export_by_hsa(&self, device: u32, span: Span) -> Result<Dmabuf, String> {
        let hsa = self.hsa().map_err(|error| error.to_string())?;
        let Some(export) = hsa.hsa_amd_portable_export_dmabuf else {
            return Err(format!(
                "{} has no hsa_amd_portable_export_dmabuf: it is too old",
                hsa.name
            ));
        };
        let mut supported = 1u32;
        // SAFETY: the attribute is a C `bool`, for which there is more than enough room; it is the first byte.
        let asked = unsafe {
            (hsa.hsa_system_get_info)(
                hsa::HSA_AMD_SYSTEM_INFO_DMABUF_SUPPORTED,
                ptr::from_mut(&mut supported).cast(),
            )
        };
        if asked == HSA_STATUS_SUCCESS && supported == 0 {
            return Err("HSA: the kernel's amdgpu driver exports no dmabufs".to_owned());
        }
        let (mut fd, mut offset) = (-1, 0);
        // SAFETY: the range is only looked up; both out pointers are valid.
        let status = unsafe {
            export(
                span.address as *const c_void,
                span.length as usize,
                &mut fd,
                &mut offset,
            )
        };
        if status != HSA_STATUS_SUCCESS {
            let call = "hsa_amd_portable_export_dmabuf";
            return Err(hsa_error(hsa, call, Some(device), status).to_string());
        }
        // SAFETY: the runtime has just made the descriptor for us.
        let fd = unsafe { owned(fd) }
            .ok_or("hsa_amd_portable_export_dmabuf succeeded without a descriptor")?;
        Ok(Dmabuf { fd, offset })
    }

    fn export_by_hip(&self, device: u32, span: Span) -> Result<Dmabuf, String> {
        let Some(export) = self.0.hip.hipMemGetHandleForAddressRange else {
            return Err(format!(
                "{} has no hipMemGetHandleForAddressRange: it needs ROCm 7.0",
                self.0.hip.name
            ));
        };
        // The call exports whole objects and tells no offset, so only a whole object leaves no doubt.
        let whole = self
            .allocation(device, span.address)
            .map_err(|error| error.to_string())?;
        let offset = offsets::offset_within(whole, 0, span)
            .ok_or_else(|| format!("hipMemGetAddressRange: {whole:x?} does not hold all of it"))?;
        let mut fd: c_int = -1;
        // SAFETY: for this type of handle the out pointer is to an `int`.
        let code = unsafe {
            export(
                ptr::from_mut(&mut fd).cast(),
                whole.address as *mut c_void,
                whole.length as usize,
                sys::hipMemRangeHandleTypeDmaBufFd,
                0,
            )
        };
        self.done("hipMemGetHandleForAddressRange", Some(device), code)
            .map_err(|error| error.to_string())?;
        // SAFETY: the runtime has just made the descriptor for us.
        let fd = unsafe { owned(fd) }
            .ok_or("hipMemGetHandleForAddressRange succeeded without a descriptor")?;
        Ok(Dmabuf { fd, offset })
    }

    /// Lets the runtime flush. `false` if it is too old for that or says that it cannot for this device.
    fn flush_by_runtime(&self, device: u32) -> Result<bool, GpuError> {
        let Some(flush) = self.0.hip.hipDeviceFlushGPUDirectRDMAWrites else {
            return Ok(false);
        };
        // SAFETY: takes two numbers and works on the current device.
        let code = unsafe {
            flush(
                sys::hipFlushGPUDirectRDMAWritesTargetCurrentDevice,
                sys::hipFlushGPUDirectRDMAWritesToOwner,
            )
        };
        let done = self.done("hipDeviceFlushGPUDirectRDMAWrites", Some(device), code);
        if code == sys::hipErrorNotSupported {
            return Ok(false);
        }
        done.map(|()| true)
    }

    /// The register that flushes the HDP, if the process has it mapped.
    fn hdp_register(&self, device: u32) -> Option<*mut u32> {
        let mut register: *mut u32 = ptr::null_mut();
        // SAFETY: for this attribute the runtime writes a pointer, for which there is room.
        let code = unsafe {
            (self.0.hip.hipDeviceGetAttribute)(
                ptr::from_mut(&mut register).cast(),
                sys::hipDeviceAttributeHdpMemFlushCntl,
                device as c_int,
            )
        };
        self.done("hipDeviceGetAttribute", Some(device), code)
            .ok()?;
        let aligned = (register as usize).is_multiple_of(align_of::<u32>());
        (!register.is_null() && aligned).then_some(register)
    }
}

pub(super) fn hsa_error(
    hsa: &hsa::Hsa,
    call: &'static str,
    device: Option<u32>,
    code: c_int,
) -> GpuError {
    let mut text = ptr::null();
    // SAFETY: the out pointer is valid; the text is static.
    let name = unsafe {
        (hsa.hsa_status_string)(code, &mut text);
        text_of(text)
    };
    GpuError::Call {
        runtime: Runtime::Hsa,
        call,
        code,
        name,
        device,
        hint: None,
    }
}

/// Sets the thread's device back when dropped.
#[derive(Debug)]
pub struct CurrentDevice {
    hip: Hip,
    previous: c_int,
}

impl Drop for CurrentDevice {
    fn drop(&mut self) {
        // SAFETY: takes a number.
        let code = unsafe { (self.hip.0.hip.hipSetDevice)(self.previous) };
        if let Err(error) = self.hip.done("hipSetDevice", None, code) {
            tracing::error!(%error, device = self.previous, "the thread's HIP device could not be restored");
        }
    }
}

impl Driver for Hip {
    const RUNTIME: Runtime = Runtime::Hip;
    type Current = CurrentDevice;

    fn current(&self, device: u32) -> Result<CurrentDevice, GpuError> {
        let hip = &self.0.hip;
        let mut previous = 0;
        // SAFETY: the out pointer is valid.
        let code = unsafe { (hip.hipGetDevice)(&mut previous) };
        self.done("hipGetDevice", None, code)?;
        // The guard is there before the change, so that a change that fails half-way is undone too.
        let guard = CurrentDevice {
            hip: self.clone(),
            previous,
        };
        // SAFETY: takes a number.
        let code = unsafe { (hip.hipSetDevice)(device as c_int) };
        self.done("hipSetDevice", Some(device), code)?;
        Ok(guard)
    }

    fn device_count(&self) -> Result<u32, GpuError> {
        let mut count = 0;
        // SAFETY: the out pointer is valid.
        let code = unsafe { (self.0.hip.hipGetDeviceCount)(&mut count) };
        self.done("hipGetDeviceCount", None, code)?;
        Ok(count.max(0) as u32)
    }

    fn location(&self, device: u32) -> Result<PciAddress, GpuError> {
        let mut name = [0u8; 32];
        // SAFETY: the buffer and its length belong together.
        let code = unsafe {
            (self.0.hip.hipDeviceGetPCIBusId)(name.as_mut_ptr().cast(), 32, device as c_int)
        };
        let call = "hipDeviceGetPCIBusId";
        self.done(call, Some(device), code)?;
        parse_location(Runtime::Hip, call, device, &name_in(&name))
    }

    fn visibility(&self, device: u32) -> Visibility {
        let runtime = self.flush_by_runtime(device);
        if matches!(runtime, Ok(true)) {
            Visibility::RuntimeFlush
        } else if self.hdp_register(device).is_some() {
            Visibility::HdpRegister
        } else {
            Visibility::ReadBack
        }
    }

    fn check(&self, device: u32, address: u64) -> Result<(), GpuError> {
        let mut found = sys::hipPointerAttribute_t {
            memoryType: -1,
            device: -1,
            devicePointer: ptr::null_mut(),
            hostPointer: ptr::null_mut(),
            isManaged: 0,
            allocationFlags: 0,
        };
        // SAFETY: the address is only looked up; the out pointer is to the structure that the call fills in.
        let code =
            unsafe { (self.0.hip.hipPointerGetAttributes)(&mut found, address as *const c_void) };
        let runtime = Runtime::Hip;
        let not = |found| GpuError::NotDeviceMemory {
            runtime,
            address,
            found,
        };
        if code == sys::hipErrorInvalidValue {
            // What releases before 6 say of an address that they do not know.
            let _ = self.done("hipPointerGetAttributes", Some(device), code);
            return Err(not("an address unknown to it"));
        }
        self.done("hipPointerGetAttributes", Some(device), code)?;
        let is_new = match self.0.version.major {
            0 => {
                return Err(not(
                    "of a kind that cannot be told: the runtime hides its version",
                ));
            }
            major => major >= 6,
        };
        let kind = found.memoryType;
        if found.isManaged != 0 || is_new && kind == memory_type::MANAGED_6 {
            return Err(GpuError::Managed { runtime, address });
        }
        let (device_kind, host_kind) = match is_new {
            true => (memory_type::DEVICE_6, memory_type::HOST_6),
            false => (memory_type::DEVICE_5, memory_type::HOST_5),
        };
        match kind {
            _ if kind == device_kind && found.device == device as c_int => Ok(()),
            _ if kind == device_kind => Err(GpuError::OtherDevice {
                runtime,
                address,
                device,
                owner: found.device,
            }),
            _ if kind == host_kind => Err(not("host memory")),
            _ if is_new && kind == memory_type::UNREGISTERED_6 => {
                Err(not("an address unknown to it"))
            }
            _ => Err(not("memory of another kind")),
        }
    }

    fn allocation(&self, device: u32, address: u64) -> Result<Span, GpuError> {
        let (mut base, mut size) = (ptr::null_mut(), 0);
        // SAFETY: the address is only looked up; both out pointers are valid.
        let code = unsafe {
            (self.0.hip.hipMemGetAddressRange)(&mut base, &mut size, address as *mut c_void)
        };
        self.done("hipMemGetAddressRange", Some(device), code)?;
        Ok(Span {
            address: base as u64,
            length: size as u64,
        })
    }

    fn export(&self, device: u32, span: Span) -> Result<Dmabuf, GpuError> {
        if let Some(warning) = self.warning()
            && !self.0.warned.swap(true, Ordering::Relaxed)
        {
            tracing::warn!("{warning}");
        }
        let first = match self.export_by_hsa(device, span) {
            Ok(dmabuf) => return Ok(dmabuf),
            Err(reason) => reason,
        };
        self.export_by_hip(device, span)
            .map_err(|second| GpuError::NoExport {
                address: span.address,
                length: span.length,
                reasons: vec![first, second],
            })
    }

    fn allocate(&self, device: u32, length: u64) -> Result<u64, GpuError> {
        let mut pointer = ptr::null_mut();
        // SAFETY: the out pointer is valid.
        let code = unsafe { (self.0.hip.hipMalloc)(&mut pointer, length as usize) };
        self.done("hipMalloc", Some(device), code)?;
        Ok(pointer as u64)
    }

    unsafe fn free(&self, device: u32, address: u64) -> Result<(), GpuError> {
        // SAFETY: an allocation that nothing uses any more, by this function's contract.
        let code = unsafe { (self.0.hip.hipFree)(address as *mut c_void) };
        self.done("hipFree", Some(device), code)
    }

    unsafe fn flush(&self, device: u32, how: Visibility, last: u64) -> Result<(), GpuError> {
        if how == Visibility::Ordered
            || how == Visibility::RuntimeFlush && self.flush_by_runtime(device)?
        {
            return Ok(());
        }
        if how == Visibility::HdpRegister
            && let Some(register) = self.hdp_register(device)
        {
            // What has been learnt of the NIC's completion comes before the write, and the read waits for the write
            // to have reached the device.
            fence(Ordering::SeqCst);
            // SAFETY: the runtime maps the register for the life of the process, readable and writable, and says
            // where; any value flushes. Nothing else lies there, so no Rust reference can exist.
            unsafe {
                register.write_volatile(1);
                register.read_volatile();
            }
            return Ok(());
        }
        let mut byte = 0u8;
        let host = ptr::from_mut(&mut byte) as u64;
        // SAFETY: one byte of the device's memory, by this function's contract, to one of ours.
        unsafe { self.copy_now(device, Direction::ToHost, last, host, 1) }
    }

    unsafe fn copy_now(
        &self,
        device: u32,
        direction: Direction,
        at: u64,
        host: u64,
        length: u64,
    ) -> Result<(), GpuError> {
        let (to, from, kind) = ends(direction, at, host);
        // SAFETY: both ranges are mapped, by this function's contract.
        let code = unsafe { (self.0.hip.hipMemcpy)(to, from, length as usize, kind) };
        self.done("hipMemcpy", Some(device), code)
    }

    unsafe fn copy(
        &self,
        device: u32,
        direction: Direction,
        at: u64,
        host: u64,
        length: u64,
        stream: Handle,
    ) -> Result<(), GpuError> {
        let (to, from, kind) = ends(direction, at, host);
        let stream = stream.0 as *mut c_void;
        // SAFETY: both ranges stay mapped and the stream is live, by this function's contract.
        let code = unsafe { (self.0.hip.hipMemcpyAsync)(to, from, length as usize, kind, stream) };
        self.done("hipMemcpyAsync", Some(device), code)
    }

    fn new_stream(&self, device: u32) -> Result<Handle, GpuError> {
        let mut stream = ptr::null_mut();
        // SAFETY: the out pointer is valid.
        let code = unsafe {
            (self.0.hip.hipStreamCreateWithFlags)(&mut stream, sys::hipStreamNonBlocking)
        };
        self.done("hipStreamCreateWithFlags", Some(device), code)?;
        Ok(Handle(stream as usize))
    }

    unsafe fn wait(&self, device: u32, stream: Handle) -> Result<(), GpuError> {
        // SAFETY: the stream is live, by this function's contract; so in the four functions below.
        let code = unsafe { (self.0.hip.hipStreamSynchronize)(stream.0 as *mut c_void) };
        self.done("hipStreamSynchronize", Some(device), code)
    }

    unsafe fn end_stream(&self, device: u32, stream: Handle) -> Result<(), GpuError> {
        // SAFETY: see `wait`.
        let code = unsafe { (self.0.hip.hipStreamDestroy)(stream.0 as *mut c_void) };
        self.done("hipStreamDestroy", Some(device), code)
    }

    fn new_event(&self, device: u32) -> Result<Handle, GpuError> {
        let mut event = ptr::null_mut();
        // SAFETY: the out pointer is valid.
        let code =
            unsafe { (self.0.hip.hipEventCreateWithFlags)(&mut event, sys::hipEventDisableTiming) };
        self.done("hipEventCreateWithFlags", Some(device), code)?;
        Ok(Handle(event as usize))
    }

    unsafe fn record(&self, device: u32, event: Handle, stream: Handle) -> Result<(), GpuError> {
        // SAFETY: both are live, by this function's contract.
        let code =
            unsafe { (self.0.hip.hipEventRecord)(event.0 as *mut c_void, stream.0 as *mut c_void) };
        self.done("hipEventRecord", Some(device), code)
    }

    unsafe fn reached(&self, device: u32, event: Handle) -> Result<bool, GpuError> {
        // SAFETY: the event is live, by this function's contract.
        match unsafe { (self.0.hip.hipEventQuery)(event.0 as *mut c_void) } {
            // Not an error, and not to be named and cleared as one: this is asked often.
            sys::hipErrorNotReady => Ok(false),
            code => self
                .done("hipEventQuery", Some(device), code)
                .map(|()| true),
        }
    }

    unsafe fn end_event(&self, device: u32, event: Handle) -> Result<(), GpuError> {
        // SAFETY: the event is live, by this function's contract.
        let code = unsafe { (self.0.hip.hipEventDestroy)(event.0 as *mut c_void) };
        self.done("hipEventDestroy", Some(device), code)
    }

    unsafe fn pin(&self, device: u32, address: u64, length: u64) -> Result<(), GpuError> {
        let (pointer, size) = (address as *mut c_void, length as usize);
        // SAFETY: the range stays mapped, by this function's contract.
        let code =
            unsafe { (self.0.hip.hipHostRegister)(pointer, size, sys::hipHostRegisterPortable) };
        self.done("hipHostRegister", Some(device), code)
    }

    unsafe fn unpin(&self, device: u32, address: u64) -> Result<(), GpuError> {
        // SAFETY: no copy uses the range, by this function's contract.
        let code = unsafe { (self.0.hip.hipHostUnregister)(address as *mut c_void) };
        self.done("hipHostUnregister", Some(device), code)
    }
}

fn ends(direction: Direction, at: u64, host: u64) -> (*mut c_void, *const c_void, c_int) {
    match direction {
        Direction::ToHost => (
            host as *mut c_void,
            at as *const c_void,
            sys::hipMemcpyDeviceToHost,
        ),
        Direction::ToDevice => (
            at as *mut c_void,
            host as *const c_void,
            sys::hipMemcpyHostToDevice,
        ),
    }
}
