//! Layouts of completion queues, completion channels and work completions.

use std::ffi::{c_int, c_uint, c_void};

use super::ibv_context;

pub type ibv_wc_status = c_uint;
pub type ibv_wc_opcode = c_uint;

#[repr(C)]
pub struct ibv_comp_channel {
    pub context: *mut ibv_context,
    pub fd: c_int,
    pub refcnt: c_int,
}

#[repr(C)]
pub struct ibv_cq {
    pub context: *mut ibv_context,
    pub channel: *mut ibv_comp_channel,
    pub cq_context: *mut c_void,
    pub handle: u32,
    pub cqe: c_int,
    pub mutex: libc::pthread_mutex_t,
    pub cond: libc::pthread_cond_t,
    pub comp_events_completed: u32,
    pub async_events_completed: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub union ibv_wc_imm {
    /// Big-endian; valid with `IBV_WC_WITH_IMM`.
    pub imm_data: u32,
    /// Valid with `IBV_WC_WITH_INV`.
    pub invalidated_rkey: u32,
}

/// A work completion. When `status` is not `IBV_WC_SUCCESS`, only `wr_id`, `status`, `qp_num` and `vendor_err` mean
/// anything (`ibv_poll_cq(3)`).
#[repr(C)]
#[derive(Clone, Copy)]
pub struct ibv_wc {
    pub wr_id: u64,
    pub status: ibv_wc_status,
    pub opcode: ibv_wc_opcode,
    pub vendor_err: u32,
    pub byte_len: u32,
    pub imm: ibv_wc_imm,
    pub qp_num: u32,
    pub src_qp: u32,
    pub wc_flags: c_uint,
    pub pkey_index: u16,
    pub slid: u16,
    pub sl: u8,
    pub dlid_path_bits: u8,
}

impl ibv_wc {
    /// The immediate in host order, or `None` when this completion succeeded without one or failed.
    #[must_use]
    pub fn immediate(&self) -> Option<u32> {
        if self.status != super::IBV_WC_SUCCESS || self.wc_flags & super::IBV_WC_WITH_IMM == 0 {
            return None;
        }
        // SAFETY: both variants are a `u32`, so any contents are valid; the flag says the value is an immediate.
        Some(u32::from_be(unsafe { self.imm.imm_data }))
    }
}
