//! The rules that the simulated fabric enforces, one test for each, in stepped virtual time.
//!
//! The rules that all fabrics share are tested by the conformance suite; here are those of which only a simulation
//! can show that they hold at every instant, and the faults.

mod completions;
mod faults;
mod memory;
mod order;
mod rig;
mod threads;
