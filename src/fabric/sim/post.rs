//! What is checked when requests are posted, as `ibv_post_send(3)` does: the queue, the limits, never the keys.

use super::{
    lane::{LaneState, Payload, Request},
    memory::read_inline,
    trace::TraceEvent,
    world::{At, World},
};
use crate::fabric::{FabricErrorKind, Opcode, PostError, Sge, Status, WorkRequest};

impl World {
    /// # Safety
    ///
    /// As for [`crate::fabric::Context::post`].
    pub(super) unsafe fn post(
        &mut self,
        at: At,
        requests: &[WorkRequest],
        sges: &[Sge],
    ) -> Result<(), PostError> {
        let fails_at = self
            .faults
            .post_fails_at
            .take_if(|index| *index < requests.len());
        let mut result = Ok(());
        for (index, request) in requests.iter().enumerate() {
            let accepted = if fails_at == Some(index) {
                Err(FabricErrorKind::Os(libc::ENOMEM))
            } else {
                // SAFETY: the caller's promise for each of its requests.
                unsafe { self.accept(at, request, sges) }
            };
            if let Err(kind) = accepted {
                if matches!(kind, FabricErrorKind::QueueFull { .. }) {
                    self.stats.queue_full += 1;
                }
                let Some(device) = self.devices.get(at.device) else {
                    break;
                };
                result = Err(PostError {
                    posted: index,
                    source: device.error("post", kind),
                });
                break;
            }
        }
        self.kick(at);
        result
    }

    /// # Safety
    ///
    /// As for [`crate::fabric::Context::post`] of this request.
    unsafe fn accept(
        &mut self,
        at: At,
        request: &WorkRequest,
        sges: &[Sge],
    ) -> Result<(), FabricErrorKind> {
        let mtu = self.config.mtu();
        let (max_message, read) = (self.config.caps.max_message, self.config.caps.read);
        let unknown = FabricErrorKind::LaneState {
            lane: at.lane,
            state: "unknown",
        };
        let lane = self.lane_mut(at).ok_or(unknown)?;
        if lane.state == LaneState::Unconnected {
            return Err(FabricErrorKind::LaneState {
                lane: at.lane,
                state: lane.state.name(),
            });
        }
        let depth = lane.config.send_depth;
        if lane.send_used >= depth {
            let queue = "send queue";
            return Err(FabricErrorKind::QueueFull { queue, depth });
        }
        let limit = |what, value: u64, limit: u64| match value <= limit {
            true => Ok(()),
            false => Err(FabricErrorKind::Limit { what, value, limit }),
        };
        let (first, count) = (request.first_sge as usize, request.sge_count as usize);
        limit("gather elements", count as u64, lane.config.max_sge.into())?;
        let end = first.saturating_add(count);
        limit("end of the gather list", end as u64, sges.len() as u64)?;
        let gather = sges.get(first..end).unwrap_or_default();
        let length = gather.iter().map(|sge| u64::from(sge.length)).sum();
        limit("message", length, max_message)?;
        let is_read = request.opcode == Opcode::Read;
        if is_read && !read {
            let what = "one-sided reads".to_owned();
            return Err(FabricErrorKind::Unavailable(what));
        }
        let payload = if request.inline {
            if is_read {
                return Err(FabricErrorKind::Os(libc::EINVAL));
            }
            limit("inline bytes", length, lane.config.max_inline.into())?;
            // SAFETY: the caller promises that the elements of an inline request are readable during the post.
            Payload::Inline(unsafe { read_inline(gather) })
        } else {
            Payload::Gather(gather.to_vec())
        };
        lane.send_used += 1;
        let id = request.id;
        let failed = lane.state == LaneState::Error;
        if !failed {
            let packets = length.div_ceil(mtu).max(1);
            lane.requests.push_back(Request {
                id,
                opcode: request.opcode,
                signaled: request.signaled,
                key: request.remote_key,
                address: request.remote_address,
                length,
                payload,
                first: lane.next_post,
                packets,
            });
            lane.next_post += packets;
        }
        self.trace(at, TraceEvent::Post { id, length });
        if failed {
            self.finish_request(at, id, Status::Flushed);
        }
        Ok(())
    }
}
