//! The descriptors of a context: completion channel and asynchronous events, behind one epoll descriptor.
//!
//! Both are non-blocking. The engine sleeps on the epoll descriptor and never reads it; draining goes through the
//! library, which pairs every event with an acknowledgement. Owned by the thread of its context.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use crate::fabric::FabricError;

use super::{
    device::VerbsDevice,
    error::{Place, last_errno},
    sys,
};

/// Completion events acknowledged with one call, which takes a lock in the library.
const ACKNOWLEDGE: u32 = 64;

/// A completion queue with its channel. Destroyed by [`Completions::destroy`], after the queue pairs.
pub(super) struct Completions {
    channel: *mut sys::ibv_comp_channel,
    cq: *mut sys::ibv_cq,
    epoll: OwnedFd,
    unacknowledged: u32,
}

// SAFETY: libibverbs allows any thread to use its objects; these are used by the one that owns the value.
unsafe impl Send for Completions {}

impl Completions {
    /// A queue of at least `depth` entries. The device's own event descriptor joins the epoll set.
    pub(super) fn new(device: &VerbsDevice, depth: u32) -> Result<Self, FabricError> {
        let (lib, place, context) = (device.lib(), device.place(), device.opened().raw());
        let most = device.limits().max_cqe;
        place.limit(
            "ibv_create_cq",
            "completion queue depth",
            u64::from(depth),
            u64::from(most),
        )?;
        let depth = i32::try_from(depth.max(1)).unwrap_or(i32::MAX);
        let epoll = epoll(place)?;
        // SAFETY: the device is open.
        let channel = unsafe { lib.create_comp_channel(context) }
            .map_err(|errno| place.os("ibv_create_comp_channel", errno.code()))?;
        // SAFETY: device and channel are live.
        let cq = match unsafe { lib.create_cq(context, depth, std::ptr::null_mut(), channel, 0) } {
            Ok(cq) => cq,
            Err(errno) => {
                // SAFETY: no queue uses the channel.
                let _ = unsafe { lib.destroy_comp_channel(channel) };
                return Err(place.os("ibv_create_cq", errno.code()));
            }
        };
        let completions = Self {
            channel,
            cq,
            epoll,
            unacknowledged: 0,
        };
        // SAFETY: channel and context are live; their descriptors do not change.
        let fds = unsafe { [(*channel).fd, (*context).async_fd] };
        for fd in fds {
            if let Err(error) = completions.watch(fd, place) {
                completions.destroy(device);
                return Err(error);
            }
        }
        Ok(completions)
    }

    pub(super) fn cq(&self) -> *mut sys::ibv_cq {
        self.cq
    }

    pub(super) fn wait_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    /// Asks for an event at the next completion.
    pub(super) fn arm(&mut self, device: &VerbsDevice) -> Result<(), FabricError> {
        self.drain(device)?;
        // SAFETY: the queue is live.
        unsafe { sys::ibv_req_notify_cq(self.cq, false) }
            .map_err(|errno| device.place().os("ibv_req_notify_cq", errno.code()))
    }

    /// Takes all events off the channel and says whether there were any.
    pub(super) fn drain(&mut self, device: &VerbsDevice) -> Result<bool, FabricError> {
        let mut any = false;
        loop {
            // SAFETY: the channel is live, and its only queue is ours.
            match unsafe { device.lib().get_cq_event(self.channel) } {
                Ok(_) => {
                    any = true;
                    self.unacknowledged += 1;
                    if self.unacknowledged >= ACKNOWLEDGE {
                        self.acknowledge(device);
                    }
                }
                Err(errno) => match errno.code() {
                    libc::EAGAIN => return Ok(any),
                    libc::EINTR => {}
                    code => return Err(device.place().os("ibv_get_cq_event", code)),
                },
            }
        }
    }

    fn acknowledge(&mut self, device: &VerbsDevice) {
        if self.unacknowledged > 0 {
            // SAFETY: the queue is live and that many of its events were taken.
            unsafe { device.lib().ack_cq_events(self.cq, self.unacknowledged) };
            self.unacknowledged = 0;
        }
    }

