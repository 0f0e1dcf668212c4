//! One-sided access without a grant: for engines that pull, or that do their own accounting.

use std::{
    future::poll_fn,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use super::{
    AccessError, Endpoint, EndpointError, PeerError,
    core::{AccessEntry, AccessOp, Command, ExportRecord, RegionKeys},
    regions::{Exports, MemoryPath, PathRefusal, RegionPaths},
    shared::{AccessShared, EndpointShared, ExportHandle},
};
use crate::{
    fabric::Access,
    memory::Memory,
    wire::{RegionToken, RegionTokenFields, random_nonce},
};

/// Registered memory: the local side of one-sided accesses, and what a peer reaches by its token.
///
/// Dropping it ends the registration, as soon as no access of this side uses it. A peer that still uses its token then
/// gets an error, and its lane fails.
#[derive(Debug)]
pub struct LocalRegion {
    handle: Arc<ExportHandle>,
    token: RegionToken,
}

/// A peer's exported region.
#[derive(Clone, Debug)]
pub struct RemoteRegion {
    token: RegionToken,
    keys: Arc<RegionKeys>,
    endpoint: Arc<EndpointShared>,
}

impl Endpoint {
    /// Registers `memory`; `access` says what holders of its token may do. Blocks while the memory is pinned.
    pub fn register(
        &self,
        memory: Arc<dyn Memory>,
        access: Access,
    ) -> Result<LocalRegion, EndpointError> {
        let shared = self.shared();
        let random = |source| EndpointError::Io {
            operation: "random number for",
            address: "a region token".to_owned(),
            source,
        };
        let nonce = random_nonce().map_err(random)?;
        let region = shared.register(memory, access, &mut Exports::default())?;
        if let Some(rail) = (0..shared.devices.len()).find(|&rail| !region.is_reached(rail)) {
            // A pool has registered it, and may have it staged. Nothing of the kind is done for one-sided access.
            let info = shared.devices[rail].info();
            let rail = format!("{}/{}", info.name, info.port);
            shared.command(Command::Deregister(region));
            let refused = vec![PathRefusal {
                path: MemoryPath::Staged,
                reason: "only pools are staged".to_owned(),
            }];
            return Err(EndpointError::Unreachable { rail, refused });
        }
        let id = shared.next_export.fetch_add(1, Ordering::Relaxed);
        let token = RegionToken::new(RegionTokenFields {
            issuer: shared.incarnation,
            addresses: shared.addresses.clone(),
            region: id,
            nonce,
            length: region.length(),
            read: access.remote_read,
            write: access.remote_write,
        });
        let record = Arc::new(ExportRecord { id, nonce, region });
        let handle = Arc::new(ExportHandle {
            record: Arc::clone(&record),
            endpoint: Arc::clone(shared),
        });
        // From here on the handle ends the registration, whatever happens.
        let token = token?;
        if !shared.command(Command::AddExport(record)) {
            return Err(EndpointError::Closed);
        }
        Ok(LocalRegion { handle, token })
    }

    /// Asks the owner of `token` for access.
    pub async fn open_region(&self, token: RegionToken) -> Result<RemoteRegion, AccessError> {
        let shared = self.start_open(&token)?;
        finished(&shared).await?;
        self.opened_region(token, &shared)
    }

    /// Like [`Endpoint::open_region`], blocking. It ends by [`super::Builder::open_timeout`].
    pub fn open_region_blocking(&self, token: RegionToken) -> Result<RemoteRegion, AccessError> {
        let shared = self.start_open(&token)?;
        wait(&shared)?;
        self.opened_region(token, &shared)
    }

    fn start_open(&self, token: &RegionToken) -> Result<Arc<AccessShared>, AccessError> {
        if self.shared().drain.has_begun() {
            return Err(PeerError::Draining.into());
        }
        let shared = Arc::new(AccessShared::new());
        let timeout = self.shared().config.open_timeout;
        let entry = AccessEntry::new(token.clone(), AccessOp::Open, Arc::clone(&shared), timeout);
        if !self.shared().command(Command::Access(Box::new(entry))) {
            return Err(PeerError::Closed.into());
        }
        Ok(shared)
    }

    fn opened_region(
        &self,
        token: RegionToken,
        shared: &AccessShared,
    ) -> Result<RemoteRegion, AccessError> {
        let keys = shared.keys.look(Clone::clone).ok_or(AccessError::Expired)?;
        Ok(RemoteRegion {
            token,
            keys,
            endpoint: Arc::clone(self.shared()),
        })
    }
}

impl LocalRegion {
    /// The right to reach this region, for a peer.
    pub fn token(&self) -> &RegionToken {
        &self.token
    }

    /// Bytes.
    pub fn length(&self) -> u64 {
        self.handle.record.region.length()
    }

    /// How each rail reaches it, and why not in a better way.
    pub fn paths(&self) -> RegionPaths {
        let devices = &self.handle.endpoint.devices;
        self.handle.record.region.paths(devices)
    }
}

impl RemoteRegion {
    /// Bytes.
    pub fn length(&self) -> u64 {
        self.token.length()
    }

    /// Reads `length` bytes from `remote_offset` of the region into `local` at `local_offset`, and waits for them.
    ///
    /// # Errors
    ///
    /// [`AccessError`]; nothing is in flight then. After [`AccessError::Expired`] or [`AccessError::Peer`] the local
    /// bytes are unspecified.
    pub async fn read(
        &self,
        remote_offset: u64,
        local: &LocalRegion,
        local_offset: u64,
        length: u64,
        timeout: Duration,
    ) -> Result<(), AccessError> {
        finished(&self.start(true, remote_offset, local, local_offset, length, timeout)?).await
    }

    /// Writes `length` bytes of `local` from `local_offset` to `remote_offset` of the region, and waits until they
    /// are there.
    ///
    /// # Errors
    ///
    /// As for [`RemoteRegion::read`], for the remote bytes.
    pub async fn write(
        &self,
        remote_offset: u64,
        local: &LocalRegion,
        local_offset: u64,
        length: u64,
        timeout: Duration,
    ) -> Result<(), AccessError> {
        finished(&self.start(false, remote_offset, local, local_offset, length, timeout)?).await
    }

    /// Like [`RemoteRegion::read`], blocking.
    pub fn read_blocking(
        &self,
        remote_offset: u64,
        local: &LocalRegion,
        local_offset: u64,
        length: u64,
        timeout: Duration,
    ) -> Result<(), AccessError> {
        wait(&self.start(true, remote_offset, local, local_offset, length, timeout)?)
    }

    /// Like [`RemoteRegion::write`], blocking.
    pub fn write_blocking(
        &self,
        remote_offset: u64,
        local: &LocalRegion,
        local_offset: u64,
        length: u64,
        timeout: Duration,
    ) -> Result<(), AccessError> {
        wait(&self.start(false, remote_offset, local, local_offset, length, timeout)?)
    }

    fn start(
        &self,
        read: bool,
        remote_offset: u64,
        local: &LocalRegion,
        local_offset: u64,
        length: u64,
        timeout: Duration,
    ) -> Result<Arc<AccessShared>, AccessError> {
        check_range("remote", remote_offset, length, self.length())?;
        check_range("local", local_offset, length, local.length())?;
        if read && !self.token.can_read() {
            return Err(AccessError::NotAllowed("read"));
        }
        if !read && !self.token.can_write() {
            return Err(AccessError::NotAllowed("write"));
        }
        let shared = Arc::new(AccessShared::new());
        if length == 0 {
            shared.finish(Ok(()));
            return Ok(shared);
        }
        if self.endpoint.drain.has_begun() {
            return Err(PeerError::Draining.into());
        }
        let op = AccessOp::Move {
            read,
            local: Arc::clone(&local.handle),
            local_offset,
            remote: Arc::clone(&self.keys),
            remote_offset,
            length,
        };
        let entry = AccessEntry::new(self.token.clone(), op, Arc::clone(&shared), timeout);
        if !self.endpoint.command(Command::Access(Box::new(entry))) {
            return Err(PeerError::Closed.into());
        }
        Ok(shared)
    }
}

async fn finished(shared: &Arc<AccessShared>) -> Result<(), AccessError> {
    poll_fn(|context| shared.signal.poll(context, Clone::clone)).await
}

fn wait(shared: &Arc<AccessShared>) -> Result<(), AccessError> {
    // The driver answers by the deadline, or when the endpoint is closed.
    shared
        .signal
        .wait(None, Clone::clone)
        .unwrap_or(Err(AccessError::Expired))
}

fn check_range(
    side: &'static str,
    offset: u64,
    length: u64,
    capacity: u64,
) -> Result<(), AccessError> {
    match offset.checked_add(length) {
        Some(end) if end <= capacity => Ok(()),
        _ => Err(AccessError::OutOfRange {
            side,
            offset,
            length,
            capacity,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_ends_with_its_region() {
        let fits = |offset, length| check_range("remote", offset, length, 100).is_ok();
        assert!(fits(0, 100) && fits(99, 1) && fits(100, 0));
        assert!(!fits(0, 101) && !fits(99, 2) && !fits(101, 0));
        assert!(!fits(u64::MAX, 2), "the sum does not fit");
    }
}
