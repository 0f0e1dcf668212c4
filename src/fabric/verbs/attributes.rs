//! The attributes of a queue pair's state changes, RESET to INIT to RTR to RTS, and what they depend on.
//!
//! Pure, but for [`modify`], which makes the change, and [`random_psn`].

use crate::fabric::{FabricError, FabricErrorKind};

use super::{
    address::VerbsAddress,
    config::VerbsConfig,
    error::Place,
    link::{LinkLayer, Mtu},
    sys::{self, Zeroable as _},
};

/// Everything the attributes depend on besides the two addresses.
#[derive(Clone, Copy, Debug)]
pub(super) struct Path<'a> {
    pub(super) config: &'a VerbsConfig,
    pub(super) gid_index: u8,
    /// Reads this device may have under way on one queue pair.
    pub(super) max_initiated_reads: u8,
    /// The largest retry count of this device that ends.
    pub(super) most_retries: u8,
}

/// Attributes for RESET to INIT, and their mask.
pub(super) fn init_attributes(port: u8) -> (sys::ibv_qp_attr, i32) {
    let mut attr = sys::ibv_qp_attr::zeroed();
    attr.qp_state = sys::IBV_QPS_INIT;
    attr.pkey_index = 0;
    attr.port_num = port;
    attr.qp_access_flags =
        sys::IBV_ACCESS_LOCAL_WRITE | sys::IBV_ACCESS_REMOTE_WRITE | sys::IBV_ACCESS_REMOTE_READ;
    (attr, INIT_MASK)
}

const INIT_MASK: i32 =
    sys::IBV_QP_STATE | sys::IBV_QP_PKEY_INDEX | sys::IBV_QP_PORT | sys::IBV_QP_ACCESS_FLAGS;
const RTR_MASK: i32 = sys::IBV_QP_STATE
    | sys::IBV_QP_AV
    | sys::IBV_QP_PATH_MTU
    | sys::IBV_QP_DEST_QPN
    | sys::IBV_QP_RQ_PSN
    | sys::IBV_QP_MAX_DEST_RD_ATOMIC
    | sys::IBV_QP_MIN_RNR_TIMER;
const RTS_MASK: i32 = sys::IBV_QP_STATE
    | sys::IBV_QP_TIMEOUT
    | sys::IBV_QP_RETRY_CNT
    | sys::IBV_QP_RNR_RETRY
    | sys::IBV_QP_SQ_PSN
    | sys::IBV_QP_MAX_QP_RD_ATOMIC;

/// How long a peer waits before it tries again when we have no receive posted: 0.64 ms (vol. 1, table 45). Receives
/// are reserved before anyone sends, so this is not part of normal life.
const MIN_RNR_TIMER: u8 = 12;

/// Attributes for INIT to RTR, and their mask: who the peer is and how it is reached.
pub(super) fn rtr_attributes(
    ours: &VerbsAddress,
    theirs: &VerbsAddress,
    path: Path<'_>,
) -> Result<(sys::ibv_qp_attr, i32), &'static str> {
    if ours.link != theirs.link {
        return Err("the peer's port is of another link layer");
    }
    if ours.gid_type != theirs.gid_type {
        return Err("the peer uses another type of GID (RoCE v1 and v2 do not mix)");
    }
    let mut attr = sys::ibv_qp_attr::zeroed();
    attr.qp_state = sys::IBV_QPS_RTR;
    attr.path_mtu = negotiated_mtu(ours, theirs).code().into();
    attr.dest_qp_num = theirs.qpn;
    attr.rq_psn = theirs.psn;
    attr.max_dest_rd_atomic = ours.max_dest_rd_atomic;
    attr.min_rnr_timer = MIN_RNR_TIMER;
    attr.ah_attr.port_num = ours.port;
    attr.ah_attr.sl = path.config.service_level & 15;
    if needs_grh(ours, theirs) {
        if theirs.gid.is_zero() {
            return Err("the peer is on another subnet and has no GID");
        }
        attr.ah_attr.is_global = 1;
        attr.ah_attr.grh.dgid = theirs.gid.0.into();
        attr.ah_attr.grh.sgid_index = path.gid_index;
        attr.ah_attr.grh.hop_limit = 64;
        attr.ah_attr.grh.traffic_class = path.config.traffic_class;
    }
    if ours.link != LinkLayer::Ethernet {
        if theirs.lid == 0 {
            return Err("the peer's port has no LID yet (is a subnet manager running?)");
        }
        attr.ah_attr.dlid = theirs.lid;
    }
    Ok((attr, RTR_MASK))
}

