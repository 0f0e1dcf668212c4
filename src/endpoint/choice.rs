//! Which rails a pool uses: a preference by distance, or names.
//!
//! Pure but for the topology, which is read once for each endpoint, when the first pool in a device's memory is
//! registered. Any thread may call.
//!
//! Invariant: of two rails that a pool may use, one of less distance is never passed over for one of more while it
//! works. Distances of both ends are added, because a transfer crosses both.

use super::EndpointError;
use crate::{
    fabric::{DeviceInfo, FabricKind},
    memory::Memory,
    topology::{Place, Topology},
};

/// Which rails the pages of a pool may go through, and which are preferred.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum RailChoice {
    /// All; those nearest to the device that holds the memory are preferred, the others serve where no lane joins near
    /// ones, or when those have failed. All alike for host memory.
    #[default]
    Nearest,
    /// All alike.
    All,
    /// Only these, alike: `mlx5_0`, or `mlx5_0:1` for one port.
    Named(Vec<String>),
}

/// How far a rail is from a pool's memory; nothing if the pool does not use it.
pub(crate) type RailDistance = Option<u8>;

/// The distance of a rail of which nothing is known, where something is known of another.
const UNKNOWN: u8 = 6;

/// How far each of `rails` is for a pool of `memory`.
///
/// # Errors
///
/// A name that no rail has.
pub(super) fn distances<'a>(
    choice: &RailChoice,
    memory: impl IntoIterator<Item = &'a dyn Memory>,
    rails: &[&DeviceInfo],
    topology: impl FnOnce() -> &'a Topology,
) -> Result<Vec<RailDistance>, EndpointError> {
    match choice {
        RailChoice::All => Ok(vec![Some(0); rails.len()]),
        RailChoice::Named(names) => named(names, rails),
        RailChoice::Nearest => {
            let places = memory
                .into_iter()
                .filter_map(|memory| memory.device()?.location());
            let mut places: Vec<Place> = places.map(Place::Pci).collect();
            places.dedup();
            if places.is_empty() {
                return Ok(vec![Some(0); rails.len()]);
            }
            let topology = topology();
            Ok(nearest(&places, rails, topology))
        }
    }
}

fn named(names: &[String], rails: &[&DeviceInfo]) -> Result<Vec<RailDistance>, EndpointError> {
    let is = |name: &str, rail: &DeviceInfo| match name.split_once([':', '/']) {
        Some((device, port)) => device == rail.name && port.parse() == Ok(rail.port),
        None => name == rail.name,
    };
    let stranger = names
        .iter()
        .find(|name| !rails.iter().any(|rail| is(name, rail)));
    if let Some(name) = stranger {
        return Err(EndpointError::Setting {
            setting: "rails",
            value: name.clone(),
            why: "no rail of this endpoint has that name",
        });
    }
    if names.is_empty() {
        return Err(EndpointError::Setting {
            setting: "rails",
            value: "no name".to_owned(),
            why: "pages need a rail",
        });
    }
    let used = rails.iter().map(|rail| {
        let wanted = names.iter().any(|name| is(name, rail));
        wanted.then_some(0)
    });
    Ok(used.collect())
}

