//! Tests of the offset arithmetic: all small cases, and random large ones.

use proptest::prelude::*;

use super::*;

const PAGES: [u64; 3] = [4 << 10, 64 << 10, 2 << 20];

fn span(address: u64, length: u64) -> Span {
    Span { address, length }
}

/// Every range and every export of a small world, with pages of four bytes.
#[test]
fn all_small_cases() {
    const PAGE: u64 = 4;
    const WORLD: u64 = 20;
    let mut inside = 0;
    for base in 0..WORLD {
        for size in 1..=WORLD - base {
            let exported = span(base, size);
            let rounded = round_out(exported, PAGE).unwrap();
            assert!(rounded.contains(exported));
            assert!(rounded.address.is_multiple_of(PAGE) && rounded.length.is_multiple_of(PAGE));
            // The smallest: a page less at either end would lose a byte.
            assert!(exported.address - rounded.address < PAGE);
            assert!(rounded.end().unwrap() - exported.end().unwrap() < PAGE);
            for address in 0..WORLD {
                for length in 0..=WORLD - address {
                    let memory = span(address, length);
                    let all_in = length > 0 && address >= base && address + length <= base + size;
                    let found = offset_within(exported, 7, memory);
                    assert_eq!(found, all_in.then(|| 7 + address - base));
                    inside += u32::from(all_in);
                }
            }
        }
    }
    assert!(inside > 1000);
}

/// Every cut of a small world: the chunks are the range, in order, none too long, all cuts on pages.
#[test]
fn all_small_cuts() {
    const PAGE: u64 = 4;
    for address in 0..12 {
        for length in 0..24 {
            for offset in 0..12 {
                for max in 0..20 {
                    let range = span(address, length);
                    let allowed = length > 0 && max >= PAGE && offset % PAGE == address % PAGE;
                    let Some(cut) = chunks(range, offset, max, PAGE) else {
                        assert!(!allowed, "{range:?} at {offset}, at most {max}");
                        continue;
                    };
                    assert!(allowed);
                    check(range, offset, max, PAGE, &cut.collect::<Vec<_>>());
                }
            }
        }
    }
}

fn check(range: Span, offset: u64, max: u64, page: u64, cut: &[Chunk]) {
    let mut at = range.address;
    for chunk in cut {
        assert_eq!(chunk.span.address, at);
        assert_eq!(chunk.offset, offset + (at - range.address));
        assert!(chunk.span.length > 0 && chunk.span.length <= max);
        assert!(share_page_offset(chunk.offset, chunk.span.address, page));
        at += chunk.span.length;
        assert!(at == range.end().unwrap() || at.is_multiple_of(page));
    }
    assert_eq!(at, range.end().unwrap());
    // No more chunks than needed: each but the last reaches as far as a page boundary lets it.
    for pair in cut.windows(2) {
        assert!(pair[0].span.length + page > max, "{pair:?}");
    }
}

#[test]
fn nothing_wraps_around() {
    let top = u64::MAX;
    assert_eq!(round_out(span(top - 10, 10), 4096), None);
    assert_eq!(round_out(span(top - 10, 20), 4096), None);
    assert_eq!(round_out(span(0, 1), 3), None);
    assert_eq!(round_out(span(0, 1), 0), None);
    assert_eq!(round_out(span(4096, 0), 4096), None);
    assert_eq!(
        offset_within(span(0, 4096), top - 4095, span(0, 4096)),
        None
    );
    assert_eq!(offset_within(span(0, 4096), top, span(1, 1)), None);
    assert_eq!(
        offset_within(span(top - 5, 10), 0, span(top - 5, 1)),
        None,
        "no such export"
    );
    assert!(chunks(span(top - 4096, 8192), 4095, 4096, 4096).is_none());
    assert!(chunks(span(0, 8192), top - 4095, 4096, 4096).is_none());
    assert!(chunks(span(0, 1), 0, top, 0).is_none());
    assert!(!share_page_offset(0, 0, 0));
}

/// Allocations of GPU pages and sub-allocations that begin at any byte of them.
#[test]
fn gpu_pages_over_host_pages() {
    for gpu_page in PAGES {
        let allocation = span(gpu_page * 3, gpu_page * 2);
        for at in [0, 1, 511, 512, 4095, 4096, 4097, gpu_page - 1, gpu_page] {
            let memory = span(allocation.address + at, 513);
            let offset = offset_within(allocation, 0, memory).unwrap();
            assert_eq!(offset, at);
            for host_page in PAGES.into_iter().filter(|page| *page <= gpu_page) {
                assert!(share_page_offset(offset, memory.address, host_page));
            }
        }
        // Exported into the middle of a host page, offsets and addresses no longer agree.
        assert!(!share_page_offset(512, allocation.address, 4096));
    }
}

proptest! {
    /// A byte of memory that lies at an address is at the same byte of the file, whatever is exported and cut.
    #[test]
    fn the_byte_stays_the_byte(
        base in 0u64..1 << 48,
        size in 1u64..1 << 40,
        lead in 0u64..1 << 30,
        from in 0.0f64..1.0,
        part in 0.0f64..1.0,
        page in prop::sample::select(&PAGES[..]),
        max in 1u64..1 << 38,
    ) {
        let exported = round_out(span(base, size), page).unwrap();
        let lead = lead & !(page - 1);
        let start = base + (size as f64 * from) as u64;
        let memory = span(start, (((base + size - start) as f64 * part) as u64).max(1).min(base + size - start).max(1));
        prop_assume!(exported.contains(memory));
        let offset = offset_within(exported, lead, memory).unwrap();
        prop_assert_eq!(offset - lead, memory.address - exported.address);
        prop_assert!(share_page_offset(offset, memory.address, page));
        let max = max.max(page).max(memory.length / 1000);
        let cut: Vec<_> = chunks(memory, offset, max, page).unwrap().collect();
        check(memory, offset, max, page, &cut);
    }
}
