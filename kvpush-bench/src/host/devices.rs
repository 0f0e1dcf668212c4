//! `kvpush-bench devices`.

use comfy_table::Table;
use kvpush::{
    fabric::verbs::{
        DeviceFacts, DmabufSupport, Inventory, LibraryFacts, Memlock, PortFacts, choose_gid,
        inventory, physical_state_word,
    },
    topology::Topology,
};
use serde_json::{Value, json};

use super::{gpus, paths, topology};
use crate::{
    cli::DevicesArgs,
    error::{Context, Result},
    measure::bytes_text,
    out,
    report::compact_table,
};

/// Prints what was found.
pub(crate) fn devices(args: &DevicesArgs) -> Result<()> {
    let found = inventory();
    let places = Topology::read(&args.sysfs);
    let gpus = gpus::find();
    let tried = paths::try_all(gpus.numbers())?;
    if args.host.json {
        let mut all = json(&found);
        all["topology"] = topology::json(&places);
        all["gpus"] = gpus.json();
        all["paths"] = paths::json(&tried);
        out::say(serde_json::to_string_pretty(&all).context("encode the inventory")?);
    } else {
        out::say(text(&found).trim_end());
        out::say(topology::text(&places).trim_end());
        out::say(gpus.text().trim_end());
        out::say(paths::text(&tried).trim_end());
    }
    Ok(())
}

fn text(found: &Inventory) -> String {
    let library = match &found.library {
        LibraryFacts::Loaded { name } => name.clone(),
        LibraryFacts::Missing { .. } => "libibverbs not found".to_owned(),
        LibraryFacts::NoDeviceList { name, errno } => {
            format!("{name}, which cannot list devices ({})", errno_text(*errno))
        }
    };
    let mut text = format!("library: {library}\nlocked memory: {}\n", memlock(found));
    if found.devices.is_empty() {
        text.push_str("no RDMA device (`kvpush-bench doctor` says why, and what to do)\n");
    } else {
        text.push_str(&format!(
            "{}\n{}\n{}\n",
            ports(found),
            gids(found),
            limits(found)
        ));
    }
    for device in &found.unopened {
        text.push_str(&format!(
            "{} cannot be used: {}: {}\n",
            device.name,
            device.operation,
            errno_text(device.errno)
        ));
    }
    text
}

pub(super) fn table(header: &[&str]) -> Table {
    let mut table = compact_table();
    table.set_header(header);
    table
}

fn ports(found: &Inventory) -> Table {
    let mut table = table(&[
        "port",
        "link layer",
        "state",
        "speed",
        "MTU",
        "max MTU",
        "LID",
        "netdev",
        "NUMA",
        "PCI",
        "firmware",
    ]);
    for (device, port) in each_port(found) {
        let mtu = |mtu: Option<kvpush::fabric::verbs::Mtu>| {
            mtu.map_or("-".to_owned(), |mtu| mtu.to_string())
        };
        let netdevs = port.netdevs.iter().map(|netdev| match netdev.mtu {
            Some(mtu) => format!("{} (MTU {mtu})", netdev.name),
            None => netdev.name.clone(),
        });
        table.add_row(vec![
            format!("{}:{}", device.name, port.number),
            port.link.to_string(),
            match port.refused {
                Some(errno) => errno_text(errno),
                None => format!(
                    "{} ({})",
                    port.state,
                    physical_state_word(port.physical_state)
                ),
            },
            speed(port.bits_per_second),
            mtu(port.active_mtu),
            mtu(port.max_mtu),
            port.lid.to_string(),
            or_dash(netdevs.collect::<Vec<_>>().join(", ")),
            device
                .numa_node
                .map_or("-".to_owned(), |node| node.to_string()),
            or_dash(device.pci.clone().unwrap_or_default()),
            or_dash(device.firmware.clone()),
        ]);
    }
    table
}

fn gids(found: &Inventory) -> Table {
    let mut table = table(&["port", "index", "GID", "type", "netdev", ""]);
    for (device, port) in each_port(found) {
        let chosen = choose_gid(port.link, &port.gids, None).ok();
        for entry in &port.gids {
            table.add_row(vec![
                format!("{}:{}", device.name, port.number),
                entry.index.to_string(),
                entry.gid.to_string(),
                entry.kind.to_string(),
                or_dash(entry.netdev.clone().unwrap_or_default()),
                if chosen == Some(entry) {
                    "used".to_owned()
                } else {
                    String::new()
                },
            ]);
        }
    }
    table
}

