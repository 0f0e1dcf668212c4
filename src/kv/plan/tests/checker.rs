//! The judge of plans: the naive mover, and the comparison with it.
//!
//! Memory is modelled with a unique number in the place of each byte, so that a wrong byte cannot pass for the right
//! one.

use crate::kv::plan::{Plan, PlanLimits, Planner};
use crate::kv::testing::head_offset;
use crate::kv::{HeadRange, KvLayout, PlaneRole};

type Cells = Vec<Vec<u64>>;

const POISON: u64 = u64::MAX;

fn numbered_cells(lengths: &[u64]) -> Cells {
    let mut next = 0..;
    lengths
        .iter()
        .map(|&length| next.by_ref().take(length as usize).collect())
        .collect()
}

fn poisoned_cells(lengths: &[u64]) -> Cells {
    lengths
        .iter()
        .map(|&length| vec![POISON; length as usize])
        .collect()
}

pub(super) struct Case {
    pub(super) source: KvLayout,
    pub(super) destination: KvLayout,
    pub(super) source_lengths: Vec<u64>,
    pub(super) destination_lengths: Vec<u64>,
    pub(super) heads: HeadRange,
    pub(super) limits: PlanLimits,
    pub(super) layer: u32,
    pub(super) source_pages: Vec<u32>,
    pub(super) destination_pages: Vec<u32>,
}

/// What has to be written: for each cell of the destination the source's number and the page's position.
struct Expected {
    cells: Cells,
    positions: Cells,
}

impl Case {
    pub(super) fn plan(&self) -> Plan {
        let planner =
            Planner::new(&self.source, &self.destination, self.heads, self.limits).unwrap();
        let mut plan = Plan::default();
        planner
            .plan(
                self.layer,
                &self.source_pages,
                &self.destination_pages,
                &mut plan,
            )
            .unwrap();
        let bytes = planner.bytes_per_page(self.layer).unwrap();
        assert_eq!(plan.bytes(), bytes * self.source_pages.len() as u64);
        plan
    }

    /// Moves byte by byte, from the definition of a layout.
    fn naive(&self) -> Expected {
        let from = numbered_cells(&self.source_lengths);
        let mut cells = poisoned_cells(&self.destination_lengths);
        let mut positions = cells.clone();
        let layer = self.layer as usize;
        for (position, (&sp, &dp)) in self
            .source_pages
            .iter()
            .zip(&self.destination_pages)
            .enumerate()
        {
            for source in &self.source.layers[layer].planes {
                let destination = &self.destination.layers[layer].planes;
                let destination = destination
                    .iter()
                    .find(|plane| plane.role == source.role)
                    .unwrap();
                let whole = source.role == PlaneRole::Auxiliary;
                let heads = if whole { source.heads } else { self.heads };
                for head in heads.first..heads.end() as u32 {
                    for token in 0..self.source.layers[layer].tokens_per_page {
                        for byte in 0..u64::from(source.head_bytes) {
                            let s = (head_offset(source, sp, token, head) + byte) as usize;
                            let d = (head_offset(destination, dp, token, head) + byte) as usize;
                            let region = usize::from(destination.region);
                            assert_eq!(
                                cells[region][d], POISON,
                                "the case itself writes a byte twice"
                            );
                            cells[region][d] = from[usize::from(source.region)][s];
                            positions[region][d] = position as u64;
                        }
                    }
                }
            }
        }
        Expected { cells, positions }
    }

    /// Applies the plan and compares with the naive mover.
    pub(super) fn check(&self, plan: &Plan) -> Result<(), String> {
        let expected = self.naive();
        let from = numbered_cells(&self.source_lengths);
        let mut cells = poisoned_cells(&self.destination_lengths);
        let mut used = vec![false; plan.sources.len()];
        for write in &plan.writes {
            let sources = plan.sources_of(write);
            if sources.len() != write.source_count as usize {
                return Err(format!("{write:?} has sources outside of the plan"));
            }
            let first = write.first_source as usize;
            for used in &mut used[first..first + sources.len()] {
                if std::mem::replace(used, true) {
                    return Err(format!("{write:?} shares a source with another"));
                }
            }
            let total: u64 = sources.iter().map(|run| u64::from(run.length)).sum();
            let in_limits = (1..=self.limits.max_sge).contains(&write.source_count)
                && (1..=self.limits.max_write).contains(&write.length);
            if total != u64::from(write.length)
                || !in_limits
                || sources.iter().any(|run| run.length == 0)
            {
                return Err(format!(
                    "{write:?} breaks {:?} or its sources' sum {total}",
                    self.limits
                ));
            }
            let positions = expected.positions.get(usize::from(write.region));
            if positions.and_then(|p| p.get(write.offset as usize))
                != Some(&u64::from(write.first_page))
            {
                return Err(format!("{write:?} does not begin in that page"));
            }
            let mut at = write.offset as usize;
            for run in sources {
                for i in 0..run.length as usize {
                    let number = from
                        .get(usize::from(run.region))
                        .and_then(|region| region.get(run.offset as usize + i))
                        .ok_or(format!("{run:?} is outside of its region"))?;
                    let cell = cells
                        .get_mut(usize::from(write.region))
                        .and_then(|region| region.get_mut(at))
                        .ok_or(format!("{write:?} is outside of its region"))?;
                    if *cell != POISON {
                        return Err(format!("{write:?} writes byte {at} again"));
                    }
                    *cell = *number;
                    at += 1;
                }
            }
        }
        if used.contains(&false) {
            return Err("sources without a write".into());
        }
        for (region, (have, want)) in cells.iter().zip(&expected.cells).enumerate() {
            if let Some(at) = have.iter().zip(want).position(|(have, want)| have != want) {
                return Err(format!(
                    "byte {at} of region {region} is {} and should be {}",
                    have[at], want[at]
                ));
            }
        }
        Ok(())
    }

    /// The fewest writes if they may be taken in any order, from the map of bytes.
    pub(super) fn fewest(&self) -> usize {
        let expected = self.naive();
        let (mut writes, mut length, mut runs) = (0, 0, 0);
        for region in &expected.cells {
            let mut last = POISON;
            for &cell in region {
                if cell != POISON {
                    let follows = last != POISON && cell == last + 1;
                    runs += u32::from(!follows);
                    if last == POISON
                        || length == self.limits.max_write
                        || runs > self.limits.max_sge
                    {
                        (writes, length, runs) = (writes + 1, 0, 1);
                    }
                    length += 1;
                }
                last = cell;
            }
        }
        writes
    }
}

/// No write could have taken the beginning of the next, and no run that of the next.
pub(super) fn check_merged(plan: &Plan, limits: PlanLimits) -> Result<(), String> {
    for pair in plan.writes.windows(2) {
        let adjacent = pair[0].region == pair[1].region
            && pair[0].offset + u64::from(pair[0].length) == pair[1].offset;
        let full = pair[0].length == limits.max_write || pair[0].source_count == limits.max_sge;
        if adjacent && !full {
            return Err(format!("{pair:?} could be one write"));
        }
    }
    for write in &plan.writes {
        for pair in plan.sources_of(write).windows(2) {
            if pair[0].region == pair[1].region
                && pair[0].offset + u64::from(pair[0].length) == pair[1].offset
            {
                return Err(format!("{pair:?} could be one run"));
            }
        }
    }
    Ok(())
}

impl std::fmt::Debug for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?} {:?} ", self.heads, self.limits)?;
        write!(
            f,
            "layer {} pages {:?} -> {:?} ",
            self.layer, self.source_pages, self.destination_pages
        )?;
        write!(f, "from {:?} to {:?}", self.source, self.destination)
    }
}
