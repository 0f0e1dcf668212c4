//! What the conformance suite cannot reach: timeouts, and peers that do not keep to the protocol.

mod hostile;
mod timeouts;

use std::{
    cell::UnsafeCell,
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, TcpStream},
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use zerocopy::{FromBytes, IntoBytes};

use super::{
    super::{
        Access, Completion, CompletionKind, Context, Device, LaneAddress, LaneConfig, LaneId,
        LocalKey, MemoryKeys, Opcode, PostError, RemoteKey, Sge, Status, WindowBind, WorkRequest,
    },
    TcpConfig, TcpDevice,
    wire::{Header, Hello, Token, decode_address, encode_address},
};

const HOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const PATIENCE: Duration = Duration::from_secs(20);
const LANE: LaneConfig = LaneConfig {
    send_depth: 16,
    receive_depth: 4,
    max_sge: 4,
    max_inline: 64,
};
/// The token of a peer that is played by hand.
const PEER: Token = [7; 16];

/// Timeouts short enough to be waited for.
fn impatient() -> TcpConfig {
    TcpConfig {
        bind: HOST,
        connect_timeout: Duration::from_millis(200),
        hello_timeout: Duration::from_millis(200),
        rnr_timeout: Duration::from_millis(200),
        peer_timeout: Duration::from_secs(2),
        ..TcpConfig::default()
    }
}

fn patient() -> TcpConfig {
    TcpConfig {
        bind: HOST,
        ..TcpConfig::default()
    }
}

/// A context with its completions.
struct End {
    context: Box<dyn Context>,
    device: Arc<TcpDevice>,
    done: Vec<Completion>,
    /// What is registered. Dropped after the context and the device.
    registered: Vec<Block>,
}

impl End {
    fn new(config: TcpConfig) -> Self {
        let device = TcpDevice::open(config).unwrap();
        let context = (Arc::clone(&device) as Arc<dyn Device>)
            .open_context(1024)
            .unwrap();
        Self {
            context,
            device,
            done: Vec::new(),
            registered: Vec::new(),
        }
    }

    fn poll(&mut self) {
        self.context.poll(&mut self.done).unwrap();
    }

