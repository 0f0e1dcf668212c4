//! Allocating and wrapping: what is accepted, what is refused, and that the thread's device stays what it was.

use kvpush::memory::{
    Memory, MemoryError, MemoryKind,
    gpu::{GpuError, GpuMemory, Hip, Libraries, Runtime},
};

use crate::double::{Double, Release, current, on_each};

fn gpu_error(result: Result<impl std::fmt::Debug, MemoryError>) -> GpuError {
    match result {
        Err(MemoryError::Gpu(error)) => *error,
        other => panic!("{other:?}"),
    }
}

on_each! {
    fn memory_is_written_and_read_back(_double, driver, _names) {
        let memory = GpuMemory::allocate(driver, 1, 10_000).unwrap();
        assert_eq!(memory.length(), 10_000);
        assert_eq!(memory.device_number(), 1);
        assert!(matches!(memory.kind(), MemoryKind::Hip(1) | MemoryKind::Cuda(1)));
        let device = memory.device().unwrap();
        assert!(!device.is_host_accessible());
        let bus = device.location().unwrap().bus;
        assert!(bus == 0x0d || bus == 0x1c, "{bus:#x}");
        memory.write(9_990, b"the end").unwrap();
        let mut bytes = [0; 7];
        memory.read(9_990, &mut bytes).unwrap();
        assert_eq!(&bytes, b"the end");
        assert!(matches!(
            memory.write(9_994, b"the end"),
            Err(MemoryError::OutOfRange { .. })
        ));
        assert!(matches!(
            memory.read(u64::MAX, &mut bytes),
            Err(MemoryError::OutOfRange { .. })
        ));
    }

    fn a_device_that_is_not_there_is_refused(_double, driver, _names) {
        let error = gpu_error(GpuMemory::allocate(driver, 2, 4096));
        assert!(matches!(error, GpuError::NoDevice { device: 2, count: 2, .. }), "{error}");
        assert!(matches!(
            GpuMemory::allocate(driver, 0, 0),
            Err(MemoryError::BadLength { length: 0 })
        ));
    }

    fn too_little_memory_may_pass(double, driver, names) {
        double.fail(names.allocate, 2);
        let error = MemoryError::from(gpu_error(GpuMemory::allocate(driver, 1, 4096)));
        assert!(error.is_retryable(), "{error}");
        assert!(error.to_string().contains("device 1"), "{error}");
        double.fail(names.allocate, 0);
        assert!(GpuMemory::allocate(driver, 1, 4096).is_ok());
    }

    fn nothing_is_lost_when_a_question_fails(double, driver, names) {
        double.fail(names.pointer, 999);
        let error = gpu_error(GpuMemory::allocate(driver, 1, 4096));
        assert_eq!(error.code(), Some(999));
        assert_eq!(double.calls(names.free), 1, "the allocation is freed");
        assert_eq!(current(double), (0, 0));
    }

    fn owned_memory_is_freed_and_wrapped_memory_is_not(double, driver, names) {
        let owner = GpuMemory::allocate(driver, 1, 8192).unwrap();
        // SAFETY: the range is part of `owner`, which lives longer.
        let part = unsafe { GpuMemory::from_raw(driver, 1, owner.address() + 100, 1000) }.unwrap();
        let whole = part.device().unwrap().allocation().unwrap();
        assert_eq!((whole.address, whole.length), (owner.address(), 8192));
        drop(part);
        assert_eq!(double.calls(names.free), 0);
        drop(owner);
        assert_eq!(double.calls(names.free), 1);
    }

    fn another_devices_memory_is_refused(double, driver, _names) {
        let memory = GpuMemory::allocate(driver, 1, 4096).unwrap();
        // SAFETY: refused.
        let error = gpu_error(unsafe { GpuMemory::from_raw(driver, 0, memory.address(), 4096) });
        assert!(matches!(error, GpuError::OtherDevice { device: 0, owner: 1, .. }), "{error}");
        assert_eq!(current(double), (0, 0));
    }

    fn managed_memory_is_refused_with_the_reason(double, driver, _names) {
        let memory = GpuMemory::allocate(driver, 0, 4096).unwrap();
        double.set("managed", 1);
        // SAFETY: refused.
        let error = gpu_error(unsafe { GpuMemory::from_raw(driver, 0, memory.address(), 4096) });
        assert!(matches!(error, GpuError::Managed { .. }), "{error}");
        assert!(error.to_string().contains("moves between host and device"), "{error}");
    }

    fn host_memory_and_unknown_addresses_are_refused(double, driver, _names) {
        let host = [0u8; 64];
        // SAFETY: refused, here and below.
        let error = gpu_error(unsafe { GpuMemory::from_raw(driver, 0, host.as_ptr() as u64, 64) });
        assert!(matches!(error, GpuError::NotDeviceMemory { .. }), "{error}");
        let memory = GpuMemory::allocate(driver, 0, 4096).unwrap();
        double.set("kind", 1);
        // SAFETY: see above.
        let error = gpu_error(unsafe { GpuMemory::from_raw(driver, 0, memory.address(), 64) });
        assert!(error.to_string().contains("host memory"), "{error}");
    }

    fn a_range_that_leaves_its_memory_is_refused(_double, driver, _names) {
        let memory = GpuMemory::allocate(driver, 0, 4096).unwrap();
        // SAFETY: refused, here and below.
        let beyond = unsafe { GpuMemory::from_raw(driver, 0, memory.address() + 4000, 1 << 40) };
        assert!(matches!(gpu_error(beyond), GpuError::NotDeviceMemory { .. }));
        for (address, length) in [(memory.address(), 0), (u64::MAX, 2)] {
            // SAFETY: see above.
            let bad = unsafe { GpuMemory::from_raw(driver, 0, address, length) };
            assert!(matches!(bad, Err(MemoryError::BadLength { .. })));
        }
    }

    fn the_threads_device_stays_what_it_was(double, driver, names) {
        // A device that cannot be made current changes nothing.
        double.fail(names.select, 101);
        assert_eq!(gpu_error(GpuMemory::allocate(driver, 1, 64)).code(), Some(101));
        assert_eq!(current(double), (0, 0));
        double.fail(names.select, 0);
        // Nor does any failure in between.
        for call in [names.allocate, names.pointer] {
            double.fail(call, 700);
            assert_eq!(gpu_error(GpuMemory::allocate(driver, 1, 64)).code(), Some(700));
            assert_eq!(current(double), (0, 0), "after {call} failed");
            double.fail(call, 0);
        }
        let memory = GpuMemory::allocate(driver, 1, 64).unwrap();
        double.fail(names.read, 700);
        assert_eq!(gpu_error(memory.read(0, &mut [0; 8])).code(), Some(700));
        assert_eq!(current(double), (0, 0));
        double.fail(names.free, 700);
        drop(memory);
        assert_eq!(current(double), (0, 0), "after the memory could not be freed");
    }
}

