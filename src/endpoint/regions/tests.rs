//! The policy and the registry, with rails and memory that refuse on demand.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    sync::Arc,
};

use parking_lot::Mutex;

use super::*;
use crate::{
    fabric::{
        Capabilities, Context, DeviceInfo, DmabufRange, FabricError, FabricErrorKind, FabricKind,
        LinkState, MrId, sim::SimConfig,
    },
    memory::{Copier, DeviceMemory, Dmabuf, HostMemory, MemoryError, MemoryKind, PciAddress},
};

/// What a rail was asked to register: `None` for a dmabuf's descriptor if by address.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Asked {
    dmabuf: Option<(i32, u64)>,
    address: u64,
    length: u64,
    access: Access,
}

struct Rail {
    info: DeviceInfo,
    refuses_dmabufs: bool,
    refuses_addresses: bool,
    /// Registrations that succeed before all fail.
    room: usize,
    asked: Mutex<Vec<Asked>>,
}

impl Rail {
    fn new(kind: FabricKind, dmabuf: bool) -> Self {
        Self {
            info: DeviceInfo {
                kind,
                name: "rail".into(),
                port: 1,
                address: String::new(),
                pci: None,
                link: LinkState::Active,
                bits_per_second: 0,
                caps: Capabilities {
                    dmabuf,
                    ..SimConfig::default().caps
                },
            },
            refuses_dmabufs: false,
            refuses_addresses: false,
            room: usize::MAX,
            asked: Mutex::default(),
        }
    }

    fn answer(&self, refuses: bool, asked: Asked) -> Result<MemoryKeys, FabricError> {
        let mut list = self.asked.lock();
        let number = list.len() as u32;
        if refuses || list.len() >= self.room {
            return Err(FabricError {
                device: self.info.name.clone(),
                port: 1,
                operation: "register",
                kind: FabricErrorKind::Os(libc::ENOMEM),
                hint: None,
            });
        }
        list.push(asked);
        Ok(MemoryKeys {
            mr: MrId(number.into()),
            local: LocalKey(number),
            remote: RemoteKey(number),
        })
    }
}

impl Device for Rail {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    unsafe fn register(
        &self,
        address: u64,
        length: u64,
        access: Access,
    ) -> Result<MemoryKeys, FabricError> {
        let asked = Asked {
            dmabuf: None,
            address,
            length,
            access,
        };
        self.answer(self.refuses_addresses, asked)
    }

    unsafe fn register_dmabuf(
        &self,
        range: &DmabufRange<'_>,
        access: Access,
    ) -> Result<MemoryKeys, FabricError> {
        let asked = Asked {
            dmabuf: Some((range.fd.as_raw_fd(), range.offset)),
            address: range.address,
            length: range.length,
            access,
        };
        self.answer(self.refuses_dmabufs, asked)
    }

    fn open_context(self: Arc<Self>, _: u32) -> Result<Box<dyn Context>, FabricError> {
        unreachable!("nothing here moves bytes")
    }
}

/// Memory that nobody accesses: its address is any number.
#[derive(Debug)]
struct Fake {
    address: u64,
    length: u64,
    generation: u64,
    is_device: bool,
    is_accessible: bool,
    /// Offset of the dmabuf, if it can be exported.
    export: Option<u64>,
    peer_memory: bool,
    exports: Mutex<usize>,
}

impl Fake {
    fn device(address: u64, length: u64) -> Self {
        Self {
            address,
            length,
            generation: 0,
            is_device: true,
            is_accessible: false,
            export: Some(0),
            peer_memory: true,
            exports: Mutex::default(),
        }
    }

    fn host(address: u64, length: u64) -> Self {
        Self {
            is_device: false,
            ..Self::device(address, length)
        }
    }
}

fn refusal(operation: &'static str) -> MemoryError {
    MemoryError::Os {
        operation,
        length: 0,
        source: io::ErrorKind::Unsupported.into(),
        hint: None,
    }
}

