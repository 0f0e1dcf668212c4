//! The reference for shared memory: one thread that copies the same pages, from where they lie apart to where they lie
//! apart, by `memcpy`.

use std::time::Instant;

use crate::{
    content::Random,
    error::{Error, Result},
};

/// GB/s of copying `pages` pages of `size` bytes. Every second page of either side is left out, and the order is random,
/// as in a pool whose pages cannot be merged.
pub(super) fn bandwidth(size: u64, pages: u32, seed: u64) -> Result<f64> {
    let size = usize::try_from(size).map_err(|_| Error::failed("the page is too large"))?;
    let mut random = Random::new(seed);
    let mut order = |count: u32| {
        let mut list: Vec<u32> = (0..count).map(|index| index * 2 + 1).collect();
        random.shuffle(&mut list);
        list
    };
    let (from, to) = (order(pages), order(pages));
    let bytes = (pages as usize * 2 + 1)
        .checked_mul(size)
        .ok_or_else(|| Error::failed("the pages are too many"))?;
    // Not zero, so that both are backed by memory of their own before the clock runs.
    let source = vec![1u8; bytes];
    let mut destination = vec![2u8; bytes];
    let page = |index: u32| {
        let start = index as usize * size;
        start..start + size
    };
    let start = Instant::now();
    for (&from, &to) in from.iter().zip(&to) {
        let (Some(source), Some(destination)) =
            (source.get(page(from)), destination.get_mut(page(to)))
        else {
            return Err(Error::failed("a page outside of the buffer"));
        };
        destination.copy_from_slice(source);
    }
    let seconds = start.elapsed().as_secs_f64();
    let copied = to.iter().all(|&index| {
        destination
            .get(page(index))
            .is_some_and(|page| page.iter().all(|&byte| byte == 1))
    });
    match copied && seconds > 0.0 {
        true => Ok(f64::from(pages) * size as f64 / seconds / 1e9),
        false => Err(Error::failed("memcpy copied nothing")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_every_page() {
        assert!(bandwidth(4096, 64, 3).unwrap() > 0.0);
        assert!(bandwidth(u64::MAX, 64, 3).is_err());
    }
}
