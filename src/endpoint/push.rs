//! The writer's session for a grant.

use std::{
    fmt,
    future::poll_fn,
    sync::{Arc, OnceLock, atomic::Ordering},
    time::{Duration, Instant},
};

use bytes::Bytes;
use parking_lot::Mutex;

use super::{
    Endpoint, PeerError, Pool, PushError, PushInputError,
    core::{Command, PushEntry},
    prepared::{PageList, Prepared},
    shared::{EndpointShared, PushPhase, PushShared},
    signal::Signal,
    telemetry::Event,
};
use crate::{fabric::FabricKind, kv::pages::check_unique, wire::Grant};

/// What a completed push did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PushReport {
    /// Bytes of pages written, the tail not included.
    pub bytes: u64,
    /// Writes posted for them, the tail included.
    pub writes: u64,
    /// The fabric that carried it.
    pub fabric: FabricKind,
    /// From the call that began the push to the last acknowledgement.
    pub elapsed: Duration,
}

/// Pages on their way out of a pool.
///
/// It ends exactly once: completed, or with a [`PushError`]. When its end is reported nothing of it is in flight any
/// more, so its source pages may be reused; until then they must not change.
///
/// Dropping it before its end cancels it in the background.
pub struct Push {
    id: u64,
    grant: Grant,
    source_pages: u32,
    shared: Arc<PushShared>,
    endpoint: Arc<EndpointShared>,
    input: Mutex<Input>,
}

/// What has been handed over so far.
#[derive(Debug)]
struct Input {
    layers: Vec<Pushed>,
    finished: bool,
    /// What was handed over last: the next layer's pages are as a rule the same.
    last: Option<Arc<PageList>>,
}

#[derive(Clone, Debug, Default)]
struct Pushed {
    count: usize,
    /// A bit for each position, kept only while the layer is handed over in pieces.
    positions: Vec<u64>,
}

impl Endpoint {
    /// Begins to write pages of `pool` where `grant` allows it, and waits until the reader has agreed.
    ///
    /// The first push to a peer dials it and sets up lanes; later ones reuse them.
    ///
    /// # Errors
    ///
    /// The peer is not there, is not the one that issued the grant, refuses the grant, or its pool does not match.
    /// Nothing has been written then.
    pub async fn push(&self, pool: &Pool, grant: Grant) -> Result<Push, PushError> {
        let push = self.start_push(pool, grant, None)?;
        push.opened().await?;
        Ok(push)
    }

    /// Like [`Endpoint::push`], blocking for at most `timeout`, after which the push is [`PushError::Expired`].
    pub fn push_blocking(
        &self,
        pool: &Pool,
        grant: Grant,
        timeout: Duration,
    ) -> Result<Push, PushError> {
        let push = self.start_push(pool, grant, Some(timeout))?;
        push.shared
            .signal
            .wait(None, opened)
            .unwrap_or(Err(PushError::Expired))?;
        Ok(push)
    }

    /// Begins a push without waiting. Pages can be handed over once [`Push::opened`] says so.
    pub fn start_push(
        &self,
        pool: &Pool,
        grant: Grant,
        timeout: Option<Duration>,
    ) -> Result<Push, PushError> {
        self.shared().start_push(pool, grant, timeout)
    }
}

impl EndpointShared {
    pub(super) fn start_push(
        self: &Arc<Self>,
        pool: &Pool,
        grant: Grant,
        timeout: Option<Duration>,
    ) -> Result<Push, PushError> {
        let shared = self;
        if shared.drain.has_begun() {
            return Err(PeerError::Draining.into());
        }
        let id = shared.next_push.fetch_add(1, Ordering::Relaxed);
        let record = &pool.handle.record;
        let state = Arc::new(PushShared {
            signal: Signal::new(PushPhase::Opening),
            open_timeout: timeout,
            trace: OnceLock::new(),
        });
        let limit = shared.config.max_transfers;
        let tail_slot = shared
            .tails
            .take()
            .ok_or(PushInputError::TooMany { limit })?;
        if !Arc::ptr_eq(&pool.handle.endpoint, shared) {
            return Err(PushInputError::ForeignPool.into());
        }
        if grant.tail_capacity() > shared.config.tail_capacity {
            tracing::debug!("the reader has room for a longer tail than this side can send");
        }
        let entry = PushEntry::new(
            id,
            grant.clone(),
            Arc::clone(&pool.handle),
            Arc::clone(&state),
            tail_slot,
        );
        if !shared.command(Command::OpenPush(Box::new(entry))) {
            return Err(PeerError::Closed.into());
        }
        let input = Input {
            layers: vec![Pushed::default(); record.layout.layers.len()],
            finished: false,
            last: None,
        };
        Ok(Push {
            id,
            grant,
            source_pages: record.layout.pages,
            shared: state,
            endpoint: Arc::clone(shared),
            input: Mutex::new(input),
        })
    }
}