// SAFETY: the rails of this module access nothing.
unsafe impl Memory for Fake {
    fn address(&self) -> u64 {
        self.address
    }

    fn length(&self) -> u64 {
        self.length
    }

    fn kind(&self) -> MemoryKind {
        MemoryKind::Borrowed
    }

    fn generation(&self) -> u64 {
        self.generation
    }

    fn device(&self) -> Option<&dyn DeviceMemory> {
        self.is_device.then_some(self as &dyn DeviceMemory)
    }
}

impl DeviceMemory for Fake {
    fn is_host_accessible(&self) -> bool {
        self.is_accessible
    }

    fn location(&self) -> Option<PciAddress> {
        None
    }

    fn export(&self) -> Result<Dmabuf, MemoryError> {
        *self.exports.lock() += 1;
        let offset = self.export.ok_or_else(|| refusal("export"))?;
        let file = HostMemory::memfd("kvpush-fake-dmabuf", 4096)?;
        let fd = file.fd().map(|fd| fd.try_clone_to_owned());
        let fd: OwnedFd = fd.and_then(Result::ok).ok_or_else(|| refusal("dup"))?;
        Ok(Dmabuf { fd, offset })
    }

    fn peer_memory(&self) -> Result<(), MemoryError> {
        match self.peer_memory {
            true => Ok(()),
            false => Err(refusal("peer memory")),
        }
    }

    fn copier(&self) -> Result<Box<dyn Copier>, MemoryError> {
        Err(refusal("copier"))
    }

    fn flush(&self) -> Result<(), MemoryError> {
        Ok(())
    }
}

fn register(memory: Fake, rail: Rail, policy: &Policy) -> (RegionPaths, Vec<Asked>, usize) {
    let (memory, rail) = (Arc::new(memory), Arc::new(rail));
    let devices = [Arc::clone(&rail) as Arc<dyn Device>, rail.clone()];
    let region = Region::register(
        Arc::clone(&memory) as Arc<dyn Memory>,
        Access::REMOTE_WRITE,
        &devices,
        policy,
    );
    let region = match region {
        Ok(region) => region,
        Err(failed) => panic!("{:?}", failed.0),
    };
    let asked = rail.asked.lock().clone();
    let exports = *memory.exports.lock();
    (region.paths(&devices), asked, exports)
}

fn paths_of(paths: &RegionPaths) -> Vec<MemoryPath> {
    paths.rails.iter().map(|rail| rail.path).collect()
}

fn refused_of(paths: &RegionPaths) -> Vec<MemoryPath> {
    paths.rails[0].refused.iter().map(|r| r.path).collect()
}

use MemoryPath::{Dmabuf as ByDmabuf, PeerMemory, Plain};

#[test]
fn host_memory_is_registered_plainly_whatever_the_order() {
    let policy = Policy {
        order: vec![ByDmabuf],
        ..Policy::default()
    };
    for kind in [FabricKind::Verbs, FabricKind::Tcp] {
        let (paths, asked, _) = register(Fake::host(0x1000, 4096), Rail::new(kind, true), &policy);
        assert_eq!(paths_of(&paths), [Plain, Plain]);
        assert!(paths.rails[0].refused.is_empty());
        assert!(asked.iter().all(|asked| asked.dmabuf.is_none()));
    }
}

#[test]
fn a_nic_takes_a_dmabuf_first_and_one_export_does_for_all_rails() {
    let memory = Fake {
        export: Some(3 * 4096 + 256),
        ..Fake::device(0x7f00_0000_1100, 10_000)
    };
    let rail = Rail::new(FabricKind::Verbs, true);
    let (paths, asked, exports) = register(memory, rail, &Policy::default());
    assert_eq!(paths_of(&paths), [ByDmabuf, ByDmabuf]);
    assert_eq!(refused_of(&paths), [Plain]);
    assert_eq!(exports, 1);
    for asked in asked {
        let (_, offset) = asked.dmabuf.unwrap();
        assert_eq!((offset, asked.length), (3 * 4096 + 256, 10_000));
        // Offset and address share their place within a page, wherever the memory itself is.
        assert_eq!(asked.address % 4096, 256);
    }
}

