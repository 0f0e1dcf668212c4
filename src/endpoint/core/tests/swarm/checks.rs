//! The invariants of `docs/architecture.md`, each as a function that looks at everything after every step.
//!
//! | # | Functions |
//! |---|---|
//! | 1 | `one_terminal_state`, `nothing_outlives_its_deadline`, `check_all_ended` |
//! | 2 | `completed_means_whole`, `layers_are_whole` |
//! | 3 | `no_late_write`, `pages_are_held_until_the_end` |
//! | 4 | `strays_end`, `what_nobody_granted_is_untouched` |
//! | 5 | `nothing_overflows` |
//! | 6 | `nobody_reaches_too_far` |
//! | 9 | `nobody_is_accused` (the simulated fabric puts garbage into what is not valid) |

use super::{
    super::world::World,
    coverage::Seen,
    run::{BOTH, LAYERS, POISON, Users},
};
use crate::endpoint::{ArrivalError, PeerError, PushError};

/// A step comes at most so long after what it is due for, in nanoseconds.
const SLACK: u64 = 1_000_000;

impl Users {
    /// Everything that holds after every step. What has ended is asked for its end again only now and then (`again`),
    /// because that is what takes most of the time.
    pub(super) fn check(&mut self, world: &World, again: bool) {
        for index in 0..self.transfers.len() {
            if self.transfers[index].is_over() && !again {
                continue;
            }
            self.layers_are_whole(index);
            self.one_terminal_state(world, index);
            self.nothing_outlives_its_deadline(world, index);
        }
        self.strays_end(world);
        self.nothing_overflows(world);
        // Memory can only have changed if something was placed.
        let placed = world.net.stats().bytes;
        if self.looked_at != Some(placed) {
            self.looked_at = Some(placed);
            self.no_late_write();
            self.what_nobody_granted_is_untouched();
        }
        self.pages_are_held_until_the_end(world);
    }

    /// Invariant 1: an end is told once and does not change.
    fn one_terminal_state(&mut self, world: &World, index: usize) {
        let seed = self.seed;
        let transfer = &mut self.transfers[index];
        if let Some(end) = transfer.push.as_ref().and_then(|push| push.poll_ended()) {
            let seen = Seen::of_push(&end);
            let before = *transfer.push_end.get_or_insert(seen);
            assert_eq!(before, seen, "seed {seed}: a push ended twice");
            if let Err(PushError::Peer(error)) = &end {
                nobody_is_accused(seed, error);
            }
        }
        let end = transfer
            .arrival
            .as_ref()
            .and_then(|arrival| arrival.poll_complete());
        let Some(end) = end else { return };
        let seen = Seen::of_arrival(&end);
        if let Some(before) = transfer.arrival_end {
            assert_eq!(before, seen, "seed {seed}: an arrival ended twice");
            return;
        }
        transfer.arrival_end = Some(seen);
        match &end {
            Ok(tail) => self.completed_means_whole(index, tail),
            Err(ArrivalError::Unfenced(_)) => {
                self.transfers[index].in_doubt = true;
                return;
            }
            Err(ArrivalError::Peer(error)) => nobody_is_accused(seed, error),
            Err(_) => {}
        }
        self.freeze(world, index);
    }

    /// Invariant 2: what is called complete holds every byte, and only its own writer's.
    fn completed_means_whole(&self, index: usize, tail: &[u8]) {
        let (seed, transfer) = (self.seed, &self.transfers[index]);
        assert_eq!(tail, [transfer.byte], "seed {seed}: tail");
        let side = &self.sides[transfer.destination];
        let bytes = side.bytes(0..LAYERS, &transfer.pages, transfer.heads);
        let whole = bytes.iter().all(|&byte| byte == transfer.byte);
        assert!(whole, "seed {seed}: completed without all bytes");
        let finished = transfer.finished;
        assert!(
            finished,
            "seed {seed}: completed before the writer finished"
        );
    }

