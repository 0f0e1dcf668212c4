//! Two devices, `a` and `b`, with memory and lanes between them.

use std::{
    net::{IpAddr, Ipv4Addr},
    sync::{Arc, OnceLock},
};

use kvpush::fabric::{
    Access, Completion, CompletionKind, Context, Device, LaneConfig, LaneId, LocalKey, MemoryKeys,
    Opcode, PostError, RemoteKey, Sge, Status, WorkRequest,
    sim::{SimConfig, SimDevice, SimNet},
};

pub(crate) const SIZE: usize = 1 << 20;
pub(crate) const MTU: usize = 4096;
pub(crate) const CQ_DEPTH: u32 = 4096;
pub(crate) const HOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

pub(crate) const LANE: LaneConfig = LaneConfig {
    send_depth: 64,
    receive_depth: 16,
    max_sge: 4,
    max_inline: 64,
};

/// Memory that a device may change at any time. No reference to the bytes is taken, and threads touch them only when
/// the fabric says that it is their turn.
pub(crate) struct Memory {
    base: *mut u8,
    size: usize,
}

// SAFETY: it owns its bytes.
unsafe impl Send for Memory {}

impl Memory {
    pub(crate) fn new(size: usize) -> Self {
        let base = Box::into_raw(vec![0u8; size].into_boxed_slice()).cast();
        Self { base, size }
    }

    pub(crate) fn address(&self) -> u64 {
        self.base as u64
    }

    pub(crate) fn fill(&self, byte: u8) {
        // SAFETY: all of it is ours.
        unsafe { self.base.write_bytes(byte, self.size) }
    }

    /// Bytes that differ from place to place.
    pub(crate) fn pattern(&self) {
        static PATTERN: OnceLock<Vec<u8>> = OnceLock::new();
        let pattern = PATTERN.get_or_init(|| {
            let byte = |index: usize| (index * 31 + index / 251) as u8;
            (0..SIZE).map(byte).collect()
        });
        assert_eq!(pattern.len(), self.size);
        // SAFETY: as long as each other, and apart.
        unsafe {
            self.base
                .copy_from_nonoverlapping(pattern.as_ptr(), self.size)
        }
    }

    pub(crate) fn bytes(&self, start: usize, length: usize) -> Vec<u8> {
        assert!(start + length <= self.size);
        let mut bytes = vec![0; length];
        // SAFETY: checked to be inside; `bytes` is apart.
        unsafe {
            bytes
                .as_mut_ptr()
                .copy_from_nonoverlapping(self.base.add(start), length)
        }
        bytes
    }

    pub(crate) fn byte(&self, index: usize) -> u8 {
        self.bytes(index, 1)[0]
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let slice = std::ptr::slice_from_raw_parts_mut(self.base, self.size);
        // SAFETY: from `Box::into_raw` in `new`, with the same length.
        drop(unsafe { Box::from_raw(slice) });
    }
}

pub(crate) struct Side {
    pub(crate) context: Box<dyn Context>,
    pub(crate) device: Arc<SimDevice>,
    pub(crate) keys: MemoryKeys,
    pub(crate) memory: Memory,
}

impl Side {
    fn new(net: &SimNet, name: &str, access: Access, cq_depth: u32) -> Self {
        let device = net.device(name);
        let memory = Memory::new(SIZE);
        // SAFETY: `memory` is dropped after the context and the device (field order), nothing references its bytes.
        let keys = unsafe { device.register(memory.address(), SIZE as u64, access) }.unwrap();
        let context = Arc::clone(&device).open_context(cq_depth).unwrap();
        Self {
            context,
            device,
            keys,
            memory,
        }
    }

    /// Posts requests over gather lists made by [`Side::sge`].
    pub(crate) fn post(
        &mut self,
        lane: LaneId,
        requests: &[WorkRequest],
        sges: &[Sge],
    ) -> Result<(), PostError> {
        // SAFETY: what lies in this side's memory is registered and mapped until after the context and the device are
        // gone (field order), and is touched by raw pointers only, between the net's steps. What leaves it, or has a
        // made-up key, lies in no registration and is refused; a message that is too long is refused at once.
        unsafe { self.context.post(lane, requests, sges) }
    }

    pub(crate) fn poll(&mut self) -> Vec<Completion> {
        let mut all = Vec::new();
        loop {
            let before = all.len();
            self.context.poll(&mut all).unwrap();
            if all.len() == before {
                return all;
            }
        }
    }

    /// The completions of the send queue: request and status.
    pub(crate) fn sent(&mut self) -> Vec<(u64, Status)> {
        let polled = self.poll();
        let ids = polled.into_iter().filter_map(|c| match c.kind {
            CompletionKind::Sent { id } => Some((id, c.status)),
            CompletionKind::Received { .. } => None,
        });
        ids.collect()
    }

