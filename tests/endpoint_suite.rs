//! The endpoint suite: the whole library through its public interface, the same over every fabric.
//!
//! The cases over verbs are marked as ignored, because most machines have no RDMA device: `cargo xtask rxe` runs them in
//! a guest that has. Random cases print their seed; `KVPUSH_SEED` replays one.

#[path = "endpoint_suite/access.rs"]
mod access;
#[path = "endpoint_suite/drain.rs"]
mod drain;
#[path = "endpoint_suite/far.rs"]
mod far;
#[path = "endpoint_suite/fixture.rs"]
mod fixture;
#[path = "endpoint_suite/inputs.rs"]
mod inputs;
#[path = "endpoint_suite/lanes.rs"]
mod lanes;
#[path = "endpoint_suite/lifecycle.rs"]
mod lifecycle;
#[path = "endpoint_suite/mover.rs"]
mod mover;
#[path = "endpoint_suite/prepared.rs"]
mod prepared;
#[path = "endpoint_suite/regions.rs"]
mod regions;
#[path = "endpoint_suite/staging.rs"]
mod staging;
#[path = "endpoint_suite/transfers.rs"]
mod transfers;
#[path = "endpoint_suite/vanish.rs"]
mod vanish;
#[path = "endpoint_suite/visibility.rs"]
mod visibility;
#[path = "endpoint_suite/windows.rs"]
mod windows;

