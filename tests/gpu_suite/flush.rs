//! What makes a NIC's writes visible: which way is taken for which device, and that failures are told.

use kvpush::memory::{
    CudaMemory, DeviceMemory, HipMemory, MemoryError, Visibility, gpu::GpuMemory,
};

use crate::double::{Double, Release, current};

fn code(result: Result<(), MemoryError>) -> Option<i32> {
    match result {
        Err(MemoryError::Gpu(error)) => error.code(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn cuda_does_what_the_attributes_ask_for() {
    for (ordering, options, how) in [
        (0, 1, Visibility::RuntimeFlush),
        (0, 3, Visibility::RuntimeFlush),
        (0, 0, Visibility::ReadBack),
        (0, 2, Visibility::ReadBack),
        (99, 1, Visibility::RuntimeFlush),
        (100, 1, Visibility::Ordered),
        (100, 0, Visibility::Ordered),
        (200, 1, Visibility::Ordered),
    ] {
        let double = Double::new(Release::New);
        double.set("ordering", ordering);
        double.set("options", options);
        let memory: CudaMemory = GpuMemory::allocate(&double.cuda(), 1, 4096).unwrap();
        assert_eq!(memory.visibility(), how, "{ordering} {options}");
        memory.flush().unwrap();
        let flushes = double.calls("cuFlushGPUDirectRDMAWrites");
        assert_eq!(flushes, u64::from(how == Visibility::RuntimeFlush));
        let reads = double.calls("cuMemcpyDtoH");
        assert_eq!(reads, u64::from(how == Visibility::ReadBack));
        assert_eq!(current(&double), (0, 0));
    }
    // An old driver knows neither the attributes nor the call.
    let old = Double::new(Release::Old);
    old.fail("cuDeviceGetAttribute", 1);
    let memory: CudaMemory = GpuMemory::allocate(&old.cuda(), 0, 4096).unwrap();
    assert_eq!(memory.visibility(), Visibility::ReadBack);
    memory.flush().unwrap();
    assert_eq!(old.calls("cuMemcpyDtoH"), 1);
}

/// One test for all of AMD's, because the register is the process's.
#[test]
fn hip_asks_the_runtime_then_the_register_then_reads_back() {
    let double = Double::new(Release::New);
    let memory: HipMemory = GpuMemory::allocate(&double.hip(), 1, 4096).unwrap();
    assert_eq!(memory.visibility(), Visibility::RuntimeFlush);
    let before = double.calls("hipDeviceFlushGPUDirectRDMAWrites");
    memory.flush().unwrap();
    assert_eq!(
        double.calls("hipDeviceFlushGPUDirectRDMAWrites"),
        before + 1
    );
    assert_eq!((double.hdp(), double.calls("hipMemcpy")), (0, 0));

    // The runtime cannot for this device.
    let double = Double::new(Release::New);
    double.set("flush", 0);
    let memory: HipMemory = GpuMemory::allocate(&double.hip(), 1, 4096).unwrap();
    assert_eq!(memory.visibility(), Visibility::HdpRegister);
    assert_eq!(double.hdp(), 0);
    memory.flush().unwrap();
    assert_eq!((double.hdp(), double.calls("hipMemcpy")), (1, 0));

    // The runtime is too old for the call.
    let old = Double::new(Release::Old);
    let memory: HipMemory = GpuMemory::allocate(&old.hip(), 1, 4096).unwrap();
    assert_eq!(memory.visibility(), Visibility::HdpRegister);
    memory.flush().unwrap();
    assert_eq!(old.hdp(), 1);

    // And the register is not mapped, as in virtual functions.
    let old = Double::new(Release::Old);
    old.set("hdp", 0);
    let memory: HipMemory = GpuMemory::allocate(&old.hip(), 1, 4096).unwrap();
    assert_eq!(memory.visibility(), Visibility::ReadBack);
    memory.flush().unwrap();
    assert_eq!((old.hdp(), old.calls("hipMemcpy")), (0, 1));
    assert_eq!(current(&old), (0, 0));
}

#[test]
fn a_flush_that_fails_is_told() {
    let double = Double::new(Release::New);
    let memory: HipMemory = GpuMemory::allocate(&double.hip(), 1, 4096).unwrap();
    double.fail("hipDeviceFlushGPUDirectRDMAWrites", 719);
    assert_eq!(code(memory.flush()), Some(719));
    double.fail("hipSetDevice", 101);
    assert_eq!(code(memory.flush()), Some(101));
    double.fail("hipSetDevice", 0);
    assert_eq!(current(&double), (0, 0));
    let memory: CudaMemory = GpuMemory::allocate(&double.cuda(), 1, 4096).unwrap();
    double.fail("cuFlushGPUDirectRDMAWrites", 719);
    assert_eq!(code(memory.flush()), Some(719));
    double.set("options", 0);
    let memory: CudaMemory = GpuMemory::allocate(&double.cuda(), 1, 4096).unwrap();
    double.fail("cuMemcpyDtoH", 700);
    assert_eq!(code(memory.flush()), Some(700));
    assert_eq!(current(&double), (0, 0));
}
