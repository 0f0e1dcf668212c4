//! Pools whose content both processes know without talking, large enough that a push takes its time.

use kvpush::{
    Endpoint,
    kv::{
        Dtype, HeadRange, KvLayout,
        presets::{Arrangement, HeadOrder, KvShape, Stacking},
    },
    memory::Memory,
};

use crate::{
    fixture::{Cache, POISON, Random},
    mover,
};

/// Layers of [`large`].
pub(crate) const LARGE_LAYERS: usize = 16;
/// Pages of [`large`].
pub(crate) const LARGE_PAGES: u32 = 512;

/// Bytes of pattern before it is repeated, shifted by one.
const BLOCK: usize = 64 << 10;

/// 8 KiB for each page and layer.
pub(crate) fn layout(layers: u32, pages: u32) -> KvLayout {
    let shape = KvShape {
        layers,
        tokens_per_page: 16,
        heads: HeadRange::new(0, 4),
        head_dim: 32,
        dtype: Dtype::Bf16,
    };
    shape
        .layout(
            pages,
            Arrangement::KeysThenValues,
            HeadOrder::TokenMajor,
            Stacking::RegionPerLayer,
        )
        .expect("a layout")
}

/// 64 MiB: far more than the sockets between two processes hold.
pub(crate) fn large() -> KvLayout {
    layout(LARGE_LAYERS as u32, LARGE_PAGES)
}

/// A pool with the content of `seed`.
pub(crate) fn filled(endpoint: &Endpoint, layout: &KvLayout, seed: u64) -> Cache {
    let cache = Cache::poisoned(endpoint, layout);
    for (region, memory) in cache.memory.iter().enumerate() {
        let bytes = pattern(seed, region, memory.length());
        memory.write(0, &bytes).expect("in range");
    }
    cache
}

/// The content of one region: random, and no two pages are alike.
fn pattern(seed: u64, region: usize, length: u64) -> Vec<u8> {
    let mut random = Random(seed ^ ((region as u64 + 1) << 40));
    let mut block: Vec<u8> = (0..BLOCK / 8)
        .flat_map(|_| random.next().to_le_bytes())
        .collect();
    let mut bytes = Vec::with_capacity(length as usize + BLOCK);
    while (bytes.len() as u64) < length {
        bytes.extend_from_slice(&block);
        block.rotate_left(1);
    }
    bytes.truncate(length as usize);
    bytes
}

/// Checks that of a pool that was poisoned, exactly `layers` of `pages` (source, destination) have the content of
/// `seed`, and that nothing else has changed. Says what is wrong.
pub(crate) fn check(
    cache: &Cache,
    seed: u64,
    pages: &[(u32, u32)],
    layers: impl IntoIterator<Item = usize>,
) -> Result<(), String> {
    let lengths: Vec<u64> = cache.memory.iter().map(|memory| memory.length()).collect();
    let source: Vec<Vec<u8>> = (0..lengths.len())
        .map(|region| pattern(seed, region, lengths[region]))
        .collect();
    let mut expected: Vec<Vec<u8>> = lengths
        .iter()
        .map(|&length| vec![POISON; length as usize])
        .collect();
    let layout = &cache.layout;
    for layer in layers {
        mover::copy_layer(
            (layout, &source),
            (layout, &mut expected),
            layer,
            pages,
            HeadRange::new(0, 4),
        );
    }
    for (region, (found, expected)) in cache.bytes().iter().zip(&expected).enumerate() {
        if found != expected {
            let differing = || (0..expected.len()).filter(|&at| found[at] != expected[at]);
            let (count, first) = (differing().count(), differing().next().unwrap_or_default());
            return Err(format!(
                "region {region}: {count} bytes differ, the first at {first}: {:#x} instead of {:#x}",
                found[first], expected[first]
            ));
        }
    }
    Ok(())
}

/// Overwrites everything with [`POISON`].
pub(crate) fn poison(cache: &Cache) {
    for memory in &cache.memory {
        memory.fill(0, memory.length(), POISON).expect("in range");
    }
}

/// Bytes that are not [`POISON`].
pub(crate) fn changed(cache: &Cache) -> usize {
    let clean = vec![POISON; BLOCK];
    let mut found = vec![0; BLOCK];
    let mut changed = 0;
    for memory in &cache.memory {
        for offset in (0..memory.length()).step_by(BLOCK) {
            let count = (memory.length() - offset).min(BLOCK as u64) as usize;
            memory.read(offset, &mut found[..count]).expect("in range");
            // The whole block at once first: this is all that is done while nothing has changed.
            if found[..count] != clean[..count] {
                changed += found[..count]
                    .iter()
                    .filter(|&&byte| byte != POISON)
                    .count();
            }
        }
    }
    changed
}

#[test]
fn a_single_wrong_byte_is_found() {
    let endpoint = crate::process::Over::Tcp.fabric().endpoint("alone");
    let layout = layout(2, 8);
    let pairs: Vec<(u32, u32)> = (0..8).map(|page| (page, page)).collect();
    let cache = filled(&endpoint, &layout, 3);
    check(&cache, 3, &pairs, 0..2).expect("as filled");
    assert!(check(&cache, 4, &pairs, 0..2).is_err(), "another seed");
    assert!(
        check(&cache, 3, &pairs[1..], 0..2).is_err(),
        "a page too many"
    );
    assert!(check(&cache, 3, &pairs, 0..1).is_err(), "a layer too many");
    poison(&cache);
    assert_eq!(changed(&cache), 0);
    check(&cache, 3, &[], 0..2).expect("as poisoned");
    let last = cache.memory[1].length() - 1;
    cache.memory[1].write(last, &[POISON ^ 1]).unwrap();
    assert_eq!(changed(&cache), 1);
    assert!(check(&cache, 3, &[], 0..2).is_err());
}
