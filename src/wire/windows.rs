//! The windows of one grant: instead of the keys of regions, keys to what was granted, for each lane.

use super::{
    MAX_LANES, RemoteKey,
    codec::{Reader, WireError, Writer},
};

/// Most ranges of one grant.
pub(crate) const MAX_WINDOWS: usize = 8192;

/// What a grant opens, and with which keys. The numbers are the peer's claims.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct GrantWindows {
    /// Sorted, at most [`MAX_WINDOWS`].
    pub(crate) ranges: Vec<WindowRange>,
    /// One for each lane of the session, in their order.
    pub(crate) lanes: Vec<LaneWindows>,
}

/// A range of one region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct WindowRange {
    pub(crate) region: u16,
    pub(crate) offset: u64,
    pub(crate) length: u64,
}

/// The keys of one lane.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LaneWindows {
    pub(crate) tail: RemoteKey,
    /// For each range its first byte in the address space of the lane's rail, and its key.
    pub(crate) keys: Vec<(u64, RemoteKey)>,
}

impl GrantWindows {
    pub(super) fn write(&self, writer: &mut Writer) -> Result<(), WireError> {
        writer.list("windows", MAX_WINDOWS, &self.ranges, |w, range| {
            w.u16(range.region);
            w.u64(range.offset);
            w.u64(range.length);
            Ok(())
        })?;
        writer.list("lanes", MAX_LANES, &self.lanes, |w, lane| {
            w.u32(lane.tail.0);
            w.list(
                "window keys",
                MAX_WINDOWS,
                &lane.keys,
                |w, (address, key)| {
                    w.u64(*address);
                    w.u32(key.0);
                    Ok(())
                },
            )
        })
    }

    pub(super) fn read(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        Ok(Self {
            ranges: reader.list("windows", MAX_WINDOWS, |r| {
                Ok(WindowRange {
                    region: r.u16("region")?,
                    offset: r.u64("offset")?,
                    length: r.u64("length")?,
                })
            })?,
            lanes: reader.list("lanes", MAX_LANES, |r| {
                Ok(LaneWindows {
                    tail: RemoteKey(r.u32("tail key")?),
                    keys: r.list("window keys", MAX_WINDOWS, |r| {
                        Ok((r.u64("address")?, RemoteKey(r.u32("rkey")?)))
                    })?,
                })
            })?,
        })
    }
}
