//! Every function of the table has the header's signature (as far as [`kvpush_oracle::shape`] tells), and is the one
//! that the linker picks: `dlsym` found the default version of each symbol.

use kvpush::oracle::{self as ours, Verbs};
use kvpush_oracle::{Report, header, shape};

/// Compares the shape and address of functions of the table with those of a linked binding.
macro_rules! functions {
    ($report:ident, $verbs:ident, $listed:ident, $theirs:ident, { $($name:ident($($arg:tt),*)),* $(,)? }) => {$({
        let (our_shape, our_address) = shape::of($verbs.$name);
        let (shape, address) = shape::of($theirs::$name as unsafe extern "C" fn($($arg),*) -> _);
        $report.compare(stringify!($name), our_shape, shape);
        $report.compare(concat!("address of ", stringify!($name)), our_address, address);
        $listed.push(stringify!($name));
    })*};
}

/// Compares the shape of the function pointers in a struct.
macro_rules! slots {
    ($report:ident, $ours:ty = $theirs:ty, { $($name:ident),* $(,)? }) => {$(
        $report.compare(
            stringify!($name),
            // SAFETY: never called; only the type of the pointer is used.
            shape::behind(|p: *const $ours| unsafe { &raw const (*p).$name }),
            // SAFETY: as above.
            shape::behind(|p: *const $theirs| unsafe { &raw const (*p).$name }),
        );
    )*};
}

#[test]
fn functions_equal_the_headers() {
    let verbs = Verbs::open().expect("the oracle links libibverbs, so it is there");
    let mut report = Report::default();
    let mut listed = Vec::new();
    functions!(report, verbs, listed, header, {
        ibv_get_device_list(_),
        ibv_free_device_list(_),
        ibv_get_device_name(_),
        ibv_get_device_guid(_),
        ibv_open_device(_),
        ibv_close_device(_),
        ibv_get_async_event(_, _),
        ibv_ack_async_event(_),
        ibv_query_device(_, _),
        ibv_query_port(_, _, _),
        ibv_query_gid(_, _, _, _),
        ibv_query_pkey(_, _, _, _),
        ibv_alloc_pd(_),
        ibv_dealloc_pd(_),
        ibv_reg_mr(_, _, _, _),
        ibv_dereg_mr(_),
        ibv_create_comp_channel(_),
        ibv_destroy_comp_channel(_),
        ibv_create_cq(_, _, _, _, _),
        ibv_destroy_cq(_),
        ibv_get_cq_event(_, _, _),
        ibv_ack_cq_events(_, _),
        ibv_create_srq(_, _),
        ibv_modify_srq(_, _, _),
        ibv_query_srq(_, _),
        ibv_destroy_srq(_),
        ibv_create_qp(_, _),
        ibv_modify_qp(_, _, _),
        ibv_query_qp(_, _, _, _),
        ibv_destroy_qp(_),
        ibv_fork_init(),
        ibv_wc_status_str(_),
        ibv_node_type_str(_),
        ibv_port_state_str(_),
        ibv_event_type_str(_),
        ibv_get_device_index(_),
        ibv_reg_mr_iova2(_, _, _, _, _),
        ibv_reg_dmabuf_mr(_, _, _, _, _, _),
        ibv_is_fork_initialized(),
        ibv_query_qp_data_in_order(_, _, _),
        _ibv_query_gid_ex(_, _, _, _, _, _),
        _ibv_query_gid_table(_, _, _, _, _),
    });
    for symbol in Verbs::SYMBOLS {
        if !listed.contains(&symbol.name) {
            report.differ(format!("{}: not listed in this test", symbol.name));
        }
    }
    report.finish();
}

#[test]
fn functions_equal_those_of_rdma_sys() {
    let verbs = Verbs::open().expect("the oracle links libibverbs, so it is there");
    let mut report = Report::default();
    let mut listed = Vec::new();
    functions!(report, verbs, listed, rdma_sys, {
        ibv_get_device_list(_),
        ibv_free_device_list(_),
        ibv_get_device_name(_),
        ibv_get_device_guid(_),
        ibv_open_device(_),
        ibv_close_device(_),
        ibv_get_async_event(_, _),
        ibv_ack_async_event(_),
        ibv_query_device(_, _),
        ibv_query_port(_, _, _),
        ibv_query_gid(_, _, _, _),
        ibv_query_pkey(_, _, _, _),
        ibv_alloc_pd(_),
        ibv_dealloc_pd(_),
        ibv_reg_mr(_, _, _, _),
        ibv_dereg_mr(_),
        ibv_create_comp_channel(_),
        ibv_destroy_comp_channel(_),
        ibv_create_cq(_, _, _, _, _),
        ibv_destroy_cq(_),
        ibv_get_cq_event(_, _, _),
        ibv_ack_cq_events(_, _),
        ibv_create_srq(_, _),
        ibv_modify_srq(_, _, _),
        ibv_query_srq(_, _),
        ibv_destroy_srq(_),
        ibv_create_qp(_, _),
        ibv_modify_qp(_, _, _),
        ibv_query_qp(_, _, _, _),
        ibv_destroy_qp(_),
        ibv_fork_init(),
        ibv_wc_status_str(_),
        ibv_node_type_str(_),
        ibv_port_state_str(_),
        ibv_event_type_str(_),
        ibv_get_device_index(_),
        ibv_reg_mr_iova2(_, _, _, _, _),
        ibv_reg_dmabuf_mr(_, _, _, _, _, _),
        ibv_is_fork_initialized(),
        ibv_query_qp_data_in_order(_, _, _),
    });
    assert!(!listed.is_empty());
    report.finish();
}

#[test]
fn function_tables_equal_the_headers() {
    let mut report = Report::default();
    slots!(report, ours::ibv_context_ops = header::ibv_context_ops, {
        alloc_mw, bind_mw, dealloc_mw, poll_cq, req_notify_cq, post_srq_recv, post_send, post_recv,
    });
    slots!(report, ours::verbs_context = header::verbs_context, { query_port, query_device_ex });
    report.finish();
}
