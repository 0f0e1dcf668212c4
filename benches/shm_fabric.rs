//! The shared-memory fabric, one lane between two threads, against a bare `memcpy` of the same pages in the same run.
//! Prints GB/s (1e9 bytes) and the ratio; `cargo bench --bench shm_fabric [gigabytes]`.
//!
//! "pages" is how many different pages are gone through before they repeat: with few, both sides find them in the
//! caches. `file` has its pages in memory files that the peer maps; `kernel` has them in plain memory, which the kernel
//! copies (`process_vm_readv`). Each figure is the median of several rounds, in which all kinds take turns.

use std::{
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
    time::Instant,
};

use kvpush::{
    fabric::{
        Access, Completion, CompletionKind, Context, Device, FileRange, LaneConfig, LaneId,
        MemoryKeys, Opcode, Sge, Status, WorkRequest,
        shm::{ShmConfig, ShmDevice},
    },
    memory::{HostMemory, Memory},
};

const HOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const POOL: usize = 128 << 20;
const DEPTH: usize = 512;
const BATCH: usize = 64;
const ROUNDS: usize = 7;

struct Side {
    context: Box<dyn Context>,
    memory: HostMemory,
    keys: MemoryKeys,
}

fn side(files: bool, fill: u8) -> Side {
    let device: Arc<dyn Device> = ShmDevice::open(ShmConfig::default()).expect("open");
    let memory = match files {
        true => HostMemory::memfd("bench", POOL as u64),
        false => HostMemory::new(POOL as u64),
    };
    let memory = memory.expect("memory");
    memory.fill(0, POOL as u64, fill).expect("fill");
    let (address, length) = (memory.address(), POOL as u64);
    // SAFETY: the memory lives as long as the side, whose context is dropped first, and is reached only by copies.
    let keys = unsafe {
        match memory.fd() {
            Some(fd) => {
                let range = FileRange {
                    fd,
                    offset: 0,
                    address,
                    length,
                };
                device.register_file(&range, Access::ALL)
            }
            None => device.register(address, length, Access::ALL),
        }
    };
    Side {
        keys: keys.expect("register"),
        context: device.open_context(4096).expect("context"),
        memory,
    }
}

struct Ends {
    a: Side,
    b: Side,
    lanes: (LaneId, LaneId),
}

fn ends(files: bool) -> Ends {
    let (mut a, mut b) = (side(files, 1), side(files, 0));
    let config = LaneConfig {
        send_depth: DEPTH as u32,
        receive_depth: 4,
        max_sge: 1,
        max_inline: 0,
    };
    let (lane_a, at_a) = a.context.create_lane(&config).expect("lane");
    let (lane_b, at_b) = b.context.create_lane(&config).expect("lane");
    let accepted = b.context.connect_lane(lane_b, &at_a, HOST, false);
    accepted.expect("accept");
    let dialled = a.context.connect_lane(lane_a, &at_b, HOST, true);
    dialled.expect("dial");
    Ends {
        a,
        b,
        lanes: (lane_a, lane_b),
    }
}

/// Polls, and sleeps if there was nothing for long: on a busy machine a spinning side would take the other's time.
fn poll(context: &mut dyn Context, out: &mut Vec<Completion>, idle: &mut u32) {
    let before = out.len();
    context.poll(out).expect("poll");
    if out.len() > before {
        *idle = 0;
        return;
    }
    *idle += 1;
    if *idle > 200 && context.arm().expect("arm") {
        let mut fd = libc::pollfd {
            fd: context.wait_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one pollfd that lives through the call.
        unsafe { libc::poll(&mut fd, 1, 1000) };
        *idle = 0;
    }
}

/// Writes `count` pages, going through `pages` different ones, and returns the seconds until the peer has seen the last.
fn fabric(ends: &mut Ends, page: usize, pages: usize, count: usize) -> f64 {
    let Ends { a, b, lanes } = ends;
    let there = (b.memory.address(), b.keys.remote);
    let start = Instant::now();
    std::thread::scope(|scope| {
        let receiver = scope.spawn(|| {
            let (mut out, mut idle) = (Vec::new(), 0);
            while !out
                .iter()
                .any(|c: &Completion| matches!(c.kind, CompletionKind::Received { .. }))
            {
                poll(&mut *b.context, &mut out, &mut idle);
            }
            b.context.post_receives(lanes.1, 1).expect("replenish");
        });
        let (mut out, mut idle) = (Vec::new(), 0);
        let (mut posted, mut finished) = (0, 0);
        let (mut requests, mut sges) = (Vec::new(), Vec::new());
        while finished < count {
            while posted < count && posted - finished + BATCH <= DEPTH {
                requests.clear();
                sges.clear();
                for index in 0..BATCH.min(count - posted) {
                    let number = posted + index;
                    let offset = (number % pages * page) as u64;
                    let last = number + 1 == count;
                    requests.push(WorkRequest {
                        id: number as u64 + 1,
                        opcode: if last {
                            Opcode::WriteImm(0)
                        } else {
                            Opcode::Write
                        },
                        remote_address: there.0 + offset,
                        remote_key: there.1,
                        first_sge: index as u32,
                        sge_count: 1,
                        signaled: last || number % BATCH == BATCH - 1,
                        inline: false,
                    });
                    sges.push(Sge {
                        address: a.memory.address() + offset,
                        length: page as u32,
                        key: a.keys.local,
                    });
                }
                // SAFETY: all elements lie in the registered pool, which lives as long as the context, and which
                // nothing writes or refers to.
                unsafe { a.context.post(lanes.0, &requests, &sges) }.expect("post");
                posted += requests.len();
            }
            out.clear();
            poll(&mut *a.context, &mut out, &mut idle);
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

/// One `memcpy` of each page, by one thread.
fn bare(from: &HostMemory, to: &HostMemory, page: usize, pages: usize, count: usize) -> f64 {
    let start = Instant::now();
    for number in 0..count {
        let offset = number % pages * page;
        // SAFETY: both pools have that page, nothing refers to their bytes, and they are different mappings.
        unsafe {
            libc::memcpy(
                to.as_ptr().add(offset).cast(),
                from.as_ptr().add(offset).cast(),
                page,
            );
        }
    }
    start.elapsed().as_secs_f64()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    // `cargo test --benches` passes no such number; then a small run only shows that it works.
    let gigabytes = std::env::args().find_map(|arg| arg.parse::<f64>().ok());
    let total = (gigabytes.unwrap_or(0.125) * 1e9) as usize;
    let (mut files, mut plain) = (ends(true), ends(false));
    println!(" page_bytes  pages  memcpy_gb_s  file_gb_s  ratio  kernel_gb_s  ratio");
    for (page, pages) in [
        (4 << 10, 128),
        (4 << 10, 32 << 10),
        (16 << 10, 128),
        (64 << 10, 128),
        (64 << 10, 2048),
        (256 << 10, 128),
        (1 << 20, 128),
    ] {
        let count = total / page;
        let moved = (count * page) as f64 / 1e9;
        let (mut bases, mut ours, mut kernels) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            bases.push(moved / bare(&files.a.memory, &files.b.memory, page, pages, count));
            ours.push(moved / fabric(&mut files, page, pages, count));
            kernels.push(moved / fabric(&mut plain, page, pages, count));
        }
        let (base, file, kernel) = (median(bases), median(ours), median(kernels));
        println!(
            "{page:11}  {pages:5}  {base:11.2}  {file:9.2}  {:5.2}  {kernel:11.2}  {:5.2}",
            file / base,
            kernel / base
        );
    }
}
