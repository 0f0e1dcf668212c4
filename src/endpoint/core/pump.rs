//! From queued work to posted requests.
//!
//! Work is planned only when its turn on the lane comes, so memory does not grow with what is queued, and requests
//! are built in buffers that are used again: in steady state nothing here allocates.
//!
//! Slots come first: a request is built only after its send-queue slot, and the peer's receive if it carries an
//! immediate, have been taken. When there are none the lane waits for completions or credits.
//!
//! A page costs what [`Work::build_pages`] does for its write, and what the planner, unless the pages have been planned
//! for a layer of the same geometry, and the fabric do; all else is done once for each batch. `cargo xtask instructions`
//! counts it.

use std::{collections::BTreeMap, ops::Range, sync::Arc};

use super::{
    AccessEntry, Core, PushEntry, Rail,
    cut::{cut, limits},
    remote::Target,
    session::Lane,
    staging::{Ready, StagedTask, Staging},
};
use crate::{
    endpoint::{
        PeerError, control::ConnId, prepared::PageList, regions::Region,
        telemetry::meters::RailMeters,
    },
    fabric::{FabricError, LocalKey, Opcode, RemoteKey, Sge, WorkRequest},
    kv::plan::Translation,
    protocol::Batch,
};

/// Requests handed to a device at once.
const BATCH: usize = 64;

/// Whose request it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Owner {
    Push(u64),
    Access(u64),
    /// A push, from a bounce buffer.
    Staged {
        push: u64,
        buffer: u32,
    },
}

/// Work for one lane.
#[derive(Debug)]
pub(super) enum Task {
    /// Pages of one block of one layer: `source[from .. from + count]` go to the positions from `first`.
    Pages {
        push: u64,
        layer: u32,
        part: u32,
        first: u32,
        source: Arc<PageList>,
        from: u32,
        count: u32,
        /// Whether this is the last of its part, and so carries the immediate.
        completes: bool,
        bytes: u64,
    },
    /// The tail, which the push has ready.
    Tail { push: u64, part: u32, bytes: u64 },
    /// A one-sided access.
    Access { access: u64, bytes: u64 },
}

impl Task {
    /// Its payload.
    pub(super) fn bytes(&self) -> u64 {
        match self {
            Self::Pages { bytes, .. } | Self::Tail { bytes, .. } | Self::Access { bytes, .. } => {
                *bytes
            }
        }
    }

    pub(super) fn owner(&self) -> Owner {
        match self {
            Self::Pages { push, .. } | Self::Tail { push, .. } => Owner::Push(*push),
            Self::Access { access, .. } => Owner::Access(*access),
        }
    }

    /// Push and part, if it is of a push.
    pub(super) fn part(&self) -> Option<(u64, u32)> {
        match self {
            Self::Pages { push, part, .. } | Self::Tail { push, part, .. } => Some((*push, *part)),
            Self::Access { .. } => None,
        }
    }

    /// Push and part, if it ends with an immediate.
    pub(super) fn immediate(&self) -> Option<(u64, u32)> {
        match self {
            Self::Pages { completes, .. } => self.part().filter(|_| *completes),
            _ => self.part(),
        }
    }
}

/// The task a lane is posting, planned.
#[derive(Debug)]
pub(super) enum Current {
    /// The lane's plan, from write `next` on.
    Pages {
        push: u64,
        next: usize,
        /// Bytes of that write that have been posted, if it is cut.
        done: u32,
        completes: Option<u32>,
    },
    /// The lane's plan, through bounce buffers.
    Staged(Box<StagedTask>),
    Tail {
        push: u64,
    },
    /// From byte `done` on.
    Access {
        access: u64,
        done: u64,
    },
}

/// Buffers that are used again.
#[derive(Default)]
pub(super) struct Scratch {
    requests: Vec<WorkRequest>,
    sges: Vec<Sge>,
    batches: Vec<Batch<Owner>>,
    retired: Vec<Batch<Owner>>,
}

impl Scratch {
    /// The number of the next request that is built.
    fn next_sequence(&self, lane: &Lane) -> u64 {
        lane.ledger.next_sequence() + self.requests.len() as u64
    }

