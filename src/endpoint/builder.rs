//! Configuring and starting an endpoint.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, ToSocketAddrs, UdpSocket},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU32, AtomicU64},
    },
    time::Duration,
};

use super::{
    Endpoint, EndpointError, Owner, Polling, Protection, RailChoice,
    config::{Config, Keepalive},
    core::Core,
    drain::DrainShared,
    driver::{self, ControlAdapter, Driver},
    rails,
    regions::{MemoryPath, Policy, Region, Registry},
    shared::{EndpointShared, TailArena},
    wake::WakeHandle,
};
use crate::{
    fabric::{Access, Device, FabricKind, verbs::VerbsConfig},
    memory::{HostMemory, Memory},
    topology::Topology,
    wire::{Auth, Incarnation, MAX_LANES},
};

/// Completion-queue entries of one rail, if it has so many.
const COMPLETIONS: u32 = 1 << 16;

/// Settings of an endpoint; [`Builder::bind`] starts it.
///
/// Only [`Builder::auth`] must be given. Everything else is found out, or has a default that suits.
#[derive(Debug)]
pub struct Builder {
    config: Config,
    devices: Vec<Arc<dyn Device>>,
    topology: OnceLock<Topology>,
}

impl Builder {
    pub(super) fn new() -> Self {
        Self {
            config: Config::default(),
            devices: Vec::new(),
            topology: OnceLock::new(),
        }
    }

    /// How peers prove that they belong here. Both sides must have the same.
    pub fn auth(mut self, auth: Auth) -> Self {
        self.config.auth = Some(auth);
        self
    }

