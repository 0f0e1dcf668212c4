//! An opened rail: one port of one device, its protection domain and its memory regions.
//!
//! Any thread may call; libibverbs objects are thread-safe, and the table of regions has a lock, which no data path
//! takes.
//!
//! # Lifetimes
//!
//! Verbs objects must go in the order memory region, protection domain, device, library. A [`VerbsDevice`] owns the
//! first three and drops them in that order; contexts hold an `Arc` of it, so their queue pairs go before. The library
//! stays for the life of the process.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use parking_lot::{Mutex, RwLock};

use crate::fabric::{
    Access, Capabilities, Context, Device, DeviceInfo, DmabufRange, FabricError, FabricErrorKind,
    FabricKind, LinkState, LocalKey, MemoryKeys, MrId, RemoteKey, WindowBind, mapping::page_size,
};

use super::{
    address::VerbsAddress,
    config::VerbsConfig,
    context::VerbsContext,
    error::Place,
    facts::{DeviceCaps, DeviceFacts, DmabufSupport, LibraryFacts, PortFacts, Transport},
    gid::{Gid, GidEntry, GidType, choose_gid},
    inventory::{self, library, read_device, read_port},
    link::{LinkLayer, Mtu, PortState},
    objects::{Opened, ProtectionDomain},
    sys::{self, Zeroable as _},
    windows,
};

/// Reads a queue pair may have under way; more gains nothing and costs responder resources.
const MOST_READS: u32 = 16;

/// A registered memory region.
struct MemoryRegion {
    raw: *mut sys::ibv_mr,
    /// Where it is, if there may be windows into it.
    windows: Option<(u64, u64, Access)>,
}

// SAFETY: libibverbs objects may be used by any thread.
unsafe impl Send for MemoryRegion {}

/// What of a port can change while it is open.
#[derive(Clone, Debug)]
pub(super) struct PortNow {
    pub(super) state: PortState,
    pub(super) active_mtu: Mtu,
    pub(super) lid: u16,
    pub(super) grh_required: bool,
    pub(super) link: LinkLayer,
    /// `None` on an InfiniBand port without a GID, which is reached by its LID.
    pub(super) gid: Option<GidEntry>,
}

/// One port of one verbs device.
pub struct VerbsDevice {
    info: DeviceInfo,
    place: Place,
    config: VerbsConfig,
    limits: DeviceCaps,
    dmabuf: DmabufSupport,
    port: RwLock<PortNow>,
    regions: Mutex<HashMap<u64, MemoryRegion>>,
    next_region: AtomicU64,
    has_context: AtomicBool,
    domain: ProtectionDomain,
}

/// A port that [`VerbsDevice::open_all`] passed over.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{device}/{port}: {reason}")]
pub struct Skipped {
    /// The device.
    pub device: String,
    /// The port, 0 if it is about the whole device.
    pub port: u8,
    /// Why.
    pub reason: String,
}

impl VerbsDevice {
    /// Opens port `port` of device `name`.
    ///
    /// Fails with [`FabricErrorKind::Unavailable`] if the library, the device or the port is not there, the port is
    /// not active, or it has no suitable GID; with [`FabricErrorKind::Os`] if the kernel or driver refuses.
    pub fn open(name: &str, port: u8, config: &VerbsConfig) -> Result<Arc<Self>, FabricError> {
        let place = Place {
            device: name.into(),
            port,
        };
        let lib = library().map_err(|error| no_library(&place, &error))?;
        let list = inventory::DeviceList::new(lib)
            .map_err(|errno| place.os("ibv_get_device_list", errno))?;
        let Some(device) = list.iter().find(|device| device.name == name) else {
            let names: Vec<_> = list.iter().map(|device| device.name).collect();
            let what = format!("no device {name} (there are: {})", names.join(", "));
            return Err(place.unavailable(
                "ibv_get_device_list",
                what,
                "`kvpush-bench devices` lists what there is",
            ));
        };
        let opened =
            Opened::open(lib, device.raw).map_err(|errno| place.os("ibv_open_device", errno))?;
        let opened = Arc::new(opened);
        let facts = read_device(Arc::clone(&opened), &device)
            .map_err(|(operation, errno)| place.os(operation, errno))?;
        Self::on_port(opened, &facts, port, config)
    }

