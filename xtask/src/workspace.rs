//! Where things are: the workspace root, cargo's target folder and the caches below it.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The workspace root. Taken from where this crate was compiled, so the command works from any folder.
pub(crate) fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_path_buf()
}

/// Cargo's target folder, as an absolute path.
///
/// That is `CARGO_TARGET_DIR`, or else the folder around our own executable that cargo has tagged as its own (cargo's
/// configuration may put it anywhere), or else `target` below the workspace root.
pub(crate) fn target_dir() -> PathBuf {
    if let Some(dir) = std::env::var_os("CARGO_TARGET_DIR") {
        // A relative one is relative to where cargo was called, which is our working folder.
        return std::path::absolute(&dir).unwrap_or_else(|_| PathBuf::from(dir));
    }
    let executable = std::env::current_exe().unwrap_or_default();
    let mut around = executable.ancestors().skip(1);
    // The tag is there if cargo has made the folder, the other file since it has first compiled something there.
    let marks = ["CACHEDIR.TAG", ".rustc_info.json"];
    let tagged = around.find(|dir| marks.iter().any(|mark| dir.join(mark).exists()));
    tagged.map_or_else(|| root().join("target"), Path::to_path_buf)
}

/// A folder below the target folder, created when missing.
pub(crate) fn cache(name: &str) -> Result<PathBuf> {
    let dir = target_dir().join(name);
    std::fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
    Ok(dir)
}

/// Waits until no other process holds the lock of this name, and holds it until the value is dropped.
pub(crate) fn lock(name: &str) -> Result<File> {
    let path = target_dir().join(name);
    let file = File::create(&path).with_context(|| format!("creating {}", path.display()))?;
    if flock(&file, libc::LOCK_EX | libc::LOCK_NB).is_err() {
        println!("waiting for another xtask to release {}", path.display());
        flock(&file, libc::LOCK_EX).with_context(|| format!("locking {}", path.display()))?;
    }
    Ok(file)
}

fn flock(file: &File, operation: libc::c_int) -> io::Result<()> {
    // SAFETY: flock(2) takes two integers and touches no memory of ours; the descriptor is open for the whole call,
    // because `file` is borrowed.
    match unsafe { libc::flock(file.as_raw_fd(), operation) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_is_held_until_dropped() {
        let dir = cache("xtask-tests").unwrap();
        let name = dir.join(format!("lock-{}", std::process::id()));
        let held = lock(name.to_str().unwrap()).unwrap();
        let second = File::open(&name).unwrap();
        assert!(flock(&second, libc::LOCK_EX | libc::LOCK_NB).is_err());
        drop(held);
        assert!(flock(&second, libc::LOCK_EX | libc::LOCK_NB).is_ok());
        std::fs::remove_file(name).unwrap();
    }
}
