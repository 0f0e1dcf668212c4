//! Tests of the encodings: what is written is read back, and nothing else is.

mod grants;
mod messages;

pub(super) mod strategies;
