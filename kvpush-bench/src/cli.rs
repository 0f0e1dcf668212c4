//! The command line. Doc comments here are the help texts.

use std::{net::SocketAddr, path::PathBuf};

use clap::{Args, Parser, Subcommand, ValueEnum};
use kvpush::kv::models::{self, Model};
use serde::{Deserialize, Serialize};

/// The server's port where none is given.
pub(crate) const DEFAULT_PORT: u16 = 7700;

const EXAMPLES: &str = "\
Examples:
  kvpush-bench                                   the main job, on this machine alone
  kvpush-bench --model deepseek-r1 --pages 64    another model
  kvpush-bench --tp-prefill 4 --tp-decode 2      four prefill ranks push to two decode ranks
  kvpush-bench --sweep 4k..1m --plot sweep.svg   raw page sizes
  kvpush-bench serve --key \"$SECRET\"             on the decode host ...
  kvpush-bench push decode-host --key \"$SECRET\"  ... and on the prefill host
  kvpush-bench compare                           beside iperf3, perftest and memcpy, with ratios
  kvpush-bench doctor                            what is wrong with this host

Exit codes: 0 every byte verified, 1 something failed, 2 wrong command line.";

const COMPARISON: &str = "\
What is compared:
  tcp     iperf3 over 127.0.0.1, as many streams as lanes, calls of one page each
  verbs   ib_write_bw with as many queue pairs as lanes and messages of one page; ib_write_lat
          (half of a round trip, both sides spinning) with 64 bytes, beside one-sided writes of
          64 bytes from the call until the caller knows that it is acknowledged, polling
  shm     one thread that copies the same pages by memcpy
  Pages that lie apart cannot be merged: one page is one write. Runs of 16 can.

How it measures:
  Each repetition runs the other program and then kvpush, for each size, one after the other.
  The ratio of a repetition is of these two neighbours, so a machine that is slow for a while is
  slow for both; its median and spread are printed. kvpush verifies every byte, outside of the
  measured time; the other programs do not verify any.

  The tools measure between two processes on this machine. Between hosts, run them by hand beside
  `kvpush-bench push`.

Examples:
  kvpush-bench compare
  kvpush-bench compare --fabric verbs --devices mlx5_0 --peer-device mlx5_1 --lanes 2
  kvpush-bench compare --fabric tcp --sizes 64k --moved 1g --repeat 9 --json tcp.json

Exit codes: 0 every byte verified and every reference measured, 1 something failed, 2 wrong
command line, 3 every byte verified but a program to compare with is not installed.";

const METHOD: &str = "\
How it measures:
  The prefill side fills its pages by a formula of (seed, request, layer, key or value,
  position, token, head) and pushes each request layer by layer. The decode side computes
  the formula again for every byte of its pools, those that nobody may write included.
  Filling and verifying are not in the measured time. A first round does not count.

  GB/s      payload bytes / 1e9 / seconds, from the first layer handed over to the last
            acknowledgement
  p50, p99  time of one request (of one batch in a sweep) at the prefill side: from its
            first layer handed over until all its ranks know that everything is in the
            decode side's memory; grants are issued and pushes opened before
  pages/s   pages of one layer
  CPU s/GB  CPU seconds, user and system, of both processes, for each GB";

/// Measures how fast kvpush moves KV-cache pages between a prefill and a decode process, and verifies every byte.
///
/// Without a command it runs both on this machine, over the best fabric found: RDMA if there is a usable device, else
/// TCP.
#[derive(Debug, Parser)]
#[command(version, after_help = EXAMPLES, after_long_help = format!("{METHOD}\n\n{EXAMPLES}"),
    args_conflicts_with_subcommands = true, max_term_width = 110)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
    #[command(flatten)]
    pub(crate) run: RunArgs,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Be the decode side for pushers on other hosts, until Ctrl-C or SIGTERM
    Serve(ServeArgs),
    /// Be the prefill side: push to a server and report
    Push(Box<PushArgs>),
    /// Measure beside iperf3 (TCP), perftest (RDMA) and memcpy (shared memory) on this machine, and print ratios
    #[command(after_long_help = COMPARISON)]
    Compare(CompareArgs),
    /// List the RDMA devices and GPUs of this host: ports, GIDs, MTU, limits, dmabufs, what is near to what
    Devices(DevicesArgs),
    /// Say what is wrong with this host for RDMA, and how to mend it
    Doctor(HostArgs),
    /// The decode side of a run on one machine; started by the tool itself
    #[command(hide = true)]
    Decode(DecodeArgs),
}

