//! Putting the parts together: a model, the endpoint that its caches are registered with, the engine.
//!
//! Used by the command line, the demo and the tests, so that all of them run the same engine.

use std::{fmt, str::FromStr, time::Duration};

use kvpush::{
    Auth, Endpoint,
    endpoint::{DrainReport, EndpointError},
    fabric::{FabricKind, verbs::VerbsConfig},
};

use crate::{
    engine::{Config, Engine, Handle},
    model::Model,
    request::Leg,
    transfer::{KvPush, SetupError, Transfers},
};

/// Room for what a prefill engine says with the pages: first tokens with their log probabilities.
const TAIL_CAPACITY: u32 = 16 << 10;

/// Which part of the work an engine takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Role {
    /// Whole requests, and either leg if it has peers.
    #[default]
    Both,
    /// Prefill legs.
    Prefill,
    /// Decode legs.
    Decode,
}

impl Role {
    /// Whether it takes requests of this kind.
    pub fn takes(self, leg: &Leg) -> bool {
        match (self, leg) {
            (Self::Both, _) => true,
            (Self::Prefill, Leg::Prefill { .. } | Leg::PrefillHeld) => true,
            (Self::Decode, Leg::Decode { .. }) => true,
            (Self::Prefill | Self::Decode, _) => false,
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Both => "both",
            Self::Prefill => "prefill",
            Self::Decode => "decode",
        })
    }
}

impl FromStr for Role {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "both" => Ok(Self::Both),
            "prefill" => Ok(Self::Prefill),
            "decode" => Ok(Self::Decode),
            _ => Err(format!("{text:?} is no role: both, prefill, decode")),
        }
    }
}

/// How an engine reaches its peers.
#[derive(Clone, Debug)]
pub struct Link {
    /// A name for logs and metrics, its own and the peers'.
    pub name: String,
    /// Where kvpush's control channel listens (`host:port`; port 0 takes a free one).
    pub bind: String,
    /// What peers dial instead, where that is not reachable.
    pub advertise: Vec<String>,
    /// What all engines share. Without one everybody who reaches the port may write into the cache.
    pub key: Option<String>,
    /// Fabrics to use; all if empty.
    pub fabrics: Vec<FabricKind>,
    /// How long a peer may be silent before it is given up, and half of the time after which it is asked. `None` is
    /// kvpush's default.
    pub silence: Option<Duration>,
    /// How long an RDMA device waits for an acknowledgement, as verbs number it (4.096 µs times two to this power).
    /// `None` is kvpush's default, which is too short for emulated devices.
    pub ack_timeout: Option<u8>,
}

impl Link {
    /// A listener at `bind` that knows `key`.
    pub fn new(name: impl Into<String>, bind: impl Into<String>, key: Option<String>) -> Self {
        Self {
            name: name.into(),
            bind: bind.into(),
            advertise: Vec::new(),
            key,
            fabrics: Vec::new(),
            silence: None,
            ack_timeout: None,
        }
    }

    /// Only these fabrics.
    pub fn fabrics(mut self, fabrics: impl IntoIterator<Item = FabricKind>) -> Self {
        self.fabrics = fabrics.into_iter().collect();
        self
    }

    /// Starts the endpoint.
    ///
    /// # Errors
    ///
    /// It cannot listen there, or has no rail.
    pub fn start(&self) -> Result<Endpoint, EndpointError> {
        let auth = match &self.key {
            Some(key) => Auth::passphrase(key),
            None => Auth::insecure_plaintext(),
        };
        let mut builder = Endpoint::builder()
            .name(&self.name)
            .auth(auth)
            .tail_capacity(TAIL_CAPACITY)
            .max_transfers(1024);
        if !self.advertise.is_empty() {
            builder = builder.advertise(&self.advertise);
        }
        if !self.fabrics.is_empty() {
            builder = builder.fabrics(self.fabrics.iter().copied());
        }
        if let Some(silence) = self.silence {
            builder = builder.keepalive(silence / 2, silence);
        }
        if let Some(timeout) = self.ack_timeout {
            builder = builder.verbs(VerbsConfig {
                timeout,
                ..VerbsConfig::default()
            });
        }
        builder.bind(self.bind.as_str())
    }
}

/// Why an engine does not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// A role that needs peers has no way to them.
    #[error("the role {0} needs an endpoint for its peers")]
    NoLink(Role),
    /// The endpoint.
    #[error("endpoint: {0}")]
    Endpoint(#[from] EndpointError),
    /// The caches cannot be registered.
    #[error("caches: {0}")]
    Transfers(#[from] SetupError),
    /// The system gives no thread.
    #[error("engine thread: {0}")]
    Thread(std::io::Error),
}

/// A running engine and its endpoint.
pub struct Runtime {
    role: Role,
    // Dropped first: its transfers end in good order only while the endpoint lives.
    engine: Engine,
    endpoint: Option<Endpoint>,
}

impl Runtime {
    /// Starts an engine. Blocks while its caches are pinned.
    ///
    /// # Errors
    ///
    /// [`StartError`].
    pub fn start(
        role: Role,
        model: Box<dyn Model>,
        link: Option<&Link>,
        config: Config,
    ) -> Result<Self, StartError> {
        if link.is_none() && role != Role::Both {
            return Err(StartError::NoLink(role));
        }
        let endpoint = link.map(Link::start).transpose()?;
        if let Some(endpoint) = &endpoint {
            for rail in endpoint.rails() {
                tracing::info!(fabric = %rail.kind, device = rail.name, address = %rail.address, "rail");
            }
        }
        Self::over(role, model, endpoint, config)
    }

    /// The same over an endpoint that there is.
    ///
    /// # Errors
    ///
    /// [`StartError`].
    pub fn over(
        role: Role,
        model: Box<dyn Model>,
        endpoint: Option<Endpoint>,
        config: Config,
    ) -> Result<Self, StartError> {
        let transfers = match &endpoint {
            None => None,
            Some(endpoint) => {
                let transfers = KvPush::new(endpoint.clone(), model.as_ref())?;
                Some(Box::new(transfers) as Box<dyn Transfers>)
            }
        };
        let engine = Engine::start(model, transfers, config).map_err(StartError::Thread)?;
        Ok(Self {
            role,
            engine,
            endpoint,
        })
    }

    /// Which requests it takes.
    pub fn role(&self) -> Role {
        self.role
    }

    /// To talk to the engine by.
    pub fn handle(&self) -> Handle {
        self.engine.handle()
    }

    /// The endpoint, if it has peers.
    pub fn endpoint(&self) -> Option<&Endpoint> {
        self.endpoint.as_ref()
    }

    /// Ends what is under way, then the endpoint: peers may finish until `timeout`.
    pub fn shutdown(self, timeout: Duration) -> Option<DrainReport> {
        let Self {
            engine, endpoint, ..
        } = self;
        engine.shutdown();
        endpoint.map(|endpoint| endpoint.drain_blocking(timeout))
    }
}
