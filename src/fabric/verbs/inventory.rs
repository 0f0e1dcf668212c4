//! Finds every verbs device, port and GID of this host.
//!
//! Opens each device, asks, and closes it; nothing stays. Takes some milliseconds per device. Any thread may call.

use std::{fs, sync::OnceLock};

use parking_lot::Mutex;

use super::{
    facts::{
        DeviceCaps, DeviceFacts, DmabufSupport, Inventory, LibraryFacts, NetdevFacts, PortFacts,
        Transport, UnopenedDevice,
    },
    gid::{Gid, GidEntry, GidType},
    host::host,
    link::{LinkLayer, Mtu, PortState, link_bits_per_second},
    objects::{Opened, ProtectionDomain},
    sys,
};

/// The library, opened once and kept for the life of the process (providers keep state in it). A failure is not kept,
/// so a library installed later is found.
pub(super) fn library() -> Result<&'static sys::Verbs, sys::OpenError> {
    static LIBRARY: OnceLock<std::sync::Arc<sys::Verbs>> = OnceLock::new();
    static OPENING: Mutex<()> = Mutex::new(());
    let _one_at_a_time = OPENING.lock();
    match LIBRARY.get() {
        Some(library) => Ok(library),
        None => {
            let opened = sys::Verbs::open()?;
            Ok(LIBRARY.get_or_init(|| opened))
        }
    }
}

/// The list of devices, freed on drop. Devices opened from it stay valid.
pub(super) struct DeviceList {
    lib: &'static sys::Verbs,
    list: *mut *mut sys::ibv_device,
    length: usize,
}

/// One entry of a [`DeviceList`].
pub(super) struct Listed<'a> {
    pub(super) raw: *mut sys::ibv_device,
    pub(super) name: &'a str,
    transport: Transport,
}

impl DeviceList {
    /// `ibv_get_device_list(3)`; the error is an errno.
    pub(super) fn new(lib: &'static sys::Verbs) -> Result<Self, i32> {
        let (list, length) = lib.device_list().map_err(sys::Errno::code)?;
        Ok(Self { lib, list, length })
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = Listed<'_>> {
        (0..self.length).map(|index| {
            // SAFETY: the list has `length` entries, each a device that lives as long as the list.
            unsafe {
                let raw = *self.list.add(index);
                Listed {
                    raw,
                    name: self.lib.device_name(raw),
                    transport: Transport::from_code((*raw).transport_type),
                }
            }
        })
    }
}

impl Drop for DeviceList {
    fn drop(&mut self) {
        // SAFETY: the list is ours and freed once.
        unsafe { self.lib.free_device_list(self.list) };
    }
}

/// Everything this host has. Never fails: what cannot be had is reported in the result.
pub fn inventory() -> Inventory {
    let mut found = Inventory {
        host: host(),
        ..Inventory::default()
    };
    let lib = match library() {
        Ok(lib) => lib,
        Err(sys::OpenError::NotFound { tried }) => {
            let tried = tried.iter().map(ToString::to_string).collect();
            found.library = LibraryFacts::Missing { tried };
            return found;
        }
        Err(error) => {
            found.library = LibraryFacts::Missing {
                tried: vec![error.to_string()],
            };
            return found;
        }
    };
    let name = lib.library_name().to_owned();
    let list = match DeviceList::new(lib) {
        Ok(list) => list,
        Err(errno) => {
            found.library = LibraryFacts::NoDeviceList { name, errno };
            return found;
        }
    };
    found.library = LibraryFacts::Loaded { name };
    for device in list.iter() {
        let facts = Opened::open(lib, device.raw)
            .map_err(|errno| ("ibv_open_device", errno))
            .and_then(|opened| read_device(std::sync::Arc::new(opened), &device));
        match facts {
            Ok(facts) => found.devices.push(facts),
            Err((operation, errno)) => found.unopened.push(UnopenedDevice {
                name: device.name.to_owned(),
                operation,
                errno,
            }),
        }
    }
    found
}