impl Push {
    /// What led to its end, if that was not a good one: the last changes of state of its session, oldest first.
    pub fn trace(&self) -> &[Event] {
        self.shared.trace.get().map_or(&[], |trace| trace)
    }

    /// The grant.
    pub fn grant(&self) -> &Grant {
        &self.grant
    }

    /// Waits until the reader has agreed.
    pub async fn opened(&self) -> Result<(), PushError> {
        poll_fn(|context| self.shared.signal.poll(context, opened)).await
    }

    /// Whether the reader has agreed, or the push has ended; `None` if neither.
    pub fn poll_opened(&self) -> Option<Result<(), PushError>> {
        self.shared.signal.look(opened)
    }

    /// Pushes one whole layer: `pages[i]` goes to position `i` of the grant.
    ///
    /// Returns at once; the driver thread plans and posts. Layers may be pushed in any order. The pages must hold
    /// their final bytes already and must not change until the push has ended.
    ///
    /// # Errors
    ///
    /// [`PushError::Input`] if the call is wrong, in which case nothing is written by it and the push goes on;
    /// otherwise the push has ended, and this is why.
    pub fn layer(&self, layer: usize, pages: &[u32]) -> Result<(), PushError> {
        let granted = self.grant.pages().len();
        if pages.len() != granted {
            return Err(PushInputError::Positions {
                first: 0,
                count: pages.len(),
                granted,
            }
            .into());
        }
        self.layer_from(layer, 0, pages)
    }

    /// Pushes some pages of a layer, as chunked prefill produces them: `pages[i]` goes to position `first + i`.
    ///
    /// A list that is the same as in the call before, as the next layer's is as a rule, is neither checked nor (where
    /// the layers have the same geometry) planned again.
    ///
    /// # Errors
    ///
    /// As for [`Push::layer`].
    pub fn layer_from(&self, layer: usize, first: usize, pages: &[u32]) -> Result<(), PushError> {
        self.check_open()?;
        // Held until the command is on its way, so that no other thread's `finish` overtakes it.
        let mut input = self.input.lock();
        let granted = self.grant.pages().len();
        let last = input.last.as_ref().filter(|list| list.is(first, pages));
        let list = match last.map(Arc::clone) {
            Some(list) => {
                input.take_checked(layer, first, pages.len(), granted)?;
                list.repeat();
                list
            }
            None => {
                input.take(layer, first, pages, granted, self.source_pages)?;
                let list = PageList::new(first, pages, Some(Arc::clone(&self.endpoint.plans)));
                input.last = Some(Arc::clone(&list));
                list
            }
        };
        self.hand_over(layer, list)
    }

