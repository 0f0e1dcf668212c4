//! `demo`.

use std::process::ExitCode;

use clap::Args;
use kvpush::fabric::FabricKind;
use kvpush_engine::demo::{Chat, worker};

use super::Result;

/// Ranks, fabric and message of the demo.
#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// `tiny`, `tiny-three`, a GGUF file or a folder with safetensors [default: what `fetch` has brought, else `tiny`]
    #[arg(long)]
    model: Option<String>,
    /// Ranks of the prefill engine
    #[arg(long, default_value_t = 1, value_name = "RANKS")]
    prefill_tp: u32,
    /// Ranks of the decode engine
    #[arg(long, default_value_t = 1, value_name = "RANKS")]
    decode_tp: u32,
    /// Fabrics that may be used: tcp, shm, verbs [default: the best of all]
    #[arg(long, value_parser = worker::fabric)]
    fabric: Vec<FabricKind>,
    /// What is asked
    #[arg(long)]
    message: Option<String>,
    /// Tokens to answer with at most
    #[arg(long, default_value_t = Chat::default().max_tokens, value_name = "TOKENS")]
    max_tokens: usize,
}

/// Plays the gateway between two engines, and prints what it took.
pub(crate) fn run(args: DemoArgs) -> Result<ExitCode> {
    let chat = Chat {
        model: args.model,
        prefill_tp: args.prefill_tp,
        decode_tp: args.decode_tp,
        fabrics: args.fabric,
        message: args.message.unwrap_or(Chat::default().message),
        max_tokens: args.max_tokens,
    };
    let report = chat.run(&std::env::current_exe()?, &mut std::io::stdout())?;
    println!("\n{report}");
    Ok(ExitCode::SUCCESS)
}
