//! What is wrong with this host for RDMA, and how to mend it.
//!
//! Pure: judges an [`Inventory`], touches nothing. Every finding names what was seen and one thing to do about it.

use std::fmt;

use super::{
    facts::{
        DeviceFacts, DmabufSupport, HostFacts, Inventory, LibraryFacts, Memlock, PortFacts,
        Transport,
    },
    gid::{NoGid, choose_gid},
    link::{LinkLayer, Mtu, PortState, physical_state_word},
};

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Severity {
    /// Worth knowing.
    Note,
    /// RDMA works, but slowly or not for everything.
    Warning,
    /// RDMA does not work on this host or port.
    Error,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Note => "note",
            Self::Warning => "warning",
            Self::Error => "error",
        })
    }
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// What was seen.
    pub what: String,
    /// What to do about it.
    pub mend: String,
}

/// Below this a registration of a KV pool fails for sure.
const MEMLOCK_ENOUGH: u64 = 1 << 30;

/// Payload bytes of the largest path MTU, and the Ethernet MTU that carries it: the kernel
/// deducts up to 96 bytes of headers (`iboe_get_mtu`), and operators configure round figures.
const NETDEV_MTU_FOR_4096: u32 = 4200;

/// Judges `inventory`, worst findings first. An empty list means that RDMA is ready on every port.
pub fn diagnose(inventory: &Inventory) -> Vec<Finding> {
    let mut findings = Vec::new();
    library(inventory, &mut findings);
    kernel(inventory, &mut findings);
    for device in &inventory.devices {
        self::device(device, &mut findings);
    }
    let usable = inventory
        .devices
        .iter()
        .flat_map(|device| &device.ports)
        .any(|port| port.state == PortState::Active);
    if !inventory.devices.is_empty() || !inventory.host.sysfs_devices.is_empty() {
        memlock(&inventory.host, &mut findings);
    }
    if !usable && !inventory.devices.is_empty() {
        add(
            &mut findings,
            Severity::Error,
            "no RDMA port of this host is active".into(),
            "bring one up; the findings per port say how".into(),
        );
    }
    findings.sort_by_key(|finding| std::cmp::Reverse(finding.severity));
    findings
}

fn add(findings: &mut Vec<Finding>, severity: Severity, what: String, mend: String) {
    findings.push(Finding {
        severity,
        what,
        mend,
    });
}

fn library(inventory: &Inventory, findings: &mut Vec<Finding>) {
    match &inventory.library {
        LibraryFacts::Loaded { .. } => {}
        LibraryFacts::Missing { tried } => add(
            findings,
            Severity::Error,
            format!("libibverbs cannot be opened ({})", tried.join("; ")),
            "install rdma-core's library and providers: `apt install libibverbs1 ibverbs-providers`, or `dnf install \
             libibverbs`"
                .into(),
        ),
        LibraryFacts::NoDeviceList { name, errno } => add(
            findings,
            Severity::Error,
            format!("{name} cannot list devices: {}", describe(*errno)),
            "load the kernel's user-space verbs: `modprobe ib_uverbs`".into(),
        ),
    }
}