    /// Opens every active InfiniBand or RoCE port, of the devices named in `filter` if given, and says which were
    /// passed over and why. An entry of the filter is `device` or `device/port`.
    pub fn open_all(
        config: &VerbsConfig,
        filter: Option<&[String]>,
    ) -> (Vec<Arc<Self>>, Vec<Skipped>) {
        let mut devices = Vec::new();
        let mut skipped = Vec::new();
        let mut skip = |device: &str, port, reason: String| {
            skipped.push(Skipped {
                device: device.into(),
                port,
                reason,
            });
        };
        let wanted = |device: &str, port: u8| {
            filter.is_none_or(|filter| {
                filter.iter().any(|entry| match entry.split_once('/') {
                    Some((name, number)) => name == device && number.parse() == Ok(port),
                    None => entry == device,
                })
            })
        };
        let found = inventory::inventory();
        match &found.library {
            LibraryFacts::Loaded { .. } => {}
            LibraryFacts::Missing { tried } => {
                skip(
                    "libibverbs",
                    0,
                    format!("cannot be opened ({})", tried.join("; ")),
                );
            }
            LibraryFacts::NoDeviceList { name, errno } => {
                let reason = std::io::Error::from_raw_os_error(*errno);
                skip(name, 0, format!("cannot list devices: {reason}"));
            }
        }
        for device in &found.unopened {
            let reason = std::io::Error::from_raw_os_error(device.errno);
            skip(&device.name, 0, format!("{}: {reason}", device.operation));
        }
        for device in &found.devices {
            for port in &device.ports {
                if !wanted(&device.name, port.number) {
                    skip(&device.name, port.number, "not asked for".into());
                    continue;
                }
                match Self::open(&device.name, port.number, config) {
                    Ok(device) => devices.push(device),
                    Err(error) => skip(&device.name, port.number, error.to_string()),
                }
            }
        }
        (devices, skipped)
    }

    fn on_port(
        opened: Arc<Opened>,
        facts: &DeviceFacts,
        number: u8,
        config: &VerbsConfig,
    ) -> Result<Arc<Self>, FabricError> {
        let place = Place {
            device: facts.name.clone(),
            port: number,
        };
        if facts.transport != Transport::InfiniBand {
            return Err(place.unavailable(
                "open",
                "neither InfiniBand nor RoCE".into(),
                "iWARP and other transports have no write with immediate",
            ));
        }
        let Some(port) = facts.ports.iter().find(|port| port.number == number) else {
            let what = format!("port {number} of {}", facts.ports.len());
            return Err(place.unavailable("ibv_query_port", what, "ports count from 1"));
        };
        if let Some(errno) = port.refused {
            return Err(place.os("ibv_query_port", errno));
        }
        if port.state != PortState::Active {
            let what = format!("the port is {}", port.state);
            return Err(place.unavailable(
                "open",
                what,
                "`kvpush-bench doctor` says how to bring it up",
            ));
        }
        let now = PortNow::choose(port, config, &place)?;
        let domain =
            ProtectionDomain::new(opened).map_err(|errno| place.os("ibv_alloc_pd", errno))?;
        let limits = facts.caps;
        let caps = Capabilities {
            max_send_depth: limits.max_qp_wr,
            max_receive_depth: if config.shared_receive_queue && limits.shared_receive_queue() {
                limits.max_qp_wr.min(limits.max_srq_wr)
            } else {
                limits.max_qp_wr
            },
            max_completions: limits.max_cqe,
            max_sge: limits.max_sge,
            max_inline: probe_inline(&domain, limits.max_sge),
            max_message: u64::from(port.max_message),
            max_mr: limits.max_mr_size,
            mtu: now.active_mtu.bytes(),
            read: limits.max_qp_rd_atom > 0 && limits.max_qp_init_rd_atom > 0,
            windows: windows::probe(&domain, &limits),
            dmabuf: facts.dmabuf == DmabufSupport::Supported,
            relaxed_ordering: facts.relaxed_ordering.is_ok(),
        };
        let info = DeviceInfo {
            kind: FabricKind::Verbs,
            name: facts.name.clone(),
            port: number,
            address: match (&now.gid, port.link) {
                (Some(gid), LinkLayer::Ethernet) => gid.to_string(),
                (Some(gid), _) => format!("LID {}, {gid}", port.lid),
                (None, _) => format!("LID {}", port.lid),
            },
            link: LinkState::Active,
            bits_per_second: port.bits_per_second,
            pci: facts.pci.as_ref().and_then(|pci| pci.parse().ok()),
            caps,
        };
        tracing::info!(device = %info.name, port = number, address = %info.address, mtu = info.caps.mtu, "rail opened");
        Ok(Arc::new(Self {
            info,
            place,
            config: config.clone(),
            limits,
            dmabuf: facts.dmabuf,
            port: RwLock::new(now),
            regions: Mutex::default(),
            next_region: AtomicU64::new(1),
            has_context: AtomicBool::new(false),
            domain,
        }))
    }