#[test]
fn a_refused_dmabuf_leads_to_peer_memory_with_the_reason() {
    let dmabuf_refused = Rail {
        refuses_dmabufs: true,
        ..Rail::new(FabricKind::Verbs, true)
    };
    let no_export = Fake {
        export: None,
        ..Fake::device(0x1000, 4096)
    };
    let cases = [
        (Fake::device(0x1000, 4096), dmabuf_refused, "os", 1),
        (no_export, Rail::new(FabricKind::Verbs, true), "export", 1),
        // Nothing is exported where no rail could use it.
        (
            Fake::device(0x1000, 4096),
            Rail::new(FabricKind::Verbs, false),
            "registers no dmabufs",
            0,
        ),
    ];
    for (memory, rail, reason, exported) in cases {
        let (paths, asked, exports) = register(memory, rail, &Policy::default());
        assert_eq!(paths_of(&paths), [PeerMemory, PeerMemory]);
        assert_eq!(refused_of(&paths), [Plain, ByDmabuf]);
        let why = &paths.rails[0].refused[1].reason;
        assert!(
            why.to_lowercase().contains(reason) || reason == "os",
            "{why}"
        );
        assert!(!why.is_empty());
        assert_eq!(exports, exported, "{why}");
        assert_eq!(asked[0].address, 0x1000);
    }
}

#[test]
fn a_software_fabric_never_registers_what_this_process_cannot_access() {
    let rail = || Rail {
        refuses_dmabufs: true,
        ..Rail::new(FabricKind::Tcp, true)
    };
    let devices: [Arc<dyn Device>; 1] = [Arc::new(rail())];
    let policy = Policy {
        order: vec![Plain, ByDmabuf, PeerMemory],
        ..Policy::default()
    };
    let memory: Arc<dyn Memory> = Arc::new(Fake::device(0x1000, 4096));
    let failed = Region::register(memory, Access::LOCAL, &devices, &policy).unwrap_err();
    let Unreachable::All { refused, .. } = &failed.0 else {
        panic!("{:?}", failed.0);
    };
    let paths: Vec<_> = refused.iter().map(|refusal| refusal.path).collect();
    assert_eq!(paths, [Plain, ByDmabuf, PeerMemory]);
    let accessible = Fake {
        is_accessible: true,
        ..Fake::device(0x1000, 4096)
    };
    let (paths, _, exports) = register(accessible, rail(), &policy);
    assert_eq!((paths_of(&paths), exports), (vec![Plain, Plain], 0));
}

#[test]
fn a_path_that_fails_half_way_leaves_nothing_behind() {
    let policy = Policy {
        order: vec![ByDmabuf, PeerMemory],
        max_registration: 4096,
        ..Policy::default()
    };
    let rail: Arc<dyn Device> = Arc::new(Rail {
        room: 2,
        ..Rail::new(FabricKind::Verbs, true)
    });
    let memory: Arc<dyn Memory> = Arc::new(Fake::device(0x10_0000, 5 * 4096));
    let failed = Region::register(memory, Access::LOCAL, &[rail], &policy).unwrap_err();
    let region = failed.1;
    let ended: Vec<_> = region.rails()[0].all().map(|keys| keys.mr).collect();
    assert_eq!(ended, [MrId(0), MrId(1)]);
    assert!(region.release(), "the driver is to end them");
}

#[test]
fn relaxed_ordering_is_off_unless_asked() {
    for relaxed in [false, true] {
        let policy = Policy {
            relaxed_ordering: relaxed,
            ..Policy::default()
        };
        let rail = Rail::new(FabricKind::Verbs, true);
        let (_, asked, _) = register(Fake::host(0x1000, 4096), rail, &policy);
        assert!(asked.iter().all(|a| a.access.relaxed_ordering == relaxed));
    }
}

