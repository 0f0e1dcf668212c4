//! Two ends, their memory, and waiting with a time limit.

use std::{
    net::IpAddr,
    sync::{Arc, RwLock, RwLockReadGuard, RwLockWriteGuard},
    time::{Duration, Instant},
};

use kvpush::{
    fabric::{
        Access, Completion, CompletionKind, Context, Device, FileRange, LaneConfig, LaneId,
        MemoryKeys, Opcode, PostError, RemoteKey, Sge, Status, WorkRequest,
    },
    memory::{HostMemory, Memory as _},
};

/// Longest wait for something that must happen; generous, because guests under emulation are slow.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

static DESCRIPTORS: RwLock<()> = RwLock::new(());

/// Held by every test that opens and closes descriptors.
pub(crate) fn descriptors_may_change() -> RwLockReadGuard<'static, ()> {
    DESCRIPTORS.read().unwrap_or_else(|e| e.into_inner())
}

/// Held by a test that counts the descriptors of the process.
pub(crate) fn descriptors_are_mine() -> RwLockWriteGuard<'static, ()> {
    DESCRIPTORS.write().unwrap_or_else(|e| e.into_inner())
}

/// A block of memory that is accessed only through raw pointers, as registered memory must be: a memory file, which only
/// fabrics that look for one make use of. Ends keep the blocks that are registered with them.
pub(crate) struct Memory {
    block: Arc<HostMemory>,
}

impl Memory {
    pub(crate) fn new(length: usize, fill: u8) -> Self {
        let block = HostMemory::memfd("fabric-suite", length as u64).expect("a memory file");
        let memory = Self {
            block: Arc::new(block),
        };
        memory.write(0, &vec![fill; length]);
        memory
    }

    pub(crate) fn address(&self) -> u64 {
        self.block.address()
    }

    pub(crate) fn len(&self) -> usize {
        self.block.length() as usize
    }

    pub(crate) fn write(&self, offset: usize, bytes: &[u8]) {
        self.block.write(offset as u64, bytes).expect("in bounds");
    }

    pub(crate) fn read(&self, offset: usize, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.block
            .read(offset as u64, &mut bytes)
            .expect("in bounds");
        bytes
    }

    pub(crate) fn all(&self) -> Vec<u8> {
        self.read(0, self.len())
    }
}

/// One side: its data path and the completions that were polled and not yet taken.
pub(crate) struct End {
    pub context: Box<dyn Context>,
    pub device: Arc<dyn Device>,
    pub done: Vec<Completion>,
    pub host: IpAddr,
    /// What is registered. Dropped after the context and the device.
    registered: Vec<Arc<HostMemory>>,
    /// Whether to tell the device of the memory's file.
    pub files: bool,
}

impl End {
    fn new(device: Arc<dyn Device>, host: IpAddr) -> Self {
        let context = Arc::clone(&device)
            .open_context(4096)
            .expect("open a context");
        Self {
            context,
            device,
            done: Vec::new(),
            host,
            registered: Vec::new(),
            files: false,
        }
    }

    pub(crate) fn register(&mut self, memory: &Memory, access: Access) -> MemoryKeys {
        self.register_part(memory, 0, memory.len(), access)
    }

    pub(crate) fn register_part(
        &mut self,
        memory: &Memory,
        offset: usize,
        length: usize,
        access: Access,
    ) -> MemoryKeys {
        assert!(offset + length <= memory.len());
        self.registered.push(Arc::clone(&memory.block));
        let (address, length) = (memory.address() + offset as u64, length as u64);
        let keys = if self.files {
            let range = FileRange {
                fd: memory.block.fd().expect("a memory file"),
                offset: offset as u64,
                address,
                length,
            };
            // SAFETY: as below; the block maps all of its file.
            unsafe { self.device.register_file(&range, access) }
        } else {
            // SAFETY: in bounds (asserted) of a block that this end keeps until its context and device are dropped,
            // and that is accessed only by raw pointers.
            unsafe { self.device.register(address, length, access) }
        };
        keys.expect("register")
    }

    /// Posts requests over gather lists made by [`sge`], or of memory that lives through the call if they are inline.
    pub(crate) fn post(
        &mut self,
        lane: LaneId,
        requests: &[WorkRequest],
        sges: &[Sge],
    ) -> Result<(), PostError> {
        // SAFETY: inline elements lie in a `Memory` of the case, which only the case's own thread writes. All others
        // lie in one that is registered here, and so kept until context and device are dropped; nothing refers to its
        // bytes, cases do not end registrations that they send from or read into, and they change no source before
        // its requests have ended. Made-up keys name no registration and are refused.
        unsafe { self.context.post(lane, requests, sges) }
    }

