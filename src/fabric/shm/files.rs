//! The peers' files, mapped for reading. The context's thread only.
//!
//! Lanes of one peer announce the same files; each is mapped once. What a peer can make this process map is bounded,
//! because address space and mappings are finite and belong to the whole process.

use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, Weak},
};

use super::{
    super::{DmabufRange, mapping::Mapping},
    sys,
    wire::Location,
};

/// Most files that one lane may name at once; more than a pool has regions.
const MAX_FILES: usize = 8192;
/// Most mappings of all peers together.
const MAX_MAPPINGS: usize = 16_384;
/// Most bytes mapped of all peers together: a fraction of the 128 TiB of a process.
const MAX_BYTES: u64 = 32 << 40;

/// All mappings of a context by file.
#[derive(Debug, Default)]
pub(super) struct Mappings {
    known: HashMap<(u64, u64), Weak<PeerFile>>,
}

/// A file of a peer, mapped from its beginning.
#[derive(Debug)]
pub(super) struct PeerFile {
    mapping: Arc<Mapping>,
    length: u64,
}

/// Bytes of a peer's file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Located<'a> {
    /// Where they are mapped.
    pub(super) address: u64,
    /// What maps them.
    pub(super) mapping: &'a Arc<Mapping>,
}

impl Mappings {
    /// Maps the first `length` bytes of a file that a peer has sent, or finds that they are mapped already.
    pub(super) fn map(&mut self, fd: &OwnedFd, length: u64) -> io::Result<Arc<PeerFile>> {
        let refuse = |why| Err(io::Error::new(io::ErrorKind::InvalidData, why));
        let Some(facts) = sys::facts(fd.as_fd())? else {
            return refuse("a file whose size may shrink");
        };
        if length == 0 || length > facts.length {
            return refuse("a file that is shorter than announced");
        }
        let known = self.known.get(&facts.identity).and_then(Weak::upgrade);
        if let Some(known) = known.filter(|known| known.length >= length) {
            return Ok(known);
        }
        self.known.retain(|_, file| file.strong_count() > 0);
        let mapped: u64 = self
            .known
            .values()
            .filter_map(Weak::upgrade)
            .map(|file| file.length)
            .sum();
        if self.known.len() >= MAX_MAPPINGS || mapped.saturating_add(length) > MAX_BYTES {
            return refuse("more memory than may be mapped");
        }
        let range = DmabufRange {
            fd: fd.as_fd(),
            offset: 0,
            length,
            // Nothing names it so.
            address: 0,
        };
        let mapping = Mapping::new(&range, false)
            .map_err(|(kind, _)| io::Error::new(io::ErrorKind::InvalidData, kind))?;
        let file = Arc::new(PeerFile {
            mapping: Arc::new(mapping),
            length,
        });
        self.known.insert(facts.identity, Arc::downgrade(&file));
        Ok(file)
    }
}

/// The files that a peer has announced on a lane.
#[derive(Debug, Default)]
pub(super) struct PeerFiles {
    /// Sorted by number.
    files: Vec<(u32, Arc<PeerFile>)>,
    /// Where the last one looked for is.
    last: usize,
}

impl PeerFiles {
    /// Adds one; `false` if there are too many, or the number is taken.
    pub(super) fn add(&mut self, number: u32, file: Arc<PeerFile>) -> bool {
        match self.files.binary_search_by_key(&number, |file| file.0) {
            Err(at) if self.files.len() < MAX_FILES => {
                self.files.insert(at, (number, file));
                true
            }
            _ => false,
        }
    }

    /// Removes one; `false` if there is none.
    pub(super) fn forget(&mut self, number: u32) -> bool {
        match self.files.binary_search_by_key(&number, |file| file.0) {
            Ok(at) => {
                self.files.remove(at);
                true
            }
            Err(_) => false,
        }
    }

    /// The mapping of a file.
    fn find(&mut self, number: u32) -> Option<&PeerFile> {
        if self
            .files
            .get(self.last)
            .is_none_or(|file| file.0 != number)
        {
            let found = self.files.binary_search_by_key(&number, |file| file.0);
            self.last = found.ok()?;
        }
        self.files.get(self.last).map(|file| &*file.1)
    }

    /// Whether a file has been announced.
    pub(super) fn has(&mut self, number: u32) -> bool {
        self.find(number).is_some()
    }

    /// Where `length` bytes at `from` are mapped; nothing if the file is unknown or too short.
    pub(super) fn locate(&mut self, from: Location, length: u32) -> Option<Located<'_>> {
        let file = self.find(from.file)?;
        let end = from.place.checked_add(length.into())?;
        (end <= file.length).then(|| Located {
            address: file.mapping.first() + from.place,
            mapping: &file.mapping,
        })
    }
}