/// Attributes for RTR to RTS, and their mask: how we send.
pub(super) fn rts_attributes(
    ours: &VerbsAddress,
    theirs: &VerbsAddress,
    path: Path<'_>,
) -> (sys::ibv_qp_attr, i32) {
    let mut attr = sys::ibv_qp_attr::zeroed();
    attr.qp_state = sys::IBV_QPS_RTS;
    attr.timeout = path.config.timeout.min(31);
    attr.retry_cnt = path.config.retry_count.min(path.most_retries);
    attr.rnr_retry = path.config.rnr_retry.min(7);
    attr.sq_psn = ours.psn;
    attr.max_rd_atomic = path.max_initiated_reads.min(theirs.max_dest_rd_atomic);
    (attr, RTS_MASK)
}

/// The path MTU of a connection. Both sides compute it from the same two addresses, so they agree, as they must: the
/// responder checks every packet's length against its own (vol. 1, 9.7.4).
pub(super) fn negotiated_mtu(ours: &VerbsAddress, theirs: &VerbsAddress) -> Mtu {
    ours.mtu.min(theirs.mtu)
}

/// RoCE always; InfiniBand between subnets, and where a port insists.
fn needs_grh(ours: &VerbsAddress, theirs: &VerbsAddress) -> bool {
    ours.link == LinkLayer::Ethernet
        || ours.grh_required
        || theirs.grh_required
        || (!theirs.gid.is_zero() && ours.gid.subnet_prefix() != theirs.gid.subnet_prefix())
}

/// A packet sequence number to start with. Random, so that packets of an earlier connection between queue pairs of
/// the same numbers are not taken for this one's.
pub(super) fn random_psn(place: &Place) -> Result<u32, FabricError> {
    let random = getrandom::u32().map_err(|error| {
        place.error(
            "getrandom",
            FabricErrorKind::Unavailable(format!("no random numbers: {error}")),
        )
    })?;
    Ok(random & 0x00ff_ffff)
}

/// `ibv_modify_qp(3)`.
///
/// # Safety
///
/// `qp` must be a live queue pair of `lib`.
pub(super) unsafe fn modify(
    lib: &sys::Verbs,
    qp: *mut sys::ibv_qp,
    (mut attr, mask): (sys::ibv_qp_attr, i32),
    operation: &'static str,
    place: &Place,
) -> Result<(), FabricError> {
    // SAFETY: the queue pair is live by this function's contract, and the attributes outlive the call.
    unsafe { lib.modify_qp(qp, &mut attr, mask) }.map_err(|errno| place.os(operation, errno.code()))
}

