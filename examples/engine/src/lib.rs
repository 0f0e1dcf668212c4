//! kvpush-engine: a paged-KV LLM engine whose prefill and decode may run in different processes.
//!
//! | Module | Does | Knows nothing of |
//! |---|---|---|
//! | [`request`] | what is asked of an engine and what comes back: plain data | everything else |
//! | [`model`] | weights, tokenizer, forward pass over paged KV, tensor parallel ranks | scheduling, peers, HTTP |
//! | [`engine`] | blocks, prefix cache, scheduler, sampling: the step loop | HTTP, how pages travel |
//! | [`transfer`] | reserving, pushing and awaiting pages with kvpush | HTTP, scheduling |
//! | [`serve`] | HTTP and gRPC, dialects of other gateways, metrics | how tokens are made |
//! | [`runtime`] | puts model, endpoint, transfers and engine together | HTTP |
//! | [`demo`] | two engines as processes, and a chat between them | HTTP |
//!
//! Threads: one engine thread owns the blocks, the scheduler and the model (which has a thread for each further rank);
//! servers run on a tokio runtime and talk to it by messages only.

pub mod demo;
pub mod engine;
pub mod model;
pub mod request;
pub mod runtime;
pub mod serve;
pub mod transfer;
