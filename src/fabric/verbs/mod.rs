//! The RDMA verbs fabric.

pub(crate) mod sys;
