//! Each fault planted in a healthy host is found, alone; a healthy host has no findings.

use super::*;
use crate::fabric::verbs::{
    facts::{DeviceCaps, KernelModule, NetdevFacts, UnopenedDevice, UverbsNode},
    gid::{Gid, GidEntry, GidType},
};

fn module(name: &'static str, loaded: bool) -> KernelModule {
    KernelModule {
        name,
        loaded,
        on_disk: Some(true),
    }
}

fn gid(index: u32, address: &str, kind: GidType) -> GidEntry {
    let address: std::net::Ipv6Addr = address.parse().unwrap();
    GidEntry {
        index,
        gid: Gid(address.octets()),
        kind,
        netdev: Some("eth0".into()),
    }
}

fn healthy() -> Inventory {
    let port = PortFacts {
        number: 1,
        state: PortState::Active,
        physical_state: 5,
        link: LinkLayer::Ethernet,
        active_mtu: Some(Mtu::M4096),
        max_mtu: Some(Mtu::M4096),
        max_message: 1 << 30,
        bits_per_second: 400_000_000_000,
        lid: 0,
        sm_lid: 0,
        grh_required: false,
        refused: None,
        gids: vec![
            gid(0, "fe80::1", GidType::RoceV1),
            gid(1, "::ffff:10.0.0.1", GidType::RoceV2),
        ],
        netdevs: vec![NetdevFacts {
            name: "eth0".into(),
            mtu: Some(9000),
        }],
    };
    Inventory {
        host: HostFacts {
            sysfs_infiniband: true,
            sysfs_devices: vec!["mlx5_0".into()],
            uverbs: vec![UverbsNode {
                path: "/dev/infiniband/uverbs0".into(),
                refused: None,
            }],
            memlock: Memlock::Unlimited,
            ipc_lock: false,
            modules: vec![module("ib_uverbs", true), module("rdma_rxe", false)],
            container: None,
        },
        library: LibraryFacts::Loaded {
            name: "libibverbs.so.1".into(),
        },
        devices: vec![DeviceFacts {
            name: "mlx5_0".into(),
            node_guid: 1,
            firmware: "28.0".into(),
            transport: Transport::InfiniBand,
            caps: DeviceCaps::default(),
            dmabuf: DmabufSupport::Supported,
            relaxed_ordering: Ok(()),
            numa_node: Some(0),
            pci: None,
            ports: vec![port],
        }],
        unopened: Vec::new(),
    }
}

/// The only finding after `plant` has broken a healthy host.
#[track_caller]
fn only(plant: impl FnOnce(&mut Inventory)) -> Finding {
    let mut host = healthy();
    plant(&mut host);
    let mut findings = diagnose(&host);
    assert_eq!(findings.len(), 1, "{findings:#?}");
    findings.remove(0)
}

#[track_caller]
fn expect(finding: &Finding, severity: Severity, what: &str, mend: &str) {
    assert_eq!(finding.severity, severity, "{finding:#?}");
    assert!(finding.what.contains(what), "{finding:#?}");
    assert!(finding.mend.contains(mend), "{finding:#?}");
}

fn port(host: &mut Inventory) -> &mut PortFacts {
    &mut host.devices[0].ports[0]
}

#[test]
fn a_healthy_host_has_no_findings() {
    assert_eq!(diagnose(&healthy()), []);
}

#[test]
fn a_host_without_anything_is_told_both_halves() {
    let host = Inventory {
        library: LibraryFacts::Missing {
            tried: vec!["libibverbs.so.1: not found".into()],
        },
        ..Inventory::default()
    };
    let findings = diagnose(&host);
    assert_eq!(findings.len(), 2, "{findings:#?}");
    expect(
        &findings[0],
        Severity::Error,
        "libibverbs.so.1: not found",
        "apt install",
    );
    expect(
        &findings[1],
        Severity::Error,
        "/sys/class/infiniband is missing",
        "rdma link add",
    );
}

#[test]
fn a_kernel_without_soft_roce_is_not_told_to_load_it() {
    let mut host = Inventory {
        library: healthy().library,
        ..Inventory::default()
    };
    host.host.modules = vec![KernelModule {
        name: "rdma_rxe",
        loaded: false,
        on_disk: Some(false),
    }];
    let findings = diagnose(&host);
    assert_eq!(findings.len(), 1);
    expect(&findings[0], Severity::Error, "missing", "CONFIG_RDMA_RXE");
}

#[test]
fn drivers_without_a_device() {
    let mut host = healthy();
    host.devices.clear();
    host.host.sysfs_devices.clear();
    host.host.uverbs.clear();
    let findings = diagnose(&host);
    assert_eq!(findings.len(), 1, "{findings:#?}");
    expect(
        &findings[0],
        Severity::Error,
        "knows no RDMA device",
        "rdma link add",
    );
}

