//! The fabrics: one pair of traits, several ways of moving bytes into a peer's memory.
//!
//! A [`Device`] is one opened rail (a NIC port, or its stand-in): it reports capabilities and registers memory, and
//! any thread may call it. A [`Context`] is that rail's data path: completion queue, lanes (reliable-connected queue
//! pairs) and their work queues. Exactly one thread owns a context, so the hot path takes no lock.
//!
//! The semantics are those of RDMA reliable connections (InfiniBand Architecture Specification, vol. 1, ch. 9 and 10),
//! whatever the implementation:
//!
//! * writes posted to one lane are placed in order, and the receive completion of a write with immediate is delivered
//!   only after every earlier write of that lane has been placed; nothing orders two lanes;
//! * a send completion means the peer's memory holds the bytes;
//! * a write with immediate consumes one posted receive at the peer;
//! * a lane that fails flushes all of its posted requests with [`Status::Flushed`] and stays failed until destroyed;
//! * after [`Context::fence_lane`] returns, no write of the peer through that lane can change local memory.
//!
//! The caller reserves send, receive and completion-queue slots before it uses them; a fabric reports overflow as an
//! error and never queues beyond its depths.

mod caps;
mod error;
mod mapping;
mod registry;
mod request;
pub mod shm;
pub mod sim;
mod software;

pub mod tcp;
pub mod verbs;
mod window;

pub use crate::wire::{FabricKind, LaneAddress, RemoteKey};
pub use caps::{Capabilities, DeviceInfo, LinkState};
pub use error::{FabricError, FabricErrorKind, PostError};
pub use request::{
    Access, Completion, CompletionKind, DmabufRange, FileRange, LaneConfig, LaneId, LocalKey,
    MemoryKeys, MrId, Opcode, RailEvent, Sge, Status, WorkRequest,
};
pub use window::{Window, WindowBind, WindowCaps, WindowId};

use std::{net::IpAddr, os::fd::RawFd, sync::Arc};

/// One opened rail: capabilities and memory registration. Any thread may call.
pub trait Device: Send + Sync {
    /// What this rail is and what it can do, as asked from the device.
    fn info(&self) -> &DeviceInfo;

    /// Registers `[address, address + length)` for local use and for what `access` allows the peers.
    ///
    /// # Safety
    ///
    /// The range must be mapped memory of this process, not merely addresses: a software fabric reads and writes it
    /// itself, and need not notice at registration what is not mapped. It must stay mapped, readable and (if `access`
    /// or local use writes it) writable until [`Context::deregister`] of the returned key has succeeded on every
    /// context of this device or the device and all of its contexts are dropped. Remote peers may change it at any
    /// time while it is registered, so nobody may hold a Rust reference to bytes that a peer may write.
    unsafe fn register(
        &self,
        address: u64,
        length: u64,
        access: Access,
    ) -> Result<MemoryKeys, FabricError>;

    /// Whether a peer at this address could be reached at all. `false` saves an offer that would be refused; `true`
    /// promises nothing.
    fn may_reach(&self, host: IpAddr) -> bool {
        let _ = host;
        true
    }

    /// Registers memory that is a mapping of a file: [`Device::register`], with the file for a fabric whose peers can
    /// map it themselves. The file may be closed afterwards.
    ///
    /// # Safety
    ///
    /// As for [`Device::register`]; and the range must map these bytes of the file, shared, as long.
    unsafe fn register_file(
        &self,
        range: &FileRange<'_>,
        access: Access,
    ) -> Result<MemoryKeys, FabricError> {
        // SAFETY: the caller's promise.
        unsafe { self.register(range.address, range.length, access) }
    }

    /// Registers a range of a dmabuf. Requests and peers name its first byte by `range.address`.
    ///
    /// The file may be closed afterwards: the registration holds what it needs.
    ///
    /// # Safety
    ///
    /// As for [`Device::register`], for the bytes behind the range: whoever owns them must let the device (or, on a
    /// software fabric, this process through a mapping of the file) read and write them until the registration ends.
    unsafe fn register_dmabuf(
        &self,
        range: &DmabufRange<'_>,
        access: Access,
    ) -> Result<MemoryKeys, FabricError> {
        let _ = (range, access);
        let info = self.info();
        Err(FabricError {
            device: info.name.clone(),
            port: info.port,
            operation: "register a dmabuf",
            kind: FabricErrorKind::Unavailable("not implemented by this fabric".to_owned()),
            hint: None,
        })
    }

    /// Opens the data path. A device serves one context.
    fn open_context(
        self: Arc<Self>,
        completion_depth: u32,
    ) -> Result<Box<dyn Context>, FabricError>;
}

impl std::fmt::Debug for dyn Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Device").field(self.info()).finish()
    }
}

/// The data path of one rail. One thread owns it; nothing here blocks.
pub trait Context: Send {
    /// Ends a registration. No lane may have requests in flight that use it; afterwards no peer can reach it. Refused
    /// with `EBUSY` while there are windows into it.
    fn deregister(&mut self, mr: MrId) -> Result<(), FabricError>;

    /// Creates a lane in the unconnected state, with `config.receive_depth` receives posted, and says how a peer
    /// reaches it.
    fn create_lane(&mut self, config: &LaneConfig) -> Result<(LaneId, LaneAddress), FabricError>;