fn limits(found: &Inventory) -> Table {
    let mut table = table(&[
        "device",
        "dmabuf",
        "SRQ",
        "relaxed ordering",
        "queue pairs",
        "requests",
        "SGE",
        "CQ entries",
        "regions",
        "region size",
        "reads",
    ]);
    for device in &found.devices {
        let caps = &device.caps;
        table.add_row(vec![
            device.name.clone(),
            dmabuf(device.dmabuf),
            if caps.shared_receive_queue() {
                format!("{} of {}", caps.max_srq, caps.max_srq_wr)
            } else {
                "no".to_owned()
            },
            device
                .relaxed_ordering
                .map_or_else(errno_text, |()| "yes".to_owned()),
            caps.max_qp.to_string(),
            caps.max_qp_wr.to_string(),
            caps.max_sge.to_string(),
            caps.max_cqe.to_string(),
            caps.max_mr.to_string(),
            match caps.max_mr_size {
                u64::MAX => "no limit".to_owned(),
                bytes => bytes_text(bytes),
            },
            caps.max_qp_rd_atom.to_string(),
        ]);
    }
    table
}

fn each_port(found: &Inventory) -> impl Iterator<Item = (&DeviceFacts, &PortFacts)> {
    found
        .devices
        .iter()
        .flat_map(|device| device.ports.iter().map(move |port| (device, port)))
}

fn or_dash(text: String) -> String {
    if text.is_empty() {
        "-".to_owned()
    } else {
        text
    }
}

fn speed(bits_per_second: u64) -> String {
    match bits_per_second {
        0 => "-".to_owned(),
        bits => format!("{} Gb/s", bits as f64 / 1e9),
    }
}

fn errno_text(errno: i32) -> String {
    std::io::Error::from_raw_os_error(errno).to_string()
}

fn dmabuf(support: DmabufSupport) -> String {
    match support {
        DmabufSupport::Supported => "yes".to_owned(),
        DmabufSupport::Unsupported(errno) => format!("no ({})", errno_text(errno)),
        DmabufSupport::NoSymbol => "no (libibverbs too old)".to_owned(),
    }
}

fn memlock(found: &Inventory) -> String {
    let limit = match found.host.memlock {
        Memlock::Unknown => "limit unknown".to_owned(),
        Memlock::Unlimited => "unlimited".to_owned(),
        Memlock::Bytes(bytes) => format!("at most {}", bytes_text(bytes)),
    };
    if found.host.ipc_lock {
        format!("{limit} (CAP_IPC_LOCK overrides it)")
    } else {
        limit
    }
}

fn json(found: &Inventory) -> Value {
    let memlock = match found.host.memlock {
        Memlock::Unknown => Value::Null,
        Memlock::Unlimited => json!("unlimited"),
        Memlock::Bytes(bytes) => json!(bytes),
    };
    let library = match &found.library {
        LibraryFacts::Loaded { name } => json!({ "name": name }),
        LibraryFacts::Missing { tried } => json!({ "missing": tried }),
        LibraryFacts::NoDeviceList { name, errno } => {
            json!({ "name": name, "no_device_list": errno_text(*errno) })
        }
    };
    let unopened = found.unopened.iter();
    let unopened = unopened.map(|device| json!({ "name": device.name, "operation": device.operation, "error": errno_text(device.errno) }));
    let modules = found.host.modules.iter();
    let modules = modules.map(
        |module| json!({ "name": module.name, "loaded": module.loaded, "on_disk": module.on_disk }),
    );
    json!({
        "library": library,
        "memlock_bytes": memlock,
        "ipc_lock": found.host.ipc_lock,
        "container": found.host.container,
        "modules": modules.collect::<Vec<_>>(),
        "devices": found.devices.iter().map(device_json).collect::<Vec<_>>(),
        "unopened": unopened.collect::<Vec<_>>(),
    })
}

fn device_json(device: &DeviceFacts) -> Value {
    let caps = &device.caps;
    json!({
        "name": device.name,
        "firmware": device.firmware,
        "node_guid": format!("{:016x}", device.node_guid),
        "pci": device.pci,
        "numa_node": device.numa_node,
        "dmabuf": device.dmabuf == DmabufSupport::Supported,
        "relaxed_ordering": device.relaxed_ordering.is_ok(),
        "shared_receive_queue": caps.shared_receive_queue(),
        "max_qp": caps.max_qp,
        "max_qp_wr": caps.max_qp_wr,
        "max_sge": caps.max_sge,
        "max_cqe": caps.max_cqe,
        "max_mr": caps.max_mr,
        "max_mr_size": caps.max_mr_size,
        "ports": device.ports.iter().map(port_json).collect::<Vec<_>>(),
    })
}