    /// A name for logs and for the peers' errors.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.config.name = name.into();
        self
    }

    /// The kinds of fabric to use, in any order; by default all. The best that both peers have is taken.
    pub fn fabrics(mut self, fabrics: impl IntoIterator<Item = FabricKind>) -> Self {
        self.config.fabrics = fabrics.into_iter().collect();
        self.config.fabrics.sort_unstable_by(|a, b| b.cmp(a));
        self.config.fabrics.dedup();
        self
    }

    /// Use only these RDMA devices: `mlx5_0`, or `mlx5_0:1` for one port.
    pub fn devices(mut self, names: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.config.devices = Some(names.into_iter().map(Into::into).collect());
        self
    }

    /// Use a rail that the caller has opened, such as a simulated one.
    pub fn device(mut self, device: Arc<dyn Device>) -> Self {
        self.devices.push(device);
        self
    }

    /// The addresses that peers dial (`host:port`), where those that the endpoint finds are not reachable.
    pub fn advertise(mut self, addresses: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.config.advertise = addresses.into_iter().map(Into::into).collect();
        self
    }

    /// Lanes (queue pairs) to each peer on each rail. Default 2.
    pub fn lanes_per_rail(mut self, lanes: u16) -> Self {
        self.config.lanes_per_rail = lanes;
        self
    }

    /// Requests outstanding on one lane, and receives posted on one. The device may allow fewer. Default 256 each.
    pub fn queue_depths(mut self, send: u32, receive: u32) -> Self {
        self.config.send_depth = send;
        self.config.receive_depth = receive;
        self
    }

    /// Gather elements of one write; the device may allow fewer. Default 16.
    pub fn max_sge(mut self, elements: u32) -> Self {
        self.config.max_sge = elements;
        self
    }

    /// Bytes of one write; the device may allow fewer. Default 256 MiB.
    pub fn max_write(mut self, bytes: u32) -> Self {
        self.config.max_write = bytes;
        self
    }

    /// Parts that each layer of a grant is counted in, and hence the lanes it can be spread over. Default 4.
    pub fn parts_per_layer(mut self, parts: u16) -> Self {
        self.config.parts_per_layer = parts;
        self
    }

    /// Bytes of a tail, the small payload at the end of a push. Default 1016.
    pub fn tail_capacity(mut self, bytes: u32) -> Self {
        self.config.tail_capacity = bytes;
        self
    }

    /// Grants and pushes that may be live at once. Default 2048.
    pub fn max_transfers(mut self, transfers: u32) -> Self {
        self.config.max_transfers = transfers;
        self
    }

    /// Which keys writers are given. Default [`Protection::Region`].
    pub fn protection(mut self, protection: Protection) -> Self {
        self.config.protection = protection;
        self
    }

    /// Windows of one grant on one lane, besides the tail's. A grant whose pages lie in more pieces gets one window for
    /// each region, from the first of its pages to the last: coarser, but still its own and shut with it. Default 64.
    pub fn max_windows(mut self, windows: u32) -> Self {
        self.config.max_windows = windows;
        self
    }

    /// Sessions that peers may have made with this endpoint at once; further ones are refused as busy. Default 1024.
    pub fn max_peers(mut self, sessions: u32) -> Self {
        self.config.max_peers = sessions;
        self
    }

    /// Time to reach a peer and open a grant there. Default 10 s.
    pub fn open_timeout(mut self, timeout: Duration) -> Self {
        self.config.open_timeout = timeout;
        self
    }

    /// Time that a push which has to stop waits for what is in flight before its lanes are fenced. Default 5 s.
    pub fn drain_timeout(mut self, timeout: Duration) -> Self {
        self.config.drain_timeout = timeout;
        self
    }

    /// Time that a writer has to answer when its grant is taken back before its lanes are fenced. Default 500 ms.
    pub fn revoke_grace(mut self, grace: Duration) -> Self {
        self.config.revoke_grace = grace;
        self
    }

    /// Time for which a session goes on although none of its lanes works, while they are made again. Then it ends, and
    /// its pushes and arrivals with it. Default 10 s.
    pub fn recovery_timeout(mut self, timeout: Duration) -> Self {
        self.config.recovery_timeout = timeout;
        self
    }

    /// A peer from which nothing has come for `interval` is asked whether it is there; one that is silent for `timeout`
    /// is given up: its lanes are fenced, and its pushes and arrivals end with [`PeerError::Silent`]. Any message counts
    /// as an answer. Default 5 s and 15 s.
    ///
    /// [`PeerError::Silent`]: super::PeerError::Silent
    pub fn keepalive(mut self, interval: Duration, timeout: Duration) -> Self {
        self.config.keepalive = Some(Keepalive { interval, timeout });
        self
    }

    /// Never gives up a peer because it is silent. What waits for the peer still has its own deadline, but an idle
    /// session with a peer that has vanished stays.
    pub fn no_keepalive(mut self) -> Self {
        self.config.keepalive = None;
        self
    }

    /// Which rails the pages of a pool go through; [`super::PoolOptions::rails`] overrides it for one. Default
    /// [`RailChoice::Nearest`].
    pub fn rails(mut self, rails: RailChoice) -> Self {
        self.config.rails = rails;
        self
    }

    /// What this host is like, where its own `/sys` does not say, as in some containers; see
    /// [`Topology::read`](crate::topology::Topology::read).
    pub fn topology(mut self, topology: Topology) -> Self {
        self.topology = OnceLock::from(topology);
        self
    }

    /// Most peers that metrics and [`Endpoint::stats`] tell apart by name; further ones are counted together as `others`.
    /// 0 counts all together. Default 256.
    pub fn metric_peers(mut self, peers: usize) -> Self {
        self.config.metric_peers = peers;
        self
    }

    /// The ways by which rails may reach a device's memory, best first; by default plain, dmabuf, peer memory, staged. A
    /// path that is not in the list is not tried. Host memory is always registered plainly.
    pub fn memory_paths(mut self, paths: impl IntoIterator<Item = MemoryPath>) -> Self {
        self.config.policy.order = paths.into_iter().collect();
        self
    }

    /// Bytes of pinned host memory for pushes of memory that a rail cannot reach ([`MemoryPath::Staged`]); by default
    /// 64 MiB, allocated when the first pool needs them. Half of it is for what this side sends, half for what it
    /// receives: the granted pages of all open grants of staged pools must fit into that half. Further ones wait, and a
    /// grant that is larger than the half is refused. 0 forbids staging.
    pub fn staging_memory(mut self, bytes: u64) -> Self {
        self.config.staging_memory = bytes;
        self
    }

    /// Most bytes of one registration of a pool or region; longer ones are registered in several. By default as many as
    /// the device allows.
    pub fn max_registration(mut self, bytes: u64) -> Self {
        self.config.policy.max_registration = bytes;
        self
    }

    /// Whether registrations let the device reorder its accesses on the host's bus (PCIe relaxed ordering), where it
    /// can. Default no.
    ///
    /// It can raise the throughput on hosts whose memory is far from the device, or with several devices in one virtual
    /// machine. What is given up: bytes of an earlier write may become visible after those of a later one, until a
    /// completion has been polled. kvpush itself looks at nothing before a completion, so its own guarantees stay. An
    /// engine that watches memory for the last byte of a message must not turn it on.
    pub fn relaxed_ordering(mut self, relaxed: bool) -> Self {
        self.config.policy.relaxed_ordering = relaxed;
        self
    }

    /// Whether a layer, and an arrival, of a pool in a device's memory is reported only after that device has been told
    /// to make what the NIC wrote visible to the kernels it starts next ([`DeviceMemory::flush`]). Default yes. If not,
    /// the caller orders: with [`Pool::flush`], or by a means of its own.
    /// [`GrantOptions::flush`] overrides it.
    ///
    /// [`DeviceMemory::flush`]: crate::memory::DeviceMemory::flush
    /// [`Pool::flush`]: super::Pool::flush
    /// [`GrantOptions::flush`]: super::GrantOptions::flush
    pub fn flush_arrivals(mut self, flush: bool) -> Self {
        self.config.flush = flush;
        self
    }

    /// How the driver thread waits. Default [`Polling::Adaptive`] with 20 µs.
    pub fn polling(mut self, polling: Polling) -> Self {
        self.config.polling = polling;
        self
    }

    /// Settings of the verbs fabric.
    pub fn verbs(mut self, verbs: VerbsConfig) -> Self {
        self.config.verbs = verbs;
        self
    }

    /// Starts the endpoint: opens the rails and listens on `address`. Port 0 takes any free port.
    ///
    /// # Errors
    ///
    /// [`EndpointError`]: no authentication, an address that cannot be bound, no usable rail, or memory that cannot be
    /// registered (the locked-memory limit is the usual reason).
    pub fn bind(
        self,
        address: impl ToSocketAddrs + std::fmt::Debug,
    ) -> Result<Endpoint, EndpointError> {
        let Self {
            mut config,
            devices: given,
            topology,
        } = self;
        check(&config)?;
        let auth = config.auth.take().ok_or(EndpointError::NoAuth)?;
        let io = |operation| {
            let address = format!("{address:?}");
            move |source| EndpointError::Io {
                operation,
                address,
                source,
            }
        };
        let listener = TcpListener::bind(&address).map_err(io("listen on"))?;
        let local = listener.local_addr().map_err(io("listen on"))?;
        let devices = rails::open(&config, local.ip(), given)?;
        check_lanes(&config, &devices)?;
        let incarnation = Incarnation::random().map_err(io("random number for"))?;
        let wake = WakeHandle::new().map_err(io("eventfd for"))?;
        let tails = tail_arena(&config, &devices)?;

        let mut contexts = Vec::new();
        for device in &devices {
            let depth = device.info().caps.max_completions.min(COMPLETIONS);
            let context = Arc::clone(device).open_context(depth)?;
            contexts.push((Arc::clone(device), context, depth));
        }
        let addresses = match config.advertise.is_empty() {
            true => vec![SocketAddr::new(reachable(local.ip()), local.port()).to_string()],
            false => std::mem::take(&mut config.advertise),
        };
        let (commands, inbox) = crossbeam::channel::unbounded();
        let config = Arc::new(config);
        let (control, events) = driver::start_control(listener, auth, wake.clone())
            .map_err(io("control thread for"))?;
        let control = Box::new(ControlAdapter(control));
        let core = Core::new(
            Arc::clone(&config),
            incarnation,
            contexts,
            control,
            Arc::clone(&tails),
        );
        let shared = Arc::new(EndpointShared {
            config: Arc::clone(&config),
            incarnation,
            addresses,
            devices,
            topology,
            tails,
            registry: Arc::new(Registry::default()),
            plans: Arc::default(),
            staging: parking_lot::Mutex::default(),
            closed: AtomicBool::new(false),
            drain: DrainShared::new(),
            telemetry: core.telemetry(),
            next_pool: AtomicU32::new(1),
            next_export: AtomicU32::new(1),
            next_push: AtomicU64::new(1),
            commands,
            wake: wake.clone(),
        });
        let driver = Driver::new(core, inbox, events, wake, config.polling);
        let closed = Arc::clone(&shared);
        let driver = driver.start(move || closed.closed.load(std::sync::atomic::Ordering::Acquire));
        let driver = driver.map_err(io("driver thread for"))?;
        let owner = Owner {
            shared,
            local,
            driver: parking_lot::Mutex::new(Some(driver)),
        };
        Ok(Endpoint {
            owner: Arc::new(owner),
        })
    }
}