/// Rails of different fabrics are not compared: two peers use one fabric only.
fn nearest(places: &[Place], rails: &[&DeviceInfo], topology: &Topology) -> Vec<RailDistance> {
    let mut distances: Vec<Option<u8>> = rails
        .iter()
        .map(|rail| {
            // A pool that spans devices is as far from a rail as its farthest part.
            let of_place = |&place| topology.distance_to_rail(place, rail.pci?);
            let each: Option<Vec<_>> = places.iter().map(of_place).collect();
            each?.into_iter().max().map(|distance| distance as u8)
        })
        .collect();
    let kinds: Vec<FabricKind> = rails.iter().map(|rail| rail.kind).collect();
    for kind in &kinds {
        let known = kinds.iter().zip(&distances);
        let known = known.filter(|(other, _)| *other == kind);
        let unknown = match known.clone().any(|(_, distance)| distance.is_some()) {
            true => UNKNOWN,
            false => 0,
        };
        let gaps = kinds.iter().zip(&mut distances);
        gaps.filter(|(other, distance)| *other == kind && distance.is_none())
            .for_each(|(_, distance)| *distance = Some(unknown));
    }
    distances
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        fabric::{Device, sim::SimNet},
        memory::{DmabufMemory, HostMemory, PciAddress},
        topology::testing::{MI300X, Tree},
    };

    fn memory_at(place: Option<&str>) -> DmabufMemory {
        let file = HostMemory::memfd("kvpush-test", 4096).unwrap();
        let fd = file.fd().unwrap().try_clone_to_owned().unwrap();
        let memory = DmabufMemory::import(fd, 0, 4096).unwrap();
        match place {
            Some(place) => memory.at(place.parse().unwrap()),
            None => memory,
        }
    }

    /// The rails of an MI300X host, by their places.
    fn choose(
        choice: &RailChoice,
        memory: &[&dyn Memory],
        places: &[Option<&str>],
    ) -> Result<Vec<RailDistance>, EndpointError> {
        let net = SimNet::free_running(1);
        let devices: Vec<_> = (0..)
            .zip(places)
            .map(|(number, place)| {
                let name = format!("rail{number}");
                match place {
                    Some(place) => net.device_at(&name, place.parse::<PciAddress>().unwrap()),
                    None => net.device(&name),
                }
            })
            .collect();
        let rails: Vec<_> = devices.iter().map(|device| device.info()).collect();
        let topology = Topology::read(&Tree::new(MI300X).root);
        distances(choice, memory.iter().copied(), &rails, || &topology)
    }

    const NICS: [Option<&str>; 3] = [
        Some("0000:27:00.0"),
        Some("0000:06:00.0"),
        Some("0000:86:00.0"),
    ];

    #[test]
    fn the_rail_behind_the_same_switch_is_nearest() {
        let gpu = memory_at(Some("0000:05:00.0"));
        let found = choose(&RailChoice::Nearest, &[&gpu], &NICS).unwrap();
        assert_eq!(found, [Some(4), Some(2), Some(5)]);
        let other = memory_at(Some("0000:26:00.0"));
        let found = choose(&RailChoice::Nearest, &[&gpu, &other], &NICS).unwrap();
        assert_eq!(
            found,
            [Some(4), Some(4), Some(5)],
            "of two GPUs the farther"
        );
    }

    #[test]
    fn what_is_not_known_is_never_nearer() {
        let gpu = memory_at(Some("0000:05:00.0"));
        let found = choose(&RailChoice::Nearest, &[&gpu], &[None, NICS[2]]).unwrap();
        assert_eq!(found, [Some(6), Some(5)]);
        let found = choose(&RailChoice::Nearest, &[&gpu], &[None, None]).unwrap();
        assert_eq!(found, [Some(0), Some(0)]);
        let elsewhere = memory_at(Some("0000:99:00.0"));
        let found = choose(&RailChoice::Nearest, &[&elsewhere], &NICS).unwrap();
        assert_eq!(found, [Some(0); 3]);
    }

    #[test]
    fn host_memory_and_all_know_no_distance() {
        let host = HostMemory::new(4096).unwrap();
        let (gpu, nowhere) = (memory_at(Some("0000:05:00.0")), memory_at(None));
        for memory in [&host as &dyn Memory, &nowhere] {
            let found = choose(&RailChoice::Nearest, &[memory], &NICS).unwrap();
            assert_eq!(found, [Some(0); 3]);
        }
        let found = choose(&RailChoice::All, &[&gpu], &NICS).unwrap();
        assert_eq!(found, [Some(0); 3]);
    }

    #[test]
    fn named_rails_and_no_others() {
        let names = |names: &[&str]| {
            let names = names.iter().map(|name| (*name).to_owned()).collect();
            choose(&RailChoice::Named(names), &[], &NICS)
        };
        assert_eq!(
            names(&["rail2", "rail0:1"]).unwrap(),
            [Some(0), None, Some(0)]
        );
        for bad in [&["rail3"][..], &["rail0:2"], &["rail1", "mlx5_0"], &[]] {
            let error = names(bad).unwrap_err();
            let setting = matches!(
                error,
                EndpointError::Setting {
                    setting: "rails",
                    ..
                }
            );
            assert!(setting, "{error}");
        }
    }
}