/// One `#[test]` for each case over one fabric.
macro_rules! suite {
    ($fabric:ident $(#[$attribute:meta])*: $($module:ident :: $case:ident),* $(,)?) => {
        mod $fabric {
            suite!(@ $fabric [$(#[$attribute])*] $($module::$case)*);
        }
    };
    (@ $fabric:ident $attributes:tt $($module:ident :: $case:ident)*) => {
        $(suite!(@case $fabric $attributes $module $case);)*
    };
    (@case $fabric:ident [$(#[$attribute:meta])*] $module:ident $case:ident) => {
        #[test]
        $(#[$attribute])*
        fn $case() {
            crate::$module::$case(&crate::fixture::Fabric::$fabric());
        }
    };
}

macro_rules! all_cases {
    ($fabric:ident $(#[$attribute:meta])*) => {
        suite!($fabric $(#[$attribute])*:
            transfers::a_push_arrives_whole,
            transfers::layers_become_ready_one_by_one,
            transfers::chunks_arrive_in_any_order,
            transfers::random_layouts_arrive_exactly,
            transfers::shards_of_other_degrees_get_their_heads,
            transfers::a_latent_cache_arrives,
            transfers::more_parts_than_receives,
            transfers::many_pushes_at_once,
            transfers::both_ways_at_once,
            transfers::futures_of_any_runtime,
            transfers::a_session_made_ahead_is_used,
            transfers::memory_files_are_pushed,
            prepared::prepared_pages_arrive_as_others,
            prepared::layers_of_several_geometries,
            prepared::prepared_pages_of_a_shard,
            prepared::prepared_pages_are_of_one_push,
            inputs::wrong_grants_are_not_issued,
            inputs::wrong_pages_are_not_pushed,
            inputs::pools_that_do_not_match,
            inputs::damaged_and_foreign_grants,
            inputs::a_grant_is_used_once,
            inputs::memory_too_short_or_unregistered,
            inputs::another_key_is_refused,
            inputs::nobody_there,
            lifecycle::revoked_before_it_is_opened,
            lifecycle::revoked_in_the_middle,
            lifecycle::expired_in_the_middle,
            lifecycle::cancelled_by_the_writer,
            lifecycle::dropped_by_the_writer,
            lifecycle::dropped_by_the_reader,
            lifecycle::a_restarted_reader_refuses_old_grants,
            lifecycle::a_lost_writer_ends_the_arrival,
            lifecycle::a_lost_reader_ends_the_push,
            lifecycle::shutdown_answers_everyone,
            lifecycle::nothing_is_left_behind,
            access::an_exported_region_is_read_and_written,
            access::what_is_not_allowed_is_refused,
            regions::cut_regions_arrive_exactly,
            regions::cut_regions_are_read_and_written,
            regions::a_pool_of_hundreds_of_regions,
            regions::one_registration_for_the_same_memory,
            regions::overlapping_regions_are_their_own,
            regions::a_pool_in_use_is_not_closed,
            staging::everything_arrives_through_host_memory,
            staging::a_layer_is_ready_when_it_has_been_copied,
            staging::revoked_while_it_is_copied,
            staging::a_device_that_fails_ends_both_sides,
            staging::copies_that_never_end_hold_up_nobody,
            staging::a_full_arena_makes_grants_wait,
            staging::what_cannot_be_staged_is_refused,
            vanish::a_peer_vanishes,
            drain::a_drain_lets_pushes_finish,
            drain::a_drain_cuts_what_does_not_finish,
            drain::a_peer_is_disconnected,
        );
    };
}

/// Cases with windows for every grant.
macro_rules! window_cases {
    ($fabric:ident $(#[$attribute:meta])*) => {
        suite!($fabric $(#[$attribute])*:
            windows::a_grant_says_what_its_writer_has,
            windows::a_taken_grant_leaves_the_others,
            windows::windows_do_not_run_out,
            transfers::a_push_arrives_whole,
            transfers::layers_become_ready_one_by_one,
            transfers::chunks_arrive_in_any_order,
            transfers::random_layouts_arrive_exactly,
            transfers::shards_of_other_degrees_get_their_heads,
            transfers::a_latent_cache_arrives,
            transfers::more_parts_than_receives,
            transfers::many_pushes_at_once,
            transfers::both_ways_at_once,
            prepared::prepared_pages_arrive_as_others,
            prepared::layers_of_several_geometries,
            inputs::damaged_and_foreign_grants,
            inputs::a_grant_is_used_once,
            lifecycle::revoked_before_it_is_opened,
            lifecycle::revoked_in_the_middle,
            lifecycle::expired_in_the_middle,
            lifecycle::cancelled_by_the_writer,
            lifecycle::dropped_by_the_writer,
            lifecycle::dropped_by_the_reader,
            lifecycle::a_lost_writer_ends_the_arrival,
            lifecycle::a_lost_reader_ends_the_push,
            lifecycle::shutdown_answers_everyone,
            lifecycle::nothing_is_left_behind,
            regions::cut_regions_arrive_exactly,
            regions::a_pool_of_hundreds_of_regions,
            regions::one_registration_for_the_same_memory,
            regions::a_pool_in_use_is_not_closed,
            drain::a_drain_lets_pushes_finish,
        );
    };
}

/// Cases with memory of devices that only software can reach.
macro_rules! software_cases {
    ($($name:ident $fabric:ident),*) => {$(
        mod $name {
            suite!(@ $fabric []
                visibility::a_layer_is_flushed_before_it_is_reported
                visibility::whoever_orders_by_himself_is_left_alone
                visibility::a_failing_flush_ends_the_arrival
            );
        }
    )*};
}

/// Cases over fabrics whose lanes can be broken from here.
macro_rules! lane_cases {
    ($($name:ident $fabric:ident),*) => {$(
        mod $name {
            suite!(@ $fabric [] lanes::a_push_survives_the_loss_of_its_lanes);
        }
    )*};
}

all_cases!(sim);
all_cases!(tcp);
all_cases!(shm);
software_cases!(device_sim sim, device_tcp tcp);
lane_cases!(lanes_sim sim, lanes_tcp tcp);
all_cases!(verbs #[ignore = "needs an RDMA device: cargo xtask rxe"]);
window_cases!(sim_windows);
window_cases!(tcp_windows);
window_cases!(shm_windows);
window_cases!(verbs_windows #[ignore = "needs an RDMA device: cargo xtask rxe"]);
