//! NVIDIA: the CUDA driver. Works in the primary context of each device, which is the one that engines use.

use std::{
    collections::BTreeMap,
    ffi::{c_int, c_void},
    ptr,
    sync::{Arc, OnceLock},
};

use parking_lot::Mutex;

use super::{
    GpuError, Libraries, Runtime,
    driver::{Driver, Handle, host_page, name_in, owned, parse_location, text_of},
    offsets, probe,
    sys::{
        cuda::{self as sys, CUDA_SUCCESS},
        library,
    },
};
use crate::memory::{Direction, Dmabuf, PciAddress, Span, Visibility};

/// NVIDIA's driver, opened. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Cuda(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    cuda: sys::Cuda,
    /// Primary contexts that have been retained, by device: the device's handle and the context's address.
    contexts: Mutex<BTreeMap<u32, (sys::CUdevice, usize)>>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        for (device, &(handle, _)) in self.contexts.lock().iter() {
            // SAFETY: retained once, given back once; whatever used it held the value that is being dropped.
            let code = unsafe { (self.cuda.cuDevicePrimaryCtxRelease_v2)(handle) };
            if code != CUDA_SUCCESS {
                tracing::warn!(device, code, "cuDevicePrimaryCtxRelease failed");
            }
        }
    }
}

impl Cuda {
    /// The process's own, opened when first asked for, from the library that the environment names.
    ///
    /// # Errors
    ///
    /// No library, one that lacks a function, or a driver that does not start. The answer stays the same for the life
    /// of the process.
    pub fn shared() -> Result<Self, GpuError> {
        static SHARED: OnceLock<Result<Cuda, GpuError>> = OnceLock::new();
        SHARED
            .get_or_init(|| Self::open(&Libraries::from_env()))
            .clone()
    }

    /// Opens the library and starts the driver.
    ///
    /// # Errors
    ///
    /// As [`Cuda::shared`].
    pub fn open(libraries: &Libraries) -> Result<Self, GpuError> {
        let cuda = sys::Cuda::open(libraries.cuda.as_deref())?;
        let opened = Self(Arc::new(Inner {
            cuda,
            contexts: Mutex::default(),
        }));
        // SAFETY: takes a number, which must be zero.
        let code = unsafe { (opened.0.cuda.cuInit)(0) };
        // No device is an answer, and `device_count` gives it.
        if code != sys::CUDA_ERROR_NO_DEVICE {
            opened.done("cuInit", None, code)?;
        }
        Ok(opened)
    }

    /// The newest CUDA that the driver serves: major, minor.
    ///
    /// # Errors
    ///
    /// The driver refuses.
    pub fn version(&self) -> Result<(u32, u32), GpuError> {
        let mut version = 0;
        // SAFETY: the out pointer is valid.
        let code = unsafe { (self.0.cuda.cuDriverGetVersion)(&mut version) };
        self.done("cuDriverGetVersion", None, code)?;
        let version = version.max(0) as u32;
        Ok((version / 1000, version / 10 % 100))
    }

    /// The file of the library, if it can be told.
    pub fn file(&self) -> Option<std::path::PathBuf> {
        self.0.cuda.address("cuInit").and_then(library::file_of)
    }