#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    #[command(flatten)]
    pub(crate) workload: WorkloadArgs,
    #[command(flatten)]
    pub(crate) fabric: FabricArgs,
    #[command(flatten)]
    pub(crate) memory: MemoryArgs,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// The server's protocol socket hands out grants for its own scratch memory only, within its memory limit; it is
/// neither encrypted nor authenticated. What moves pages, the endpoints, is authenticated with the key.
#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    /// Address to listen on. The endpoints take free ports beside it, on the address that the pusher dialled
    #[arg(long, default_value_t = SocketAddr::from(([0, 0, 0, 0], DEFAULT_PORT)), value_name = "ADDRESS:PORT")]
    pub(crate) bind: SocketAddr,
    #[command(flatten)]
    pub(crate) key: KeyArgs,
    #[command(flatten)]
    pub(crate) fabric: FabricArgs,
    #[command(flatten)]
    pub(crate) memory: MemoryArgs,
    /// Most memory that a pusher's workload may take here [default: half of what is available]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub(crate) memory_limit: Option<u64>,
}

#[derive(Debug, Args)]
pub(crate) struct PushArgs {
    /// The server: HOST or HOST:PORT
    pub(crate) host: String,
    #[command(flatten)]
    pub(crate) key: KeyArgs,
    #[command(flatten)]
    pub(crate) run: RunArgs,
}

#[derive(Debug, Args)]
pub(crate) struct DecodeArgs {
    #[command(flatten)]
    pub(crate) fabric: FabricArgs,
    #[command(flatten)]
    pub(crate) memory: MemoryArgs,
}

#[derive(Debug, Args)]
pub(crate) struct DevicesArgs {
    #[command(flatten)]
    pub(crate) host: HostArgs,
    /// Read the topology from this tree, such as one recorded on another host
    #[arg(long, value_name = "DIRECTORY", default_value = "/sys")]
    pub(crate) sysfs: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct HostArgs {
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[group(id = "authentication", required = true, multiple = false, args = ["key", "insecure"])]
pub(crate) struct KeyArgs {
    /// Long random secret that both sides share, such as `openssl rand -base64 32` prints
    #[arg(
        long,
        env = "KVPUSH_KEY",
        hide_env_values = true,
        value_name = "PASSPHRASE"
    )]
    pub(crate) key: Option<String>,
    /// No key: whoever reaches the ports can push into the server's scratch memory. Both sides must say so
    #[arg(long)]
    pub(crate) insecure: bool,
}

/// Without --fabric, every fabric that this machine has is compared.
#[derive(Debug, Args)]
pub(crate) struct CompareArgs {
    #[command(flatten)]
    pub(crate) fabric: FabricArgs,
    /// RDMA device of the decode side [default: the second active one; that of --devices, if given]
    #[arg(long, value_name = "DEVICE[:PORT]")]
    pub(crate) peer_device: Option<String>,
    /// Page sizes, each of which is a message of the other program: 4k..1m (times 4 each), or separated by commas
    #[arg(long, value_name = "SIZES", value_parser = sweep, default_value = "4k..1m")]
    pub(crate) sizes: Sweep,
    /// Lanes of kvpush, streams of iperf3, queue pairs of ib_write_bw
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=16))]
    pub(crate) lanes: u16,
    /// Bytes that each measurement moves
    #[arg(long, value_name = "SIZE", default_value = "256m", value_parser = size)]
    pub(crate) moved: u64,
    /// How often everything is measured; medians are reported
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) repeat: u32,
    /// Write the lines to a file: a JSON array with one object per line
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// Seed of contents and page tables
    #[arg(long, value_name = "NUMBER")]
    pub(crate) seed: Option<u64>,
}

