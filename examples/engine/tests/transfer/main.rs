//! Transfers between two engines, over caches filled by a formula: what arrives, how it ends, and what is released.

mod ends;
mod fixture;
mod pages;
mod tickets;
