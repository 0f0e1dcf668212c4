//! The endpoint: the threads that drive the protocol over the fabrics.

pub(crate) mod control;
