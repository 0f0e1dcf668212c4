//! Moving bytes from a peer's memory into this process's own. The context's thread only.
//!
//! A file of the peer is mapped here, and its bytes are copied at once. Other memory of the peer is read by the kernel
//! (`process_vm_readv(2)`); such pieces are collected, so that many of them share a system call.
//!
//! Dmabufs on either side are bracketed (see `fabric/mapping.rs`) once from the first byte to the flush.

use std::sync::Arc;

use super::{
    super::{
        mapping::{Mapping, Touch},
        registry::Found,
        software::{IOV_MAX, Iov},
    },
    files::PeerFiles,
    memory::Own,
    sys::{self, Process},
    wire::Location,
};

/// Pieces for the kernel, collected. One for each context; empty between lanes.
#[derive(Debug)]
pub(super) struct Copier {
    local: Vec<Iov>,
    remote: Vec<Iov>,
    /// For each piece, whose it is.
    owners: Vec<usize>,
    /// The dmabufs that are being accessed.
    held: Vec<(Arc<Mapping>, Touch)>,
}

/// A copy failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CopyFault {
    /// The place is in no announced file.
    UnknownFile,
    /// The peer's memory is not there, for this owner.
    Missing {
        /// Whose piece it was; what was given before has been copied.
        owner: usize,
    },
    /// The peer's process is gone, or not what it was.
    Gone,
    /// The exporter of a dmabuf did not let the CPU at it.
    Exporter(i32),
    /// This process may not read the peer's memory.
    NotAllowed(i32),
}

impl Copier {
    pub(super) fn new() -> Self {
        Self {
            local: Vec::with_capacity(IOV_MAX),
            remote: Vec::with_capacity(IOV_MAX),
            owners: Vec::with_capacity(IOV_MAX),
            held: Vec::new(),
        }
    }

    /// Drops what was collected.
    pub(super) fn clear(&mut self) {
        self.local.clear();
        self.remote.clear();
        self.owners.clear();
        if let Err(fault) = self.let_go() {
            tracing::debug!(?fault, "of a copy that does not count");
        }
    }

    /// Brackets a dmabuf until the next flush.
    fn hold(&mut self, mapping: &Arc<Mapping>, touch: Touch) -> Result<(), CopyFault> {
        let is_held =
            |(held, of): &(Arc<Mapping>, Touch)| Arc::ptr_eq(held, mapping) && *of == touch;
        if mapping.is_bracketed() && !self.held.iter().any(is_held) {
            mapping.begin(touch).map_err(|e| exporter(&e))?;
            self.held.push((Arc::clone(mapping), touch));
        }
        Ok(())
    }

    fn let_go(&mut self) -> Result<(), CopyFault> {
        let mut result = Ok(());
        for (mapping, touch) in self.held.drain(..) {
            result = result.and(mapping.end(touch).map_err(|e| exporter(&e)));
        }
        result
    }

    /// Copies `length` bytes at `from` to `to`, or collects the piece for [`Copier::flush`]. `owner` never shrinks.
    ///
    /// # Safety
    ///
    /// The destination must be memory that may be overwritten until the next flush: registered memory.
    pub(super) unsafe fn copy(
        &mut self,
        owner: usize,
        files: &mut PeerFiles,
        process: Option<&Process>,
        (from, to): (Location, &Found<'_, Own>),
        length: u32,
    ) -> Result<(), CopyFault> {
        if let Some(mapping) = to.mapping {
            self.hold(mapping, Touch::Write)?;
        }
        let to = to.host;
        if from.file != 0 {
            if !files.has(from.file) {
                return Err(CopyFault::UnknownFile);
            }
            let Some(source) = files.locate(from, length) else {
                return Err(CopyFault::Missing { owner });
            };
            self.hold(source.mapping, Touch::Read)?;
            // SAFETY: the source is mapped as long as the file is announced; the destination is the caller's promise.
            // They do not overlap: one is a mapping that this context made for itself. (Should a peer in the same
            // process have announced its own destination, the bytes are any mix, as with memory that others write.)
            unsafe { sys::copy(source.address, to, length as usize) };
            return Ok(());
        }
        let Some(process) = process else {
            return Err(CopyFault::NotAllowed(libc::EPERM));
        };
        if self.local.len() == IOV_MAX {
            self.flush(Some(process))?;
        }
        self.local.push(Iov {
            address: to as usize,
            length: length as usize,
        });
        self.remote.push(Iov {
            address: from.place as usize,
            length: length as usize,
        });
        self.owners.push(owner);
        Ok(())
    }

    /// Copies `length` bytes at `source` of this process to `to` at once.
    ///
    /// # Safety
    ///
    /// The source must be mapped, the destination memory that may be overwritten now: registered memory.
    pub(super) unsafe fn copy_here(
        &mut self,
        source: u64,
        to: &Found<'_, Own>,
        length: u32,
    ) -> Result<(), CopyFault> {
        if let Some(mapping) = to.mapping {
            self.hold(mapping, Touch::Write)?;
        }
        // SAFETY: the caller's promise; a peer's outbox and registered memory are different mappings.
        unsafe { sys::copy(source, to.host, length as usize) };
        Ok(())
    }

    /// Copies what was collected. The bytes are the peer's only if this succeeds: its process was there afterwards,
    /// so its number meant no other while they were read.
    pub(super) fn flush(&mut self, process: Option<&Process>) -> Result<(), CopyFault> {
        let result = match process {
            _ if self.local.is_empty() => Ok(()),
            Some(process) => self.read(process),
            None => Err(CopyFault::NotAllowed(libc::EPERM)),
        };
        let ended = self.let_go();
        self.clear();
        result.and(ended)
    }

    fn read(&self, process: &Process) -> Result<(), CopyFault> {
        if !process.is_alive() {
            return Err(CopyFault::Gone);
        }
        // SAFETY: the destinations are registered memory, by the promise of `copy`'s callers.
        let read = unsafe { process.read(&self.local, &self.remote) };
        if !process.is_alive() {
            return Err(CopyFault::Gone);
        }
        let copied = match read {
            Ok(copied) => copied,
            Err(error) => match error.raw_os_error() {
                Some(libc::EFAULT) => 0,
                Some(libc::ESRCH) | None => return Err(CopyFault::Gone),
                Some(errno) => return Err(CopyFault::NotAllowed(errno)),
            },
        };
        let mut end = 0;
        for (piece, &owner) in self.local.iter().zip(&self.owners) {
            end += piece.length;
            if end > copied {
                return Err(CopyFault::Missing { owner });
            }
        }
        Ok(())
    }
}

fn exporter(error: &std::io::Error) -> CopyFault {
    CopyFault::Exporter(error.raw_os_error().unwrap_or(libc::EIO))
}