    /// Functions that kvpush would use and the library lacks.
    pub fn missing(&self) -> Vec<&'static str> {
        probe::missing(sys::Cuda::SYMBOLS, |name| {
            self.0.cuda.address(name).is_some()
        })
    }

    /// The device's name, and the bytes it has.
    ///
    /// # Errors
    ///
    /// The driver refuses.
    pub fn describe(&self, device: u32) -> Result<(String, u64), GpuError> {
        let cuda = &self.0.cuda;
        let handle = self.handle(device)?;
        let (mut name, mut bytes) = ([0u8; 256], 0usize);
        // SAFETY: the buffer and its length belong together; both out pointers are valid.
        let (named, sized) = unsafe {
            (
                (cuda.cuDeviceGetName)(name.as_mut_ptr().cast(), 256, handle),
                (cuda.cuDeviceTotalMem_v2)(&mut bytes, handle),
            )
        };
        self.done("cuDeviceGetName", Some(device), named)?;
        self.done("cuDeviceTotalMem", Some(device), sized)?;
        Ok((name_in(&name), bytes as u64))
    }

    /// Whether the device exports dmabufs, as the driver says.
    ///
    /// # Errors
    ///
    /// The driver refuses.
    pub fn exports_dmabufs(&self, device: u32) -> Result<bool, GpuError> {
        let attribute = sys::CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED;
        Ok(self.attribute(device, attribute)? != 0)
    }

    fn handle(&self, device: u32) -> Result<sys::CUdevice, GpuError> {
        let mut handle = -1;
        // SAFETY: the out pointer is valid.
        let code = unsafe { (self.0.cuda.cuDeviceGet)(&mut handle, device as c_int) };
        self.done("cuDeviceGet", Some(device), code)?;
        Ok(handle)
    }

    fn attribute(&self, device: u32, attribute: c_int) -> Result<c_int, GpuError> {
        let handle = self.handle(device)?;
        let mut value = 0;
        // SAFETY: the out pointer is valid.
        let code = unsafe { (self.0.cuda.cuDeviceGetAttribute)(&mut value, attribute, handle) };
        self.done("cuDeviceGetAttribute", Some(device), code)?;
        Ok(value)
    }

    fn done(&self, call: &'static str, device: Option<u32>, code: c_int) -> Result<(), GpuError> {
        if code == CUDA_SUCCESS {
            return Ok(());
        }
        let mut text = ptr::null();
        // SAFETY: the out pointer is valid; the text is static, and null for an unknown code.
        let name = unsafe {
            (self.0.cuda.cuGetErrorName)(code, &mut text);
            text_of(text)
        };
        let hint = match code {
            sys::CUDA_ERROR_NO_DEVICE => Some("is /dev/nvidia0 there, and may this user open it?"),
            sys::CUDA_ERROR_OUT_OF_MEMORY => Some("the device has too little memory left"),
            _ => None,
        };
        Err(GpuError::Call {
            runtime: Runtime::Cuda,
            call,
            code,
            name,
            device,
            hint,
        })
    }

    /// The device's primary context, retained when first asked for.
    fn context(&self, device: u32) -> Result<sys::CUcontext, GpuError> {
        let mut contexts = self.0.contexts.lock();
        if let Some(&(_, context)) = contexts.get(&device) {
            return Ok(context as sys::CUcontext);
        }
        let handle = self.handle(device)?;
        let mut context = ptr::null_mut();
        // SAFETY: the out pointer is valid. Given back when the value is dropped.
        let code = unsafe { (self.0.cuda.cuDevicePrimaryCtxRetain)(&mut context, handle) };
        self.done("cuDevicePrimaryCtxRetain", Some(device), code)?;
        contexts.insert(device, (handle, context as usize));
        Ok(context)
    }

    fn pointer_attribute<T>(
        &self,
        device: u32,
        attribute: c_int,
        address: u64,
        value: &mut T,
    ) -> Result<(), GpuError> {
        let data = ptr::from_mut(value).cast();
        // SAFETY: the address is only looked up; `check`, the only caller, gives each attribute its own type.
        let code = unsafe { (self.0.cuda.cuPointerGetAttribute)(data, attribute, address) };
        self.done("cuPointerGetAttribute", Some(device), code)
    }
}

/// Takes the context off the thread's stack when dropped.
#[derive(Debug)]
pub struct CurrentContext {
    cuda: Cuda,
    device: u32,
}

impl Drop for CurrentContext {
    fn drop(&mut self) {
        let mut popped = ptr::null_mut();
        // SAFETY: the out pointer is valid; the context on top is the one that was pushed, because everything between
        // leaves the stack as it was.
        let code = unsafe { (self.cuda.0.cuda.cuCtxPopCurrent_v2)(&mut popped) };
        if let Err(error) = self.cuda.done("cuCtxPopCurrent", Some(self.device), code) {
            tracing::error!(%error, "the thread's CUDA context could not be restored");
        }
    }
}

