//! Which ROCm is it, and is it one of those that are known to go wrong?
//!
//! `hipRuntimeGetVersion` does not tell the patch level of ROCm: its last part counts builds. The file name of the
//! library does (`libamdhip64.so.7.2.70201` is of ROCm 7.2.1), in AMD's packages.

use std::{fmt, path::Path};

/// A release of ROCm, as far as it can be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RocmVersion {
    /// Major.
    pub major: u32,
    /// Minor.
    pub minor: u32,
    /// Patch level, if the library's file name says it.
    pub patch: Option<u32>,
}

impl fmt::Display for RocmVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)?;
        match self.patch {
            Some(patch) => write!(f, ".{patch}"),
            None => f.write_str(".x"),
        }
    }
}

impl RocmVersion {
    /// From what `hipRuntimeGetVersion` says, and the name of the library's file if it is known.
    pub fn new(runtime: i32, file: Option<&Path>) -> Self {
        let runtime = runtime.max(0) as u32;
        let (major, minor) = (runtime / 10_000_000, runtime / 100_000 % 100);
        let patch = file
            .and_then(|file| file.file_name()?.to_str()?.rsplit_once('.'))
            .and_then(|(_, build)| build.parse::<u32>().ok())
            // The build number repeats the release; in other packages it is something else.
            .filter(|build| build / 100 == major * 100 + minor)
            .map(|build| build % 100);
        Self {
            major,
            minor,
            patch,
        }
    }

    /// What is known to go wrong with this release, if anything.
    pub fn warning(self) -> Option<String> {
        let known = |patch| match (self.major, self.minor) {
            (7, 0) => patch == 0,
            (7, 2) => patch <= 4,
            _ => false,
        };
        let (certain, how) = match self.patch {
            Some(patch) => (known(patch), "is"),
            None => (known(0), "may be"),
        };
        certain.then(|| {
            format!(
                "ROCm {self} {how} one of the releases (7.0.0, 7.2.0 to 7.2.4) in which the next allocation after the \
                 export of a dmabuf may crash the process (ROCm/rocm-systems issue 8517): allocate everything before \
                 memory is registered, update ROCm, or leave dmabufs unused"
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(runtime: i32, file: &str) -> RocmVersion {
        RocmVersion::new(runtime, Some(Path::new(file)))
    }

    #[test]
    fn the_patch_level_comes_from_the_file() {
        let found = version(70_253_211, "/opt/rocm/lib/libamdhip64.so.7.2.70201");
        assert_eq!(found.to_string(), "7.2.1");
        // Debian's and other builds number otherwise.
        let debian = version(50_221_153, "/usr/lib/libamdhip64.so.5.2.21153");
        assert_eq!(debian.to_string(), "5.2.x");
        assert_eq!(RocmVersion::new(60_443_484, None).to_string(), "6.4.x");
        assert_eq!(
            RocmVersion::new(-1, Some(Path::new("/"))).to_string(),
            "0.0.x"
        );
    }

    #[test]
    fn exactly_the_known_releases_are_warned_about() {
        for major in 5..9 {
            for minor in 0..10 {
                for patch in 0..10 {
                    let file = format!(
                        "libamdhip64.so.{major}.{minor}.{}",
                        major * 10_000 + minor * 100 + patch
                    );
                    let found = version(major * 10_000_000 + minor * 100_000 + 12_345, &file);
                    assert_eq!(found.patch, Some(patch as u32));
                    let known = matches!((major, minor, patch), (7, 0, 0) | (7, 2, 0..=4));
                    assert_eq!(found.warning().is_some(), known, "{found}");
                }
            }
        }
    }

    #[test]
    fn a_release_of_unknown_patch_level_may_be_one() {
        let may = RocmVersion::new(70_253_211, None).warning().unwrap();
        assert!(may.contains("may be"), "{may}");
        assert_eq!(RocmVersion::new(70_100_000, None).warning(), None);
        assert_eq!(RocmVersion::new(50_221_153, None).warning(), None);
    }
}
