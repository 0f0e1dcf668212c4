//! Writes between regions that are registered in several extents.
//!
//! A planned write is a range of one destination region gathered from runs of source regions. Where a region is cut,
//! no gather element and no write may cross the end of an extent, because each extent has its own key. So a planned
//! write becomes several requests: each takes as much as lies in one extent of the destination and needs no more gather
//! elements than the lane allows. Only pushes between pools of which one is cut come here; all others are built by
//! the shorter way in `pump`.

use super::{remote::Target, session::Lane};
use crate::{
    endpoint::regions::Region,
    fabric::{RemoteKey, Sge},
    kv::{PlannedWrite, SourceRun},
};

/// One request of a cut write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cut {
    pub(super) remote_address: u64,
    pub(super) remote_key: RemoteKey,
    pub(super) sge_count: u32,
    /// Bytes, at least 1.
    pub(super) length: u32,
}

/// Builds the request for the bytes of `write` from `done` on: appends its gather elements to `sges`. `None` if a rail
/// has no key there, which was checked when the push was opened.
pub(super) fn cut(
    write: &PlannedWrite,
    runs: &[SourceRun],
    done: u32,
    target: &Target,
    regions: &[Region],
    (rail, max_sge): (usize, u32),
    sges: &mut Vec<Sge>,
) -> Option<Cut> {
    let offset = write.offset + u64::from(done);
    let (remote_address, remote_key, rest) = target.at(offset)?;
    let room = u64::from(write.length - done).min(rest) as u32;
    let first = sges.len();
    let (mut skip, mut length) = (done, 0);
    'runs: for run in runs {
        if skip >= run.length {
            skip -= run.length;
            continue;
        }
        let keys = regions.get(usize::from(run.region))?.rails().get(rail)?;
        while skip < run.length {
            if length == room || (sges.len() - first) as u32 == max_sge {
                break 'runs;
            }
            let (address, key, rest) = keys.at(run.offset + u64::from(skip))?;
            let most = u64::from((run.length - skip).min(room - length));
            let taken = most.min(rest) as u32;
            sges.push(Sge {
                address,
                length: taken,
                key,
            });
            skip += taken;
            length += taken;
        }
        skip = 0;
    }
    (length > 0).then_some(Cut {
        remote_address,
        remote_key,
        sge_count: (sges.len() - first) as u32,
        length,
    })
}

/// What of a lane matters to [`cut`].
pub(super) fn limits(lane: &Lane) -> (usize, u32) {
    (lane.rail, lane.config.max_sge)
}
