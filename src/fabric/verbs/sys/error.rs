//! Errors of the binding: an errno, a rejected post, a library that cannot be opened.

use std::fmt;
use std::io;

/// An errno reported by libibverbs, whichever of its three conventions it used. Never zero.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(i32);

impl Errno {
    /// The errno `code`; zero, which no failure should report, becomes `EIO`.
    #[must_use]
    pub fn new(code: i32) -> Self {
        Self(if code == 0 { libc::EIO } else { code })
    }

    /// The calling thread's errno, to be read right after a failed call.
    #[must_use]
    pub(super) fn last() -> Self {
        Self::new(
            io::Error::last_os_error()
                .raw_os_error()
                .unwrap_or(libc::EIO),
        )
    }

    /// The errno's number, as in `errno.h`.
    #[must_use]
    pub fn code(self) -> i32 {
        self.0
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Errno({}: {self})", self.0)
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The standard library's text already ends in "(os error N)".
        io::Error::from_raw_os_error(self.0).fmt(f)
    }
}

impl std::error::Error for Errno {}

impl From<Errno> for io::Error {
    fn from(errno: Errno) -> Self {
        Self::from_raw_os_error(errno.0)
    }
}

/// A post that the provider refused. Requests before `bad` are posted, `bad` and those after it are not.
#[derive(Debug)]
pub struct PostError<W> {
    /// Why the provider refused; `ENOMEM` means a full queue.
    pub errno: Errno,
    /// The first request of the chain that was not posted.
    pub bad: *mut W,
}

/// One name tried by [`Verbs::open`](super::Verbs::open) and why the loader refused it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attempt {
    /// The name given to `dlopen`.
    pub name: String,
    /// The text of `dlerror`.
    pub reason: String,
}

impl fmt::Display for Attempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.name, self.reason)
    }
}

/// Why libibverbs could not be used. Neither case mends itself: the host lacks a package, or has an old one.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// No library was found under any name.
    #[error(
        "libibverbs cannot be opened ({}); install rdma-core's library (Debian: libibverbs1 and ibverbs-providers, \
         Fedora: libibverbs)",
        join(tried)
    )]
    NotFound {
        /// Every name tried, in order.
        tried: Vec<Attempt>,
    },
    /// A library was found, but lacks a function that kvpush cannot do without.
    #[error(
        "{library} has no usable {symbol} ({reason}); it is too old or not rdma-core's libibverbs"
    )]
    MissingSymbol {
        /// The name under which the library was opened.
        library: String,
        /// The missing function.
        symbol: &'static str,
        /// The text of `dlerror`.
        reason: String,
    },
}

fn join(tried: &[Attempt]) -> String {
    tried
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_without_errno_is_still_a_failure() {
        assert_eq!(Errno::new(0).code(), libc::EIO);
        assert_eq!(Errno::new(libc::ENOMEM).code(), libc::ENOMEM);
    }

    #[test]
    fn text_names_the_errno() {
        assert!(
            Errno::new(libc::ENOMEM)
                .to_string()
                .contains(&libc::ENOMEM.to_string())
        );
    }
}
