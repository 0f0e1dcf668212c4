//! Endpoints over one fabric, and pools whose every byte is known.

use std::{
    net::Ipv4Addr,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    time::{Duration, Instant},
};

use kvpush::{
    Auth, Endpoint, Pool,
    endpoint::{Builder, Protection},
    fabric::{FabricKind, sim::SimNet, verbs::VerbsConfig},
    kv::{KvLayout, region_lengths},
    memory::{HostMemory, Memory},
};

/// Ample time for what must happen; whoever waits so long has found a hang.
pub(crate) const LONG: Duration = Duration::from_secs(60);

/// Byte of destinations that nobody has written.
pub(crate) const POISON: u8 = 0xa5;

/// How the endpoints of a test reach each other.
pub(crate) struct Fabric {
    kind: FabricKind,
    net: Option<SimNet>,
    protection: Protection,
}

impl Fabric {
    pub(crate) fn sim() -> Self {
        Self {
            kind: FabricKind::Sim,
            net: Some(SimNet::free_running(seed())),
            protection: Protection::Region,
        }
    }

    pub(crate) fn tcp() -> Self {
        Self {
            kind: FabricKind::Tcp,
            net: None,
            protection: Protection::Region,
        }
    }

    pub(crate) fn shm() -> Self {
        Self {
            kind: FabricKind::Shm,
            net: None,
            protection: Protection::Region,
        }
    }

    pub(crate) fn verbs() -> Self {
        Self {
            kind: FabricKind::Verbs,
            net: None,
            protection: Protection::Region,
        }
    }

    /// The same with windows for every grant.
    pub(crate) fn sim_windows() -> Self {
        Self::sim().with_windows()
    }

    pub(crate) fn tcp_windows() -> Self {
        Self::tcp().with_windows()
    }

    pub(crate) fn shm_windows() -> Self {
        Self::shm().with_windows()
    }

    pub(crate) fn verbs_windows() -> Self {
        Self::verbs().with_windows()
    }

    fn with_windows(self) -> Self {
        Self {
            protection: Protection::Window,
            ..self
        }
    }

    /// The builder of an endpoint of this fabric.
    pub(crate) fn builder(&self, name: &str) -> Builder {
        let builder = Endpoint::builder()
            .name(name)
            .auth(key())
            .protection(self.protection)
            .revoke_grace(Duration::from_secs(5));
        match &self.net {
            Some(net) => builder.fabrics([]).device(net.device(name)),
            None => builder.fabrics([self.kind]).verbs(patient()),
        }
    }

    /// The simulated net, if it is one.
    pub(crate) fn net(&self) -> Option<&SimNet> {
        self.net.as_ref()
    }

    /// An endpoint with default settings.
    pub(crate) fn endpoint(&self, name: &str) -> Endpoint {
        let endpoint = self
            .builder(name)
            .bind("127.0.0.1:0")
            .expect("start an endpoint");
        assert!(
            endpoint.rails().all(|rail| rail.kind == self.kind),
            "the fabric under test"
        );
        endpoint
    }

    /// An endpoint on an address of its own, whose port no other test takes when it has been shut down.
    pub(crate) fn alone(&self, name: &str) -> Endpoint {
        static NEXT: AtomicU8 = AtomicU8::new(2);
        let host = Ipv4Addr::new(127, 0, 1, NEXT.fetch_add(1, Ordering::Relaxed));
        self.builder(name)
            .bind((host, 0))
            .expect("start an endpoint")
    }

    /// A writer and a reader.
    pub(crate) fn pair(&self) -> (Endpoint, Endpoint) {
        (self.endpoint("prefill"), self.endpoint("decode"))
    }
}

/// An emulated host often takes longer to acknowledge than the 67 ms that suit real ones; this is 1.07 s.
fn patient() -> VerbsConfig {
    VerbsConfig {
        timeout: 18,
        ..VerbsConfig::default()
    }
}

pub(crate) fn key() -> Auth {
    Auth::psk([7; 32])
}

/// The seed of this run.
pub(crate) fn seed() -> u64 {
    let seed = match std::env::var("KVPUSH_SEED") {
        Ok(seed) => seed.parse().expect("KVPUSH_SEED is a number"),
        Err(_) => std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .expect("a clock after 1970")
            .as_nanos() as u64,
    };
    println!("KVPUSH_SEED={seed}");
    seed
}

/// A small random number generator (splitmix64; Steele, Lea and Flood, OOPSLA 2014).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    pub(crate) fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }

    /// `count` different numbers below `limit`, in random order.
    pub(crate) fn distinct(&mut self, count: usize, limit: u32) -> Vec<u32> {
        let mut all: Vec<u32> = (0..limit).collect();
        for i in 0..count {
            let j = i + self.below((all.len() - i) as u64) as usize;
            all.swap(i, j);
        }
        all.truncate(count);
        all
    }
}

/// A pool and its memory.
pub(crate) struct Cache {
    pub(crate) pool: Pool,
    pub(crate) layout: KvLayout,
    pub(crate) memory: Vec<Arc<HostMemory>>,
}

impl Cache {
    /// A pool filled with bytes that depend on `seed`, region and offset.
    pub(crate) fn filled(endpoint: &Endpoint, layout: &KvLayout, seed: u64) -> Self {
        let cache = Self::poisoned(endpoint, layout);
        for (region, memory) in cache.memory.iter().enumerate() {
            let mut random = Random(seed ^ (region as u64) << 32);
            let bytes: Vec<u8> = (0..memory.length().div_ceil(8))
                .flat_map(|_| random.next().to_le_bytes())
                .collect();
            memory.write(0, &bytes[..memory.length() as usize]).unwrap();
        }
        cache
    }

    /// A pool in which every byte is [`POISON`].
    pub(crate) fn poisoned(endpoint: &Endpoint, layout: &KvLayout) -> Self {
        let memory: Vec<_> = region_lengths(layout)
            .unwrap()
            .into_iter()
            .map(|length| {
                let memory = Arc::new(HostMemory::new(length).unwrap());
                memory.fill(0, length, POISON).unwrap();
                memory
            })
            .collect();
        let shared = memory
            .iter()
            .map(|memory| Arc::clone(memory) as Arc<dyn Memory>)
            .collect();
        let pool = endpoint
            .register_pool(layout.clone(), shared)
            .expect("register a pool");
        Self {
            pool,
            layout: layout.clone(),
            memory,
        }
    }

    /// A copy of all bytes.
    pub(crate) fn bytes(&self) -> Vec<Vec<u8>> {
        self.memory
            .iter()
            .map(|memory| {
                let mut bytes = vec![0; memory.length() as usize];
                memory.read(0, &mut bytes).unwrap();
                bytes
            })
            .collect()
    }
}

/// Waits until `condition` holds.
#[track_caller]
pub(crate) fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + LONG;
    while !condition() {
        assert!(Instant::now() < end, "never: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Waits for what another thread does soon.
pub(crate) fn soon(what: &str, done: impl Fn() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < LONG, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}
