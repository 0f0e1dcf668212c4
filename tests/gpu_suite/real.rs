//! The real libraries of ROCm, on a machine without its devices: they open, have what they should, and say that there is
//! no device.
//!
//! `cargo xtask gpu-libs` brings Debian's, and names them in `KVPUSH_TEST_ROCM`, a folder.

use std::path::PathBuf;

use kvpush::memory::{
    MemoryError,
    gpu::{GpuError, GpuMemory, Hip, Libraries, probe_with},
};

fn libraries() -> Option<Libraries> {
    let Some(folder) = std::env::var_os("KVPUSH_TEST_ROCM").map(PathBuf::from) else {
        println!(
            "NOT TESTED: the real ROCm libraries: KVPUSH_TEST_ROCM is not set; `cargo xtask gpu-libs` sets it"
        );
        return None;
    };
    let mut libraries = Libraries::default();
    libraries.hip = Some(folder.join("libamdhip64.so.5"));
    libraries.hsa = Some(folder.join("libhsa-runtime64.so.1"));
    Some(libraries)
}

#[test]
fn the_real_libraries_open_and_have_everything_required() {
    let Some(libraries) = libraries() else { return };
    let report = probe_with(&libraries);
    println!("{report:#?}");
    let hip = report
        .hip
        .expect("libamdhip64 opens and has every required function");
    // Debian's is of ROCm 5.2, which is older than both.
    assert_eq!(
        hip.missing,
        [
            "hipMemGetHandleForAddressRange",
            "hipDeviceFlushGPUDirectRDMAWrites"
        ]
    );
    let file = hip.file.expect("the file is found");
    assert!(
        file.to_string_lossy().contains("libamdhip64.so.5."),
        "{file:?}"
    );
    assert_eq!((hip.version.major, hip.warning), (5, None));
    let hsa = report.hsa.expect("libhsa-runtime64 opens");
    assert_eq!(hsa.missing, ["hsa_amd_portable_export_dmabuf"]);
    if std::path::Path::new("/dev/kfd").exists() {
        println!("NOT TESTED: the way without a device, because there is one");
        return;
    }
    let Err(error) = hsa.version else {
        panic!("HSA started without a device")
    };
    assert!(
        matches!(
            error,
            GpuError::Call {
                call: "hsa_init",
                ..
            }
        ),
        "{error}"
    );
    match hip.devices {
        Ok(devices) => assert!(devices.is_empty(), "{devices:?}"),
        Err(error) => assert!(error.to_string().contains("/dev/kfd"), "{error}"),
    }
}

#[test]
fn without_a_device_there_is_no_memory_and_no_panic() {
    let Some(libraries) = libraries() else { return };
    if std::path::Path::new("/dev/kfd").exists() {
        println!("NOT TESTED: the way without a device, because there is one");
        return;
    }
    let hip = Hip::open(&libraries).unwrap();
    for device in [0, 1, u32::MAX] {
        let error = GpuMemory::allocate(&hip, device, 1 << 20).unwrap_err();
        println!("{error}");
        assert!(matches!(error, MemoryError::Gpu(_)));
        // SAFETY: refused before the address is looked at.
        let error = unsafe { GpuMemory::from_raw(&hip, device, 0x7f00_0000_0000, 4096) };
        assert!(matches!(error, Err(MemoryError::Gpu(_))));
    }
}
