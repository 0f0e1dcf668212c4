//! The real one: RDMA verbs over RoCE v2 or InfiniBand, through libibverbs opened at run time.

mod config;
pub(crate) mod sys;

pub use config::VerbsConfig;