/// How the driver thread of a prefill endpoint waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum PollingChoice {
    /// Spins a little, then sleeps
    Adaptive,
    /// Spins always, and so does the thread that waits for one-sided access
    Busy,
}

/// Which fabric carries the pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum FabricChoice {
    /// Shared memory on one host, else RDMA where both sides have a usable device, else TCP
    Auto,
    /// The embedded TCP fabric
    Tcp,
    /// Shared memory, between processes of one host
    Shm,
    /// RDMA only
    Verbs,
}

#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Fabric")]
pub(crate) struct FabricArgs {
    /// What carries the pages
    #[arg(long, value_enum, default_value_t = FabricChoice::Auto)]
    pub(crate) fabric: FabricChoice,
    /// Use only these RDMA devices of this side: mlx5_0, or mlx5_0:1 for one port
    #[arg(long, value_delimiter = ',', value_name = "DEVICE[:PORT]")]
    pub(crate) devices: Vec<String>,
    /// Index of the GID to use instead of the first suitable RoCE v2 GID
    #[arg(long, value_name = "INDEX")]
    pub(crate) gid_index: Option<u8>,
    /// GRH traffic class (DSCP in the upper six bits)
    #[arg(long, value_name = "CLASS")]
    pub(crate) traffic_class: Option<u8>,
    /// Time until an RDMA device sends an unacknowledged packet again: 4.096 µs · 2^N [default: 14, 67 ms]. More for
    /// hosts that may take longer to answer, such as emulated ones
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=31))]
    pub(crate) ack_timeout: Option<u8>,
    /// How this side's threads wait for the device
    #[arg(long, value_enum, default_value_t = PollingChoice::Adaptive)]
    pub(crate) polling: PollingChoice,
}

/// Where the pools are.
#[derive(Clone, Copy, Debug, Args)]
#[command(next_help_heading = "Memory")]
pub(crate) struct MemoryArgs {
    /// Memory of the pools of this side (without a command, of both): host, memfd (host memory in a file, which a peer on
    /// the same host maps), hip or cuda (a GPU's; hip:2 is the third), or udmabuf (host memory that is known by a
    /// dmabuf, as a GPU's is)
    #[arg(long, value_name = "KIND", default_value = "host", value_parser = memory)]
    pub(crate) memory: MemoryChoice,
}

/// A kind of memory, and of which device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MemoryChoice {
    pub(crate) kind: MemoryKind,
    /// The GPU's number in its runtime.
    pub(crate) device: u32,
}

/// A kind of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MemoryKind {
    Host,
    /// Host memory in a file, which a peer on the same host can map.
    Memfd,
    Hip,
    Cuda,
    Udmabuf,
}

impl MemoryChoice {
    pub(crate) const HOST: Self = Self {
        kind: MemoryKind::Host,
        device: 0,
    };

    /// What suits a fabric: what a peer can map where it shares the host, else plain memory.
    pub(crate) fn for_fabric(fabric: FabricChoice) -> Self {
        let kind = match fabric {
            FabricChoice::Shm => MemoryKind::Memfd,
            _ => MemoryKind::Host,
        };
        Self { kind, ..Self::HOST }
    }
}

impl std::fmt::Display for MemoryChoice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.kind {
            MemoryKind::Host => f.write_str("host"),
            MemoryKind::Memfd => f.write_str("memfd"),
            MemoryKind::Udmabuf => f.write_str("udmabuf"),
            MemoryKind::Hip => write!(f, "hip:{}", self.device),
            MemoryKind::Cuda => write!(f, "cuda:{}", self.device),
        }
    }
}

