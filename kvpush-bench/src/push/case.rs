//! One workload: pools and endpoints of the prefill ranks, rounds, and the row they make.

use std::{io::IsTerminal, thread, time::Duration};

use indicatif::{ProgressBar, ProgressStyle};
use kvpush::Endpoint;

use super::{SHORT, Session, access, pages, unexpected};
use crate::{
    cli::{Op, PollingChoice},
    content::{Cache, Expected, Random},
    error::{Context, Error, Result},
    fabric, measure, out,
    report::Row,
    signals,
    wire::{Connection, ToPusher, ToServer, Verified},
    workload::{Side, Workload},
};

/// The number of the round that does not count.
const WARM_UP: u32 = 0;

/// What one round measured.
#[derive(Debug, Default)]
pub(crate) struct Measured {
    pub(crate) seconds: f64,
    pub(crate) cpu_seconds: f64,
    /// One for each request.
    pub(crate) latencies: Vec<Duration>,
    /// Writes or reads posted; 0 where the library does not say.
    pub(crate) writes: u64,
}

/// The prefill ranks of a workload.
pub(super) struct Ranks {
    pub(super) endpoints: Vec<Endpoint>,
    pub(super) caches: Vec<Cache>,
}

/// A round as the moving parts see it.
pub(super) struct Round<'a> {
    pub(super) workload: &'a Workload,
    pub(super) ranks: &'a Ranks,
    pub(super) expected: Expected<'a>,
    pub(super) requests: u32,
    pub(super) in_flight: u32,
    pub(super) timeout: Duration,
    /// Whether to spin while waiting for one-sided access.
    pub(super) is_polling: bool,
}

impl Session<'_> {
    /// Runs one workload. `said` is what has been said about the fabric so far.
    pub(super) fn run_case(
        &mut self,
        workload: &Workload,
        seed: u64,
        said: &mut Option<String>,
    ) -> Result<Row> {
        let ip = self.connection.local_ip()?;
        self.connection.send(&ToServer::Case {
            workload: Box::new(workload.clone()),
        })?;
        let memory = self.args.memory.memory;
        let mut ranks = Ranks {
            endpoints: Vec::new(),
            caches: Vec::new(),
        };
        for rank in 0..workload.tp_prefill {
            let name = format!("bench-prefill-{rank}");
            ranks
                .endpoints
                .push(self.args.fabric.endpoint(&self.auth, ip, name, workload)?);
            ranks
                .caches
                .push(Cache::allocate(workload, Side::Prefill, rank, memory)?);
        }
        let timeout = Duration::from_secs(workload.timeout_seconds.into());
        let (their_rails, their_reason, their_memory) = match self.expect(timeout + SHORT)? {
            ToPusher::Ready {
                rails,
                why_no_rdma,
                memory,
            } => (rails, why_no_rdma, memory),
            other => return Err(unexpected(other)),
        };
        let our_rails = ranks
            .endpoints
            .first()
            .map(fabric::rails)
            .unwrap_or_default();
        let our_reason = self.args.fabric.why_no_rdma(&our_rails);
        let chosen = fabric::choose(&our_rails, &their_rails, [our_reason, their_reason])?;
        if !self.is_silent && said.as_ref() != Some(&chosen.line) {
            out::say(&chosen.line);
            *said = Some(chosen.line.clone());
        }
        if workload.op == Op::Push {
            for (cache, endpoint) in ranks.caches.iter_mut().zip(&ranks.endpoints) {
                cache.register(endpoint)?;
            }
        }
        let rounds = self.args.workload.rounds;
        let memory = format!("{memory}->{their_memory}");
        let mut row = Row::new(workload, &chosen.fabric, memory, rounds);
        let bar = progress(workload, rounds)?;
        let mut random = Random::new(seed);
        let mut done = 0;
        for round in WARM_UP..=rounds {
            signals::check()?;
            // The first round only has to dial, to make lanes and to touch memory.
            let requests = if round == WARM_UP {
                1
            } else {
                workload.requests
            };
            let outcome = self.run_round(workload, &ranks, requests, random.next(), &bar);
            let (measured, verified) = outcome.inspect_err(|_| bar.abandon())?;
            let failed = verified.failure.is_some();
            done += workload.round_bytes(requests)?;
            bar.set_position(done);
            let measured =
                (round != WARM_UP).then_some((&measured, workload.round_bytes(requests)?));
            row.add(measured, &verified);
            if failed {
                break;
            }
        }
        bar.finish_and_clear();
        if self.args.output.stats {
            for endpoint in &ranks.endpoints {
                out::note(endpoint.stats());
            }
        }
        self.connection.send(&ToServer::End)?;
        row.close();
        if !self.is_silent && !std::io::stderr().is_terminal() {
            out::note(row.sentence());
        }
        Ok(row)
    }

    fn run_round(
        &mut self,
        workload: &Workload,
        ranks: &Ranks,
        requests: u32,
        seed: u64,
        bar: &ProgressBar,
    ) -> Result<(Measured, Verified)> {
        let timeout = Duration::from_secs(workload.timeout_seconds.into());
        bar.set_message("filling");
        self.connection.send(&ToServer::Round { seed, requests })?;
        let tables = workload.page_tables(Side::Prefill, seed)?;
        let tables = tables.get(..requests as usize).unwrap_or(&tables);
        let expected = Expected { seed, tables };
        for cache in &ranks.caches {
            match workload.op {
                Op::Read => cache.poison()?,
                Op::Push | Op::Write => cache.fill(expected)?,
            }
        }
        let plant = self.args.workload.plant_error;
        if let (true, Op::Push | Op::Write, Some(cache)) =
            (plant, workload.op, ranks.caches.first())
        {
            cache.damage(expected)?;
        }
        let (mut grants, mut token) = (Vec::new(), None);
        loop {
            match self.expect(timeout + SHORT)? {
                ToPusher::Grant {
                    request,
                    source_rank,
                    data,
                } => grants.push(pages::Granted {
                    request,
                    source_rank,
                    data,
                }),
                ToPusher::Token { data } => token = Some(data),
                ToPusher::Go => break,
                other => return Err(unexpected(other)),
            }
        }
        let round = Round {
            workload,
            ranks,
            expected,
            requests,
            in_flight: self.args.workload.in_flight,
            timeout,
            is_polling: self.args.fabric.polling == PollingChoice::Busy,
        };
        if workload.op == Op::Push {
            let pushes = pages::open(&round, grants)?;
            bar.set_message("pushing");
            self.connection.send(&ToServer::Start)?;
            let layers = u64::from(requests) * pages::pairs(&round)? * u64::from(workload.layers);
            let scale = workload.round_bytes(requests)? / layers.max(1);
            return self.beside_reports(workload, bar, scale, || pages::push(&round, pushes));
        }
        let token = token.ok_or_else(|| Error::failed("the server sent no token"))?;
        let access = access::Access::open(&round, &token)?;
        bar.set_message(match workload.op {
            Op::Read => "reading",
            Op::Push | Op::Write => "writing",
        });
        self.connection.send(&ToServer::Start)?;
        let measured = access.run(&round, bar)?;
        bar.set_message("verifying");
        if let (true, Op::Read, Some(cache)) = (plant, workload.op, ranks.caches.first()) {
            cache.damage(expected)?;
        }
        self.connection.send(&ToServer::Done)?;
        let mut verified = self.verified(timeout)?;
        if let (Op::Read, Some(cache)) = (workload.op, ranks.caches.first()) {
            // What was read lies here.
            let (bytes, mismatch) = cache.verify(expected)?;
            verified.bytes = verified.bytes.saturating_add(bytes);
            verified.failure =
                verified
                    .failure
                    .or(mismatch
                        .map(|bad| format!("{} bytes differ; first: {}", bad.bytes, bad.first)));
        }
        Ok((measured, verified))
    }

    fn verified(&mut self, timeout: Duration) -> Result<Verified> {
        match self.expect(timeout + SHORT)? {
            ToPusher::Verified(verified) => Ok(verified),
            other => Err(unexpected(other)),
        }
    }

    /// Runs `work` while another thread listens to what the server reports.
    fn beside_reports(
        &mut self,
        workload: &Workload,
        bar: &ProgressBar,
        bytes_per_layer: u64,
        work: impl FnOnce() -> Result<Measured>,
    ) -> Result<(Measured, Verified)> {
        let timeout = Duration::from_secs(workload.timeout_seconds.into());
        let closer = self.connection.sender()?;
        let connection = &mut self.connection;
        thread::scope(|scope| {
            let listener = scope.spawn(move || listen(connection, timeout, bar, bytes_per_layer));
            let measured = work();
            bar.set_message("verifying");
            if measured.is_err() {
                // The server would go on waiting for pages that do not come.
                thread::sleep(Duration::from_millis(100));
                closer.close();
            }
            let verified = listener
                .join()
                .map_err(|_| Error::failed("the listening thread panicked"))?;
            match (measured, verified) {
                (Ok(measured), verified) => Ok((measured, verified?)),
                (
                    Err(error),
                    Ok(Verified {
                        failure: Some(failure),
                        ..
                    }),
                ) => Err(error).context(format_args!("the server says: {failure}; here")),
                (Err(error), _) => Err(error),
            }
        })
    }
}

