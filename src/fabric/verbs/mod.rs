//! The real one: RDMA verbs over RoCE v2 or InfiniBand, through libibverbs opened at run time.

mod config;

pub use config::VerbsConfig;