    /// Checks `pages` once, for any number of layers: `pages[i]` goes to position `first + i` of the grant. Each is then
    /// pushed with [`Push::layer_prepared`], in any order.
    ///
    /// The pages are planned when the first of the layers is posted, and the plan is kept for all layers of the same
    /// geometry: page size, strides, and how they are divided between the two sides. Other layers get a plan of their
    /// own. That takes about 56 bytes for each write of a layer, until the last handle is dropped and everything has been
    /// posted; a write is a page of a layer where pages cannot be merged. Pages that go through host memory, to memory
    /// windows, or from or to a region that is registered in several pieces, are planned for each layer all the same.
    ///
    /// [`Push::layer`] with the same list again and again comes close: it compares the lists, and what all such pushes
    /// of an endpoint may keep is bounded. Dozens of layers over many pages are what this call is for.
    ///
    /// It can be called before the reader has agreed, from any thread.
    ///
    /// # Errors
    ///
    /// [`PushError::Input`]: the positions are not the grant's, or a page does not exist or is named twice.
    ///
    /// # Examples
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use std::{sync::Arc, time::Duration};
    /// # use kvpush::{Auth, Endpoint, fabric::FabricKind, kv::{Dtype, HeadRange, presets::KvShape, region_lengths}};
    /// # use kvpush::memory::{HostMemory, Memory};
    /// # const SOON: Duration = Duration::from_secs(10);
    /// # let shape = KvShape { layers: 3, tokens_per_page: 16, heads: HeadRange::new(0, 2), head_dim: 64, dtype: Dtype::Bf16 };
    /// # let layout = shape.vllm_flash(8)?;
    /// # let start = |name: &str| Endpoint::builder().name(name).auth(Auth::psk([7; 32])).fabrics([FabricKind::Tcp]).bind("127.0.0.1:0");
    /// # let memory = || -> Vec<Arc<dyn Memory>> {
    /// #     let lengths = region_lengths(&layout).unwrap();
    /// #     lengths.into_iter().map(|n| Arc::new(HostMemory::new(n).unwrap()) as Arc<dyn Memory>).collect()
    /// # };
    /// # let (prefill, decode) = (start("prefill")?, start("decode")?);
    /// # let source = prefill.register_pool(layout.clone(), memory())?;
    /// # let destination = decode.register_pool(layout.clone(), memory())?;
    /// let arrival = destination.grant("request-17", &[4, 6, 5], SOON)?;
    /// let push = prefill.push_blocking(&source, arrival.grant().clone(), SOON)?;
    /// let pages = push.prepare(0, &[0, 1, 2])?; // checked here, planned once
    /// for layer in 0..layout.layers.len() {
    ///     // ... the layer is computed ...
    ///     push.layer_prepared(layer, &pages)?;
    /// }
    /// push.finish_blocking("", SOON).expect("ends in time")?;
    /// arrival.complete_blocking(SOON).expect("ends in time")?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn prepare(&self, first: usize, pages: &[u32]) -> Result<Prepared, PushError> {
        let (count, granted) = (pages.len(), self.grant.pages().len());
        check_positions(first, count, granted)?;
        check_unique(pages, self.source_pages).map_err(PushInputError::from)?;
        Ok(Prepared {
            list: PageList::new(first, pages, None),
            push: Arc::clone(&self.shared),
        })
    }

    /// Pushes prepared pages of `layer`. Like [`Push::layer_from`], but nothing is done for each page in this call.
    ///
    /// # Errors
    ///
    /// As for [`Push::layer`], and [`PushInputError::ForeignPages`] if they were prepared for another push.
    pub fn layer_prepared(&self, layer: usize, pages: &Prepared) -> Result<(), PushError> {
        if !Arc::ptr_eq(&pages.push, &self.shared) {
            return Err(PushInputError::ForeignPages.into());
        }
        self.check_open()?;
        // As in `layer_from`.
        let mut input = self.input.lock();
        let (first, count) = (pages.first(), pages.pages().len());
        input.take_checked(layer, first, count, self.grant.pages().len())?;
        self.hand_over(layer, Arc::clone(&pages.list))
    }

    fn check_open(&self) -> Result<(), PushError> {
        match self.shared.signal.look(opened) {
            None => Err(PushInputError::NotOpen.into()),
            Some(opened) => opened,
        }
    }

    fn hand_over(&self, layer: usize, list: Arc<PageList>) -> Result<(), PushError> {
        if list.pages.is_empty() {
            return Ok(());
        }
        self.command(Command::Pages {
            push: self.id,
            layer: layer as u32,
            list,
        })
    }

    /// Sends the tail and waits until everything is in the reader's memory.
    ///
    /// Success says that the reader's device has acknowledged every write. At the very end the two sides can still see
    /// it differently: a reader that revokes, or whose deadline passes, while the last acknowledgement is on its way
    /// reports that, although everything has been written. The reader's word counts.
    ///
    /// # Errors
    ///
    /// [`PushError::Input`] if pages are missing or the tail is too long: nothing is sent and the push goes on.
    /// Otherwise the push has ended, and this is why.
    pub async fn finish(&self, tail: impl Into<Bytes>) -> Result<PushReport, PushError> {
        self.start_finish(tail)?;
        self.ended().await
    }

    /// Like [`Push::finish`], blocking; `None` after `timeout`, and the push goes on.
    pub fn finish_blocking(
        &self,
        tail: impl Into<Bytes>,
        timeout: Duration,
    ) -> Option<Result<PushReport, PushError>> {
        if let Err(error) = self.start_finish(tail) {
            return Some(Err(error));
        }
        self.ended_blocking(timeout)
    }

    /// Sends the tail without waiting.
    pub fn start_finish(&self, tail: impl Into<Bytes>) -> Result<(), PushError> {
        let tail = tail.into();
        self.check_open()?;
        let capacity = self
            .grant
            .tail_capacity()
            .min(self.endpoint.config.tail_capacity) as usize;
        if tail.len() > capacity {
            return Err(PushInputError::Tail {
                length: tail.len(),
                capacity,
            }
            .into());
        }
        let mut input = self.input.lock();
        input.finish(self.grant.pages().len())?;
        self.command(Command::Finish {
            push: self.id,
            tail,
        })
    }

    /// Stops the push and waits until nothing of it is in flight. The reader's arrival ends as abandoned.
    pub async fn cancel(&self) -> Result<PushReport, PushError> {
        self.start_cancel();
        self.ended().await
    }

    /// Begins to stop the push.
    pub fn start_cancel(&self) {
        // Without a driver everything has ended already.
        self.endpoint.command(Command::Cancel { push: self.id });
    }

    /// Waits for the end.
    pub async fn ended(&self) -> Result<PushReport, PushError> {
        poll_fn(|context| self.shared.signal.poll(context, ended)).await
    }

    /// Blocks until the end; `None` after `timeout`.
    pub fn ended_blocking(&self, timeout: Duration) -> Option<Result<PushReport, PushError>> {
        self.shared
            .signal
            .wait(Instant::now().checked_add(timeout), ended)
    }

    /// The end, if it has ended.
    pub fn poll_ended(&self) -> Option<Result<PushReport, PushError>> {
        self.shared.signal.look(ended)
    }

    fn command(&self, command: Command) -> Result<(), PushError> {
        if self.endpoint.command(command) {
            Ok(())
        } else {
            Err(PeerError::Closed.into())
        }
    }
}

