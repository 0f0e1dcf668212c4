//! What the fabric promises beyond the traits: nothing that was given up counts, a process number that has come to mean
//! somebody else is not read, files are unmapped when they are not used any more.

use std::{
    os::fd::AsFd,
    process::{Child, Command, Stdio},
    sync::Arc,
};

use super::{
    super::{
        ShmConfig,
        copier::{Copier, CopyFault},
        files::{Mappings, PeerFiles},
        lane::Fault,
        memory::{MemoryView, Own, Registry},
        notes::Notes,
        responder::{Responder, Surroundings},
        ring::{Descriptor, Outbox, PeerBox, Word},
        sys::{self, Process},
        wire::{End, Location, Op, pack},
    },
    GEOMETRY, HOST, LANE, PAGE, POISON, Victim,
};
use crate::{
    fabric::{
        Access, FileRange, LaneId, Opcode, Sge, Status, WorkRequest, registry::Found,
        software::ReceiveQueue,
    },
    memory::{HostMemory, Memory as _},
};

/// What a responder needs, without a lane.
struct Bench {
    memory: MemoryView,
    target: HostMemory,
    key: u32,
    copier: Copier,
    files: PeerFiles,
    receives: ReceiveQueue,
    notes: Notes,
    own: Outbox,
    theirs: Outbox,
    peer: PeerBox,
}

impl Bench {
    fn new() -> Self {
        let registry = Arc::new(Registry::new());
        let target = HostMemory::new(PAGE as u64).expect("memory");
        let place = (target.address(), PAGE as u64);
        let keys = registry.insert(place.0, place.1, Access::ALL, None, None);
        let key = keys.expect("a key").remote.0;
        let theirs = Outbox::new(GEOMETRY).expect("outbox");
        let file = theirs.file().try_clone().expect("dup");
        let source = HostMemory::memfd("source", PAGE as u64).expect("memory");
        source.fill(0, PAGE as u64, 0x33).expect("fill");
        let fd = source.fd().expect("a file").try_clone_to_owned();
        let mapping = Mappings::default().map(&fd.expect("dup"), PAGE as u64);
        let mut files = PeerFiles::default();
        assert!(files.add(1, mapping.expect("map")));
        Self {
            memory: MemoryView::new(registry),
            target,
            key,
            copier: Copier::new(),
            files,
            receives: ReceiveQueue::new(4),
            notes: Notes::default(),
            own: Outbox::new(GEOMETRY).expect("outbox"),
            peer: PeerBox::new(&file, GEOMETRY).expect("map").expect("sealed"),
            theirs,
        }
    }

    fn offer(&self, sequence: u64, imm: u32) {
        self.theirs.put_request(
            sequence,
            &Descriptor {
                what: pack(Op::WriteImm(imm), false, 1),
                address: self.target.address(),
                key_length: u64::from(self.key) << 32 | PAGE as u64,
            },
        );
        let from = Location { file: 1, place: 0 };
        self.theirs.put_element(sequence, 0, PAGE as u32, from);
    }

    fn run(&mut self, responder: &mut Responder, published: u64) -> Result<(), Fault> {
        let mut around = Surroundings {
            lane: LaneId(1),
            memory: &mut self.memory,
            copier: &mut self.copier,
            files: &mut self.files,
            process: None,
            peer: &self.peer,
            outbox: &self.own,
            receives: &mut self.receives,
            notes: &mut self.notes,
        };
        let round = responder.run(&mut around, published, 0, 1 << 20);
        round.map(|_| ())
    }
}

/// The writer gives up (fences) after the reader has looked and before it has counted: nothing counts, because the
/// source may have been used for something else while it was copied.
#[test]
fn what_ends_while_it_is_copied_does_not_count() {
    let mut bench = Bench::new();
    let mut responder = Responder::default();
    bench.offer(0, 7);
    assert_eq!(bench.run(&mut responder, 1), Ok(()));
    assert_eq!(bench.receives.posted(), 3, "the control: it counts");
    assert_eq!(bench.own.load(Word::Executed), 1);
    bench.offer(1, 8);
    bench.theirs.end(End::Closed.encode());
    assert_eq!(bench.run(&mut responder, 2), Err(Fault::Ended));
    assert_eq!(bench.receives.posted(), 3);
    assert_eq!(bench.own.load(Word::Executed), 1);
}

