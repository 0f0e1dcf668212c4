//! The all-reduce of the ranks: each posts its part, each takes all parts and adds them in the order of ranks.
//!
//! Posting does not wait, so a rank may compute something else before it takes the sum: that is what two-batch overlap
//! does. Invariant: the sum's bits depend on the number of ranks only. Tickets are counted by each rank on its own; all
//! count alike, because all do the same in the same order.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex};

use crate::model::{ModelError, simd::F32x16};

/// How long a rank looks for the others' parts before it sleeps.
const SPIN: Duration = Duration::from_micros(30);

/// What the ranks share.
pub(crate) struct Exchange {
    ranks: usize,
    slots: Mutex<HashMap<u64, Slot>>,
    changed: Condvar,
    failed: AtomicBool,
}

struct Slot {
    parts: Vec<Option<Arc<Vec<F32x16>>>>,
    missing: usize,
    taken: usize,
}

impl Exchange {
    pub(crate) fn new(ranks: usize) -> Self {
        Self {
            ranks,
            slots: Mutex::default(),
            changed: Condvar::new(),
            failed: AtomicBool::new(false),
        }
    }

    /// Hands over `rank`'s part.
    pub(crate) fn post(&self, ticket: u64, rank: usize, part: Vec<F32x16>) {
        let mut slots = self.slots.lock();
        let slot = slots.entry(ticket).or_insert_with(|| Slot {
            parts: vec![None; self.ranks],
            missing: self.ranks,
            taken: 0,
        });
        slot.parts[rank] = Some(Arc::new(part));
        slot.missing -= 1;
        if slot.missing == 0 {
            self.changed.notify_all();
        }
    }

    /// Waits for all parts and adds them to `sum`.
    ///
    /// # Errors
    ///
    /// A rank has failed.
    pub(crate) fn add(&self, ticket: u64, sum: &mut [F32x16]) -> Result<(), ModelError> {
        let parts = self.take(ticket)?;
        for (i, to) in sum.iter_mut().enumerate() {
            let mut total = F32x16::default();
            for (rank, part) in parts.iter().enumerate() {
                for (total, value) in total.0.iter_mut().zip(part[i].0) {
                    *total = if rank == 0 { value } else { *total + value };
                }
            }
            for (to, total) in to.0.iter_mut().zip(total.0) {
                *to += total;
            }
        }
        Ok(())
    }

    fn take(&self, ticket: u64) -> Result<Vec<Arc<Vec<F32x16>>>, ModelError> {
        let since = Instant::now();
        let mut slots = self.slots.lock();
        loop {
            if self.failed.load(SeqCst) {
                return Err(ModelError::Rank);
            }
            if let Some(slot) = slots.get_mut(&ticket).filter(|slot| slot.missing == 0) {
                let parts = slot.parts.iter().flatten().map(Arc::clone).collect();
                slot.taken += 1;
                if slot.taken == self.ranks {
                    slots.remove(&ticket);
                }
                return Ok(parts);
            }
            if since.elapsed() < SPIN {
                parking_lot::MutexGuard::unlocked(&mut slots, || {
                    for _ in 0..64 {
                        std::hint::spin_loop();
                    }
                });
            } else {
                self.changed.wait(&mut slots);
            }
        }
    }

    /// Everyone who waits, now or later, fails.
    pub(crate) fn fail(&self) {
        self.failed.store(true, SeqCst);
        drop(self.slots.lock());
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_added_in_the_order_of_ranks() {
        // In f32 (1e8 + 1) - 1e8 is 0 and (1e8 - 1e8) + 1 is 1.
        let values = [1e8, 1.0, -1e8];
        for order in [[0, 1, 2], [2, 1, 0], [1, 2, 0], [0, 2, 1]] {
            let exchange = Exchange::new(3);
            for rank in order {
                exchange.post(7, rank, vec![F32x16([values[rank]; 16])]);
            }
            for _ in 0..3 {
                let mut sum = [F32x16([0.5; 16])];
                exchange.add(7, &mut sum).unwrap();
                assert_eq!(sum[0].0, [0.5; 16]);
            }
            assert!(exchange.slots.lock().is_empty());
        }
    }

    #[test]
    fn a_failure_wakes_those_who_wait() {
        let exchange = Arc::new(Exchange::new(2));
        let waiter = std::thread::spawn({
            let exchange = Arc::clone(&exchange);
            move || exchange.add(0, &mut [])
        });
        exchange.fail();
        assert!(matches!(waiter.join().unwrap(), Err(ModelError::Rank)));
    }
}