    /// The state of the port as last reported by the device.
    pub fn port_state(&self) -> PortState {
        self.port.read().state
    }

    /// The settings it was opened with.
    pub fn config(&self) -> &VerbsConfig {
        &self.config
    }

    pub(super) fn info_ref(&self) -> &DeviceInfo {
        &self.info
    }

    /// The index of our GID, 0 on an InfiniBand port without one.
    pub(super) fn gid_index(&self) -> u8 {
        let port = self.port.read();
        port.gid
            .as_ref()
            .and_then(|gid| u8::try_from(gid.index).ok())
            .unwrap_or(0)
    }

    pub(super) fn place(&self) -> &Place {
        &self.place
    }

    pub(super) fn limits(&self) -> &DeviceCaps {
        &self.limits
    }

    pub(super) fn domain(&self) -> &ProtectionDomain {
        &self.domain
    }

    pub(super) fn opened(&self) -> &Opened {
        self.domain.opened()
    }

    pub(super) fn lib(&self) -> &'static sys::Verbs {
        self.domain.opened().lib()
    }

    pub(super) fn port(&self) -> PortNow {
        self.port.read().clone()
    }

    /// Reads LID or GID and MTU anew, after the device has said that something of the port changed.
    pub(super) fn refresh_port(&self) {
        let facts = read_port(self.opened(), &self.place.device, self.place.port);
        match PortNow::choose(&facts, &self.config, &self.place) {
            Ok(now) => *self.port.write() = now,
            Err(error) => {
                tracing::warn!(%error, "the port's address is gone");
                self.port.write().state = facts.state;
            }
        }
    }

    /// Reads this side may serve and may have under way on one queue pair.
    pub(super) fn reads(&self) -> (u8, u8) {
        let cut = |value: u32| value.min(MOST_READS) as u8;
        (
            cut(self.limits.max_qp_rd_atom),
            cut(self.limits.max_qp_init_rd_atom),
        )
    }

    /// The largest retry count that ends. The specification knows no endless one (vol. 1, 9.9.2), but soft-RoCE
    /// never counts 7 down, and then a lost peer would go unnoticed.
    pub(super) fn most_retries(&self) -> u8 {
        if self.limits.soft_roce() { 6 } else { 7 }
    }

    /// How a peer reaches queue pair `qpn` of this port.
    pub(super) fn lane_address(&self, qpn: u32, psn: u32) -> VerbsAddress {
        let port = self.port();
        VerbsAddress {
            link: port.link,
            gid_type: port
                .gid
                .as_ref()
                .map_or(GidType::InfiniBand, |gid| gid.kind),
            mtu: port.active_mtu.min(Mtu::at_most(self.config.max_mtu)),
            port: self.place.port,
            max_dest_rd_atomic: self.reads().0,
            grh_required: port.grh_required,
            qpn,
            psn,
            lid: port.lid,
            gid: port.gid.as_ref().map_or(Gid::default(), |gid| gid.gid),
        }
    }

    /// Takes a region over and tells its keys. `windows` says where it is, if there may be windows into it.
    ///
    /// # Safety
    ///
    /// It is live and nobody else's.
    unsafe fn keep(
        &self,
        raw: *mut sys::ibv_mr,
        windows: Option<(u64, u64, Access)>,
    ) -> MemoryKeys {
        // SAFETY: the region is live; the library filled in its keys when it made it.
        let (lkey, rkey) = unsafe { ((*raw).lkey, (*raw).rkey) };
        let mr = self.next_region.fetch_add(1, Ordering::Relaxed);
        let region = MemoryRegion { raw, windows };
        self.regions.lock().insert(mr, region);
        MemoryKeys {
            mr: MrId(mr),
            local: LocalKey(lkey),
            remote: RemoteKey(rkey),
        }
    }

    /// Ends a registration; the key is gone even if the device is.
    pub(super) fn deregister(&self, mr: MrId) -> Result<(), FabricError> {
        let mut regions = self.regions.lock();
        let Some(region) = regions.get(&mr.0) else {
            let what = format!("no registration {}", mr.0);
            return Err(self
                .place
                .error("ibv_dereg_mr", FabricErrorKind::Memory(what)));
        };
        // SAFETY: regions in the table are live.
        match unsafe { self.lib().dereg_mr(region.raw) } {
            Ok(()) => {
                regions.remove(&mr.0);
                Ok(())
            }
            Err(errno) => Err(self.place.os("ibv_dereg_mr", errno.code())),
        }
    }

    /// Hands the registration that `bind` is about to `bound`, if a window may be made as it says.
    pub(super) fn with_region<T>(
        &self,
        bind: &WindowBind,
        bound: impl FnOnce(*mut sys::ibv_mr) -> Result<T, FabricError>,
    ) -> Result<T, FabricError> {
        let refuse = |what: &str| {
            let kind = FabricErrorKind::Memory(what.to_owned());
            Err(self.place.error("bind_window", kind))
        };
        let regions = self.regions.lock();
        let Some(region) = regions.get(&bind.mr.0) else {
            return refuse("no such registration");
        };
        let Some((address, length, access)) = region.windows else {
            return refuse("the registration allows no windows");
        };
        if (bind.access.remote_write && !access.remote_write)
            || (bind.access.remote_read && !access.remote_read)
        {
            return refuse("a right that the registration has not");
        }
        let offset = bind.address.checked_sub(address);
        let end = offset.and_then(|offset| offset.checked_add(bind.length));
        if bind.length == 0 || end.is_none_or(|end| end > length) {
            return refuse("a range outside of the registration");
        }
        bound(region.raw)
    }

    /// Called by the context when it goes.
    pub(super) fn context_closed(&self) {
        self.has_context.store(false, Ordering::Release);
    }
}