    /// Notes whose the last requests are.
    fn belongs(&mut self, owner: Owner, requests: u32, bytes: u64) {
        match self.batches.last_mut() {
            Some(last) if last.owner == owner => {
                last.requests += requests;
                last.bytes += bytes;
            }
            _ => self.batches.push(Batch {
                owner,
                requests,
                bytes,
            }),
        }
    }
}

/// Requests of a lane after which one is signalled: a quarter of its queue.
fn signal_every(lane: &Lane) -> u32 {
    (lane.config.send_depth / 4).max(1)
}

/// Adds the requests for some writes of the lane's plan; the last carries `imm`, if there is one. Their slots have been
/// taken. This is what each page costs. `None` if a region has no key, and then nothing has been added.
fn build_pages(
    scratch: &mut Scratch,
    lane: &mut Lane,
    push: u64,
    ends: &Ends<'_>,
    range: Range<usize>,
    imm: Option<u32>,
) -> Option<()> {
    let first_id = scratch.next_sequence(lane);
    let (built, gathered) = (scratch.requests.len(), scratch.sges.len());
    let (plan, translation) = (lane.plan(), &lane.translation);
    let writes = plan.writes.get(range)?;
    let (Some(first), Some(last)) = (writes.first(), writes.last()) else {
        return Some(());
    };
    // The runs of consecutive writes follow each other.
    let end = last.first_source as usize + last.source_count as usize;
    let runs = plan.sources.get(first.first_source as usize..end)?;
    let mut source = Memo::new(|region| ends.source(translation, region));
    scratch.sges.extend(runs.iter().map(|run| {
        let (address, key) = source.of(run.region);
        Sge {
            address: address.wrapping_add(run.offset),
            length: run.length,
            key,
        }
    }));
    let mut target = Memo::new(|region| ends.target(translation, region));
    let mut bytes = 0;
    let mut first_sge = gathered as u32;
    scratch
        .requests
        .extend((first_id..).zip(writes).map(|(id, write)| {
            let (address, remote_key) = target.of(write.region);
            bytes += u64::from(write.length);
            let first = first_sge;
            first_sge += write.source_count;
            WorkRequest {
                id,
                opcode: Opcode::Write,
                remote_address: address.wrapping_add(write.offset),
                remote_key,
                first_sge: first,
                sge_count: write.source_count,
                signaled: false,
                inline: false,
            }
        }));
    if source.is_missing || target.is_missing {
        scratch.requests.truncate(built);
        scratch.sges.truncate(gathered);
        return None;
    }
    let count = scratch.requests.len() - built;
    if let (Some(imm), Some(last)) = (imm, scratch.requests.last_mut()) {
        last.opcode = Opcode::WriteImm(imm);
    }
    // As `request` would have counted them.
    let every = signal_every(lane) as usize;
    let unsignalled = lane.unsignalled as usize;
    let until = every - 1 - unsignalled.min(every - 1);
    for request in scratch.requests[built..]
        .iter_mut()
        .skip(until)
        .step_by(every)
    {
        request.signaled = true;
    }
    lane.unsignalled = ((unsignalled + count) % every) as u32;
    scratch.belongs(Owner::Push(push), count as u32, bytes);
    Some(())
}

/// Looks places up by region, and remembers the last: neighbours are in the same region as a rule.
struct Memo<K, F> {
    find: F,
    region: u32,
    found: (u64, K),
    /// Whether there was a region without a place.
    is_missing: bool,
}

impl<K: Copy + Default, F: FnMut(u16) -> Option<(u64, K)>> Memo<K, F> {
    fn new(find: F) -> Self {
        Self {
            find,
            // None has this number.
            region: u32::MAX,
            found: (0, K::default()),
            is_missing: false,
        }
    }

    #[inline]
    fn of(&mut self, region: u16) -> (u64, K) {
        if self.region != u32::from(region) {
            self.look_up(region);
        }
        self.found
    }

