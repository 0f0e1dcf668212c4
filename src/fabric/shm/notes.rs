//! What this side says over a lane's socket: which files it names, and that its outbox has changed. The context's
//! thread only.
//!
//! Nothing in the outbox may name a file before the peer can have read its announcement. So what names a file is
//! published only when [`Notes::flush`] says that nothing is left to send.

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
};

use super::{
    memory::{InFile, SharedFile},
    sys,
    wire::Note,
};

/// See the module's description.
#[derive(Debug, Default)]
pub(super) struct Notes {
    /// Numbers of files that have been announced, or will be; sorted.
    announced: Vec<u32>,
    waiting: VecDeque<(Note, Option<Arc<SharedFile>>)>,
}

impl Notes {
    /// Has the peer know the file.
    pub(super) fn announce(&mut self, file: &InFile) {
        let file = &file.file;
        if let Err(at) = self.announced.binary_search(&file.number) {
            self.announced.insert(at, file.number);
            let note = Note::File {
                file: file.number,
                length: file.length,
            };
            self.waiting.push_back((note, Some(Arc::clone(file))));
        }
    }

    /// Has the peer unmap the file, if it knows it.
    pub(super) fn forget(&mut self, number: u32) {
        if let Ok(at) = self.announced.binary_search(&number) {
            self.announced.remove(at);
            self.waiting
                .push_back((Note::Forget { file: number }, None));
        }
    }

    /// Sends what waits. Returns whether nothing is left.
    pub(super) fn flush(&mut self, socket: &OwnedFd) -> io::Result<bool> {
        while let Some((note, file)) = self.waiting.front() {
            let fd = file.as_ref().map(|file| file.fd.as_fd());
            match sys::send(socket, &note.encode(), fd) {
                Ok(()) => {
                    self.waiting.pop_front();
                }
                Err(error) => match error.raw_os_error() {
                    Some(libc::EAGAIN | libc::ENOBUFS | libc::ETOOMANYREFS) => return Ok(false),
                    Some(libc::EINTR) => {}
                    _ => return Err(error),
                },
            }
        }
        Ok(true)
    }

    /// Whether something waits for the socket.
    pub(super) fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }
}

/// Wakes the peer. If its socket is full, then there is something in it that wakes it; if it is gone, that is noticed
/// elsewhere.
pub(super) fn wake(socket: &OwnedFd) {
    let sent = sys::send(socket, &Note::Wake.encode(), None);
    if let Err(error) = sent {
        tracing::trace!(%error, "a peer was not woken");
    }
}