fn check(config: &Config) -> Result<(), EndpointError> {
    let ranges = [
        ("lanes_per_rail", u64::from(config.lanes_per_rail), 1, 16),
        ("queue_depths (send)", config.send_depth.into(), 1, 1 << 15),
        (
            "queue_depths (receive)",
            config.receive_depth.into(),
            1,
            1 << 15,
        ),
        ("max_sge", config.max_sge.into(), 1, 256),
        ("max_write", config.max_write.into(), 64, 1 << 31),
        ("parts_per_layer", config.parts_per_layer.into(), 1, 1024),
        ("tail_capacity", config.tail_capacity.into(), 0, 1 << 20),
        ("max_transfers", config.max_transfers.into(), 1, 1 << 16),
        ("staging_memory", config.staging_memory, 0, 1 << 40),
        ("max_peers", config.max_peers.into(), 1, 4096),
    ];
    for (setting, value, least, most) in ranges {
        if !(least..=most).contains(&value) {
            let why = if value < least {
                "too small"
            } else {
                "too large"
            };
            return Err(EndpointError::Setting {
                setting,
                value: value.to_string(),
                why,
            });
        }
    }
    if let Some(Keepalive { interval, timeout }) = config.keepalive {
        let why = match () {
            () if interval < Duration::from_millis(10) => "asks more often than every 10 ms",
            () if timeout < 2 * interval => "gives up before a second question",
            () if timeout > Duration::from_secs(86_400) => "gives up after more than a day",
            () => "",
        };
        if !why.is_empty() {
            return Err(EndpointError::Setting {
                setting: "keepalive",
                value: format!("{interval:?}, {timeout:?}"),
                why,
            });
        }
    }
    if config.name.len() > 255 {
        let value = format!("{} bytes", config.name.len());
        return Err(EndpointError::Setting {
            setting: "name",
            value,
            why: "longer than 255 bytes",
        });
    }
    if config.advertise.len() > 4 {
        let value = format!("{} addresses", config.advertise.len());
        return Err(EndpointError::Setting {
            setting: "advertise",
            value,
            why: "more than 4",
        });
    }
    Ok(())
}