/// Asks an open device everything.
pub(super) fn read_device(
    opened: std::sync::Arc<Opened>,
    device: &Listed<'_>,
) -> Result<DeviceFacts, (&'static str, i32)> {
    let lib = opened.lib();
    // SAFETY: the device is open.
    let attr = unsafe { lib.query_device(opened.raw()) }
        .map_err(|errno| ("ibv_query_device", errno.code()))?;
    let ports = (1..=attr.phys_port_cnt)
        .map(|port| read_port(&opened, device.name, port))
        .collect();
    let sysfs = format!("/sys/class/infiniband/{}/device", device.name);
    let pci = fs::canonicalize(&sysfs)
        .ok()
        .and_then(|path| path.file_name()?.to_str().map(str::to_owned))
        .filter(|name| name.matches(':').count() == 2);
    let (dmabuf, relaxed_ordering) = match ProtectionDomain::new(opened) {
        Ok(domain) => (probe_dmabuf(&domain), probe_relaxed_ordering(&domain)),
        Err(errno) => (DmabufSupport::Unsupported(errno), Err(errno)),
    };
    Ok(DeviceFacts {
        name: device.name.to_owned(),
        node_guid: u64::from_be(attr.node_guid),
        firmware: text(&attr.fw_ver),
        transport: device.transport,
        caps: caps(&attr),
        dmabuf,
        relaxed_ordering,
        numa_node: read_number(&format!("{sysfs}/numa_node")),
        pci,
        ports,
    })
}

fn caps(attr: &sys::ibv_device_attr) -> DeviceCaps {
    // The library's ints are counts; a negative one means nothing.
    let count = |value: i32| u32::try_from(value).unwrap_or(0);
    DeviceCaps {
        max_qp: count(attr.max_qp),
        max_qp_wr: count(attr.max_qp_wr),
        max_sge: count(attr.max_sge),
        max_sge_rd: count(attr.max_sge_rd),
        max_cq: count(attr.max_cq),
        max_cqe: count(attr.max_cqe),
        max_mr: count(attr.max_mr),
        max_mr_size: attr.max_mr_size,
        max_pd: count(attr.max_pd),
        max_qp_rd_atom: count(attr.max_qp_rd_atom),
        max_qp_init_rd_atom: count(attr.max_qp_init_rd_atom),
        atomic: attr.atomic_cap,
        max_mw: count(attr.max_mw),
        max_srq: count(attr.max_srq),
        max_srq_wr: count(attr.max_srq_wr),
        device_cap_flags: attr.device_cap_flags,
        vendor_id: attr.vendor_id,
        vendor_part_id: attr.vendor_part_id,
        hw_ver: attr.hw_ver,
    }
}

/// Asks a port everything. A refusal is reported in the result.
pub(super) fn read_port(opened: &Opened, device: &str, number: u8) -> PortFacts {
    let lib = opened.lib();
    let sysfs = format!("/sys/class/infiniband/{device}/ports/{number}");
    // SAFETY: the device is open.
    let attr = match unsafe { lib.query_port(opened.raw(), number) } {
        Ok(attr) => attr,
        Err(errno) => {
            return PortFacts {
                refused: Some(errno.code()),
                ..PortFacts::unknown(number)
            };
        }
    };
    let link = LinkLayer::from_code(attr.link_layer);
    let table = u32::try_from(attr.gid_tbl_len).unwrap_or(0);
    let gids: Vec<_> = (0..table)
        .filter_map(|index| read_gid(opened, &sysfs, number, index, link))
        .filter(|entry| !entry.gid.is_zero())
        .collect();
    let mut netdevs: Vec<NetdevFacts> = Vec::new();
    for name in gids.iter().filter_map(|entry| entry.netdev.as_deref()) {
        if netdevs.iter().all(|netdev| netdev.name != name) {
            netdevs.push(NetdevFacts {
                name: name.to_owned(),
                mtu: read_number(&format!("/sys/class/net/{name}/mtu")),
            });
        }
    }
    // The eight bits of `active_speed` end at NDR; the kernel's text goes further.
    let rate = fs::read_to_string(format!("{sysfs}/rate"))
        .ok()
        .and_then(|text| parse_rate(&text))
        .unwrap_or(0);
    PortFacts {
        number,
        state: PortState::from_code(attr.state),
        physical_state: attr.phys_state,
        link,
        active_mtu: Mtu::from_code(attr.active_mtu),
        max_mtu: Mtu::from_code(attr.max_mtu),
        max_message: attr.max_msg_sz,
        bits_per_second: link_bits_per_second(attr.active_speed, 0, attr.active_width).max(rate),
        lid: attr.lid,
        sm_lid: attr.sm_lid,
        grh_required: attr.flags & sys::IBV_QPF_GRH_REQUIRED != 0,
        refused: None,
        gids,
        netdevs,
    }
}