/// The same over whole lanes: a writer that is fenced in the middle and changes its pages is never counted with them.
#[test]
fn a_fenced_writer_may_reuse_its_pages() {
    for rounds in 0..40 {
        let mut writer = Victim::new(ShmConfig::default());
        let mut reader = Victim::new(ShmConfig {
            slice: 256,
            ..ShmConfig::default()
        });
        let (a, at_a) = writer.context.create_lane(&LANE).expect("lane");
        let (b, at_b) = reader.context.create_lane(&LANE).expect("lane");
        let accepted = reader.context.connect_lane(b, &at_a, HOST, false);
        accepted.expect("accept");
        let dialled = writer.context.connect_lane(a, &at_b, HOST, true);
        dialled.expect("dial");
        writer.memory.fill(PAGE as u64, PAGE as u64, 1).unwrap();
        let request = WorkRequest {
            id: 1,
            opcode: Opcode::WriteImm(1),
            remote_address: reader.target(),
            remote_key: reader.keys.remote,
            first_sge: 0,
            sge_count: 1,
            signaled: true,
            inline: false,
        };
        let piece = Sge {
            address: writer.target(),
            length: PAGE as u32,
            key: writer.keys.local,
        };
        // SAFETY: the element lies in the writer's registered page, which lives as long as its context.
        unsafe { writer.context.post(a, &[request], &[piece]) }.expect("post");
        for _ in 0..rounds {
            writer.poll();
            reader.poll();
        }
        writer.context.fence_lane(a).expect("fence");
        writer.memory.fill(PAGE as u64, PAGE as u64, 2).unwrap();
        for _ in 0..200 {
            reader.poll();
        }
        if !reader.arrived().is_empty() {
            let page = reader.bytes();
            assert!(
                page[PAGE..2 * PAGE].iter().all(|&byte| byte == 1),
                "after {rounds} rounds"
            );
        }
        writer.until("the end", |writer| !writer.done.is_empty());
        if writer.done[0].status == Status::Success {
            assert_eq!(reader.arrived(), [1], "after {rounds} rounds");
        }
    }
}

fn child() -> Child {
    let mut command = Command::new("sleep");
    command.arg("600").stdin(Stdio::null());
    command.spawn().expect("start a process")
}

fn found(memory: &HostMemory) -> Found<'_, Own> {
    Found {
        host: memory.address(),
        mapping: None,
        offset: 0,
        own: &None,
    }
}

fn one_piece(process: &Process, from: &HostMemory, to: &HostMemory) -> Result<(), CopyFault> {
    let mut copier = Copier::new();
    let mut files = PeerFiles::default();
    let from = Location {
        file: 0,
        place: from.address(),
    };
    let to = found(to);
    let pieces = (from, &to);
    // SAFETY: the destination is a whole page of this test.
    unsafe { copier.copy(0, &mut files, Some(process), pieces, PAGE as u32) }?;
    copier.flush(Some(process))
}

/// The peer has died, and its number has been given to another process (here: to this one). That one is not read.
#[test]
fn a_number_that_means_another_process_is_not_read() {
    let (from, to) = (
        HostMemory::new(PAGE as u64).unwrap(),
        HostMemory::new(PAGE as u64).unwrap(),
    );
    from.fill(0, PAGE as u64, 0x44).unwrap();
    to.fill(0, PAGE as u64, POISON).unwrap();
    let me = std::process::id() as i32;
    let own = Process::with_number(me, me).expect("pidfd_open");
    assert_eq!(one_piece(&own, &from, &to), Ok(()), "the control");
    let mut byte = [0];
    to.read(0, &mut byte).unwrap();
    assert_eq!(byte, [0x44]);
    to.fill(0, PAGE as u64, POISON).unwrap();
    let mut dead = child();
    let reused = Process::with_number(me, dead.id() as i32).expect("pidfd_open");
    dead.kill().expect("kill");
    dead.wait().expect("wait");
    assert_eq!(one_piece(&reused, &from, &to), Err(CopyFault::Gone));
    to.read(0, &mut byte).unwrap();
    assert_eq!(byte, [POISON], "not even read");
}