fn opened(phase: &PushPhase) -> Option<Result<(), PushError>> {
    match phase {
        PushPhase::Opening => None,
        PushPhase::Active | PushPhase::Ended(Ok(_)) => Some(Ok(())),
        PushPhase::Ended(Err(error)) => Some(Err(error.clone())),
    }
}

fn ended(phase: &PushPhase) -> Option<Result<PushReport, PushError>> {
    match phase {
        PushPhase::Ended(result) => Some(result.clone()),
        PushPhase::Opening | PushPhase::Active => None,
    }
}

impl Input {
    /// Checks a call and, if it is right, remembers it.
    fn take(
        &mut self,
        layer: usize,
        first: usize,
        pages: &[u32],
        granted: usize,
        source_pages: u32,
    ) -> Result<(), PushInputError> {
        self.check(layer, first, pages.len(), granted)?;
        check_unique(pages, source_pages)?;
        self.layers[layer].add(first, pages.len(), granted);
        Ok(())
    }

    /// The same for pages that have been checked.
    fn take_checked(
        &mut self,
        layer: usize,
        first: usize,
        count: usize,
        granted: usize,
    ) -> Result<(), PushInputError> {
        self.check(layer, first, count, granted)?;
        self.layers[layer].add(first, count, granted);
        Ok(())
    }

    fn check(
        &self,
        layer: usize,
        first: usize,
        count: usize,
        granted: usize,
    ) -> Result<(), PushInputError> {
        if self.finished {
            return Err(PushInputError::Finished);
        }
        let layers = self.layers.len();
        let pushed = self.layers.get(layer);
        let pushed = pushed.ok_or(PushInputError::Layer { layer, layers })?;
        check_positions(first, count, granted)?;
        match pushed.first_repeated(first, count, granted) {
            Some(position) => Err(PushInputError::Repeated { layer, position }),
            None => Ok(()),
        }
    }

