//! What memory and copiers need of a runtime, so that they are written once.
//!
//! Every function but [`Driver::current`] works on the device that is current, except where it says otherwise; the
//! `device` argument then only names it in errors.

use std::fmt;

use super::{GpuError, Runtime};
use crate::memory::{Direction, Dmabuf, PciAddress, Span, Visibility};

/// A stream or an event, as the runtime names it. Owned by whoever made it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Handle(pub(super) usize);

/// A GPU runtime. Implemented by [`Hip`](super::Hip) and [`Cuda`](super::Cuda); not for others to implement.
pub trait Driver: Clone + Send + Sync + fmt::Debug + 'static {
    /// Which one.
    const RUNTIME: Runtime;
    /// Restores, when dropped, what was current before.
    type Current;

    /// Makes `device` the calling thread's current one until the value is dropped.
    fn current(&self, device: u32) -> Result<Self::Current, GpuError>;
    /// How many devices there are; none is no error.
    fn device_count(&self) -> Result<u32, GpuError>;
    /// The device's place on PCI. Any device may be current.
    fn location(&self, device: u32) -> Result<PciAddress, GpuError>;
    /// What it takes to see a NIC's writes.
    fn visibility(&self, device: u32) -> Visibility;
    /// Checks that `address` is ordinary memory of `device`.
    fn check(&self, device: u32, address: u64) -> Result<(), GpuError>;
    /// The allocation around `address`.
    fn allocation(&self, device: u32, address: u64) -> Result<Span, GpuError>;
    /// Exports `span`, or more of its allocation; the offset is that of `span`.
    fn export(&self, device: u32, span: Span) -> Result<Dmabuf, GpuError>;
    /// Allocates.
    fn allocate(&self, device: u32, length: u64) -> Result<u64, GpuError>;
    /// Frees what [`Driver::allocate`] returned.
    ///
    /// # Safety
    ///
    /// Nothing uses the memory any more.
    unsafe fn free(&self, device: u32, address: u64) -> Result<(), GpuError>;
    /// Does what `how` says; `last` is the last byte of the memory that was written.
    ///
    /// # Safety
    ///
    /// `last` is an address of the device's memory.
    unsafe fn flush(&self, device: u32, how: Visibility, last: u64) -> Result<(), GpuError>;
    /// Copies and waits.
    ///
    /// # Safety
    ///
    /// Both ranges are mapped, and no Rust reference to the destination is live.
    unsafe fn copy_now(
        &self,
        device: u32,
        direction: Direction,
        at: u64,
        host: u64,
        length: u64,
    ) -> Result<(), GpuError>;
    /// Starts a copy on a stream.
    ///
    /// # Safety
    ///
    /// As [`Driver::copy_now`], until the stream has gone past the copy. The stream is live.
    unsafe fn copy(
        &self,
        device: u32,
        direction: Direction,
        at: u64,
        host: u64,
        length: u64,
        stream: Handle,
    ) -> Result<(), GpuError>;
    /// Makes a stream that waits for no other.
    fn new_stream(&self, device: u32) -> Result<Handle, GpuError>;
    /// Waits for all that was started on a stream.
    ///
    /// # Safety
    ///
    /// The stream is live.
    unsafe fn wait(&self, device: u32, stream: Handle) -> Result<(), GpuError>;
    /// Destroys a stream.
    ///
    /// # Safety
    ///
    /// The stream is live, and not used again.
    unsafe fn end_stream(&self, device: u32, stream: Handle) -> Result<(), GpuError>;
    /// Makes an event.
    fn new_event(&self, device: u32) -> Result<Handle, GpuError>;
    /// Puts an event behind all that was started on a stream.
    ///
    /// # Safety
    ///
    /// Both are live.
    unsafe fn record(&self, device: u32, event: Handle, stream: Handle) -> Result<(), GpuError>;
    /// Whether the stream has reached a recorded event.
    ///
    /// # Safety
    ///
    /// The event is live.
    unsafe fn reached(&self, device: u32, event: Handle) -> Result<bool, GpuError>;
    /// Destroys an event.
    ///
    /// # Safety
    ///
    /// The event is live, and not used again.
    unsafe fn end_event(&self, device: u32, event: Handle) -> Result<(), GpuError>;
    /// Pins host memory for faster copies.
    ///
    /// # Safety
    ///
    /// The range stays mapped until it is unpinned.
    unsafe fn pin(&self, device: u32, address: u64, length: u64) -> Result<(), GpuError>;
    /// Undoes [`Driver::pin`].
    ///
    /// # Safety
    ///
    /// No copy uses the range.
    unsafe fn unpin(&self, device: u32, address: u64) -> Result<(), GpuError>;
}

/// The runtime's text of a code. The text is static, as both vendors document.
///
/// # Safety
///
/// `text` is null or a C string that lives for ever.
pub(super) unsafe fn text_of(text: *const std::ffi::c_char) -> String {
    if text.is_null() {
        return "no name".to_owned();
    }
    // SAFETY: not null, so a C string by this function's contract.
    let text = unsafe { std::ffi::CStr::from_ptr(text) };
    text.to_string_lossy().into_owned()
}

/// A name that a runtime has written to `buffer`, whether it ended it or not.
pub(super) fn name_in(buffer: &[u8]) -> String {
    let end = buffer.iter().position(|&byte| byte == 0);
    String::from_utf8_lossy(&buffer[..end.unwrap_or(buffer.len())]).into_owned()
}

/// The PCI address in what a runtime says.
pub(super) fn parse_location(
    runtime: Runtime,
    call: &'static str,
    device: u32,
    text: &str,
) -> Result<PciAddress, GpuError> {
    text.parse().map_err(|_| GpuError::Call {
        runtime,
        call,
        code: 0,
        name: format!("{text:?} is no PCI address"),
        device: Some(device),
        hint: None,
    })
}

/// The host's page size.
pub(super) fn host_page() -> u64 {
    // SAFETY: sysconf(3) takes a number and touches no memory of ours.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u64::try_from(size).unwrap_or(4096)
}

/// Takes a descriptor that a runtime has returned. `None` for what is none.
///
/// # Safety
///
/// `fd` is open and nobody else's, if it is not negative.
pub(super) unsafe fn owned(fd: std::ffi::c_int) -> Option<std::os::fd::OwnedFd> {
    use std::os::fd::FromRawFd;
    // SAFETY: by this function's contract.
    (fd >= 0).then(|| unsafe { std::os::fd::OwnedFd::from_raw_fd(fd) })
}
