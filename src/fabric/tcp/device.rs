//! The TCP rail: configuration, listener, registrations. Any thread may call.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use mio::net::TcpListener;
use parking_lot::Mutex;

use super::{
    super::{
        Access, Capabilities, Context, Device, DeviceInfo, DmabufRange, FabricError,
        FabricErrorKind, FabricKind, LinkState, MemoryKeys, WindowCaps, mapping::Mapping,
        software::os_error,
    },
    context::TcpContext,
    memory::Registry,
};

/// How to open a [`TcpDevice`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TcpConfig {
    /// The address to listen on for lanes; unspecified (the default) means all.
    pub bind: IpAddr,
    /// The port to listen on; 0 (the default) lets the system choose. Peers learn it from lane addresses.
    pub port: u16,
    /// The device's name in [`DeviceInfo`], errors and metrics.
    pub name: String,
    /// Bytes of each socket's send buffer; 0 (the default) leaves it to the kernel's tuning.
    pub send_buffer: u32,
    /// Bytes of each socket's receive buffer; 0 (the default) leaves it to the kernel's tuning.
    pub receive_buffer: u32,
    /// How long a lane may take from [`Context::connect_lane`] until frames flow, on either side.
    pub connect_timeout: Duration,
    /// How long an accepted socket may take to name a lane that is waiting for it.
    pub hello_timeout: Duration,
    /// How long a write with immediate waits for the peer to post a receive.
    pub rnr_timeout: Duration,
    /// How long a peer may be unreachable, or leave its socket unread while data waits for it, before the lane fails
    /// (`TCP_USER_TIMEOUT`, keep-alive; see `tcp(7)`).
    pub peer_timeout: Duration,
    /// Most accepted sockets that have not named a lane yet.
    pub max_pending: usize,
}

impl Default for TcpConfig {
    fn default() -> Self {
        Self {
            bind: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            port: 0,
            name: "tcp".into(),
            send_buffer: 0,
            receive_buffer: 0,
            connect_timeout: Duration::from_secs(10),
            hello_timeout: Duration::from_secs(5),
            rnr_timeout: Duration::from_secs(5),
            peer_timeout: Duration::from_secs(10),
            max_pending: 256,
        }
    }
}

/// Limits. Memory is reserved when a lane is created, so they are generous but finite.
const CAPABILITIES: Capabilities = Capabilities {
    max_send_depth: 1 << 14,
    max_receive_depth: 1 << 16,
    max_completions: 1 << 20,
    max_sge: 64,
    max_inline: 256,
    max_message: 1 << 31,
    max_mr: isize::MAX as u64,
    mtu: 0,
    read: true,
    windows: Some(WindowCaps {
        max: 1 << 16,
        per_lane: true,
        bounded: true,
        final_when_done: true,
    }),
    dmabuf: true,
    relaxed_ordering: false,
};

/// The embedded fabric's rail: one listener and its registrations.
#[derive(Debug)]
pub struct TcpDevice {
    config: TcpConfig,
    info: DeviceInfo,
    local: SocketAddr,
    listener: Mutex<Option<TcpListener>>,
    registry: Arc<Registry>,
}

impl TcpDevice {
    /// Binds the listener.
    ///
    /// # Errors
    ///
    /// [`FabricErrorKind::Os`] with the errno of `bind(2)` or `listen(2)`.
    pub fn open(config: TcpConfig) -> Result<Arc<Self>, FabricError> {
        let wanted = SocketAddr::new(config.bind, config.port);
        let failed = |error: io::Error, hint| FabricError {
            device: config.name.clone(),
            port: 0,
            operation: "bind",
            kind: os_error(&error),
            hint: Some(hint),
        };
        let listener = TcpListener::bind(wanted)
            .map_err(|e| failed(e, "choose a free port, or 0, on an address of this host"))?;
        let local = listener
            .local_addr()
            .map_err(|e| failed(e, "the listener has no address"))?;
        let info = DeviceInfo {
            kind: FabricKind::Tcp,
            name: config.name.clone(),
            port: 0,
            address: local.to_string(),
            link: LinkState::Active,
            bits_per_second: 0,
            pci: None,
            caps: CAPABILITIES,
        };
        Ok(Arc::new(Self {
            config,
            info,
            local,
            listener: Mutex::new(Some(listener)),
            registry: Arc::new(Registry::new()),
        }))
    }

    /// The address of the listener.
    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }

    pub(super) fn config(&self) -> &TcpConfig {
        &self.config
    }

    pub(super) fn registry(&self) -> &Arc<Registry> {
        &self.registry
    }

    fn insert(
        &self,
        operation: &'static str,
        address: u64,
        length: u64,
        access: Access,
        mapping: Option<Mapping>,
    ) -> Result<MemoryKeys, FabricError> {
        let keys = self.registry.insert(address, length, access, mapping, ());
        keys.map_err(|kind| self.error(operation, kind))
    }

    pub(super) fn error(&self, operation: &'static str, kind: FabricErrorKind) -> FabricError {
        FabricError {
            device: self.info.name.clone(),
            port: 0,
            operation,
            kind,
            hint: None,
        }
    }
}

impl Device for TcpDevice {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    unsafe fn register(
        &self,
        address: u64,
        length: u64,
        access: Access,
    ) -> Result<MemoryKeys, FabricError> {
        let fits = self.info.caps.check_range(address, length);
        fits.map_err(|kind| self.error("register", kind))?;
        self.insert("register", address, length, access, None)
    }

    unsafe fn register_dmabuf(
        &self,
        range: &DmabufRange<'_>,
        access: Access,
    ) -> Result<MemoryKeys, FabricError> {
        const OPERATION: &str = "register a dmabuf";
        let write = access.local_write || access.remote_write;
        let mapping = Mapping::new(range, write).map_err(|(kind, hint)| FabricError {
            hint,
            ..self.error(OPERATION, kind)
        })?;
        self.insert(
            OPERATION,
            range.address,
            range.length,
            access,
            Some(mapping),
        )
    }

    fn open_context(
        self: Arc<Self>,
        completion_depth: u32,
    ) -> Result<Box<dyn Context>, FabricError> {
        let fits = self.info.caps.check_completions(completion_depth);
        fits.map_err(|kind| self.error("open_context", kind))?;
        let listener = self.listener.lock().take();
        let Some(listener) = listener else {
            let kind = FabricErrorKind::Unavailable("the device's only context".into());
            return Err(self.error("open_context", kind));
        };
        Ok(Box::new(TcpContext::new(self, listener)?))
    }
}
