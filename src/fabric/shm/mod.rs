//! The embedded fabric between processes of one host: pages go from one process's memory into another's by one copy.
//!
//! # Who copies
//!
//! The side that *owns the destination* copies: a write is pulled by the one who is written to, a read by the one who
//! reads. So nobody ever writes another process's memory, and a fence is simple and final: stop copying. (Were the
//! writer to copy, a writer that is stopped in the middle could go on after any fence.) See ADR 0016.
//!
//! The writer's side of a lane is a queue of descriptors in memory that it shares (`ring`); the reader's thread reads
//! them when it polls, checks each against its registrations as a NIC would, copies, and counts.
//!
//! # How the bytes are reached
//!
//! * Memory in a file that cannot shrink (a sealed memory file such as `HostMemory::memfd`, a dmabuf) is mapped by the
//!   peer once, for reading, and copied by `memcpy`.
//! * All other memory is read by the kernel, many pages with one call of `process_vm_readv(2)`. That needs the
//!   permission to trace the peer's process; whether it is there is tried when a lane is connected.
//!
//! # Waking
//!
//! A side that sleeps says so in its outbox; then, and only then, a change is followed by a message over the lane's
//! Unix socket. The same socket carries files and, by its end, the end of the peer.
//!
//! # Trust
//!
//! Whoever knows a lane's random token, which travels on the (authenticated) control channel, has the lane. Everything
//! in the peer's outbox can change at any time and is read once and checked. SECURITY.md says what this fabric does
//! not enforce.

mod connect;
mod context;
mod copier;
mod device;
mod files;
mod lane;
mod memory;
mod notes;
mod requester;
mod responder;
mod ring;
mod sys;
mod wire;

pub use device::{ShmConfig, ShmDevice};

#[cfg(test)]
mod tests;