    fn finish(&mut self, granted: usize) -> Result<(), PushInputError> {
        if self.finished {
            return Err(PushInputError::Finished);
        }
        if let Some(layer) = self.layers.iter().position(|pushed| pushed.count < granted) {
            let missing = granted - self.layers[layer].count;
            return Err(PushInputError::Incomplete { layer, missing });
        }
        self.finished = true;
        Ok(())
    }
}

fn check_positions(first: usize, count: usize, granted: usize) -> Result<(), PushInputError> {
    match first.checked_add(count) {
        Some(end) if end <= granted => Ok(()),
        _ => Err(PushInputError::Positions {
            first,
            count,
            granted,
        }),
    }
}

impl Pushed {
    fn first_repeated(&self, first: usize, count: usize, granted: usize) -> Option<usize> {
        if self.count == granted {
            return (count > 0).then_some(first);
        }
        if self.positions.is_empty() {
            return None;
        }
        (first..first + count).find(|&p| {
            self.positions
                .get(p / 64)
                .is_some_and(|word| word & (1 << (p % 64)) != 0)
        })
    }

    fn add(&mut self, first: usize, count: usize, granted: usize) {
        self.count += count;
        if self.count == granted {
            self.positions = Vec::new();
            return;
        }
        self.positions.resize(granted.div_ceil(64), 0);
        for position in first..first + count {
            self.positions[position / 64] |= 1 << (position % 64);
        }
    }
}

impl Drop for Push {
    fn drop(&mut self) {
        if self.poll_ended().is_none() {
            self.start_cancel();
        }
    }
}

impl fmt::Debug for Push {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Push")
            .field("id", &self.id)
            .field("grant", &self.grant)
            .field("end", &self.poll_ended())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::pages::PageError;

    fn input() -> Input {
        Input {
            layers: vec![Pushed::default(); 2],
            finished: false,
            last: None,
        }
    }

    #[test]
    fn a_wrong_call_changes_nothing() {
        let mut input = input();
        assert!(matches!(
            input.take(2, 0, &[1], 3, 100),
            Err(PushInputError::Layer { .. })
        ));
        assert!(matches!(
            input.take(0, 2, &[1, 2], 3, 100),
            Err(PushInputError::Positions { .. })
        ));
        assert!(matches!(
            input.take(0, usize::MAX, &[1], 3, 100),
            Err(PushInputError::Positions { .. })
        ));
        assert!(matches!(
            input.take(0, 0, &[5, 100], 3, 100),
            Err(PushInputError::Page(PageError::OutOfRange {
                page: 100,
                ..
            }))
        ));
        assert!(matches!(
            input.take(0, 0, &[5, 6, 5], 3, 100),
            Err(PushInputError::Page(PageError::Duplicate { page: 5, .. }))
        ));
        assert_eq!(
            input.take(0, 0, &[5, 6, 7], 3, 100),
            Ok(()),
            "none of the above was remembered"
        );
    }

    #[test]
    fn a_position_is_pushed_once_and_all_before_the_end() {
        let mut input = input();
        assert_eq!(input.take(0, 1, &[9], 3, 100), Ok(()));
        assert!(matches!(
            input.take(0, 0, &[1, 2], 3, 100),
            Err(PushInputError::Repeated { position: 1, .. })
        ));
        assert_eq!(input.take(0, 0, &[1], 3, 100), Ok(()));
        assert!(matches!(
            input.finish(3),
            Err(PushInputError::Incomplete {
                layer: 0,
                missing: 1
            })
        ));
        assert_eq!(input.take(0, 2, &[1], 3, 100), Ok(()));
        assert!(matches!(
            input.take(0, 2, &[1], 3, 100),
            Err(PushInputError::Repeated { .. })
        ));
        assert_eq!(input.take(1, 0, &[1, 2, 3], 3, 100), Ok(()));
        assert_eq!(input.finish(3), Ok(()));
        assert_eq!(input.finish(3), Err(PushInputError::Finished));
    }
}
