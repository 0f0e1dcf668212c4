//! One pusher's conversation: workloads, each with rounds of grants, arrivals and verification.

use std::{
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use kvpush::{
    Arrival, Endpoint,
    endpoint::{GrantOptions, LocalRegion},
    fabric::Access,
};

use super::{Claim, Server};
use crate::{
    cli::Op,
    content::{Cache, Expected, Mismatch},
    error::{Context, Error, Result},
    fabric, measure, out, signals,
    wire::{Connection, PROTOCOL, ToPusher, ToServer, Verified, to_hex},
    workload::{Side, Workload},
};

/// Whoever says nothing for so long has gone. Filling many gigabytes takes a pusher a while.
const IDLE: Duration = Duration::from_secs(600);

/// A pusher says hello at once.
const GREETING: Duration = Duration::from_secs(10);

/// How often progress is reported.
const TICK: Duration = Duration::from_millis(100);

pub(super) struct Session<'a> {
    server: &'a Server,
    connection: Connection,
    peer: SocketAddr,
}

/// The decode ranks of a workload.
struct Ranks<'a> {
    workload: Workload,
    endpoints: Vec<Endpoint>,
    caches: Vec<Cache>,
    /// For one-sided access.
    exported: Option<LocalRegion>,
    _claim: Claim<'a>,
}

/// A grant on its way.
struct Expecting {
    request: u32,
    arrival: Arrival,
}

impl<'a> Session<'a> {
    pub(super) fn new(server: &'a Server, stream: TcpStream, peer: SocketAddr) -> Result<Self> {
        let connection = Connection::new(stream, format!("the pusher {peer}"))?;
        Ok(Self {
            server,
            connection,
            peer,
        })
    }

    pub(super) fn run(mut self) -> Result<()> {
        match self.connection.receive(GREETING)? {
            Some(ToServer::Hello { .. }) => {}
            Some(_) => return Err(Error::failed("the first message is no greeting")),
            // A port scan, or a script that waits for the server.
            None => return Ok(()),
        }
        self.connection.send(&ToPusher::Hello {
            protocol: PROTOCOL,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            memory_limit: self.server.memory_limit,
        })?;
        let result = self.converse();
        if let Err(error) = &result {
            // It may have gone.
            let _ = self.connection.send(&ToPusher::Refused {
                message: error.to_string(),
            });
        }
        result
    }

    fn converse(&mut self) -> Result<()> {
        let mut ranks: Option<Ranks<'a>> = None;
        while let Some(message) = self.connection.receive(IDLE)? {
            match (message, &mut ranks) {
                (ToServer::Case { workload }, _) => {
                    // The old ones make room first.
                    drop(ranks.take());
                    ranks = Some(self.prepare(*workload)?);
                }
                (ToServer::Round { seed, requests }, Some(ranks)) => {
                    self.round(ranks, seed, requests)?
                }
                (ToServer::End, _) => ranks = None,
                (other, _) => return Err(Error::failed(format!("{other:?} is out of turn"))),
            }
        }
        Ok(())
    }

