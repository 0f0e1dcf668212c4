//! A pool with its memory: filled by the formula, poisoned, verified byte by byte.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicUsize, Ordering},
};

use kvpush::{
    Endpoint, Pool,
    kv::{KvLayout, Plane, region_lengths},
    memory::Memory,
};

use super::{
    POISON, UNUSED,
    block::Block,
    formula::{head_content, page_key},
    threads,
};
use crate::{
    cli::MemoryChoice,
    error::{Context, Error, Result},
    workload::{Side, Workload},
};

/// Bytes read from a pool at a time.
const BLOCK: usize = 64 << 10;

/// One rank's pool and its memory.
pub(crate) struct Cache {
    pub(crate) pool: Option<Pool>,
    layout: KvLayout,
    memory: Vec<Block>,
}

/// What a pool must hold: the seed of the round and the page table of each request in it.
#[derive(Clone, Copy)]
pub(crate) struct Expected<'a> {
    pub(crate) seed: u64,
    pub(crate) tables: &'a [Vec<u32>],
}

/// The first byte that is wrong, and how many are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mismatch {
    pub(crate) bytes: u64,
    pub(crate) first: String,
}

impl Cache {
    /// Allocates the pool of `rank` in memory as asked for.
    pub(crate) fn allocate(
        workload: &Workload,
        side: Side,
        rank: u32,
        memory: MemoryChoice,
    ) -> Result<Self> {
        let layout = workload.layout(side, rank)?;
        let lengths = region_lengths(&layout).context("the pool's regions")?;
        let memory = lengths
            .into_iter()
            .map(|length| Block::allocate(memory, length));
        let memory = memory.collect::<Result<_>>()?;
        Ok(Self {
            pool: None,
            layout,
            memory,
        })
    }

    /// Registers it as a pool.
    pub(crate) fn register(&mut self, endpoint: &Endpoint) -> Result<()> {
        let memory = self.memory.iter().map(Block::memory).collect();
        self.pool = Some(
            endpoint
                .register_pool(self.layout.clone(), memory)
                .context("register the pool")?,
        );
        Ok(())
    }

    /// The pool; an error before [`Cache::register`].
    pub(crate) fn pool(&self) -> Result<&Pool> {
        self.pool
            .as_ref()
            .ok_or_else(|| Error::failed("the pool is not registered"))
    }

    /// The memory of the first region.
    pub(crate) fn first_region(&self) -> Result<Arc<dyn Memory>> {
        self.memory
            .first()
            .map(Block::memory)
            .ok_or_else(|| Error::failed("the pool has no memory"))
    }

    /// What region `region` must hold: `background`, and the content of all requests.
    fn image(
        &self,
        region: usize,
        expected: Expected<'_>,
        background: u8,
        image: &mut Vec<u8>,
    ) -> Result<()> {
        let length = self.memory.get(region).map_or(0, |memory| memory.length());
        image.clear();
        image.resize(
            usize::try_from(length).context("the pool's region")?,
            background,
        );
        for (number, layer) in (0u32..).zip(&self.layout.layers) {
            for plane in layer
                .planes
                .iter()
                .filter(|plane| usize::from(plane.region) == region)
            {
                for (request, table) in (0u32..).zip(expected.tables) {
                    for (position, &page) in (0u32..).zip(table) {
                        let key =
                            page_key(expected.seed, request, number, plane.role as u8, position);
                        page_content(plane, layer.tokens_per_page, page, key, image);
                    }
                }
            }
        }
        Ok(())
    }

    /// Gives every byte the value it must have at the prefill side.
    pub(crate) fn fill(&self, expected: Expected<'_>) -> Result<()> {
        each_region(self.memory.len(), |region, image| {
            self.image(region, expected, UNUSED, image)?;
            match self.memory.get(region) {
                Some(memory) => memory.write(0, image).context("fill the pool"),
                None => Ok(()),
            }
        })
    }

    /// Makes every byte [`POISON`].
    pub(crate) fn poison(&self) -> Result<()> {
        each_region(self.memory.len(), |region, _| {
            match self.memory.get(region) {
                Some(memory) => memory.fill(POISON).context("poison the pool"),
                None => Ok(()),
            }
        })
    }

    /// Compares every byte with what it must be at the decode side. Returns the number of bytes looked at.
    pub(crate) fn verify(&self, expected: Expected<'_>) -> Result<(u64, Option<Mismatch>)> {
        self.verify_against(expected, POISON)
    }

    /// The same for a pool filled as a source.
    pub(crate) fn verify_source(&self, expected: Expected<'_>) -> Result<(u64, Option<Mismatch>)> {
        self.verify_against(expected, UNUSED)
    }

