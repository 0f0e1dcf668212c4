//! Pieces of memory for the kernel.

/// A piece, layout-compatible with `struct iovec`. An address rather than a pointer: pages are never accessed from Rust.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(in crate::fabric) struct Iov {
    pub(in crate::fabric) address: usize,
    pub(in crate::fabric) length: usize,
}

const _: () = assert!(
    size_of::<Iov>() == size_of::<libc::iovec>()
        && align_of::<Iov>() == align_of::<libc::iovec>()
        && std::mem::offset_of!(Iov, address) == std::mem::offset_of!(libc::iovec, iov_base)
        && std::mem::offset_of!(Iov, length) == std::mem::offset_of!(libc::iovec, iov_len)
);

/// Most pieces of one call (`IOV_MAX` of Linux).
pub(in crate::fabric) const IOV_MAX: usize = 1024;
