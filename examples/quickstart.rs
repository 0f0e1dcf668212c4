//! Prefill and decode in one process: the smallest complete use of the library.
//!
//! `cargo run --example quickstart`

use std::{error::Error, sync::Arc, time::Duration};

use kvpush::{
    Auth, Endpoint, Grant, Pool,
    kv::{models, region_lengths},
    memory::{HostMemory, Memory},
};

const DEADLINE: Duration = Duration::from_secs(30);

fn main() -> Result<(), Box<dyn Error>> {
    let endpoint = |name| {
        Endpoint::builder()
            .name(name)
            .auth(Auth::psk([42; 32]))
            .bind("127.0.0.1:0")
    };
    let (prefill, decode) = (endpoint("prefill")?, endpoint("decode")?);
    for rail in decode.rails() {
        println!("rail: {} {} {}", rail.kind, rail.name, rail.address);
    }
    let source = pool(&prefill)?;
    let destination = pool(&decode)?;

    // Decode side: reserve pages, and hand the right to write them to whoever will.
    let arrival = destination.grant("request-1", &[7, 3, 12, 4], DEADLINE)?;
    let bytes = arrival.grant().encode();
    println!(
        "grant: {} bytes for {} pages",
        bytes.len(),
        arrival.grant().pages().len()
    );

    // Prefill side: push every layer as soon as it is computed.
    let push = prefill.push_blocking(&source, Grant::decode(&bytes)?, DEADLINE)?;
    for layer in 0..source.layout().layers.len() {
        // ... forward(layer) ...
        push.layer(layer, &[0, 1, 2, 3])?;
    }
    let report = push
        .finish_blocking("first token", DEADLINE)
        .ok_or("no end in time")??;
    println!(
        "pushed {} bytes in {} writes, {:?}",
        report.bytes, report.writes, report.elapsed
    );

    // Decode side: everything is there, and so is what the writer said last.
    let tail = arrival
        .complete_blocking(DEADLINE)
        .ok_or("no end in time")??;
    println!("arrived, with {:?}", String::from_utf8_lossy(&tail));
    Ok(())
}

/// A small pool in the shape of Llama 3.1 8B.
fn pool(endpoint: &Endpoint) -> Result<Pool, Box<dyn Error>> {
    let layout = models::LLAMA_3_1_8B.shard(16, 8, 0)?.vllm_flash(16)?;
    let memory = region_lengths(&layout)?
        .into_iter()
        .map(|length| Ok(Arc::new(HostMemory::new(length)?) as Arc<dyn Memory>))
        .collect::<Result<_, kvpush::memory::MemoryError>>()?;
    Ok(endpoint.register_pool(layout, memory)?)
}
