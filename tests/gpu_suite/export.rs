//! Exports: which way is taken, which reasons are given, and that the offset is that of the byte.

use std::{fs::File, os::unix::fs::FileExt};

use kvpush::memory::{
    DeviceMemory, Dmabuf, HipMemory, Memory, MemoryError,
    gpu::{Driver, GpuError, GpuMemory},
};
use proptest::prelude::*;

use crate::double::{Double, Release, current, on_each};

fn reasons(result: Result<Dmabuf, MemoryError>) -> Vec<String> {
    match result {
        Err(MemoryError::Gpu(error)) => match *error {
            GpuError::NoExport { reasons, .. } => reasons,
            other => panic!("{other}"),
        },
        other => panic!("{other:?}"),
    }
}

/// The byte at an offset of the file.
fn byte(file: &Dmabuf, at: u64) -> u8 {
    let mut bytes = [0];
    let file = File::from(file.fd.try_clone().unwrap());
    file.read_exact_at(&mut bytes, at).unwrap();
    bytes[0]
}

/// Writes through the file where the export says that the memory is, and looks for it on the device, and the other way.
fn is_the_memory<D: Driver>(memory: &GpuMemory<D>, exported: &Dmabuf) {
    let file = File::from(exported.fd.try_clone().unwrap());
    let last = memory.length() - 1;
    for (at, value) in [(0, 0xa1), (last, 0xa2)] {
        file.write_all_at(&[value], exported.offset + at).unwrap();
        let mut found = [0];
        memory.read(at, &mut found).unwrap();
        assert_eq!(found, [value]);
        memory.write(at, &[value ^ 0xff]).unwrap();
        assert_eq!(byte(exported, exported.offset + at), value ^ 0xff);
    }
}

on_each! {
    fn an_allocation_is_exported(double, driver, _names) {
        let memory = GpuMemory::allocate(driver, 1, 100_000).unwrap();
        is_the_memory(&memory, &memory.export().unwrap());
        assert_eq!(current(double), (0, 0));
    }

    fn parts_of_one_allocation_share_one_export(_double, driver, _names) {
        let pool = GpuMemory::allocate(driver, 0, 1 << 20).unwrap();
        let shared = pool.export_allocation().unwrap();
        let allocation = pool.allocation().unwrap();
        for at in [0, 1, 511, 4095, 4096, 65_535, 65_536, (1 << 20) - 1000] {
            // SAFETY: a part of `pool`, which lives longer.
            let part = unsafe {
                GpuMemory::from_raw(driver, 0, pool.address() + at, 1000)
            }.unwrap();
            assert_eq!(part.allocation(), Some(allocation));
            let own = part.export().unwrap();
            is_the_memory(&part, &own);
            assert_eq!(shared.offset + (part.address() - allocation.address), own.offset);
        }
    }

    fn memory_that_is_no_one_allocation_is_exported_by_itself(double, driver, names) {
        double.fail_after(names.range, 0, 1);
        let memory = GpuMemory::allocate(driver, 0, 1 << 16).unwrap();
        double.fail(names.range, 0);
        assert_eq!(memory.allocation(), None);
        is_the_memory(&memory, &memory.export().unwrap());
        // Nor is a range that the runtime cuts shorter than the memory.
        double.set("range", 4096);
        let short = GpuMemory::allocate(driver, 0, 1 << 16).unwrap();
        assert_eq!(short.allocation(), None);
    }
}

#[test]
fn hsa_goes_first_and_its_offset_counts() {
    let double = Double::new(Release::New);
    double.set("lead", 0x30_000);
    let hip = double.hip();
    let memory = GpuMemory::allocate(&hip, 0, 1 << 16).unwrap();
    // SAFETY: a part of `memory`.
    let part = unsafe { GpuMemory::from_raw(&hip, 0, memory.address() + 777, 5000) }.unwrap();
    let exported = part.export().unwrap();
    assert_eq!(exported.offset, 0x30_000 + 777);
    is_the_memory(&part, &exported);
    assert_eq!(double.calls("hsa_init"), 1);
    assert_eq!(double.calls("hipMemGetHandleForAddressRange"), 0);
}

#[test]
fn hip_goes_second_with_the_whole_object() {
    for how in ["refused", "no dmabufs", "not started"] {
        let double = Double::new(Release::New);
        match how {
            "refused" => double.fail("hsa_amd_portable_export_dmabuf", 0x1008),
            "no dmabufs" => double.set("hsa_dmabufs", 0),
            _ => double.fail("hsa_init", 0x1008),
        }
        let hip = double.hip();
        let memory = GpuMemory::allocate(&hip, 0, 1 << 16).unwrap();
        // SAFETY: a part of `memory`.
        let part = unsafe { GpuMemory::from_raw(&hip, 0, memory.address() + 777, 5000) }.unwrap();
        let exported = part.export().unwrap();
        assert_eq!(exported.offset, 777, "{how}");
        is_the_memory(&part, &exported);
        assert_eq!(double.calls("hipMemGetHandleForAddressRange"), 1, "{how}");
    }
}

