//! Every struct and union of ours has the layout of the one in `rdma-sys`.

use kvpush::oracle as ours;
use kvpush_oracle::{Report, layout};

#[test]
fn devices_and_events() {
    let mut report = Report::default();
    layout!(report, ours::ibv_gid_global = rdma_sys::ibv_gid_global_t, {
        subnet_prefix, interface_id,
    });
    layout!(report, union ours::ibv_gid = rdma_sys::ibv_gid, {
        raw, global,
    });
    layout!(report, prefix ours::ibv_gid_entry = rdma_sys::ibv_gid_entry, {
        gid, gid_index, port_num, gid_type, ndev_ifindex,
    });
    layout!(report, ours::_ibv_device_ops = rdma_sys::_ibv_device_ops, {
        _dummy1, _dummy2,
    });
    layout!(report, ours::ibv_device = rdma_sys::ibv_device, {
        _ops, node_type, transport_type, name, dev_name, dev_path, ibdev_path,
    });
    layout!(report, ours::ibv_context_ops = rdma_sys::ibv_context_ops, {
        _compat_query_device, _compat_query_port, _compat_alloc_pd, _compat_dealloc_pd, _compat_reg_mr,
        _compat_rereg_mr, _compat_dereg_mr, alloc_mw, bind_mw, dealloc_mw, _compat_create_cq, poll_cq, req_notify_cq,
        _compat_cq_event, _compat_resize_cq, _compat_destroy_cq, _compat_create_srq, _compat_modify_srq,
        _compat_query_srq, _compat_destroy_srq, post_srq_recv, _compat_create_qp, _compat_query_qp,
        _compat_modify_qp, _compat_destroy_qp, post_send, post_recv, _compat_create_ah, _compat_destroy_ah,
        _compat_attach_mcast, _compat_detach_mcast, _compat_async_event,
    });
    layout!(report, ours::ibv_context = rdma_sys::ibv_context, {
        device, ops, cmd_fd, async_fd, num_comp_vectors, mutex, abi_compat,
    });
    layout!(report, ours::ibv_device_attr = rdma_sys::ibv_device_attr, {
        fw_ver, node_guid, sys_image_guid, max_mr_size, page_size_cap, vendor_id, vendor_part_id, hw_ver, max_qp,
        max_qp_wr, device_cap_flags, max_sge, max_sge_rd, max_cq, max_cqe, max_mr, max_pd, max_qp_rd_atom,
        max_ee_rd_atom, max_res_rd_atom, max_qp_init_rd_atom, max_ee_init_rd_atom, atomic_cap, max_ee, max_rdd,
        max_mw, max_raw_ipv6_qp, max_raw_ethy_qp, max_mcast_grp, max_mcast_qp_attach, max_total_mcast_qp_attach,
        max_ah, max_fmr, max_map_per_fmr, max_srq, max_srq_wr, max_srq_sge, max_pkeys, local_ca_ack_delay,
        phys_port_cnt,
    });
    layout!(report, ours::ibv_query_device_ex_input = rdma_sys::ibv_query_device_ex_input, {
        comp_mask,
    });
    layout!(report, ours::ibv_odp_per_transport_caps = rdma_sys::ibv_odp_caps__bindgen_ty_1, {
        rc_odp_caps, uc_odp_caps, ud_odp_caps,
    });
    layout!(report, ours::ibv_odp_caps = rdma_sys::ibv_odp_caps, {
        general_caps, per_transport_caps,
    });
    layout!(report, ours::ibv_tso_caps = rdma_sys::ibv_tso_caps, {
        max_tso, supported_qpts,
    });
    layout!(report, ours::ibv_rss_caps = rdma_sys::ibv_rss_caps, {
        supported_qpts, max_rwq_indirection_tables, max_rwq_indirection_table_size, rx_hash_fields_mask,
        rx_hash_function,
    });
    layout!(report, ours::ibv_packet_pacing_caps = rdma_sys::ibv_packet_pacing_caps, {
        qp_rate_limit_min, qp_rate_limit_max, supported_qpts,
    });
    layout!(report, ours::ibv_tm_caps = rdma_sys::ibv_tm_caps, {
        max_rndv_hdr_size, max_num_tags, flags, max_ops, max_sge,
    });
    layout!(report, ours::ibv_cq_moderation_caps = rdma_sys::ibv_cq_moderation_caps, {
        max_cq_count, max_cq_period,
    });
    layout!(report, ours::ibv_pci_atomic_caps = rdma_sys::ibv_pci_atomic_caps, {
        fetch_add, swap, compare_swap,
    });
    layout!(report, prefix ours::ibv_device_attr_ex = rdma_sys::ibv_device_attr_ex, {
        orig_attr, comp_mask, odp_caps, completion_timestamp_mask, hca_core_clock, device_cap_flags_ex, tso_caps,
        rss_caps, max_wq_type_rq, packet_pacing_caps, raw_packet_caps, tm_caps, cq_mod_caps, max_dm_size,
        pci_atomic_caps, xrc_odp_caps, phys_port_cnt_ex,
    });
    layout!(report, prefix ours::ibv_port_attr = rdma_sys::ibv_port_attr, {
        state, max_mtu, active_mtu, gid_tbl_len, port_cap_flags, max_msg_sz, bad_pkey_cntr, qkey_viol_cntr,
        pkey_tbl_len, lid, sm_lid, lmc, max_vl_num, sm_sl, subnet_timeout, init_type_reply, active_width,
        active_speed, phys_state, link_layer, flags, port_cap_flags2,
    });
    layout!(report, union ours::ibv_async_event_element = rdma_sys::ibv_async_event_element_t, {
        cq, qp, srq, wq, port_num,
    });
    layout!(report, ours::ibv_async_event = rdma_sys::ibv_async_event, {
        element, event_type,
    });
    report.finish();
}

