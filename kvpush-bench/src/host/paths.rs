//! `kvpush-bench devices`: how each rail would reach each kind of memory, found out by trying. A small pool in each is
//! registered with an endpoint that nobody is told of, and given back at once. A pool, because pools may be staged: so a
//! rail that refuses the memory has a path as well, and does not hide those of the others.

use std::time::Duration;

use kvpush::{
    Auth, Endpoint,
    endpoint::RegionPaths,
    fabric::verbs::VerbsConfig,
    kv::{Dtype, HeadRange, KvLayout, presets::KvShape, region_lengths},
};
use serde_json::{Value, json};

use super::devices::table;
use crate::{
    cli::{MemoryChoice, MemoryKind},
    content::Block,
    error::{Context, Error, Result},
};

/// Pages of each pool: 128 KiB, more than one page of memory, of GPUs too.
const PAGES: u32 = 32;
/// For all pools.
const STAGING: u64 = 2 << 20;

/// One kind of memory and its ways, or why it cannot be had or reached.
pub(super) struct Tried {
    memory: MemoryChoice,
    outcome: Result<RegionPaths, String>,
}

/// Tries host memory, dmabufs of it, and the GPUs with these numbers in HIP and CUDA.
pub(super) fn try_all([hip, cuda]: [Vec<u32>; 2]) -> Result<Vec<Tried>> {
    // Whoever found the port could push nothing: there is no pool, and no grant.
    let endpoint = Endpoint::builder()
        .name("kvpush-bench devices")
        .auth(Auth::insecure_plaintext())
        .open_timeout(Duration::from_secs(1))
        .max_transfers(1)
        .staging_memory(STAGING)
        .verbs(VerbsConfig::default())
        .bind("127.0.0.1:0")
        .context("open the rails")?;
    let numbered = |kind, numbers: Vec<u32>| {
        let numbers = numbers.into_iter();
        numbers.map(move |device| MemoryChoice { kind, device })
    };
    let plain = [MemoryKind::Host, MemoryKind::Udmabuf];
    let plain = plain.map(|kind| MemoryChoice { kind, device: 0 });
    let all = plain.into_iter();
    let all = all.chain(numbered(MemoryKind::Hip, hip));
    let all = all.chain(numbered(MemoryKind::Cuda, cuda));
    Ok(all
        .map(|memory| Tried {
            memory,
            outcome: paths(&endpoint, memory).map_err(|error| error.to_string()),
        })
        .collect())
}

fn paths(endpoint: &Endpoint, memory: MemoryChoice) -> Result<RegionPaths> {
    let layout = layout()?;
    let lengths = region_lengths(&layout).context("lay out a pool")?;
    let blocks = lengths
        .into_iter()
        .map(|length| Block::allocate(memory, length))
        .collect::<Result<Vec<_>, _>>()?;
    let regions = blocks.iter().map(Block::memory).collect();
    let pool = endpoint
        .register_pool(layout, regions)
        .context("register")?;
    let paths = pool.paths().into_iter().next();
    paths.ok_or_else(|| Error::failed("register: the pool has no region"))
}

/// One region of a size that every kind of memory can have.
fn layout() -> Result<KvLayout> {
    let shape = KvShape {
        layers: 1,
        tokens_per_page: 16,
        heads: HeadRange::new(0, 1),
        head_dim: 64,
        dtype: Dtype::Bf16,
    };
    shape.vllm_flash(PAGES).context("lay out a pool")
}

/// For people.
pub(super) fn text(tried: &[Tried]) -> String {
    let mut table = table(&["memory", "rail", "path", "better ones, and why not"]);
    let mut failures = String::new();
    for Tried { memory, outcome } in tried {
        match outcome {
            Err(error) => failures.push_str(&format!("no path: {error}\n")),
            Ok(paths) => {
                for rail in &paths.rails {
                    let port = match rail.port {
                        0 => String::new(),
                        port => format!(":{port}"),
                    };
                    let refused = rail.refused.iter().map(ToString::to_string);
                    let refused: Vec<_> = refused.collect();
                    table.add_row(vec![
                        memory.to_string(),
                        format!("{}{port}", rail.device),
                        rail.path.to_string(),
                        match refused.is_empty() {
                            true => "-".to_owned(),
                            false => refused.join("\n"),
                        },
                    ]);
                }
            }
        }
    }
    format!("{table}\n{failures}")
}

/// For scripts.
pub(super) fn json(tried: &[Tried]) -> Value {
    let rows = tried.iter().map(|Tried { memory, outcome }| match outcome {
        Err(error) => json!({ "memory": memory.to_string(), "error": error }),
        Ok(paths) => {
            let rails = paths.rails.iter().map(|rail| {
                let refused = rail.refused.iter().map(
                    |refusal| json!({ "path": refusal.path.to_string(), "reason": refusal.reason }),
                );
                json!({
                    "device": rail.device,
                    "port": rail.port,
                    "fabric": rail.fabric.to_string(),
                    "path": rail.path.to_string(),
                    "refused": refused.collect::<Vec<_>>(),
                })
            });
            json!({ "memory": memory.to_string(), "rails": rails.collect::<Vec<_>>() })
        }
    });
    Value::Array(rows.collect())
}
