//! Two real processes: peers that are killed, stopped, continued and restarted in the middle of pushes.
//!
//! The test binary starts itself as the other process (see `child`), which obeys commands on its standard input. Cases
//! over verbs are marked as ignored, because most machines have no RDMA device: `cargo xtask rxe` runs them in a guest
//! that has. Random cases print their seed; `KVPUSH_SEED` replays one.

#[path = "two_process/bystanders.rs"]
mod bystanders;
#[path = "two_process/child.rs"]
mod child;
#[path = "two_process/content.rs"]
mod content;
// Shared with the endpoint suite, which uses more of it.
#[path = "two_process/drained.rs"]
mod drained;
#[allow(dead_code)]
#[path = "endpoint_suite/fixture.rs"]
mod fixture;
#[path = "two_process/idle.rs"]
mod idle;
#[path = "two_process/killed.rs"]
mod killed;
#[allow(dead_code)]
#[path = "endpoint_suite/mover.rs"]
mod mover;
#[path = "two_process/opening.rs"]
mod opening;
#[path = "two_process/process.rs"]
mod process;
#[path = "two_process/races.rs"]
mod races;
#[path = "two_process/stopped.rs"]
mod stopped;
#[path = "two_process/strangers.rs"]
mod strangers;
#[path = "two_process/transfers.rs"]
mod transfers;

macro_rules! all_cases {
    ($($fabric:ident $over:ident $(#[$attribute:meta])*;)*) => {
        $(mod $fabric {
            all_cases!(@ $over [$(#[$attribute])*]
                transfers::requests_arrive_whole
                transfers::layers_are_ready_before_the_writer_has_finished
                killed::a_killed_writer
                killed::a_killed_reader
                killed::writers_come_and_go
                killed::readers_come_and_go
                stopped::a_stopped_writer_is_revoked
                stopped::the_checker_finds_late_writes
                stopped::a_stopped_writer_expires
                stopped::a_stopped_reader_expires
                stopped::a_stopped_reader_is_cancelled
                idle::an_idle_writer_stops
                idle::an_idle_reader_stops
                drained::a_reader_goes_after_its_pushes
                drained::a_writer_goes_in_the_middle
                opening::a_writer_stops_while_it_opens
                opening::a_reader_dies_while_it_is_asked
                bystanders::of_a_stopped_writer
                bystanders::of_a_stopped_reader
                races::a_revocation_and_the_end
                races::a_deadline_and_the_end
                strangers::another_key
                strangers::garbage_and_silence);
        })*
    };
    (@ $over:ident $attributes:tt $($module:ident :: $case:ident)*) => {
        $(all_cases!(@case $over $attributes $module $case);)*
    };
    (@case $over:ident [$(#[$attribute:meta])*] $module:ident $case:ident) => {
        #[test]
        $(#[$attribute])*
        fn $case() {
            crate::$module::$case(crate::process::Over::$over);
        }
    };
}

all_cases! {
    tcp Tcp;
    shm Shm;
    verbs Verbs #[ignore = "needs an RDMA device: cargo xtask rxe"];
}