#[test]
fn hip_finds_the_object_around_memory_of_no_known_allocation() {
    let double = Double::new(Release::New);
    double.fail("hsa_amd_portable_export_dmabuf", 0x1008);
    let hip = double.hip();
    let pool = GpuMemory::allocate(&hip, 0, 1 << 16).unwrap();
    double.fail("hipMemGetAddressRange", 1);
    // SAFETY: a part of `pool`.
    let part = unsafe { GpuMemory::from_raw(&hip, 0, pool.address() + 777, 5000) }.unwrap();
    assert_eq!(part.allocation(), None);
    double.fail("hipMemGetAddressRange", 0);
    let exported = part.export().unwrap();
    assert_eq!(exported.offset, 777);
    is_the_memory(&part, &exported);
}

#[test]
fn when_both_refuse_both_say_why() {
    let double = Double::new(Release::New);
    double.fail("hsa_amd_portable_export_dmabuf", 0x1004);
    double.fail("hipMemGetHandleForAddressRange", 801);
    let memory: HipMemory = GpuMemory::allocate(&double.hip(), 1, 4096).unwrap();
    let reasons = reasons(memory.export());
    assert_eq!(reasons.len(), 2, "{reasons:?}");
    assert!(reasons[0].contains("HSA error 4100"), "{reasons:?}");
    assert!(reasons[1].contains("HIP error 801"), "{reasons:?}");
    assert_eq!(current(&double), (0, 0));
    assert_eq!(double.value("last_error"), 0);
}

#[test]
fn old_releases_say_what_they_lack() {
    let double = Double::new(Release::Old);
    let memory = GpuMemory::allocate(&double.hip(), 0, 4096).unwrap();
    let why = reasons(memory.export());
    assert!(
        why[0].contains("no hsa_amd_portable_export_dmabuf"),
        "{why:?}"
    );
    assert!(why[1].contains("needs ROCm 7.0"), "{why:?}");
    let memory = GpuMemory::allocate(&double.cuda(), 0, 4096).unwrap();
    let why = reasons(memory.export());
    assert!(why[0].contains("needs CUDA 11.7"), "{why:?}");
}

#[test]
fn cuda_asks_the_device_and_rounds_to_pages() {
    let double = Double::new(Release::New);
    let cuda = double.cuda();
    // An allocation that begins in the middle of a page, as small ones of CUDA do.
    double.set("skew", 512);
    let memory = GpuMemory::allocate(&cuda, 0, 10_000).unwrap();
    let exported = memory.export().unwrap();
    assert_eq!(exported.offset, 512);
    is_the_memory(&memory, &exported);
    double.set("dmabufs", 0);
    let why = reasons(memory.export());
    assert!(why[0].contains("open kernel modules"), "{why:?}");
    double.set("dmabufs", 1);
    double.fail("cuMemGetHandleForAddressRange", 801);
    let why = reasons(memory.export());
    assert!(why[0].contains("CUDA error 801"), "{why:?}");
    assert_eq!(current(&double), (0, 0));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    /// A byte written through an export at the offset it says is that byte of the memory, and no other byte changes.
    #[test]
    fn no_byte_lands_elsewhere(
        pages in 1u64..40,
        lead in 0u64..8,
        from in 0.0f64..1.0,
        part in 0.0f64..1.0,
        at in 0.0f64..1.0,
    ) {
        let double = Double::new(Release::New);
        double.set("lead", lead * 4096);
        let hip = double.hip();
        let size = pages * 4096 - 100;
        let pool = GpuMemory::allocate(&hip, 0, size).unwrap();
        let start = (size as f64 * from) as u64;
        let length = (((size - start) as f64 * part) as u64).max(1);
        // SAFETY: a part of `pool`.
        let memory = unsafe { GpuMemory::from_raw(&hip, 0, pool.address() + start, length) }.unwrap();
        let exported = memory.export().unwrap();
        let at = ((length as f64 * at) as u64).min(length - 1);
        File::from(exported.fd).write_all_at(&[0xee], exported.offset + at).unwrap();
        let mut bytes = vec![0; size as usize];
        pool.read(0, &mut bytes).unwrap();
        let changed: Vec<_> = bytes.iter().enumerate().filter(|(_, byte)| **byte != 0).collect();
        prop_assert_eq!(changed, [((start + at) as usize, &0xee)]);
    }
}
