//! `info`.

use std::process::ExitCode;

use kvpush::memory::Memory as _;
use kvpush_engine::model::load;

use super::{ModelArgs, Result};

/// Loads the model and prints what it is.
pub(crate) fn run(args: &ModelArgs) -> Result<ExitCode> {
    let model = load(&args.options()?)?;
    let config = model.config();
    let digest: String = config.digest.iter().map(|b| format!("{b:02x}")).collect();
    let bytes: u64 = model
        .shards()
        .iter()
        .flat_map(|shard| &shard.memory)
        .map(|memory| memory.length())
        .sum();
    let block = bytes / u64::from(model.blocks().max(1));
    println!("model            {}", config.name);
    println!("digest           {digest}");
    println!("vocabulary       {} tokens", config.vocab);
    println!("context          {} tokens", config.context);
    println!("layers           {}", config.layers);
    println!(
        "heads            {} query, {} key/value, {} elements each",
        config.heads, config.kv_heads, config.head_dim
    );
    println!("ranks            {}", model.shards().len());
    println!(
        "KV cache         {} blocks of {} tokens, {block} bytes each, {} MiB in all",
        model.blocks(),
        model.block_tokens(),
        bytes >> 20
    );
    Ok(ExitCode::SUCCESS)
}
