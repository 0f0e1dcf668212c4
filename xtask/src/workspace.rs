//! Where things are: the workspace root, cargo's target folder and the caches below it.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The workspace root. Taken from where this crate was compiled, so the command works from any folder.
pub(crate) fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_path_buf()
}

/// Cargo's target folder, as an absolute path: `CARGO_TARGET_DIR`, or `target` below the workspace root.
pub(crate) fn target_dir() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        // A relative CARGO_TARGET_DIR is relative to where cargo was called, which is our working folder.
        Some(dir) => std::path::absolute(&dir).unwrap_or_else(|_| PathBuf::from(dir)),
        None => root().join("target"),
    }
}

/// A folder below the target folder, created when missing.
pub(crate) fn cache(name: &str) -> Result<PathBuf> {
    let dir = target_dir().join(name);
    std::fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
    Ok(dir)
}
