//! Two engines behind their own HTTP servers, driven as gateways drive them: the answer is that of one engine.

mod client;
mod dialects;
mod failures;
mod stack;