/// One row of the GID table: from the library if it knows types, else GID from the library and type from sysfs.
/// `None` for rows that are not set, which the kernel refuses to give.
fn read_gid(
    opened: &Opened,
    sysfs: &str,
    port: u8,
    index: u32,
    link: LinkLayer,
) -> Option<GidEntry> {
    let lib = opened.lib();
    // SAFETY: the device is open.
    match unsafe { lib.query_gid_ex(opened.raw(), u32::from(port), index) } {
        Ok(entry) => {
            return Some(GidEntry {
                index,
                gid: Gid(entry.gid.bytes()),
                kind: GidType::from_code(entry.gid_type),
                netdev: netdev_name(entry.ndev_ifindex)
                    .or_else(|| sysfs_line(&format!("{sysfs}/gid_attrs/ndevs/{index}"))),
            });
        }
        Err(errno) if errno.code() == libc::ENODATA => return None,
        Err(_) => {}
    }
    // SAFETY: the device is open.
    let gid = unsafe { lib.query_gid(opened.raw(), port, i32::try_from(index).ok()?) }.ok()?;
    // The kernel gives no type for a row that is not set.
    let kind = sysfs_line(&format!("{sysfs}/gid_attrs/types/{index}"))
        .map(|line| GidType::from_sysfs(&line, link))
        .or((link == LinkLayer::InfiniBand).then_some(GidType::InfiniBand))?;
    Some(GidEntry {
        index,
        gid: Gid(gid.bytes()),
        kind,
        netdev: sysfs_line(&format!("{sysfs}/gid_attrs/ndevs/{index}")),
    })
}

/// Registers the bad descriptor −1. A driver that knows dmabufs looks the descriptor up first and says `EBADF`
/// (`ib_umem_dmabuf_get`); one that does not never gets there.
fn probe_dmabuf(domain: &ProtectionDomain) -> DmabufSupport {
    let lib = domain.opened().lib();
    if lib.ibv_reg_dmabuf_mr.is_none() {
        return DmabufSupport::NoSymbol;
    }
    let access = sys::IBV_ACCESS_LOCAL_WRITE;
    // SAFETY: the domain is live; no memory is named.
    match unsafe { lib.reg_dmabuf_mr(domain.raw(), 0, 4096, 0, -1, access) } {
        Err(errno) if errno.code() == libc::EBADF => DmabufSupport::Supported,
        Err(errno) => DmabufSupport::Unsupported(errno.code()),
        Ok(mr) => {
            // SAFETY: made just above.
            let _ = unsafe { lib.dereg_mr(mr) };
            DmabufSupport::Supported
        }
    }
}

