//! Dmabufs: what a peer writes is there at the exporter's end, at any offset, and nowhere else.
//!
//! A memory file stands in for a dmabuf everywhere; where the kernel has /dev/udmabuf a real one is used as well, and
//! the bytes are looked at in the memory file that it was made from. A device that registers no dmabufs must say why.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
        unix::fs::FileExt,
    },
};

use kvpush::fabric::{
    Access, DmabufRange, FabricError, FabricErrorKind, FabricKind, LaneConfig, MemoryKeys, Opcode,
    Sge, Status, WindowBind,
};

use crate::{
    checker::same_bytes,
    harness::{End, LANE, Memory, Pair, Random, request, sge},
};

const PAGE: u64 = 4096;
const POISON: u8 = 0xd7;
/// An address that is none of this process, as a GPU's may be.
const ELSEWHERE: u64 = 0x7e57_0000_0000;

/// A file to register, and the memory file behind it.
struct Export {
    what: &'static str,
    fd: OwnedFd,
    backing: File,
    size: u64,
}

impl Export {
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.size as usize];
        self.backing.read_exact_at(&mut bytes, 0).expect("read");
        bytes
    }

    fn fill(&self, bytes: &[u8]) {
        self.backing.write_all_at(bytes, 0).expect("write");
    }

    /// Registers `[offset, offset + length)` under a made-up address.
    fn register(
        &self,
        end: &mut End,
        offset: u64,
        length: u64,
        access: Access,
    ) -> Result<(u64, MemoryKeys), FabricError> {
        let address = ELSEWHERE + offset;
        let range = DmabufRange {
            fd: self.fd.as_fd(),
            offset,
            length,
            address,
        };
        // SAFETY: the memory belongs to the file, which the registration holds; nobody refers to its bytes, and it is
        // not cut short.
        unsafe { end.device.register_dmabuf(&range, access) }.map(|keys| (address, keys))
    }
}

fn memory_file(size: u64) -> File {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: the name is a C string.
    let fd = unsafe { libc::memfd_create(c"kvpush-suite-dmabuf".as_ptr(), flags) };
    assert!(fd >= 0, "memfd_create: {}", io::Error::last_os_error());
    // SAFETY: a fresh descriptor that nobody else owns.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(size).expect("ftruncate");
    // A udmabuf is made only of a file that cannot shrink.
    // SAFETY: no pointers.
    let sealed = unsafe { libc::fcntl(fd, libc::F_ADD_SEALS, libc::F_SEAL_SHRINK) };
    assert_eq!(sealed, 0, "F_ADD_SEALS: {}", io::Error::last_os_error());
    file
}

