//! Reading the tree: `Documentation/ABI/testing/sysfs-bus-pci`, `sysfs-class-infiniband` and `sysfs-class-net` of the
//! kernel say what lies where.
//!
//! A function's place is the real path of its entry in `bus/pci/devices`: the host bridge, every bridge below it, and
//! itself, one folder each.

use std::{
    fs,
    path::{Path, PathBuf},
};

use super::{Function, Gpu, GpuVendor, Nic, Topology};
use crate::memory::PciAddress;

/// Display controllers (VGA, 3D, other) and processing accelerators: what GPUs call themselves.
const GPU_CLASSES: [u32; 4] = [0x0300, 0x0302, 0x0380, 0x1200];

pub(super) fn read(root: &Path) -> Topology {
    let mut functions: Vec<Function> = names(&root.join("bus/pci/devices"))
        .iter()
        .filter_map(|name| function(&root.join("bus/pci/devices").join(name)))
        .collect();
    functions.sort_by_key(|function| function.address);
    inherit_nodes(&mut functions);
    let gpus = functions
        .iter()
        .filter_map(|function| gpu(root, function))
        .collect();
    let mut nics: Vec<Nic> = names(&root.join("class/infiniband"))
        .into_iter()
        .map(|name| nic(root, name))
        .collect();
    nics.sort_by_key(|nic| natural(&nic.name));
    let mut nodes: Vec<u32> = names(&root.join("devices/system/node"))
        .iter()
        .filter_map(|name| name.strip_prefix("node")?.parse().ok())
        .collect();
    nodes.sort_unstable();
    Topology {
        functions,
        gpus,
        nics,
        nodes,
    }
}

/// One entry of `bus/pci/devices`; `None` if it is not what it should be, such as one that has just been removed.
fn function(entry: &Path) -> Option<Function> {
    let real = fs::canonicalize(entry).ok()?;
    let mut host_bridge = None;
    let mut path = Vec::new();
    for part in real.iter().filter_map(|part| part.to_str()) {
        match part.parse::<PciAddress>() {
            // Behind some controllers (Intel VMD) the tree begins anew; what is above is on the way all the same.
            Ok(address) if host_bridge.is_some() => path.push(address),
            _ if part.starts_with("pci") && part.contains(':') && host_bridge.is_none() => {
                host_bridge = Some(part.to_owned());
            }
            _ => {}
        }
    }
    let address = path.pop()?;
    Some(Function {
        address,
        host_bridge: host_bridge?,
        bridges: path,
        // −1 where the firmware says nothing.
        numa_node: line(&entry.join("numa_node")).and_then(|text| text.parse().ok()),
        class: hex(&entry.join("class")).unwrap_or(0),
        vendor: hex(&entry.join("vendor")).unwrap_or(0) as u16,
        device: hex(&entry.join("device")).unwrap_or(0) as u16,
        physical: link_name(&entry.join("physfn")).and_then(|name| name.parse().ok()),
    })
}

/// Firmware often gives a node to bridges only. Bridges come before what is below them in no order, so each function
/// asks its own.
fn inherit_nodes(functions: &mut [Function]) {
    let known: Vec<(PciAddress, Option<u32>)> = functions
        .iter()
        .map(|function| (function.address, function.numa_node))
        .collect();
    for function in functions {
        let above = function.bridges.iter().rev().find_map(|bridge| {
            let found = known.binary_search_by_key(bridge, |(address, _)| *address);
            known.get(found.ok()?)?.1
        });
        function.numa_node = function.numa_node.or(above);
    }
}

fn gpu(root: &Path, function: &Function) -> Option<Gpu> {
    let vendor = match function.vendor {
        0x1002 => GpuVendor::Amd,
        0x10de => GpuVendor::Nvidia,
        _ => return None,
    };
    if !GPU_CLASSES.contains(&(function.class >> 8)) {
        return None;
    }
    let device = root
        .join("bus/pci/devices")
        .join(function.address.to_string());
    let mut nodes = names(&device.join("drm"));
    nodes.retain(|name| name.starts_with("card") || name.starts_with("renderD"));
    Some(Gpu {
        address: function.address,
        vendor,
        nodes,
    })
}

fn nic(root: &Path, name: String) -> Nic {
    let class = root.join("class/infiniband").join(&name);
    let mut functions: Vec<PciAddress> = pci_of(&class).into_iter().collect();
    let mut netdevs = names(&class.join("device/net"));
    // A RoCE device over a bond hangs on one function, but speaks through all: its GIDs name the bond's network
    // device, which names the others. A software device has no function, but a network device, which may have one.
    let mut related: Vec<String> = line(&class.join("parent")).into_iter().collect();
    for port in names(&class.join("ports")) {
        let table = class.join("ports").join(port).join("gid_attrs/ndevs");
        related.extend(
            names(&table)
                .iter()
                .filter_map(|row| line(&table.join(row))),
        );
    }
    related.sort();
    related.dedup();
    for netdev in related {
        let folder = root.join("class/net").join(&netdev);
        let members = line(&folder.join("bonding/slaves")).unwrap_or_default();
        let below = members
            .split_whitespace()
            .map(|member| root.join("class/net").join(member));
        for folder in below.chain([folder]) {
            functions.extend(pci_of(&folder));
        }
        netdevs.push(netdev);
    }
    functions.sort_unstable();
    functions.dedup();
    netdevs.sort();
    netdevs.dedup();
    Nic {
        name,
        functions,
        netdevs,
    }
}

/// The PCI function that an entry's link `device` leads to.
fn pci_of(entry: &Path) -> Option<PciAddress> {
    link_name(&entry.join("device"))?.parse().ok()
}

/// The last part of where a link leads.
fn link_name(link: &Path) -> Option<String> {
    let target: PathBuf = fs::canonicalize(link).ok()?;
    Some(target.file_name()?.to_str()?.to_owned())
}

/// The entries of a folder, sorted; none if it is not there.
fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect();
    names.sort();
    names
}

/// The first line of a small file; `None` if it is missing or empty.
fn line(file: &Path) -> Option<String> {
    let text = fs::read_to_string(file).ok()?;
    let line = text.lines().next()?.trim();
    (!line.is_empty()).then(|| line.to_owned())
}

fn hex(file: &Path) -> Option<u32> {
    u32::from_str_radix(line(file)?.trim_start_matches("0x"), 16).ok()
}

/// A key that sorts `mlx5_2` before `mlx5_10`.
fn natural(name: &str) -> (String, u64, String) {
    let digits = name.len() - name.trim_end_matches(|c: char| c.is_ascii_digit()).len();
    let (text, number) = name.split_at(name.len() - digits);
    (
        text.to_owned(),
        number.parse().unwrap_or(u64::MAX),
        number.to_owned(),
    )
}
