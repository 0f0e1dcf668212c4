//! Building, opening and steering the double.

use std::{
    env,
    ffi::{CString, c_char, c_int},
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

use kvpush::memory::gpu::{Cuda, Driver, Hip, Libraries};
use libloading::os::unix::{Library, Symbol};

/// Which double.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Release {
    /// With everything.
    New,
    /// Without what old releases lack.
    Old,
}

/// Builds the double, once for each process; cargo does nothing where it is up to date.
pub(crate) fn library(release: Release) -> &'static Path {
    static BUILT: [OnceLock<PathBuf>; 2] = [const { OnceLock::new() }; 2];
    let (slot, features) = match release {
        Release::New => (&BUILT[0], &[][..]),
        Release::Old => (&BUILT[1], &["--features", "old"][..]),
    };
    slot.get_or_init(|| {
        // A folder of its own: the two releases have the same file name, and the cargo that runs the tests may hold the
        // lock of its own folder.
        let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("gpu-double-{release:?}"));
        let output = Command::new(env!("CARGO"))
            .args(["build", "--quiet", "--package", "kvpush-gpu-double"])
            .args(features)
            .arg("--manifest-path")
            .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml"))
            .arg("--target-dir")
            .arg(&target)
            .output()
            .expect("cargo starts");
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "the double: {errors}");
        target.join("debug/libkvpush_gpu_double.so")
    })
}

/// The double, as this thread steers it. The script is forgotten when the value is made.
pub(crate) struct Double {
    library: Library,
    path: &'static Path,
}

impl Double {
    pub(crate) fn new(release: Release) -> Self {
        let path = library(release);
        // SAFETY: the double's constructors do nothing.
        let library = unsafe { Library::new(path) }.expect("the double opens");
        let double = Self { library, path };
        // SAFETY: the type is that of the double's function.
        let reset: Symbol<extern "C" fn()> =
            unsafe { double.library.get("double_reset\0") }.unwrap();
        reset();
        double
    }

    pub(crate) fn libraries(&self) -> Libraries {
        Libraries::all_in(self.path)
    }

    pub(crate) fn hip(&self) -> Hip {
        Hip::open(&self.libraries()).expect("the double is a HIP library")
    }

    pub(crate) fn cuda(&self) -> Cuda {
        Cuda::open(&self.libraries()).expect("the double is a CUDA library")
    }

    /// From now on, `call` fails with `code`.
    pub(crate) fn fail(&self, call: &str, code: c_int) {
        self.fail_after(call, 0, code);
    }

    /// As `fail`, after `successes` more of them.
    pub(crate) fn fail_after(&self, call: &str, successes: u64, code: c_int) {
        let name = CString::new(call).unwrap();
        // SAFETY: the type is that of the double's function; the name is a C string.
        unsafe {
            let fail: Symbol<unsafe extern "C" fn(*const c_char, u64, c_int)> =
                self.library.get("double_fail\0").unwrap();
            fail(name.as_ptr(), successes, code);
        }
    }

    pub(crate) fn set(&self, name: &str, value: u64) {
        let name = CString::new(name).unwrap();
        // SAFETY: as above.
        unsafe {
            let set: Symbol<unsafe extern "C" fn(*const c_char, u64)> =
                self.library.get("double_set\0").unwrap();
            set(name.as_ptr(), value);
        }
    }

    pub(crate) fn value(&self, name: &str) -> u64 {
        self.ask("double_value\0", name)
    }

    pub(crate) fn calls(&self, name: &str) -> u64 {
        self.ask("double_calls\0", name)
    }

    pub(crate) fn hdp(&self) -> u64 {
        // SAFETY: as above.
        let hdp: Symbol<extern "C" fn() -> u64> =
            unsafe { self.library.get("double_hdp\0") }.unwrap();
        hdp()
    }

