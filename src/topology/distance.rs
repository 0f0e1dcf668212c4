//! The classes of distance between two places of a host, named as `nvidia-smi topo -m` and NCCL name them.

use std::fmt;

use super::Function;

/// How far two PCI functions are from each other, the nearest first. What a transfer crosses decides how fast it is,
/// and whether peer-to-peer access works at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Distance {
    /// The same function.
    Same,
    /// At most one PCIe switch between them (`PIX`).
    OneSwitch,
    /// Several PCIe bridges, but no host bridge (`PXB`).
    Switches,
    /// The same host bridge (`PHB`).
    HostBridge,
    /// Several host bridges of one NUMA node (`NODE`).
    Node,
    /// The interconnect between NUMA nodes (`SYS`).
    System,
}

impl Distance {
    /// Its abbreviation in `nvidia-smi topo -m`.
    pub const fn short(self) -> &'static str {
        match self {
            Self::Same => "X",
            Self::OneSwitch => "PIX",
            Self::Switches => "PXB",
            Self::HostBridge => "PHB",
            Self::Node => "NODE",
            Self::System => "SYS",
        }
    }

    /// Between two functions of a host with `nodes` NUMA nodes.
    ///
    /// A switch is an upstream bridge and its downstream ones, so two functions below one switch have the upstream
    /// bridge in common and at most one bridge each below that.
    pub(super) fn between(a: &Function, b: &Function, nodes: usize) -> Self {
        if a.address == b.address {
            return Self::Same;
        }
        if a.host_bridge != b.host_bridge {
            return Self::across(a.numa_node, b.numa_node, nodes);
        }
        let common = a.bridges.iter().zip(&b.bridges);
        let common = common.take_while(|(a, b)| a == b).count();
        let deepest = a.bridges.len().max(b.bridges.len()) - common;
        match (common, deepest) {
            (0, _) => Self::HostBridge,
            (_, 0..=1) => Self::OneSwitch,
            _ => Self::Switches,
        }
    }

    /// From a function to the memory of a NUMA node.
    pub(super) fn to_node(function: &Function, node: u32, nodes: usize) -> Self {
        Self::across(function.numa_node, Some(node), nodes)
    }

    /// Where a node is not known, a host that has no more than one has no interconnect to cross; another may.
    fn across(a: Option<u32>, b: Option<u32>, nodes: usize) -> Self {
        let same = match (a, b) {
            (Some(a), Some(b)) => a == b,
            _ => nodes <= 1,
        };
        if same { Self::Node } else { Self::System }
    }
}

impl fmt::Display for Distance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.short())
    }
}
