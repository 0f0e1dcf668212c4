//! What only the verbs fabric has, on real devices: the inventory, opening by name, shared receives, asynchronous
//! events, errors of the driver. All cases are marked as ignored, because most machines have no RDMA device:
//! `cargo xtask rxe` runs them in a guest that has, one at a time. The conformance suite covers what all fabrics share.

#[allow(dead_code)]
#[path = "fabric_suite/harness.rs"]
mod harness;

use std::{
    collections::BTreeSet,
    fs,
    net::{IpAddr, Ipv4Addr},
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use harness::{LANE, Memory, PATIENCE, Pair, request, sge};
use kvpush::fabric::{
    Access, CompletionKind, Device, FabricErrorKind, FabricKind, LaneAddress, LaneConfig, Opcode,
    RemoteKey, Status,
    verbs::{
        GidType, LibraryFacts, LinkLayer, PortState, Severity, VerbsConfig, VerbsDevice, diagnose,
        inventory,
    },
};
use kvpush::{
    Auth, Endpoint,
    kv::{Dtype, HeadRange, presets::KvShape, region_lengths},
    memory::{HostMemory, HugePages, MemoryKind},
};

fn devices(config: &VerbsConfig) -> (Arc<VerbsDevice>, Arc<VerbsDevice>) {
    let (mut devices, skipped) = VerbsDevice::open_all(config, None);
    assert!(!devices.is_empty(), "no active RDMA port: {skipped:?}");
    let a = devices.remove(0);
    let b = match devices.is_empty() {
        true => {
            VerbsDevice::open(&a.info().name, a.info().port, config).expect("open the device again")
        }
        false => devices.remove(0),
    };
    (a, b)
}

fn pair(config: &VerbsConfig) -> Pair {
    let (a, b) = devices(config);
    Pair::new(a, b, nowhere(), nowhere())
}

fn nowhere() -> IpAddr {
    IpAddr::V4(Ipv4Addr::UNSPECIFIED)
}

#[test]
#[ignore = "needs an RDMA device: cargo xtask rxe"]
fn the_inventory_agrees_with_the_kernel() {
    let found = inventory();
    assert!(
        matches!(found.library, LibraryFacts::Loaded { .. }),
        "{:?}",
        found.library
    );
    let names: BTreeSet<_> = found.devices.iter().map(|d| d.name.clone()).collect();
    let kernel: BTreeSet<_> = fs::read_dir("/sys/class/infiniband")
        .expect("sysfs")
        .map(|entry| {
            entry
                .expect("entry")
                .file_name()
                .into_string()
                .expect("name")
        })
        .collect();
    assert_eq!(names, kernel);
    for device in &found.devices {
        let sysfs = format!("/sys/class/infiniband/{}", device.name);
        let read = |path: &str| fs::read_to_string(format!("{sysfs}/{path}")).unwrap_or_default();
        let guid = read("node_guid").trim().replace(':', "");
        assert_eq!(u64::from_str_radix(&guid, 16), Ok(device.node_guid));
        assert!(device.caps.max_qp > 0 && device.caps.max_mr_size > 0);
        for port in &device.ports {
            let at = |path: &str| read(&format!("ports/{}/{path}", port.number));
            assert!(at("state").contains(port.state.word()), "{}", at("state"));
            let link = at("link_layer");
            assert_eq!(port.link == LinkLayer::Ethernet, link.trim() == "Ethernet");
            let mut set = 0;
            for index in 0..1024 {
                // The kernel refuses to give the type of a row that is not set.
                let kind = at(&format!("gid_attrs/types/{index}"));
                if kind.trim().is_empty() {
                    continue;
                }
                set += 1;
                let entry = port.gids.iter().find(|entry| entry.index == index);
                let entry = entry.unwrap_or_else(|| panic!("{} GID {index}", device.name));
                let groups = entry.gid.to_ipv6().segments();
                let groups = groups.map(|group| format!("{group:04x}")).join(":");
                assert_eq!(at(&format!("gids/{index}")).trim(), groups);
                assert_eq!(entry.kind == GidType::RoceV2, kind.trim() == "RoCE v2");
                let netdev = at(&format!("gid_attrs/ndevs/{index}"));
                assert_eq!(entry.netdev.as_deref(), Some(netdev.trim()));
            }
            assert_eq!(port.gids.len(), set, "{:?}", port.gids);
        }
    }
    let errors: Vec<_> = diagnose(&found)
        .into_iter()
        .filter(|finding| finding.severity == Severity::Error)
        .collect();
    assert!(errors.is_empty(), "{errors:#?}");
}

#[test]
#[ignore = "needs an RDMA device: cargo xtask rxe"]
fn the_gid_is_roce_v2_and_every_wish_is_heard() {
    let config = VerbsConfig::default();
    let (a, _b) = devices(&config);
    assert!(a.info().address.contains("RoCE v2"), "{}", a.info().address);
    assert!(
        a.info().address.contains("::ffff:"),
        "an IPv4 address before a link-local one: {}",
        a.info().address
    );

    let filter = [format!("{}/{}", a.info().name, a.info().port)];
    let (only, skipped) = VerbsDevice::open_all(&config, Some(&filter));
    assert_eq!(only.len(), 1);
    assert_eq!(only[0].info(), a.info());
    let others = inventory().devices.len() - 1;
    assert_eq!(skipped.len(), others, "{skipped:?}");

    let beyond = VerbsConfig {
        gid_index: Some(200),
        ..config.clone()
    };
    let error = VerbsDevice::open(&a.info().name, a.info().port, &beyond).unwrap_err();
    assert!(
        matches!(error.kind, FabricErrorKind::Unavailable(_)),
        "{error}"
    );
    let error = VerbsDevice::open(&a.info().name, 99, &config).unwrap_err();
    assert!(
        matches!(error.kind, FabricErrorKind::Unavailable(_)),
        "{error}"
    );
}

#[test]
#[ignore = "needs an RDMA device: cargo xtask rxe"]
fn registrations_that_cannot_be() {
    let (device, _) = devices(&VerbsConfig::default());
    // SAFETY: none of these names memory that exists, so none can succeed.
    let register =
        |address, length| unsafe { device.register(address, length, Access::REMOTE_WRITE) };
    for (address, length) in [(4096, 0), (0, 4096), (u64::MAX - 4096, 8192)] {
        let error = register(address, length).unwrap_err();
        assert!(matches!(error.kind, FabricErrorKind::Memory(_)), "{error}");
    }
    let error = register(0x1000, 4096).unwrap_err();
    assert_eq!(error.kind, FabricErrorKind::Os(libc::EFAULT));
    assert!(error.hint.is_some(), "{error}");
    assert_eq!(error.operation, "ibv_reg_mr");
}

#[test]
#[ignore = "needs an RDMA device: cargo xtask rxe"]
fn a_peer_that_takes_more_than_its_share_harms_only_itself() {
    let mut pair = pair(&VerbsConfig::default());
    let greedy = LaneConfig {
        receive_depth: 2,
        ..LANE
    };
    let (thief, robbed) = pair.lane(&greedy);
    let honest = LaneConfig {
        receive_depth: 8,
        ..LANE
    };
    let (other, _) = pair.lane(&honest);
    let imm = |id: u64| request(id, Opcode::WriteImm(id as u32), 0, RemoteKey(0), 0);
    let many: Vec<_> = (0..6).map(imm).collect();
    pair.a.post(thief, &many, &[]).expect("post");
    pair.until("the theft", |pair| pair.a.sends().len() == 6);
    pair.poll_for(Duration::from_millis(100));
    let got: Vec<_> = pair.b.done.iter().filter(|c| c.lane == robbed).collect();
    assert_eq!(got.len(), 2, "{got:?}");
    assert!(
        got.iter().all(|c| c.status == Status::Success),
        "its own share: {got:?}"
    );
    // The lane has failed on the reader's side.
    let error = pair.b.context.post_receives(robbed, 1).unwrap_err();
    assert!(
        matches!(error.kind, FabricErrorKind::LaneState { .. }),
        "{error}"
    );
    pair.a.done.clear();
    pair.b.done.clear();
    let all: Vec<_> = (0..8).map(imm).collect();
    pair.a.post(other, &all, &[]).expect("post");
    pair.until("all of the honest lane's share", |pair| {
        pair.b.receives().len() == 8 && pair.a.sends().len() == 8
    });
    assert!(pair.a.sends().iter().all(|(_, s)| *s == Status::Success));
    pair.a.context.destroy_lane(thief).expect("destroy");
    pair.b.context.destroy_lane(robbed).expect("destroy");
}

#[test]
#[ignore = "needs an RDMA device: cargo xtask rxe"]
fn addresses_that_lead_nowhere() {
    let mut pair = pair(&VerbsConfig::default());
    let (lane, _) = pair.a.context.create_lane(&LANE).expect("create");
    let (_, there) = pair.b.context.create_lane(&LANE).expect("create");
    let context = &mut pair.a.context;
    let garbage = LaneAddress::new(vec![0xaa; 36]).expect("short");
    let error = context
        .connect_lane(lane, &garbage, nowhere(), true)
        .unwrap_err();
    assert!(
        matches!(error.kind, FabricErrorKind::BadAddress(_)),
        "{error}"
    );
    // The last twelve bytes of a RoCE v2 address of IPv4 are ::ffff and the address; 192.0.2.1 is nobody's.
    let mut unroutable = there.as_bytes().to_vec();
    let end = unroutable.len();
    unroutable[end - 4..].copy_from_slice(&[192, 0, 2, 1]);
    let unroutable = LaneAddress::new(unroutable).expect("short");
    let error = context
        .connect_lane(lane, &unroutable, nowhere(), true)
        .unwrap_err();
    assert!(
        matches!(error.kind, FabricErrorKind::Os(_)) && error.is_retryable(),
        "{error}"
    );
    assert_eq!(error.operation, "ibv_modify_qp(RTR)");
    assert!(error.hint.is_some(), "{error}");
    // None of that used the lane up.
    context
        .connect_lane(lane, &there, nowhere(), true)
        .expect("a good address");
    let error = context
        .connect_lane(lane, &there, nowhere(), true)
        .unwrap_err();
    assert!(
        matches!(error.kind, FabricErrorKind::LaneState { .. }),
        "{error}"
    );
}

#[test]
#[ignore = "needs an RDMA device: cargo xtask rxe"]
fn everything_goes_with_the_last_handle_in_any_order() {
    let open = || fs::read_dir("/proc/self/fd").expect("procfs").count();
    let memory = Memory::new(1 << 20, 7);
    let cycle = |context_first: bool| {
        let (device, _other) = devices(&VerbsConfig::default());
        for _ in 0..4 {
            // SAFETY: the memory outlives the device, and nobody refers to it.
            unsafe { device.register(memory.address(), memory.len() as u64, Access::ALL) }
                .expect("register");
        }
        let mut context = Arc::clone(&device).open_context(64).expect("context");
        context.create_lane(&LANE).expect("lane");
        let error = Arc::clone(&device)
            .open_context(64)
            .err()
            .expect("one only");
        assert!(
            matches!(error.kind, FabricErrorKind::Unavailable(_)),
            "{error}"
        );
        if context_first {
            drop(context);
            Arc::clone(&device).open_context(64).expect("again");
            drop(device);
        } else {
            drop(device);
            context
                .create_lane(&LANE)
                .expect("the context keeps the device");
            drop(context);
        }
    };
    cycle(true);
    let before = open();
    for round in 0..8 {
        cycle(round % 2 == 0);
    }
    assert_eq!(open(), before, "descriptors");
}

/// Sleeps, like a poller, until the port's state is `wanted`.
fn await_state(device: &VerbsDevice, end: &mut harness::End, wanted: PortState) {
    let start = Instant::now();
    while device.port_state() != wanted {
        assert!(
            start.elapsed() < PATIENCE,
            "the port is {} and not {wanted}",
            device.port_state()
        );
        end.poll();
        if end.context.arm().expect("arm") {
            let mut fd = libc::pollfd {
                fd: end.context.wait_fd(),
                events: libc::POLLIN,
                revents: 0,
            };
            // SAFETY: one pollfd that lives through the call.
            unsafe { libc::poll(&raw mut fd, 1, 1000) };
        }
    }
}

#[test]
#[ignore = "needs an RDMA device: cargo xtask rxe"]
fn a_port_that_goes_and_comes_back_is_noticed_and_used_again() {
    let (a, b) = devices(&VerbsConfig::default());
    let found = inventory();
    let facts = found.devices.iter().find(|d| d.name == a.info().name);
    let netdev = facts.expect("device").ports[0].netdevs[0].name.clone();
    let set = |state: &str| {
        let status = Command::new("ip")
            .args(["link", "set", &netdev, state])
            .status();
        assert!(
            status.expect("ip").success(),
            "ip link set {netdev} {state}"
        );
    };
    let other: Arc<dyn Device> = b.clone();
    let mut pair = Pair::new(a.clone(), other, nowhere(), nowhere());
    assert_eq!(a.port_state(), PortState::Active);
    set("down");
    await_state(&a, &mut pair.a, PortState::Down);
    let error = VerbsDevice::open(&a.info().name, a.info().port, &VerbsConfig::default());
    let error = error.unwrap_err();
    assert!(error.to_string().contains("DOWN"), "{error}");
    assert!(!diagnose(&inventory()).is_empty());
    set("up");
    await_state(&a, &mut pair.a, PortState::Active);

    let (from, to) = (Memory::new(4096, 3), Memory::new(4096, 0));
    let source = pair.a.register(&from, Access::LOCAL);
    let target = pair.b.register(&to, Access::REMOTE_WRITE);
    // The neighbour entry may take a moment to come back.
    let start = Instant::now();
    let (lane, address) = pair.a.context.create_lane(&LANE).expect("create");
    let (peer, there) = pair.b.context.create_lane(&LANE).expect("create");
    while let Err(error) = pair.a.context.connect_lane(lane, &there, nowhere(), true) {
        assert!(
            error.is_retryable() && start.elapsed() < PATIENCE,
            "{error}"
        );
    }
    while let Err(error) = pair
        .b
        .context
        .connect_lane(peer, &address, nowhere(), false)
    {
        assert!(
            error.is_retryable() && start.elapsed() < PATIENCE,
            "{error}"
        );
    }
    let write = request(1, Opcode::WriteImm(5), to.address(), target.remote, 1);
    pair.a
        .post(lane, &[write], &[sge(&from, &source, 0, 4096)])
        .expect("post");
    pair.until("the write", |pair| {
        pair.b.done.len() == 1 && pair.a.done.len() == 1
    });
    assert_eq!(pair.b.done[0].kind, CompletionKind::Received { imm: 5 });
    assert_eq!(to.all(), from.all());
}

/// Both caches in huge pages, which only a guest of our own is sure to have.
#[test]
#[ignore = "needs an RDMA device: cargo xtask rxe"]
fn huge_pages_are_pushed() {
    const SIZE: u64 = 2 << 20;
    fs::write("/proc/sys/vm/nr_hugepages", "8").expect("root in a guest");
    let shape = KvShape {
        layers: 1,
        tokens_per_page: 16,
        heads: HeadRange::new(0, 4),
        head_dim: 128,
        dtype: Dtype::Bf16,
    };
    let layout = shape.vllm_flash(64).expect("a layout");
    assert_eq!(region_lengths(&layout), Ok(vec![SIZE]));
    let start = |name: &str| {
        let verbs = VerbsConfig {
            timeout: 18,
            ..VerbsConfig::default()
        };
        let builder = Endpoint::builder()
            .name(name)
            .auth(Auth::psk([3; 32]))
            .verbs(verbs);
        let endpoint = builder
            .fabrics([FabricKind::Verbs])
            .bind("127.0.0.1:0")
            .expect("bind");
        let memory = Arc::new(HostMemory::huge(SIZE, HugePages::Size2M).expect("huge pages"));
        assert_eq!(
            kvpush::memory::Memory::kind(&*memory),
            MemoryKind::HugePages(SIZE)
        );
        let shared = vec![Arc::clone(&memory) as Arc<dyn kvpush::memory::Memory>];
        let pool = endpoint
            .register_pool(layout.clone(), shared)
            .expect("register");
        (endpoint, pool, memory)
    };
    let (prefill, source, from) = start("prefill");
    let (_decode, destination, to) = start("decode");
    let bytes: Vec<u8> = (0..SIZE).map(|i| (i * 7 % 251) as u8).collect();
    from.write(0, &bytes).expect("fill");
    let pages: Vec<u32> = (0..64).collect();
    let arrival = destination.grant("huge", &pages, PATIENCE).expect("grant");
    let push = prefill
        .push_blocking(&source, arrival.grant().clone(), PATIENCE)
        .expect("open");
    push.layer(0, &pages).expect("push");
    push.finish_blocking("", PATIENCE)
        .expect("no hang")
        .expect("finish");
    arrival
        .complete_blocking(PATIENCE)
        .expect("no hang")
        .expect("complete");
    let mut found = vec![0; bytes.len()];
    to.read(0, &mut found).expect("read");
    assert!(found == bytes, "other bytes");
}
