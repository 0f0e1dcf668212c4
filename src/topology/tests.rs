//! Recorded trees: two real kinds of host, and what is odd.

use super::{
    Distance::{self, HostBridge, Node, OneSwitch, Same, Switches, System},
    Place, Topology,
    testing::{MI300X, Tree},
};
use crate::memory::PciAddress;

const H100: &str = include_str!("../../tests/data/topology/h100-hgx.txt");

fn read(text: &str) -> Topology {
    Topology::read(&Tree::new(text).root)
}

fn pci(text: &str) -> PciAddress {
    text.parse().unwrap()
}

fn rails(topology: &Topology) -> Vec<Option<PciAddress>> {
    let functions = topology.nics().iter();
    functions
        .map(|nic| nic.functions.first().copied())
        .collect()
}

/// The names of the NICs nearest to a place.
fn nearest(topology: &Topology, place: Place) -> Vec<&str> {
    let found = topology.nearest(place, &rails(topology)).into_iter();
    found
        .map(|nic| topology.nics()[nic].name.as_str())
        .collect()
}

#[test]
fn every_mi300x_has_the_nic_behind_its_switch() {
    let host = read(MI300X);
    assert_eq!((host.gpus().len(), host.nics().len()), (8, 8));
    assert_eq!(host.numa_nodes(), [0, 1]);
    for (number, gpu) in host.gpus().iter().enumerate() {
        let place = Place::Pci(gpu.address);
        assert_eq!(nearest(&host, place), [format!("bnxt_re{number}")]);
        let distances: Vec<_> = host
            .nics()
            .iter()
            .map(|nic| host.distance_to_nic(place, nic).unwrap())
            .collect();
        // The GPU lies behind bridges of its own, so its switch is not the only one on the way.
        for (nic, distance) in distances.into_iter().enumerate() {
            let expected = match nic {
                nic if nic == number => Switches,
                nic if nic / 4 == number / 4 => Node,
                _ => System,
            };
            assert_eq!(distance, expected, "GPU {number}, NIC {nic}");
        }
    }
    assert_eq!(host.gpus()[2].nodes, ["card3", "renderD130"]);
    assert_eq!(host.nics()[5].netdevs, ["ens6np0"]);
}

#[test]
fn every_h100_has_its_compute_nic_and_not_those_for_storage() {
    let host = read(H100);
    assert_eq!((host.gpus().len(), host.nics().len()), (8, 12));
    let names: Vec<_> = host.nics().iter().map(|nic| nic.name.as_str()).collect();
    assert_eq!(names[9..], ["mlx5_9", "mlx5_10", "mlx5_11"], "by number");
    for (gpu, nic) in host.gpus().iter().zip([0, 3, 4, 5, 6, 9, 10, 11]) {
        let place = Place::Pci(gpu.address);
        assert_eq!(nearest(&host, place), [format!("mlx5_{nic}")]);
        assert_eq!(
            host.distance_to_nic(place, &host.nics()[nic]),
            Some(OneSwitch)
        );
    }
    let [first, second] = [1, 2].map(|nic: usize| host.nics()[nic].functions[0]);
    assert_eq!(host.distance(first, second), Some(OneSwitch), "one slot");
    let gpu = host.gpus()[0].address;
    assert_eq!(host.distance(gpu, first), Some(Node));
    assert_eq!(host.distance(gpu, host.gpus()[7].address), Some(System));
}

#[test]
fn host_memory_is_near_to_the_nics_of_its_node() {
    let host = read(H100);
    let of_node = |node| nearest(&host, Place::Node(node));
    assert_eq!(
        of_node(0),
        ["mlx5_0", "mlx5_1", "mlx5_2", "mlx5_3", "mlx5_4", "mlx5_5"]
    );
    assert_eq!(
        of_node(1),
        ["mlx5_6", "mlx5_7", "mlx5_8", "mlx5_9", "mlx5_10", "mlx5_11"]
    );
}

/// Each class of distance, on one host.
const CLASSES: &str = "
nodes 0 1
pci0000:00
  0000:00:01.0 class=060400 numa=0
    0000:01:00.0 class=060400 numa=0
      0000:02:00.0 class=060400 numa=0
        0000:03:00.0 class=020000 numa=0 ib=a
        0000:03:00.1 class=020000 numa=0
      0000:02:01.0 class=060400 numa=0
        0000:04:00.0 class=030200 id=10de:2330 numa=0
      0000:02:02.0 class=060400 numa=0
        0000:05:00.0 class=060400 numa=0
          0000:06:00.0 class=060400 numa=0
            0000:07:00.0 class=020000 numa=0
  0000:00:02.0 class=060400 numa=0
    0000:08:00.0 class=020000 numa=0
pci0000:40
  0000:40:01.0 class=060400 numa=0
    0000:41:00.0 class=020000 numa=0