impl Driver for Cuda {
    const RUNTIME: Runtime = Runtime::Cuda;
    type Current = CurrentContext;

    fn current(&self, device: u32) -> Result<CurrentContext, GpuError> {
        let context = self.context(device)?;
        // SAFETY: a context that is retained for as long as `self`.
        let code = unsafe { (self.0.cuda.cuCtxPushCurrent_v2)(context) };
        self.done("cuCtxPushCurrent", Some(device), code)?;
        Ok(CurrentContext {
            cuda: self.clone(),
            device,
        })
    }

    fn device_count(&self) -> Result<u32, GpuError> {
        let mut count = 0;
        // SAFETY: the out pointer is valid.
        let code = unsafe { (self.0.cuda.cuDeviceGetCount)(&mut count) };
        self.done("cuDeviceGetCount", None, code)?;
        Ok(count.max(0) as u32)
    }

    fn location(&self, device: u32) -> Result<PciAddress, GpuError> {
        let handle = self.handle(device)?;
        let mut name = [0u8; 32];
        // SAFETY: the buffer and its length belong together.
        let code =
            unsafe { (self.0.cuda.cuDeviceGetPCIBusId)(name.as_mut_ptr().cast(), 32, handle) };
        let call = "cuDeviceGetPCIBusId";
        self.done(call, Some(device), code)?;
        parse_location(Runtime::Cuda, call, device, &name_in(&name))
    }

    fn visibility(&self, device: u32) -> Visibility {
        // A driver that does not know an attribute promises nothing.
        let attribute = |attribute| self.attribute(device, attribute).unwrap_or(0);
        let ordering = attribute(sys::CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WRITES_ORDERING);
        let options = attribute(sys::CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_FLUSH_WRITES_OPTIONS);
        let can_flush = options & sys::CU_FLUSH_GPU_DIRECT_RDMA_WRITES_OPTION_HOST != 0;
        if ordering >= sys::CU_GPU_DIRECT_RDMA_WRITES_ORDERING_OWNER {
            Visibility::Ordered
        } else if can_flush && self.0.cuda.cuFlushGPUDirectRDMAWrites.is_some() {
            Visibility::RuntimeFlush
        } else {
            Visibility::ReadBack
        }
    }

    fn check(&self, device: u32, address: u64) -> Result<(), GpuError> {
        let runtime = Runtime::Cuda;
        let not = |found| GpuError::NotDeviceMemory {
            runtime,
            address,
            found,
        };
        // "A boolean", says the documentation, and not of which width; of any, one of the bytes is set.
        let (mut kind, mut owner, mut managed) = (0u32, -1i32, 0u32);
        let kind_of = sys::CU_POINTER_ATTRIBUTE_MEMORY_TYPE;
        match self.pointer_attribute(device, kind_of, address, &mut kind) {
            Err(GpuError::Call {
                code: sys::CUDA_ERROR_INVALID_VALUE,
                ..
            }) => return Err(not("an address unknown to it")),
            other => other?,
        }
        let is_managed = sys::CU_POINTER_ATTRIBUTE_IS_MANAGED;
        self.pointer_attribute(device, is_managed, address, &mut managed)?;
        if managed != 0 {
            return Err(GpuError::Managed { runtime, address });
        }
        if kind != sys::CU_MEMORYTYPE_DEVICE {
            return Err(not("host memory, or memory of another kind"));
        }
        let ordinal = sys::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL;
        self.pointer_attribute(device, ordinal, address, &mut owner)?;
        if owner != device as c_int {
            return Err(GpuError::OtherDevice {
                runtime,
                address,
                device,
                owner,
            });
        }
        Ok(())
    }