impl PortNow {
    fn choose(port: &PortFacts, config: &VerbsConfig, place: &Place) -> Result<Self, FabricError> {
        let gid = match choose_gid(port.link, &port.gids, config.gid_index) {
            Ok(gid) => Some(gid.clone()),
            // InfiniBand without a GID still has its LID.
            Err(_) if port.link == LinkLayer::InfiniBand && config.gid_index.is_none() => None,
            Err(error) => {
                return Err(place.unavailable(
                    "ibv_query_gid",
                    error.to_string(),
                    "give the port's network device an IP address, or set gid_index to an entry of `kvpush-bench \
                     devices`",
                ));
            }
        };
        Ok(Self {
            state: port.state,
            active_mtu: port.active_mtu.unwrap_or(Mtu::M256),
            lid: port.lid,
            grh_required: port.grh_required,
            link: port.link,
            gid,
        })
    }
}

impl Device for VerbsDevice {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    unsafe fn register(
        &self,
        address: u64,
        length: u64,
        access: Access,
    ) -> Result<MemoryKeys, FabricError> {
        const CALL: &str = "ibv_reg_mr";
        self.place
            .limit(CALL, "length", length, self.limits.max_mr_size)?;
        let bad = |what: &str| {
            let what = format!("{what} ({address:#x}..+{length})");
            self.place.error(CALL, FabricErrorKind::Memory(what))
        };
        if length == 0 {
            return Err(bad("empty range"));
        }
        if address == 0 || address.checked_add(length).is_none() {
            return Err(bad("range outside of the address space"));
        }
        let flags = access_flags(access);
        let register = |flags| {
            // SAFETY: the domain is live; the caller vouches for the range for as long as the region lives.
            unsafe {
                self.lib().reg_mr(
                    self.domain.raw(),
                    address as *mut std::ffi::c_void,
                    length as usize,
                    address,
                    flags,
                )
            }
        };
        let wanted =
            self.info.caps.windows.is_some() && (access.remote_write || access.remote_read);
        let with_windows = wanted
            .then(|| register(flags | sys::IBV_ACCESS_MW_BIND).ok())
            .flatten();
        let windows = with_windows.map(|_| (address, length, access));
        let region = match with_windows {
            Some(region) => region,
            None => register(flags).map_err(|errno| self.place.os(CALL, errno.code()))?,
        };
        // SAFETY: made just above.
        Ok(unsafe { self.keep(region, windows) })
    }

