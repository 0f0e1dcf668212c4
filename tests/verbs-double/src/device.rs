//! Devices, ports, protection domains and memory regions.

use std::{
    collections::BTreeMap,
    ffi::{c_char, c_int, c_void},
    mem::zeroed,
    ptr::null_mut,
    sync::{
        Mutex, OnceLock,
        atomic::{AtomicU32, Ordering},
    },
};

use crate::{control, cq, eventfd, lock, qp, sys::*};

/// Addresses of the devices, which are never freed.
fn devices() -> &'static [usize] {
    static DEVICES: OnceLock<Vec<usize>> = OnceLock::new();
    DEVICES.get_or_init(|| {
        let make = |index| {
            // SAFETY: made of integers, arrays of them and `Option`s of functions, which may be zero.
            let mut device: ibv_device = unsafe { zeroed() };
            device.node_type = IBV_NODE_CA;
            device.transport_type = IBV_TRANSPORT_IB;
            let name = format!("null{index}");
            for (to, from) in device.name.iter_mut().zip(name.bytes()) {
                *to = from as c_char;
            }
            Box::into_raw(Box::new(device)) as usize
        };
        (0..control::MOST_DEVICES).map(make).collect()
    })
}

/// A list of all devices and the null that ends it.
type List = [*mut ibv_device; control::MOST_DEVICES as usize + 1];

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ibv_get_device_list(count: *mut c_int) -> *mut *mut ibv_device {
    let wanted = control::devices();
    let mut list: List = [null_mut(); control::MOST_DEVICES as usize + 1];
    for (slot, device) in list.iter_mut().zip(devices()).take(wanted as usize) {
        *slot = *device as *mut ibv_device;
    }
    if !count.is_null() {
        // SAFETY: not null, so the caller's integer.
        unsafe { *count = wanted as c_int };
    }
    Box::into_raw(Box::new(list)).cast()
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ibv_free_device_list(list: *mut *mut ibv_device) {
    // SAFETY: made by `ibv_get_device_list`; the caller does not use it again.
    drop(unsafe { Box::from_raw(list.cast::<List>()) });
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ibv_get_device_name(device: *mut ibv_device) -> *const c_char {
    // SAFETY: devices live for ever.
    unsafe { (&raw const (*device).name).cast() }
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn ibv_get_device_guid(_device: *mut ibv_device) -> u64 {
    0x6e75_6c6cu64.to_be()
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ibv_open_device(device: *mut ibv_device) -> *mut ibv_context {
    let fd = eventfd();
    if fd < 0 {
        return null_mut();
    }
    // SAFETY: made of integers, raw pointers, pthread objects and `Option`s of functions, which may be zero.
    let mut context: ibv_context = unsafe { zeroed() };
    context.device = device;
    context.cmd_fd = -1;
    context.async_fd = fd;
    context.num_comp_vectors = 1;
    context.ops.poll_cq = Some(cq::poll_cq);
    context.ops.req_notify_cq = Some(cq::req_notify_cq);
    context.ops.post_send = Some(qp::post_send);
    context.ops.post_recv = Some(qp::post_recv);
    context.ops.post_srq_recv = Some(qp::post_srq_recv);
    Box::into_raw(Box::new(context))
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ibv_close_device(context: *mut ibv_context) -> c_int {
    // SAFETY: made by `ibv_open_device`; the caller does not use it again.
    let context = unsafe { Box::from_raw(context) };
    // SAFETY: the descriptor is the context's own.
    unsafe { libc::close(context.async_fd) }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ibv_get_async_event(
    context: *mut ibv_context,
    _event: *mut ibv_async_event,
) -> c_int {
    let mut value = 0u64;
    // Nothing is ever reported: this says EAGAIN, or blocks, as a device without news does.
    // SAFETY: the context is live; eight bytes are read into a value of eight bytes.
    unsafe { libc::read((*context).async_fd, (&raw mut value).cast(), 8) };
    -1
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn ibv_ack_async_event(_event: *mut ibv_async_event) {}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ibv_query_device(
    _context: *mut ibv_context,
    attr: *mut ibv_device_attr,
) -> c_int {
    // Limits as a large adapter has them.
    // SAFETY: made of integers, which may be zero.
    let mut device: ibv_device_attr = unsafe { zeroed() };
    device.node_guid = ibv_get_device_guid(null_mut());
    device.max_mr_size = 1 << 46;
    device.max_qp = 1 << 17;
    device.max_qp_wr = 1 << 15;
    device.max_sge = 30;
    device.max_sge_rd = 30;
    device.max_cq = 1 << 16;
    device.max_cqe = 1 << 22;
    device.max_mr = 1 << 20;
    device.max_pd = 1 << 16;
    device.max_qp_rd_atom = 16;
    device.max_qp_init_rd_atom = 16;
    device.max_srq = 1 << 16;
    device.max_srq_wr = 1 << 15;
    device.max_srq_sge = 30;
    device.max_pkeys = 1;
    device.phys_port_cnt = 1;
    // SAFETY: the caller has room for one.
    unsafe { attr.write(device) };
    0
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ibv_query_port(
    _context: *mut ibv_context,
    port: u8,
    attr: *mut _compat_ibv_port_attr,
) -> c_int {
    if port != 1 {
        return libc::EINVAL;
    }
    let attr = attr.cast::<ibv_port_attr>();
    // Field by field, for the last one of the struct is beyond what this function may write.
    // SAFETY: the caller has room for all but that one.
    unsafe {
        (*attr).state = IBV_PORT_ACTIVE;
        (*attr).max_mtu = IBV_MTU_4096;
        (*attr).active_mtu = IBV_MTU_4096;
        (*attr).gid_tbl_len = 1;
        (*attr).max_msg_sz = 1 << 30;
        (*attr).pkey_tbl_len = 1;
        // 4 lanes of 100 Gb/s (NDR).
        (*attr).active_width = 2;
        (*attr).active_speed = 128;
        (*attr).phys_state = 5;
        (*attr).link_layer = IBV_LINK_LAYER_ETHERNET;
    }
    0
}

/// ::ffff:127.0.0.1
const GID: [u8; 16] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 127, 0, 0, 1];

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ibv_query_gid(
    _context: *mut ibv_context,
    port: u8,
    index: c_int,
    gid: *mut ibv_gid,
) -> c_int {
    if (port, index) != (1, 0) {
        return crate::fail(libc::EINVAL);
    }
    // SAFETY: the caller has room for one.
    unsafe { gid.write(GID.into()) };
    0
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn _ibv_query_gid_ex(
    _context: *mut ibv_context,
    port: u32,
    index: u32,
    entry: *mut ibv_gid_entry,
    _flags: u32,
    size: usize,
) -> c_int {
    if port != 1 || size < size_of::<ibv_gid_entry>() {
        return libc::EINVAL;
    }
    if index != 0 {
        return libc::ENODATA;
    }
    // SAFETY: the caller has room for that many bytes.
    unsafe {
        entry.write(ibv_gid_entry {
            gid: GID.into(),
            gid_index: 0,
            port_num: 1,
            gid_type: IBV_GID_TYPE_ROCE_V2,
            ndev_ifindex: 1,
        });
    }
    0
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ibv_query_pkey(
    _context: *mut ibv_context,
    _port: u8,
    _index: c_int,
    pkey: *mut u16,
) -> c_int {
    // SAFETY: the caller has room for one.
    unsafe { *pkey = 0xffff };
    0
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn ibv_alloc_pd(context: *mut ibv_context) -> *mut ibv_pd {
    Box::into_raw(Box::new(ibv_pd { context, handle: 0 }))
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ibv_dealloc_pd(pd: *mut ibv_pd) -> c_int {
    // SAFETY: made by `ibv_alloc_pd`; the caller does not use it again.
    drop(unsafe { Box::from_raw(pd) });
    0
}

#[derive(Clone, Copy)]
struct Region {
    address: u64,
    length: u64,
    access: c_int,
}

/// By key, which is both lkey and rkey.
static REGIONS: Mutex<BTreeMap<u32, Region>> = Mutex::new(BTreeMap::new());

/// Whether the region of `key` holds the range and allows all of `access`.
pub(crate) fn allows(key: u32, address: u64, length: u64, access: c_int) -> bool {
    let regions = lock(&REGIONS);
    regions.get(&key).is_some_and(|region| {
        let begin = address.checked_sub(region.address);
        let end = begin.and_then(|begin| begin.checked_add(length));
        end.is_some_and(|end| end <= region.length) && region.access & access == access
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ibv_reg_mr(
    pd: *mut ibv_pd,
    addr: *mut c_void,
    length: usize,
    access: c_int,
) -> *mut ibv_mr {
    static NEXT: AtomicU32 = AtomicU32::new(0x100);
    let key = NEXT.fetch_add(1, Ordering::Relaxed);
    let region = Region {
        address: addr as u64,
        length: length as u64,
        access,
    };
    lock(&REGIONS).insert(key, region);
    Box::into_raw(Box::new(ibv_mr {
        // SAFETY: the domain is live.
        context: unsafe { (*pd).context },
        pd,
        addr,
        length,
        handle: key,
        lkey: key,
        rkey: key,
    }))
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ibv_dereg_mr(mr: *mut ibv_mr) -> c_int {
    // SAFETY: made by `ibv_reg_mr`; the caller does not use it again.
    let mr = unsafe { Box::from_raw(mr) };
    lock(&REGIONS).remove(&mr.lkey);
    0
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn ibv_fork_init() -> c_int {
    0
}

macro_rules! words {
    ($($name:ident($ty:ty) = $word:literal;)*) => {$(
        #[unsafe(no_mangle)]
        pub(crate) extern "C" fn $name(_value: $ty) -> *const c_char {
            $word.as_ptr()
        }
    )*};
}

words! {
    ibv_wc_status_str(ibv_wc_status) = c"a status of the double";
    ibv_node_type_str(ibv_node_type) = c"a node of the double";
    ibv_port_state_str(ibv_port_state) = c"a port of the double";
    ibv_event_type_str(ibv_event_type) = c"an event of the double";
}