#[test]
fn a_region_longer_than_a_registration_is_cut_at_pages() {
    let policy = Policy {
        max_registration: 3 * 4096 + 17,
        ..Policy::default()
    };
    let rail = Rail::new(FabricKind::Verbs, true);
    let (paths, asked, exports) = register(Fake::device(0x5000, 40_000), rail, &policy);
    assert_eq!(exports, 1);
    let half = asked.len() / 2;
    assert_eq!(paths.rails[0].extents, half);
    assert_eq!(asked[..half].iter().map(|a| a.length).sum::<u64>(), 40_000);
    for pair in asked[..half].windows(2) {
        assert_eq!(pair[0].address + pair[0].length, pair[1].address);
        assert_eq!(pair[1].address % 4096, 0);
        let offset = |asked: &Asked| asked.dmabuf.unwrap().1;
        assert_eq!(offset(&pair[0]) + pair[0].length, offset(&pair[1]));
    }
}

fn registry() -> (Arc<Registry>, [Arc<dyn Device>; 1]) {
    let rail: Arc<dyn Device> = Arc::new(Rail::new(FabricKind::Verbs, true));
    (Arc::default(), [rail])
}

fn hold(
    (registry, devices): &(Arc<Registry>, [Arc<dyn Device>; 1]),
    memory: Fake,
    access: Access,
) -> Region {
    let (memory, policy) = (Arc::new(memory), Policy::default());
    let exports = &mut Exports::default();
    registry
        .register(memory, access, devices, &policy, exports)
        .map_err(|failed| failed.0)
        .unwrap()
}

#[test]
fn the_same_range_for_the_same_access_is_one_registration() {
    let world = registry();
    let memory = || Fake::host(0x10_0000, 8192);
    let first = hold(&world, memory(), Access::REMOTE_WRITE);
    let second = hold(&world, memory(), Access::REMOTE_WRITE);
    assert_eq!((first.id(), world.0.len()), (second.id(), 1));
    let others = [
        hold(&world, memory(), Access::LOCAL),
        hold(&world, Fake::host(0x10_0000, 4096), Access::REMOTE_WRITE),
        hold(&world, Fake::host(0x10_1000, 8192), Access::REMOTE_WRITE),
        hold(
            &world,
            Fake {
                generation: 1,
                ..memory()
            },
            Access::REMOTE_WRITE,
        ),
    ];
    assert_eq!(world.0.len(), 5);
    assert!(others.iter().all(|other| other.id() != first.id()));
    assert!(!first.release(), "somebody else has it");
    assert!(world.0.is_live(second.id()));
    assert!(second.release());
    assert!(!world.0.is_live(second.id()));
    // What comes after has another name.
    let again = hold(&world, memory(), Access::REMOTE_WRITE);
    assert_ne!(again.id(), first.id());
}

#[test]
fn an_address_is_found_in_the_shortest_registration() {
    let world = registry();
    let whole = hold(&world, Fake::host(0x10_0000, 0x10_000), Access::LOCAL);
    let part = hold(&world, Fake::host(0x10_4000, 0x1000), Access::LOCAL);
    let find = |address| world.0.locate(address).map(|l| (l.id, l.offset, l.left));
    assert_eq!(find(0xf_ffff), None);
    assert_eq!(find(0x10_3fff), Some((whole.id(), 0x3fff, 0xc001)));
    assert_eq!(find(0x10_4fff), Some((part.id(), 0xfff, 1)));
    assert_eq!(find(0x10_5000), Some((whole.id(), 0x5000, 0xb000)));
    assert_eq!(find(0x11_0000), None);
    assert!(part.release());
    assert_eq!(find(0x10_4fff), Some((whole.id(), 0x4fff, 0xb001)));
}
