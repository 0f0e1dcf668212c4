//! kvpush moves LLM KV-cache pages from prefill memory straight into decode memory.

#![cfg_attr(not(test), allow(dead_code))]
pub mod fabric;
pub mod kv;
pub mod memory;
mod protocol;
