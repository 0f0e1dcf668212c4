//! The writer's side: a task's source runs are copied, in the order of its planned writes, into bounce buffers, and each
//! filled buffer is sent from when its copies are done.
//!
//! A buffer holds a stretch of the plan: consecutive writes, or parts of long ones. Each becomes one request with one
//! gather element. While one is on its way the next is filled; a lane has at most [`MOST`] that are not sent yet.

use std::{collections::VecDeque, sync::Arc};

use parking_lot::Mutex;

use super::{Batch, Orphan, Staging, finish, start};
use crate::{
    endpoint::{
        StagingError,
        core::remote::Target,
        regions::{Arena, Buffer},
        shared::PoolHandle,
    },
    kv::Plan,
    memory::{Copy, Direction},
};

/// Buffers of one lane that are filled or wait to be sent from.
const MOST: usize = 2;
/// Copies of one buffer: enough to fill it with pieces of some size, few enough not to hold up the driver.
const COPIES: usize = 256;

/// One request's bytes in a buffer.
#[derive(Clone, Copy, Debug)]
pub(in crate::endpoint::core) struct Piece {
    /// The planned write, by number.
    pub(in crate::endpoint::core) write: usize,
    /// First byte of it.
    pub(in crate::endpoint::core) done: u32,
    /// Where the bytes are in the buffer.
    at: u32,
    pub(in crate::endpoint::core) length: u32,
    /// Whether they are the last of the task.
    pub(in crate::endpoint::core) is_last: bool,
}

/// A buffer that is filled, or sent from.
#[derive(Debug)]
struct Chunk {
    push: u64,
    buffer: Arc<Buffer>,
    /// Copies under way.
    batches: Vec<Batch>,
    pieces: Vec<Piece>,
    sent: usize,
    pool: Arc<PoolHandle>,
    orphans: Arc<Mutex<Vec<Orphan>>>,
}

impl Drop for Chunk {
    fn drop(&mut self) {
        if !self.batches.is_empty() {
            self.orphans.lock().push(Orphan {
                push: self.push,
                until: None,
                _buffer: Arc::clone(&self.buffer),
                batches: std::mem::take(&mut self.batches),
                pool: Arc::clone(&self.pool),
            });
        }
    }
}

/// How far a staged task is.
#[derive(Debug)]
pub(in crate::endpoint::core) struct StagedTask {
    pub(in crate::endpoint::core) push: u64,
    pub(in crate::endpoint::core) completes: Option<u32>,
    pool: Arc<PoolHandle>,
    /// The write that is copied next, and its first byte.
    next: usize,
    done: u32,
    chunks: VecDeque<Chunk>,
}

/// What a staged task can do now.
pub(in crate::endpoint::core) enum Ready {
    /// Send this piece: where it is in the arena, and the buffer's number.
    Send(Piece, u64, u32),
    /// Wait for copies or for a buffer.
    Wait,
    /// Everything has been handed over.
    Done,
}

impl StagedTask {
    pub(in crate::endpoint::core) fn new(
        push: u64,
        completes: Option<u32>,
        pool: Arc<PoolHandle>,
    ) -> Self {
        Self {
            push,
            completes,
            pool,
            next: 0,
            done: 0,
            chunks: VecDeque::new(),
        }
    }

    /// Fills free buffers, and says what is to be sent next.
    pub(in crate::endpoint::core) fn ready(
        &mut self,
        plan: &Plan,
        targets: &[Target],
        staging: &mut Staging,
    ) -> Result<Ready, StagingError> {
        while self.chunks.len() < MOST && self.next < plan.writes.len() {
            let Some(arena) = self.pool.record.arena() else {
                let reason = "the pool has no arena".to_owned();
                let kind = crate::memory::MemoryKind::Host;
                return Err(StagingError { kind, reason });
            };
            let Some(buffer) = arena.take_buffer() else {
                break;
            };
            self.fill(&Arc::clone(arena), buffer, plan, targets, staging)?;
        }
        let Some(chunk) = self.chunks.front_mut() else {
            return Ok(match self.next < plan.writes.len() {
                true => Ready::Wait,
                false => Ready::Done,
            });
        };
        if !finish(&chunk.pool, &mut chunk.batches)? {
            return Ok(Ready::Wait);
        }
        let piece = chunk.pieces[chunk.sent];
        let number = chunk.buffer.number;
        Ok(Ready::Send(
            piece,
            chunk.buffer.offset() + u64::from(piece.at),
            number,
        ))
    }

    /// The buffer of the piece that was ready last.
    pub(in crate::endpoint::core) fn buffer(&self) -> Option<&Arc<Buffer>> {
        self.chunks.front().map(|chunk| &chunk.buffer)
    }

    /// The piece that was ready last has become a request.
    pub(in crate::endpoint::core) fn sent(&mut self) {
        if let Some(chunk) = self.chunks.front_mut() {
            chunk.sent += 1;
            if chunk.sent == chunk.pieces.len() {
                self.chunks.pop_front();
            }
        }
    }

    /// Plans what goes into `buffer`, and starts to copy it.
    fn fill(
        &mut self,
        arena: &Arena,
        buffer: Buffer,
        plan: &Plan,
        targets: &[Target],
        staging: &mut Staging,
    ) -> Result<(), StagingError> {
        let mut chunk = Chunk {
            push: self.push,
            buffer: Arc::new(buffer),
            batches: Vec::new(),
            pieces: Vec::new(),
            sent: 0,
            pool: Arc::clone(&self.pool),
            orphans: Arc::clone(&staging.orphans),
        };
        let (room, mut at) = (arena.buffer_bytes(), 0);
        let copies = &mut staging.copies;
        copies.clear();
        let mut region = None;
        let mut started = 0;
        while let Some(write) = plan.writes.get(self.next) {
            if at == room || started + copies.len() >= COPIES {
                break;
            }
            // A request lies in one extent of the destination.
            let target = targets.get(usize::from(write.region));
            let rest = target.and_then(|target| target.at(write.offset + u64::from(self.done)));
            let rest = rest.map_or(1, |(_, _, rest)| rest);
            let length = u64::from((write.length - self.done).min(room - at)).min(rest) as u32;
            let (mut skip, mut left, mut host) =
                (self.done, length, chunk.buffer.address() + u64::from(at));
            for run in plan.sources_of(write) {
                if skip >= run.length {
                    skip -= run.length;
                    continue;
                }
                if left == 0 {
                    break;
                }
                let taken = (run.length - skip).min(left);
                let of = usize::from(run.region);
                if region != Some(of)
                    && let Some(before) = region.replace(of)
                {
                    started += copies.len();
                    let batch = start(&chunk.pool, before, Direction::ToHost, copies);
                    chunk.batches.push(batch?);
                    copies.clear();
                }
                let device = self.pool.record.regions[of].address() + run.offset;
                copies.push(Copy {
                    device: device + u64::from(skip),
                    host,
                    length: taken.into(),
                });
                host += u64::from(taken);
                left -= taken;
                skip = 0;
            }
            let ends = self.done + length == write.length;
            chunk.pieces.push(Piece {
                write: self.next,
                done: self.done,
                at,
                length,
                is_last: ends && self.next + 1 == plan.writes.len(),
            });
            at += length;
            (self.next, self.done) = match ends {
                true => (self.next + 1, 0),
                false => (self.next, self.done + length),
            };
        }
        if let Some(region) = region {
            let batch = start(&chunk.pool, region, Direction::ToHost, copies);
            chunk.batches.push(batch?);
        }
        if !chunk.pieces.is_empty() {
            self.chunks.push_back(chunk);
        }
        Ok(())
    }
}