fn listen(
    connection: &mut Connection,
    timeout: Duration,
    bar: &ProgressBar,
    bytes_per_layer: u64,
) -> Result<Verified> {
    let start = bar.position();
    loop {
        // Verification is silent, and takes long for many gigabytes.
        match connection.expect(timeout + SHORT)? {
            ToPusher::Progress { layers } => {
                let bytes = layers.saturating_mul(bytes_per_layer);
                bar.set_position(start.saturating_add(bytes));
            }
            ToPusher::Verified(verified) => return Ok(verified),
            other => return Err(unexpected(other)),
        }
    }
}

fn progress(workload: &Workload, rounds: u32) -> Result<ProgressBar> {
    let bytes =
        workload.round_bytes(1)? + workload.round_bytes(workload.requests)? * u64::from(rounds);
    let template = "{prefix:28} {bar:32} {bytes:>10} / {total_bytes:10} {msg}";
    let style = ProgressStyle::with_template(template)
        .context("progress bar")?
        .progress_chars("=> ");
    let bar = ProgressBar::new(bytes)
        .with_style(style)
        .with_prefix(workload.title());
    bar.enable_steady_tick(Duration::from_millis(100));
    Ok(bar)
}

impl Measured {
    /// Runs `work` and takes the time and the CPU time of it.
    pub(super) fn of(work: impl FnOnce(&mut Self) -> Result<()>) -> Result<Self> {
        let mut measured = Self::default();
        let (cpu, start) = (measure::cpu_seconds(), std::time::Instant::now());
        work(&mut measured)?;
        measured.seconds = start.elapsed().as_secs_f64();
        measured.cpu_seconds = measure::cpu_seconds() - cpu;
        Ok(measured)
    }
}