pci0000:80
  0000:80:01.0 class=060400 numa=1
    0000:81:00.0 class=020000 numa=1
";

#[test]
fn distances_are_those_of_nvidia_smi() {
    let host = read(CLASSES);
    let gpu = pci("0000:04:00.0");
    for (other, expected) in [
        ("0000:04:00.0", Same),
        ("0000:03:00.0", OneSwitch),
        ("0000:03:00.1", OneSwitch),
        ("0000:07:00.0", Switches),
        ("0000:08:00.0", HostBridge),
        ("0000:41:00.0", Node),
        ("0000:81:00.0", System),
    ] {
        assert_eq!(host.distance(gpu, pci(other)), Some(expected), "{other}");
        assert_eq!(host.distance(pci(other), gpu), Some(expected), "{other}");
    }
    assert_eq!(host.distance(gpu, pci("0000:99:00.0")), None);
    assert!(Same < OneSwitch && OneSwitch < Switches && Switches < HostBridge);
    assert!(HostBridge < Node && Node < System);
    let names = [Same, OneSwitch, Switches, HostBridge, Node, System].map(Distance::short);
    assert_eq!(names, ["X", "PIX", "PXB", "PHB", "NODE", "SYS"]);
}

#[test]
fn all_that_are_equally_near_are_nearest() {
    let host = read(CLASSES);
    let rails = [
        "0000:41:00.0",
        "0000:03:00.1",
        "0000:81:00.0",
        "0000:03:00.0",
    ];
    let rails = rails.map(|rail| Some(pci(rail)));
    let of_gpu = |rails: &[_]| host.nearest(Place::Pci(pci("0000:04:00.0")), rails);
    assert_eq!(of_gpu(&rails), [1, 3]);
    // A rail of which nothing is known is never nearer than one that is.
    assert_eq!(of_gpu(&[None, rails[2]]), [1]);
    assert_eq!(of_gpu(&[None, None]), [0, 1], "all, if nothing is known");
    assert_eq!(of_gpu(&[]), [0; 0]);
    let nowhere = Place::Pci(pci("0000:99:00.0"));
    assert_eq!(host.nearest(nowhere, &rails), [0, 1, 2, 3]);
}

#[test]
fn a_host_without_numa_has_no_interconnect() {
    let text = |nodes: &str, numa: &str| {
        format!(
            "{nodes}\npci0000:00\n  0000:00:01.0 class=030200 id=1002:744c{numa}\npci0000:40\n  \
             0000:40:01.0 class=020000{numa} ib=mlx5_0\n"
        )
    };
    let distance = |text: &str| {
        let host = read(text);
        host.distance(pci("0000:00:01.0"), pci("0000:40:01.0"))
    };
    // No file at all, and the −1 of firmware that says nothing.
    assert_eq!(distance(&text("", "")), Some(Node));
    assert_eq!(distance(&text("nodes 0", " numa=-1")), Some(Node));
    assert_eq!(distance(&text("nodes 0 1", " numa=-1")), Some(System));
    assert_eq!(distance(&text("nodes 0 1", " numa=1")), Some(Node));
    let unknown = read(&text("nodes 0 1", " numa=-1"));
    assert_eq!(
        unknown.function(pci("0000:40:01.0")).unwrap().numa_node,
        None
    );
}

#[test]
fn a_function_has_the_node_of_the_bridge_above() {
    let host = read(
        "nodes 0 1\npci0000:00\n  0000:00:01.0 class=060400 numa=1\n    0000:01:00.0 class=060400 numa=-1\n      \
         0000:02:00.0 class=020000 numa=-1 ib=mlx5_0\n",
    );
    assert_eq!(
        host.function(pci("0000:02:00.0")).unwrap().numa_node,
        Some(1)
    );
}

#[test]
fn virtual_functions_are_as_near_as_their_nic_and_say_whose_they_are() {
    let host = read(
        "nodes 0 1\npci0000:00\n  0000:00:01.0 class=060400 numa=0\n    0000:01:00.0 class=060400 numa=0\n      \
         0000:02:00.0 class=060400 numa=0\n        0000:03:00.0 class=020000 id=15b3:1021 numa=0 ib=mlx5_0\n        \
         0000:03:00.2 class=020000 id=15b3:101e numa=0 ib=mlx5_1 vf-of=0000:03:00.0\n        \
         0000:03:01.1 class=020000 id=15b3:101e numa=0 ib=mlx5_2 vf-of=0000:03:00.0\n      \
         0000:02:01.0 class=060400 numa=0\n        0000:04:00.0 class=030200 id=10de:2330 numa=0\n",
    );
    let gpu = Place::Pci(pci("0000:04:00.0"));
    assert_eq!(nearest(&host, gpu), ["mlx5_0", "mlx5_1", "mlx5_2"]);
    let physical = |nic: usize| {
        host.function(host.nics()[nic].functions[0])
            .unwrap()
            .physical
    };
    assert_eq!(
        [0, 1, 2].map(physical),
        [None, Some(pci("0000:03:00.0")), Some(pci("0000:03:00.0"))]
    );
}

