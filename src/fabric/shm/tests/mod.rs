//! Tests that reach below the traits: rogue peers, and what only this fabric promises.

mod hostile;
mod meeting;
mod promises;

use std::{
    net::{IpAddr, Ipv4Addr},
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    ShmConfig, ShmDevice,
    ring::stride,
    sys::{self, Mapping},
    wire::{Address, Geometry, Hello, Note},
};
use crate::{
    fabric::{
        Access, Completion, CompletionKind, Context, Device, FileRange, LaneAddress, LaneConfig,
        LaneId, MemoryKeys, Status,
    },
    memory::{HostMemory, Memory as _},
};

pub(super) const HOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
pub(super) const PATIENCE: Duration = Duration::from_secs(20);
pub(super) const PAGE: usize = 4096;
pub(super) const POISON: u8 = 0x5a;

pub(super) const LANE: LaneConfig = LaneConfig {
    send_depth: 8,
    receive_depth: 4,
    max_sge: 2,
    max_inline: 32,
};

/// An honest end with three pages, of which peers may write (and read) the middle one.
pub(super) struct Victim {
    pub(super) context: Box<dyn Context>,
    pub(super) memory: HostMemory,
    pub(super) keys: MemoryKeys,
    pub(super) done: Vec<Completion>,
    pub(super) device: Arc<ShmDevice>,
}

impl Victim {
    pub(super) fn new(config: ShmConfig) -> Self {
        let device = ShmDevice::open(config).expect("open");
        let context = Arc::clone(&device).open_context(256).expect("context");
        let memory = HostMemory::memfd("victim", 3 * PAGE as u64).expect("memory");
        memory.fill(0, 3 * PAGE as u64, POISON).expect("fill");
        let range = FileRange {
            fd: memory.fd().expect("a file"),
            offset: PAGE as u64,
            address: memory.address() + PAGE as u64,
            length: PAGE as u64,
        };
        // SAFETY: the memory lives as long as the victim, whose context is dropped first; it is reached only by copies.
        let keys = unsafe { device.register_file(&range, Access::ALL) }.expect("register");
        Self {
            context,
            memory,
            keys,
            done: Vec::new(),
            device,
        }
    }

    pub(super) fn target(&self) -> u64 {
        self.memory.address() + PAGE as u64
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; 3 * PAGE];
        self.memory.read(0, &mut bytes).expect("in bounds");
        bytes
    }

    /// Nothing outside of the registered page has changed.
    #[track_caller]
    pub(super) fn assert_contained(&self) {
        let bytes = self.bytes();
        let outside = bytes[..PAGE].iter().chain(&bytes[2 * PAGE..]);
        assert!(outside.into_iter().all(|&byte| byte == POISON));
    }

    pub(super) fn poll(&mut self) {
        self.context.poll(&mut self.done).expect("poll");
    }

    #[track_caller]
    pub(super) fn until(&mut self, what: &str, mut ready: impl FnMut(&Self) -> bool) {
        let start = Instant::now();
        while !ready(self) {
            self.poll();
            assert!(start.elapsed() < PATIENCE, "{what}: {:?}", self.done);
            std::thread::yield_now();
        }
    }

    /// Waits until the lane has failed: all its receives are flushed.
    #[track_caller]
    pub(super) fn until_failed(&mut self, what: &str) {
        self.until(what, |victim| {
            victim.done.iter().any(|c| c.status != Status::Success)
        });
    }

    /// The immediates that have arrived.
    pub(super) fn arrived(&self) -> Vec<u32> {
        let good = self.done.iter().filter(|c| c.status == Status::Success);
        good.filter_map(|c| match c.kind {
            CompletionKind::Received { imm } => Some(imm),
            CompletionKind::Sent { .. } => None,
        })
        .collect()
    }
}

/// A peer that does what a test says, and nothing by itself.
pub(super) struct Rogue {
    /// Its identity, which the victim looks at; the listener is never served.
    _device: Arc<ShmDevice>,
    pub(super) socket: OwnedFd,
    pub(super) outbox: Mapping,
    pub(super) lane: LaneId,
}

pub(super) const GEOMETRY: Geometry = Geometry {
    depth: 8,
    stride: 64,
};

impl Rogue {
    /// Connects to a lane of the victim that waits for it.
    pub(super) fn connect(victim: &mut Victim) -> Self {
        Self::connect_with(victim, |_| {})
    }

    /// The same with an outbox that `prepare` has filled in.
    pub(super) fn connect_with(victim: &mut Victim, prepare: impl FnOnce(&Mapping)) -> Self {
        let file = sys::memory_file(4096 + 8 * 64).expect("memfd");
        let outbox = Mapping::new(file.as_fd(), 4096 + 8 * 64, true).expect("mmap");
        sys::seal(file.as_fd(), sys::RING_SEALS).expect("seal");
        prepare(&outbox);
        let device = ShmDevice::open(ShmConfig::default()).expect("open");
        let (lane, socket) = greet(victim, &device, GEOMETRY, &file);
        let rogue = Self {
            _device: device,
            socket,
            outbox,
            lane,
        };
        victim.until("the answer", |_| rogue.answer().is_some());
        rogue
    }

    fn answer(&self) -> Option<Hello> {
        let mut room = [0; Hello::BYTES];
        let (n, _) = sys::receive(&self.socket, &mut room).ok()?;
        room.get(..n).and_then(Hello::decode)
    }

    pub(super) fn put(&self, offset: usize, value: u64) {
        let at = self.outbox.at(offset as u64, 8).expect("in bounds");
        let value = value.to_ne_bytes();
        let from = value.as_ptr().expose_provenance() as u64;
        // SAFETY: in bounds of a mapping of our own (checked by `at`), which only atomics of the victim read.
        unsafe { sys::copy(from, at, 8) };
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    }

    /// Fills in slot `sequence`: the first words, then the first gather element.
    pub(super) fn slot(&self, sequence: usize, words: [u64; 5]) {
        for (index, value) in words.into_iter().enumerate() {
            self.put(4096 + (sequence % 8) * 64 + index * 8, value);
        }
    }

    pub(super) fn publish(&self, count: u64) {
        self.put(0, count);
        self.wake();
    }

    /// Sends a message; nobody need read it.
    pub(super) fn say(&self, bytes: &[u8], fd: Option<std::os::fd::BorrowedFd<'_>>) {
        let sent = sys::send(&self.socket, bytes, fd);
        if let Err(error) = sent {
            println!("the victim does not listen: {error}");
        }
    }

    pub(super) fn wake(&self) {
        self.say(&Note::Wake.encode(), None);
    }
}

/// Makes a lane of the victim and says hello to it with `file`.
pub(super) fn greet(
    victim: &mut Victim,
    device: &ShmDevice,
    geometry: Geometry,
    file: &OwnedFd,
) -> (LaneId, OwnedFd) {
    use zerocopy::IntoBytes;
    let (lane, address) = victim.context.create_lane(&LANE).expect("lane");
    let to = Address::decode(&address).expect("an address");
    let token = [9; 16];
    let own: LaneAddress = device.address(token).encode().expect("short");
    victim
        .context
        .connect_lane(lane, &own, HOST, true)
        .expect("wait");
    let socket = sys::connect(&super::connect::socket_name(&to)).expect("connect");
    let hello = Hello::new(to.token, token, geometry, true);
    sys::send(&socket, hello.as_bytes(), Some(file.as_fd())).expect("hello");
    (lane, socket)
}

#[test]
fn the_geometry_of_the_tests_is_that_of_their_lanes() {
    assert_eq!(stride(LANE.max_sge, LANE.max_inline), GEOMETRY.stride);
}