#[test]
fn objects() {
    let mut report = Report::default();
    layout!(report, ours::ibv_pd = rdma_sys::ibv_pd, {
        context, handle,
    });
    layout!(report, ours::ibv_mr = rdma_sys::ibv_mr, {
        context, pd, addr, length, handle, lkey, rkey,
    });
    layout!(report, ours::ibv_mw = rdma_sys::ibv_mw, {
        context, pd, rkey, handle, r#type = type_,
    });
    layout!(report, ours::ibv_mw_bind_info = rdma_sys::ibv_mw_bind_info, {
        mr, addr, length, mw_access_flags,
    });
    layout!(report, ours::ibv_mw_bind = rdma_sys::ibv_mw_bind, {
        wr_id, send_flags, bind_info,
    });
    layout!(report, ours::ibv_comp_channel = rdma_sys::ibv_comp_channel, {
        context, fd, refcnt,
    });
    layout!(report, ours::ibv_cq = rdma_sys::ibv_cq, {
        context, channel, cq_context, handle, cqe, mutex, cond, comp_events_completed, async_events_completed,
    });
    layout!(report, union ours::ibv_wc_imm = rdma_sys::imm_data_invalidated_rkey_union_t, {
        imm_data, invalidated_rkey,
    });
    layout!(report, ours::ibv_wc = rdma_sys::ibv_wc, {
        wr_id, status, opcode, vendor_err, byte_len, imm = imm_data_invalidated_rkey_union, qp_num, src_qp, wc_flags,
        pkey_index, slid, sl, dlid_path_bits,
    } nested {
        imm.imm_data = imm_data_invalidated_rkey_union.imm_data,
        imm.invalidated_rkey = imm_data_invalidated_rkey_union.invalidated_rkey,
    });
    layout!(report, ours::ibv_qp = rdma_sys::ibv_qp, {
        context, qp_context, pd, send_cq, recv_cq, srq, handle, qp_num, state, qp_type, mutex, cond,
        events_completed,
    });
    layout!(report, ours::ibv_qp_cap = rdma_sys::ibv_qp_cap, {
        max_send_wr, max_recv_wr, max_send_sge, max_recv_sge, max_inline_data,
    });
    layout!(report, ours::ibv_qp_init_attr = rdma_sys::ibv_qp_init_attr, {
        qp_context, send_cq, recv_cq, srq, cap, qp_type, sq_sig_all,
    });
    layout!(report, ours::ibv_global_route = rdma_sys::ibv_global_route, {
        dgid, flow_label, sgid_index, hop_limit, traffic_class,
    });
    layout!(report, ours::ibv_ah_attr = rdma_sys::ibv_ah_attr, {
        grh, dlid, sl, src_path_bits, static_rate, is_global, port_num,
    });
    layout!(report, ours::ibv_qp_attr = rdma_sys::ibv_qp_attr, {
        qp_state, cur_qp_state, path_mtu, path_mig_state, qkey, rq_psn, sq_psn, dest_qp_num, qp_access_flags, cap,
        ah_attr, alt_ah_attr, pkey_index, alt_pkey_index, en_sqd_async_notify, sq_draining, max_rd_atomic,
        max_dest_rd_atomic, min_rnr_timer, port_num, timeout, retry_cnt, rnr_retry, alt_port_num, alt_timeout,
        rate_limit,
    });
    layout!(report, ours::ibv_srq = rdma_sys::ibv_srq, {
        context, srq_context, pd, handle, mutex, cond, events_completed,
    });
    layout!(report, ours::ibv_srq_attr = rdma_sys::ibv_srq_attr, {
        max_wr, max_sge, srq_limit,
    });
    layout!(report, ours::ibv_srq_init_attr = rdma_sys::ibv_srq_init_attr, {
        srq_context, attr,
    });
    report.finish();
}