    /// Frees queue and channel. All queue pairs that use them must be gone.
    pub(super) fn destroy(mut self, device: &VerbsDevice) {
        // ibv_destroy_cq waits until all events taken are acknowledged.
        self.acknowledge(device);
        // SAFETY: both are live and used by nobody any more.
        unsafe {
            if let Err(errno) = device.lib().destroy_cq(self.cq) {
                tracing::warn!(%errno, "ibv_destroy_cq");
            }
            if let Err(errno) = device.lib().destroy_comp_channel(self.channel) {
                tracing::warn!(%errno, "ibv_destroy_comp_channel");
            }
        }
    }

    fn watch(&self, fd: RawFd, place: &Place) -> Result<(), FabricError> {
        // SAFETY: plain system calls on descriptors that are open.
        unsafe {
            let flags = libc::fcntl(fd, libc::F_GETFL);
            if flags < 0 || libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK) < 0 {
                return Err(place.os("fcntl", last_errno()));
            }
            let mut event = libc::epoll_event {
                events: libc::EPOLLIN as u32,
                u64: fd as u64,
            };
            if libc::epoll_ctl(
                self.epoll.as_raw_fd(),
                libc::EPOLL_CTL_ADD,
                fd,
                &raw mut event,
            ) < 0
            {
                return Err(place.os("epoll_ctl", last_errno()));
            }
        }
        Ok(())
    }
}

fn epoll(place: &Place) -> Result<OwnedFd, FabricError> {
    // SAFETY: a plain system call.
    let fd = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
    if fd < 0 {
        return Err(place.os("epoll_create1", last_errno()));
    }
    // SAFETY: the descriptor is new and ours.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// An asynchronous event, in terms of what it means for a context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// The queue pair can no longer be used.
    Lane(*mut sys::ibv_qp, &'static str),
    /// State or address of this port may have changed.
    Port(i32),
    /// Nothing works any more.
    Fatal(&'static str),
    /// Of no consequence.
    Other,
}

/// The next asynchronous event of the device, acknowledged; `None` if there is none.
pub(super) fn next_event(device: &VerbsDevice) -> Result<Option<Event>, FabricError> {
    let lib = device.lib();
    // SAFETY: the device is open.
    let event = match unsafe { lib.get_async_event(device.opened().raw()) } {
        Ok(event) => event,
        Err(errno) => {
            return match errno.code() {
                libc::EAGAIN | libc::EINTR => Ok(None),
                code => Err(device.place().os("ibv_get_async_event", code)),
            };
        }
    };
    let word = lib.event_type_str(event.event_type);
    let meaning = match event.event_type {
        sys::IBV_EVENT_QP_FATAL | sys::IBV_EVENT_QP_REQ_ERR | sys::IBV_EVENT_QP_ACCESS_ERR
        // With a shared receive queue this is all one hears of a queue pair that failed.
        | sys::IBV_EVENT_QP_LAST_WQE_REACHED => {
            // SAFETY: the element of queue pair events is the queue pair.
            Event::Lane(unsafe { event.element.qp }, word)
        }
        sys::IBV_EVENT_PORT_ACTIVE
        | sys::IBV_EVENT_PORT_ERR
        | sys::IBV_EVENT_LID_CHANGE
        | sys::IBV_EVENT_PKEY_CHANGE
        | sys::IBV_EVENT_SM_CHANGE
        | sys::IBV_EVENT_CLIENT_REREGISTER
        | sys::IBV_EVENT_GID_CHANGE => {
            // SAFETY: the element of port events is the port's number.
            Event::Port(unsafe { event.element.port_num })
        }
        sys::IBV_EVENT_DEVICE_FATAL | sys::IBV_EVENT_CQ_ERR | sys::IBV_EVENT_SRQ_ERR => {
            Event::Fatal(word)
        }
        _ => Event::Other,
    };
    // Acknowledged at once: destroying the object that it names waits for this.
    // SAFETY: the event was taken just above and is acknowledged once.
    unsafe { lib.ack_async_event(event) };
    tracing::debug!(device = %device.place().device, event = word, "asynchronous event");
    Ok(Some(meaning))
}