#[test]
fn no_uverbs_nodes_is_told_by_its_cause() {
    let plant = |host: &mut Inventory| {
        host.devices.clear();
        host.host.uverbs.clear();
    };
    let in_container = only(|host| {
        plant(host);
        host.host.container = Some("/.dockerenv".into());
    });
    expect(
        &in_container,
        Severity::Error,
        "this container",
        "--device /dev/infiniband",
    );
    let no_module = only(|host| {
        plant(host);
        host.host.modules = vec![module("ib_uverbs", false)];
    });
    expect(
        &no_module,
        Severity::Error,
        "ib_uverbs is not loaded",
        "modprobe ib_uverbs",
    );
    let no_node = only(plant);
    expect(&no_node, Severity::Error, "no node", "udevadm");
}

#[test]
fn a_node_that_may_not_be_opened() {
    let finding = only(|host| host.host.uverbs[0].refused = Some(libc::EACCES));
    expect(
        &finding,
        Severity::Error,
        "uverbs0 cannot be opened: Permission denied",
        "chmod",
    );
}

#[test]
fn a_device_without_provider_or_that_does_not_open() {
    let mut host = healthy();
    let device = host.devices.remove(0);
    let findings = diagnose(&host);
    assert_eq!(findings.len(), 1);
    expect(
        &findings[0],
        Severity::Error,
        "does not list it",
        "ibverbs-providers",
    );
    host.unopened.push(UnopenedDevice {
        name: device.name,
        operation: "ibv_open_device",
        errno: libc::EIO,
    });
    let findings = diagnose(&host);
    assert_eq!(findings.len(), 1);
    expect(
        &findings[0],
        Severity::Error,
        "mlx5_0: ibv_open_device fails",
        "dmesg",
    );
}

#[test]
fn a_low_memlock_limit() {
    let low = only(|host| host.host.memlock = Memlock::Bytes(8 << 20));
    expect(&low, Severity::Error, "8192 KiB", "ulimit -l unlimited");
    let overridden = only(|host| {
        host.host.memlock = Memlock::Bytes(8 << 20);
        host.host.ipc_lock = true;
    });
    expect(&overridden, Severity::Note, "CAP_IPC_LOCK", "ulimit");
    let mut enough = healthy();
    enough.host.memlock = Memlock::Bytes(MEMLOCK_ENOUGH);
    assert_eq!(diagnose(&enough), []);
}

#[test]
fn the_only_port_down() {
    let mut host = healthy();
    port(&mut host).state = PortState::Down;
    port(&mut host).physical_state = 3;
    let findings = diagnose(&host);
    assert_eq!(findings.len(), 2, "{findings:#?}");
    expect(
        &findings[0],
        Severity::Error,
        "no RDMA port",
        "bring one up",
    );
    expect(
        &findings[1],
        Severity::Warning,
        "mlx5_0/1 is DOWN (DISABLED)",
        "ip link set eth0 up",
    );
}

#[test]
fn a_spare_port_down_is_a_warning_only() {
    let finding = only(|host| {
        let mut spare = port(host).clone();
        spare.number = 2;
        spare.state = PortState::Down;
        host.devices[0].ports.push(spare);
    });
    expect(&finding, Severity::Warning, "mlx5_0/2 is DOWN", "");
}

#[test]
fn an_infiniband_port_without_subnet_manager() {
    let mut host = healthy();
    port(&mut host).link = LinkLayer::InfiniBand;
    port(&mut host).state = PortState::Init;
    let findings = diagnose(&host);
    expect(&findings[1], Severity::Warning, "INIT", "opensm");
}

#[test]
fn no_roce_v2_gid() {
    let finding = only(|host| port(host).gids.truncate(1));
    expect(
        &finding,
        Severity::Error,
        "no RoCE v2 GID (1 of other types)",
        "IP address",
    );
}

#[test]
fn only_a_link_local_gid() {
    let finding = only(|host| port(host).gids[1] = gid(1, "fe80::1", GidType::RoceV2));
    expect(&finding, Severity::Warning, "link-local", "IP address");
    let mut global = healthy();
    port(&mut global).gids[1] = gid(1, "2001:db8::1", GidType::RoceV2);
    assert_eq!(diagnose(&global), []);
}

#[test]
fn a_small_mtu_names_the_network_device() {
    let finding = only(|host| {
        port(host).active_mtu = Some(Mtu::M1024);
        port(host).netdevs[0].mtu = Some(1500);
    });
    expect(
        &finding,
        Severity::Note,
        "packets of 1024 bytes where 4096 are possible, because eth0 has an MTU of 1500",
        "ip link set eth0 mtu 9000",
    );
    let tiny = only(|host| port(host).active_mtu = Some(Mtu::M512));
    expect(&tiny, Severity::Warning, "512", "mtu");
}

#[test]
fn other_transports_and_missing_dmabuf() {
    let dmabuf = only(|host| host.devices[0].dmabuf = DmabufSupport::Unsupported(libc::EOPNOTSUPP));
    expect(&dmabuf, Severity::Note, "no dmabuf", "GPU");
    let iwarp = only(|host| host.devices[0].transport = Transport::Iwarp);
    expect(&iwarp, Severity::Warning, "no InfiniBand or RoCE", "RoCE");
}
