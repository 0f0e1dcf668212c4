//! Raw pages by one-sided writes and reads, a batch at a time.

use std::time::Instant;

use indicatif::ProgressBar;
use kvpush::{
    RegionToken,
    endpoint::{LocalRegion, RemoteRegion},
    fabric,
};

use super::{
    case::{Measured, Round},
    wait,
};
use crate::{
    cli::Op,
    error::{Context, Error, Result},
    signals, wire,
    workload::Side,
};

/// The server's region, and ours.
pub(super) struct Access {
    remote: RemoteRegion,
    local: LocalRegion,
}

impl Access {
    pub(super) fn open(round: &Round<'_>, token: &str) -> Result<Self> {
        let token = RegionToken::decode(&wire::from_hex(token)?).context("the server's token")?;
        let (Some(endpoint), Some(cache)) =
            (round.ranks.endpoints.first(), round.ranks.caches.first())
        else {
            return Err(Error::failed("there is no rank"));
        };
        let memory = cache.first_region()?;
        let local = endpoint
            .register(memory, fabric::Access::LOCAL)
            .context("register memory")?;
        let remote = endpoint
            .open_region_blocking(token)
            .context("open the server's region")?;
        Ok(Self { remote, local })
    }

    /// Moves every page of the round.
    pub(super) fn run(&self, round: &Round<'_>, bar: &ProgressBar) -> Result<Measured> {
        let bytes = round.workload.page_bytes();
        let theirs = round
            .workload
            .page_tables(Side::Decode, round.expected.seed)?;
        let start = bar.position();
        let measured = Measured::of(|measured| {
            for (ours, theirs) in round.expected.tables.iter().zip(&theirs) {
                signals::check()?;
                let begin = Instant::now();
                let moves = ours.iter().zip(theirs).map(|(&ours, &theirs)| async move {
                    let (to, from) = (u64::from(theirs) * bytes, u64::from(ours) * bytes);
                    match round.workload.op {
                        Op::Read => {
                            self.remote
                                .read(to, &self.local, from, bytes, round.timeout)
                                .await
                        }
                        _ => {
                            self.remote
                                .write(to, &self.local, from, bytes, round.timeout)
                                .await
                        }
                    }
                });
                let moves: Vec<_> = moves.collect();
                measured.writes += moves.len() as u64;
                let moved = match round.is_polling {
                    true => wait::all_polling(moves),
                    false => wait::all(moves),
                };
                for moved in moved {
                    moved.context("one-sided access")?;
                }
                measured.latencies.push(begin.elapsed());
                bar.inc(bytes * ours.len() as u64);
            }
            Ok(())
        })?;
        bar.set_position(start + round.workload.round_bytes(round.requests)?);
        Ok(measured)
    }
}
