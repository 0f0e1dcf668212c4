//! kvpush moves LLM KV-cache pages from prefill memory straight into decode memory.

pub mod fabric;
pub mod kv;
