//! Lists of source pages, checked once, and the plans that have been made of them.
//!
//! A list belongs to one push, so its positions, and with them the destination pages, never change; nor does the planner
//! of the push. So the plan of one layer is good for every layer of the same geometry, moved
//! ([`Translation`](crate::kv::plan::Translation)). The driver plans when the first such layer is posted, keeps the
//! plan here, and reads it for the others.
//!
//! Callers and the driver share a list; only the driver makes and reads plans.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use parking_lot::Mutex;

use super::shared::PushShared;
use crate::kv::{Plan, PlannedWrite, SourceRun};

/// Geometries of layers for which a list keeps plans.
const MOST_GEOMETRIES: usize = 4;
/// Bytes of plans that an endpoint keeps of lists that nobody has prepared, over all of its pushes.
const MOST_BYTES: u64 = 64 << 20;

/// Source pages of one push, checked and ready to be pushed for any number of layers: see
/// [`Push::prepare`](super::Push::prepare).
///
/// A cheap handle: clones share the pages and their plans.
#[derive(Clone)]
pub struct Prepared {
    pub(super) list: Arc<PageList>,
    pub(super) push: Arc<PushShared>,
}

impl Prepared {
    /// The position in the grant that the first page goes to.
    pub fn first(&self) -> usize {
        self.list.first as usize
    }

    /// The source pages, by number.
    pub fn pages(&self) -> &[u32] {
        &self.list.pages
    }
}

impl fmt::Debug for Prepared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Prepared")
            .field("first", &self.first())
            .field("pages", &self.pages().len())
            .finish_non_exhaustive()
    }
}

/// What the plans of unprepared lists take.
#[derive(Debug, Default)]
pub(crate) struct PlanBudget(AtomicU64);

impl PlanBudget {
    fn take(&self, bytes: u64) -> bool {
        let more = |used: u64| used.checked_add(bytes).filter(|&sum| sum <= MOST_BYTES);
        let (set, read) = (Ordering::Relaxed, Ordering::Relaxed);
        self.0.fetch_update(set, read, more).is_ok()
    }

    fn give(&self, bytes: u64) {
        self.0.fetch_sub(bytes, Ordering::Relaxed);
    }
}

/// Pages that go to the positions from `first`.
#[derive(Debug)]
pub(crate) struct PageList {
    pub(crate) first: u32,
    pub(crate) pages: Box<[u32]>,
    /// Whose account the plans are on; nobody's, if the caller has asked for them.
    budget: Option<Arc<PlanBudget>>,
    /// Whether it is for more than one layer.
    repeated: AtomicBool,
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    /// By where in the list the plan begins: the layer it was made for, and the plan.
    plans: BTreeMap<u32, Vec<(u32, Arc<Plan>)>>,
    /// On the account.
    bytes: u64,
}

impl PageList {
    pub(crate) fn new(first: usize, pages: &[u32], budget: Option<Arc<PlanBudget>>) -> Arc<Self> {
        Arc::new(Self {
            first: first as u32,
            pages: pages.into(),
            repeated: AtomicBool::new(budget.is_none()),
            budget,
            kept: Mutex::default(),
        })
    }

    /// Whether it is the list of these pages from this position on.
    pub(crate) fn is(&self, first: usize, pages: &[u32]) -> bool {
        self.first as usize == first && *self.pages == *pages
    }

    /// Says that it is handed over again.
    pub(crate) fn repeat(&self) {
        self.repeated.store(true, Ordering::Relaxed);
    }

    /// Whether it is worth while to keep plans: it has been prepared, or been handed over more than once.
    pub(crate) fn is_repeated(&self) -> bool {
        self.repeated.load(Ordering::Relaxed)
    }

    /// The first plan of the pages from index `from` on that `fits`, which is given the layer that it was made for.
    pub(crate) fn plan(&self, from: u32, mut fits: impl FnMut(u32) -> bool) -> Option<Arc<Plan>> {
        let kept = self.kept.lock();
        let plans = kept.plans.get(&from)?;
        let found = plans.iter().find(|(layer, _)| fits(*layer));
        found.map(|(_, plan)| Arc::clone(plan))
    }

    /// Keeps a plan of the pages from index `from` on, if there is room.
    pub(crate) fn keep(&self, from: u32, layer: u32, plan: &Plan) {
        let mut kept = self.kept.lock();
        let kept = &mut *kept;
        let plans = kept.plans.entry(from).or_default();
        if plans.len() >= MOST_GEOMETRIES {
            return;
        }
        let bytes =
            size_of_val::<[PlannedWrite]>(&plan.writes) + size_of_val::<[SourceRun]>(&plan.sources);
        let bytes = bytes as u64;
        match &self.budget {
            Some(budget) if !budget.take(bytes) => return,
            Some(_) => kept.bytes += bytes,
            None => {}
        }
        // A copy, because it is of the exact size.
        plans.push((layer, Arc::new(plan.clone())));
    }
}

impl Drop for PageList {
    fn drop(&mut self) {
        if let Some(budget) = &self.budget {
            budget.give(self.kept.get_mut().bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(writes: usize) -> Plan {
        let mut plan = Plan::default();
        let write = PlannedWrite {
            region: 0,
            offset: 0,
            length: 1,
            first_source: 0,
            source_count: 0,
            first_page: 0,
        };
        plan.writes.resize(writes, write);
        plan
    }

    #[test]
    fn plans_are_found_by_place_and_layer() {
        let list = PageList::new(5, &[1, 2, 3], None);
        assert!(list.is_repeated(), "prepared for all layers");
        assert!(list.is(5, &[1, 2, 3]) && !list.is(4, &[1, 2, 3]) && !list.is(5, &[1, 2]));
        list.keep(0, 7, &plan(1));
        list.keep(2, 7, &plan(2));
        list.keep(2, 8, &plan(3));
        let writes = |from, wanted| {
            let plan = list.plan(from, |layer| layer == wanted);
            plan.map(|plan| plan.writes.len())
        };
        assert_eq!(
            [writes(0, 7), writes(2, 7), writes(2, 8)],
            [1, 2, 3].map(Some)
        );
        assert_eq!([writes(1, 7), writes(0, 8)], [None; 2]);
        for layer in 9..100 {
            list.keep(0, layer, &plan(1));
        }
        assert_eq!(list.kept.lock().plans[&0].len(), MOST_GEOMETRIES);
    }

    #[test]
    fn what_nobody_has_prepared_is_bounded() {
        let budget = Arc::new(PlanBudget::default());
        let large = plan(MOST_BYTES as usize / size_of::<PlannedWrite>());
        let list = || PageList::new(0, &[1], Some(Arc::clone(&budget)));
        let kept = |list: &PageList| list.plan(0, |_| true).is_some();
        let (first, second) = (list(), list());
        assert!(!first.is_repeated());
        first.repeat();
        assert!(first.is_repeated());
        first.keep(0, 0, &large);
        second.keep(0, 0, &plan(1));
        assert!(kept(&first) && !kept(&second));
        drop(first);
        second.keep(0, 0, &plan(1));
        assert!(kept(&second), "what the first had is free again");
        drop(second);
        assert_eq!(budget.0.load(Ordering::Relaxed), 0);
        let prepared = PageList::new(0, &[1], None);
        prepared.keep(0, 0, &large);
        prepared.keep(0, 1, &large);
        assert!(kept(&prepared));
    }
}
