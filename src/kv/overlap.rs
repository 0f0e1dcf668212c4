//! Whether planes that live in one region keep out of each other's bytes.
//!
//! Planes whose extents are apart cannot meet. Planes whose extents mix are folded: modulo the largest stride among
//! them, all repetitions of a plane fall on one, and if the images are apart, so are the planes. Images that still mix
//! are folded again by the next stride. Invariant: if two planes share a byte, so do their images, so nothing that
//! overlaps is accepted. Folding forgets how often a plane repeats, so some strange but possible layouts are refused.

use super::layout::{Plane, PlaneRole};
use super::validate::{Lattice, LayoutError};

/// Layer and role: what names a plane in a layout.
pub(super) type Owner = (u32, PlaneRole);

/// A plane has three axes, so sensible layouts need three folds; more are only met by layouts made to cost time.
const FOLDS: u32 = 6;

type Clash = (Owner, Owner);

/// Refuses planes of one region that overlap or that cannot be shown apart. Takes `n log n` steps.
pub(super) fn check(planes: &[(Owner, &Plane, Lattice)]) -> Result<(), LayoutError> {
    let mut order: Vec<_> = planes
        .iter()
        .map(|&(owner, plane, l)| (plane.region, owner, l))
        .collect();
    order.sort_by_key(|&(region, ..)| region);
    for same in order.chunk_by(|a, b| a.0 == b.0) {
        let Some(&(region, ..)) = same.first() else {
            continue;
        };
        let mut pieces: Vec<_> = same
            .iter()
            .map(|&(_, owner, lattice)| (owner, lattice))
            .collect();
        apart(&mut pieces, FOLDS).map_err(|(first, second)| LayoutError::PlanesOverlap {
            region,
            first,
            second,
        })?;
    }
    Ok(())
}

/// Sorts the pieces and folds each cluster of those whose extents mix.
fn apart(pieces: &mut [(Owner, Lattice)], folds: u32) -> Result<(), Clash> {
    pieces.sort_by_key(|(_, lattice)| lattice.start);
    let mut first = 0;
    while first < pieces.len() {
        let mut end = pieces[first].1.start + pieces[first].1.extent();
        let mut last = first + 1;
        while last < pieces.len() && pieces[last].1.start < end {
            end = end.max(pieces[last].1.start + pieces[last].1.extent());
            last += 1;
        }
        if last - first > 1 {
            fold(&mut pieces[first..last], folds)?;
        }
        first = last;
    }
    Ok(())
}

/// Maps the pieces, at least two, sorted by start, into one period of their largest stride.
fn fold(pieces: &mut [(Owner, Lattice)], folds: u32) -> Result<(), Clash> {
    let (first, origin) = (pieces[0].0, pieces[0].1.start);
    let second = pieces[1].0;
    let outer = |lattice: &Lattice| lattice.depth.checked_sub(1).map(|i| lattice.steps[i].1);
    let Some(period) = pieces
        .iter()
        .filter_map(|(_, lattice)| outer(lattice))
        .max()
    else {
        return Err((first, second));
    };
    if folds == 0 {
        return Err((first, second));
    }
    for (owner, lattice) in &mut *pieces {
        if outer(lattice) == Some(period) {
            lattice.depth -= 1;
        }
        lattice.start = (lattice.start - origin) % period;
        // An image that runs over the end of the period would reappear at its start, where another piece begins.
        let extent = lattice.extent();
        if extent > period || lattice.start > period - extent {
            return Err((first, if *owner == first { second } else { *owner }));
        }
    }
    apart(pieces, folds - 1)
}
