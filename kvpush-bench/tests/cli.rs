//! The built binary as people run it: exit codes, words, rows, and that the verification can fail.
//!
//! Over TCP, which every machine has; `cargo xtask rxe` runs the same tool over RDMA between two guests.

#[path = "cli/arguments.rs"]
mod arguments;
#[path = "cli/compare.rs"]
mod compare;
#[path = "cli/faults.rs"]
mod faults;
#[path = "cli/host.rs"]
mod host;
#[path = "cli/runs.rs"]
mod runs;
#[path = "../../src/topology/testing.rs"]
mod sysfs;
#[path = "cli/tool.rs"]
mod tool;
