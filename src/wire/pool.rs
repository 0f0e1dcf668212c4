//! What a writer must know of a pool to write into it: its layout and, for each region and rail, where it is and
//! under which key. Sent once per pool and session.

use super::codec::{Reader, WireError, Writer};
use super::ids::PoolId;
use super::layout;
use crate::kv::KvLayout;
use crate::wire::RemoteKey;

/// Most rails of one endpoint.
pub(crate) const MAX_RAILS: usize = 16;
/// Most registrations that one region is cut into on one rail.
pub(crate) const MAX_EXTENTS: usize = 1024;
/// Most regions of one pool.
pub(crate) const MAX_REGIONS: usize = 4096;

/// A pool as the writer sees it. The numbers are the peer's claims: check the layout against the regions before use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PoolDescriptor {
    pub(crate) pool: PoolId,
    pub(crate) layout: KvLayout,
    /// At most [`MAX_REGIONS`].
    pub(crate) regions: Vec<RegionDescriptor>,
    /// How far the peer's rails are from the pool's memory, by number; 0 is near. A rail that is not in the list is near.
    /// At most [`MAX_RAILS`].
    pub(crate) distances: Vec<u8>,
}

/// One region of the peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RegionDescriptor {
    pub(crate) length: u64,
    /// One for each rail that reaches it, at most [`MAX_RAILS`].
    pub(crate) keys: Vec<RegionKey>,
}

/// Where and how one rail reaches a region.
///
/// A region that its device cannot register at once has several keys. Each is good for an extent, and extents end at
/// multiples of `extent` in the rail's address space. Whether there are as many as the region's length asks for is for
/// the receiver to check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RegionKey {
    /// The peer's rail.
    pub(crate) rail: u8,
    /// First byte, in that rail's address space.
    pub(crate) address: u64,
    /// Bytes between the ends of two extents; 0 if one key is good for all.
    pub(crate) extent: u64,
    /// At most [`MAX_EXTENTS`].
    pub(crate) rkeys: Vec<RemoteKey>,
}

impl PoolDescriptor {
    pub(super) fn write(&self, writer: &mut Writer) -> Result<(), WireError> {
        writer.u32(self.pool.0);
        layout::write(writer, &self.layout)?;
        writer.list("regions", MAX_REGIONS, &self.regions, |w, region| {
            w.u64(region.length);
            RegionKey::write_list(w, &region.keys)
        })?;
        writer.list("distances", MAX_RAILS, &self.distances, |w, &distance| {
            w.u8(distance);
            Ok(())
        })
    }

    pub(super) fn read(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        Ok(Self {
            pool: PoolId(reader.u32("pool")?),
            layout: layout::read(reader)?,
            regions: reader.list("regions", MAX_REGIONS, |r| {
                Ok(RegionDescriptor {
                    length: r.u64("region length")?,
                    keys: RegionKey::read_list(r)?,
                })
            })?,
            distances: reader.list("distances", MAX_RAILS, |r| r.u8("distance"))?,
        })
    }
}

impl RegionKey {
    pub(super) fn write_list(writer: &mut Writer, keys: &[Self]) -> Result<(), WireError> {
        writer.list("keys", MAX_RAILS, keys, |w, key| {
            w.u8(key.rail);
            w.u64(key.address);
            w.u64(key.extent);
            w.list("extents", MAX_EXTENTS, &key.rkeys, |w, rkey| {
                w.u32(rkey.0);
                Ok(())
            })
        })
    }

    pub(super) fn read_list(reader: &mut Reader<'_>) -> Result<Vec<Self>, WireError> {
        reader.list("keys", MAX_RAILS, |r| {
            Ok(Self {
                rail: r.u8("rail")?,
                address: r.u64("address")?,
                extent: r.u64("extent")?,
                rkeys: r.list("extents", MAX_EXTENTS, |r| Ok(RemoteKey(r.u32("rkey")?)))?,
            })
        })
    }
}
