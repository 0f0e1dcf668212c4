//! What all transfers of an engine share: the endpoint, a pool for each rank, who wakes whom.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use kvpush::{
    Endpoint, Grant, Pool, Push,
    endpoint::PushError,
    kv::{HeadRange, KvLayout, PlaneRole},
};

use super::{
    TransferError,
    ready::{Key, Mark, Ready},
};

/// A wait that is polled when its mark is set.
pub(super) type Wait<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// See the module's documentation.
pub(super) struct Links {
    pub(super) endpoint: Endpoint,
    /// By rank.
    pub(super) pools: Vec<Pool>,
    pub(super) ready: Arc<Ready>,
    /// Tickets that are being given back.
    releases: Vec<(Key, Arc<Mark>, Wait<()>)>,
    next_release: u64,
}

impl Links {
    pub(super) fn new(endpoint: Endpoint, pools: Vec<Pool>) -> Self {
        Self {
            endpoint,
            pools,
            ready: Arc::default(),
            releases: Vec::new(),
            next_release: 0,
        }
    }

    /// Begins to push from `rank`'s pool.
    pub(super) fn start_push(
        &self,
        rank: u32,
        grant: &Grant,
        until: Instant,
    ) -> Result<Arc<Push>, PushError> {
        let left = until
            .saturating_duration_since(Instant::now())
            .max(Duration::from_millis(1));
        // A rank beyond ours is no ticket of ours: any pool will do to give it back.
        let pool = self.pools.get(rank as usize).unwrap_or(&self.pools[0]);
        let push = self.endpoint.start_push(pool, grant.clone(), Some(left))?;
        Ok(Arc::new(push))
    }

    /// Cancels a push in a way that its reader hears of, even if it is not open yet: a session that is just being made
    /// is ended with its last push, so the opening is waited for. No pages have been handed over.
    pub(super) fn release(&mut self, push: Arc<Push>) {
        let key = Key::Release(self.next_release);
        self.next_release += 1;
        let mark = self.ready.mark(key);
        let wait = Box::pin(async move {
            if let Ok(()) = push.opened().await {
                // How it ends is the reader's business.
                let _cancelled = push.cancel().await;
            }
        });
        // The first look is what starts it.
        mark.set();
        self.releases.push((key, mark, wait));
    }

    /// Goes on with what `key` waits for.
    pub(super) fn drive_release(&mut self, key: Key) {
        self.releases.retain_mut(|(other, mark, wait)| {
            if *other != key {
                return true;
            }
            let waker = mark.waker();
            wait.as_mut()
                .poll(&mut Context::from_waker(&waker))
                .is_pending()
        });
    }

    /// Tickets that are being given back.
    pub(super) fn releases(&self) -> usize {
        self.releases.len()
    }
}

/// Looks at a wait once.
pub(super) fn look<T>(wait: &mut Wait<T>, context: &mut Context<'_>) -> Option<T> {
    match wait.as_mut().poll(context) {
        Poll::Ready(value) => Some(value),
        Poll::Pending => None,
    }
}

/// Bytes of `heads` in one page, over all layers.
pub(super) fn page_bytes(layout: &KvLayout, heads: HeadRange) -> u64 {
    let plane_bytes = |tokens: u32, plane: &kvpush::kv::Plane| {
        let heads = match plane.role {
            PlaneRole::Auxiliary => plane.heads.count,
            _ => heads.count,
        };
        u64::from(tokens) * u64::from(plane.head_bytes) * u64::from(heads)
    };
    let layers = layout.layers.iter();
    layers
        .flat_map(|layer| {
            layer
                .planes
                .iter()
                .map(|plane| plane_bytes(layer.tokens_per_page, plane))
        })
        .sum()
}

/// The caller gave it up.
pub(super) fn cancelled() -> TransferError {
    TransferError {
        message: "given up by this engine".to_owned(),
        is_retryable: false,
    }
}