    /// Invariant 2: the same, layer by layer.
    fn layers_are_whole(&mut self, index: usize) {
        let seed = self.seed;
        let transfer = &mut self.transfers[index];
        let Some(arrival) = &transfer.arrival else {
            return;
        };
        let ready = arrival.complete_layers();
        if ready == transfer.layers_seen || transfer.released() {
            return;
        }
        transfer.layers_seen = ready;
        if transfer.arrival_end.is_none() && (ready as usize) < LAYERS {
            self.coverage.saw(Seen::LayerFirst);
        }
        for layer in 0..LAYERS {
            if arrival.poll_layer(layer) == Some(Ok(())) {
                let side = &self.sides[transfer.destination];
                let bytes = side.bytes(layer..layer + 1, &transfer.pages, transfer.heads);
                let whole = bytes.iter().all(|&byte| byte == transfer.byte);
                assert!(
                    whole,
                    "seed {seed}: layer {layer} was ready without all bytes"
                );
            }
        }
    }

    /// Invariant 3: after an end, the pages are as they were when it was told.
    fn no_late_write(&self) {
        for (index, transfer) in self.transfers.iter().enumerate() {
            if !self.is_watched(index) {
                continue;
            }
            let side = &self.sides[transfer.destination];
            let now = side.bytes(0..LAYERS, &transfer.pages, transfer.heads);
            let same = transfer.frozen.as_ref() == Some(&now);
            let seed = self.seed;
            assert!(
                same,
                "seed {seed}: a write landed after the end was reported"
            );
        }
    }

    /// Invariant 3: pages are reserved exactly as long as something may still write them.
    fn pages_are_held_until_the_end(&self, world: &World) {
        for (at, side) in self.sides.iter().enumerate() {
            if at % 2 == 0 || !self.lives(world, at) {
                continue;
            }
            let (mut least, mut most) = (Vec::new(), Vec::new());
            for transfer in &self.transfers {
                if transfer.destination != at {
                    continue;
                }
                if transfer.arrival_end.is_none() || transfer.in_doubt {
                    most.extend(&transfer.pages);
                    if !transfer.dropped {
                        least.extend(&transfer.pages);
                    }
                }
            }
            let distinct = |mut pages: Vec<u32>| {
                pages.sort_unstable();
                pages.dedup();
                pages.len()
            };
            let held = side.pool.granted_pages();
            let (least, most) = (distinct(least), distinct(most));
            let seed = self.seed;
            assert!(
                (least..=most).contains(&held),
                "seed {seed}: {held} pages are held, not {least} to {most}"
            );
        }
    }

    /// Invariant 4: pages that no transfer has are as they were left.
    fn what_nobody_granted_is_untouched(&self) {
        for side in self.sides.iter().skip(1).step_by(2) {
            let bytes = side.bytes(0..LAYERS, &side.free, BOTH);
            let untouched = bytes.iter().all(|&byte| byte == POISON);
            let seed = self.seed;
            assert!(
                untouched,
                "seed {seed}: a page was written that nobody granted"
            );
        }
    }

    /// Invariants 1 and 4: pushes with grants of others end, and those with dead grants never open.
    fn strays_end(&mut self, world: &World) {
        let seed = self.seed;
        let mut left = Vec::new();
        for stray in std::mem::take(&mut self.strays) {
            if stray.push.poll_opened() == Some(Ok(())) {
                assert!(!stray.stale, "seed {seed}: a stale grant was opened");
                // It was faster than the one it was meant for. It writes nothing and goes.
                stray.push.start_cancel();
            }
            match stray.push.poll_ended() {
                Some(end) => {
                    assert!(end.is_err(), "seed {seed}: a stray push completed");
                    self.coverage.saw(Seen::of_push(&end));
                }
                None if self.lives(world, stray.source) => left.push(stray),
                None => {}
            }
        }
        self.strays = left;
    }

    /// Invariant 5: no queue overflows, and no immediate meets a lack of receives.
    fn nothing_overflows(&self, world: &World) {
        let (seed, stats) = (self.seed, world.net.stats());
        let overflows = stats.cq_overflows;
        assert_eq!(overflows, 0, "seed {seed}: a completion queue overflowed");
        let full = stats.queue_full;
        assert_eq!(full, 0, "seed {seed}: a queue was full");
        let unready = stats.unready;
        assert_eq!(unready, 0, "seed {seed}: an immediate met no receive");
        self.nobody_reaches_too_far(world);
    }

