//! Random requests, faults and times; everything holds at every step, and everything is back at the end.

use std::time::Duration;

use super::{
    network::Failure,
    rig::{Rig, config, decode, prompt},
};
use crate::{
    engine::{Config, handle::Command},
    request::{Leg, OnFailure, SamplingParams, TokenId},
};

/// xorshift64*
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % limit
    }

    fn one_in(&mut self, count: usize) -> bool {
        self.below(count) == 0
    }

    fn pick<T: Clone>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())].clone()
    }
}

/// What has happened in a run: a simulation in which nothing does shows nothing.
#[derive(Default, Debug)]
struct Seen {
    succeeded: u64,
    failed: u64,
    aborted: u64,
    preemptions: u64,
    evicted: u64,
    copied: u64,
    cached: u64,
    pushed: u64,
    recomputed: u64,
    lost: usize,
}

fn params(dice: &mut Dice) -> SamplingParams {
    SamplingParams {
        max_tokens: 1 + dice.below(24),
        min_tokens: dice.pick(&[0, 0, 1]),
        temperature: dice.pick(&[0.0, 0.8, 1.5]),
        top_k: dice.pick(&[0, 5]),
        top_p: dice.pick(&[1.0, 0.9]),
        presence_penalty: dice.pick(&[0.0, 0.5]),
        repetition_penalty: dice.pick(&[1.0, 1.2]),
        seed: Some(dice.below(1000) as u64),
        n: dice.pick(&[1, 1, 1, 2, 3]),
        logprobs: dice.pick(&[None, Some(2)]),
        prompt_logprobs: dice.pick(&[None, None, None, Some(1)]),
        ..SamplingParams::default()
    }
}

/// Few prompts with common beginnings, so that prefixes are found.
fn tokens(dice: &mut Dice) -> Vec<TokenId> {
    let mut tokens = prompt(dice.below(3) as u32, 1 + dice.below(30));
    if dice.one_in(2) {
        tokens.truncate(1 + dice.below(30));
        tokens.extend(prompt(dice.below(100) as u32, 1 + dice.below(6)));
    }
    tokens
}

fn run(seed: u64, seen: &mut Seen) {
    let mut dice = Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let dice = &mut dice;
    let config = Config {
        max_batch_tokens: dice.pick(&[5, 16, 40]),
        max_chunk_tokens: dice.pick(&[3, 16, 40]),
        max_running: dice.pick(&[4, 8]),
        prefix_cache: !dice.one_in(8),
        ..config()
    };
    let blocks = [0, 1].map(|_| 28 + dice.below(10) as u32);
    let mut rig = Rig::new(&blocks, &config);
    let may_lose = dice.one_in(3);
    // Decode legs whose ticket nobody has used, and prefill legs that wait for one.
    let mut unused = Vec::new();
    let mut held: Vec<usize> = Vec::new();
    for _ in 0..150 {
        match dice.below(16) {
            0 | 1 => {
                let (side, tokens, params) = (dice.below(2), tokens(dice), params(dice));
                rig.submit(side, Leg::Both, &tokens, params);
            }
            2 | 3 => {
                let (tokens, params) = (tokens(dice), params(dice));
                let policy = dice.pick(&[OnFailure::Fail, OnFailure::Recompute]);
                let time = Duration::from_secs(dice.pick(&[2, 60]));
                unused.push(rig.submit_for(1, decode(policy), &tokens, params, time));
            }
            4 => {
                let (tokens, params) = (tokens(dice), params(dice));
                held.push(rig.submit(0, Leg::PrefillHeld, &tokens, params));
            }
            // The decode leg for a held prompt.
            5 if !held.is_empty() => {
                let client = held[dice.below(held.len())];
                let (tokens, mut params) = (
                    rig.clients[client].prompt.clone(),
                    rig.clients[client].params.clone(),
                );
                params.max_tokens = 1 + dice.below(14);
                unused.push(rig.submit(1, decode(OnFailure::Recompute), &tokens, params));
            }
            6 if rig.clients.len() > 1 => {
                let recent = rig.clients.len().saturating_sub(8);
                let client = recent + dice.below(rig.clients.len() - recent);
                match dice.below(4) {
                    0 => rig.abort(client),
                    1 => rig.hang_up(client),
                    2 => {
                        let id = rig.clients[client].id.clone();
                        let index = dice.below(3);
                        let side = rig.clients[client].side;
                        rig.command(side, Command::Finish { id, index });
                    }
                    _ => {}
                }
            }
            7 if dice.one_in(8) => {
                rig.command(dice.below(2), Command::ClearPrefixCache);
            }
            8 if dice.one_in(4) => {
                let refuse = dice.pick(&["reserve", "open", "layer", "finish"]);
                rig.network.lock().refuse = Some(refuse);
            }
            9 if dice.one_in(2) => {
                let grants = rig.network.lock().grants();
                if !grants.is_empty() {
                    let how = match dice.below(8) {
                        0 if may_lose => Failure::UnfencedArrival,
                        1 if may_lose => Failure::UnfencedPush,
                        _ => Failure::Fenced,
                    };
                    rig.network.lock().fail(dice.pick(&grants), how);
                }
            }
            10 if dice.one_in(4) => rig.pass(Duration::from_millis(500)),
            _ => {}
        }
        hand_out_tickets(&mut rig, &mut unused, &mut held, dice);
        if dice.one_in(2) {
            rig.network.lock().tick(dice.pick(&[1, 3, 100]));
        }
        for side in 0..2 {
            if !dice.one_in(4) {
                rig.step(side);
            }
        }
    }
    rig.network.lock().refuse = None;
    // Those that wait for a peer go. All others come to their end without any time passing.
    for client in 0..rig.clients.len() {
        let it = &rig.clients[client];
        if it.is_prefill || it.is_decode && it.heard.tokens.is_empty() {
            rig.abort(client);
        }
    }
    rig.settle();
    for client in &rig.clients {
        client.assert_right();
    }
    for (client, it) in rig.clients.iter().enumerate() {
        assert!(
            it.heard.end.is_some() || !rig.is_listening(client),
            "{} has no end",
            it.id
        );
    }
    for side in 0..2 {
        rig.assert_returned(side, rig.stats[side].blocks.lost);
        let stats = rig.stats[side];
        assert_eq!(
            stats.requests,
            stats.succeeded + stats.failed + stats.aborted
        );
        seen.succeeded += stats.succeeded;
        seen.failed += stats.failed;
        seen.aborted += stats.aborted;
        seen.preemptions += stats.preemptions;
        seen.evicted += stats.blocks_evicted;
        seen.copied += stats.blocks_copied;
        seen.cached += stats.cached_tokens;
        seen.pushed += stats.pushed_tokens;
        seen.recomputed += stats.recomputed_tokens;
        seen.lost += stats.blocks.lost;
    }
}

