//! The TCP fabric over loopback, one lane, against a bare `writev`/`readv` loop that moves the same pages with a header
//! each. Prints GB/s (1e9 bytes); `cargo bench --bench tcp_fabric [gigabytes]`.

use std::{
    io::{IoSlice, IoSliceMut, Read, Write},
    net::{IpAddr, Ipv4Addr, TcpListener, TcpStream},
    sync::Arc,
    time::Instant,
};

use kvpush::fabric::{
    Access, Completion, CompletionKind, Context, Device, LaneConfig, LaneId, MemoryKeys, Opcode,
    Sge, Status, WorkRequest,
    tcp::{TcpConfig, TcpDevice},
};

const HOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const POOL: usize = 64 << 20;
const DEPTH: usize = 512;
const BATCH: usize = 64;

/// Memory that outlives everything and is touched only by raw pointers and the kernel.
fn pool(device: &dyn Device, fill: u8) -> (u64, MemoryKeys) {
    let address = Box::leak(vec![fill; POOL].into_boxed_slice())
        .as_mut_ptr()
        .expose_provenance();
    // SAFETY: leaked, so mapped until the process ends; no reference to it is kept.
    let keys = unsafe { device.register(address as u64, POOL as u64, Access::ALL) };
    (address as u64, keys.expect("register"))
}

struct Side {
    context: Box<dyn Context>,
    base: u64,
    keys: MemoryKeys,
}

fn side(fill: u8) -> Side {
    let config = TcpConfig {
        bind: HOST,
        ..TcpConfig::default()
    };
    let device: Arc<dyn Device> = TcpDevice::open(config).expect("open");
    let (base, keys) = pool(&*device, fill);
    let context = device.open_context(4096).expect("context");
    Side {
        context,
        base,
        keys,
    }
}

/// Polls, and sleeps if there was nothing: on a busy machine a spinning side would take the other's time.
fn poll(context: &mut dyn Context, out: &mut Vec<Completion>) {
    let before = out.len();
    context.poll(out).expect("poll");
    if out.len() == before && context.arm().expect("arm") {
        let mut fd = libc::pollfd {
            fd: context.wait_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one pollfd that lives through the call.
        unsafe { libc::poll(&mut fd, 1, 1000) };
    }
}

/// Writes `pages` pages and returns the seconds until the peer has seen the last.
fn fabric(a: &mut Side, b: &mut Side, lanes: (LaneId, LaneId), page: usize, pages: usize) -> f64 {
    let start = Instant::now();
    std::thread::scope(|scope| {
        let receiver = scope.spawn(|| {
            let mut out = Vec::new();
            while !out
                .iter()
                .any(|c: &Completion| matches!(c.kind, CompletionKind::Received { .. }))
            {
                poll(&mut *b.context, &mut out);
            }
            b.context.post_receives(lanes.1, 1).expect("replenish");
        });
        let mut out = Vec::new();
        let (mut posted, mut finished) = (0, 0);
        let (mut requests, mut sges) = (Vec::new(), Vec::new());
        while finished < pages {
            while posted < pages && posted - finished + BATCH <= DEPTH {
                requests.clear();
                sges.clear();
                for index in 0..BATCH.min(pages - posted) {
                    let number = posted + index;
                    let offset = (number * page % POOL) as u64;
                    let last = number + 1 == pages;
                    let signaled = last || number % BATCH == BATCH - 1;
                    requests.push(WorkRequest {
                        id: number as u64 + 1,
                        opcode: if last {
                            Opcode::WriteImm(0)
                        } else {
                            Opcode::Write
                        },
                        remote_address: b.base + offset,
                        remote_key: b.keys.remote,
                        first_sge: index as u32,
                        sge_count: 1,
                        signaled,
                        inline: false,
                    });
                    sges.push(Sge {
                        address: a.base + offset,
                        length: page as u32,
                        key: a.keys.local,
                    });
                }
                // SAFETY: all elements lie in the registered pool, which is mapped until the process ends and which
                // nothing writes or refers to.
                unsafe { a.context.post(lanes.0, &requests, &sges) }.expect("post");
                posted += requests.len();
            }
            out.clear();
            poll(&mut *a.context, &mut out);
            for completion in &out {
                assert_eq!(completion.status, Status::Success);
                if let CompletionKind::Sent { id } = completion.kind {
                    finished = id as usize;
                }
            }
        }
        receiver.join().expect("receiver");
    });
    start.elapsed().as_secs_f64()
}

/// One `writev` and one `readv` (or more, where they are cut short) for each page and its header.
fn bare(page: usize, pages: usize) -> f64 {
    let listener = TcpListener::bind((HOST, 0)).expect("bind");
    let mut out = TcpStream::connect(listener.local_addr().expect("address")).expect("connect");
    let (mut input, _) = listener.accept().expect("accept");
    out.set_nodelay(true).expect("nodelay");
    let source = vec![1u8; POOL];
    let mut target = vec![0u8; POOL];
    let start = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut header = [0u8; 56];
            for number in 0..pages {
                let offset = number * page % POOL;
                let page = &mut target[offset..offset + page];
                let mut slices = [IoSliceMut::new(&mut header), IoSliceMut::new(page)];
                let mut left = &mut slices[..];
                while left.iter().any(|slice| !slice.is_empty()) {
                    let n = input.read_vectored(left).expect("readv");
                    IoSliceMut::advance_slices(&mut left, n);
                }
            }
        });
        for number in 0..pages {
            let offset = number * page % POOL;
            let mut slices = [
                IoSlice::new(&[0; 56]),
                IoSlice::new(&source[offset..offset + page]),
            ];
            let mut left = &mut slices[..];
            while left.iter().any(|slice| !slice.is_empty()) {
                let n = out.write_vectored(left).expect("writev");
                IoSlice::advance_slices(&mut left, n);
            }
        }
    });
    start.elapsed().as_secs_f64()
}

fn main() {
    // `cargo test --benches` passes no such number; then a small run only shows that it works.
    let gigabytes = std::env::args().find_map(|arg| arg.parse::<f64>().ok());
    let total = (gigabytes.unwrap_or(0.25) * 1e9) as usize;
    let (mut a, mut b) = (side(1), side(0));
    let config = LaneConfig {
        send_depth: DEPTH as u32,
        receive_depth: 4,
        max_sge: 1,
        max_inline: 0,
    };
    let (lane_a, at_a) = a.context.create_lane(&config).expect("lane");
    let (lane_b, at_b) = b.context.create_lane(&config).expect("lane");
    b.context
        .connect_lane(lane_b, &at_a, HOST, false)
        .expect("accept");
    a.context
        .connect_lane(lane_a, &at_b, HOST, true)
        .expect("dial");
    println!("page_bytes  fabric_gb_per_s  writev_readv_gb_per_s");
    for page in [4 << 10, 64 << 10, 1 << 20] {
        let pages = total / page;
        let moved = (pages * page) as f64 / 1e9;
        let ours = moved / fabric(&mut a, &mut b, (lane_a, lane_b), page, pages);
        let theirs = moved / bare(page, pages);
        println!("{page:10}  {ours:15.2}  {theirs:21.2}");
    }
}