    fn verify_against(
        &self,
        expected: Expected<'_>,
        background: u8,
    ) -> Result<(u64, Option<Mismatch>)> {
        let found = Mutex::new(None::<(usize, Mismatch)>);
        each_region(self.memory.len(), |region, image| {
            self.image(region, expected, background, image)?;
            let Some(memory) = self.memory.get(region) else {
                return Ok(());
            };
            if let Some(bad) = self.compare(region, memory, image)? {
                let mut found = found
                    .lock()
                    .unwrap_or_else(std::sync::PoisonError::into_inner);
                let bytes = found.as_ref().map_or(0, |(_, first)| first.bytes) + bad.bytes;
                let first = match found.take() {
                    Some((before, first)) if before < region => (before, first),
                    _ => (region, bad),
                };
                *found = Some((first.0, Mismatch { bytes, ..first.1 }));
            }
            Ok(())
        })?;
        let bytes = self.memory.iter().map(|memory| memory.length()).sum();
        let found = found
            .into_inner()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        Ok((bytes, found.map(|(_, mismatch)| mismatch)))
    }

    fn compare(&self, region: usize, memory: &Block, image: &[u8]) -> Result<Option<Mismatch>> {
        let mut block = vec![0; BLOCK.min(image.len())];
        let (mut bad, mut first) = (0u64, None);
        for (start, expected) in (0..).step_by(BLOCK).zip(image.chunks(BLOCK)) {
            let Some(block) = block.get_mut(..expected.len()) else {
                break;
            };
            memory.read(start as u64, block).context("read the pool")?;
            if block == expected {
                continue;
            }
            for (index, (found, expected)) in (start..).zip(block.iter().zip(expected)) {
                if found != expected {
                    bad += 1;
                    first.get_or_insert((index, *found, *expected));
                }
            }
        }
        Ok(first.map(|(offset, found, expected)| Mismatch {
            bytes: bad,
            first: format!(
                "{}region {region}, byte {offset}: {found:#04x} instead of {expected:#04x}{}",
                self.place(region, offset as u64),
                if found == POISON {
                    " (never written)"
                } else {
                    ""
                },
            ),
        }))
    }

    /// Names the layer, plane and page of a byte.
    fn place(&self, region: usize, offset: u64) -> String {
        for (number, layer) in self.layout.layers.iter().enumerate() {
            for plane in layer
                .planes
                .iter()
                .filter(|plane| usize::from(plane.region) == region)
            {
                let Some(within) = offset.checked_sub(plane.offset) else {
                    continue;
                };
                let Some(page) = within.checked_div(plane.page_stride) else {
                    continue;
                };
                let inside =
                    within - page * plane.page_stride < page_extent(plane, layer.tokens_per_page);
                if page < u64::from(self.layout.pages) && inside {
                    return format!("layer {number}, {}, page {page}: ", plane.role);
                }
            }
        }
        String::new()
    }

    /// Flips one bit of a page that `expected` owns.
    pub(crate) fn damage(&self, expected: Expected<'_>) -> Result<()> {
        let plane = self
            .layout
            .layers
            .first()
            .and_then(|layer| layer.planes.first());
        let page = expected.tables.first().and_then(|table| table.first());
        let (Some(plane), Some(&page)) = (plane, page) else {
            return Ok(());
        };
        let Some(memory) = self.memory.get(usize::from(plane.region)) else {
            return Ok(());
        };
        let offset = plane.offset + u64::from(page) * plane.page_stride;
        let mut byte = [0];
        memory.read(offset, &mut byte).context("plant an error")?;
        memory
            .write(offset, &[byte[0] ^ 1])
            .context("plant an error")
    }
}

/// Bytes from a page's first to its last.
fn page_extent(plane: &Plane, tokens: u32) -> u64 {
    u64::from(tokens.saturating_sub(1)) * plane.token_stride
        + u64::from(plane.heads.count.saturating_sub(1)) * plane.head_stride
        + u64::from(plane.head_bytes)
}

fn page_content(plane: &Plane, tokens: u32, page: u32, key: u64, image: &mut [u8]) {
    let start = plane.offset + u64::from(page) * plane.page_stride;
    for token in 0..tokens {
        for head in 0..plane.heads.count {
            let at =
                start + u64::from(token) * plane.token_stride + u64::from(head) * plane.head_stride;
            let at = at as usize;
            // The layout was validated against the memory, so the range exists.
            if let Some(out) = image.get_mut(at..at + plane.head_bytes as usize) {
                head_content(key, token, plane.heads.first + head, out);
            }
        }
    }
}

