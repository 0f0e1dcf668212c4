//! The demo: a prefill and a decode engine as two processes of this program, and a chat between them.

mod chat;
pub mod peer;
pub mod protocol;
mod watch;
pub mod worker;

pub use chat::{Chat, DemoError, Report};
