//! Cuts a byte stream into messages: four bytes of length, then the message.

use super::super::MAX_MESSAGE;
use super::error::ChannelError;

/// Bytes in front of each message.
pub(super) const HEADER: usize = 4;
/// Most bytes reserved on the word of a header; beyond it, memory follows what has arrived.
const RESERVE: usize = 64 << 10;

/// The message being received.
#[derive(Default)]
pub(super) struct Frames {
    header: Vec<u8>,
    body: Option<(usize, Vec<u8>)>,
}

impl Frames {
    /// Takes all of `bytes` and appends the messages that are complete.
    pub(super) fn push(
        &mut self,
        mut bytes: &[u8],
        messages: &mut Vec<Vec<u8>>,
    ) -> Result<(), ChannelError> {
        loop {
            if self.body.is_none() {
                if !fill(&mut self.header, HEADER, &mut bytes) {
                    return Ok(());
                }
                let length = self.header.first_chunk().copied().map(u32::from_le_bytes);
                let length = length.unwrap_or_default();
                self.header.clear();
                let size = length as usize;
                if size > MAX_MESSAGE {
                    let length = length.into();
                    return Err(ChannelError::Oversize { length });
                }
                self.body = Some((size, Vec::with_capacity(size.min(RESERVE))));
            }
            if let Some((size, body)) = &mut self.body {
                if !fill(body, *size, &mut bytes) {
                    return Ok(());
                }
                messages.push(std::mem::take(body));
                self.body = None;
            }
        }
    }
}

/// Moves bytes from the front of `bytes` until `unit` has `size`; says whether it has.
pub(super) fn fill(unit: &mut Vec<u8>, size: usize, bytes: &mut &[u8]) -> bool {
    let wanted = size.saturating_sub(unit.len()).min(bytes.len());
    if let Some((taken, rest)) = bytes.split_at_checked(wanted) {
        unit.extend_from_slice(taken);
        *bytes = rest;
    }
    unit.len() >= size
}

#[cfg(test)]
impl Frames {
    /// Bytes reserved.
    pub(super) fn capacity(&self) -> usize {
        let body = self.body.as_ref().map_or(0, |(_, body)| body.capacity());
        self.header.capacity() + body
    }
}
