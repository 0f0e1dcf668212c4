//! The demo: a prefill and a decode engine as two processes of this program, and a chat between them.

pub mod peer;
pub mod protocol;
mod watch;
pub mod worker;