    fn until(&mut self, what: &str, mut done: impl FnMut(&Self) -> bool) {
        let start = Instant::now();
        while !done(self) {
            self.poll();
            assert!(start.elapsed() < PATIENCE, "{what}: {:?}", self.done);
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    fn sends(&self) -> Vec<(u64, Status)> {
        let sends = self.done.iter().filter_map(|c| match c.kind {
            CompletionKind::Sent { id } => Some((id, c.status)),
            CompletionKind::Received { .. } => None,
        });
        sends.collect()
    }

    fn count(&self, kind: CompletionKind, status: Status) -> usize {
        let same = |c: &&Completion| c.kind == kind && c.status == status;
        self.done.iter().filter(same).count()
    }

    /// Whether all receives of a lane of [`LANE`] have been flushed, as they are once it has failed.
    fn has_failed(&self) -> bool {
        let received = |c: &&Completion| matches!(c.kind, CompletionKind::Received { .. });
        self.done.iter().filter(received).count() == LANE.receive_depth as usize
            && self.done.iter().any(|c| c.status == Status::Flushed)
    }

    /// A lane that waits for a peer played by hand.
    fn awaiting(&mut self) -> (LaneId, LaneAddress) {
        let (lane, address) = self.context.create_lane(&LANE).unwrap();
        let peer = encode_address(1, &PEER).unwrap();
        self.context.connect_lane(lane, &peer, HOST, false).unwrap();
        (lane, address)
    }

    fn register(&mut self, memory: &Block, access: Access) -> MemoryKeys {
        self.register_part(memory, 0, memory.0.len(), access)
    }

    fn register_part(
        &mut self,
        memory: &Block,
        offset: usize,
        length: usize,
        access: Access,
    ) -> MemoryKeys {
        assert!(offset + length <= memory.0.len());
        self.registered.push(memory.clone());
        // SAFETY: in bounds (asserted) of a block that this end keeps until its context and device are dropped, and
        // that is accessed only by raw pointers.
        unsafe {
            self.device
                .register(memory.address() + offset as u64, length as u64, access)
        }
        .unwrap()
    }

    /// Posts requests that are not inline, over gather lists made by [`piece`].
    fn post(
        &mut self,
        lane: LaneId,
        requests: &[WorkRequest],
        sges: &[Sge],
    ) -> Result<(), PostError> {
        // SAFETY: the elements are blocks registered here, so kept until context and device are dropped, whose bytes no
        // test changes or refers to.
        unsafe { self.context.post(lane, requests, sges) }
    }
}

/// Memory that is read and written through raw pointers. Clones are the same memory.
#[derive(Clone)]
struct Block(Rc<[UnsafeCell<u8>]>);

impl Block {
    fn new(length: usize, fill: u8) -> Self {
        Self((0..length).map(|_| fill.into()).collect())
    }

    fn address(&self) -> u64 {
        self.0.as_ptr().expose_provenance() as u64
    }

    fn bytes(&self) -> Vec<u8> {
        // SAFETY: reads one initialised byte through the cell's pointer; no reference to it exists.
        self.0
            .iter()
            .map(|cell| unsafe { cell.get().read_volatile() })
            .collect()
    }
}

/// A peer played by hand over a plain socket.
struct Raw(TcpStream);

impl Raw {
    /// Connects without a word.
    fn silent(address: &LaneAddress) -> Self {
        let (port, _) = decode_address(address).unwrap();
        let stream = TcpStream::connect((HOST, port)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_nodelay(true).unwrap();
        Self(stream)
    }

    /// Connects and names the lane at `address`.
    fn greet(address: &LaneAddress, credit: u64) -> Self {
        let mut raw = Self::silent(address);
        let (_, token) = decode_address(address).unwrap();
        raw.send(Hello::new(token, PEER, credit).as_bytes());
        raw
    }

    /// The same, and takes the answer.
    fn join(end: &mut End, address: &LaneAddress, credit: u64) -> Self {
        let mut raw = Self::greet(address, credit);
        end.poll_while_reading(&mut raw, Hello::BYTES);
        raw
    }

    fn send(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).unwrap();
    }

    /// Whether the other end has closed the connection.
    fn is_closed(&mut self, end: &mut End) -> bool {
        self.0.set_nonblocking(true).unwrap();
        let start = Instant::now();
        let closed = loop {
            end.poll();
            match self.0.read(&mut [0; 256]) {
                Ok(0) => break true,
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    if start.elapsed() > Duration::from_secs(2) {
                        break false;
                    }
                    std::thread::sleep(Duration::from_micros(200));
                }
                Err(_) => break true,
            }
        };
        self.0.set_nonblocking(false).unwrap();
        closed
    }
}

impl End {
    /// Polls until `raw` has `length` bytes to read, and reads them.
    fn poll_while_reading(&mut self, raw: &mut Raw, length: usize) -> Vec<u8> {
        raw.0.set_nonblocking(true).unwrap();
        let mut bytes = vec![0; length];
        let mut have = 0;
        let start = Instant::now();
        while have < length {
            self.poll();
            assert!(start.elapsed() < PATIENCE, "{have} of {length} bytes");
            match raw.0.read(&mut bytes[have..]) {
                Ok(0) => panic!("closed after {have} of {length} bytes"),
                Ok(n) => have += n,
                Err(error) => {
                    assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
                    std::thread::sleep(Duration::from_micros(200));
                }
            }
        }
        raw.0.set_nonblocking(false).unwrap();
        bytes
    }

    fn next_header(&mut self, raw: &mut Raw) -> Header {
        let bytes = self.poll_while_reading(raw, Header::BYTES);
        Header::read_from_bytes(&bytes).unwrap()
    }
}

fn write(id: u64, opcode: Opcode, to: u64, key: RemoteKey, sge_count: u32) -> WorkRequest {
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

fn piece(memory: &Block, key: LocalKey) -> Sge {
    Sge {
        address: memory.address(),
        length: memory.0.len() as u32,
        key,
    }
}
