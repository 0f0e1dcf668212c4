//! The crate's own memory double, which no rail reaches.

pub(crate) use kvpush::memory::*;

#[path = "../../src/memory/testing.rs"]
pub(crate) mod testing;