    pub(crate) fn poll(&mut self) {
        self.context.poll(&mut self.done).expect("poll");
    }

    /// The completions so far of sends, in order.
    pub(crate) fn sends(&self) -> Vec<(u64, Status)> {
        let sends = self.done.iter().filter_map(|c| match c.kind {
            CompletionKind::Sent { id } => Some((id, c.status)),
            CompletionKind::Received { .. } => None,
        });
        sends.collect()
    }

    /// The completions so far of receives, in order.
    pub(crate) fn receives(&self) -> Vec<(u32, Status)> {
        let receives = self.done.iter().filter_map(|c| match c.kind {
            CompletionKind::Received { imm } => Some((imm, c.status)),
            CompletionKind::Sent { .. } => None,
        });
        receives.collect()
    }
}

/// Two ends that reach each other.
pub(crate) struct Pair {
    pub a: End,
    pub b: End,
}

impl Pair {
    pub(crate) fn new(
        a: Arc<dyn Device>,
        b: Arc<dyn Device>,
        host_a: IpAddr,
        host_b: IpAddr,
    ) -> Self {
        Self {
            a: End::new(a, host_a),
            b: End::new(b, host_b),
        }
    }

    /// Creates a lane on both ends and connects it; `a` dials.
    pub(crate) fn lane(&mut self, config: &LaneConfig) -> (LaneId, LaneId) {
        let (a, at_a) = self.a.context.create_lane(config).expect("create a lane");
        let (b, at_b) = self.b.context.create_lane(config).expect("create a lane");
        let (host_a, host_b) = (self.a.host, self.b.host);
        let accept = self.b.context.connect_lane(b, &at_a, host_a, false);
        accept.expect("accept");
        self.a
            .context
            .connect_lane(a, &at_b, host_b, true)
            .expect("dial");
        (a, b)
    }

    pub(crate) fn poll(&mut self) {
        self.a.poll();
        self.b.poll();
    }

    /// Polls both ends until `done`, or fails the test.
    pub(crate) fn until(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        let start = Instant::now();
        let mut idle = 0;
        while !done(self) {
            let before = self.a.done.len() + self.b.done.len();
            self.poll();
            idle = if before == self.a.done.len() + self.b.done.len() {
                idle + 1
            } else {
                0
            };
            assert!(
                start.elapsed() < PATIENCE,
                "{what}: not within {PATIENCE:?}; a {:?}, b {:?}",
                self.a.done,
                self.b.done
            );
            if idle > 100 {
                std::thread::sleep(Duration::from_micros(100));
            }
        }
    }

    /// Polls both ends for `time`.
    pub(crate) fn poll_for(&mut self, time: Duration) {
        let start = Instant::now();
        while start.elapsed() < time {
            self.poll();
            std::thread::sleep(Duration::from_micros(200));
        }
    }
}

/// The lanes of most cases.
pub(crate) const LANE: LaneConfig = LaneConfig {
    send_depth: 64,
    receive_depth: 16,
    max_sge: 4,
    max_inline: 64,
};

/// A request with its whole gather list.
pub(crate) fn request(
    id: u64,
    opcode: Opcode,
    to: u64,
    key: RemoteKey,
    sge_count: u32,
) -> WorkRequest {
    WorkRequest {
        id,
        opcode,
        remote_address: to,
        remote_key: key,
        first_sge: 0,
        sge_count,
        signaled: true,
        inline: false,
    }
}

/// `length` bytes of `memory` from `offset`.
pub(crate) fn sge(memory: &Memory, keys: &MemoryKeys, offset: usize, length: usize) -> Sge {
    assert!(offset + length <= memory.len());
    Sge {
        address: memory.address() + offset as u64,
        length: length as u32,
        key: keys.local,
    }
}

/// `KVPUSH_SEED`, or one from the clock.
pub(crate) fn seed() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    match std::env::var("KVPUSH_SEED") {
        Ok(text) => text.parse().expect("KVPUSH_SEED is a number"),
        Err(_) => now.map_or(1, |d| d.as_nanos() as u64),
    }
}

/// A small generator (xorshift64*, Vigna 2016) whose seed is printed.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(case: &str) -> Self {
        let seed = seed();
        println!("{case}: KVPUSH_SEED={seed}");
        Self(seed | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `bound`.
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        (self.next() >> 16) as usize % bound
    }

    pub(crate) fn bytes(&mut self, length: usize) -> Vec<u8> {
        (0..length).map(|_| (self.next() >> 32) as u8).collect()
    }
}