    #[cold]
    fn look_up(&mut self, region: u16) {
        self.region = region.into();
        match (self.find)(region) {
            Some(found) => self.found = found,
            None => self.is_missing = true,
        }
    }
}

/// Makes the lane's plan that of `count` pages of a list, from its index `from` and the grant's position `first` on.
fn plan(
    lane: &mut Lane,
    push: &PushEntry,
    layer: u32,
    list: &PageList,
    (first, from, count): (u32, u32, u32),
) {
    lane.kept = None;
    lane.plan.clear();
    lane.translation.reset();
    let Some(planner) = push.planner.as_deref() else {
        return;
    };
    // Whatever else there is to do for each piece of a cut or a staged write reads the lane's own plan.
    let keeps = planner.layers() > 1 && !push.is_staged && !push.is_cut();
    if keeps {
        let fits = |known| planner.translate(known, layer, &mut lane.translation);
        lane.kept = list.plan(from, fits);
        if lane.kept.is_some() {
            return;
        }
    }
    let (source, first, count) = (from as usize, first as usize, count as usize);
    let pages = list
        .pages
        .get(source..source + count)
        .zip(push.destination().get(first..first + count));
    let planned = pages.map(|(from, to)| planner.plan(layer, from, to, &mut lane.plan));
    // Pages and layers were checked when they were handed over, and the peer's layout when the push was opened.
    debug_assert!(matches!(planned, Some(Ok(()))), "{planned:?}");
    if keeps && list.is_repeated() {
        list.keep(from, layer, &lane.plan);
    }
}

/// Where a push's regions are, by the lane that is posted to.
struct Ends<'a> {
    rail: usize,
    source: &'a [Region],
    target: &'a [Target],
}

impl Ends<'_> {
    /// Address and key of a source region, as it is for the offsets of the plan.
    fn source(&self, translation: &Translation, region: u16) -> Option<(u64, LocalKey)> {
        let (region, by) = translation.source(region);
        let rails = self.source.get(usize::from(region))?.rails();
        let (address, key, _) = rails.get(self.rail)?.at(0)?;
        Some((address.wrapping_add(by), key))
    }

    /// The same for a destination region.
    fn target(&self, translation: &Translation, region: u16) -> Option<(u64, RemoteKey)> {
        let (region, by) = translation.destination(region);
        let (address, key) = self.target.get(usize::from(region))?.first();
        Some((address.wrapping_add(by), key))
    }
}

/// What a post needs from outside of the lane.
struct Work<'a> {
    rail: &'a mut Rail,
    /// Where it is counted.
    meters: Option<&'a RailMeters>,
    pushes: &'a mut BTreeMap<u64, PushEntry>,
    accesses: &'a mut BTreeMap<u64, AccessEntry>,
    scratch: &'a mut Scratch,
    staging: &'a mut Staging,
}

impl Core {
    /// Posts what can be posted on `lane`.
    pub(super) fn pump(&mut self, conn: ConnId, index: usize) {
        let Some(session) = self.sessions.get_mut(&conn) else {
            return;
        };
        let Some(lane) = session.lanes.get_mut(index) else {
            return;
        };
        if lane.current.is_none() && lane.queue.is_empty() || !lane.works(&self.rails) {
            return;
        }
        let mut work = Work {
            rail: &mut self.rails[lane.rail],
            meters: session.meters.as_ref().and_then(|m| m.rail(lane.rail)),
            pushes: &mut self.pushes,
            accesses: &mut self.accesses,
            scratch: &mut self.scratch,
            staging: &mut self.staging,
        };
        let result = work.run(lane);
        if let Some(Current::Staged(_)) = lane.current {
            work.staging.watch(conn, index);
        }
        if let Err(source) = result {
            let error = PeerError::Fabric {
                peer: session.name(),
                source: source.into(),
            };
            self.lane_failed(conn, index, error);
        }
        if !self.staging.failed.is_empty() {
            self.fail_staged();
        }
    }

