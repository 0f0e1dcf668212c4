//! The decode side: waits for pushers and serves each in a thread of its own.
//!
//! One workload at a time has memory here; other pushers are told that the server is busy.

mod session;

use std::{
    io::{ErrorKind, Read},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    os::fd::AsRawFd,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use kvpush::Auth;

use crate::{
    cli::{DecodeArgs, FabricArgs, MemoryChoice, ServeArgs},
    error::{Context, Error, Result},
    measure::{self, bytes_text},
    out, signals,
};

/// Most conversations at a time.
const MAX_SESSIONS: usize = 16;

/// Environment variable with the key of a child.
pub(crate) const CHILD_KEY: &str = "KVPUSH_BENCH_CHILD_KEY";

/// What all sessions share.
pub(crate) struct Server {
    fabric: FabricArgs,
    auth: Auth,
    memory_limit: u64,
    memory: MemoryChoice,
    busy: AtomicBool,
    /// Whether to tell a person what happens.
    talkative: bool,
}

/// `kvpush-bench serve`.
pub(crate) fn run(args: &ServeArgs) -> Result<()> {
    args.fabric.check()?;
    let available = measure::available_memory().unwrap_or(1 << 30);
    let server = Server {
        fabric: args.fabric.clone(),
        auth: args.key.auth(),
        memory_limit: args.memory_limit.unwrap_or(available / 2),
        memory: args.memory.memory,
        busy: AtomicBool::new(false),
        talkative: true,
    };
    let listener = TcpListener::bind(args.bind).context(format_args!(
        "listen on {} (is another server running? choose another port with --bind)",
        args.bind
    ))?;
    let address = listener.local_addr().context("the address listened on")?;
    out::say(format_args!(
        "listening on {address}, memory limit {}; Ctrl-C ends",
        bytes_text(server.memory_limit)
    ));
    accept(&listener, &Arc::new(server))
}

/// The decode side of a run on one machine: says its address on standard output, and ends with its standard input.
pub(crate) fn run_child(args: &DecodeArgs) -> Result<()> {
    let key = std::env::var(CHILD_KEY).context("this command is for the tool itself")?;
    let server = Server {
        fabric: args.fabric.clone(),
        auth: Auth::passphrase(&key),
        // The parent has looked at the memory that both need.
        memory_limit: u64::MAX,
        memory: args.memory.memory,
        busy: AtomicBool::new(false),
        talkative: false,
    };
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("listen")?;
    out::say(listener.local_addr().context("the address listened on")?);
    std::thread::spawn(|| {
        let mut nothing = [0];
        // Ends when the parent does, however it ends.
        while matches!(std::io::stdin().read(&mut nothing), Ok(1..)) {}
        signals::stop();
    });
    accept(&listener, &Arc::new(server))
}

/// Serves until it is time to stop, then waits for the sessions to end.
fn accept(listener: &TcpListener, server: &Arc<Server>) -> Result<()> {
    listener.set_nonblocking(true).context("listen")?;
    let mut threads: Vec<std::thread::JoinHandle<()>> = Vec::new();
    while !signals::stopped() {
        match listener.accept() {
            Ok((stream, peer)) => {
                threads.retain(|thread| !thread.is_finished());
                // More are hung up on.
                if threads.len() < MAX_SESSIONS {
                    let server = Arc::clone(server);
                    threads.push(std::thread::spawn(move || server.serve(stream, peer)));
                }
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => wait_for(listener)?,
            // Whoever dialled has hung up, or descriptors are short: both pass.
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
    for thread in threads {
        // Its panic has been printed.
        let _ = thread.join();
    }
    if server.talkative {
        out::say("stopped");
    }
    Ok(())
}

/// Sleeps until somebody dials, a signal comes, or half a second has passed.
fn wait_for(listener: &TcpListener) -> Result<()> {
    let mut poll = libc::pollfd {
        fd: listener.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: `poll` is one valid pollfd, whose descriptor the listener keeps open.
    let result = unsafe { libc::poll(&mut poll, 1, 500) };
    let error = std::io::Error::last_os_error();
    if result < 0 && error.kind() != ErrorKind::Interrupted {
        return Err(error).context("wait for connections");
    }
    Ok(())
}

impl Server {
    fn serve(&self, stream: TcpStream, peer: SocketAddr) {
        let result = stream
            .set_nonblocking(false)
            .context("connection")
            .and_then(|()| session::Session::new(self, stream, peer)?.run());
        match result {
            Err(error) if self.talkative && !signals::stopped() => {
                out::say(format_args!("{peer}: {error}"))
            }
            _ => {}
        }
    }

    /// Takes the server for one workload.
    fn claim(&self) -> Result<Claim<'_>> {
        match self
            .busy
            .compare_exchange(false, true, Ordering::AcqRel, Ordering::Acquire)
        {
            Ok(_) => Ok(Claim(self)),
            Err(_) => Err(Error::failed(
                "busy with another pusher; try again when that has finished",
            )),
        }
    }
}

/// The right to have memory, until dropped.
struct Claim<'a>(&'a Server);

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.0.busy.store(false, Ordering::Release);
    }
}
