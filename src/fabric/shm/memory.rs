//! Registered memory that lies in files, and the files.
//!
//! Memory that lies in a file which a peer can map safely (a sealed memory file, a dmabuf) is named by file and offset;
//! a peer maps each file once, for reading. All other memory is named by its address in this process.

use std::{
    os::fd::OwnedFd,
    sync::{Arc, Weak},
};

use parking_lot::Mutex;

use super::{
    super::registry::{self, Found},
    sys::FileFacts,
    wire::Location,
};

pub(super) use super::super::registry::Intent;

/// What is kept with a registration.
pub(super) type Own = Option<InFile>;
/// The registrations of a device.
pub(super) type Registry = registry::Registry<Own>;
/// The context's view of them.
pub(super) type MemoryView = registry::MemoryView<Own>;
/// One registration.
pub(super) type Region = registry::Region<Own>;

/// A file that peers may map.
#[derive(Debug)]
pub(super) struct SharedFile {
    /// Its number, the same on all lanes.
    pub(super) number: u32,
    pub(super) fd: OwnedFd,
    pub(super) length: u64,
    identity: (u64, u64),
}

/// Where a registration lies in a file.
#[derive(Clone, Debug)]
pub(super) struct InFile {
    pub(super) file: Arc<SharedFile>,
    /// Offset of the registration's first byte.
    pub(super) offset: u64,
}

/// The files of a device. Any thread may call.
#[derive(Debug, Default)]
pub(super) struct Files {
    state: Mutex<(u32, Vec<Weak<SharedFile>>)>,
}

impl Files {
    /// The file behind `fd`, which is the one known already if it is the same. Nothing if all numbers have been used.
    pub(super) fn share(&self, fd: OwnedFd, facts: &FileFacts) -> Option<Arc<SharedFile>> {
        let mut state = self.state.lock();
        let (numbers, files) = &mut *state;
        let same =
            |file: &Arc<SharedFile>| file.identity == facts.identity && file.length >= facts.length;
        if let Some(known) = files.iter().filter_map(Weak::upgrade).find(same) {
            return Some(known);
        }
        files.retain(|file| file.strong_count() > 0);
        *numbers = numbers.checked_add(1)?;
        let file = Arc::new(SharedFile {
            number: *numbers,
            fd,
            length: facts.length,
            identity: facts.identity,
        });
        files.push(Arc::downgrade(&file));
        Some(file)
    }
}

/// How a peer finds a range.
pub(super) fn location(found: &Found<'_, Own>) -> Location {
    match found.own {
        Some(InFile { file, offset }) => Location {
            file: file.number,
            place: offset + found.offset,
        },
        None => Location {
            file: 0,
            place: found.host,
        },
    }
}
