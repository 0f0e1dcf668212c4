//! The shared-memory rail: configuration, listener, registrations. Any thread may call.

use std::{
    fs, io,
    net::{IpAddr, UdpSocket},
    os::{
        fd::{BorrowedFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;

use super::{
    super::{
        Access, Capabilities, Context, Device, DeviceInfo, DmabufRange, FabricError,
        FabricErrorKind, FabricKind, FileRange, LinkState, MemoryKeys, WindowCaps,
        mapping::Mapping, software::os_error,
    },
    connect::listener_name,
    context::ShmContext,
    memory::{Files, InFile, Registry},
    responder::MAX_MESSAGE,
    sys,
    wire::{Address, Host, MAX_DEPTH, MAX_INLINE, MAX_SGE, Token},
};

/// How to open a [`ShmDevice`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShmConfig {
    /// The device's name in [`DeviceInfo`], errors and metrics.
    pub name: String,
    /// Whether to read peers' memory that is in no file (`process_vm_readv(2)`), where the kernel allows it. Without
    /// it a peer must have registered only files before it offers a lane.
    pub read_process_memory: bool,
    /// Bytes copied for one lane before others have their turn.
    pub slice: u32,
    /// How long a lane may take from [`Context::connect_lane`] until requests flow, on either side.
    pub connect_timeout: Duration,
    /// How long an accepted socket may take to name a lane that is waiting for it.
    pub hello_timeout: Duration,
    /// How long a write with immediate waits for the peer to post a receive.
    pub rnr_timeout: Duration,
    /// How long a peer may make no progress with requests before the lane fails; noticed after at most twice that.
    pub peer_timeout: Duration,
    /// Most accepted sockets that have not named a lane yet.
    pub max_pending: usize,
}

impl Default for ShmConfig {
    fn default() -> Self {
        Self {
            name: "shm".into(),
            read_process_memory: true,
            slice: 512 << 10,
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
    max_send_depth: MAX_DEPTH,
    max_receive_depth: 1 << 16,
    max_completions: 1 << 20,
    max_sge: MAX_SGE,
    max_inline: MAX_INLINE,
    max_message: MAX_MESSAGE,
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

/// The rail between processes of one host: a socket to meet at, and the registrations.
#[derive(Debug)]
pub struct ShmDevice {
    config: ShmConfig,
    info: DeviceInfo,
    host: Host,
    listener_number: Token,
    listener: Mutex<Option<OwnedFd>>,
    /// Stays where it is while the device lives: peers find it by its address.
    beacon: Box<Token>,
    registry: Arc<Registry>,
    files: Files,
}

impl ShmDevice {
    /// Opens the rail.
    ///
    /// # Errors
    ///
    /// [`FabricErrorKind::Os`] with the errno of the socket, [`FabricErrorKind::Unavailable`] where the system does
    /// not say which boot it is, or draws no random numbers.
    pub fn open(config: ShmConfig) -> Result<Arc<Self>, FabricError> {
        let failed = |operation, kind, hint| FabricError {
            device: config.name.clone(),
            port: 0,
            operation,
            kind,
            hint,
        };
        let host = this_host().map_err(|e| {
            let kind = FabricErrorKind::Unavailable(format!("the identity of the host: {e}"));
            failed("open", kind, Some("/proc must be mounted"))
        })?;
        let (mut number, mut beacon) = ([0; 16], Box::new([0; 16]));
        for secret in [&mut number, &mut *beacon] {
            getrandom::fill(secret).map_err(|e| {
                let kind = FabricErrorKind::Unavailable(format!("random numbers: {e}"));
                failed("open", kind, None)
            })?;
        }
        let listener = sys::listen(&listener_name(&number))
            .map_err(|e| failed("listen", os_error(&e), None))?;
        let info = DeviceInfo {
            kind: FabricKind::Shm,
            name: config.name.clone(),
            port: 0,
            address: format!("host {}, pid {}", short(&host), std::process::id()),
            link: LinkState::Active,
            bits_per_second: 0,
            pci: None,
            caps: CAPABILITIES,
        };
        Ok(Arc::new(Self {
            config,
            info,
            host,
            listener_number: number,
            listener: Mutex::new(Some(listener)),
            beacon,
            registry: Arc::new(Registry::new()),
            files: Files::default(),
        }))
    }

    pub(super) fn config(&self) -> &ShmConfig {
        &self.config
    }

    pub(super) fn host(&self) -> &Host {
        &self.host
    }

    pub(super) fn registry(&self) -> &Arc<Registry> {
        &self.registry
    }

    /// The address of the lane with this token.
    pub(super) fn address(&self, token: Token) -> Address {
        let at = std::ptr::from_ref::<Token>(&self.beacon).expose_provenance() as u64;
        let files_only = self.registry.all(Option::is_some);
        Address::new(
            self.host,
            self.listener_number,
            *self.beacon,
            at,
            token,
            files_only,
        )
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

    fn insert(
        &self,
        operation: &'static str,
        (address, length): (u64, u64),
        access: Access,
        mapping: Option<Mapping>,
        file: Option<InFile>,
    ) -> Result<MemoryKeys, FabricError> {
        let keys = self
            .info
            .caps
            .check_range(address, length)
            .and_then(|()| self.registry.insert(address, length, access, mapping, file));
        keys.map_err(|kind| self.error(operation, kind))
    }

    /// Where peers find `length` bytes at `offset` of a file, if they can map it safely.
    fn share(&self, fd: BorrowedFd<'_>, offset: u64, length: u64) -> Option<InFile> {
        let share = || {
            let Some(facts) = sys::facts(fd)? else {
                return Ok(None);
            };
            let end = offset.checked_add(length);
            if end.is_none_or(|end| end > facts.length) {
                return Ok(None);
            }
            // Peers only read. (A dmabuf cannot be opened again.)
            let fd = sys::reopen_read_only(fd).or_else(|_| fd.try_clone_to_owned())?;
            let file = self.files.share(fd, &facts);
            Ok(file.map(|file| InFile { file, offset }))
        };
        let shared: io::Result<_> = share();
        if !matches!(shared, Ok(Some(_))) {
            tracing::debug!(
                ?shared,
                "a file that peers cannot map; they will read this process's memory"
            );
        }
        shared.ok().flatten()
    }
}

impl Device for ShmDevice {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn may_reach(&self, host: IpAddr) -> bool {
        // An address of this host can be bound to, and no other can. Nothing is sent.
        UdpSocket::bind((host, 0)).is_ok()
    }

    unsafe fn register(
        &self,
        address: u64,
        length: u64,
        access: Access,
    ) -> Result<MemoryKeys, FabricError> {
        self.insert("register", (address, length), access, None, None)
    }

    unsafe fn register_file(
        &self,
        range: &FileRange<'_>,
        access: Access,
    ) -> Result<MemoryKeys, FabricError> {
        let file = self.share(range.fd, range.offset, range.length);
        let place = (range.address, range.length);
        self.insert("register", place, access, None, file)
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
        let file = self.share(range.fd, range.offset, range.length);
        let place = (range.address, range.length);
        self.insert(OPERATION, place, access, Some(mapping), file)
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
        Ok(Box::new(ShmContext::new(self, listener)?))
    }
}

/// Which boot of which kernel this is, and in which name spaces this process lives.
fn this_host() -> io::Result<Host> {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let digits: Vec<u8> = text
        .chars()
        .filter_map(|c| c.to_digit(16))
        .map(|digit| digit as u8)
        .collect();
    let mut boot = [0; 16];
    if digits.len() != 2 * boot.len() {
        return Err(io::ErrorKind::InvalidData.into());
    }
    for (byte, pair) in boot.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = pair.iter().fold(0, |byte, digit| byte << 4 | digit);
    }
    let namespace = |name: &str| {
        let inode = fs::metadata(format!("/proc/self/ns/{name}")).map(|data| data.ino());
        inode.map(|inode| (inode as u32).into())
    };
    Ok(Host {
        boot,
        pid_namespace: namespace("pid")?,
        net_namespace: namespace("net")?,
    })
}

/// Enough of a host's identity for people.
fn short(host: &Host) -> String {
    let head = host.boot.iter().take(4);
    head.map(|byte| format!("{byte:02x}")).collect()
}