/// A real dmabuf of the whole of `file` (`linux/udmabuf.h`).
fn udmabuf(file: &File, size: u64) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct UdmabufCreate {
        memfd: u32,
        flags: u32,
        offset: u64,
        size: u64,
    }
    const UDMABUF_CREATE: u64 = 1 << 30 | 24 << 16 | (b'u' as u64) << 8 | 0x42;
    let device = File::options()
        .read(true)
        .write(true)
        .open("/dev/udmabuf")?;
    let create = UdmabufCreate {
        memfd: file.as_raw_fd() as u32,
        flags: 1,
        offset: 0,
        size,
    };
    // SAFETY: the struct is that of the interface and lives through the call.
    let fd = unsafe { libc::ioctl(device.as_raw_fd(), UDMABUF_CREATE as _, &raw const create) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a fresh descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn exports(pages: u64) -> Vec<Export> {
    let size = pages * PAGE;
    let file = memory_file(size);
    let fd = file.try_clone().expect("dup").into();
    let mut exports = vec![Export {
        what: "memory file",
        fd,
        backing: file,
        size,
    }];
    let backing = memory_file(size);
    match udmabuf(&backing, size) {
        Ok(fd) => exports.push(Export {
            what: "udmabuf",
            fd,
            backing,
            size,
        }),
        Err(error) => println!("no real dmabuf here: /dev/udmabuf: {error}"),
    }
    exports
}

/// Whether `pair` has no dmabufs; then its refusal has been checked.
fn refused(pair: &mut Pair) -> bool {
    if pair.b.device.info().caps.dmabuf {
        return false;
    }
    for export in exports(1) {
        let error = export.register(&mut pair.b, 0, PAGE, Access::REMOTE_WRITE);
        let error = error.expect_err("a device that has no dmabufs");
        println!("{}: {error}", export.what);
        assert!(matches!(error.kind, FabricErrorKind::Os(_)), "{error}");
        assert!(error.hint.is_some() && !error.is_retryable(), "{error}");
    }
    true
}

fn piece((address, keys): &(u64, MemoryKeys), offset: u64, length: u64) -> Sge {
    Sge {
        address: address + offset,
        length: length as u32,
        key: keys.local,
    }
}

pub(crate) fn writes_land_at_any_offset(mut pair: Pair) {
    if refused(&mut pair) {
        return;
    }
    let mut random = Random::new("dmabuf::writes_land_at_any_offset");
    let (lane, _) = pair.lane(&LANE);
    let from = Memory::new(64 << 10, 0);
    from.write(0, &random.bytes(from.len()));
    let source = pair.a.register(&from, Access::LOCAL);
    let mut done = 0;
    for export in exports(32) {
        let mut expected = vec![POISON; export.size as usize];
        export.fill(&expected);
        let known = [0, 1, 63, PAGE - 1, PAGE, PAGE + 1, 5 * PAGE - 3, 16 * PAGE];
        let drawn: Vec<u64> = (0..24).map(|_| random.below(100_000) as u64).collect();
        for offset in known.into_iter().chain(drawn) {
            let length = 1 + random.below((export.size - offset) as usize) as u64;
            let target = export.register(&mut pair.b, offset, length, Access::REMOTE_WRITE);
            let (address, keys) = target.expect("register");
            let size = 1 + random.below(length.min(from.len() as u64) as usize);
            // Up to the last byte of the range now and then.
            let at = match random.below(3) {
                0 => length as usize - size,
                _ => random.below(length as usize - size + 1),
            };
            let to = address + at as u64;
            let write = request(done, Opcode::Write, to, keys.remote, 1);
            pair.a
                .post(lane, &[write], &[sge(&from, &source, 0, size)])
                .expect("post");
            done += 1;
            pair.until("a write into a dmabuf", |pair| {
                pair.a.sends().len() as u64 == done
            });
            assert_eq!(pair.a.sends().last(), Some(&(done - 1, Status::Success)));
            let first = offset as usize + at;
            expected[first..first + size].copy_from_slice(&from.read(0, size));
            let what = format!("{} at {offset}..+{length}", export.what);
            same_bytes(&what, &export.bytes(), &expected);
            pair.b.context.deregister(keys.mr).expect("deregister");
        }
    }
}

pub(crate) fn sends_and_reads_from_any_offset(mut pair: Pair) {
    if refused(&mut pair) {
        return;
    }
    let mut random = Random::new("dmabuf::sends_and_reads_from_any_offset");
    let (lane, _) = pair.lane(&LANE);
    let mut done = 0;
    for (from, to) in exports(16).into_iter().zip(exports(16)) {
        from.fill(&random.bytes(from.size as usize));
        let mut expected = random.bytes(to.size as usize);
        to.fill(&expected);
        for _ in 0..24 {
            let (here, there) = (random.below(20_000) as u64, random.below(20_000) as u64);
            let (most_here, most_there) = (from.size - here, to.size - there);
            let source = from.register(&mut pair.a, here, most_here, Access::ALL);
            let source = source.expect("register");
            let target = to.register(&mut pair.b, there, most_there, Access::ALL);
            let target = target.expect("register");
            let size = 1 + random.below(20_000);
            let (skip, at) = (random.below(9_000) as u64, random.below(9_000) as u64);
            let pieces = [
                piece(&source, skip, size as u64 / 2),
                piece(&source, skip + size as u64 / 2, size.div_ceil(2) as u64),
            ];
            let place = there as usize + at as usize;
            let is_read = random.below(2) == 0 && pair.b.device.info().caps.read;
            let opcode = match is_read {
                true => Opcode::Read,
                false => Opcode::Write,
            };
            let go = request(done, opcode, target.0 + at, target.1.remote, 2);
            pair.a.post(lane, &[go], &pieces).expect("post");
            done += 1;
            pair.until("a message between dmabufs", |pair| {
                pair.a.sends().len() as u64 == done
            });
            assert_eq!(pair.a.sends().last(), Some(&(done - 1, Status::Success)));
            let first = (here + skip) as usize;
            if is_read {
                let wanted = &expected[place..place + size];
                same_bytes("read", &from.bytes()[first..first + size], wanted);
            } else {
                expected[place..place + size].copy_from_slice(&from.bytes()[first..first + size]);
            }
            same_bytes(to.what, &to.bytes(), &expected);
            pair.a.context.deregister(source.1.mr).expect("deregister");
            pair.b.context.deregister(target.1.mr).expect("deregister");
        }
    }
}

pub(crate) fn outside_of_the_range_is_refused(mut pair: Pair) {
    if refused(&mut pair) {
        return;
    }
    let from = Memory::new(PAGE as usize, 0x33);
    let source = pair.a.register(&from, Access::LOCAL);
    for export in exports(4) {
        let poison = vec![POISON; export.size as usize];
        export.fill(&poison);
        let target = export.register(&mut pair.b, 100, PAGE, Access::REMOTE_WRITE);
        let (address, keys) = target.expect("register");
        // One byte before, one behind, and where the file's own pages would go on.
        for (to, length) in [(address - 1, 2), (address + 1, PAGE), (address + PAGE, 1)] {
            let (lane, peer) = pair.lane(&LaneConfig {
                send_depth: 4,
                ..LANE
            });
            pair.a.done.clear();
            let write = request(1, Opcode::Write, to, keys.remote, 1);
            pair.a
                .post(lane, &[write], &[sge(&from, &source, 0, length as usize)])
                .expect("post");
            pair.until("the refusal", |pair| !pair.a.sends().is_empty());
            assert_eq!(pair.a.sends(), [(1, Status::RemoteAccess)]);
            pair.a.context.destroy_lane(lane).expect("destroy");
            pair.b.context.destroy_lane(peer).expect("destroy");
        }
        same_bytes(export.what, &export.bytes(), &poison);
        for (offset, length) in [(0, 4 * PAGE + 1), (4 * PAGE, 1), (PAGE, u64::MAX - PAGE)] {
            let error = export.register(&mut pair.b, offset, length, Access::REMOTE_WRITE);
            assert!(error.is_err(), "{offset}..+{length} of 4 pages");
        }
    }
}

/// Where the file is mapped in this process.
fn mappings(export: &Export) -> usize {
    let inode = std::os::linux::fs::MetadataExt::st_ino(&export.backing.metadata().expect("stat"));
    let maps = std::fs::read_to_string("/proc/self/maps").expect("maps");
    let of_file = |line: &&str| line.split_whitespace().nth(4) == Some(&inode.to_string());
    maps.lines().filter(of_file).count()
}

pub(crate) fn a_mapping_ends_with_its_registration(mut pair: Pair) {
    let is_mapped = pair.b.device.info().kind != FabricKind::Verbs;
    if refused(&mut pair) || !is_mapped {
        return;
    }
    const SIZE: usize = 1 << 20;
    let from = Memory::new(SIZE, 0x44);
    let source = pair.a.register(&from, Access::LOCAL);
    let export = exports(SIZE as u64 / PAGE).remove(0);
    let range = (0, SIZE as u64);
    let (to, keys) = export
        .register(&mut pair.b, range.0, range.1, Access::ALL)
        .expect("register");
    let (second, again) = export
        .register(&mut pair.b, range.0, range.1, Access::ALL)
        .expect("the same range twice");
    assert_eq!(mappings(&export), 2);
    let (lane, _) = pair.lane(&LANE);
    // The registration ends while a stream of writes comes in: they fail, and nothing touches what is unmapped.
    let writes: Vec<_> = (0..32)
        .map(|id| request(id, Opcode::Write, to, keys.remote, 1))
        .collect();
    let whole = sge(&from, &source, 0, SIZE);
    pair.a.post(lane, &writes, &[whole]).expect("post");
    for _ in 0..3 {
        pair.poll();
    }
    pair.b.context.deregister(keys.mr).expect("deregister");
    assert_eq!(mappings(&export), 1);
    pair.until("the end of the stream", |pair| pair.a.sends().len() == 32);
    let last = pair.a.sends().last().copied();
    assert_eq!(last, Some((31, Status::Flushed)));
    // The other registration of the same range goes on.
    let (lane, _) = pair.lane(&LANE);
    pair.a.done.clear();
    let write = request(99, Opcode::Write, second, again.remote, 1);
    pair.a.post(lane, &[write], &[whole]).expect("post");
    pair.until("a write", |pair| !pair.a.sends().is_empty());
    assert_eq!(pair.a.sends(), [(99, Status::Success)]);
    same_bytes("the file", &export.bytes(), &from.all());
    pair.b.context.deregister(again.mr).expect("deregister");
    assert_eq!(mappings(&export), 0);
}

/// A window into a dmabuf, where it may be had: it opens its range, which begins anywhere, and no more.
pub(crate) fn windows_open_their_range(mut pair: Pair) {
    if refused(&mut pair) {
        return;
    }
    for export in exports(4) {
        let mut expected = vec![POISON; export.size as usize];
        export.fill(&expected);
        let target = export.register(&mut pair.b, 100, 3 * PAGE, Access::REMOTE_WRITE);
        let (address, keys) = target.expect("register");
        let (lane, peer) = pair.lane(&LANE);
        let bind = WindowBind {
            id: 1,
            mr: keys.mr,
            address: address + 77,
            length: 1000,
            access: Access::REMOTE_WRITE,
        };
        let window = match pair.b.context.bind_window(peer, &bind) {
            Ok(window) => window,
            Err(error) => {
                println!("{}: no window: {error}", export.what);
                assert_eq!(pair.b.device.info().kind, FabricKind::Verbs, "{error}");
                continue;
            }
        };
        pair.b.done.clear();
        pair.until("the binding", |pair| !pair.b.sends().is_empty());
        let from = Memory::new(4096, 0x44);
        let source = pair.a.register(&from, Access::LOCAL);
        pair.a.done.clear();
        for (id, length) in [(1, 1000), (2, 1001)] {
            let write = request(id, Opcode::Write, bind.address, window.remote, 1);
            pair.a
                .post(lane, &[write], &[sge(&from, &source, 0, length)])
                .expect("post");
            pair.until("the write", |pair| pair.a.sends().len() as u64 == id);
        }
        let wanted = [(1, Status::Success), (2, Status::RemoteAccess)];
        assert_eq!(pair.a.sends(), wanted);
        expected[177..1177].fill(0x44);
        same_bytes(export.what, &export.bytes(), &expected);
        pair.b.context.destroy_lane(peer).expect("destroy");
        pair.b.context.deregister(keys.mr).expect("deregister");
    }
}