fn memory(text: &str) -> Result<MemoryChoice, String> {
    let (name, number) = match text.split_once(':') {
        Some((name, number)) => (name, Some(number)),
        None => (text, None),
    };
    let kind = match (name, number) {
        ("host", None) => MemoryKind::Host,
        ("memfd", None) => MemoryKind::Memfd,
        ("udmabuf", None) => MemoryKind::Udmabuf,
        ("hip", _) => MemoryKind::Hip,
        ("cuda", _) => MemoryKind::Cuda,
        _ => {
            return Err(
                "known are host, memfd, hip, cuda and udmabuf, and hip:N and cuda:N".to_owned(),
            );
        }
    };
    let device = number.map_or(Ok(0), |number| {
        number
            .parse()
            .map_err(|_| format!("{number:?} is no number of a GPU"))
    })?;
    Ok(MemoryChoice { kind, device })
}

/// Where keys, values and heads of a page lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum LayoutChoice {
    /// vLLM FlashAttention: [2, pages, tokens, heads, dim]
    Flash,
    /// vLLM FlashInfer, heads first: [pages, 2, heads, tokens, dim]
    Hnd,
    /// SGLang: keys and values apart, [slots, heads, dim] each
    Sglang,
}

/// How pages are moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Op {
    /// Grant and push, layer by layer: what serving does
    Push,
    /// One-sided writes, one for each page
    Write,
    /// One-sided reads, one for each page
    Read,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Workload")]
pub(crate) struct WorkloadArgs {
    /// Models whose KV cache is pushed, separated by commas: llama-3.1-8b, llama-3.1-70b, qwen3-32b, qwen3-235b-a22b,
    /// deepseek-r1, deepseek-r1-fp8
    #[arg(long, value_delimiter = ',', value_parser = model, value_name = "NAMES")]
    pub(crate) model: Vec<&'static Model>,
    /// Tensor-parallel ranks of the prefill side; each rank is an endpoint of its own. Several numbers, separated by
    /// commas, are run one after the other, together with those of --tp-decode [default: 1]
    #[arg(long, value_delimiter = ',', value_name = "N")]
    pub(crate) tp_prefill: Vec<u32>,
    /// Tensor-parallel ranks of the decode side [default: 1]
    #[arg(long, value_delimiter = ',', value_name = "N")]
    pub(crate) tp_decode: Vec<u32>,
    /// Requests pushed in one round [default: 4, fewer where memory is short; in a sweep as many as make 64 MiB]
    #[arg(long, value_name = "N")]
    pub(crate) requests: Option<u32>,
    /// Pages of one request [default: 64, MLA 32, in a sweep 128]
    #[arg(long, value_name = "N")]
    pub(crate) pages: Option<u32>,
    /// Tokens in a page [default: 16, MLA 64]
    #[arg(long, value_name = "N")]
    pub(crate) tokens_per_page: Option<u32>,
    /// Layers, instead of all that the model has
    #[arg(long, value_name = "N")]
    pub(crate) layers: Option<u32>,
    /// Element type, instead of the model's: bf16, f16, f32, fp8, i8
    #[arg(long, value_parser = crate::workload::parse_dtype, value_name = "TYPE")]
    pub(crate) dtype: Option<crate::workload::Element>,
    /// Layout of both pools [default: flash, hnd where the numbers of ranks differ]
    #[arg(long, value_enum)]
    pub(crate) layout: Option<LayoutChoice>,
    /// Pages that are neighbours in a pool, as far as the allocator keeps them together; 0 keeps all apart, so that
    /// no two can be written as one
    #[arg(long, value_name = "PAGES", default_value_t = 4)]
    pub(crate) run_length: u32,
    /// Raw page sizes instead of models: 4k..1m (from, to, times 4 each), or one size, or several separated by commas
    #[arg(long, value_name = "SIZES", value_parser = sweep, conflicts_with_all = ["model", "tp_prefill", "tp_decode", "layers", "tokens_per_page", "dtype", "layout", "run_length"])]
    pub(crate) sweep: Option<Sweep>,
    /// How a sweep moves its pages, in batches of --pages (default 128) that lie apart on both sides
    #[arg(long, value_enum, value_delimiter = ',', requires = "sweep", default_values_t = [Op::Push, Op::Write, Op::Read])]
    pub(crate) op: Vec<Op>,
    /// Measured rounds; each is filled and verified anew
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(crate) rounds: u32,
    /// Requests under way at a time
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) in_flight: u32,
    /// Lanes (queue pairs) to each peer on each rail
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=16))]
    pub(crate) lanes: u16,
    /// A push that takes longer has failed
    #[arg(long, value_name = "SECONDS", default_value_t = 120, value_parser = clap::value_parser!(u32).range(1..=86_400))]
    pub(crate) timeout: u32,
    /// Seed of contents and page tables [default: random, and printed]
    #[arg(long, value_name = "NUMBER")]
    pub(crate) seed: Option<u64>,
    /// Damages one byte, so that the verification has to fail
    #[arg(long, hide = true)]
    pub(crate) plant_error: bool,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Output")]