/// All lanes to one peer go into one message.
fn check_lanes(config: &Config, devices: &[Arc<dyn Device>]) -> Result<(), EndpointError> {
    let most = devices
        .iter()
        .map(|device| {
            devices
                .iter()
                .filter(|d| d.info().kind == device.info().kind)
                .count()
        })
        .max()
        .unwrap_or(0);
    if most * usize::from(config.lanes_per_rail) > MAX_LANES {
        return Err(EndpointError::Setting {
            setting: "lanes_per_rail",
            value: format!("{} on each of {most} rails", config.lanes_per_rail),
            why: "more than 64 lanes to one peer",
        });
    }
    Ok(())
}

fn tail_arena(
    config: &Config,
    devices: &[Arc<dyn Device>],
) -> Result<Arc<TailArena>, EndpointError> {
    let (slots, capacity) = (config.max_transfers, config.tail_capacity);
    // A file, so that a peer on this host needs no permission to read this process's memory just for the tails.
    let length = TailArena::length(slots, capacity);
    let memory = HostMemory::memfd("kvpush-tails", length).or_else(|_| HostMemory::new(length))?;
    let memory = Arc::new(memory);
    let region = Region::register(
        Arc::clone(&memory) as Arc<dyn Memory>,
        Access::REMOTE_WRITE,
        devices,
        &Policy::default(),
    )
    .map_err(|failed| EndpointError::from(failed.0))?;
    if region.is_cut() {
        return Err(EndpointError::Setting {
            setting: "max_transfers × tail_capacity",
            value: format!("{} bytes", region.length()),
            why: "more than a device registers at once",
        });
    }
    Ok(Arc::new(TailArena::new(memory, region, slots, capacity)))
}

/// The address under which peers find a listener on `bound`.
fn reachable(bound: IpAddr) -> IpAddr {
    if !bound.is_unspecified() {
        return bound;
    }
    // Connecting a datagram socket sends nothing; it only asks the routing table which address we would send from.
    // 192.0.2.0/24 is reserved for documentation (RFC 5737), so the answer is the default route's.
    UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))
        .and_then(|socket| {
            socket.connect((Ipv4Addr::new(192, 0, 2, 1), 9))?;
            socket.local_addr()
        })
        .map_or(IpAddr::V4(Ipv4Addr::LOCALHOST), |address| address.ip())
}