    fn ask(&self, function: &str, name: &str) -> u64 {
        let name = CString::new(name).unwrap();
        // SAFETY: as above.
        unsafe {
            let ask: Symbol<unsafe extern "C" fn(*const c_char) -> u64> =
                self.library.get(function).unwrap();
            ask(name.as_ptr())
        }
    }
}

/// The names of a runtime's calls, so that a test is written once.
pub(crate) struct Names {
    pub(crate) select: &'static str,
    pub(crate) allocate: &'static str,
    pub(crate) free: &'static str,
    pub(crate) pointer: &'static str,
    pub(crate) range: &'static str,
    pub(crate) to_host: &'static str,
    pub(crate) to_device: &'static str,
    pub(crate) read: &'static str,
    pub(crate) new_stream: &'static str,
    pub(crate) wait: &'static str,
    pub(crate) new_event: &'static str,
    pub(crate) record: &'static str,
    pub(crate) query: &'static str,
    pub(crate) pin: &'static str,
    pub(crate) unpin: &'static str,
}

pub(crate) const HIP: Names = Names {
    select: "hipSetDevice",
    allocate: "hipMalloc",
    free: "hipFree",
    pointer: "hipPointerGetAttributes",
    range: "hipMemGetAddressRange",
    to_host: "hipMemcpyAsync",
    to_device: "hipMemcpyAsync",
    read: "hipMemcpy",
    new_stream: "hipStreamCreateWithFlags",
    wait: "hipStreamSynchronize",
    new_event: "hipEventCreateWithFlags",
    record: "hipEventRecord",
    query: "hipEventQuery",
    pin: "hipHostRegister",
    unpin: "hipHostUnregister",
};

pub(crate) const CUDA: Names = Names {
    select: "cuCtxPushCurrent",
    allocate: "cuMemAlloc",
    free: "cuMemFree",
    pointer: "cuPointerGetAttribute",
    range: "cuMemGetAddressRange",
    to_host: "cuMemcpyDtoHAsync",
    to_device: "cuMemcpyHtoDAsync",
    read: "cuMemcpyDtoH",
    new_stream: "cuStreamCreate",
    wait: "cuStreamSynchronize",
    new_event: "cuEventCreate",
    record: "cuEventRecord",
    query: "cuEventQuery",
    pin: "cuMemHostRegister",
    unpin: "cuMemHostUnregister",
};

/// What is current for the thread: HIP's device, and the depth of CUDA's stack.
pub(crate) fn current(double: &Double) -> (u64, u64) {
    (double.value("device"), double.value("contexts"))
}

/// Runs a test with each runtime, and checks that neither leaves anything behind or current.
pub(crate) fn each(test: impl Runs) {
    let double = Double::new(Release::New);
    test.run(&double, &double.hip(), &HIP);
    assert_eq!(current(&double), (0, 0), "HIP left its device current");
    assert_eq!(double.value("live"), 0, "HIP left streams, events or pins");
    let double = Double::new(Release::New);
    test.run(&double, &double.cuda(), &CUDA);
    assert_eq!(current(&double), (0, 0), "CUDA left its context current");
    assert_eq!(double.value("live"), 0, "CUDA left streams, events or pins");
}

/// A test of either runtime.
pub(crate) trait Runs {
    fn run<D: Driver>(&self, double: &Double, driver: &D, names: &Names);
}

/// Makes a function that is generic over the runtime a test.
macro_rules! on_each {
    ($($(#[$doc:meta])* fn $name:ident($double:ident, $driver:ident, $names:ident) $body:block)*) => {
        $(
            $(#[$doc])*
            #[test]
            fn $name() {
                struct Test;
                impl crate::double::Runs for Test {
                    fn run<D: kvpush::memory::gpu::Driver>(
                        &self,
                        $double: &crate::double::Double,
                        $driver: &D,
                        $names: &crate::double::Names,
                    ) $body
                }
                crate::double::each(Test);
            }
        )*
    };
}
pub(crate) use on_each;
