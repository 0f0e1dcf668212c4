//! The page list of a grant: consecutive pages cost nearly nothing, scattered ones a few bytes each.
//!
//! A varint count, then one token for each maximal run of consecutive pages: `zigzag(first - expected) << 1 | long`,
//! where `expected` is one past the last page of the run before (0 at the start), followed for `long` by the run's
//! length minus two. The form is canonical: varints are minimal and runs are maximal, so a list has one encoding.
//! A decoder holds at most [`MAX_PAGES`] pages whatever the runs claim.

use super::codec::{Reader, WireError, WireErrorKind, Writer};

/// Most pages of one grant.
pub(super) const MAX_PAGES: usize = 1 << 20;

const FIELD: &str = "pages";

pub(super) fn write(writer: &mut Writer, pages: &[u32]) -> Result<(), WireError> {
    if pages.len() > MAX_PAGES {
        return Err(writer.error(FIELD, limit(pages.len() as u64)));
    }
    writer.varint(pages.len() as u64);
    let mut expected = 0i64;
    for run in pages.chunk_by(|a, b| a.checked_add(1) == Some(*b)) {
        let Some(&first) = run.first() else { continue };
        let delta = i64::from(first) - expected;
        let token = zigzag(delta) << 1;
        match run.len() {
            1 => writer.varint(token),
            length => {
                writer.varint(token | 1);
                writer.varint(length as u64 - 2);
            }
        }
        expected = i64::from(first) + run.len() as i64;
    }
    Ok(())
}

pub(super) fn read(reader: &mut Reader<'_>) -> Result<Vec<u32>, WireError> {
    let count = reader.varint(FIELD)?;
    if count > MAX_PAGES as u64 {
        return Err(reader.error(FIELD, limit(count)));
    }
    let count = count as usize;
    // Not reserved up front: the runs, not the claimed count, decide how much is held.
    let mut pages = Vec::new();
    let mut expected = 0i64;
    while pages.len() < count {
        let token = reader.varint(FIELD)?;
        let delta = unzigzag(token >> 1);
        if delta == 0 && !pages.is_empty() {
            // It would continue the run before, which then was not maximal.
            return Err(reader.error(FIELD, WireErrorKind::NotCanonical));
        }
        let length = match token & 1 {
            0 => 1,
            _ => reader.varint(FIELD)?.saturating_add(2),
        };
        let left = (count - pages.len()) as u64;
        if length > left {
            let kind = WireErrorKind::Limit {
                value: length,
                limit: left,
            };
            return Err(reader.error(FIELD, kind));
        }
        let bounds = expected.checked_add(delta).and_then(|first| {
            let last = first.checked_add(length as i64 - 1)?;
            Some((u32::try_from(first).ok()?, u32::try_from(last).ok()?))
        });
        let Some((first, last)) = bounds else {
            let kind = WireErrorKind::Limit {
                value: u64::MAX,
                limit: u64::from(u32::MAX),
            };
            return Err(reader.error(FIELD, kind));
        };
        pages.extend(first..=last);
        expected = i64::from(last) + 1;
    }
    Ok(pages)
}

fn limit(value: u64) -> WireErrorKind {
    WireErrorKind::Limit {
        value,
        limit: MAX_PAGES as u64,
    }
}

fn zigzag(value: i64) -> u64 {
    ((value << 1) ^ (value >> 63)) as u64
}

fn unzigzag(value: u64) -> i64 {
    (value >> 1) as i64 ^ -((value & 1) as i64)
}
