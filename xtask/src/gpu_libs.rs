//! `cargo xtask gpu-libs`: our bindings of HIP and HSA against the real libraries and headers, as Debian packages them.
//!
//! Nothing is installed: the packages are unpacked below `target/gpu-libs/`, where they stay for the next time.
//!
//! CUDA's header and library are in no package that Debian distributes freely. The header is compared where this machine
//! has one; that it was not is said loudly.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::{apt, process, workspace};

const HELP: &str = "\
cargo xtask gpu-libs: the GPU bindings against real libraries and headers

USAGE
    cargo xtask gpu-libs [--hip-sys]

Downloads Debian's libamdhip64 and libhsa-runtime64 with what they need, and their headers (about 60 MB, once), unpacks
them below target/gpu-libs, and
  - lets the C compiler compare every signature, structure and constant of ours with the headers;
  - opens the libraries, resolves every function, and takes the way without a device.
CUDA's cuda.h is compared if it is in KVPUSH_CUDA_INCLUDE, /usr/local/cuda/include or /usr/include.

OPTIONS
    --hip-sys     Also compare with the bindings of the crate hip-sys (tests/hip-sys-check), which links the libraries
";

/// What is wanted. The headers' own dependencies are compilers, so they are taken without.
const LIBRARIES: &[&str] = &["libamdhip64-5", "libhsa-runtime64-1"];
const HEADERS: &[&str] = &["libamdhip64-dev", "libhsa-runtime-dev"];
/// Where Debian puts libraries.
const LIBRARY_FOLDER: &str = "usr/lib/x86_64-linux-gnu";
/// Changes when what is unpacked does.
const COMPLETE: &str = "complete-1";

/// The command.
pub(crate) fn main(args: &[String]) -> Result<()> {
    match args {
        [] => gpu_libs(),
        [hip_sys] if hip_sys == "--hip-sys" => {
            gpu_libs()?;
            hip_sys_check()
        }
        [help] if help == "--help" || help == "-h" => {
            print!("{HELP}");
            Ok(())
        }
        _ => bail!("unknown arguments; see `cargo xtask gpu-libs --help`"),
    }
}

/// Brings the packages and runs the tests with them.
pub(crate) fn gpu_libs() -> Result<()> {
    if std::env::consts::ARCH != "x86_64" || !Path::new("/etc/debian_version").exists() {
        println!(
            "NOT TESTED: the real ROCm libraries, which come from Debian's packages for x86_64"
        );
        return Ok(());
    }
    let root = unpacked()?;
    let libraries = root.join(LIBRARY_FOLDER);
    let include = root.join("usr/include");

    let mut command = process::cargo();
    command
        .args([
            "test",
            "--package",
            "kvpush",
            "--lib",
            "headers_tests",
            "--",
            "--nocapture",
        ])
        .env("KVPUSH_HIP_INCLUDE", &include)
        .env("KVPUSH_HSA_INCLUDE", &include);
    match cuda_include() {
        Some(folder) => {
            command.env("KVPUSH_CUDA_INCLUDE", folder);
        }
        None => println!(
            "NOT COMPARED: cuda.h, which is not on this machine; set KVPUSH_CUDA_INCLUDE to its folder"
        ),
    }
    process::run(&mut command)?;

    let mut command = process::cargo();
    command
        .args([
            "test",
            "--package",
            "kvpush",
            "--test",
            "gpu",
            "real::",
            "--",
            "--nocapture",
        ])
        .env("KVPUSH_TEST_ROCM", &libraries)
        .env("LD_LIBRARY_PATH", search_path(&libraries));
    process::run(&mut command)
}

/// The check against `hip-sys`, built with what has been unpacked.
fn hip_sys_check() -> Result<()> {
    let root = unpacked()?;
    let libraries = root.join(LIBRARY_FOLDER);
    let target = workspace::cache("hip-sys-check")?;
    let mut command = process::cargo();
    command
        .args(["test", "--features", "hip-sys", "--manifest-path"])
        .arg(workspace::root().join("tests/hip-sys-check/Cargo.toml"))
        .arg("--target-dir")
        .arg(target)
        .env("HIP_PATH", root.join("usr"))
        // Its build looks in HIP_PATH/lib only, and Debian's library is a folder deeper.
        .env("RUSTFLAGS", format!("-L native={}", libraries.display()))
        .env("LD_LIBRARY_PATH", search_path(&libraries));
    process::run(&mut command)
}

fn cuda_include() -> Option<PathBuf> {
    let given = std::env::var_os("KVPUSH_CUDA_INCLUDE").map(PathBuf::from);
    let usual = ["/usr/local/cuda/include", "/usr/include"].map(PathBuf::from);
    given
        .into_iter()
        .chain(usual)
        .find(|folder| folder.join("cuda.h").exists())
}

fn search_path(libraries: &Path) -> OsString {
    let mut path = libraries.as_os_str().to_owned();
    if let Some(before) = std::env::var_os("LD_LIBRARY_PATH").filter(|path| !path.is_empty()) {
        path.push(":");
        path.push(before);
    }
    path
}

/// The folder with all packages unpacked into it.
fn unpacked() -> Result<PathBuf> {
    let cache = workspace::cache("gpu-libs")?;
    let _lock = workspace::lock("gpu-libs.lock")?;
    let root = cache.join("root");
    if cache.join(COMPLETE).exists() {
        return Ok(root);
    }
    // Anything that is there is what an interrupted run has left.
    for folder in [&root, &cache.join("debs")] {
        if folder.exists() {
            fs::remove_dir_all(folder)?;
        }
        fs::create_dir_all(folder)?;
    }
    let mut names = needed().or_else(|_| {
        apt::update()?;
        needed()
    })?;
    names.extend(HEADERS.iter().map(|name| (*name).to_owned()));
    println!("downloading {} (once)", names.join(", "));
    process::output(
        Command::new("apt-get")
            .current_dir(cache.join("debs"))
            .args(["download", "--quiet", "-o", "APT::Sandbox::User=root"])
            .args(&names),
    )?;
    for entry in fs::read_dir(cache.join("debs"))? {
        let mut command = Command::new("dpkg-deb");
        process::output(command.arg("--extract").arg(entry?.path()).arg(&root))?;
    }
    fs::remove_dir_all(cache.join("debs"))?;
    fs::write(cache.join(COMPLETE), "")?;
    Ok(root)
}

/// The libraries' packages and those that they need and that are not installed here.
fn needed() -> Result<Vec<String>> {
    let plan = process::text(
        Command::new("apt-get")
            .env("LC_ALL", "C")
            .args(["--simulate", "--no-install-recommends", "install"])
            .args(LIBRARIES),
    )
    .context("asking apt what the ROCm libraries need")?;
    let mut names = to_install(&plan);
    for library in LIBRARIES {
        // Installed already: downloaded all the same, so that all is in one place.
        if !names.iter().any(|name| name == library) {
            names.push((*library).to_owned());
        }
    }
    Ok(names)
}

/// The packages that apt says it would install.
fn to_install(plan: &str) -> Vec<String> {
    let lines = plan.lines().filter_map(|line| line.strip_prefix("Inst "));
    lines
        .filter_map(|rest| rest.split(' ').next())
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_of_apt_is_read() {
        let plan = "Reading package lists...\nInst libhsakmt1 (5.2.3 Debian:12 [amd64])\n\
                    Inst libamdhip64-5 (5.2.3-8 Debian:12 [amd64])\nConf libhsakmt1 (5.2.3 Debian:12 [amd64])\n";
        assert_eq!(to_install(plan), ["libhsakmt1", "libamdhip64-5"]);
    }
}
