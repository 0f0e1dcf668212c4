//! Cores over the fake model and a fake network, in virtual time.

mod invariants;
mod legs;
mod network;
mod rig;
mod scheduling;
mod simulation;