/// Registers one page with relaxed ordering.
fn probe_relaxed_ordering(domain: &ProtectionDomain) -> Result<(), i32> {
    #[repr(align(4096))]
    struct Page([u8; 4096]);
    let mut page = Box::new(Page([0; 4096]));
    let lib = domain.opened().lib();
    if lib.ibv_reg_mr_iova2.is_none() {
        return Err(libc::EOPNOTSUPP);
    }
    let address = page.0.as_mut_ptr();
    let access = sys::IBV_ACCESS_LOCAL_WRITE | sys::IBV_ACCESS_RELAXED_ORDERING;
    // SAFETY: the domain is live; the page outlives the region, which no peer learns of.
    let mr = unsafe {
        lib.reg_mr(
            domain.raw(),
            address.cast(),
            4096,
            address.addr() as u64,
            access,
        )
    }
    .map_err(sys::Errno::code)?;
    // SAFETY: made just above.
    unsafe { lib.dereg_mr(mr) }.map_err(sys::Errno::code)
}

impl PortFacts {
    fn unknown(number: u8) -> Self {
        Self {
            number,
            state: PortState::Unknown(0),
            physical_state: 0,
            link: LinkLayer::Other(0),
            active_mtu: None,
            max_mtu: None,
            max_message: 0,
            bits_per_second: 0,
            lid: 0,
            sm_lid: 0,
            grh_required: false,
            refused: None,
            gids: Vec::new(),
            netdevs: Vec::new(),
        }
    }
}

fn netdev_name(index: u32) -> Option<String> {
    if index == 0 {
        return None;
    }
    let mut buffer = [0; libc::IF_NAMESIZE];
    // SAFETY: the buffer has the size that if_indextoname(3) demands.
    let name = unsafe { libc::if_indextoname(index, buffer.as_mut_ptr()) };
    (!name.is_null()).then(|| text(&buffer))
}

fn sysfs_line(path: &str) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let line = text.trim();
    (!line.is_empty()).then(|| line.to_owned())
}

fn read_number(path: &str) -> Option<u32> {
    sysfs_line(path)?.parse().ok()
}

/// Bits per second of `/sys/class/infiniband/*/ports/*/rate`: `100 Gb/sec (4X EDR)`, `2.5 Gb/sec (1X SDR)`.
fn parse_rate(text: &str) -> Option<u64> {
    let number = text.split_once(" Gb/sec")?.0.trim();
    let (whole, tenths) = number.split_once('.').unwrap_or((number, "0"));
    let whole: u64 = whole.parse().ok()?;
    let tenths: u64 = tenths.get(..1)?.parse().ok()?;
    whole
        .checked_mul(1_000_000_000)?
        .checked_add(tenths * 100_000_000)
}

/// The text of a C array up to its NUL.
fn text(bytes: &[std::ffi::c_char]) -> String {
    let bytes: Vec<u8> = bytes
        .iter()
        .map(|byte| byte.cast_unsigned())
        .take_while(|byte| *byte != 0)
        .collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_of_sysfs() {
        assert_eq!(parse_rate("2.5 Gb/sec (1X SDR)\n"), Some(2_500_000_000));
        assert_eq!(parse_rate("100 Gb/sec (4X EDR)"), Some(100_000_000_000));
        assert_eq!(parse_rate("800 Gb/sec (4X XDR)"), Some(800_000_000_000));
        for odd in [
            "",
            "fast",
            "x Gb/sec",
            "1. Gb/sec",
            "99999999999999999999 Gb/sec",
        ] {
            assert_eq!(parse_rate(odd), None, "{odd:?}");
        }
    }

    #[test]
    fn c_text_ends_at_the_nul_or_the_array() {
        assert_eq!(text(&[b'a' as _, b'b' as _, 0, b'c' as _]), "ab");
        assert_eq!(text(&[b'a' as _]), "a");
    }

    /// Whatever this host has, the inventory comes, and its parts agree with each other.
    #[test]
    fn every_host_has_an_inventory() {
        let found = inventory();
        assert_eq!(
            found.host.sysfs_infiniband,
            std::path::Path::new("/sys/class/infiniband").is_dir()
        );
        if !matches!(found.library, LibraryFacts::Loaded { .. }) {
            assert!(found.devices.is_empty() && found.unopened.is_empty());
        }
        for device in &found.devices {
            assert!(found.host.sysfs_devices.contains(&device.name));
            assert!(!device.ports.is_empty(), "{}", device.name);
        }
    }
}