    /// Connects `lane` to the peer's lane `remote`, found at `host` where the fabric needs a network address. The
    /// dialling side has `dial` set; on both sides the lane accepts posts once this has returned.
    fn connect_lane(
        &mut self,
        lane: LaneId,
        remote: &LaneAddress,
        host: IpAddr,
        dial: bool,
    ) -> Result<(), FabricError>;

    /// Posts `requests` in order; each names its gather list as a range of `sges`. On error, `posted` requests have
    /// been accepted and the rest have not.
    ///
    /// # Safety
    ///
    /// Gather elements are addresses. The fabric reads and writes them, or has a device do so, during this call and
    /// after it:
    ///
    /// * every element of an [inline](WorkRequest::inline) request must be readable, and nobody may be writing it,
    ///   until this call returns. Nothing checks that, because its keys are ignored;
    /// * every element of another request must lie in a live registration of this device that its key names, one with
    ///   [`Access::local_write`] if the request is a read. Until the request has ended, the element must stay mapped
    ///   and registered, the source bytes of a write unchanged, and the destination bytes of a read under no Rust
    ///   reference. An element without bytes names nothing.
    ///
    /// A request has ended when a completion of it, or of a later request of its lane, has been polled (flushed ones
    /// included), when [`Context::fence_lane`] or [`Context::destroy_lane`] has succeeded for its lane, or when the
    /// context has been dropped; one that was not accepted, when this call returns.
    ///
    /// As on a device, some mistakes with registered memory are errors and no more. An element that no live
    /// registration of its key covers is not accessed; the request completes with [`Status::LocalProtection`] or its
    /// like. So does one whose registration ends too early, provided that the memory stays mapped until the request
    /// has ended. Source bytes that are changed (through raw pointers) arrive as any mix of old and new.
    unsafe fn post(
        &mut self,
        lane: LaneId,
        requests: &[WorkRequest],
        sges: &[Sge],
    ) -> Result<(), PostError>;

    /// Makes a window into a registration for the peer of `lane`, which must be connected; see
    /// [`Capabilities::windows`] for whether there are any and what they promise.
    ///
    /// It takes a slot of the lane's send queue and completes as [`CompletionKind::Sent`] with [`WindowBind::id`], not
    /// necessarily in order with the lane's other requests. With success, the key is good from then on; before, a
    /// device may refuse it. Otherwise the lane has failed.
    ///
    /// The window lasts until its invalidation has completed with success or its lane is destroyed. When the lane has
    /// failed or is fenced no access through the window can begin.
    ///
    /// # Errors
    ///
    /// [`FabricErrorKind::Limit`] if there are as many windows as the device has, [`FabricErrorKind::Memory`] for a
    /// range or a right that the registration has not, or one that was made without windows in mind (a dmabuf: the
    /// kernel has no flag for it), [`FabricErrorKind::QueueFull`], [`FabricErrorKind::LaneState`].
    fn bind_window(&mut self, lane: LaneId, bind: &WindowBind) -> Result<Window, FabricError>;

    /// Takes a window back. It takes a slot of the lane's send queue and completes with `id`, as a binding does; windows
    /// are bound and taken back in the order of the calls. Once the completion has been polled with success no access
    /// through the window can begin, or (with [`WindowCaps::final_when_done`]) place another byte; the peer's next
    /// attempt is refused, which fails the lane on both sides. If the peer is writing at that moment, the lane may fail
    /// for that before the completion is reported, which is then [`Status::Flushed`]: fence the lane.
    ///
    /// A window may be taken back once, and before its binding has completed, too.
    ///
    /// # Errors
    ///
    /// [`FabricErrorKind::Memory`] if the lane has no such window, [`FabricErrorKind::QueueFull`],
    /// [`FabricErrorKind::LaneState`].
    fn invalidate_window(
        &mut self,
        lane: LaneId,
        id: u64,
        window: WindowId,
    ) -> Result<(), FabricError>;

    /// Replenishes `count` consumed receives of `lane`.
    fn post_receives(&mut self, lane: LaneId, count: u32) -> Result<(), FabricError>;

    /// Makes progress and appends at most a bounded number of completions to `out`.
    fn poll(&mut self, out: &mut Vec<Completion>) -> Result<(), FabricError>;

    /// Appends what the rail has reported of itself since the last call. Events are gathered by [`Context::poll`] and
    /// [`Context::arm`]; this only hands them out. A fabric without ports reports none.
    fn events(&mut self, out: &mut Vec<RailEvent>) {
        let _ = out;
    }

    /// Prepares to sleep on [`Context::wait_fd`]. Returns `false` if completions may already be waiting, in which
    /// case the caller polls again instead.
    fn arm(&mut self) -> Result<bool, FabricError>;

    /// The descriptor that becomes readable when an armed context has something to [`poll`](Context::poll).
    fn wait_fd(&self) -> RawFd;

    /// Moves `lane` to the error state. On return no later or earlier write of the peer through it can land.
    /// Outstanding local requests complete as [`Status::Flushed`].
    fn fence_lane(&mut self, lane: LaneId) -> Result<(), FabricError>;

    /// Fences and frees `lane`. Its outstanding completions are discarded.
    fn destroy_lane(&mut self, lane: LaneId) -> Result<(), FabricError>;
}
