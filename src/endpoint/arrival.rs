//! The reader's view of a grant: what has arrived, and taking it back.

use std::{
    fmt,
    future::poll_fn,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;

use super::{
    ArrivalError, GrantKeys,
    core::Command,
    shared::{ArrivalShared, ArrivalState, EndpointShared},
    telemetry::Event,
};
use crate::wire::Grant;

/// Pages on their way into a pool.
///
/// It ends exactly once: completed, or with an [`ArrivalError`]. When an error is reported, no write of the grant can
/// land any more. The pages belong to the grant until then; afterwards they are the caller's.
///
/// Dropping it before its end revokes the grant in the background.
///
/// Completion says that the bytes are in host-visible memory. A GPU kernel that runs at that moment need not see them;
/// for host memory, reading after the wait has returned is enough.
pub struct Arrival {
    grant: Grant,
    shared: Arc<ArrivalShared>,
    endpoint: Arc<EndpointShared>,
    layers: usize,
}

/// How a revocation found the grant. Whichever it is, no write of the grant can land any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Revocation {
    /// It was taken back.
    Revoked,
    /// Everything had arrived before.
    Completed,
    /// It had ended, or was about to end, for another reason.
    Ended(ArrivalError),
}

impl Arrival {
    pub(super) fn new(
        grant: Grant,
        shared: Arc<ArrivalShared>,
        endpoint: Arc<EndpointShared>,
        layers: usize,
    ) -> Self {
        Self {
            grant,
            shared,
            endpoint,
            layers,
        }
    }

    /// The right to write these pages, for the writer.
    pub fn grant(&self) -> &Grant {
        &self.grant
    }

    /// What its writer has been given; nothing while no writer has opened it.
    pub fn keys(&self) -> Option<GrantKeys> {
        self.shared.signal.look(|state| state.keys)
    }

    /// What led to its end, if that was not a good one: the last changes of state of its session, oldest first.
    pub fn trace(&self) -> &[Event] {
        self.shared.trace.get().map_or(&[], |trace| trace)
    }

    /// Layers of which all pages have arrived.
    pub fn complete_layers(&self) -> u32 {
        self.shared.signal.look(|state| state.complete_layers)
    }

    /// Waits until all pages of `layer` are there. Layers arrive in any order.
    ///
    /// # Errors
    ///
    /// The arrival has ended without it. A layer that is there stays there: if the arrival fails later, waiting for
    /// the layer still succeeds.
    pub async fn layer(&self, layer: usize) -> Result<(), ArrivalError> {
        poll_fn(|context| {
            self.shared
                .signal
                .poll(context, |state| self.ready(state, layer))
        })
        .await
    }

    /// Blocks until all pages of `layer` are there, or returns `None` after `timeout`.
    pub fn layer_blocking(
        &self,
        layer: usize,
        timeout: Duration,
    ) -> Option<Result<(), ArrivalError>> {
        self.shared
            .signal
            .wait(Instant::now().checked_add(timeout), |state| {
                self.ready(state, layer)
            })
    }

    /// Whether all pages of `layer` are there, or the arrival has ended without it; `None` if neither.
    pub fn poll_layer(&self, layer: usize) -> Option<Result<(), ArrivalError>> {
        self.shared.signal.look(|state| self.ready(state, layer))
    }

    /// Waits until all pages of all layers, and the tail, are there. Returns the tail.
    pub async fn complete(&self) -> Result<Bytes, ArrivalError> {
        poll_fn(|context| self.shared.signal.poll(context, ended)).await
    }

    /// Blocks until the arrival has ended, or returns `None` after `timeout`.
    pub fn complete_blocking(&self, timeout: Duration) -> Option<Result<Bytes, ArrivalError>> {
        self.shared
            .signal
            .wait(Instant::now().checked_add(timeout), ended)
    }

    /// The end, if it has ended.
    pub fn poll_complete(&self) -> Option<Result<Bytes, ArrivalError>> {
        self.shared.signal.look(ended)
    }

    /// Takes the grant back and waits until no write of it can land any more.
    ///
    /// The writer is asked to stop. If it does not answer within
    /// [`Builder::revoke_grace`](super::Builder::revoke_grace), its lanes are fenced, so this ends soon after that
    /// whatever the writer does.
    pub async fn revoke(&self) -> Revocation {
        self.start_revoke();
        poll_fn(|context| self.shared.signal.poll(context, revocation)).await
    }

    /// Takes the grant back and blocks until no write of it can land any more, or returns `None` after `timeout`.
    pub fn revoke_blocking(&self, timeout: Duration) -> Option<Revocation> {
        self.start_revoke();
        self.shared
            .signal
            .wait(Instant::now().checked_add(timeout), revocation)
    }

    /// Begins to take the grant back. Writes can land until the arrival has ended.
    pub fn start_revoke(&self) {
        // Without a driver everything has ended already.
        self.endpoint.command(Command::Revoke(self.grant.id()));
    }

    fn ready(&self, state: &ArrivalState, layer: usize) -> Option<Result<(), ArrivalError>> {
        if layer >= self.layers {
            return Some(Err(ArrivalError::NoSuchLayer {
                layer,
                layers: self.layers,
            }));
        }
        if state.is_layer_complete(layer) {
            return Some(Ok(()));
        }
        state.end.clone()
    }
}

fn ended(state: &ArrivalState) -> Option<Result<Bytes, ArrivalError>> {
    state
        .end
        .clone()
        .map(|end| end.map(|()| state.tail.clone().unwrap_or_default()))
}

fn revocation(state: &ArrivalState) -> Option<Revocation> {
    state.end.clone().map(|end| match end {
        Ok(()) => Revocation::Completed,
        Err(ArrivalError::Revoked) => Revocation::Revoked,
        Err(error) => Revocation::Ended(error),
    })
}

impl Drop for Arrival {
    fn drop(&mut self) {
        if self.poll_complete().is_none() {
            self.start_revoke();
        }
    }
}

impl fmt::Debug for Arrival {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Arrival")
            .field("grant", &self.grant)
            .field("complete_layers", &self.complete_layers())
            .field("end", &self.poll_complete())
            .finish()
    }
}