/// Pieces that share a system call with one whose memory is missing: those before it count, it and those after do not.
#[test]
fn a_missing_page_is_found_among_many() {
    let me = std::process::id() as i32;
    let own = Process::with_number(me, me).expect("pidfd_open");
    let (from, to) = (
        HostMemory::new(PAGE as u64).unwrap(),
        HostMemory::new(PAGE as u64).unwrap(),
    );
    for missing in [0, 1, 500, 1023, 1024, 1500] {
        let mut copier = Copier::new();
        let mut files = PeerFiles::default();
        let mut result = Ok(());
        for owner in 0..1600 {
            let place = if owner == missing { 8 } else { from.address() };
            let to = found(&to);
            let pieces = (Location { file: 0, place }, &to);
            // SAFETY: the destination is a page of this test.
            result = unsafe { copier.copy(owner, &mut files, Some(&own), pieces, 64) };
            if result.is_err() {
                break;
            }
        }
        let result = result.and_then(|()| copier.flush(Some(&own)));
        assert_eq!(result, Err(CopyFault::Missing { owner: missing }));
    }
}

fn mappings_of(name: &str) -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").expect("/proc is mounted");
    maps.lines().filter(|line| line.contains(name)).count()
}

/// A peer's file is mapped once for all its lanes, and not any longer than it is registered.
#[test]
fn files_are_mapped_once_and_not_for_ever() {
    const NAME: &str = "kvpush-once-and-gone";
    let mut writer = Victim::new(ShmConfig::default());
    let mut reader = Victim::new(ShmConfig::default());
    let source = HostMemory::memfd(NAME, PAGE as u64).expect("memory");
    let range = FileRange {
        fd: source.fd().expect("a file"),
        offset: 0,
        address: source.address(),
        length: PAGE as u64,
    };
    use crate::fabric::Device as _;
    // SAFETY: deregistered below, before the memory goes.
    let keys = unsafe { writer.device.register_file(&range, Access::LOCAL) }.expect("register");
    assert_eq!(mappings_of(NAME), 1, "our own");
    for imm in 0..3 {
        let (a, at_a) = writer.context.create_lane(&LANE).expect("lane");
        let (b, at_b) = reader.context.create_lane(&LANE).expect("lane");
        let accepted = reader.context.connect_lane(b, &at_a, HOST, false);
        accepted.expect("accept");
        let dialled = writer.context.connect_lane(a, &at_b, HOST, true);
        dialled.expect("dial");
        let request = WorkRequest {
            id: 1,
            opcode: Opcode::WriteImm(imm),
            remote_address: reader.target(),
            remote_key: reader.keys.remote,
            first_sge: 0,
            sge_count: 1,
            signaled: true,
            inline: false,
        };
        let piece = Sge {
            address: source.address(),
            length: PAGE as u32,
            key: keys.local,
        };
        // SAFETY: the element lies in a registered page.
        unsafe { writer.context.post(a, &[request], &[piece]) }.expect("post");
        let want = imm as usize + 1;
        reader.until("the page", |reader| {
            writer.poll();
            reader.arrived().len() == want
        });
        writer.until("the end", |writer| writer.done.len() == want);
    }
    assert_eq!(mappings_of(NAME), 2, "ours, and one of the reader");
    writer.context.deregister(keys.mr).expect("deregister");
    reader.until("unmapped", |_| {
        writer.poll();
        mappings_of(NAME) == 1
    });
}

/// A file that somebody may cut off is registered as plain memory.
#[test]
fn a_file_that_may_shrink_is_not_shared() {
    use crate::fabric::Device as _;
    let victim = Victim::new(ShmConfig::default());
    let file = sys::memory_file(PAGE).expect("memfd");
    let mapping = sys::Mapping::new(file.as_fd(), PAGE, true).expect("mmap");
    assert!(victim.device.registry().all(Option::is_some));
    let range = FileRange {
        fd: file.as_fd(),
        offset: 0,
        address: mapping.base().expose_provenance() as u64,
        length: PAGE as u64,
    };
    // SAFETY: nothing is posted.
    unsafe { victim.device.register_file(&range, Access::LOCAL) }.expect("register");
    assert!(!victim.device.registry().all(Option::is_some));
}
