//! Which posted requests a completion retires.
//!
//! Only some requests are signalled. A lane completes in order, so a completion retires everything posted up to and
//! including its request. Requests are kept as *batches*: runs of one push, so the ledger's size follows the number of
//! posts and not of pages.

use std::collections::VecDeque;

/// A run of requests of one owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Batch<Owner> {
    /// Whose requests these are.
    pub(crate) owner: Owner,
    /// How many.
    pub(crate) requests: u32,
    /// Their payload.
    pub(crate) bytes: u64,
}

/// The requests in flight on one lane, oldest first.
#[derive(Debug)]
pub(crate) struct LaneLedger<Owner> {
    batches: VecDeque<(u64, Batch<Owner>)>,
    posted: u64,
    retired: u64,
}

impl<Owner: Copy + Eq> LaneLedger<Owner> {
    pub(crate) fn new() -> Self {
        Self {
            batches: VecDeque::new(),
            posted: 0,
            retired: 0,
        }
    }

    /// The sequence number that the next posted request has.
    pub(crate) fn next_sequence(&self) -> u64 {
        self.posted
    }

    /// Requests in flight.
    pub(crate) fn in_flight(&self) -> u64 {
        self.posted - self.retired
    }

    /// Records that `batch` has been posted.
    pub(crate) fn post(&mut self, batch: Batch<Owner>) {
        if batch.requests == 0 {
            return;
        }
        self.posted += u64::from(batch.requests);
        match self.batches.back_mut() {
            Some((end, last)) if last.owner == batch.owner && last.requests < u32::MAX / 2 => {
                last.requests += batch.requests;
                last.bytes += batch.bytes;
                *end = self.posted;
            }
            _ => self.batches.push_back((self.posted, batch)),
        }
    }

    /// The request with sequence number `sequence` has completed. Calls `retire` for what that ends, oldest first, and
    /// returns the number of requests retired, or `None` if no such request is in flight.
    ///
    /// A batch that is retired in part is split; its bytes are counted with the last of it.
    pub(crate) fn complete(
        &mut self,
        sequence: u64,
        mut retire: impl FnMut(Batch<Owner>),
    ) -> Option<u32> {
        if sequence < self.retired || sequence >= self.posted {
            return None;
        }
        let end = sequence + 1;
        let mut count = 0;
        while let Some(&(batch_end, batch)) = self.batches.front() {
            if batch_end <= end {
                self.batches.pop_front();
                count += batch.requests;
                retire(batch);
                continue;
            }
            let begin = batch_end - u64::from(batch.requests);
            if begin < end {
                let requests = (end - begin) as u32;
                count += requests;
                retire(Batch {
                    owner: batch.owner,
                    requests,
                    bytes: 0,
                });
                if let Some((_, front)) = self.batches.front_mut() {
                    front.requests -= requests;
                }
            }
            break;
        }
        self.retired = end;
        Some(count)
    }

    /// The lane is gone: everything in flight ends, oldest first.
    pub(crate) fn abandon(&mut self, mut retire: impl FnMut(Batch<Owner>)) {
        for (_, batch) in self.batches.drain(..) {
            retire(batch);
        }
        self.retired = self.posted;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Every request is retired exactly once and for its own owner, whatever is signalled.
        #[test]
        fn each_request_is_retired_once(
            posts in prop::collection::vec((0u8..4, 1u32..20, any::<bool>()), 1..60),
            lag in 0usize..10,
        ) {
            let mut ledger = LaneLedger::new();
            let (mut posted, mut retired) = (HashMap::<u8, u64>::new(), HashMap::<u8, u64>::new());
            let (mut bytes_in, mut bytes_out) = (0u64, 0u64);
            let mut signalled = std::collections::VecDeque::new();
            for (owner, requests, signal) in posts {
                let batch = Batch { owner, requests, bytes: u64::from(requests) * 100 };
                ledger.post(batch);
                bytes_in += batch.bytes;
                *posted.entry(owner).or_default() += u64::from(requests);
                if signal { signalled.push_back(ledger.next_sequence() - 1); }
                while signalled.len() > lag {
                    let sequence = signalled.pop_front().unwrap();
                    let count = ledger.complete(sequence, |b| {
                        *retired.entry(b.owner).or_default() += u64::from(b.requests);
                        bytes_out += b.bytes;
                    });
                    prop_assert!(count.is_some());
                }
            }
            let in_flight = posted.values().sum::<u64>() - retired.values().sum::<u64>();
            prop_assert_eq!(ledger.in_flight(), in_flight);
            ledger.abandon(|b| { *retired.entry(b.owner).or_default() += u64::from(b.requests); bytes_out += b.bytes; });
            prop_assert_eq!(posted, retired);
            prop_assert_eq!(bytes_in, bytes_out);
            prop_assert_eq!(ledger.in_flight(), 0);
        }
    }

    #[test]
    fn a_foreign_completion_is_refused() {
        let mut ledger = LaneLedger::new();
        assert_eq!(ledger.complete(0, |_: Batch<u8>| ()), None);
        ledger.post(Batch {
            owner: 1u8,
            requests: 2,
            bytes: 0,
        });
        assert_eq!(ledger.complete(2, |_| ()), None);
        assert_eq!(ledger.complete(1, |_| ()), Some(2));
        assert_eq!(ledger.complete(1, |_| ()), None, "completed twice");
    }
}
