//! `serve`: a model, an engine, its endpoint, and the servers in front of it.

use std::{
    io::Write as _,
    net::{IpAddr, SocketAddr},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use clap::Args;
use kvpush::endpoint::telemetry::prometheus::Metrics;
use kvpush_engine::{
    engine::Config,
    model,
    runtime::{Link, Role, Runtime},
    serve::{
        App, Settings,
        server::{self, Ended, Listeners},
    },
};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};

use super::{ModelArgs, Result, role, seconds};

#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    #[command(flatten)]
    pub(crate) listen: ListenArgs,
    #[command(flatten)]
    pub(crate) peers: PeerArgs,
    #[command(flatten)]
    pub(crate) limits: LimitArgs,
    /// What this engine does: `both`, or one half of each request: `prefill`, `decode`
    #[arg(long, default_value = "both", value_parser = role, value_name = "ROLE")]
    pub(crate) role: Role,
    /// Name of the model in the API [default: the model's own]
    #[arg(long, value_name = "NAME")]
    pub(crate) served_model_name: Option<String>,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Listeners")]
pub(crate) struct ListenArgs {
    /// Address to listen on. The API has no authentication: put the gateway in front of it
    #[arg(long, default_value = "127.0.0.1")]
    pub(crate) host: IpAddr,
    /// Port of the HTTP API; 0 takes a free one
    #[arg(long, default_value_t = 8000)]
    pub(crate) port: u16,
    /// Port of the gRPC service [default: none]; 0 takes a free one
    #[arg(long)]
    pub(crate) grpc_port: Option<u16>,
    /// Port at which decode engines hand over tickets, for routers of SGLang that tell it to them as the bootstrap
    /// port [default: the HTTP port does that, too]
    #[arg(long)]
    pub(crate) bootstrap_port: Option<u16>,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Peers")]
pub(crate) struct PeerArgs {
    /// Where the kvpush endpoint listens: where decode engines are reached by prefill engines. Roles prefill and
    /// decode have one in any case
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub(crate) kvpush_bind: Option<SocketAddr>,
    /// What peers dial instead, if they cannot reach that address. May be repeated
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) kvpush_advertise: Vec<String>,
    /// Long random secret that all engines share, such as `openssl rand -base64 32` prints
    #[arg(
        long,
        env = "KVPUSH_KEY",
        hide_env_values = true,
        value_name = "PASSPHRASE",
        conflicts_with = "insecure"
    )]
    pub(crate) key: Option<String>,
    /// No key: whoever reaches the kvpush port may push into granted blocks. All engines must say so
    #[arg(long)]
    pub(crate) insecure: bool,
    /// Host by which decode engines reach this one's HTTP, told to them through vLLM's routers [default: --host]
    #[arg(long, value_name = "HOST")]
    pub(crate) advertise_host: Option<String>,
    /// Bootstrap port of prefill engines whose router names none
    #[arg(long, default_value_t = 8998, value_name = "PORT")]
    pub(crate) default_bootstrap_port: u16,
    /// How long the pages of a request may travel, in seconds
    #[arg(long, default_value = "30", value_parser = seconds, value_name = "SECONDS")]
    pub(crate) transfer_timeout: Duration,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Limits")]
pub(crate) struct LimitArgs {
    /// Tokens computed in one step at most, over all requests
    #[arg(long, default_value_t = 512, value_name = "TOKENS")]
    pub(crate) max_num_batched_tokens: usize,
    /// Sequences computed at the same time at most
    #[arg(long, default_value_t = 64, value_name = "SEQUENCES")]
    pub(crate) max_num_seqs: usize,
    /// Requests that wait at most; more are answered by 429
    #[arg(long, default_value_t = 256, value_name = "REQUESTS")]
    pub(crate) max_queue: usize,
    /// Largest body, in bytes; larger ones are answered by 413
    #[arg(long, default_value_t = 4 << 20, value_name = "BYTES")]
    pub(crate) max_body: usize,
    /// Time for a request that names none, in seconds; then it is answered by 408 or 504
    #[arg(long, default_value = "600", value_parser = seconds, value_name = "SECONDS")]
    pub(crate) deadline: Duration,
    /// How long SIGTERM waits for requests under way, in seconds
    #[arg(long, default_value = "30", value_parser = seconds, value_name = "SECONDS")]
    pub(crate) drain_timeout: Duration,
    /// Do not find blocks of earlier prompts again
    #[arg(long)]
    pub(crate) no_prefix_cache: bool,
}

