//! Going away in good order: nothing new begins, what runs may finish, and then the endpoint is shut down.
//!
//! Callers set the flag before the driver learns of it, so that no call which returns after `start_drain` has begun
//! anything; what was on its way to the driver at that moment is refused there.

use std::{
    future::poll_fn,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use super::{Endpoint, core::Command, shared::EndpointShared, signal::Signal};

/// How the pushes, or the arrivals, of a draining endpoint ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DrainCount {
    /// Completed in time.
    pub completed: u64,
    /// Ended in time for another reason: cancelled, revoked, expired or failed.
    pub ended: u64,
    /// Ended by the endpoint when the time was over.
    pub cut: u64,
}

/// What became of what ran when an endpoint began to drain.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DrainReport {
    /// Pushes of this side.
    pub pushes: DrainCount,
    /// Arrivals that a writer had opened.
    pub arrivals: DrainCount,
    /// Grants that no writer had opened. They ended at once, because nobody may open them any more.
    pub unopened: u64,
    /// One-sided accesses that were ended when the time was over.
    pub accesses_cut: u64,
    /// How long it took.
    pub elapsed: Duration,
}

impl DrainReport {
    /// Whether everything that ran could finish by itself.
    pub fn is_clean(&self) -> bool {
        self.pushes.cut == 0 && self.arrivals.cut == 0 && self.accesses_cut == 0
    }
}

/// What callers and the driver share of a drain.
#[derive(Debug)]
pub(crate) struct DrainShared {
    begun: AtomicBool,
    done: Signal<Option<DrainReport>>,
}

impl DrainShared {
    pub(crate) fn new() -> Self {
        Self {
            begun: AtomicBool::new(false),
            done: Signal::new(None),
        }
    }

    /// Whether nothing new may begin.
    pub(crate) fn has_begun(&self) -> bool {
        self.begun.load(Ordering::Acquire)
    }

    pub(crate) fn begin(&self) {
        self.begun.store(true, Ordering::Release);
    }

    pub(crate) fn report(&self) -> Option<DrainReport> {
        self.done.look(|report| *report)
    }

    /// It is over. The first report stands.
    pub(crate) fn finish(&self, report: DrainReport) {
        self.done.update(|state| {
            state.get_or_insert(report);
        });
    }
}

/// A drain on its way to the driver, and then in its hands.
pub(crate) struct DrainEntry {
    pub(crate) timeout: Duration,
    /// Until the driver has taken it over.
    endpoint: Option<Arc<EndpointShared>>,
}

impl DrainEntry {
    pub(crate) fn new(timeout: Duration, endpoint: Arc<EndpointShared>) -> Self {
        Self {
            timeout,
            endpoint: Some(endpoint),
        }
    }

    /// The driver takes it over, and will say when it is over.
    pub(crate) fn take(mut self) -> Option<Arc<EndpointShared>> {
        self.endpoint.take()
    }
}

impl Drop for DrainEntry {
    fn drop(&mut self) {
        // Also reached when the command that carries it is never looked at, because the driver is gone.
        if let Some(endpoint) = &self.endpoint {
            endpoint.drain.finish(DrainReport::default());
        }
    }
}

impl Endpoint {
    /// Goes away in good order: from now on no grant is issued and no push, session or access begins, here or at the
    /// request of a peer (which gets [`RefuseCode::Draining`](crate::RefuseCode::Draining)). Grants that nobody has
    /// opened end at once. What runs may finish until `timeout` has passed; the rest is then ended as by
    /// [`Endpoint::shutdown`]. In the end the endpoint is shut down.
    ///
    /// A second call while the first lasts can only shorten it. On an endpoint that is shut down already the report is
    /// empty.
    pub async fn drain(&self, timeout: Duration) -> DrainReport {
        self.start_drain(timeout);
        let drain = &self.shared().drain;
        poll_fn(|context| drain.done.poll(context, |report| *report)).await
    }

    /// Like [`Endpoint::drain`], blocking. The threads of the endpoint have ended on return.
    pub fn drain_blocking(&self, timeout: Duration) -> DrainReport {
        self.start_drain(timeout);
        // The driver ends it in time, and so does the loss of the driver.
        let report = self.shared().drain.done.wait(None, |report| *report);
        self.shutdown();
        report.unwrap_or_default()
    }

    /// Begins to drain without waiting.
    pub fn start_drain(&self, timeout: Duration) {
        let endpoint = self.shared();
        endpoint.drain.begin();
        let entry = DrainEntry::new(timeout, Arc::clone(endpoint));
        // Without a driver the entry is dropped, which ends the wait.
        endpoint.command(Command::Drain(entry));
    }

    /// The report, if the endpoint has been drained.
    pub fn poll_drain(&self) -> Option<DrainReport> {
        self.shared().drain.report()
    }
}
