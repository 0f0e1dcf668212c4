//! The conformance suite: what every fabric must do, written against the traits only.
//!
//! Each case takes a fresh [`harness::Pair`] of devices. A fabric joins by a factory in `factories.rs` and one line of
//! [`suite!`] here. The cases over verbs are marked as ignored, because most machines have no RDMA device:
//! `cargo xtask rxe` runs them in a guest that has.
//! Random cases print their seed; `KVPUSH_SEED` replays one.

#[path = "fabric_suite/access.rs"]
mod access;
#[path = "fabric_suite/checker.rs"]
mod checker;
#[path = "fabric_suite/dmabuf.rs"]
mod dmabuf;
#[path = "fabric_suite/factories.rs"]
mod factories;
#[path = "fabric_suite/faults.rs"]
mod faults;
#[path = "fabric_suite/harness.rs"]
mod harness;
#[path = "fabric_suite/queues.rs"]
mod queues;
#[path = "fabric_suite/transfers.rs"]
mod transfers;
#[path = "fabric_suite/waiting.rs"]
mod waiting;
#[path = "fabric_suite/windows.rs"]
mod windows;

/// One `#[test]` for each case and the fabric made by `$factory`.
macro_rules! suite {
    ($fabric:ident, $factory:path $(, #[$attribute:meta])?; $($module:ident :: $case:ident),* $(,)?) => {
        mod $fabric {
            suite!(@each $factory [$(#[$attribute])?] $($module $case)*);

            #[test]
            $(#[$attribute])?
            fn descriptors_do_not_leak() {
                let _alone = crate::harness::descriptors_are_mine();
                crate::faults::descriptors_do_not_leak($factory());
            }
        }
    };
    (@each $factory:path [$($attribute:tt)*] $module:ident $case:ident $($rest:ident)*) => {
        #[test]
        $($attribute)*
        fn $case() {
            let _shared = crate::harness::descriptors_may_change();
            crate::$module::$case($factory());
        }

        suite!(@each $factory [$($attribute)*] $($rest)*);
    };
    (@each $factory:path [$($attribute:tt)*]) => {};
}

/// All cases for one fabric.
macro_rules! all_cases {
    ($fabric:ident, $factory:path $(, #[$attribute:meta])?) => {
        suite!($fabric, $factory $(, #[$attribute])?;
            transfers::scattered_write_lands_exactly,
            transfers::immediate_follows_earlier_writes,
            transfers::many_lanes_at_once,
            transfers::both_directions_at_once,
            transfers::zero_length_immediate,
            transfers::inline_payload_may_be_reused_at_once,
            transfers::read_gathers_exactly,
            transfers::reads_and_writes_mix,
            queues::only_signaled_requests_complete,
            queues::full_queue_says_how_many_were_posted,
            queues::immediate_waits_for_a_receive,
            queues::receives_beyond_depth_are_refused,
            queues::limits_are_enforced,
            access::unknown_key_is_refused,
            access::range_beyond_registration_is_refused,
            access::wrapping_range_is_refused,
            access::write_to_local_memory_is_refused,
            access::read_of_write_only_memory_is_refused,
            access::deregistered_key_is_refused,
            access::foreign_local_key_is_refused,
            access::refusal_keeps_earlier_writes,
            dmabuf::windows_open_their_range,
            dmabuf::writes_land_at_any_offset,
            dmabuf::sends_and_reads_from_any_offset,
            dmabuf::outside_of_the_range_is_refused,
            dmabuf::a_mapping_ends_with_its_registration,
            faults::fence_stops_a_stream,
            faults::fence_flushes_in_order,
            faults::unsignaled_failure_completes,
            faults::destroyed_peer_is_noticed,
            faults::unknown_lane_is_an_error,
            waiting::sleeper_wakes_for_a_receive,
            waiting::sleeper_wakes_for_a_send_completion,
            waiting::idle_context_sleeps,
            windows::a_window_opens_its_range,
            windows::outside_of_the_window_is_refused,
            windows::a_window_taken_back_is_shut,
            windows::another_lane_cannot_use_a_window,
            windows::binding_again_gives_another_key,
            windows::many_windows,
            windows::windows_run_out_with_a_typed_error,
            windows::impossible_windows_are_refused,
            windows::rights_of_a_window_are_its_own,
            windows::taking_back_stops_a_stream,
        );
    };
}

all_cases!(sim, crate::factories::sim_pair);
all_cases!(tcp, crate::factories::tcp_pair);
all_cases!(
    tcp_small_buffers,
    crate::factories::tcp_pair_with_small_buffers
);
all_cases!(shm, crate::factories::shm_pair);
all_cases!(shm_without_files, crate::factories::shm_pair_without_files);
all_cases!(
    shm_with_short_turns,
    crate::factories::shm_pair_with_short_turns
);
all_cases!(verbs, crate::factories::verbs_pair, #[ignore = "needs an RDMA device: cargo xtask rxe"]);
all_cases!(
    verbs_without_srq,
    crate::factories::verbs_pair_without_srq,
    #[ignore = "needs an RDMA device: cargo xtask rxe"]
);