    /// A signalled request and all before it have completed.
    pub(super) fn sent(&mut self, conn: ConnId, index: usize, id: u64) {
        let Some(session) = self.sessions.get_mut(&conn) else {
            return;
        };
        let Some(lane) = session.lanes.get_mut(index) else {
            return;
        };
        let mut retired = std::mem::take(&mut self.scratch.retired);
        retired.clear();
        let Some(count) = lane.ledger.complete(id, |batch| retired.push(batch)) else {
            // A device that completes what was not posted is not to be trusted with memory.
            self.scratch.retired = retired;
            self.violation(
                conn,
                &format!("completion {id} of a request that is not in flight"),
            );
            return;
        };
        lane.send.retire(count);
        lane.backoff.proven();
        let (load, pushes) = (&mut lane.load, &mut self.pushes);
        lane.replay.complete(id, |task| {
            *load -= task.bytes();
            if let Owner::Push(id) = task.owner()
                && let Some(push) = pushes.get_mut(&id)
            {
                push.bytes += task.bytes();
            }
        });
        for batch in &retired {
            self.retire(*batch);
        }
        self.scratch.retired = retired;
        self.pump(conn, index);
    }

    /// Requests of a push or an access are no longer in flight.
    pub(super) fn retire(&mut self, batch: Batch<Owner>) {
        match batch.owner {
            Owner::Push(id) => {
                let Some(push) = self.pushes.get_mut(&id) else {
                    return;
                };
                let action = push.machine.retired(batch.requests);
                self.push_action(id, action);
            }
            Owner::Access(id) => self.access_retired(id, batch.requests),
            Owner::Staged { push, buffer } => {
                self.staging.retired(buffer, batch.requests);
                let owner = Owner::Push(push);
                self.retire(Batch { owner, ..batch });
            }
        }
    }
}

