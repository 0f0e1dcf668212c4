//! The engine thread: takes what handles ask for, steps, shows what came of it, and sleeps when there is nothing to do.

use std::{
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::Instant,
};

use super::{
    core::{Core, Farewell},
    handle::Shared,
};
use crate::{model::Model, transfer::Transfers};

/// Runs until it is shut down.
pub(super) fn run(
    shared: &Arc<Shared>,
    model: Box<dyn Model>,
    mut transfers: Option<Box<dyn Transfers>>,
) {
    if let Some(transfers) = &mut transfers {
        let shared = Arc::clone(shared);
        transfers.on_ready(Box::new(move || shared.rouse()));
    }
    let mut core = Core::new(model, transfers, shared.facts.config.clone());
    let end = catch_unwind(AssertUnwindSafe(|| {
        serve(shared, &mut core);
        shut_down(shared, &mut core);
    }));
    shared.die();
    // After a panic only what is told to clients is used of the core.
    let left = core.abandon();
    if end.is_err() {
        tracing::error!(requests = left.len(), "the engine has panicked");
    }
    left.into_iter().for_each(Farewell::send);
}

fn serve(shared: &Shared, core: &mut Core) {
    let mut commands = VecDeque::new();
    while shared.receive(&mut commands) {
        let now = Instant::now();
        let has_commands = !commands.is_empty();
        for command in commands.drain(..) {
            core.command(command, now);
        }
        if has_commands {
            // What was aborted ends before the step.
            shared.show(core.news());
        }
        let has_more = core.step(now);
        shared.show(core.news());
        if !has_more {
            shared.sleep(core.next_wake(now));
        }
    }
    let now = Instant::now();
    for command in commands {
        core.command(command, now);
    }
}

/// Ends what is under way, and waits a while for transfers to end too.
fn shut_down(shared: &Shared, core: &mut Core) {
    core.shut_down();
    let until = Instant::now() + shared.facts.config.shutdown_timeout;
    loop {
        core.step(Instant::now());
        shared.show(core.news());
        if core.is_idle() {
            return;
        }
        if Instant::now() >= until {
            tracing::warn!("transfers have not ended in time");
            return;
        }
        shared.sleep(Some(until));
    }
}
