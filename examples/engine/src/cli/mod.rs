//! What can be said on the command line. Doc comments here are the help texts.

pub(crate) mod demo;
pub(crate) mod fetch;
pub(crate) mod info;
pub(crate) mod logs;
pub(crate) mod serve;

use std::{ffi::OsString, time::Duration};

use clap::{Args, Parser, Subcommand, ValueEnum};
use kvpush_engine::{
    model::{KvDtype, LoadOptions, Memory, Source, WeightMode, fetch::cached},
    runtime::Role,
};

/// Errors of commands, for people.
pub(crate) type Error = Box<dyn std::error::Error + Send + Sync>;
/// What a command ends with.
pub(crate) type Result<T> = std::result::Result<T, Error>;

const EXAMPLES: &str = "\
Examples:
  kvpush-engine demo                                     prefill and decode as two processes, and a chat
  kvpush-engine serve                                    a tiny built-in model at http://127.0.0.1:8000
  kvpush-engine fetch                                    SmolLM2-135M-Instruct, verified by its sha256
  kvpush-engine serve --model smollm2 -tp 3              ... over three tensor parallel ranks
  curl -s localhost:8000/v1/chat/completions -H 'content-type: application/json' \\
      -d '{\"messages\": [{\"role\": \"user\", \"content\": \"Hello!\"}]}'

Prefill and decode apart (a gateway in front of both pairs them; docs/engine.md shows what it sends):
  kvpush-engine serve --role prefill --port 8001 --key \"$SECRET\" --model smollm2
  kvpush-engine serve --role decode  --port 8002 --key \"$SECRET\" --model smollm2

Exit codes: 0 ended as asked (after a drain), 1 failed or requests were cut off, 2 wrong command line.";

/// An LLM engine whose prefill and decode may run in different processes: KV-cache pages are pushed from one to the
/// other by kvpush, over RDMA where there is a device, else over TCP or shared memory.
#[derive(Debug, Parser)]
#[command(version, after_help = EXAMPLES, max_term_width = 110)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
    #[command(flatten)]
    pub(crate) logs: logs::LogArgs,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Serve a model: OpenAI's API over HTTP, and gRPC if asked for. SIGTERM drains; a second one does not wait
    Serve(Box<serve::ServeArgs>),
    /// Say what a model is: layers, heads, context, bytes of a block, the digest that peers compare
    Info(Box<ModelArgs>),
    /// Download the model of the examples, SmolLM2-135M-Instruct (98 MB), and verify it
    Fetch,
    /// Show it: a prefill and a decode engine as two processes, a chat between them, and what was pushed
    Demo(demo::DemoArgs),
    /// An engine of the demo; started by the demo itself
    #[command(hide = true)]
    Worker {
        /// What the demo says
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
}

/// Which model, and how it is kept in memory.
#[derive(Debug, Args)]
#[command(next_help_heading = "Model")]
pub(crate) struct ModelArgs {
    /// `tiny` or `tiny-three` (built in, no download), `smollm2` (see `fetch`), a GGUF file, or a folder with
    /// safetensors
    #[arg(long, default_value = "tiny", env = "KVPUSH_ENGINE_MODEL")]
    pub(crate) model: String,
    /// Tensor parallel ranks; also `-tp N`. Must divide the model's KV heads
    #[arg(long, visible_aliases = ["tp"], default_value_t = 1, value_name = "RANKS")]
    pub(crate) tensor_parallel_size: u32,
    /// Element type of keys and values. fp8 is e4m3 with a scale for each token and head: a quarter of the memory and
    /// of the bytes pushed
    #[arg(long, value_enum, default_value_t = KvCacheDtype::F32)]
    pub(crate) kv_cache_dtype: KvCacheDtype,
    /// How weights are kept
    #[arg(long, value_enum, default_value_t = Weights::AsIs)]
    pub(crate) weights: Weights,
    /// Two-batch overlap: a batch is computed as two whose computation and communication interleave
    #[arg(long)]
    pub(crate) enable_tbo: bool,
    /// Blocks of the KV cache [default: as many as --kv-memory-mib holds]
    #[arg(long, value_name = "BLOCKS")]
    pub(crate) num_blocks: Option<u32>,
    /// Memory for the KV cache of all ranks, in MiB
    #[arg(
        long,
        default_value_t = 512,
        value_name = "MIB",
        conflicts_with = "num_blocks"
    )]
    pub(crate) kv_memory_mib: u64,
    /// Tokens of a block
    #[arg(long, default_value_t = 16, value_name = "TOKENS")]
    pub(crate) block_size: usize,
    /// Threads that compute, over all ranks [default: one for each core]
    #[arg(long, default_value_t = 0, hide_default_value = true)]
    pub(crate) threads: usize,
}

