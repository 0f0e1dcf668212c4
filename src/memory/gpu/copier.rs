//! Copies between a GPU and the host on a stream of its own, with one event for each batch.
//!
//! Invariants:
//! - A batch whose start failed has nothing in flight when the error is returned.
//! - Tickets end in order, because there is one stream.
//! - After the first batches nothing is allocated: events are used again.
//!
//! The stream waits for no other stream. So whoever starts a copy *from* the device must know that the kernels that
//! wrote the source have ended, and the same holds the other way.

use std::collections::VecDeque;

use super::{
    GpuError,
    driver::{Driver, Handle},
};
use crate::memory::{Copier, Copy, Direction, MemoryError, Span, Ticket};

/// A copier over one stream.
#[derive(Debug)]
pub(super) struct GpuCopier<D: Driver> {
    driver: D,
    device: u32,
    /// What may be touched.
    memory: Span,
    stream: Handle,
    /// Batches in flight, oldest first, each with the event behind it.
    flying: VecDeque<(Ticket, Handle)>,
    idle: Vec<Handle>,
    pinned: Vec<u64>,
    last: Ticket,
    /// The first failure that left it unknown what has been copied.
    broken: Option<GpuError>,
}

impl<D: Driver> GpuCopier<D> {
    pub(super) fn new(driver: D, device: u32, memory: Span) -> Result<Self, GpuError> {
        let current = driver.current(device)?;
        let stream = driver.new_stream(device)?;
        drop(current);
        Ok(Self {
            driver,
            device,
            memory,
            stream,
            flying: VecDeque::with_capacity(8),
            idle: Vec::with_capacity(8),
            pinned: Vec::new(),
            last: Ticket(0),
            broken: None,
        })
    }

    fn is_usable(&self) -> Result<(), GpuError> {
        match &self.broken {
            Some(error) => Err(GpuError::Broken(Box::new(error.clone()))),
            None => Ok(()),
        }
    }

    /// Starts the copies and records `event` behind them. The device is current.
    ///
    /// # Safety
    ///
    /// As [`Copier::start`].
    unsafe fn enqueue(
        &self,
        direction: Direction,
        copies: &[Copy],
        event: Handle,
    ) -> Result<(), GpuError> {
        let (device, stream) = (self.device, self.stream);
        for copy in copies {
            // SAFETY: the device's range was checked by `start`, the host's is the caller's promise; the stream lives
            // as long as `self`.
            unsafe {
                let (at, host) = (copy.device, copy.host);
                self.driver
                    .copy(device, direction, at, host, copy.length, stream)?;
            }
        }
        // SAFETY: both live as long as `self`.
        unsafe { self.driver.record(device, event, stream) }
    }
}

impl<D: Driver> Copier for GpuCopier<D> {
    unsafe fn pin(&mut self, address: u64, length: u64) -> Result<(), MemoryError> {
        let _current = self.driver.current(self.device)?;
        // SAFETY: the range stays mapped until `self` has been dropped, which unpins it, by this function's contract.
        unsafe { self.driver.pin(self.device, address, length)? };
        self.pinned.push(address);
        Ok(())
    }

    unsafe fn start(
        &mut self,
        direction: Direction,
        copies: &[Copy],
    ) -> Result<Ticket, MemoryError> {
        self.is_usable()?;
        for copy in copies {
            let span = Span {
                address: copy.device,
                length: copy.length,
            };
            if copy.length == 0 || !self.memory.contains(span) {
                return Err(GpuError::BadRange {
                    what: "a copy outside of the copier's memory",
                    address: copy.device,
                    length: copy.length,
                }
                .into());
            }
        }
        let _current = self.driver.current(self.device)?;
        let event = match self.idle.pop() {
            Some(event) => event,
            None => self.driver.new_event(self.device)?,
        };
        // SAFETY: this function's contract is that of `enqueue`.
        let started = unsafe { self.enqueue(direction, copies, event) };
        let Err(error) = started else {
            self.last = Ticket(self.last.0 + 1);
            self.flying.push_back((self.last, event));
            return Ok(self.last);
        };
        self.idle.push(event);
        // Some of the copies may fly. The caller takes the error as leave to use the ranges again.
        // SAFETY: the stream lives as long as `self`.
        if unsafe { self.driver.wait(self.device, self.stream) }.is_err() {
            self.broken = Some(error.clone());
        }
        Err(error.into())
    }

    fn is_done(&mut self, ticket: Ticket) -> Result<bool, MemoryError> {
        self.is_usable()?;
        if !self.flying.is_empty() {
            let _current = self.driver.current(self.device)?;
            while let Some(&(first, event)) = self.flying.front() {
                // SAFETY: recorded by `start`, and live as long as `self`.
                match unsafe { self.driver.reached(self.device, event) } {
                    Ok(true) => {
                        self.flying.pop_front();
                        self.idle.push(event);
                    }
                    Ok(false) => return Ok(ticket < first),
                    Err(error) => {
                        self.broken = Some(error.clone());
                        return Err(error.into());
                    }
                }
            }
        }
        Ok(ticket <= self.last)
    }
}

impl<D: Driver> Drop for GpuCopier<D> {
    fn drop(&mut self) {
        let device = self.device;
        let report = |what: Result<(), GpuError>| {
            if let Err(error) = what {
                tracing::warn!(%error, "a GPU copier could not be ended cleanly");
            }
        };
        let _current = match self.driver.current(device) {
            Ok(current) => current,
            Err(error) => return report(Err(error)),
        };
        // SAFETY: all of these are live, nothing else has them, and each is ended once; the wait comes first, so that
        // no copy is in flight when the ranges it uses are unpinned or given up.
        unsafe {
            report(self.driver.wait(device, self.stream));
            let flying = self.flying.drain(..).map(|(_, event)| event);
            for event in flying.chain(self.idle.drain(..)) {
                report(self.driver.end_event(device, event));
            }
            for address in self.pinned.drain(..) {
                report(self.driver.unpin(device, address));
            }
            report(self.driver.end_stream(device, self.stream));
        }
    }
}