#[test]
fn the_engines_device_stays_current() {
    let double = Double::new(Release::New);
    let hip = double.hip();
    // An engine that works on device 1 registers memory of device 0.
    let mine = GpuMemory::allocate(&hip, 1, 64).unwrap();
    let select = kvpush::memory::gpu::Driver::current(&hip, 1).unwrap();
    assert_eq!(double.value("device"), 1);
    let memory = GpuMemory::allocate(&hip, 0, 64).unwrap();
    assert_eq!(double.value("device"), 1);
    memory.device().unwrap().export().unwrap();
    memory.write(0, b"x").unwrap();
    drop(memory);
    assert_eq!(double.value("device"), 1);
    drop((select, mine));
    assert_eq!(double.value("device"), 0);
}

/// An engine checks the thread's last error after its own calls, and must not find ours.
#[test]
fn failures_are_not_left_for_the_engine_to_find() {
    let double = Double::new(Release::New);
    let hip = double.hip();
    double.fail("hipMalloc", 2);
    GpuMemory::allocate(&hip, 0, 64).unwrap_err();
    assert_eq!(double.value("last_error"), 0);
}

/// The numbers of HIP's memory types changed with release 6.
#[test]
fn kinds_of_memory_are_read_as_the_release_means_them() {
    for (version, host) in [(50_221_153, 0), (60_443_484, 1), (70_253_211, 1)] {
        let double = Double::new(Release::New);
        double.set("version", version);
        let hip = double.hip();
        let memory = GpuMemory::allocate(&hip, 0, 64).unwrap();
        // SAFETY: a part of `memory`.
        let wrap = || unsafe { GpuMemory::from_raw(&hip, 0, memory.address(), 64) };
        assert!(wrap().is_ok(), "{version}");
        if host != 0 {
            double.set("kind", host);
            assert!(wrap().is_err(), "{version}");
        }
        // What says "device" in one release says something else in the other.
        double.set("kind", if host == 0 { 2 } else { 1 });
        assert!(wrap().is_err(), "{version}");
    }
    // Without a version no number means anything.
    let double = Double::new(Release::New);
    double.fail("hipRuntimeGetVersion", 3);
    let error = gpu_error(GpuMemory::allocate(&double.hip(), 0, 64));
    assert!(error.to_string().contains("hides its version"), "{error}");
}

#[test]
fn no_devices_is_an_answer() {
    let double = Double::new(Release::New);
    double.set("devices", 0);
    let hip = gpu_error(GpuMemory::allocate(&double.hip(), 0, 64));
    let cuda = gpu_error(GpuMemory::allocate(&double.cuda(), 0, 64));
    for error in [hip, cuda] {
        assert!(
            matches!(error, GpuError::NoDevice { count: 0, .. }),
            "{error}"
        );
    }
    double.fail("hipGetDeviceCount", 100);
    let error = gpu_error(GpuMemory::allocate(&double.hip(), 0, 64));
    assert!(error.to_string().contains("/dev/kfd"), "{error}");
}

#[test]
fn a_missing_library_says_what_was_tried() {
    let nowhere = Libraries::all_in("/nonexistent/libgpu.so");
    let error = Hip::open(&nowhere).unwrap_err();
    assert!(
        matches!(&error, GpuError::NoLibrary { runtime: Runtime::Hip, tried } if tried.len() == 1)
    );
    assert!(
        error.to_string().contains("/nonexistent/libgpu.so"),
        "{error}"
    );
}