/// Serves until a signal, and drains.
pub(crate) fn run(args: &ServeArgs) -> Result<ExitCode> {
    // Before the first endpoint, which counts into it.
    let recorder = Metrics::install()?;
    let options = args.model.options()?;
    let tokenizer = model::tokenizer_of(&options.source)?;
    let model = model::load(&options)?;
    let link = link(args)?;
    let config = Config {
        max_batch_tokens: args.limits.max_num_batched_tokens,
        max_chunk_tokens: args.limits.max_num_batched_tokens,
        max_running: args.limits.max_num_seqs,
        max_waiting: args.limits.max_queue,
        prefix_cache: !args.limits.no_prefix_cache,
        transfer_timeout: args.peers.transfer_timeout,
        ..Config::default()
    };
    let engine = Runtime::start(args.role, model, link.as_ref(), config)?;
    let addresses = engine.endpoint().map(|endpoint| endpoint.addresses());
    let settings = Settings {
        role: args.role,
        model_name: args.served_model_name.clone().unwrap_or_default(),
        advertised_host: advertised(args),
        deadline: args.limits.deadline,
        max_deadline: args.limits.deadline.max(Duration::from_secs(3600)),
        max_body: args.limits.max_body,
        default_bootstrap_port: args.peers.default_bootstrap_port,
        drain_timeout: args.limits.drain_timeout,
        kvpush_addresses: addresses.unwrap_or_default().to_vec(),
        kv_dtype: args.model.kv_cache_dtype.name().to_owned(),
        ..Settings::default()
    };
    let servers = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("kvpush-serve")
        .build()?;
    let app = App::new(
        engine.handle(),
        Arc::new(tokenizer),
        settings,
        Some(recorder),
    );
    let ended = servers.block_on(listen_and_serve(args, &app));
    servers.shutdown_timeout(Duration::from_secs(1));
    drop(app);
    engine.shutdown(args.limits.drain_timeout);
    Ok(match ended? {
        Ended::Drained => ExitCode::SUCCESS,
        Ended::Cut => ExitCode::FAILURE,
    })
}

async fn listen_and_serve(args: &ServeArgs, app: &Arc<App>) -> Result<Ended> {
    // First of all, so that no signal is missed.
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let (ask, asked) = mpsc::channel(2);
    tokio::spawn(async move {
        loop {
            let received = tokio::select! {
                received = terminate.recv() => received,
                received = interrupt.recv() => received,
            };
            if received.is_none() || ask.send(()).await.is_err() {
                return;
            }
        }
    });
    let bind = async |port: u16| {
        let address = SocketAddr::new(args.listen.host, port);
        TcpListener::bind(address)
            .await
            .map_err(|error| format!("listen on {address}: {error}"))
    };
    let http = bind(args.listen.port).await?;
    let grpc = match args.listen.grpc_port {
        Some(port) => Some(bind(port).await?),
        None => None,
    };
    let bootstrap = match args.listen.bootstrap_port {
        Some(port) => Some(bind(port).await?),
        None => None,
    };
    // For programs that start engines: one line, once requests are taken.
    let mut line = format!("ready role={} http={}", args.role, http.local_addr()?);
    if let Some(grpc) = &grpc {
        line += &format!(" grpc={}", grpc.local_addr()?);
    }
    if let Some(bootstrap) = &bootstrap {
        line += &format!(" bootstrap={}", bootstrap.local_addr()?);
    }
    if let Some(address) = app.settings.kvpush_addresses.first() {
        line += &format!(" kvpush={address}");
    }
    let listeners = Listeners {
        http,
        bootstrap,
        grpc,
    };
    let mut stdout = std::io::stdout();
    writeln!(stdout, "{line}")?;
    stdout.flush()?;
    Ok(server::run(app, listeners, asked).await?)
}

fn link(args: &ServeArgs) -> Result<Option<Link>> {
    let peers = &args.peers;
    let wants_peers = args.role != Role::Both
        || peers.kvpush_bind.is_some()
        || peers.key.is_some()
        || peers.insecure;
    if !wants_peers {
        return Ok(None);
    }
    if peers.key.is_none() && !peers.insecure {
        return Err("engines with peers need --key (or KVPUSH_KEY), or --insecure".into());
    }
    let default = SocketAddr::new(args.listen.host, 0);
    let bind = peers.kvpush_bind.unwrap_or(default).to_string();
    let name = format!("engine-{}-{}", args.role, std::process::id());
    let mut link = Link::new(name, bind, peers.key.clone());
    link.advertise = peers.kvpush_advertise.clone();
    Ok(Some(link))
}

/// An address of all interfaces is none that can be dialled; the host's name may be.
fn advertised(args: &ServeArgs) -> String {
    if let Some(host) = &args.peers.advertise_host {
        return host.clone();
    }
    if args.listen.host.is_unspecified() {
        let name = std::fs::read_to_string("/proc/sys/kernel/hostname");
        return name.map_or_else(|_| "localhost".to_owned(), |name| name.trim().to_owned());
    }
    args.listen.host.to_string()
}
