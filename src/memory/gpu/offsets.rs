//! Where memory lies in an exported file, and how a range is cut into registrations: arithmetic only.
//!
//! A wrong offset makes a NIC write to somebody else's page without a word, so nothing here rounds silently, wraps
//! around or saturates: what does not fit is `None`.
//!
//! The page that counts is the one that the kernel maps dmabufs with, the host's (4 KiB, or 64 KiB on some arm64).
//! GPUs allocate in larger ones (64 KiB, 2 MiB), so that an allocation begins on a page of either; what an engine
//! cuts out of it begins anywhere.

use crate::memory::Span;

/// The smallest range of whole pages around `span`. `None` for an empty range, for a page size that is no power of two,
/// or at the end of the address space.
pub fn round_out(span: Span, page: u64) -> Option<Span> {
    if span.length == 0 || !page.is_power_of_two() {
        return None;
    }
    let start = span.address & !(page - 1);
    let end = span.end()?.checked_next_multiple_of(page)?;
    Some(Span {
        address: start,
        length: end - start,
    })
}

/// The offset of `memory` in a file in which `exported` begins at `offset`. `None` if any of `memory` lies outside of
/// `exported`, or no such file can be.
pub fn offset_within(exported: Span, offset: u64, memory: Span) -> Option<u64> {
    if memory.length == 0 || !exported.contains(memory) {
        return None;
    }
    // The whole export must be addressable by offsets, or its own end would wrap.
    offset.checked_add(exported.length)?;
    offset.checked_add(memory.address - exported.address)
}

/// Whether a registration of a dmabuf may have this offset and this I/O virtual address: `ibv_reg_dmabuf_mr` wants both
/// at the same place within their page.
pub fn share_page_offset(offset: u64, iova: u64, page: u64) -> bool {
    page.is_power_of_two() && (offset ^ iova) & (page - 1) == 0
}

/// A part of a range, to be registered by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// The addresses.
    pub span: Span,
    /// Where in the file, if there is one; else the distance from the range's start.
    pub offset: u64,
}

/// Cuts `span`, which begins at `offset` of a file, into chunks of at most `max` bytes. All cuts lie on pages, so that
/// every chunk has offset and address at the same place within their page if `span` has.
///
/// `None` if nothing can be cut so: an empty range, `max` below one page, addresses or offsets that overflow, or an
/// offset that does not share the page offset of the address.
pub fn chunks(span: Span, offset: u64, max: u64, page: u64) -> Option<Chunks> {
    let whole = span.length > 0 && span.end().is_some();
    let fits = offset.checked_add(span.length).is_some() && max >= page;
    (whole && fits && share_page_offset(offset, span.address, page)).then_some(Chunks {
        rest: span,
        offset,
        max,
        page,
    })
}

/// The chunks of a range, in order; see [`chunks`].
#[derive(Clone, Debug)]
pub struct Chunks {
    rest: Span,
    offset: u64,
    max: u64,
    page: u64,
}

impl Iterator for Chunks {
    type Item = Chunk;

    fn next(&mut self) -> Option<Chunk> {
        let Span { address, length } = self.rest;
        if length == 0 {
            return None;
        }
        let taken = if length <= self.max {
            length
        } else {
            // `max` is a page at least, so the cut lies behind `address`; below the end, so nothing overflows.
            ((address + self.max) & !(self.page - 1)) - address
        };
        let chunk = Chunk {
            span: Span {
                address,
                length: taken,
            },
            offset: self.offset,
        };
        self.rest = Span {
            address: address + taken,
            length: length - taken,
        };
        self.offset += taken;
        Some(chunk)
    }
}

#[cfg(test)]
#[path = "offsets_tests.rs"]
mod tests;