    unsafe fn register_dmabuf(
        &self,
        range: &DmabufRange<'_>,
        access: Access,
    ) -> Result<MemoryKeys, FabricError> {
        const CALL: &str = "ibv_reg_dmabuf_mr";
        let (offset, length, address) = (range.offset, range.length, range.address);
        match self.dmabuf {
            DmabufSupport::Supported => {}
            DmabufSupport::NoSymbol => return Err(self.place.os(CALL, libc::ENOSYS)),
            DmabufSupport::Unsupported(errno) => return Err(self.place.os(CALL, errno)),
        }
        self.place
            .limit(CALL, "length", length, self.limits.max_mr_size)?;
        let bad = |what: &str| {
            let what = format!("{what} (offset {offset}, {address:#x}..+{length})");
            Err(self.place.error(CALL, FabricErrorKind::Memory(what)))
        };
        if length == 0 {
            return bad("empty range");
        }
        if address.checked_add(length).is_none() || offset.checked_add(length).is_none() {
            return bad("range outside of the address space");
        }
        if offset % page_size() != address % page_size() {
            return bad("offset and address differ in their place within a page");
        }
        let fd = std::os::fd::AsRawFd::as_raw_fd(&range.fd);
        // SAFETY: the domain is live and the descriptor open; the caller vouches for what is behind it.
        let region = unsafe {
            let (pd, flags) = (self.domain.raw(), access_flags(access));
            let length = length as usize;
            self.lib()
                .reg_dmabuf_mr(pd, offset, length, address, fd, flags)
        }
        .map_err(|errno| self.place.os(CALL, errno.code()))?;
        // SAFETY: made just above.
        Ok(unsafe { self.keep(region, None) })
    }

    fn open_context(
        self: Arc<Self>,
        completion_depth: u32,
    ) -> Result<Box<dyn Context>, FabricError> {
        if self.has_context.swap(true, Ordering::AcqRel) {
            let what = "the device already has a context".to_owned();
            return Err(self
                .place
                .error("open_context", FabricErrorKind::Unavailable(what)));
        }
        match VerbsContext::new(Arc::clone(&self), completion_depth) {
            Ok(context) => Ok(Box::new(context)),
            Err(error) => {
                self.context_closed();
                Err(error)
            }
        }
    }
}

impl Drop for VerbsDevice {
    fn drop(&mut self) {
        for (_, region) in self.regions.get_mut().drain() {
            // SAFETY: regions in the table are live, and all contexts, hence all queue pairs, are gone.
            if let Err(errno) = unsafe { self.domain.opened().lib().dereg_mr(region.raw) } {
                tracing::warn!(device = %self.info.name, %errno, "ibv_dereg_mr");
            }
        }
    }
}

