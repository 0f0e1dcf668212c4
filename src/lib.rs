//! kvpush writes LLM KV-cache pages from a prefill engine straight into the memory of a decode engine: over RDMA where
//! there is a device, over TCP where there is none, with the same interface and the same guarantees.
//!
//! # The two sides
//!
//! The **reader** (decode) owns the pages. It registers its cache as a [`Pool`] and issues a [`Grant`]: the right to
//! write named pages, once, until a deadline. A grant is some bytes that the user carries to the writer in any way.
//! Issuing it returns an [`Arrival`], which tells when each layer, and when everything, has arrived.
//!
//! The **writer** (prefill) registers its own cache as a [`Pool`] and begins a [`Push`] with the grant. It hands over
//! layer after layer as they are computed; handing over never waits for the network. At the end it sends a small *tail*,
//! such as the first token.
//!
//! # Guarantees
//!
//! * A push and an arrival end exactly once: completed, or with a typed error, at the latest soon after the deadline.
//! * When [`Arrival::revoke`] returns, or an arrival reports an error, no write of its grant can land any more.
//! * When a push reports its end, nothing of it is in flight, so its source pages may be reused.
//! * A stale, foreign or damaged grant is refused before a byte is written.
//!
//! They hold between endpoints that run this library. What a malicious peer can do is in `SECURITY.md`.
//!
//! # Waiting
//!
//! Every wait exists as a future (of any runtime, or none), as a blocking call with a timeout (`…_blocking`), and as a
//! poll (`poll_…`). An [`Endpoint`] starts two threads of its own. All handles may be used from any thread.
//!
//! # Example
//!
//! Both sides in one process, over TCP on loopback:
//!
//! ```
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use std::{sync::Arc, time::Duration};
//!
//! use kvpush::{
//!     Auth, Endpoint, Grant,
//!     fabric::FabricKind,
//!     kv::{Dtype, HeadRange, presets::KvShape, region_lengths},
//!     memory::{HostMemory, Memory},
//! };
//!
//! const SOON: Duration = Duration::from_secs(10);
//!
//! // A small cache, laid out as vLLM's FlashAttention back end does it: one region for each layer.
//! let shape = KvShape {
//!     layers: 2,
//!     tokens_per_page: 16,
//!     heads: HeadRange::new(0, 4),
//!     head_dim: 64,
//!     dtype: Dtype::Bf16,
//! };
//! let layout = shape.vllm_flash(8)?;
//! let allocate = || -> Result<Vec<Arc<HostMemory>>, Box<dyn std::error::Error>> {
//!     let lengths = region_lengths(&layout)?;
//!     Ok(lengths
//!         .into_iter()
//!         .map(|length| HostMemory::new(length).map(Arc::new))
//!         .collect::<Result<_, _>>()?)
//! };
//! let shared = |memory: &[Arc<HostMemory>]| -> Vec<Arc<dyn Memory>> {
//!     memory.iter().map(|region| Arc::clone(region) as Arc<dyn Memory>).collect()
//! };
//! let start = |name: &str| {
//!     Endpoint::builder()
//!         .name(name)
//!         .auth(Auth::psk([7; 32])) // 32 random bytes in real life, the same on both sides
//!         .fabrics([FabricKind::Tcp]) // leave this out to use RDMA where there is a device
//!         .bind("127.0.0.1:0")
//! };
//!
//! // The decode side owns the pages and issues the right to write three of them.
//! let decode = start("decode")?;
//! let destination = allocate()?;
//! let pool = decode.register_pool(layout.clone(), shared(&destination))?;
//! let arrival = pool.grant("request-17", &[4, 6, 5], SOON)?;
//! let ticket = arrival.grant().encode(); // travels with the request, by any channel
//!
//! // The prefill side uses it, layer by layer: its pages 0, 1 and 2 go to pages 4, 6 and 5.
//! let prefill = start("prefill")?;
//! let source = allocate()?;
//! source[1].write(0, b"layer 1, page 0")?;
//! let from = prefill.register_pool(layout.clone(), shared(&source))?;
//! let push = prefill.push_blocking(&from, Grant::decode(&ticket)?, SOON)?;
//! for layer in 0..layout.layers.len() {
//!     push.layer(layer, &[0, 1, 2])?;
//! }
//! push.finish_blocking("first token", SOON).expect("ends in time")?;
//!
//! // The decode side knows when a layer is whole, and when everything is.
//! arrival.layer_blocking(1, SOON).expect("ends in time")?;
//! let tail = arrival.complete_blocking(SOON).expect("ends in time")?;
//! assert_eq!(&tail[..], b"first token");
//! let mut bytes = [0; 15];
//! destination[1].read(4 * layout.layers[1].planes[0].page_stride, &mut bytes)?;
//! assert_eq!(&bytes, b"layer 1, page 0");
//! # Ok(())
//! # }
//! ```
//!
//! # Where to go on
//!
//! * [`endpoint`]: everything above, and one-sided reads and writes of exported regions.
//! * [`kv`]: layouts, presets of engines and models, tensor-parallel shards ([`kv::shard::pairing`]).
//! * [`memory`]: host memory, and how to bring your own.
//! * [`fabric`]: devices and their settings; [`fabric::sim`] for tests.
//! * [`topology`]: where GPUs and NICs are, and which are near to each other.

pub mod endpoint;
pub mod fabric;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
pub mod kv;
pub mod memory;
mod protocol;
pub mod topology;
pub(crate) mod wire;

pub use endpoint::{Arrival, Endpoint, Pool, Push};
pub use wire::{
    Auth, ChannelError, Digest, GoodbyeCode, Grant, GrantError, GrantId, Incarnation, PoolId,
    RefuseCode, RegionToken, RejectCode, RevokeReason, WireError, WireErrorKind,
};

/// The raw bindings, reachable only by the crates that check them against those of others.
#[cfg(feature = "oracle")]
#[doc(hidden)]
pub mod oracle {
    pub use crate::fabric::verbs::sys::*;

    pub mod gpu {
        pub use crate::memory::gpu::sys::{cuda, hip, hsa};
    }
}