fn kernel(inventory: &Inventory, findings: &mut Vec<Finding>) {
    let host = &inventory.host;
    let module = |name: &str| host.modules.iter().find(|module| module.name == name);
    let uverbs_loaded = module("ib_uverbs").is_some_and(|module| module.loaded);

    if !host.sysfs_infiniband {
        let mend = match module("rdma_rxe").and_then(|module| module.on_disk) {
            Some(false) => {
                "this kernel has no rdma_rxe, so soft-RoCE cannot stand in either: install the vendor's driver \
                 (mlx5_ib, bnxt_re, ionic_rdma), or a kernel with CONFIG_RDMA_RXE"
            }
            _ => {
                "load the NIC's RDMA driver (`modprobe mlx5_ib`, `bnxt_re`, `ionic_rdma`); without such a NIC, \
                 soft-RoCE: `modprobe rdma_rxe && rdma link add rxe0 type rxe netdev eth0`"
            }
        };
        add(
            findings,
            Severity::Error,
            "the kernel has no InfiniBand layer: /sys/class/infiniband is missing".into(),
            mend.into(),
        );
    } else if host.sysfs_devices.is_empty() {
        add(
            findings,
            Severity::Error,
            "the kernel knows no RDMA device: /sys/class/infiniband is empty".into(),
            "load the NIC's RDMA driver, or make a soft-RoCE device: `rdma link add rxe0 type rxe netdev eth0`".into(),
        );
    } else if host.uverbs.is_empty() {
        let devices = host.sysfs_devices.join(", ");
        if let Some(sign) = &host.container {
            add(
                findings,
                Severity::Error,
                format!("the host has {devices}, but this container ({sign}) has no /dev/infiniband/uverbs*"),
                "start the container with `--device /dev/infiniband --ulimit memlock=-1 --cap-add IPC_LOCK`, in \
                 Kubernetes with the RDMA device plug-in"
                    .into(),
            );
        } else if uverbs_loaded {
            add(
                findings,
                Severity::Error,
                format!("{devices} has no node /dev/infiniband/uverbs*"),
                "let udev make it: `udevadm trigger --subsystem-match=infiniband_verbs`".into(),
            );
        } else {
            add(
                findings,
                Severity::Error,
                format!("{devices} cannot be used by programs: ib_uverbs is not loaded"),
                "`modprobe ib_uverbs`".into(),
            );
        }
    }
    for node in &host.uverbs {
        if let Some(errno) = node.refused {
            add(
                findings,
                Severity::Error,
                format!("{} cannot be opened: {}", node.path, describe(errno)),
                format!(
                    "`chmod 666 {}`, or add this user to its group; in a container pass the device in",
                    node.path
                ),
            );
        }
    }
    for device in &inventory.unopened {
        add(
            findings,
            Severity::Error,
            format!(
                "{}: {} fails: {}",
                device.name,
                device.operation,
                describe(device.errno)
            ),
            "see the kernel's log (`dmesg`) for the driver's reason".into(),
        );
    }
    // The library skips a device for which it has no provider, without an error.
    if matches!(inventory.library, LibraryFacts::Loaded { .. }) && !host.uverbs.is_empty() {
        for name in &host.sysfs_devices {
            let known = inventory.devices.iter().any(|device| device.name == *name)
                || inventory.unopened.iter().any(|device| device.name == *name);
            if !known {
                add(
                    findings,
                    Severity::Error,
                    format!("{name} is in the kernel, but libibverbs does not list it"),
                    "install the provider for it: `apt install ibverbs-providers`, or the vendor's package".into(),
                );
            }
        }
    }
}

fn memlock(host: &HostFacts, findings: &mut Vec<Finding>) {
    let Memlock::Bytes(limit) = host.memlock else {
        return;
    };
    if limit >= MEMLOCK_ENOUGH {
        return;
    }
    let severity = if host.ipc_lock {
        Severity::Note
    } else {
        Severity::Error
    };
    let excuse = if host.ipc_lock {
        ", which CAP_IPC_LOCK overrides"
    } else {
        ""
    };
    add(
        findings,
        severity,
        format!(
            "only {} KiB may be locked (`ulimit -l`){excuse}",
            limit / 1024
        ),
        "registration locks memory: raise it with `ulimit -l unlimited`, in /etc/security/limits.conf (`* - memlock \
         unlimited`), with systemd's LimitMEMLOCK=infinity, or docker's --ulimit memlock=-1"
            .into(),
    );
}

