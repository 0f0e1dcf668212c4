//! Fabrics: how bytes reach a peer's memory.

pub(crate) mod verbs;