#[test]
fn a_bond_is_as_near_as_its_nearest_function() {
    let host = read(
        "nodes 0 1\npci0000:00\n  0000:00:01.0 class=060400 numa=0\n    \
         0000:01:00.0 class=020000 numa=0 ib=mlx5_bond_0 net=eth0\npci0000:80\n  0000:80:01.0 class=060400 numa=1\n    \
         0000:81:00.0 class=020000 numa=1 net=eth1\n  0000:80:02.0 class=030200 id=10de:2330 numa=1\nbond bond0 \
         slaves=eth0,eth1 gid-of=mlx5_bond_0\n",
    );
    let bond = &host.nics()[0];
    assert_eq!(bond.functions, [pci("0000:01:00.0"), pci("0000:81:00.0")]);
    assert_eq!(bond.netdevs, ["bond0", "eth0"]);
    let gpu = Place::Pci(pci("0000:80:02.0"));
    assert_eq!(host.distance_to_nic(gpu, bond), Some(HostBridge));
    let rail = bond.functions[0];
    assert_eq!(host.distance_from(gpu, rail), Some(System));
    assert_eq!(host.distance_to_rail(gpu, rail), Some(HostBridge));
}

#[test]
fn software_devices_are_where_their_network_device_is() {
    let host = read(
        "nodes 0\npci0000:00\n  0000:00:01.0 class=020000 numa=0 net=eth0\nsoftware rxe0 parent=eth0\nsoftware rxe1 \
         parent=veth0\nsoftware siw0\n",
    );
    let functions: Vec<_> = host
        .nics()
        .iter()
        .map(|nic| nic.functions.as_slice())
        .collect();
    assert_eq!(functions, [&[pci("0000:00:01.0")][..], &[], &[]]);
    assert_eq!(host.distance_to_nic(Place::Node(0), &host.nics()[1]), None);
}

#[test]
fn missing_and_damaged_files_cost_no_more_than_themselves() {
    let tree = Tree::new(MI300X);
    let gone = |path: &str| std::fs::remove_file(tree.root.join(path)).unwrap();
    // A link into nothing, as of a device that is being removed.
    gone("bus/pci/devices/0000:05:00.0");
    std::os::unix::fs::symlink("nowhere", tree.root.join("bus/pci/devices/0000:05:00.0")).unwrap();
    gone("bus/pci/devices/0000:26:00.0/class");
    gone("bus/pci/devices/0000:46:00.0/numa_node");
    std::fs::write(
        tree.root.join("bus/pci/devices/0000:65:00.0/vendor"),
        [0xff, 0xfe],
    )
    .unwrap();
    gone("class/infiniband/bnxt_re7/device");
    let host = Topology::read(&tree.root);
    let gpus: Vec<_> = host.gpus().iter().map(|gpu| gpu.address).collect();
    let expected = ["46", "85", "a6", "c6", "e5"].map(|bus| pci(&format!("0000:{bus}:00.0")));
    assert_eq!(gpus, expected);
    assert_eq!(nearest(&host, Place::Pci(expected[0])), ["bnxt_re2"]);
    assert!(host.nics()[7].functions.is_empty());
    assert_eq!(
        nearest(&host, Place::Pci(expected[4])),
        ["bnxt_re4", "bnxt_re5", "bnxt_re6"],
        "its own is not known any more"
    );
}

#[test]
fn a_host_without_pci_has_nothing() {
    let empty = Topology::read(std::path::Path::new("/nonexistent"));
    assert_eq!(empty, Topology::default());
    assert_eq!(empty.nearest(Place::Node(0), &[None, None]), [0, 1]);
    // Whatever this host is, reading it does not fail, and every GPU and NIC is at a known place.
    let host = Topology::host();
    for gpu in host.gpus() {
        assert_eq!(host.distance(gpu.address, gpu.address), Some(Same));
    }
}

#[test]
fn trees_that_begin_anew_are_one() {
    // Behind Intel's VMD: a host bridge within the tree of another.
    let host = read(
        "pci0000:00\n  0000:00:0e.0 class=010400\n    pci10000:e0\n      10000:e0:01.0 class=060400\n        \
         10000:e1:00.0 class=020000 ib=mlx5_0\n",
    );
    let nic = host.function(pci("10000:e1:00.0")).unwrap();
    assert_eq!(nic.host_bridge, "pci0000:00");
    assert_eq!(nic.bridges, [pci("0000:00:0e.0"), pci("10000:e0:01.0")]);
}
