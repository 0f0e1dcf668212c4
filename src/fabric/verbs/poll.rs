//! What a work completion means: its status, and which request of which lane it is about.
//!
//! On a failed completion only `wr_id`, `status`, `qp_num` and `vendor_err` are valid (`ibv_poll_cq(3)`); nothing else
//! is read from it. Pure.

use crate::fabric::Status;

use super::{lane::WrId, sys};

/// Completions taken from the device with one call.
pub(super) const BATCH: usize = 32;

/// A work completion without the fields that mean nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct WorkCompletion {
    pub(super) id: WrId,
    pub(super) qpn: u32,
    pub(super) status: Status,
    pub(super) vendor_error: u32,
    /// The immediate of a successful receive.
    pub(super) imm: Option<u32>,
}

impl WorkCompletion {
    pub(super) fn read(wc: &sys::ibv_wc) -> Self {
        let status = status(wc.status);
        let success = status == Status::Success;
        Self {
            id: WrId::decode(wc.wr_id),
            qpn: wc.qp_num,
            status,
            vendor_error: if success { 0 } else { wc.vendor_err },
            imm: if success && wc.opcode == sys::IBV_WC_RECV_RDMA_WITH_IMM {
                wc.immediate()
            } else {
                None
            },
        }
    }
}

/// `enum ibv_wc_status` in our terms.
pub(super) fn status(code: sys::ibv_wc_status) -> Status {
    match code {
        sys::IBV_WC_SUCCESS => Status::Success,
        sys::IBV_WC_WR_FLUSH_ERR => Status::Flushed,
        sys::IBV_WC_REM_INV_REQ_ERR => Status::RemoteInvalidRequest,
        sys::IBV_WC_REM_ACCESS_ERR => Status::RemoteAccess,
        sys::IBV_WC_RETRY_EXC_ERR => Status::RetryExceeded,
        sys::IBV_WC_RNR_RETRY_EXC_ERR => Status::RnrRetryExceeded,
        sys::IBV_WC_LOC_PROT_ERR => Status::LocalProtection,
        other => Status::Other(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fabric::{LaneId, verbs::sys::Zeroable as _};

    fn wc() -> sys::ibv_wc {
        let mut wc = sys::ibv_wc::zeroed();
        wc.wr_id = WrId::Receive {
            lane: Some(LaneId(7)),
        }
        .encode();
        wc.qp_num = 77;
        wc.opcode = sys::IBV_WC_RECV_RDMA_WITH_IMM;
        wc.wc_flags = sys::IBV_WC_WITH_IMM;
        wc.imm.imm_data = u32::from_ne_bytes([0x01, 0x02, 0x03, 0x04]);
        wc
    }

    #[test]
    fn the_immediate_is_big_endian() {
        assert_eq!(WorkCompletion::read(&wc()).imm, Some(0x0102_0304));
    }

    #[test]
    fn a_failed_completion_gives_only_what_is_valid() {
        let mut wc = wc();
        wc.status = sys::IBV_WC_WR_FLUSH_ERR;
        wc.vendor_err = 0x68;
        let read = WorkCompletion::read(&wc);
        assert_eq!(
            read,
            WorkCompletion {
                id: WrId::Receive {
                    lane: Some(LaneId(7))
                },
                qpn: 77,
                status: Status::Flushed,
                vendor_error: 0x68,
                imm: None,
            }
        );
    }

    #[test]
    fn a_plain_send_of_the_peer_is_no_immediate() {
        let mut wc = wc();
        wc.opcode = sys::IBV_WC_RECV;
        assert_eq!(WorkCompletion::read(&wc).imm, None);
    }

    /// The numbers are those of `enum ibv_wc_status`.
    #[test]
    fn statuses_are_those_of_verbs() {
        let expected = [
            (0, Status::Success),
            (4, Status::LocalProtection),
            (5, Status::Flushed),
            (9, Status::RemoteInvalidRequest),
            (10, Status::RemoteAccess),
            (12, Status::RetryExceeded),
            (13, Status::RnrRetryExceeded),
            (1, Status::Other(1)),
            (21, Status::Other(21)),
        ];
        for (code, wanted) in expected {
            assert_eq!(status(code), wanted, "{code}");
        }
    }
}