/// Runs `work` for every region, on all cores; each thread has one buffer.
fn each_region(
    regions: usize,
    work: impl Fn(usize, &mut Vec<u8>) -> Result<()> + Sync,
) -> Result<()> {
    let next = AtomicUsize::new(0);
    let failure = Mutex::new(None);
    std::thread::scope(|scope| {
        for _ in 0..threads().min(regions as u64) {
            scope.spawn(|| {
                let mut buffer = Vec::new();
                loop {
                    let region = next.fetch_add(1, Ordering::Relaxed);
                    if region >= regions {
                        break;
                    }
                    if let Err(error) = work(region, &mut buffer) {
                        let mut failure = failure
                            .lock()
                            .unwrap_or_else(std::sync::PoisonError::into_inner);
                        failure.get_or_insert(error);
                        break;
                    }
                }
            });
        }
    });
    match failure
        .into_inner()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
    {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        cli::{LayoutChoice, Op},
        content::Random,
    };
    use kvpush::kv::models;

    fn workload(layout: LayoutChoice) -> Workload {
        let mut workload = Workload::of_model(&models::LLAMA_3_1_8B, 2, 4);
        (
            workload.layers,
            workload.requests,
            workload.pages,
            workload.layout,
        ) = (2, 2, 3, layout);
        workload
    }

    /// What verification must accept: a decode pool written by the formula itself.
    fn written(workload: &Workload, rank: u32, expected: Expected<'_>) -> Cache {
        let cache = Cache::allocate(workload, Side::Decode, rank, MemoryChoice::HOST).unwrap();
        let mut image = Vec::new();
        for (region, memory) in cache.memory.iter().enumerate() {
            cache.image(region, expected, POISON, &mut image).unwrap();
            memory.write(0, &image).unwrap();
        }
        cache
    }

    #[test]
    fn every_single_flipped_byte_is_found() {
        for layout in [LayoutChoice::Flash, LayoutChoice::Hnd, LayoutChoice::Sglang] {
            let workload = workload(layout);
            let tables = workload.page_tables(Side::Decode, 5).unwrap();
            let expected = Expected {
                seed: 77,
                tables: &tables,
            };
            let cache = written(&workload, 3, expected);
            let (bytes, bad) = cache.verify(expected).unwrap();
            assert_eq!(
                (bytes, bad),
                (
                    cache.memory.iter().map(|memory| memory.length()).sum(),
                    None
                )
            );
            let mut random = Random::new(1);
            for _ in 0..10 {
                let region = random.next() as usize % cache.memory.len();
                let memory = &cache.memory[region];
                let at = random.next() % memory.length();
                let mut byte = [0];
                memory.read(at, &mut byte).unwrap();
                memory.write(at, &[!byte[0]]).unwrap();
                let bad = cache.verify(expected).unwrap().1.expect("a flipped byte");
                assert_eq!(bad.bytes, 1);
                assert!(
                    bad.first.contains(&format!("region {region}, byte {at}:")),
                    "{}",
                    bad.first
                );
                memory.write(at, &byte).unwrap();
            }
        }
    }

    #[test]
    fn prefill_and_decode_agree_on_the_bytes_of_a_page() {
        // One rank each, the same layout: the page at position 1 of request 0 is the same bytes, wherever it lies.
        let workload = Workload {
            requests: 2,
            pages: 3,
            ..Workload::raw(Op::Push, 100)
        };
        let (from, to) = (
            workload.page_tables(Side::Prefill, 5).unwrap(),
            workload.page_tables(Side::Decode, 5).unwrap(),
        );
        let source = Cache::allocate(&workload, Side::Prefill, 0, MemoryChoice::HOST).unwrap();
        source
            .fill(Expected {
                seed: 7,
                tables: &from,
            })
            .unwrap();
        let target = Cache::allocate(&workload, Side::Decode, 0, MemoryChoice::HOST).unwrap();
        target.poison().unwrap();
        let expected = Expected {
            seed: 7,
            tables: &to,
        };
        assert_eq!(
            target.verify(expected).unwrap().1.unwrap().bytes / 500,
            1,
            "nearly all of 6 pages of 100 bytes"
        );
        let mut page = [0; 100];
        for (from, to) in from.concat().iter().zip(to.concat()) {
            source.memory[0]
                .read(u64::from(*from) * 100, &mut page)
                .unwrap();
            target.memory[0].write(u64::from(to) * 100, &page).unwrap();
        }
        assert_eq!(target.verify(expected).unwrap().1, None);
        target.damage(expected).unwrap();
        assert_eq!(target.verify(expected).unwrap().1.unwrap().bytes, 1);
    }
}
