//! The report of what there is.

use kvpush::memory::{
    Visibility,
    gpu::{GpuError, Libraries, Runtime, probe, probe_with},
};

use crate::double::{Double, Release};

#[test]
fn everything_there_is_told() {
    let double = Double::new(Release::New);
    let report = probe_with(&double.libraries());
    let hip = report.hip.unwrap();
    assert!(hip.file.unwrap().ends_with("libkvpush_gpu_double.so"));
    assert_eq!(hip.version.to_string(), "6.4.x");
    assert_eq!(hip.warning, None);
    assert!(hip.missing.is_empty());
    let devices = hip.devices.unwrap();
    assert_eq!(devices.len(), 2);
    assert_eq!(devices[1].name, "Double Instinct 1");
    assert_eq!(devices[1].memory, 192 << 30);
    assert_eq!(devices[1].location.unwrap().to_string(), "0000:0d:00.0");
    assert_eq!(devices[1].visibility, Visibility::RuntimeFlush);
    let hsa = report.hsa.unwrap();
    assert_eq!(hsa.version, Ok((1, 1)));
    let cuda = report.cuda.unwrap();
    assert_eq!(cuda.version, Ok((12, 9)));
    assert_eq!(cuda.devices.unwrap()[0].name, "Double H100 0");
}

#[test]
fn what_is_missing_is_named() {
    let double = Double::new(Release::Old);
    double.set("version", 70_253_211);
    let report = probe_with(&double.libraries());
    let hip = report.hip.unwrap();
    assert_eq!(
        hip.missing,
        [
            "hipMemGetHandleForAddressRange",
            "hipDeviceFlushGPUDirectRDMAWrites"
        ]
    );
    assert!(hip.warning.unwrap().contains("7.2.0"));
    assert_eq!(
        report.hsa.unwrap().missing,
        ["hsa_amd_portable_export_dmabuf"]
    );
    assert_eq!(
        report.cuda.unwrap().missing,
        [
            "cuMemGetHandleForAddressRange",
            "cuFlushGPUDirectRDMAWrites"
        ]
    );
}

#[test]
fn failures_are_part_of_the_report() {
    let double = Double::new(Release::New);
    double.fail("hipGetDeviceCount", 100);
    double.fail("hsa_init", 0x1008);
    double.fail("cuDeviceGetName", 999);
    let report = probe_with(&double.libraries());
    assert_eq!(report.hip.unwrap().devices.unwrap_err().code(), Some(100));
    assert_eq!(
        report.hsa.unwrap().version.unwrap_err().code(),
        Some(0x1008)
    );
    assert_eq!(report.cuda.unwrap().devices.unwrap_err().code(), Some(999));
    double.fail("cuInit", 3);
    let report = probe_with(&double.libraries());
    assert_eq!(report.cuda.unwrap_err().code(), Some(3));
    let report = probe_with(&Libraries::all_in("/nonexistent"));
    for (error, runtime) in [
        (report.hip.unwrap_err(), Runtime::Hip),
        (report.hsa.unwrap_err(), Runtime::Hsa),
        (report.cuda.unwrap_err(), Runtime::Cuda),
    ] {
        assert!(matches!(error, GpuError::NoLibrary { runtime: of, .. } if of == runtime));
    }
}

/// Whatever this machine has: an answer for each runtime, and no panic.
#[test]
fn this_machine_has_an_answer() {
    let report = probe();
    println!("{report:#?}");
    for error in [report.hip.err(), report.hsa.err(), report.cuda.err()]
        .into_iter()
        .flatten()
    {
        assert!(!error.to_string().is_empty());
    }
}
