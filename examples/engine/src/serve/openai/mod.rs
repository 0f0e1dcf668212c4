//! OpenAI's API: bodies, checks, and answers. The extras are vLLM's, under vLLM's names.

pub mod chat;
pub mod completion;
pub mod handler;
pub mod logprobs;
pub mod params;