    /// Makes endpoints and pools.
    fn prepare(&mut self, workload: Workload) -> Result<Ranks<'a>> {
        workload.check()?;
        workload.check_memory(&[Side::Decode], Some(self.server.memory_limit))?;
        let claim = self.server.claim()?;
        if self.server.talkative {
            out::say(format_args!("{}: {}", self.peer, workload.title()));
        }
        let ip = self.connection.local_ip()?;
        let (mut endpoints, mut caches) = (Vec::new(), Vec::new());
        let mut exported = None;
        for rank in 0..workload.tp_decode {
            let name = format!("bench-decode-{rank}");
            let endpoint = self
                .server
                .fabric
                .endpoint(&self.server.auth, ip, name, &workload)?;
            let mut cache = Cache::allocate(&workload, Side::Decode, rank, self.server.memory)?;
            match workload.op {
                Op::Push => cache.register(&endpoint)?,
                Op::Write | Op::Read => {
                    let memory = cache.first_region()?;
                    exported = Some(
                        endpoint
                            .register(memory, Access::ALL)
                            .context("register memory")?,
                    );
                }
            }
            endpoints.push(endpoint);
            caches.push(cache);
        }
        let rails = endpoints.first().map(fabric::rails).unwrap_or_default();
        let why_no_rdma = self.server.fabric.why_no_rdma(&rails);
        self.connection.send(&ToPusher::Ready {
            rails,
            why_no_rdma,
            memory: self.server.memory.to_string(),
        })?;
        Ok(Ranks {
            workload,
            endpoints,
            caches,
            exported,
            _claim: claim,
        })
    }

    fn round(&mut self, ranks: &Ranks<'_>, seed: u64, requests: u32) -> Result<()> {
        let workload = &ranks.workload;
        if requests == 0 || requests > workload.requests {
            return Err(Error::failed(format!(
                "a round of {requests} requests, the workload has {}",
                workload.requests
            )));
        }
        let timeout = Duration::from_secs(workload.timeout_seconds.into());
        let tables = workload.page_tables(Side::Decode, seed)?;
        let tables = tables.get(..requests as usize).unwrap_or(&tables);
        let expected = Expected { seed, tables };
        for cache in &ranks.caches {
            match workload.op {
                Op::Read => cache.fill(expected)?,
                Op::Push | Op::Write => cache.poison()?,
            }
        }
        let verified = match workload.op {
            Op::Push => self.pushed(ranks, expected, timeout)?,
            Op::Write | Op::Read => self.accessed(ranks, expected, timeout)?,
        };
        if let (true, Some(failure)) = (self.server.talkative, &verified.failure) {
            out::say(format_args!(
                "{}: {}: {failure}",
                self.peer,
                workload.title()
            ));
        }
        self.connection.send(&ToPusher::Verified(verified))
    }

    fn pushed(
        &mut self,
        ranks: &Ranks<'_>,
        expected: Expected<'_>,
        timeout: Duration,
    ) -> Result<Verified> {
        let workload = &ranks.workload;
        let mut expecting = Vec::new();
        for (request, table) in (0u32..).zip(expected.tables) {
            for pair in workload.pairs()? {
                let cache = ranks.caches.get(pair.destination_rank as usize);
                let cache = cache.ok_or_else(|| Error::failed("no such rank"))?;
                // The deadline includes the time to send all grants and to open all pushes.
                let options =
                    GrantOptions::new(format!("bench-{request}"), timeout * 2).heads(pair.heads);
                let arrival = cache
                    .pool()?
                    .grant_with(table, options)
                    .context("issue a grant")?;
                let data = to_hex(&arrival.grant().encode());
                self.connection.send(&ToPusher::Grant {
                    request,
                    source_rank: pair.source_rank,
                    data,
                })?;
                expecting.push(Expecting { request, arrival });
            }
        }
        self.connection.send(&ToPusher::Go)?;
        match self.connection.receive(timeout)? {
            Some(ToServer::Start) => {}
            Some(other) => return Err(Error::failed(format!("{other:?} is out of turn"))),
            None => return Err(Error::failed("the pusher has gone before it pushed")),
        }
        let cpu = measure::cpu_seconds();
        let failure = self.arrive(&expecting, timeout)?;
        let cpu_seconds = measure::cpu_seconds() - cpu;
        let mut verified = self.verify(ranks, expected, Cache::verify)?;
        verified.cpu_seconds = cpu_seconds;
        verified.failure = failure.or(verified.failure);
        Ok(verified)
    }

    /// Waits until every arrival has ended; says which failed, and how.
    fn arrive(&mut self, expecting: &[Expecting], timeout: Duration) -> Result<Option<String>> {
        let deadline = Instant::now() + timeout * 2;
        let mut report = Instant::now() + TICK;
        let mut failure = None;
        for Expecting { request, arrival } in expecting {
            let end = loop {
                signals::check()?;
                if let Some(end) = arrival
                    .complete_blocking(TICK.min(report.saturating_duration_since(Instant::now())))
                {
                    break end;
                }
                if Instant::now() >= report {
                    report = Instant::now() + TICK;
                    let layers = expecting
                        .iter()
                        .map(|one| u64::from(one.arrival.complete_layers()))
                        .sum();
                    // Fails if the pusher has gone, which ends the wait.
                    self.connection.send(&ToPusher::Progress { layers })?;
                }
                if Instant::now() >= deadline {
                    return Ok(Some(format!(
                        "request {request} did not arrive within {:?}",
                        timeout * 2
                    )));
                }
            };
            match end {
                Ok(tail) if *tail == request.to_le_bytes() => {}
                Ok(tail) => {
                    failure.get_or_insert(format!("request {request} came with the tail {tail:?}"));
                }
                Err(error) => {
                    failure.get_or_insert(format!("request {request}: {error}"));
                }
            }
        }
        Ok(failure)
    }

    fn accessed(
        &mut self,
        ranks: &Ranks<'_>,
        expected: Expected<'_>,
        timeout: Duration,
    ) -> Result<Verified> {
        let exported = ranks
            .exported
            .as_ref()
            .ok_or_else(|| Error::failed("nothing is exported"))?;
        self.connection.send(&ToPusher::Token {
            data: to_hex(&exported.token().encode()),
        })?;
        self.connection.send(&ToPusher::Go)?;
        let start: Option<ToServer> = self.connection.receive(timeout)?;
        let cpu = measure::cpu_seconds();
        let done: Option<ToServer> = self.connection.receive(IDLE)?;
        let cpu_seconds = measure::cpu_seconds() - cpu;
        if !matches!((start, done), (Some(ToServer::Start), Some(ToServer::Done))) {
            return Err(Error::failed("the pusher has gone, or is out of turn"));
        }
        let verified = match ranks.workload.op {
            // What was read must be as it was.
            Op::Read => self.verify(ranks, expected, Cache::verify_source)?,
            Op::Push | Op::Write => self.verify(ranks, expected, Cache::verify)?,
        };
        Ok(Verified {
            cpu_seconds,
            ..verified
        })
    }

    fn verify(
        &self,
        ranks: &Ranks<'_>,
        expected: Expected<'_>,
        verify: impl Fn(&Cache, Expected<'_>) -> Result<(u64, Option<Mismatch>)>,
    ) -> Result<Verified> {
        let mut verified = Verified::default();
        for (rank, cache) in ranks.caches.iter().enumerate() {
            let (bytes, mismatch) = verify(cache, expected)?;
            verified.bytes += bytes;
            if let Some(bad) = mismatch {
                let text = format!(
                    "rank {rank}: {} bytes differ; first: {}",
                    bad.bytes, bad.first
                );
                verified.failure.get_or_insert(text);
            }
        }
        Ok(verified)
    }
}

impl Drop for Ranks<'_> {
    fn drop(&mut self) {
        // Before the memory goes.
        self.endpoints.iter().for_each(Endpoint::shutdown);
    }
}
