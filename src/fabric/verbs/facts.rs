//! What was found on this host, as plain data: the library, the kernel's side, every device, port and GID.
//!
//! [`inventory`](super::inventory::inventory) fills it, [`diagnose`](super::doctor::diagnose) judges it, people print
//! it. Nothing here talks to a device; any thread may use it.

use super::{
    gid::GidEntry,
    link::{LinkLayer, Mtu, PortState},
};

/// Everything found on this host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inventory {
    /// What the operating system says, with or without the library.
    pub host: HostFacts,
    /// The verbs library.
    pub library: LibraryFacts,
    /// The devices that could be opened.
    pub devices: Vec<DeviceFacts>,
    /// The devices that could not.
    pub unopened: Vec<UnopenedDevice>,
}

/// The operating system's side.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostFacts {
    /// Whether `/sys/class/infiniband` exists: the kernel's `ib_core` is loaded.
    pub sysfs_infiniband: bool,
    /// The devices in it.
    pub sysfs_devices: Vec<String>,
    /// The nodes `/dev/infiniband/uverbs*`.
    pub uverbs: Vec<UverbsNode>,
    /// How many bytes this process may lock.
    pub memlock: Memlock,
    /// Whether this process has `CAP_IPC_LOCK`, with which the kernel does not count locked memory. A container's root
    /// may have it in name only.
    pub ipc_lock: bool,
    /// The kernel modules that matter.
    pub modules: Vec<KernelModule>,
    /// What says that this is a container, if anything does.
    pub container: Option<String>,
}

/// The limit of locked memory (`RLIMIT_MEMLOCK`, `ulimit -l`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Memlock {
    /// The limit could not be read.
    #[default]
    Unknown,
    /// No limit.
    Unlimited,
    /// At most this many bytes.
    Bytes(u64),
}

/// One node `/dev/infiniband/uverbs*`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UverbsNode {
    /// Its path.
    pub path: String,
    /// Why this process may not read and write it, as an errno; `None` if it may.
    pub refused: Option<i32>,
}

/// A kernel module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelModule {
    /// Its name.
    pub name: &'static str,
    /// Whether it is loaded or built in.
    pub loaded: bool,
    /// Whether the running kernel has it on disk; `None` if its modules cannot be listed, as in a container.
    pub on_disk: Option<bool>,
}

/// The verbs library.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LibraryFacts {
    /// Opened under this name.
    Loaded {
        /// The name.
        name: String,
    },
    /// Not to be opened.
    Missing {
        /// The names tried, and why each failed.
        tried: Vec<String>,
    },
    /// Opened, but listing devices fails with this errno (`ENOSYS` where the kernel has no `ib_uverbs`).
    NoDeviceList {
        /// The library's name.
        name: String,
        /// The errno.
        errno: i32,
    },
}

impl Default for LibraryFacts {
    fn default() -> Self {
        Self::Missing { tried: Vec::new() }
    }
}

/// A device that is listed but could not be opened or asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnopenedDevice {
    /// Its name.
    pub name: String,
    /// The call that failed.
    pub operation: &'static str,
    /// Its errno.
    pub errno: i32,
}

/// One device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceFacts {
    /// Its name: `mlx5_0`, `bnxt_re0`, `ionic_0`, `rxe0`.
    pub name: String,
    /// The node GUID, as a number.
    pub node_guid: u64,
    /// Firmware version; empty where the device has none.
    pub firmware: String,
    /// How it carries verbs.
    pub transport: Transport,
    /// Limits and abilities.
    pub caps: DeviceCaps,
    /// Whether it registers memory by dmabuf descriptor.
    pub dmabuf: DmabufSupport,
    /// Whether it registers memory with relaxed PCIe ordering; `Err` is the errno of the attempt.
    pub relaxed_ordering: Result<(), i32>,
    /// The NUMA node it hangs on, where the system says.
    pub numa_node: Option<u32>,
    /// Its address on the PCI bus, where it is on one.
    pub pci: Option<String>,
    /// Its ports.
    pub ports: Vec<PortFacts>,
}

/// How a device carries verbs (`enum ibv_transport_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// InfiniBand's, which RoCE also uses.
    InfiniBand,
    /// iWARP: not supported, for it has no write with immediate.
    Iwarp,
    /// Something else, which kvpush does not use.
    Other(i32),
}

