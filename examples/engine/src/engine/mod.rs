//! The step loop: blocks, prefix cache, scheduler, sampling.
//!
//! One thread, the engine thread, owns the blocks, the requests, the model and the transfers. Everybody else has a
//! [`Handle`] and talks to it by messages; no call of a handle waits for a step.

mod blocks;
mod check;
mod config;
mod copying;
mod core;
pub mod fake;
mod handle;
mod hashing;
mod kv_events;
mod sampling;
mod stats;
mod step_loop;
mod tail;

use std::thread::JoinHandle;

pub use config::Config;
pub use handle::Handle;
pub use kv_events::{BlockHash, KvChange, KvEvent, Replay, Snapshot, StoredBlock};
pub use stats::{BlockStats, Stats};

use crate::{model::Model, transfer::Transfers};

/// A running engine. Shut down when dropped.
pub struct Engine {
    handle: Handle,
    thread: Option<JoinHandle<()>>,
}

impl Engine {
    /// Starts the engine thread. Without `transfers` only [`crate::request::Leg::Both`] is served.
    ///
    /// # Errors
    ///
    /// The operating system has no thread for it.
    pub fn start(
        model: Box<dyn Model>,
        transfers: Option<Box<dyn Transfers>>,
        config: Config,
    ) -> std::io::Result<Self> {
        let handle = Handle::new(model.as_ref(), transfers.is_some(), config);
        let shared = handle.shared();
        let thread = std::thread::Builder::new()
            .name("kvpush-engine".to_owned())
            .spawn(move || step_loop::run(&shared, model, transfers))?;
        Ok(Self {
            handle,
            thread: Some(thread),
        })
    }

    /// What others talk to it by.
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Ends what is under way and waits for the engine thread.
    pub fn shutdown(mut self) {
        self.end();
    }

    fn end(&mut self) {
        self.handle.shutdown();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the engine thread has panicked");
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.end();
    }
}