    pub(crate) fn sge(&self, start: usize, length: usize) -> Sge {
        Sge {
            address: self.memory.address() + start as u64,
            length: length as u32,
            key: self.keys.local,
        }
    }
}

pub(crate) struct Rig {
    pub(crate) net: SimNet,
    pub(crate) a: Side,
    pub(crate) b: Side,
    /// Lanes by index: the one of `a` and the one of `b`.
    pub(crate) lanes: Vec<(LaneId, LaneId)>,
}

pub(crate) struct Write {
    pub(crate) id: u64,
    pub(crate) from: usize,
    pub(crate) to: usize,
    pub(crate) length: usize,
    pub(crate) imm: Option<u32>,
}

/// A write without immediate of the same range at both sides.
pub(crate) fn write(id: u64, at: usize, length: usize) -> Write {
    Write {
        id,
        from: at,
        to: at,
        length,
        imm: None,
    }
}

impl Rig {
    pub(crate) fn new(config: SimConfig, lanes: usize) -> Self {
        Self::with(config, lanes, LANE, CQ_DEPTH)
    }

    pub(crate) fn with(config: SimConfig, lanes: usize, lane: LaneConfig, cq_depth: u32) -> Self {
        let net = SimNet::new(config);
        let a = Side::new(&net, "a", Access::LOCAL, cq_depth);
        let b = Side::new(&net, "b", Access::ALL, cq_depth);
        a.memory.pattern();
        let mut rig = Self {
            net,
            a,
            b,
            lanes: Vec::new(),
        };
        // The numbers of the two sides differ, so that mixing them up does not work by chance.
        rig.a.context.create_lane(&lane).unwrap();
        for _ in 0..lanes {
            rig.connect(&lane);
        }
        rig
    }

    pub(crate) fn connect(&mut self, config: &LaneConfig) {
        let (ours, our_address) = self.a.context.create_lane(config).unwrap();
        let (theirs, their_address) = self.b.context.create_lane(config).unwrap();
        self.a
            .context
            .connect_lane(ours, &their_address, HOST, true)
            .unwrap();
        self.b
            .context
            .connect_lane(theirs, &our_address, HOST, false)
            .unwrap();
        self.lanes.push((ours, theirs));
    }

    pub(crate) fn request(&self, write: &Write) -> (WorkRequest, Sge) {
        let request = WorkRequest {
            id: write.id,
            opcode: write.imm.map_or(Opcode::Write, Opcode::WriteImm),
            remote_address: self.b.memory.address() + write.to as u64,
            remote_key: self.b.keys.remote,
            first_sge: 0,
            sge_count: u32::from(write.length > 0),
            signaled: true,
            inline: false,
        };
        (request, self.a.sge(write.from, write.length))
    }

    pub(crate) fn post(&mut self, lane: usize, write: Write) {
        let (request, sge) = self.request(&write);
        self.post_raw(lane, &[request], &[sge]).unwrap();
    }

    pub(crate) fn post_raw(
        &mut self,
        lane: usize,
        requests: &[WorkRequest],
        sges: &[Sge],
    ) -> Result<(), PostError> {
        self.a.post(self.lanes[lane].0, requests, sges)
    }

    /// Posts an empty write with immediate: a marker behind what was posted before.
    pub(crate) fn post_imm(&mut self, lane: usize, id: u64, imm: u32) {
        let marker = Write {
            imm: Some(imm),
            ..write(id, 0, 0)
        };
        self.post(lane, marker);
    }

    pub(crate) fn settle(&self) {
        assert!(self.net.run_until_idle(1_000_000), "{}", self.net.trace());
    }

    /// Steps until `done`, which must come true before the net is at rest.
    pub(crate) fn step_until(&mut self, mut done: impl FnMut(&mut Self) -> bool) {
        while !done(self) {
            assert!(self.net.step(), "at rest too early:\n{}", self.net.trace());
        }
    }

    pub(crate) fn same(&self, from: usize, to: usize, length: usize) -> bool {
        self.a.memory.bytes(from, length) == self.b.memory.bytes(to, length)
    }
}

pub(crate) fn seeded(seed: u64) -> SimConfig {
    SimConfig::seeded(seed)
}

/// Keys that no device gave out.
pub(crate) fn wrong_keys(keys: MemoryKeys) -> (LocalKey, RemoteKey) {
    (
        LocalKey(keys.local.0 ^ 0x0001_0000),
        RemoteKey(keys.remote.0 ^ 0x0001_0000),
    )
}