impl Work<'_> {
    fn run(&mut self, lane: &mut Lane) -> Result<(), FabricError> {
        self.scratch.requests.clear();
        self.scratch.sges.clear();
        self.scratch.batches.clear();
        loop {
            if lane.current.is_none() && !self.next_task(lane) {
                break;
            }
            if !self.fill(lane)? {
                if let Some(meters) = self.meters {
                    meters.stalls.add(1);
                }
                break;
            }
            lane.current = None;
            let end = self.next_sequence(lane);
            if let Some(task) = lane.replay.close(end) {
                lane.load -= task.bytes();
            }
        }
        self.flush(lane)
    }

    /// The number of the next request that is built.
    fn next_sequence(&self, lane: &Lane) -> u64 {
        self.scratch.next_sequence(lane)
    }

    /// Takes the next task that is still wanted and plans it.
    fn next_task(&mut self, lane: &mut Lane) -> bool {
        while let Some(task) = lane.queue.pop_front() {
            let current = match &task {
                Task::Pages {
                    push: id,
                    layer,
                    part,
                    first,
                    source,
                    from,
                    count,
                    completes,
                    ..
                } => {
                    let push = self.pushes.get_mut(id);
                    let Some(push) = push.filter(|push| push.machine.may_post()) else {
                        lane.load -= task.bytes();
                        continue;
                    };
                    plan(lane, push, *layer, source, (*first, *from, *count));
                    let completes = completes.then(|| push.imm(*part));
                    match push.is_staged {
                        true => {
                            let source = Arc::clone(&push.source);
                            Current::Staged(Box::new(StagedTask::new(*id, completes, source)))
                        }
                        false => Current::Pages {
                            push: *id,
                            next: 0,
                            done: 0,
                            completes,
                        },
                    }
                }
                Task::Tail { push, .. } => Current::Tail { push: *push },
                Task::Access { access, .. } => Current::Access {
                    access: *access,
                    done: 0,
                },
            };
            lane.current = Some(current);
            lane.replay.begin(task, self.next_sequence(lane));
            return true;
        }
        false
    }

    /// Builds the requests of the current task. Returns whether all of it has been built.
    fn fill(&mut self, lane: &mut Lane) -> Result<bool, FabricError> {
        match lane.current {
            None => Ok(true),
            Some(Current::Staged(_)) => self.fill_staged(lane),
            Some(Current::Pages {
                push,
                next,
                done,
                completes,
            }) => match self.pushes.get(&push).is_some_and(PushEntry::is_cut) {
                true => self.fill_cut_pages(lane, push, (next, done), completes),
                false => self.fill_pages(lane, push, next, completes),
            },
            Some(Current::Tail { push }) => self.fill_tail(lane, push),
            Some(Current::Access { access, done }) => self.fill_access(lane, access, done),
        }
    }

    fn fill_pages(
        &mut self,
        lane: &mut Lane,
        id: u64,
        mut next: usize,
        completes: Option<u32>,
    ) -> Result<bool, FabricError> {
        let total = lane.plan().writes.len();
        while next < total {
            let current = Current::Pages {
                push: id,
                next,
                done: 0,
                completes,
            };
            let room = BATCH.saturating_sub(self.scratch.requests.len());
            if room == 0 {
                lane.current = Some(current);
                self.flush(lane)?;
                continue;
            }
            let wanted = room.min(total - next);
            let ends = completes.is_some() && next + wanted == total;
            let count = lane.send.take_some(wanted as u32, ends) as usize;
            let Some(push) = self.pushes.get(&id) else {
                return Ok(true);
            };
            let Some(target) = push.targets(lane) else {
                return Ok(true);
            };
            let ends = Ends {
                rail: lane.rail,
                source: &push.source.record.regions,
                target,
            };
            let imm = completes.filter(|_| next + count == total);
            if build_pages(self.scratch, lane, id, &ends, next..next + count, imm).is_none() {
                // A session has no lane on a rail that does not reach the pool.
                return Ok(true);
            }
            next += count;
            if count < wanted {
                lane.current = Some(Current::Pages {
                    push: id,
                    next,
                    done: 0,
                    completes,
                });
                return Ok(false);
            }
        }
        if let Some(push) = self.pushes.get_mut(&id) {
            push.machine.dequeue();
        }
        Ok(true)
    }

    /// The same for a push between regions of which some are cut: a write may take several requests.
    fn fill_cut_pages(
        &mut self,
        lane: &mut Lane,
        id: u64,
        (mut next, mut done): (usize, u32),
        completes: Option<u32>,
    ) -> Result<bool, FabricError> {
        let total = lane.plan.writes.len();
        while next < total {
            let current = Current::Pages {
                push: id,
                next,
                done,
                completes,
            };
            if self.scratch.requests.len() >= BATCH {
                lane.current = Some(current);
                self.flush(lane)?;
                continue;
            }
            let Some(push) = self.pushes.get(&id) else {
                return Ok(true);
            };
            let Some(targets) = push.targets(lane) else {
                return Ok(true);
            };
            let write = lane.plan.writes[next];
            let first_sge = self.scratch.sges.len();
            let request = cut(
                &write,
                lane.plan.sources_of(&write),
                done,
                &targets[usize::from(write.region)],
                &push.source.record.regions,
                limits(lane),
                &mut self.scratch.sges,
            );
            let Some(request) = request else {
                return Ok(true);
            };
            let is_last = done + request.length == write.length;
            let imm = completes.filter(|_| is_last && next + 1 == total);
            if !lane.send.take(1, imm.is_some().into()) {
                self.scratch.sges.truncate(first_sge);
                lane.current = Some(current);
                return Ok(false);
            }
            self.request(
                lane,
                Owner::Push(id),
                WorkRequest {
                    id: 0,
                    opcode: imm.map_or(Opcode::Write, Opcode::WriteImm),
                    remote_address: request.remote_address,
                    remote_key: request.remote_key,
                    first_sge: first_sge as u32,
                    sge_count: request.sge_count,
                    signaled: false,
                    inline: false,
                },
                u64::from(request.length),
            );
            (next, done) = match is_last {
                true => (next + 1, 0),
                false => (next, done + request.length),
            };
        }
        if let Some(push) = self.pushes.get_mut(&id) {
            push.machine.dequeue();
        }
        Ok(true)
    }

    /// The same for a push whose source pages go through bounce buffers. What has been copied is sent; what is not is
    /// waited for.
    fn fill_staged(&mut self, lane: &mut Lane) -> Result<bool, FabricError> {
        // Out of the lane while it is worked on. Whoever drops it meanwhile gets its buffers back when copies are done.
        let Some(Current::Staged(mut task)) = lane.current.take() else {
            return Ok(true);
        };
        let id = task.push;
        loop {
            if self.scratch.requests.len() >= BATCH {
                self.flush(lane)?;
            }
            let push = self.pushes.get(&id);
            let Some(push) = push.filter(|push| push.machine.may_post()) else {
                return Ok(true);
            };
            let Some(targets) = push.targets(lane) else {
                return Ok(true);
            };
            let (piece, offset, buffer) = match task.ready(&lane.plan, targets, self.staging) {
                Ok(Ready::Send(piece, offset, buffer)) => (piece, offset, buffer),
                Ok(Ready::Wait) => {
                    lane.current = Some(Current::Staged(task));
                    return Ok(false);
                }
                Ok(Ready::Done) => break,
                Err(error) => {
                    self.staging.failed.push((id, error));
                    lane.current = Some(Current::Staged(task));
                    return Ok(false);
                }
            };
            let arena = push.source.record.arena();
            let rail = arena.and_then(|arena| arena.region().rails().get(lane.rail));
            let local = rail.and_then(|keys| keys.at(offset));
            let write = lane.plan.writes[piece.write];
            let target = &targets[usize::from(write.region)];
            let remote = target.at(write.offset + u64::from(piece.done));
            // The arena is registered with every rail, and the destination was checked when the push was opened.
            let (Some((address, key, _)), Some((remote_address, remote_key, _))) = (local, remote)
            else {
                return Ok(true);
            };
            let imm = task.completes.filter(|_| piece.is_last);
            if !lane.send.take(1, imm.is_some().into()) {
                lane.current = Some(Current::Staged(task));
                return Ok(false);
            }
            let first_sge = self.scratch.sges.len() as u32;
            let length = piece.length;
            self.scratch.sges.push(Sge {
                address,
                length,
                key,
            });
            let request = WorkRequest {
                id: 0,
                opcode: imm.map_or(Opcode::Write, Opcode::WriteImm),
                remote_address,
                remote_key,
                first_sge,
                sge_count: 1,
                signaled: false,
                inline: false,
            };
            self.staging.built(task.buffer());
            self.request(
                lane,
                Owner::Staged { push: id, buffer },
                request,
                length.into(),
            );
            task.sent();
        }
        if let Some(push) = self.pushes.get_mut(&id) {
            push.machine.dequeue();
        }
        Ok(true)
    }

    fn fill_tail(&mut self, lane: &mut Lane, id: u64) -> Result<bool, FabricError> {
        let Some(push) = self.pushes.get_mut(&id) else {
            return Ok(true);
        };
        if !push.machine.may_post() {
            return Ok(true);
        }
        let Some((address, key, length, target)) = push.tail(lane) else {
            return Ok(true);
        };
        if !lane.send.take(1, 1) {
            return Ok(false);
        }
        push.machine.dequeue();
        let imm = push.imm(push.blocks_tail());
        let first_sge = self.scratch.sges.len() as u32;
        self.scratch.sges.push(Sge {
            address,
            length,
            key,
        });
        self.request(
            lane,
            Owner::Push(id),
            WorkRequest {
                id: 0,
                opcode: Opcode::WriteImm(imm),
                remote_address: target.0,
                remote_key: target.1,
                first_sge,
                sge_count: 1,
                signaled: false,
                inline: length <= lane.config.max_inline,
            },
            length.into(),
        );
        Ok(true)
    }

    fn fill_access(
        &mut self,
        lane: &mut Lane,
        id: u64,
        mut done: u64,
    ) -> Result<bool, FabricError> {
        loop {
            let Some(access) = self.accesses.get(&id) else {
                return Ok(true);
            };
            let Some(piece) = access.piece(done, lane.rail, lane.remote_rail) else {
                break;
            };
            if self.scratch.requests.len() >= BATCH {
                lane.current = Some(Current::Access { access: id, done });
                self.flush(lane)?;
                continue;
            }
            if !lane.send.take(1, 0) {
                lane.current = Some(Current::Access { access: id, done });
                return Ok(false);
            }
            let first_sge = self.scratch.sges.len() as u32;
            self.scratch.sges.push(piece.local);
            let request = WorkRequest {
                id: 0,
                opcode: piece.opcode,
                remote_address: piece.remote_address,
                remote_key: piece.remote_key,
                first_sge,
                sge_count: 1,
                signaled: false,
                inline: false,
            };
            self.request(lane, Owner::Access(id), request, piece.local.length.into());
            done += u64::from(piece.local.length);
        }
        if let Some(access) = self.accesses.get_mut(&id) {
            // Otherwise the peer has told no key for the rail that the lane has moved to: the access expires.
            access.wholly_posted = done == access.length();
        }
        Ok(true)
    }

    /// Adds a request to the batch under construction. Its slot has been taken.
    fn request(&mut self, lane: &mut Lane, owner: Owner, mut request: WorkRequest, bytes: u64) {
        request.id = self.next_sequence(lane);
        lane.unsignalled += 1;
        if lane.unsignalled >= signal_every(lane) {
            request.signaled = true;
            lane.unsignalled = 0;
        }
        self.scratch.requests.push(request);
        self.scratch.belongs(owner, 1, bytes);
    }

    /// Posts the batch. Its last request is signalled, so everything posted is covered by a completion to come.
    fn flush(&mut self, lane: &mut Lane) -> Result<(), FabricError> {
        let Some(last) = self.scratch.requests.last_mut() else {
            return Ok(());
        };
        last.signaled = true;
        lane.unsignalled = 0;
        // SAFETY: every element lies in a `Region` registered with this rail: pages are planned within the layout that
        // the pool was checked by, a tail lies in its slot of the arena, and the range of an access was checked when
        // it was asked for. `Memory` promises that a region is mapped, and under no Rust reference, until it is
        // dropped. The `Arc` of its pool or export in the push's or access's entry, or of the arena, holds it until
        // every request has ended, because an entry ends only when all that was posted for it has been retired
        // (`PushMachine`, `access_retired`) or after `writer_lost` or `end_session` has destroyed the lane, as the
        // former does when a post fails half-way. (So no message of a peer may end an access that moves bytes, as `region_accepted` and
        // `region_refused` end one that opens.) When the core is dropped, its rails go before the entries. An access
        // holds its local region's handle, so that region stays registered though its owner may have gone. That source
        // pages do not change is asked of the pusher; if they do, the peer gets a mix. Inline elements are
        // tails, which nobody writes once the push is finished.
        let result = unsafe {
            self.rail
                .context
                .post(lane.id, &self.scratch.requests, &self.scratch.sges)
        };
        let mut posted = match &result {
            Ok(()) => self.scratch.requests.len(),
            Err(error) => error.posted.min(self.scratch.requests.len()),
        } as u32;
        let (mut bytes, writes) = (0, u64::from(posted));
        for batch in &self.scratch.batches {
            let requests = batch.requests.min(posted);
            posted -= requests;
            bytes += if requests > 0 { batch.bytes } else { 0 };
            lane.ledger.post(Batch { requests, ..*batch });
            match batch.owner {
                Owner::Push(id) | Owner::Staged { push: id, .. } => {
                    if let Owner::Staged { buffer, .. } = batch.owner {
                        self.staging.posted(buffer, requests);
                    }
                    if let Some(push) = self.pushes.get_mut(&id) {
                        push.machine.posted(requests);
                        push.requests += u64::from(requests);
                    }
                }
                Owner::Access(id) => {
                    if let Some(access) = self.accesses.get_mut(&id) {
                        access.in_flight += u64::from(requests);
                    }
                }
            }
        }
        self.scratch.requests.clear();
        self.scratch.sges.clear();
        self.scratch.batches.clear();
        if let Some(meters) = self.meters {
            meters.bytes.add(bytes);
            meters.writes.add(writes);
        }
        result.map_err(|error| error.source)
    }
}