#[test]
fn work_requests() {
    let mut report = Report::default();
    layout!(report, ours::ibv_sge = rdma_sys::ibv_sge, {
        addr, length, lkey,
    });
    layout!(report, union ours::ibv_send_wr_imm = rdma_sys::imm_data_invalidated_rkey_union_t, {
        imm_data, invalidate_rkey = invalidated_rkey,
    });
    layout!(report, ours::ibv_wr_rdma = rdma_sys::rdma_t, {
        remote_addr, rkey,
    });
    layout!(report, ours::ibv_wr_atomic = rdma_sys::atomic_t, {
        remote_addr, compare_add, swap, rkey,
    });
    layout!(report, ours::ibv_wr_ud = rdma_sys::ud_t, {
        ah, remote_qpn, remote_qkey,
    });
    layout!(report, union ours::ibv_send_wr_wr = rdma_sys::wr_t, {
        rdma, atomic, ud,
    });
    layout!(report, ours::ibv_wr_xrc = rdma_sys::xrc_t, {
        remote_srqn,
    });
    layout!(report, union ours::ibv_send_wr_qp_type = rdma_sys::qp_type_t, {
        xrc,
    });
    layout!(report, ours::ibv_wr_bind_mw = rdma_sys::bind_mw_t, {
        mw, rkey, bind_info,
    });
    layout!(report, ours::ibv_wr_tso = rdma_sys::tso_t, {
        hdr, hdr_sz, mss,
    });
    layout!(report, union ours::ibv_send_wr_tail = rdma_sys::bind_mw_tso_union_t, {
        bind_mw, tso,
    });
    layout!(report, ours::ibv_send_wr = rdma_sys::ibv_send_wr, {
        wr_id, next, sg_list, num_sge, opcode, send_flags, imm = imm_data_invalidated_rkey_union, wr, qp_type,
        tail = bind_mw_tso_union,
    } nested {
        imm.imm_data = imm_data_invalidated_rkey_union.imm_data,
        imm.invalidate_rkey = imm_data_invalidated_rkey_union.invalidated_rkey,
        wr.rdma.remote_addr = wr.rdma.remote_addr,
        wr.rdma.rkey = wr.rdma.rkey,
        wr.atomic.remote_addr = wr.atomic.remote_addr,
        wr.atomic.compare_add = wr.atomic.compare_add,
        wr.atomic.swap = wr.atomic.swap,
        wr.atomic.rkey = wr.atomic.rkey,
        wr.ud.ah = wr.ud.ah,
        wr.ud.remote_qpn = wr.ud.remote_qpn,
        wr.ud.remote_qkey = wr.ud.remote_qkey,
        qp_type.xrc.remote_srqn = qp_type.xrc.remote_srqn,
        tail.bind_mw.mw = bind_mw_tso_union.bind_mw.mw,
        tail.bind_mw.rkey = bind_mw_tso_union.bind_mw.rkey,
        tail.bind_mw.bind_info.mr = bind_mw_tso_union.bind_mw.bind_info.mr,
        tail.bind_mw.bind_info.addr = bind_mw_tso_union.bind_mw.bind_info.addr,
        tail.bind_mw.bind_info.length = bind_mw_tso_union.bind_mw.bind_info.length,
        tail.bind_mw.bind_info.mw_access_flags = bind_mw_tso_union.bind_mw.bind_info.mw_access_flags,
        tail.tso.hdr = bind_mw_tso_union.tso.hdr,
        tail.tso.hdr_sz = bind_mw_tso_union.tso.hdr_sz,
        tail.tso.mss = bind_mw_tso_union.tso.mss,
    });
    layout!(report, ours::ibv_recv_wr = rdma_sys::ibv_recv_wr, {
        wr_id, next, sg_list, num_sge,
    });
    report.finish();
}

/// The extended context grows in front, so what must agree is the distance of every field from the end.
#[test]
fn extended_context() {
    let mut report = Report::default();
    macro_rules! from_end {
        ($($ours:ident = $theirs:ident),* $(,)?) => {
            // Every field of ours is listed.
            #[allow(unused)]
            fn exhaustive(value: &ours::verbs_context) {
                let ours::verbs_context { $($ours: _),* } = value;
            }
            $(report.compare(
                stringify!($theirs),
                size_of::<ours::verbs_context>() - std::mem::offset_of!(ours::verbs_context, $ours),
                size_of::<rdma_sys::verbs_context>() - std::mem::offset_of!(rdma_sys::verbs_context, $theirs),
            );)*
        };
    }
    from_end!(
        query_port = query_port,
        _before_priv = advise_mr,
        r#priv = priv_,
        query_device_ex = query_device_ex,
        _before_placeholder3 = ibv_destroy_flow,
        _abi_placeholder3 = _ABI_placeholder3,
        sz = sz,
        context = context,
    );
    report.compare(
        "alignment",
        align_of::<ours::verbs_context>(),
        align_of::<rdma_sys::verbs_context>(),
    );
    report.finish();
}