impl ModelArgs {
    /// Where the model comes from.
    pub(crate) fn source(&self) -> Result<Source> {
        if self.model == "smollm2" {
            return Ok(Source::Gguf(cached()?));
        }
        Ok(Source::of(&self.model))
    }

    /// What to load.
    pub(crate) fn options(&self) -> Result<LoadOptions> {
        Ok(LoadOptions {
            source: self.source()?,
            tp: self.tensor_parallel_size,
            memory: match self.num_blocks {
                Some(blocks) => Memory::Blocks(blocks),
                None => Memory::Bytes(self.kv_memory_mib.saturating_mul(1 << 20)),
            },
            block_tokens: self.block_size,
            kv_dtype: match self.kv_cache_dtype {
                KvCacheDtype::F32 => KvDtype::F32,
                KvCacheDtype::Fp8 => KvDtype::Fp8E4m3,
            },
            weights: match self.weights {
                Weights::AsIs => WeightMode::AsIs,
                Weights::F32 => WeightMode::F32,
                Weights::Q8_0 => WeightMode::Q8_0,
            },
            threads: self.threads,
            tbo: self.enable_tbo,
        })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum KvCacheDtype {
    /// 32-bit floats
    #[value(alias = "auto", alias = "float32")]
    F32,
    /// 8-bit floats
    #[value(alias = "fp8_e4m3")]
    Fp8,
}

impl KvCacheDtype {
    /// As `/server_info` says it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::Fp8 => "fp8_e4m3",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Weights {
    /// As in the file
    AsIs,
    /// 32-bit floats
    F32,
    /// 8 bits
    #[value(name = "q8_0")]
    Q8_0,
}

/// Turns `-tp N`, as other engines have it, into what clap takes.
pub(crate) fn with_long_tp(arguments: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let long = |argument: OsString| match argument.to_str() {
        Some("-tp") => "--tp".into(),
        Some(text) => match text.strip_prefix("-tp=") {
            Some(ranks) => format!("--tp={ranks}").into(),
            None => argument,
        },
        None => argument,
    };
    arguments.into_iter().map(long).collect()
}

fn role(text: &str) -> std::result::Result<Role, String> {
    text.parse()
}

fn seconds(text: &str) -> std::result::Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number of seconds")?;
    let time = Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())?;
    if time.is_zero() || time > Duration::from_secs(7 * 24 * 3600) {
        return Err("must be above 0 and at most a week".to_owned());
    }
    Ok(time)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn serve(arguments: &[&str]) -> serve::ServeArgs {
        let words = ["kvpush-engine", "serve"].iter().chain(arguments);
        let cli = Cli::parse_from(with_long_tp(words.map(OsString::from)));
        match cli.command {
            Command::Serve(args) => *args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_command_line_is_sound() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn what_other_engines_call_it_is_understood() {
        let args = serve(&[
            "-tp",
            "4",
            "--kv-cache-dtype",
            "fp8_e4m3",
            "--role",
            "decode",
        ]);
        assert_eq!(args.model.tensor_parallel_size, 4);
        assert_eq!(args.model.kv_cache_dtype, KvCacheDtype::Fp8);
        assert_eq!(args.role, Role::Decode);
        assert_eq!(serve(&["-tp=2"]).model.tensor_parallel_size, 2);
        assert_eq!(
            serve(&["--tensor-parallel-size", "3"])
                .model
                .tensor_parallel_size,
            3
        );
    }

    #[test]
    fn nonsense_is_refused() {
        for words in [
            &["--role", "middle"][..],
            &["--deadline", "0"],
            &["--deadline", "-1"],
            &["--deadline", "nan"],
            &["--num-blocks", "3", "--kv-memory-mib", "3"],
        ] {
            let all = ["kvpush-engine", "serve"].iter().chain(words);
            assert!(Cli::try_parse_from(all).is_err(), "{words:?}");
        }
    }
}
