//! The engine thread: takes what handles ask for, steps, shows what came of it, and sleeps when there is nothing to do.

use std::{collections::VecDeque, sync::Arc, time::Instant};

use super::{core::Core, handle::Shared};
use crate::{model::Model, transfer::Transfers};

/// Tells the handles that the thread is gone, however it went.
struct Farewell(Arc<Shared>);

impl Drop for Farewell {
    fn drop(&mut self) {
        self.0.die();
    }
}

/// Runs until it is shut down.
pub(super) fn run(
    shared: &Arc<Shared>,
    model: Box<dyn Model>,
    mut transfers: Option<Box<dyn Transfers>>,
) {
    let _farewell = Farewell(Arc::clone(shared));
    if let Some(transfers) = &mut transfers {
        let shared = Arc::clone(shared);
        transfers.on_ready(Box::new(move || shared.rouse()));
    }
    let mut core = Core::new(model, transfers, shared.facts.config.clone());
    let mut commands = VecDeque::new();
    loop {
        let goes_on = shared.receive(&mut commands);
        let now = Instant::now();
        for command in commands.drain(..) {
            core.command(command, now);
        }
        if !goes_on {
            break;
        }
        let has_more = core.step(now);
        shared.show(core.news());
        if !has_more {
            shared.sleep(core.next_wake(now));
        }
    }
    core.shut_down();
    let until = Instant::now() + shared.facts.config.shutdown_timeout;
    loop {
        core.step(Instant::now());
        shared.show(core.news());
        if core.is_idle() {
            break;
        }
        if Instant::now() >= until {
            tracing::warn!("transfers have not ended in time");
            break;
        }
        shared.sleep(Some(until));
    }
}