pub(crate) struct OutputArgs {
    /// Write the rows to a file: a JSON array with one object per line
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// Draw the rows: GB/s over page size for a sweep, else a bar for each
    #[arg(long, value_name = "FILE.svg")]
    pub(crate) plot: Option<PathBuf>,
    /// Print the pushing endpoints' statistics beside each row: sessions, outcomes, bytes and stalls of each rail
    #[arg(long)]
    pub(crate) stats: bool,
}

/// Page sizes in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Sweep(pub(crate) Vec<u32>);

const SMALLEST_PAGE: u64 = 16;
const LARGEST_PAGE: u64 = 1 << 30;

fn sweep(text: &str) -> Result<Sweep, String> {
    let one = |text: &str| match size(text)? {
        bytes @ SMALLEST_PAGE..=LARGEST_PAGE => {
            u32::try_from(bytes).map_err(|error| error.to_string())
        }
        _ => Err(format!("{text}: pages have 16 bytes to 1 GiB")),
    };
    let Some((from, to)) = text.split_once("..") else {
        return text
            .split(',')
            .map(one)
            .collect::<Result<_, _>>()
            .map(Sweep);
    };
    let (from, to) = (one(from)?, one(to.trim_start_matches('='))?);
    if from > to {
        return Err(format!("{text}: the first size is the smaller one"));
    }
    let sizes = std::iter::successors(Some(from), |size| size.checked_mul(4));
    Ok(Sweep(sizes.take_while(|&size| size <= to).collect()))
}

/// `4096`, `4k`, `1m`, `2GiB`; units are powers of 1024.
fn size(text: &str) -> Result<u64, String> {
    let lower = text.trim().to_ascii_lowercase();
    let digits = lower.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = &lower[digits.len()..];
    let shift = match unit {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        _ => return Err(format!("{text}: unknown unit (k, m or g)")),
    };
    let number: u64 = digits
        .parse()
        .map_err(|_| format!("{text:?} is not a size such as 4096, 64k or 1m"))?;
    number
        .checked_mul(1 << shift)
        .ok_or_else(|| format!("{text}: too large"))
}

fn model(name: &str) -> Result<&'static Model, String> {
    Model::by_name(name).ok_or_else(|| {
        let names: Vec<_> = models::ALL.iter().map(|model| model.name).collect();
        format!("no such model; known are {}", names.join(", "))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn sizes_and_sweeps() {
        assert_eq!(size("64k"), Ok(65536));
        assert_eq!(size("2GiB"), Ok(2 << 30));
        assert!(size("").is_err() && size("k").is_err() && size("1t").is_err());
        assert!(size("99999999999999999999").is_err() && size("18446744073709551615g").is_err());
        assert_eq!(
            sweep("4k..1m"),
            Ok(Sweep(vec![4096, 16384, 65536, 262144, 1 << 20]))
        );
        assert_eq!(sweep("4k,5000"), Ok(Sweep(vec![4096, 5000])));
        assert_eq!(sweep("4k"), Ok(Sweep(vec![4096])));
        assert!(
            sweep("1m..4k").is_err()
                && sweep("1..2").is_err()
                && sweep("4k..").is_err()
                && sweep("8g").is_err()
        );
    }
}