    /// Invariant 6, as far as honest peers can show it: no access is ever refused, because none is tried that was not
    /// granted.
    fn nobody_reaches_too_far(&self, world: &World) {
        let (seed, refused) = (self.seed, world.net.stats().access_errors);
        assert_eq!(refused, 0, "seed {seed}: an access was refused");
    }

    /// Invariant 1: a transfer is over soon after its time, whatever its peer does.
    fn nothing_outlives_its_deadline(&self, world: &World, index: usize) {
        let (seed, transfer) = (self.seed, &self.transfers[index]);
        let late = |side: usize, due: u64| {
            let node = self.sides[side].node;
            let pace = world.nodes[node].pace;
            let due = due
                .max(self.late_until[node])
                .saturating_add(SLACK + 4 * pace);
            self.lives(world, side) && world.now > due
        };
        let lent = transfer.started + transfer.deadline.as_nanos() as u64;
        let config = &world.nodes[0].shared.config;
        let grace = config.revoke_grace.as_nanos() as u64;
        if !transfer.dropped
            && transfer.arrival_end.is_none()
            && late(transfer.destination, lent + grace)
        {
            let arrival = &transfer.arrival;
            panic!("seed {seed}: an arrival outlives its deadline: {arrival:?}");
        }
        // The writer counts from when it was told, and it may have been told late.
        let open = config.open_timeout + transfer.deadline + config.drain_timeout;
        let due = transfer.started + open.as_nanos() as u64;
        if let Some(push) = &transfer.push
            && transfer.push_end.is_none()
            && late(transfer.source, due)
        {
            panic!("seed {seed}: a push outlives its deadline: {push:?}");
        }
    }

    /// At the very end: everything has ended, and what has ended holds nothing.
    pub(super) fn check_all_ended(&mut self, world: &World) {
        let seed = self.seed;
        for transfer in &self.transfers {
            let arrival = &transfer.arrival;
            let ended = transfer.dropped || transfer.arrival_end.is_some();
            assert!(ended, "seed {seed}: an arrival never ends: {arrival:?}");
            let ended = transfer.push.is_none() || transfer.push_end.is_some();
            let push = &transfer.push;
            assert!(ended, "seed {seed}: a push never ends: {push:?}");
        }
        assert!(
            self.strays.is_empty(),
            "seed {seed}: a stray push never ends"
        );
        for (at, side) in self.sides.iter().enumerate() {
            if self.lives(world, at) && !self.doubts(at) {
                let held = side.pool.granted_pages();
                assert_eq!(held, 0, "seed {seed}: pages stay reserved");
            }
        }
        for transfer in &self.transfers {
            for seen in [transfer.arrival_end, transfer.push_end]
                .into_iter()
                .flatten()
            {
                self.coverage.saw(seen);
            }
            // A writer that reports completion has seen every acknowledgement: everything is in place.
            let completed = transfer.push_end == Some(Seen::PushCompleted);
            if completed && let Some(frozen) = &transfer.frozen {
                let whole = frozen.iter().all(|&byte| byte == transfer.byte);
                assert!(
                    whole,
                    "seed {seed}: the writer completed before everything was placed"
                );
            }
        }
        if world.net.stats().retransmissions > 0 {
            self.coverage.saw(Seen::Retransmitted);
        }
    }

    fn doubts(&self, side: usize) -> bool {
        // A dropped arrival may have ended in doubt without anybody being told.
        let mut on = self
            .transfers
            .iter()
            .filter(|transfer| transfer.destination == side);
        on.any(|transfer| transfer.in_doubt || transfer.dropped)
    }
}

/// Nobody here breaks the protocol, so nobody may be told that somebody did.
fn nobody_is_accused(seed: u64, error: &PeerError) {
    let accused = matches!(error, PeerError::Protocol { .. });
    assert!(!accused, "seed {seed}: {error}");
}
