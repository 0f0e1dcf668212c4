//! Pushing requests layer by layer, as prefill produces them.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use kvpush::{Grant, Push};

use super::{
    case::{Measured, Round},
    wait,
};
use crate::{
    error::{Context, Error, Result},
    signals, wire,
};

/// A grant as the server sent it.
pub(super) struct Granted {
    pub(super) request: u32,
    pub(super) source_rank: u32,
    pub(super) data: String,
}

/// The pushes of each request, one for each pair of ranks.
pub(super) type Pushes = Vec<Vec<Push>>;

/// Pairs of ranks.
pub(super) fn pairs(round: &Round<'_>) -> Result<u64> {
    Ok(round.workload.pairs()?.len() as u64)
}

/// Opens all pushes of the round, and waits until the server has agreed.
pub(super) fn open(round: &Round<'_>, grants: Vec<Granted>) -> Result<Pushes> {
    let mut pushes: Pushes = (0..round.requests).map(|_| Vec::new()).collect();
    for granted in grants {
        let bytes = wire::from_hex(&granted.data)?;
        let grant = Grant::decode(&bytes).context("the server's grant")?;
        let rank = granted.source_rank as usize;
        let (endpoint, cache) = (
            round.ranks.endpoints.get(rank),
            round.ranks.caches.get(rank),
        );
        let of_request = pushes.get_mut(granted.request as usize);
        let (Some(endpoint), Some(cache), Some(of_request)) = (endpoint, cache, of_request) else {
            return Err(Error::failed(
                "the server sent a grant for a rank or request that does not exist",
            ));
        };
        let push = endpoint.start_push(cache.pool()?, grant, Some(round.timeout));
        of_request.push(push.context("begin a push")?);
    }
    if pushes
        .iter()
        .any(|of_request| of_request.len() as u64 != pairs(round).unwrap_or(0))
    {
        return Err(Error::failed("the server sent too few grants"));
    }
    for opened in wait::all(pushes.iter().flatten().map(Push::opened)) {
        opened.context("open a push")?;
    }
    Ok(pushes)
}

/// Pushes everything and waits until it is there.
pub(super) fn push(round: &Round<'_>, pushes: Pushes) -> Result<Measured> {
    Measured::of(|measured| {
        let mut under_way: VecDeque<(Instant, Vec<Push>)> = VecDeque::new();
        for (request, of_request) in (0u32..).zip(pushes) {
            signals::check()?;
            if under_way.len() >= round.in_flight as usize {
                finish(&mut under_way, round.timeout, measured)?;
            }
            let table = round
                .expected
                .tables
                .get(request as usize)
                .map_or(&[][..], Vec::as_slice);
            let start = Instant::now();
            for layer in 0..round.workload.layers as usize {
                for push in &of_request {
                    push.layer(layer, table)
                        .context(format_args!("push layer {layer} of request {request}"))?;
                }
            }
            for push in &of_request {
                push.start_finish(request.to_le_bytes().to_vec())
                    .context(format_args!("finish request {request}"))?;
            }
            under_way.push_back((start, of_request));
        }
        while !under_way.is_empty() {
            finish(&mut under_way, round.timeout, measured)?;
        }
        Ok(())
    })
}

/// Waits for the oldest request.
fn finish(
    under_way: &mut VecDeque<(Instant, Vec<Push>)>,
    timeout: Duration,
    measured: &mut Measured,
) -> Result<()> {
    let Some((start, pushes)) = under_way.pop_front() else {
        return Ok(());
    };
    let deadline = start + timeout;
    for push in pushes {
        let report = loop {
            signals::check()?;
            // In steps, so that Ctrl-C is seen.
            match push.ended_blocking(Duration::from_millis(250)) {
                Some(end) => break end.context("push")?,
                None if Instant::now() >= deadline => {
                    return Err(Error::failed(format!(
                        "a request was not there after {timeout:?} (see --timeout)"
                    )));
                }
                None => {}
            }
        };
        measured.writes += report.writes;
    }
    measured.latencies.push(start.elapsed());
    Ok(())
}
