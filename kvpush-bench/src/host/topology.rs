//! `kvpush-bench devices`: which NIC is near to which GPU, as a matrix like that of `nvidia-smi topo -m`.

use comfy_table::Table;
use kvpush::{
    memory::PciAddress,
    topology::{Gpu, Place, Topology},
};
use serde_json::{Map, Value, json};

use crate::report::compact_table;

const LEGEND: &str = "PIX: at most one PCIe switch between; PXB: several bridges; PHB: the host bridge; NODE: host bridges of one NUMA node; \
     SYS: across NUMA nodes; *: the nearest, used for memory there";

/// Nothing if there is neither a GPU nor a NIC.
pub(super) fn text(found: &Topology) -> String {
    if found.gpus().is_empty() && found.nics().is_empty() {
        return format!(
            "topology: no GPU and no RDMA device; NUMA nodes: {}\n",
            found.numa_nodes().len()
        );
    }
    if found.nics().is_empty() {
        let gpus = found.gpus().iter().map(|gpu| format!("  {}\n", name(gpu)));
        return format!(
            "topology: no RDMA device to be near to; GPUs:\n{}",
            gpus.collect::<String>()
        );
    }
    format!("{}\n{LEGEND}\n", matrix(found))
}

fn matrix(found: &Topology) -> Table {
    let mut table = compact_table();
    let nics = found.nics().iter().map(|nic| nic.name.clone());
    table.set_header(
        ["memory of".to_owned(), "PCI".to_owned(), "NUMA".to_owned()]
            .into_iter()
            .chain(nics),
    );
    for (label, pci, place) in places(found) {
        let node = match place {
            Place::Pci(address) => found.function(address).and_then(|gpu| gpu.numa_node),
            Place::Node(node) => Some(node),
        };
        let nearest = found.nearest(place, &rails(found));
        let distances = found.nics().iter().enumerate().map(|(number, nic)| {
            let distance = found.distance_to_nic(place, nic);
            let mark = if nearest.contains(&number) { "*" } else { "" };
            distance.map_or("?".to_owned(), |distance| format!("{distance}{mark}"))
        });
        let dash = || "-".to_owned();
        let head = [
            label,
            pci.map_or_else(dash, |pci| pci.to_string()),
            node.map_or_else(dash, |node| node.to_string()),
        ];
        table.add_row(head.into_iter().chain(distances).collect::<Vec<_>>());
    }
    table
}

/// GPUs, then NUMA nodes.
fn places(found: &Topology) -> Vec<(String, Option<PciAddress>, Place)> {
    let gpus = found.gpus().iter().enumerate().map(|(number, gpu)| {
        let label = format!("GPU {number} ({})", gpu.vendor);
        (label, Some(gpu.address), Place::Pci(gpu.address))
    });
    let nodes = found.numa_nodes().iter();
    let nodes = nodes.map(|&node| (format!("NUMA node {node}"), None, Place::Node(node)));
    gpus.chain(nodes).collect()
}

fn rails(found: &Topology) -> Vec<Option<PciAddress>> {
    let nics = found.nics().iter();
    nics.map(|nic| nic.functions.first().copied()).collect()
}

fn name(gpu: &Gpu) -> String {
    format!("{} {} {}", gpu.vendor, gpu.address, gpu.nodes.join(" "))
}

/// The same for scripts.
pub(super) fn json(found: &Topology) -> Value {
    let near = |place| {
        let mut distances = Map::new();
        for nic in found.nics() {
            let distance = found.distance_to_nic(place, nic);
            distances.insert(nic.name.clone(), json!(distance.map(|d| d.short())));
        }
        let nearest = found.nearest(place, &rails(found)).into_iter();
        let nearest = nearest.filter_map(|nic| found.nics().get(nic));
        let nearest: Vec<&str> = nearest.map(|nic| nic.name.as_str()).collect();
        (distances, nearest)
    };
    let gpus = found.gpus().iter().map(|gpu| {
        let (distances, nearest) = near(Place::Pci(gpu.address));
        json!({
            "pci": gpu.address.to_string(),
            "vendor": gpu.vendor.to_string(),
            "nodes": gpu.nodes,
            "numa_node": found.function(gpu.address).and_then(|gpu| gpu.numa_node),
            "distances": distances,
            "nearest": nearest,
        })
    });
    let nodes = found.numa_nodes().iter().map(|&node| {
        let (distances, nearest) = near(Place::Node(node));
        json!({ "node": node, "distances": distances, "nearest": nearest })
    });
    let nics = found.nics().iter().map(|nic| {
        let functions = nic.functions.iter().map(ToString::to_string);
        json!({
            "name": nic.name,
            "pci": functions.collect::<Vec<_>>(),
            "netdevs": nic.netdevs,
        })
    });
    json!({
        "gpus": gpus.collect::<Vec<_>>(),
        "numa_nodes": nodes.collect::<Vec<_>>(),
        "nics": nics.collect::<Vec<_>>(),
    })
}