fn device(device: &DeviceFacts, findings: &mut Vec<Finding>) {
    match device.transport {
        Transport::InfiniBand => {}
        Transport::Iwarp | Transport::Other(_) => {
            add(
                findings,
                Severity::Warning,
                format!("{} is no InfiniBand or RoCE device", device.name),
                "kvpush passes it over; on NICs that can do both, switch the driver to RoCE".into(),
            );
            return;
        }
    }
    if let DmabufSupport::Unsupported(errno) = device.dmabuf {
        add(
            findings,
            Severity::Note,
            format!(
                "{} registers no dmabuf memory: {}",
                device.name,
                describe(errno)
            ),
            "GPU memory needs a peer-memory module on this host; host memory is not affected"
                .into(),
        );
    }
    for port in &device.ports {
        self::port(device, port, findings);
    }
}

fn port(device: &DeviceFacts, port: &PortFacts, findings: &mut Vec<Finding>) {
    let place = format!("{}/{}", device.name, port.number);
    if let Some(errno) = port.refused {
        add(
            findings,
            Severity::Error,
            format!("{place} cannot be asked: {}", describe(errno)),
            "see the kernel's log (`dmesg`) for the driver's reason".into(),
        );
        return;
    }
    if port.state != PortState::Active {
        let physical = physical_state_word(port.physical_state);
        let mend = match (port.link, port.state) {
            (LinkLayer::Ethernet, _) => match port.netdevs.first() {
                Some(netdev) => format!(
                    "`ip link set {} up`; check the cable and the switch",
                    netdev.name
                ),
                None => {
                    "bring its network device up (`rdma link` names it); check cable and switch"
                        .into()
                }
            },
            (_, PortState::Init | PortState::Armed) => {
                "the fabric has no subnet manager: start opensm".into()
            }
            _ => "check the cable and the switch".into(),
        };
        // One port of a two-port NIC is often left unplugged on purpose.
        add(
            findings,
            Severity::Warning,
            format!("{place} is {} ({physical})", port.state),
            mend,
        );
        return;
    }
    match choose_gid(port.link, &port.gids, None) {
        Ok(entry) if port.link == LinkLayer::Ethernet && !entry.gid.is_ipv4_mapped() => {
            if entry.gid.is_link_local() {
                add(
                    findings,
                    Severity::Warning,
                    format!("{place} has only a link-local RoCE v2 GID, {entry}"),
                    "peers beyond the same segment cannot reach it: give its network device an IP address".into(),
                );
            }
        }
        Ok(_) => {}
        Err(NoGid::NoRoceV2(count)) => add(
            findings,
            Severity::Error,
            format!("{place} has no RoCE v2 GID ({count} of other types)"),
            "give its network device an IP address, and let the driver do RoCE v2 (`cma_roce_mode -d DEV -p 1 -m 2`)"
                .into(),
        ),
        Err(error) => add(
            findings,
            Severity::Error,
            format!("{place}: {error}"),
            "the port has no usable address: check the driver".into(),
        ),
    }
    mtu(&place, port, findings);
}

fn mtu(place: &str, port: &PortFacts, findings: &mut Vec<Finding>) {
    let (Some(active), Some(max)) = (port.active_mtu, port.max_mtu) else {
        return;
    };
    if active >= max.min(Mtu::M4096) {
        return;
    }
    let severity = if active < Mtu::M1024 {
        Severity::Warning
    } else {
        Severity::Note
    };
    let (seen, mend) = match port.netdevs.first() {
        Some(netdev) => (
            match netdev.mtu {
                Some(mtu) => format!(", because {} has an MTU of {mtu}", netdev.name),
                None => String::new(),
            },
            format!(
                "`ip link set {} mtu 9000` (at least {NETDEV_MTU_FOR_4096}) on both hosts, and jumbo frames on the \
                 switches",
                netdev.name
            ),
        ),
        None => (
            String::new(),
            "let the subnet manager configure 4096 bytes (partitions.conf: mtu=5)".into(),
        ),
    };
    add(
        findings,
        severity,
        format!("{place} sends packets of {active} bytes where {max} are possible{seen}"),
        mend,
    );
}

fn describe(errno: i32) -> String {
    std::io::Error::from_raw_os_error(errno).to_string()
}

#[cfg(test)]
mod tests;