impl Transport {
    /// Decodes `ibv_device::transport_type`.
    pub fn from_code(code: i32) -> Self {
        match code {
            0 => Self::InfiniBand,
            1 => Self::Iwarp,
            other => Self::Other(other),
        }
    }
}

/// Limits of a device, as `ibv_query_device(3)` gives them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceCaps {
    /// Queue pairs.
    pub max_qp: u32,
    /// Requests of one work queue.
    pub max_qp_wr: u32,
    /// Gather elements of a request.
    pub max_sge: u32,
    /// Scatter elements of a read.
    pub max_sge_rd: u32,
    /// Completion queues.
    pub max_cq: u32,
    /// Entries of one completion queue.
    pub max_cqe: u32,
    /// Memory regions.
    pub max_mr: u32,
    /// Bytes of one memory region.
    pub max_mr_size: u64,
    /// Protection domains.
    pub max_pd: u32,
    /// Reads served at a time by one queue pair.
    pub max_qp_rd_atom: u32,
    /// Reads issued at a time by one queue pair.
    pub max_qp_init_rd_atom: u32,
    /// Atomic operations: `enum ibv_atomic_cap` (0 none, 1 within the device, 2 with the host).
    pub atomic: u32,
    /// Memory windows.
    pub max_mw: u32,
    /// Shared receive queues; 0 where there are none.
    pub max_srq: u32,
    /// Receives of one shared receive queue.
    pub max_srq_wr: u32,
    /// `enum ibv_device_cap_flags`.
    pub device_cap_flags: u32,
    /// The vendor's id.
    pub vendor_id: u32,
    /// The part's id.
    pub vendor_part_id: u32,
    /// The hardware's revision.
    pub hw_ver: u32,
}

impl DeviceCaps {
    /// Whether there are shared receive queues.
    pub fn shared_receive_queue(&self) -> bool {
        self.max_srq > 0 && self.max_srq_wr > 0
    }

    /// Whether this is the kernel's soft-RoCE (`rdma_rxe`), by its vendor id.
    pub fn soft_roce(&self) -> bool {
        self.vendor_id == 0x00ff_ffff
    }

    /// Whether there are memory windows of type 2 (`IBV_DEVICE_MEM_WINDOW_TYPE_2A` or `_2B`).
    pub fn memory_window_type_2(&self) -> bool {
        self.max_mw > 0 && self.device_cap_flags & ((1 << 23) | (1 << 24)) != 0
    }
}

/// Whether a device registers memory by dmabuf descriptor, asked by registering descriptor −1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DmabufSupport {
    /// It does: it got as far as finding the descriptor bad.
    Supported,
    /// It does not; the value is the errno (`EOPNOTSUPP`, or `EPROTONOSUPPORT` where the kernel is too old).
    Unsupported(i32),
    /// The library is too old to ask.
    NoSymbol,
}

/// One port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortFacts {
    /// Its number, from 1.
    pub number: u8,
    /// The logical state.
    pub state: PortState,
    /// The physical state, a code of [`physical_state_word`](super::link::physical_state_word).
    pub physical_state: u8,
    /// The link layer.
    pub link: LinkLayer,
    /// The path MTU in use.
    pub active_mtu: Option<Mtu>,
    /// The largest path MTU.
    pub max_mtu: Option<Mtu>,
    /// Most bytes of one message.
    pub max_message: u32,
    /// Signalling rate in bits per second, 0 if unknown.
    pub bits_per_second: u64,
    /// The LID, 0 on Ethernet.
    pub lid: u16,
    /// The subnet manager's LID, 0 on Ethernet.
    pub sm_lid: u16,
    /// Whether peers can reach it only with a global routing header (`IBV_QPF_GRH_REQUIRED`).
    pub grh_required: bool,
    /// Why the port could not be asked, as an errno; the other fields are then empty.
    pub refused: Option<i32>,
    /// The entries of the GID table that are set.
    pub gids: Vec<GidEntry>,
    /// The network devices that its GIDs belong to.
    pub netdevs: Vec<NetdevFacts>,
}

/// A network device under a RoCE port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetdevFacts {
    /// Its name.
    pub name: String,
    /// Its MTU in bytes, where known.
    pub mtu: Option<u32>,
}
