//! What a lane would have to send again if it failed now.
//!
//! A *task* is what was handed to the lane as one piece; it becomes requests with consecutive sequence numbers. It is
//! kept from the moment its requests are built until the last of them has been acknowledged, because the peer may lack
//! any of an unacknowledged task. One task at a time is *open*: not wholly built yet.
//!
//! Invariant: tasks come back from [`ReplayLedger::take`] in the order in which they were begun, so what is sent again
//! has the order of the first time. The ledger holds at most one task for each request in flight, and the open one.

use std::collections::VecDeque;

#[derive(Debug)]
struct Kept<T> {
    task: T,
    first: u64,
    /// One past its last request, once it is wholly built.
    end: Option<u64>,
}

/// How far a task was when its lane failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// Some of its requests have not been built.
    Open,
    /// All have been built, and some were not taken by the device.
    Built,
    /// The device has taken all: the last may have reached the peer.
    Posted,
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct ReplayLedger<T> {
    kept: VecDeque<Kept<T>>,
    /// One past the last request that has been acknowledged.
    acknowledged: u64,
}

impl<T> ReplayLedger<T> {
    pub(crate) fn new() -> Self {
        Self {
            kept: VecDeque::new(),
            acknowledged: 0,
        }
    }

    /// The requests of `task` are being built; the first of them is `first`.
    pub(crate) fn begin(&mut self, task: T, first: u64) {
        debug_assert!(self.kept.back().is_none_or(|last| last.end.is_some()));
        self.kept.push_back(Kept {
            task,
            first,
            end: None,
        });
    }

    /// No more requests of the open task are built; `end` is the number of the next request. Gives the task back if
    /// none of its requests is unacknowledged, because then no acknowledgement would end it.
    pub(crate) fn close(&mut self, end: u64) -> Option<T> {
        let open = self.kept.back_mut().filter(|last| last.end.is_none())?;
        open.end = Some(end);
        if open.first.max(self.acknowledged) < end {
            return None;
        }
        self.kept.pop_back().map(|kept| kept.task)
    }

    /// The request `sequence` and all before it are acknowledged: calls `done` for each task that ends with that.
    pub(crate) fn complete(&mut self, sequence: u64, mut done: impl FnMut(T)) {
        self.acknowledged = sequence + 1;
        while self
            .kept
            .front()
            .is_some_and(|front| front.end.is_some_and(|end| end <= self.acknowledged))
        {
            if let Some(kept) = self.kept.pop_front() {
                done(kept.task);
            }
        }
    }

    /// The tasks that are kept, oldest first.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &T> {
        self.kept.iter().map(|kept| &kept.task)
    }

    /// The lane has failed after the device had taken the requests below `posted`: all tasks that may have to be sent
    /// again, oldest first. The numbers of the next lane begin at 0.
    pub(crate) fn take(&mut self, posted: u64) -> impl DoubleEndedIterator<Item = (T, Progress)> {
        self.acknowledged = 0;
        std::mem::take(&mut self.kept).into_iter().map(move |kept| {
            let progress = match kept.end {
                None => Progress::Open,
                Some(end) if end <= posted => Progress::Posted,
                Some(_) => Progress::Built,
            };
            (kept.task, progress)
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    enum Step {
        /// Build so many requests of a new task, and perhaps leave it open.
        Task(u64, bool),
        /// The device takes so many more.
        Post(u64),
        /// It acknowledges so many more.
        Acknowledge(u64),
        /// The lane fails; a new one begins.
        Fail,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            5 => (0u64..5, prop::bool::weighted(0.2)).prop_map(|(n, open)| Step::Task(n, open)),
            5 => (1u64..6).prop_map(Step::Post),
            4 => (1u64..6).prop_map(Step::Acknowledge),
            1 => Just(Step::Fail),
        ]
    }

    proptest! {
        /// Against a model that remembers for every task which requests it has: after a failure exactly those tasks
        /// come back that have an unacknowledged request, in order, each with the truth about its last request.
        #[test]
        fn what_is_not_acknowledged_comes_back_in_order(steps in prop::collection::vec(step(), 0..120)) {
            let mut ledger = ReplayLedger::new();
            // Name, requests [first, end), whether it is open.
            let mut model: Vec<(u32, u64, u64, bool)> = Vec::new();
            let (mut name, mut built, mut posted, mut acknowledged) = (0, 0, 0, 0);
            for step in steps.into_iter().chain([Step::Fail]) {
                match step {
                    Step::Task(requests, open) => {
                        if let Some(last) = model.last_mut().filter(|last| last.3) {
                            last.3 = false;
                            last.2 = built;
                            let back = ledger.close(built);
                            prop_assert_eq!(back.is_some(), last.1.max(acknowledged) >= built);
                        }
                        name += 1;
                        ledger.begin(name, built);
                        model.push((name, built, built + requests, open));
                        built += requests;
                        if !open {
                            let back = ledger.close(built);
                            prop_assert_eq!(back.is_some(), requests == 0);
                        }
                    }
                    Step::Post(n) => posted = built.min(posted + n),
                    Step::Acknowledge(n) => {
                        let until = posted.min(acknowledged + n);
                        if until > acknowledged {
                            acknowledged = until;
                            let mut done = Vec::new();
                            ledger.complete(until - 1, |task| done.push(task));
                            prop_assert!(done.is_sorted());
                        }
                    }
                    Step::Fail => {
                        let expected: Vec<_> = model
                            .drain(..)
                            .filter(|&(_, first, end, open)| open || (first < end && end > acknowledged))
                            .map(|(name, _, end, open)| {
                                let progress = match open {
                                    true => Progress::Open,
                                    false if end <= posted => Progress::Posted,
                                    false => Progress::Built,
                                };
                                (name, progress)
                            })
                            .collect();
                        let taken: Vec<_> = ledger.take(posted).collect();
                        prop_assert_eq!(taken, expected);
                        (built, posted, acknowledged) = (0, 0, 0);
                    }
                }
                let in_flight = built - acknowledged;
                prop_assert!(ledger.iter().count() as u64 <= in_flight + 1);
            }
        }
    }
}
