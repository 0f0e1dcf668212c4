//! Random layouts, pages and limits against the naive mover, and proof that the judge can say no.

use proptest::prelude::*;

use super::checker::{Case, check_merged};
use crate::kv::plan::{Plan, PlanLimits, Planner, Translation};
use crate::kv::testing::{Memory, Model, memory, model};

prop_compose! {
    fn case()(model in model(), from in memory(), to in memory())(
        destination_pages in prop::sample::subsequence((0..to.pages).collect::<Vec<_>>(), 0..=to.pages as usize),
        shuffled in Just((0..to.pages).collect::<Vec<_>>()).prop_shuffle(),
        random in prop::collection::vec(0..from.pages, to.pages as usize),
        style in 0..4,
        layer in 0..model.tokens.len() as u32,
        max_sge in 1u32..=30,
        max_write in prop_oneof![1u32..64, 1u32..5000, Just(u32::MAX)],
        (model, from, to) in Just((model, from, to)),
    ) -> (Case, Memory) {
        build(&model, &from, &to, layer, PlanLimits { max_sge, max_write }, match style {
            0 => (random[..destination_pages.len()].to_vec(), destination_pages),
            1 => (random, shuffled),
            2 => ((0..from.pages.min(to.pages)).collect(), (0..from.pages.min(to.pages)).collect()),
            _ => (vec![random[0]], vec![shuffled[0]]),
        })
    }
}

fn build(
    model: &Model,
    from: &Memory,
    to: &Memory,
    layer: u32,
    limits: PlanLimits,
    (source_pages, destination_pages): (Vec<u32>, Vec<u32>),
) -> (Case, Memory) {
    let (source, source_lengths) = from.layout(model);
    let (destination, destination_lengths) = to.layout(model);
    let case = Case {
        source,
        destination,
        source_lengths,
        destination_lengths,
        heads: model.heads,
        limits,
        layer,
        source_pages,
        destination_pages,
    };
    (case, to.clone())
}

/// Ways to get a plan wrong by a little; `at` chooses the write.
fn spoil(plan: &mut Plan, way: u32, at: usize) {
    let at = at % plan.writes.len();
    let first = plan.writes[at].first_source as usize;
    match way {
        0 => plan.writes[at].offset += 1,
        1 => plan.sources[first].offset += 1,
        2 => {
            plan.writes[at].length -= 1;
            plan.sources[first].length -= 1;
        }
        3 => {
            plan.writes[at].length += 1;
            plan.sources[first].length += 1;
        }
        4 => drop(plan.writes.remove(at)),
        5 => plan.writes.push(plan.writes[at]),
        6 => plan.writes[at].region += 1,
        7 => plan.sources[first].region += 1,
        8 => plan.writes[at].length -= 1,
        9 => plan.writes[at].first_source += 1,
        _ => plan.writes[at].first_page += 1,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn moves_what_the_naive_mover_moves((case, to) in case()) {
        prop_assert_eq!(case.source.validate(&case.source_lengths), Ok(()));
        prop_assert_eq!(case.destination.validate(&case.destination_lengths), Ok(()));
        let plan = case.plan();
        case.check(&plan).map_err(TestCaseError::fail)?;
        check_merged(&plan, case.limits).map_err(TestCaseError::fail)?;
        // One page whose bytes come before those of the next: no order of its pieces is better.
        if case.destination_pages.len() == 1 && (to.order[2] == 2 || to.pages == 1) {
            prop_assert_eq!(plan.writes.len(), case.fewest());
        }
    }

    /// Where a layer is another one moved, the moved plan is the plan.
    #[test]
    fn a_translated_plan_is_the_plan((mut case, _) in case(), other in any::<prop::sample::Index>()) {
        let plan = case.plan();
        let other = other.index(case.source.layers.len()) as u32;
        let planner =
            Planner::new(&case.source, &case.destination, case.heads, case.limits).unwrap();
        let mut translation = Translation::default();
        if planner.translate(case.layer, other, &mut translation) {
            case.layer = other;
            prop_assert_eq!(plan.translated(&translation), case.plan());
        } else {
            prop_assert_ne!(case.layer, other);
        }
    }

    #[test]
    fn faults_are_found((mut case, _) in case(), way in 0u32..=10, at in any::<usize>()) {
        if case.source_pages.is_empty() {
            (case.source_pages, case.destination_pages) = (vec![0], vec![0]);
        }
        let mut plan = case.plan();
        spoil(&mut plan, way, at);
        prop_assert!(case.check(&plan).is_err());
    }
}
