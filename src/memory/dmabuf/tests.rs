//! Dmabufs where there are none: a sealed memory file in place of one. `tests/dmabuf.rs` has the real ones.

use std::{fs::File, os::fd::OwnedFd};

use super::*;
use crate::memory::HostMemory;

fn memory_file(length: u64) -> (HostMemory, OwnedFd) {
    let host = HostMemory::memfd("kvpush-test", length).unwrap();
    let fd = host.fd().unwrap().try_clone_to_owned().unwrap();
    (host, fd)
}

#[test]
fn a_part_is_the_bytes_at_its_place() {
    let (host, fd) = memory_file(5 << 12);
    let whole = DmabufMemory::import(fd, 0, 5 << 12).unwrap();
    for (offset, length) in [(0, 1), (1, 4095), (4095, 2), (4097, 8192), (5000, 15480)] {
        let part = whole.part(offset, length).unwrap();
        assert_eq!((part.offset(), part.length()), (offset, length));
        // What verbs require of a dmabuf's address.
        assert_eq!(part.address() % 4096, offset % 4096);
        part.fill(0, length, 7).unwrap();
        part.write(length - 1, &[9]).unwrap();
        let mut seen = vec![0; 5 << 12];
        host.read(0, &mut seen).unwrap();
        for (at, byte) in (0..).zip(seen) {
            let expected = match at {
                at if at < offset || at >= offset + length => 0,
                at if at == offset + length - 1 => 9,
                _ => 7,
            };
            assert_eq!(byte, expected, "byte {at} of {offset}..+{length}");
        }
        let mut last = [0];
        part.read(length - 1, &mut last).unwrap();
        assert_eq!(last, [9]);
        host.fill(0, 5 << 12, 0).unwrap();
        let nested = part.part(length - 1, 1).unwrap();
        assert_eq!(nested.offset(), offset + length - 1);
    }
}

#[test]
fn ranges_outside_are_refused() {
    let import = |offset, length| DmabufMemory::import(memory_file(8192).1, offset, length);
    for (offset, length) in [
        (0, 0),
        (0, 8193),
        (8192, 1),
        (u64::MAX, 1),
        (1, u64::MAX),
        (4096, 4097),
    ] {
        let error = import(offset, length).unwrap_err();
        let range = matches!(
            error,
            MemoryError::Dmabuf(DmabufError::Range { size: 8192, .. })
        );
        assert!(range, "{offset}..+{length}: {error}");
    }
    let part = import(4000, 100).unwrap();
    for (offset, length) in [(0, 101), (100, 1), (u64::MAX, 1)] {
        assert!(part.part(offset, length).is_err());
        assert!(part.fill(offset, length, 0).is_err());
    }
    assert!(part.read(99, &mut [0, 0]).is_err());
    assert!(part.write(100, &[0]).is_err());
}

#[test]
fn files_that_can_shrink_are_refused() {
    let plain = File::open(std::env::current_exe().unwrap()).unwrap();
    // SAFETY: a plain system call with a NUL-terminated name.
    let unsealed = unsafe { libc::memfd_create(c"kvpush-test".as_ptr(), libc::MFD_CLOEXEC) };
    // SAFETY: the descriptor was just created and belongs to nobody else.
    let unsealed = unsafe { std::os::fd::FromRawFd::from_raw_fd(unsealed) };
    let (reader, _writer) = std::io::pipe().unwrap();
    for fd in [plain.into(), unsealed, reader.into()] {
        let error = DmabufMemory::import(fd, 0, 1).unwrap_err();
        let refused = matches!(error, MemoryError::Dmabuf(DmabufError::NotDmabuf));
        assert!(refused, "{error}");
    }
}

#[test]
fn an_export_names_the_same_bytes() {
    let (host, fd) = memory_file(16384);
    let memory = DmabufMemory::import(fd, 5000, 3000).unwrap();
    let exported = memory.device().unwrap().export().unwrap();
    assert_eq!(exported.offset, 5000);
    let again = DmabufMemory::import(exported.fd, exported.offset, 3000).unwrap();
    drop(memory);
    again.write(0, b"seen").unwrap();
    let mut bytes = [0; 4];
    host.read(5000, &mut bytes).unwrap();
    assert_eq!(&bytes, b"seen");
}

#[test]
fn its_copier_copies() {
    let memory = DmabufMemory::import(memory_file(8192).1, 100, 5000).unwrap();
    let staging = HostMemory::new(4096).unwrap();
    memory.write(40, b"from the device").unwrap();
    let mut copier = memory.copier().unwrap();
    let copy = Copy {
        device: memory.address() + 40,
        host: staging.address() + 1,
        length: 15,
    };
    let back = Copy {
        device: memory.address() + 4985,
        ..copy
    };
    // SAFETY: both ranges are mapped and nobody refers to them.
    let tickets = unsafe {
        [
            copier.start(Direction::ToHost, &[copy]).unwrap(),
            copier.start(Direction::ToDevice, &[back]).unwrap(),
        ]
    };
    assert!(tickets[0] < tickets[1]);
    assert!(copier.is_done(tickets[1]).unwrap());
    let mut bytes = [0; 15];
    memory.read(4985, &mut bytes).unwrap();
    assert_eq!(&bytes, b"from the device");
}

#[test]
fn missing_exporters_are_named() {
    let error = heap("of-nobody", 4096).unwrap_err();
    let MemoryError::Dmabuf(DmabufError::Node { node, source, .. }) = &error else {
        panic!("{error}");
    };
    assert_eq!(node, "/dev/dma_heap/of-nobody");
    assert_eq!(source.kind(), io::ErrorKind::NotFound);
    assert!(error.to_string().contains("CONFIG_DMABUF_HEAPS"), "{error}");
    assert!(!error.is_retryable());
    // This host may have the other one.
    match Udmabuf::new(4096) {
        Ok(made) => assert_eq!(made.memory().unwrap().exporter(), "udmabuf"),
        Err(error) => assert!(error.to_string().contains("/dev/udmabuf"), "{error}"),
    }
}

#[test]
fn memory_that_the_host_cannot_map_is_for_devices_only() {
    // A read-only memory file cannot be mapped for writing, as some exporters' memory cannot at all.
    let (_host, fd) = memory_file(8192);
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let read_only: OwnedFd = File::open(path).unwrap().into();
    let memory = DmabufMemory::import(read_only, 100, 50).unwrap();
    assert!(!memory.is_host_accessible());
    assert_eq!(memory.address() % 4096, 100);
    let error = memory.write(0, b"x").unwrap_err();
    let refused = matches!(error, MemoryError::Dmabuf(DmabufError::NotMappable { .. }));
    assert!(refused, "{error}");
    assert!(memory.read(0, &mut [0]).is_err());
    assert!(memory.copier().is_err());
    assert!(memory.export().is_ok() && memory.flush().is_ok());
}
