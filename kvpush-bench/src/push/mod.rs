//! The prefill side: runs workloads against a server and makes the rows.
//!
//! `case` has the rounds of one workload, `pages` pushes them layer by layer, `access` moves raw pages one-sided, `wait`
//! waits for futures.

mod access;
mod case;
mod pages;
mod wait;

pub(crate) use self::case::Measured;
use std::{
    net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs},
    time::Duration,
};

use kvpush::Auth;

use crate::{
    cases,
    cli::{DEFAULT_PORT, PushArgs, RunArgs},
    content::Random,
    error::{Context, Error, Result},
    measure, out,
    report::{self, Row},
    wire::{Connection, PROTOCOL, ToPusher, ToServer},
    workload::{Side, Workload},
};

/// Time for answers that take the server no work.
const SHORT: Duration = Duration::from_secs(20);

/// `kvpush-bench push HOST`.
pub(crate) fn run(args: &PushArgs) -> Result<()> {
    args.run.fabric.check()?;
    // Fails before anything is dialled if the command line is at fault.
    cases::select(&args.run.workload, &[])?;
    let auth = args.key.auth();
    let mut session = Session::open(&args.host, &args.run, auth)?;
    let limits: [(&[Side], _); 2] = [
        (&[Side::Prefill], measure::available_memory()),
        (&[Side::Decode], Some(session.server_limit)),
    ];
    let cases = cases::select(&args.run.workload, &limits)?;
    session.run_all(&cases)
}

/// A conversation with a server.
pub(crate) struct Session<'a> {
    connection: Connection,
    args: &'a RunArgs,
    auth: Auth,
    server_limit: u64,
    is_silent: bool,
}

impl<'a> Session<'a> {
    /// Dials the server and greets it.
    pub(crate) fn open(host: &str, args: &'a RunArgs, auth: Auth) -> Result<Self> {
        let (stream, peer) = dial(host)?;
        let mut connection = Connection::new(stream, format!("the server {peer}"))?;
        let version = env!("CARGO_PKG_VERSION").to_owned();
        connection.send(&ToServer::Hello {
            protocol: PROTOCOL,
            version,
        })?;
        match connection.expect(SHORT)? {
            ToPusher::Hello {
                protocol: PROTOCOL,
                memory_limit,
                ..
            } => Ok(Self {
                connection,
                args,
                auth,
                server_limit: memory_limit,
                is_silent: false,
            }),
            ToPusher::Hello {
                protocol, version, ..
            } => Err(Error::failed(format!(
                "the server is kvpush-bench {version} with protocol {protocol}, this is {} with {PROTOCOL}: run the same version on both hosts",
                env!("CARGO_PKG_VERSION"),
            ))),
            other => Err(unexpected(other)),
        }
    }

    /// Runs one workload as `args` has it, without a word about it.
    pub(crate) fn measure(
        &mut self,
        args: &'a RunArgs,
        workload: &Workload,
        seed: u64,
    ) -> Result<Row> {
        (self.args, self.is_silent) = (args, true);
        self.run_case(workload, seed, &mut None)
    }

    /// Runs every workload, prints and writes the rows. Fails if any byte is wrong.
    pub(crate) fn run_all(&mut self, cases: &[Workload]) -> Result<()> {
        report::check_paths(&self.args.output)?;
        let seed = match self.args.workload.seed {
            Some(seed) => seed,
            None => random_seed()?,
        };
        out::say(format_args!("seed: {seed}"));
        let mut random = Random::new(seed);
        let mut rows: Vec<Row> = Vec::new();
        let mut line = None;
        let mut stopped = Ok(());
        for workload in cases {
            match self.run_case(workload, random.next(), &mut line) {
                Ok(row) => rows.push(row),
                Err(error) => {
                    stopped = Err(error).context(workload.title());
                    break;
                }
            }
        }
        // What was measured before a failure is worth having.
        report::write(&rows, &self.args.output)?;
        stopped?;
        match rows.iter().filter(|row| !row.verified).count() {
            0 => Ok(()),
            bad => Err(Error::failed(format!(
                "{bad} of {} rows did not verify",
                rows.len()
            ))),
        }
    }

    /// The next message; what the server refuses is an error.
    fn expect(&mut self, timeout: Duration) -> Result<ToPusher> {
        match self.connection.expect(timeout)? {
            ToPusher::Refused { message } => Err(Error::failed(format!("the server: {message}"))),
            message => Ok(message),
        }
    }
}

fn unexpected(message: ToPusher) -> Error {
    match message {
        ToPusher::Refused { message } => Error::failed(format!("the server: {message}")),
        other => Error::failed(format!("the server broke the protocol with {other:?}")),
    }
}

/// `HOST` or `HOST:PORT`; IPv6 addresses with and without brackets.
fn resolve(host: &str) -> std::io::Result<Vec<SocketAddr>> {
    if let Ok(address) = host.parse() {
        return Ok(vec![address]);
    }
    let bare = host
        .strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'))
        .unwrap_or(host);
    if let Ok(ip) = bare.parse::<IpAddr>() {
        return Ok(vec![SocketAddr::new(ip, DEFAULT_PORT)]);
    }
    if host.contains(':') {
        return Ok(host.to_socket_addrs()?.collect());
    }
    Ok((host, DEFAULT_PORT).to_socket_addrs()?.collect())
}

fn dial(host: &str) -> Result<(TcpStream, String)> {
    let addresses = resolve(host).context(format_args!(
        "{host:?} is no HOST or HOST:PORT that can be found"
    ))?;
    let mut failures = Vec::new();
    for address in addresses {
        match TcpStream::connect_timeout(&address, Duration::from_secs(5)) {
            Ok(stream) => return Ok((stream, address.to_string())),
            Err(error) => failures.push(format!("{address}: {error}")),
        }
    }
    Err(Error::failed(format!(
        "cannot reach the server ({}): is `kvpush-bench serve` running there, and the port open?",
        failures.join("; ")
    )))
}

fn random_seed() -> Result<u64> {
    let mut bytes = [0; 8];
    crate::local::random_bytes(&mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_with_and_without_a_port() {
        for (text, address) in [
            ("10.0.0.1", "10.0.0.1:7700"),
            ("10.0.0.1:99", "10.0.0.1:99"),
            ("::1", "[::1]:7700"),
            ("[::1]", "[::1]:7700"),
            ("[::1]:99", "[::1]:99"),
        ] {
            assert_eq!(resolve(text).unwrap(), [address.parse().unwrap()], "{text}");
        }
        assert!(resolve("10.0.0.1:port").is_err() && resolve("").is_err());
    }
}