impl std::fmt::Debug for VerbsDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VerbsDevice")
            .field("info", &self.info)
            .finish_non_exhaustive()
    }
}

/// The access flags for `access`. Local write is demanded wherever a peer may write
/// (`ibv_reg_mr(3)`).
fn access_flags(access: Access) -> u32 {
    let mut flags = 0;
    if access.local_write || access.remote_write {
        flags |= sys::IBV_ACCESS_LOCAL_WRITE;
    }
    if access.remote_write {
        flags |= sys::IBV_ACCESS_REMOTE_WRITE;
    }
    if access.remote_read {
        flags |= sys::IBV_ACCESS_REMOTE_READ;
    }
    if access.relaxed_ordering {
        // In IBV_ACCESS_OPTIONAL_RANGE: a device that does not know it ignores it.
        flags |= sys::IBV_ACCESS_RELAXED_ORDERING;
    }
    flags
}

fn no_library(place: &Place, error: &sys::OpenError) -> FabricError {
    place.unavailable(
        "dlopen",
        error.to_string(),
        "install libibverbs and its providers (Debian: libibverbs1 ibverbs-providers)",
    )
}

/// The most inline bytes a queue pair of this device takes besides its full gather list. No attribute says, so small
/// queue pairs are made to see (`ibv_create_qp(3)` refuses what it cannot give).
fn probe_inline(domain: &ProtectionDomain, max_sge: u32) -> u32 {
    const SIZES: [u32; 6] = [512, 256, 220, 128, 64, 32];
    let lib = domain.opened().lib();
    // SAFETY: the device is open; the queue is destroyed below.
    let Ok(cq) = (unsafe {
        lib.create_cq(
            domain.opened().raw(),
            1,
            std::ptr::null_mut(),
            std::ptr::null_mut(),
            0,
        )
    }) else {
        return 0;
    };
    let mut best = 0;
    for size in SIZES {
        let mut init = sys::ibv_qp_init_attr::zeroed();
        init.send_cq = cq;
        init.recv_cq = cq;
        init.qp_type = sys::IBV_QPT_RC;
        init.cap = sys::ibv_qp_cap {
            max_send_wr: 1,
            max_recv_wr: 1,
            max_send_sge: max_sge,
            max_recv_sge: 1,
            max_inline_data: size,
        };
        // SAFETY: domain and completion queue are live; the queue pair is destroyed at once.
        if let Ok(qp) = unsafe { lib.create_qp(domain.raw(), &mut init) } {
            best = init.cap.max_inline_data;
            // SAFETY: made just above.
            let _ = unsafe { lib.destroy_qp(qp) };
            break;
        }
    }
    // SAFETY: made above, and no queue pair uses it any more.
    let _ = unsafe { lib.destroy_cq(cq) };
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The numbers are those of `enum ibv_access_flags`.
    #[test]
    fn remote_write_always_brings_local_write() {
        assert_eq!(access_flags(Access::LOCAL), 1);
        assert_eq!(access_flags(Access::REMOTE_WRITE), 1 | 2);
        assert_eq!(access_flags(Access::ALL), 1 | 2 | 4);
        let odd = Access {
            local_write: false,
            ..Access::REMOTE_WRITE
        };
        assert_eq!(access_flags(odd), 1 | 2);
        let read_only = Access {
            local_write: false,
            remote_write: false,
            remote_read: true,
            relaxed_ordering: false,
        };
        assert_eq!(access_flags(read_only), 4);
        let relaxed = Access {
            relaxed_ordering: true,
            ..Access::REMOTE_WRITE
        };
        assert_eq!(access_flags(relaxed), 1 | 2 | 1 << 20);
    }

    #[test]
    fn a_device_that_is_not_there_says_what_is() {
        let error = VerbsDevice::open("no_such_device", 1, &VerbsConfig::default()).unwrap_err();
        assert!(
            matches!(
                error.kind,
                FabricErrorKind::Unavailable(_) | FabricErrorKind::Os(_)
            ),
            "{error}"
        );
        assert_eq!(error.device, "no_such_device");
    }
}
