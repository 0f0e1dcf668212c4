//! What GPU runtimes and devices there are, as plain data: for people, and for `kvpush-bench devices`.

use std::path::PathBuf;

use super::{Cuda, GpuError, Hip, Libraries, RocmVersion, driver::Driver, sys};
use crate::memory::{PciAddress, Visibility};

/// What was found of each runtime, or why not.
#[derive(Clone, Debug)]
pub struct Report {
    /// AMD's HIP.
    pub hip: Result<HipReport, GpuError>,
    /// AMD's HSA.
    pub hsa: Result<HsaReport, GpuError>,
    /// NVIDIA's CUDA driver.
    pub cuda: Result<CudaReport, GpuError>,
}

/// HIP, opened.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct HipReport {
    /// The library's file.
    pub file: Option<PathBuf>,
    /// The release.
    pub version: RocmVersion,
    /// What is known to go wrong with it.
    pub warning: Option<String>,
    /// Functions that kvpush would use and the library lacks.
    pub missing: Vec<&'static str>,
    /// Its devices.
    pub devices: Result<Vec<DeviceReport>, GpuError>,
}

/// HSA, opened.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct HsaReport {
    /// The library's file.
    pub file: Option<PathBuf>,
    /// Version of the interface: major, minor. Why not, if the runtime does not start.
    pub version: Result<(u16, u16), GpuError>,
    /// Functions that kvpush would use and the library lacks.
    pub missing: Vec<&'static str>,
}

/// CUDA, opened.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct CudaReport {
    /// The library's file.
    pub file: Option<PathBuf>,
    /// The newest CUDA that the driver serves: major, minor.
    pub version: Result<(u32, u32), GpuError>,
    /// Functions that kvpush would use and the library lacks.
    pub missing: Vec<&'static str>,
    /// Its devices.
    pub devices: Result<Vec<DeviceReport>, GpuError>,
}

/// A GPU.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DeviceReport {
    /// Its number in the runtime.
    pub number: u32,
    /// Its name.
    pub name: String,
    /// Bytes of memory.
    pub memory: u64,
    /// Its place on PCI.
    pub location: Option<PciAddress>,
    /// What a flush does.
    pub visibility: Visibility,
}

/// Looks for the runtimes that the environment names, or the usual ones.
pub fn probe() -> Report {
    report(Hip::shared(), Cuda::shared(), &Libraries::from_env())
}

/// Looks for the runtimes in `libraries`.
pub fn probe_with(libraries: &Libraries) -> Report {
    report(Hip::open(libraries), Cuda::open(libraries), libraries)
}

fn report(hip: Result<Hip, GpuError>, cuda: Result<Cuda, GpuError>, names: &Libraries) -> Report {
    let hsa =
        match &hip {
            Ok(hip) => match hip.hsa() {
                Ok(hsa) => Ok(hsa_report(hsa, version_of(hsa))),
                // It opens, but does not start: what it has is known all the same.
                Err(error @ GpuError::Call { .. }) => sys::hsa::Hsa::open(names.hsa.as_deref())
                    .map(|hsa| hsa_report(&hsa, Err(error))),
                Err(error) => Err(error),
            },
            // HSA may be there without HIP, which is worth a line although nothing uses it then.
            Err(_) => sys::hsa::Hsa::open(names.hsa.as_deref())
                .map(|hsa| hsa_report(&hsa, version_of(&hsa))),
        };
    Report {
        hip: hip.map(|hip| HipReport {
            file: hip.file().map(std::path::Path::to_path_buf),
            version: hip.version(),
            warning: hip.warning(),
            missing: hip.missing(),
            devices: devices(&hip, |device| hip.describe(device)),
        }),
        hsa,
        cuda: cuda.map(|cuda| CudaReport {
            file: cuda.file(),
            version: cuda.version(),
            missing: cuda.missing(),
            devices: devices(&cuda, |device| cuda.describe(device)),
        }),
    }
}

fn hsa_report(hsa: &sys::hsa::Hsa, version: Result<(u16, u16), GpuError>) -> HsaReport {
    HsaReport {
        file: hsa.address("hsa_init").and_then(sys::library::file_of),
        missing: missing(sys::hsa::Hsa::SYMBOLS, |name| hsa.address(name).is_some()),
        version,
    }
}

fn version_of(hsa: &sys::hsa::Hsa) -> Result<(u16, u16), GpuError> {
    let ask = |attribute| {
        let mut value = 0u16;
        // SAFETY: both attributes are of 16 bits, which is what the out pointer has.
        let status =
            unsafe { (hsa.hsa_system_get_info)(attribute, std::ptr::from_mut(&mut value).cast()) };
        match status {
            sys::hsa::HSA_STATUS_SUCCESS => Ok(value),
            _ => Err(super::hip::hsa_error(
                hsa,
                "hsa_system_get_info",
                None,
                status,
            )),
        }
    };
    Ok((
        ask(sys::hsa::HSA_SYSTEM_INFO_VERSION_MAJOR)?,
        ask(sys::hsa::HSA_SYSTEM_INFO_VERSION_MINOR)?,
    ))
}

pub(super) fn missing(
    symbols: &[sys::library::Symbol],
    has: impl Fn(&str) -> bool,
) -> Vec<&'static str> {
    let absent = symbols.iter().filter(|symbol| !has(symbol.name));
    absent.map(|symbol| symbol.name).collect()
}

fn devices<D: Driver>(
    driver: &D,
    describe: impl Fn(u32) -> Result<(String, u64), GpuError>,
) -> Result<Vec<DeviceReport>, GpuError> {
    let look = |number| {
        let (name, memory) = describe(number)?;
        let location = driver.location(number).ok();
        let _current = driver.current(number)?;
        Ok(DeviceReport {
            number,
            name,
            memory,
            location,
            visibility: driver.visibility(number),
        })
    };
    (0..driver.device_count()?).map(look).collect()
}