    fn allocation(&self, device: u32, address: u64) -> Result<Span, GpuError> {
        let (mut base, mut size) = (0, 0);
        // SAFETY: the address is only looked up; both out pointers are valid.
        let code = unsafe { (self.0.cuda.cuMemGetAddressRange_v2)(&mut base, &mut size, address) };
        self.done("cuMemGetAddressRange", Some(device), code)?;
        Ok(Span {
            address: base,
            length: size as u64,
        })
    }

    fn export(&self, device: u32, span: Span) -> Result<Dmabuf, GpuError> {
        let cannot = |reason: String| GpuError::NoExport {
            address: span.address,
            length: span.length,
            reasons: vec![reason],
        };
        let Some(export) = self.0.cuda.cuMemGetHandleForAddressRange else {
            return Err(cannot(
                "the driver has no cuMemGetHandleForAddressRange: it needs CUDA 11.7".to_owned(),
            ));
        };
        if !self.exports_dmabufs(device)? {
            return Err(cannot(
                "the driver exports no dmabufs of this device: it needs NVIDIA's open kernel modules".to_owned(),
            ));
        }
        // The driver takes whole host pages only. Small allocations share a page with others of this process: the file
        // holds those too, but only the asked range gets registered.
        let whole = offsets::round_out(span, host_page())
            .ok_or_else(|| cannot("the range cannot be rounded to pages".to_owned()))?;
        let mut fd: c_int = -1;
        // SAFETY: for this type of handle the out pointer is to an `int`.
        let code = unsafe {
            export(
                ptr::from_mut(&mut fd).cast(),
                whole.address,
                whole.length as usize,
                sys::CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD,
                0,
            )
        };
        self.done("cuMemGetHandleForAddressRange", Some(device), code)
            .map_err(|error| cannot(error.to_string()))?;
        // SAFETY: the driver has just made the descriptor for us.
        let fd = unsafe { owned(fd) }.ok_or_else(|| {
            cannot("cuMemGetHandleForAddressRange succeeded without a descriptor".to_owned())
        })?;
        Ok(Dmabuf {
            fd,
            offset: span.address - whole.address,
        })
    }

    fn allocate(&self, device: u32, length: u64) -> Result<u64, GpuError> {
        let mut pointer = 0;
        // SAFETY: the out pointer is valid.
        let code = unsafe { (self.0.cuda.cuMemAlloc_v2)(&mut pointer, length as usize) };
        self.done("cuMemAlloc", Some(device), code)?;
        Ok(pointer)
    }

    unsafe fn free(&self, device: u32, address: u64) -> Result<(), GpuError> {
        // SAFETY: an allocation that nothing uses any more, by this function's contract.
        let code = unsafe { (self.0.cuda.cuMemFree_v2)(address) };
        self.done("cuMemFree", Some(device), code)
    }

