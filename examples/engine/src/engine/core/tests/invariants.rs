//! What holds after every command and every step.

use std::collections::{BTreeSet, HashMap};

use super::super::{
    Core,
    job::{Phase, Role},
};
use crate::engine::BlockHash;

impl Core {
    /// Panics if a block is in two places, if a count is wrong, or if the events do not say what can be found.
    pub(super) fn check_invariants(&self, mirror: &BTreeSet<BlockHash>) {
        let mut users = HashMap::new();
        let mut granted = Vec::new();
        for job in self.jobs.values() {
            let blocks = job.sequences.iter().flat_map(|sequence| &sequence.blocks);
            blocks.for_each(|&block| *users.entry(block).or_default() += 1);
            granted.extend(&job.granted);
            let is_waiting = self.waiting.contains(&job.number);
            assert_eq!(is_waiting, job.phase == Phase::Waiting, "{}", job.id);
            let is_running = self.running.contains(&job.number);
            assert_eq!(is_running, job.phase == Phase::Running, "{}", job.id);
            let is_known = self.by_id.get(&job.id) == Some(&job.number);
            assert_eq!(is_known, job.phase != Phase::Closing, "{}", job.id);
            assert!(
                job.granted.is_empty() || job.is_travelling,
                "{}: nobody will end its grant",
                job.id
            );
            match job.phase {
                Phase::Waiting => assert!(job.sequences.iter().all(|s| s.blocks.is_empty())),
                Phase::Arriving => assert!(matches!(job.role, Role::Decode { .. })),
                Phase::Closing => assert!(job.is_travelling, "{} has no reason to stay", job.id),
                Phase::Running => assert!(job.granted.is_empty()),
                Phase::Holding | Phase::Pushing => {}
            }
            for sequence in job.sequences.iter().filter(|s| !s.is_finished) {
                let room = sequence.blocks.len() * self.block_tokens();
                let may_lack = job.phase == Phase::Closing;
                assert!(room >= sequence.computed || may_lack, "{}", job.id);
            }
        }
        self.pool.check(&users, &granted);
        assert_eq!(&self.pool.hashes(), mirror, "events say something else");
        assert!(self.running.is_sorted(), "{:?}", self.running);
        assert!(self.waiting.iter().is_sorted(), "{:?}", self.waiting);
    }
}