fn port_json(port: &PortFacts) -> Value {
    let chosen = choose_gid(port.link, &port.gids, None);
    let gid = |entry: &kvpush::fabric::verbs::GidEntry| {
        json!({
            "index": entry.index,
            "gid": entry.gid.to_string(),
            "type": entry.kind.to_string(),
            "netdev": entry.netdev,
            "used": chosen == Ok(entry),
        })
    };
    json!({
        "port": port.number,
        "link_layer": port.link.to_string(),
        "state": port.state.to_string(),
        "physical_state": physical_state_word(port.physical_state),
        "active_mtu": port.active_mtu.map(|mtu| mtu.bytes()),
        "max_mtu": port.max_mtu.map(|mtu| mtu.bytes()),
        "bits_per_second": port.bits_per_second,
        "lid": port.lid,
        "netdevs": port.netdevs.iter().map(|netdev| json!({ "name": netdev.name, "mtu": netdev.mtu })).collect::<Vec<_>>(),
        "gids": port.gids.iter().map(gid).collect::<Vec<_>>(),
        "error": port.refused.map(errno_text),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvpush::fabric::verbs::{
        DeviceCaps, Gid, GidEntry, GidType, LinkLayer, Mtu, NetdevFacts, PortState, Transport,
        UnopenedDevice,
    };

    fn gid(index: u32, address: &str, kind: GidType) -> GidEntry {
        let gid = Gid(address.parse::<std::net::Ipv6Addr>().unwrap().octets());
        GidEntry {
            index,
            gid,
            kind,
            netdev: Some("eth1".into()),
        }
    }

    fn host_with_a_nic() -> Inventory {
        let port = PortFacts {
            number: 1,
            state: PortState::Active,
            physical_state: 5,
            link: LinkLayer::Ethernet,
            active_mtu: Some(Mtu::M1024),
            max_mtu: Some(Mtu::M4096),
            max_message: 1 << 30,
            bits_per_second: 400_000_000_000,
            lid: 0,
            sm_lid: 0,
            grh_required: true,
            refused: None,
            gids: vec![
                gid(0, "fe80::1", GidType::RoceV1),
                gid(3, "::ffff:10.0.0.1", GidType::RoceV2),
            ],
            netdevs: vec![NetdevFacts {
                name: "eth1".into(),
                mtu: Some(1500),
            }],
        };
        let device = DeviceFacts {
            name: "mlx5_0".into(),
            node_guid: 0xab,
            firmware: "28.43".into(),
            transport: Transport::InfiniBand,
            caps: DeviceCaps {
                max_mr_size: u64::MAX,
                max_srq: 5,
                max_srq_wr: 77,
                ..DeviceCaps::default()
            },
            dmabuf: DmabufSupport::Supported,
            relaxed_ordering: Err(libc::EOPNOTSUPP),
            numa_node: Some(1),
            pci: Some("0000:81:00.0".into()),
            ports: vec![port],
        };
        let mut found = Inventory {
            library: LibraryFacts::Loaded {
                name: "libibverbs.so.1".into(),
            },
            devices: vec![device],
            unopened: vec![UnopenedDevice {
                name: "odd0".into(),
                operation: "ibv_open_device",
                errno: libc::EACCES,
            }],
            ..Inventory::default()
        };
        found.host.memlock = Memlock::Bytes(8 << 20);
        found
    }

    #[test]
    fn a_person_finds_everything() {
        let text = text(&host_with_a_nic());
        for words in [
            "libibverbs.so.1",
            "at most 8 MiB",
            "mlx5_0:1",
            "Ethernet",
            "ACTIVE (LINK_UP)",
            "400 Gb/s",
            "eth1 (MTU 1500)",
            "0000:81:00.0",
            "RoCE v1",
            "5 of 77",
            "no limit",
            "odd0 cannot be used: ibv_open_device: Permission denied",
        ] {
            assert!(text.contains(words), "no {words:?} in\n{text}");
        }
        let used: Vec<_> = text
            .lines()
            .filter(|line| line.trim_end().ends_with("used"))
            .collect();
        assert!(
            used.len() == 1 && used[0].contains("::ffff:10.0.0.1"),
            "{text}"
        );
    }

    #[test]
    fn a_script_finds_everything() {
        let found = json(&host_with_a_nic());
        let device = &found["devices"][0];
        let port = &device["ports"][0];
        assert_eq!(
            (
                &device["name"],
                &device["dmabuf"],
                &device["relaxed_ordering"]
            ),
            (&json!("mlx5_0"), &json!(true), &json!(false))
        );
        assert_eq!(
            (&port["state"], &port["active_mtu"], &port["max_mtu"]),
            (&json!("ACTIVE"), &json!(1024), &json!(4096))
        );
        assert_eq!(
            (&port["gids"][0]["used"], &port["gids"][1]["used"]),
            (&json!(false), &json!(true))
        );
        assert_eq!(found["memlock_bytes"], 8 << 20);
        assert_eq!(found["unopened"][0]["name"], "odd0");
    }
}