/// Tickets find their way to a prefill leg of the same prompt: a new one, or one that is held.
fn hand_out_tickets(
    rig: &mut Rig,
    unused: &mut Vec<usize>,
    held: &mut Vec<usize>,
    dice: &mut Dice,
) {
    for client in std::mem::take(unused) {
        let it = &rig.clients[client];
        let Some(ticket) = it.heard.ticket.clone() else {
            if it.heard.end.is_none() {
                unused.push(client);
            }
            continue;
        };
        if dice.one_in(3) {
            // Not yet.
            unused.push(client);
            continue;
        }
        if dice.one_in(20) {
            // Never.
            continue;
        }
        let (tokens, params) = (it.prompt.clone(), it.params.clone());
        let fits = |&&h: &&usize| {
            let other = &rig.clients[h];
            other.prompt == tokens && other.params.seed == params.seed
        };
        if let Some(&waiting) = held.iter().find(fits) {
            held.retain(|&other| other != waiting);
            let id = rig.clients[waiting].id.clone();
            rig.command(0, Command::PushHeld { id, ticket });
        } else {
            rig.submit(0, Leg::Prefill { ticket }, &tokens, params);
        }
    }
}

#[test]
fn everything_holds_under_random_requests_and_faults() {
    let mut seen = Seen::default();
    if let Ok(seed) = std::env::var("KVPUSH_ENGINE_SEED") {
        return run(seed.parse().expect("a number"), &mut seen);
    }
    for seed in 0..50 {
        let result =
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run(seed, &mut seen)));
        if let Err(panic) = result {
            eprintln!("repeat with KVPUSH_ENGINE_SEED={seed}");
            std::panic::resume_unwind(panic);
        }
    }
    println!("{seen:?}");
    let Seen {
        succeeded,
        failed,
        aborted,
        preemptions,
        evicted,
        copied,
        ..
    } = seen;
    assert!(
        [succeeded, failed, aborted, preemptions, evicted, copied]
            .iter()
            .all(|&n| n > 50),
        "{seen:?}"
    );
    let Seen {
        cached,
        pushed,
        recomputed,
        lost,
        ..
    } = seen;
    assert!(
        [cached, pushed, recomputed, lost as u64]
            .iter()
            .all(|&n| n > 10),
        "{seen:?}"
    );
}
