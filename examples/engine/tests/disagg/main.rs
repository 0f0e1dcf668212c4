//! Prefill and decode in two engines give what one engine gives, and nothing leaks whatever happens to either.

mod fixture;
mod identity;
mod killed;
mod order;
mod resharding;