/// Attributes for any state to ERR.
pub(super) fn error_attributes() -> (sys::ibv_qp_attr, i32) {
    let mut attr = sys::ibv_qp_attr::zeroed();
    attr.qp_state = sys::IBV_QPS_ERR;
    (attr, sys::IBV_QP_STATE)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::fabric::verbs::gid::{Gid, GidType};

    fn roce(last: u8) -> VerbsAddress {
        VerbsAddress {
            link: LinkLayer::Ethernet,
            gid_type: GidType::RoceV2,
            mtu: Mtu::M4096,
            port: 1,
            max_dest_rd_atomic: 16,
            grh_required: false,
            qpn: 100 + u32::from(last),
            psn: 1000 * u32::from(last),
            lid: 0,
            gid: Gid([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 0, 0, last]),
        }
    }

    fn infiniband(prefix: u8, lid: u16) -> VerbsAddress {
        let mut gid = [1; 16];
        gid[7] = prefix;
        VerbsAddress {
            link: LinkLayer::InfiniBand,
            gid_type: GidType::InfiniBand,
            lid,
            gid: Gid(gid),
            ..roce(1)
        }
    }

    fn path(config: &VerbsConfig) -> Path<'_> {
        Path {
            config,
            gid_index: 3,
            max_initiated_reads: 8,
            most_retries: 7,
        }
    }

    /// The required attributes of ibv_modify_qp(3), table for RC, as the numbers of `enum ibv_qp_attr_mask`.
    #[test]
    fn masks_are_those_of_the_manual() {
        let bit = |n: u32| 1i32 << n;
        let (state, access, pkey, port, av) = (bit(0), bit(3), bit(4), bit(5), bit(7));
        let (mtu, timeout, retry, rnr, rq_psn) = (bit(8), bit(9), bit(10), bit(11), bit(12));
        let (initiated, min_rnr, sq_psn, served, dest) =
            (bit(13), bit(15), bit(16), bit(17), bit(20));
        assert_eq!(INIT_MASK, state | pkey | port | access);
        assert_eq!(
            RTR_MASK,
            state | av | mtu | dest | rq_psn | served | min_rnr
        );
        assert_eq!(RTS_MASK, state | timeout | retry | rnr | sq_psn | initiated);
    }

    #[test]
    fn sequence_numbers_are_ours_to_send_and_theirs_to_receive() {
        let config = VerbsConfig::default();
        let (rtr, _) = rtr_attributes(&roce(1), &roce(2), path(&config)).unwrap();
        let (rts, _) = rts_attributes(&roce(1), &roce(2), path(&config));
        assert_eq!((rtr.rq_psn, rts.sq_psn), (2000, 1000));
        assert_eq!(rtr.dest_qp_num, 102);
    }

    #[test]
    fn roce_is_always_global_and_never_by_lid() {
        let config = VerbsConfig {
            traffic_class: 104,
            ..VerbsConfig::default()
        };
        let (rtr, _) = rtr_attributes(&roce(1), &roce(2), path(&config)).unwrap();
        assert_eq!(rtr.ah_attr.is_global, 1);
        assert_eq!(rtr.ah_attr.dlid, 0);
        assert_eq!(rtr.ah_attr.grh.sgid_index, 3);
        assert_eq!(rtr.ah_attr.grh.hop_limit, 64);
        assert_eq!(rtr.ah_attr.grh.traffic_class, 104);
        assert_eq!(rtr.ah_attr.grh.dgid.bytes(), roce(2).gid.0);
    }

    #[test]
    fn infiniband_is_global_only_where_it_must_be() {
        let config = VerbsConfig::default();
        let global = |ours: &VerbsAddress, theirs: &VerbsAddress| {
            rtr_attributes(ours, theirs, path(&config)).map(|(attr, _)| attr.ah_attr.is_global)
        };
        assert_eq!(global(&infiniband(1, 5), &infiniband(1, 6)), Ok(0));
        assert_eq!(global(&infiniband(1, 5), &infiniband(2, 6)), Ok(1));
        let insists = VerbsAddress {
            grh_required: true,
            ..infiniband(1, 6)
        };
        assert_eq!(global(&infiniband(1, 5), &insists), Ok(1));
        assert!(global(&infiniband(1, 5), &infiniband(1, 0)).is_err());
        let (rtr, _) = rtr_attributes(&infiniband(1, 5), &infiniband(1, 6), path(&config)).unwrap();
        assert_eq!(rtr.ah_attr.dlid, 6);
    }

    #[test]
    fn what_does_not_mix_is_refused() {
        let config = VerbsConfig::default();
        assert!(rtr_attributes(&roce(1), &infiniband(1, 6), path(&config)).is_err());
        let v1 = VerbsAddress {
            gid_type: GidType::RoceV1,
            ..roce(2)
        };
        assert!(rtr_attributes(&roce(1), &v1, path(&config)).is_err());
    }

    #[test]
    fn mtu_and_reads_are_what_both_sides_allow() {
        let config = VerbsConfig::default();
        let small = VerbsAddress {
            mtu: Mtu::M1024,
            max_dest_rd_atomic: 2,
            ..roce(2)
        };
        for (ours, theirs) in [(roce(1), small), (small, roce(1))] {
            let (rtr, _) = rtr_attributes(&ours, &theirs, path(&config)).unwrap();
            assert_eq!(rtr.path_mtu, sys::IBV_MTU_1024);
            assert_eq!(rtr.max_dest_rd_atomic, ours.max_dest_rd_atomic);
        }
        assert_eq!(
            rts_attributes(&roce(1), &small, path(&config))
                .0
                .max_rd_atomic,
            2,
            "theirs"
        );
        assert_eq!(
            rts_attributes(&small, &roce(1), path(&config))
                .0
                .max_rd_atomic,
            8,
            "ours"
        );
    }

    #[test]
    fn retries_are_those_of_the_settings_within_what_the_device_ends() {
        let config = VerbsConfig {
            timeout: 40,
            rnr_retry: 9,
            ..VerbsConfig::default()
        };
        let path = |most_retries| Path {
            most_retries,
            ..path(&config)
        };
        let (hardware, _) = rts_attributes(&roce(1), &roce(2), path(7));
        let (soft, _) = rts_attributes(&roce(1), &roce(2), path(6));
        assert_eq!((hardware.retry_cnt, soft.retry_cnt), (7, 6));
        assert_eq!(
            (hardware.timeout, hardware.rnr_retry),
            (31, 7),
            "cut to what fits"
        );
    }

    #[test]
    fn random_sequence_numbers_have_24_bits_and_differ() {
        let place = Place {
            device: "none".into(),
            port: 1,
        };
        let psns: HashSet<u32> = (0..64).map(|_| random_psn(&place).unwrap()).collect();
        assert!(psns.iter().all(|psn| *psn <= 0x00ff_ffff));
        assert!(
            psns.len() > 60,
            "{} of 64 differ, which chance does not explain",
            psns.len()
        );
        assert!(psns.iter().any(|psn| *psn > 0xffff), "more than 16 bits");
    }
}
