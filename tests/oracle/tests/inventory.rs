//! Our device list, the `ibverbs` crate's and `rdma-sys`'s are the same, and so is the failure where the kernel has no
//! RDMA at all. Run in a guest with soft-RoCE devices, this compares real entries.

#![cfg(feature = "inventory")]

use kvpush::oracle::Verbs;

/// Name and node GUID of each device, or the errno.
type Inventory = Result<Vec<(String, u64)>, i32>;

fn ours() -> Inventory {
    let verbs = Verbs::open().expect("the oracle links libibverbs, so it is there");
    let (list, count) = verbs.device_list().map_err(|errno| errno.code())?;
    let mut found: Vec<_> = (0..count)
        .map(|index| {
            // SAFETY: the list has `count` live devices and is freed below.
            unsafe {
                let device = *list.add(index);
                (
                    verbs.device_name(device).to_owned(),
                    verbs.device_guid(device),
                )
            }
        })
        .collect();
    // SAFETY: the list came from `device_list`; nothing in `found` points into it.
    unsafe { verbs.free_device_list(list) };
    found.sort();
    Ok(found)
}

fn theirs() -> Inventory {
    let devices = ibverbs::devices().map_err(|error| error.raw_os_error().unwrap_or(0))?;
    let mut found: Vec<_> = devices
        .iter()
        .map(|device| {
            let name = device
                .name()
                .map(|name| name.to_string_lossy().into_owned())
                .unwrap_or_default();
            // The crate keeps the GUID as the library returns it, big-endian.
            (
                name,
                device
                    .guid()
                    .map_or(0, |guid| u64::from_be(u64::from(guid))),
            )
        })
        .collect();
    found.sort();
    Ok(found)
}

fn linked() -> Inventory {
    let mut count = 0;
    // SAFETY: the function only writes the count.
    let list = unsafe { rdma_sys::ibv_get_device_list(&raw mut count) };
    if list.is_null() {
        return Err(std::io::Error::last_os_error().raw_os_error().unwrap_or(0));
    }
    let mut found: Vec<_> = (0..usize::try_from(count).expect("a count"))
        .map(|index| {
            // SAFETY: the list has `count` live devices, whose names are C strings; it is freed below.
            unsafe {
                let device = *list.add(index);
                let name = std::ffi::CStr::from_ptr(rdma_sys::ibv_get_device_name(device));
                (
                    name.to_string_lossy().into_owned(),
                    u64::from_be(rdma_sys::ibv_get_device_guid(device)),
                )
            }
        })
        .collect();
    // SAFETY: the list came from the library.
    unsafe { rdma_sys::ibv_free_device_list(list) };
    found.sort();
    Ok(found)
}

#[test]
fn the_device_lists_agree() {
    let ours = ours();
    println!("devices: {ours:?}");
    assert_eq!(ours, theirs(), "ours, ibverbs");
    assert_eq!(ours, linked(), "ours, rdma-sys");
}
