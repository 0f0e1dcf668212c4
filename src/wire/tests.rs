//! Tests of the encodings: what is written is read back, and nothing else is.

mod grants;
mod messages;
mod smoke;

pub(super) mod strategies;
