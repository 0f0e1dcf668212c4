//! A connected pair of lanes over the double of libibverbs, driven through the fabric's traits alone.

use std::{net::Ipv4Addr, sync::Arc};

use kvpush::{
    fabric::{
        Access, Completion, CompletionKind, Context, Device, LaneConfig, LaneId, MemoryKeys,
        Opcode, Sge, Status, WorkRequest,
        verbs::{VerbsConfig, VerbsDevice},
    },
    memory::{HostMemory, Memory},
};

/// Requests posted at once, as the endpoint does it.
pub(crate) const BATCH: u32 = 64;

/// A writing and a reading end.
pub(crate) struct Lanes {
    writer: Box<dyn Context>,
    reader: Box<dyn Context>,
    ours: LaneId,
    theirs: LaneId,
    plain: Vec<WorkRequest>,
    immediates: Vec<WorkRequest>,
    sges: Vec<Sge>,
    out: Vec<Completion>,
    // After the contexts, which may name it.
    _memory: [HostMemory; 2],
}

fn open() -> Arc<VerbsDevice> {
    VerbsDevice::open("null0", 1, &VerbsConfig::default()).expect("the double's device")
}

fn register(device: &VerbsDevice, memory: &HostMemory) -> MemoryKeys {
    // SAFETY: the memory is mapped, and outlives the contexts of the device.
    let keys = unsafe { device.register(memory.address(), memory.length(), Access::REMOTE_WRITE) };
    keys.expect("a registration")
}

impl Lanes {
    /// The double must have been loaded.
    pub(crate) fn new() -> Self {
        const PAGE: u32 = 4096;
        let make = || HostMemory::new(u64::from(BATCH * PAGE)).expect("memory");
        let memory = [make(), make()];
        let devices = [open(), open()];
        let local = register(&devices[0], &memory[0]).local;
        let remote = register(&devices[1], &memory[1]).remote;
        let [mut writer, mut reader] =
            devices.map(|device| device.open_context(4096).expect("a context"));
        let config = LaneConfig {
            send_depth: 256,
            receive_depth: 256,
            max_sge: 16,
            max_inline: 0,
        };
        let (ours, our_address) = writer.create_lane(&config).expect("a lane");
        let (theirs, their_address) = reader.create_lane(&config).expect("a lane");
        let host = Ipv4Addr::LOCALHOST.into();
        let connect = |context: &mut Box<dyn Context>, lane, to, dial| {
            let connected = context.connect_lane(lane, to, host, dial);
            connected.expect("a connection");
        };
        connect(&mut reader, theirs, &our_address, false);
        connect(&mut writer, ours, &their_address, true);
        let place = |memory: &HostMemory, index: u32| memory.address() + u64::from(index * PAGE);
        let sges = (0..BATCH).map(|index| Sge {
            address: place(&memory[0], index),
            length: PAGE,
            key: local,
        });
        let sges = sges.collect();
        let request = |index: u32, opcode| WorkRequest {
            id: index.into(),
            opcode,
            remote_address: place(&memory[1], index),
            remote_key: remote,
            first_sge: index,
            sge_count: 1,
            signaled: index + 1 == BATCH,
            inline: false,
        };
        Self {
            writer,
            reader,
            ours,
            theirs,
            plain: (0..BATCH).map(|i| request(i, Opcode::Write)).collect(),
            immediates: (0..BATCH)
                .map(|i| request(i, Opcode::WriteImm(i)))
                .collect(),
            sges,
            out: Vec::with_capacity(2 * BATCH as usize),
            _memory: memory,
        }
    }

    /// Posts a batch of writes and takes the one completion of them.
    pub(crate) fn writes(&mut self) {
        // SAFETY: all elements lie in the writer's registration, and nobody has a reference there.
        let posted = unsafe { self.writer.post(self.ours, &self.plain, &self.sges) };
        posted.expect("room");
        self.sent();
    }

    /// The same with immediates, which the reader takes and gives their receives back.
    pub(crate) fn arrivals(&mut self) {
        // SAFETY: as above.
        let posted = unsafe { self.writer.post(self.ours, &self.immediates, &self.sges) };
        posted.expect("room");
        self.sent();
        self.out.clear();
        while self.out.len() < BATCH as usize {
            self.reader.poll(&mut self.out).expect("a poll");
        }
        let arrived = |done: &Completion| matches!(done.kind, CompletionKind::Received { .. });
        assert!(self.out.iter().all(arrived));
        let replenished = self.reader.post_receives(self.theirs, BATCH);
        replenished.expect("receives");
    }

    fn sent(&mut self) {
        self.out.clear();
        while self.out.is_empty() {
            self.writer.poll(&mut self.out).expect("a poll");
        }
        let last = CompletionKind::Sent {
            id: u64::from(BATCH) - 1,
        };
        let done: Vec<_> = self
            .out
            .iter()
            .map(|done| (done.kind, done.status))
            .collect();
        assert_eq!(done, [(last, Status::Success)]);
    }
}