    unsafe fn flush(&self, device: u32, how: Visibility, last: u64) -> Result<(), GpuError> {
        if how == Visibility::Ordered {
            return Ok(());
        }
        if how == Visibility::RuntimeFlush
            && let Some(flush) = self.0.cuda.cuFlushGPUDirectRDMAWrites
        {
            // SAFETY: takes two numbers and works on the current context.
            let code = unsafe {
                flush(
                    sys::CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TARGET_CURRENT_CTX,
                    sys::CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TO_OWNER,
                )
            };
            return self.done("cuFlushGPUDirectRDMAWrites", Some(device), code);
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
        let (cuda, size) = (&self.0.cuda, length as usize);
        // SAFETY: both ranges are mapped, by this function's contract.
        let (call, code) = unsafe {
            match direction {
                Direction::ToHost => (
                    "cuMemcpyDtoH",
                    (cuda.cuMemcpyDtoH_v2)(host as *mut c_void, at, size),
                ),
                Direction::ToDevice => (
                    "cuMemcpyHtoD",
                    (cuda.cuMemcpyHtoD_v2)(at, host as *const c_void, size),
                ),
            }
        };
        self.done(call, Some(device), code)
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
        let (cuda, size) = (&self.0.cuda, length as usize);
        let stream = stream.0 as sys::CUstream;
        // SAFETY: both ranges stay mapped and the stream is live, by this function's contract.
        let (call, code) = unsafe {
            match direction {
                Direction::ToHost => (
                    "cuMemcpyDtoHAsync",
                    (cuda.cuMemcpyDtoHAsync_v2)(host as *mut c_void, at, size, stream),
                ),
                Direction::ToDevice => (
                    "cuMemcpyHtoDAsync",
                    (cuda.cuMemcpyHtoDAsync_v2)(at, host as *const c_void, size, stream),
                ),
            }
        };
        self.done(call, Some(device), code)
    }

    fn new_stream(&self, device: u32) -> Result<Handle, GpuError> {
        let mut stream = ptr::null_mut();
        // SAFETY: the out pointer is valid.
        let code =
            unsafe { (self.0.cuda.cuStreamCreate)(&mut stream, sys::CU_STREAM_NON_BLOCKING) };
        self.done("cuStreamCreate", Some(device), code)?;
        Ok(Handle(stream as usize))
    }

    unsafe fn wait(&self, device: u32, stream: Handle) -> Result<(), GpuError> {
        // SAFETY: the stream is live, by this function's contract.
        let code = unsafe { (self.0.cuda.cuStreamSynchronize)(stream.0 as sys::CUstream) };
        self.done("cuStreamSynchronize", Some(device), code)
    }

    unsafe fn end_stream(&self, device: u32, stream: Handle) -> Result<(), GpuError> {
        // SAFETY: the stream is live, by this function's contract.
        let code = unsafe { (self.0.cuda.cuStreamDestroy_v2)(stream.0 as sys::CUstream) };
        self.done("cuStreamDestroy", Some(device), code)
    }

    fn new_event(&self, device: u32) -> Result<Handle, GpuError> {
        let mut event = ptr::null_mut();
        // SAFETY: the out pointer is valid.
        let code = unsafe { (self.0.cuda.cuEventCreate)(&mut event, sys::CU_EVENT_DISABLE_TIMING) };
        self.done("cuEventCreate", Some(device), code)?;
        Ok(Handle(event as usize))
    }

    unsafe fn record(&self, device: u32, event: Handle, stream: Handle) -> Result<(), GpuError> {
        let (event, stream) = (event.0 as sys::CUevent, stream.0 as sys::CUstream);
        // SAFETY: both are live, by this function's contract.
        let code = unsafe { (self.0.cuda.cuEventRecord)(event, stream) };
        self.done("cuEventRecord", Some(device), code)
    }

    unsafe fn reached(&self, device: u32, event: Handle) -> Result<bool, GpuError> {
        // SAFETY: the event is live, by this function's contract.
        match unsafe { (self.0.cuda.cuEventQuery)(event.0 as sys::CUevent) } {
            sys::CUDA_ERROR_NOT_READY => Ok(false),
            code => self.done("cuEventQuery", Some(device), code).map(|()| true),
        }
    }

    unsafe fn end_event(&self, device: u32, event: Handle) -> Result<(), GpuError> {
        // SAFETY: the event is live, by this function's contract.
        let code = unsafe { (self.0.cuda.cuEventDestroy_v2)(event.0 as sys::CUevent) };
        self.done("cuEventDestroy", Some(device), code)
    }

    unsafe fn pin(&self, device: u32, address: u64, length: u64) -> Result<(), GpuError> {
        let (pointer, size) = (address as *mut c_void, length as usize);
        // SAFETY: the range stays mapped, by this function's contract.
        let code = unsafe {
            (self.0.cuda.cuMemHostRegister_v2)(pointer, size, sys::CU_MEMHOSTREGISTER_PORTABLE)
        };
        self.done("cuMemHostRegister", Some(device), code)
    }

    unsafe fn unpin(&self, device: u32, address: u64) -> Result<(), GpuError> {
        // SAFETY: no copy uses the range, by this function's contract.
        let code = unsafe { (self.0.cuda.cuMemHostUnregister)(address as *mut c_void) };
        self.done("cuMemHostUnregister", Some(device), code)
    }
}
