//! Where devices are: the PCI tree and the NUMA nodes of a host, as its sysfs describes them, and how far two of its
//! functions are from each other.
//!
//! Pure but for reading files below a root that the caller names: tests read recorded trees. Nothing here fails. What a
//! kernel does not tell (no NUMA, no PCI, no InfiniBand) is absent from the result, and a distance that cannot be known
//! is `None`, which is never nearer than one that is. Any thread may call.
//!
//! | file | holds |
//! |---|---|
//! | `mod` | what was found, and its questions |
//! | `distance` | the classes of distance, and the rule for two places in the tree |
//! | `sysfs` | reading the tree |

mod distance;
mod sysfs;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

use std::path::Path;

use crate::memory::PciAddress;

pub use distance::Distance;

/// A PCI function and its place in the tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Function {
    /// Its address.
    pub address: PciAddress,
    /// The host bridge above it, as sysfs names it: `pci0000:15`.
    pub host_bridge: String,
    /// The bridges between them, from the root port downwards.
    pub bridges: Vec<PciAddress>,
    /// The NUMA node, of itself or of the nearest bridge above that has one.
    pub numa_node: Option<u32>,
    /// Class, subclass and programming interface: `0x020000` is an Ethernet controller.
    pub class: u32,
    /// Vendor.
    pub vendor: u16,
    /// Device.
    pub device: u16,
    /// The physical function, if this is a virtual one (SR-IOV).
    pub physical: Option<PciAddress>,
}

/// An RDMA device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nic {
    /// Its name: `mlx5_0`.
    pub name: String,
    /// The PCI functions behind it: none for software devices without a real network device, several for a bond.
    pub functions: Vec<PciAddress>,
    /// Network devices on the same functions, or of the bond.
    pub netdevs: Vec<String>,
}

/// A GPU of AMD or NVIDIA.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gpu {
    /// Its function.
    pub address: PciAddress,
    /// Who made it.
    pub vendor: GpuVendor,
    /// The nodes below `/dev/dri`, if its driver makes any: `card1`, `renderD128`.
    pub nodes: Vec<String>,
}

/// Who made a GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GpuVendor {
    /// AMD, PCI vendor 1002.
    Amd,
    /// NVIDIA, PCI vendor 10de.
    Nvidia,
}

impl std::fmt::Display for GpuVendor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Amd => "AMD",
            Self::Nvidia => "NVIDIA",
        })
    }
}

/// Somewhere that memory can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    /// On the device of a PCI function.
    Pci(PciAddress),
    /// In the memory of a NUMA node.
    Node(u32),
}

/// What was found of a host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Topology {
    /// All PCI functions, by address.
    functions: Vec<Function>,
    gpus: Vec<Gpu>,
    nics: Vec<Nic>,
    /// NUMA nodes, ascending.
    nodes: Vec<u32>,
}

impl Topology {
    /// Reads this host's `/sys`. Takes some milliseconds.
    pub fn host() -> Self {
        Self::read(Path::new("/sys"))
    }

    /// Reads the sysfs tree at `root`.
    pub fn read(root: &Path) -> Self {
        sysfs::read(root)
    }

    /// GPUs, by address.
    pub fn gpus(&self) -> &[Gpu] {
        &self.gpus
    }

    /// RDMA devices, by name, numbers in their order (`mlx5_2` before `mlx5_10`).
    pub fn nics(&self) -> &[Nic] {
        &self.nics
    }

    /// NUMA nodes.
    pub fn numa_nodes(&self) -> &[u32] {
        &self.nodes
    }

    /// The function at `address`.
    pub fn function(&self, address: PciAddress) -> Option<&Function> {
        let found = self
            .functions
            .binary_search_by_key(&address, |function| function.address);
        found.ok().and_then(|index| self.functions.get(index))
    }

    /// How far two functions are from each other; `None` if one of them is not there.
    pub fn distance(&self, a: PciAddress, b: PciAddress) -> Option<Distance> {
        let (a, b) = (self.function(a)?, self.function(b)?);
        Some(Distance::between(a, b, self.nodes.len()))
    }

    /// How far a function is from a place; `None` if it cannot be told.
    pub fn distance_from(&self, place: Place, function: PciAddress) -> Option<Distance> {
        match place {
            Place::Pci(address) => self.distance(address, function),
            Place::Node(node) => {
                let function = self.function(function)?;
                Some(Distance::to_node(function, node, self.nodes.len()))
            }
        }
    }

    /// How far an RDMA device is from a place: that of its nearest function.
    pub fn distance_to_nic(&self, place: Place, nic: &Nic) -> Option<Distance> {
        let functions = nic.functions.iter();
        functions
            .filter_map(|&function| self.distance_from(place, function))
            .min()
    }

    /// How far the rail behind `function` is from a place. Like [`Topology::distance_from`], but a bonded device,
    /// which is known by one of its functions, is as near as its nearest.
    pub fn distance_to_rail(&self, place: Place, function: PciAddress) -> Option<Distance> {
        let bond = self.nics.iter().find(|nic| {
            // A virtual function's device and a bond's may begin with the same one; the bond is the one with several.
            nic.functions.len() > 1 && nic.functions.contains(&function)
        });
        match bond {
            Some(nic) => self.distance_to_nic(place, nic),
            None => self.distance_from(place, function),
        }
    }

    /// The nearest of `rails` (each known by its PCI function, if it has one): all that share the least distance, or
    /// all there are if no distance can be told. Ascending.
    pub fn nearest(&self, place: Place, rails: &[Option<PciAddress>]) -> Vec<usize> {
        let distances: Vec<Option<Distance>> = rails
            .iter()
            .map(|rail| self.distance_to_rail(place, (*rail)?))
            .collect();
        let least = distances.iter().flatten().min();
        (0..rails.len())
            .filter(|&rail| least.is_none() || distances[rail].as_ref() == least)
            .collect()
    }
}
