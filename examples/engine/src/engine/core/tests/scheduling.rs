//! Batching, chunks, preemption, prefix cache, completions that share a prompt, and how requests end.

use std::time::Duration;

use super::rig::{BLOCK, Rig, alone, config, greedy, prompt};
use crate::{
    engine::{Config, handle::Command},
    request::{FinishReason, Leg, RequestError, SamplingParams},
};

#[test]
fn one_request_gives_what_it_gives_alone() {
    let mut rig = Rig::new(&[16], &config());
    let long = prompt(1, 40);
    let client = rig.submit(0, Leg::Both, &long, greedy(8));
    rig.settle();
    rig.clients[client].assert_right();
    let (expected, reason) = alone(&long, &greedy(8), 0);
    assert_eq!(rig.ids(client, 0), expected);
    assert_eq!(rig.heard(client).finished[&0], reason);
    // Chunks of 16, 16 and 8 tokens, the last with the first token.
    assert_eq!(rig.stats[0].steps as usize, 3 + expected.len() - 1);
    rig.assert_returned(0, 0);
}

#[test]
fn a_prefix_is_found_again_and_never_the_whole_prompt() {
    let mut rig = Rig::new(&[16], &config());
    let first = prompt(2, 4 * BLOCK);
    for cached in [0, 3 * BLOCK] {
        let client = rig.submit(0, Leg::Both, &first, greedy(1));
        rig.settle();
        let usage = rig
            .heard(client)
            .end
            .clone()
            .expect("an end")
            .expect("success");
        assert_eq!(usage.cached_tokens, cached);
        rig.clients[client].assert_right();
    }
    let mut other = first.clone();
    other[BLOCK + 1] = 62 - other[BLOCK + 1] % 2;
    let client = rig.submit(0, Leg::Both, &other, greedy(4));
    rig.settle();
    assert_eq!(
        rig.heard(client).end,
        Some(Ok(crate::request::Usage {
            prompt_tokens: 16,
            cached_tokens: BLOCK,
            completion_tokens: rig.ids(client, 0).len(),
            ..Default::default()
        }))
    );
    rig.clients[client].assert_right();

    rig.command(0, Command::ClearPrefixCache);
    let client = rig.submit(0, Leg::Both, &first, greedy(1));
    rig.settle();
    assert_eq!(
        rig.heard(client)
            .end
            .clone()
            .expect("an end")
            .expect("success")
            .cached_tokens,
        0
    );
    assert_eq!(rig.stats[0].cached_tokens as usize, 4 * BLOCK);
}

#[test]
fn without_a_prefix_cache_nothing_is_found_or_told() {
    let mut rig = Rig::new(
        &[16],
        &Config {
            prefix_cache: false,
            ..config()
        },
    );
    for _ in 0..2 {
        rig.submit(0, Leg::Both, &prompt(2, 16), greedy(4));
        rig.settle();
    }
    assert_eq!(rig.stats[0].cached_tokens, 0);
    assert!(rig.mirrors[0].is_empty());
    assert_eq!(rig.stats[0].blocks.free, 16);
}

#[test]
fn completions_share_the_prompt_until_they_write() {
    let mut rig = Rig::new(&[32], &config());
    let params = SamplingParams {
        n: 3,
        max_tokens: 6,
        ignore_eos: true,
        seed: Some(9),
        ..SamplingParams::default()
    };
    // Two full blocks and half of one.
    let client = rig.submit(0, Leg::Both, &prompt(3, 10), params);
    rig.step(0);
    assert_eq!(rig.stats[0].blocks.used, 3);
    rig.step(0);
    // All but the last to write have copied the third block.
    assert_eq!(rig.stats[0].blocks_copied, 2);
    assert_eq!(rig.stats[0].blocks.used, 5);
    rig.settle();
    rig.clients[client].assert_right();
    assert_ne!(rig.ids(client, 0), rig.ids(client, 1));
    rig.assert_returned(0, 0);
}

#[test]
fn who_generates_goes_on_while_a_long_prompt_is_computed() {
    let mut rig = Rig::new(
        &[32],
        &Config {
            prefix_cache: false,
            ..config()
        },
    );
    let ignoring = SamplingParams {
        ignore_eos: true,
        ..greedy(20)
    };
    let early = rig.submit(0, Leg::Both, &prompt(1, 5), ignoring);
    rig.step(0);
    let late = rig.submit(0, Leg::Both, &prompt(2, 40), greedy(2));
    for step in 1..=2 {
        rig.step(0);
        assert_eq!(rig.ids(early, 0).len(), 1 + step);
        assert!(rig.ids(late, 0).is_empty());
    }
    // 15 tokens of the prompt in each step: one is the other's.
    rig.step(0);
    assert_eq!(rig.ids(late, 0).len(), 1);
    rig.settle();
    rig.clients[early].assert_right();
    rig.clients[late].assert_right();
}

#[test]
fn a_limit_for_chunks_lets_short_prompts_by() {
    let limited = Config {
        max_chunk_tokens: 8,
        ..config()
    };
    let mut rig = Rig::new(&[32], &limited);
    let long = rig.submit(0, Leg::Both, &prompt(1, 40), greedy(1));
    let short = rig.submit(0, Leg::Both, &prompt(2, 8), greedy(1));
    rig.step(0);
    assert_eq!((rig.ids(long, 0).len(), rig.ids(short, 0).len()), (0, 1));
}

#[test]
fn the_last_to_come_is_preempted_and_gives_the_same_tokens() {
    // Each ends up with 6 blocks; there are 9.
    let mut rig = Rig::new(&[9], &config());
    let params = SamplingParams {
        ignore_eos: true,
        ..greedy(16)
    };
    let first = rig.submit(0, Leg::Both, &prompt(1, 8), params.clone());
    let second = rig.submit(0, Leg::Both, &prompt(2, 8), params);
    for tokens in 1..=16 {
        rig.step(0);
        assert_eq!(rig.ids(first, 0).len(), tokens, "the first goes on");
    }
    assert!(rig.stats[0].preemptions > 0);
    rig.settle();
    let length = |client| rig.heard(client).finished.get(&0).copied();
    assert_eq!(length(first), Some(FinishReason::Length));
    assert_eq!(length(second), Some(FinishReason::Length));
    rig.clients[first].assert_right();
    rig.clients[second].assert_right();
    rig.assert_returned(0, 0);
}

#[test]
fn first_come_first_served() {
    // The second does not fit beside the first; the third would, but came later.
    let mut rig = Rig::new(&[12], &config());
    let params = SamplingParams {
        ignore_eos: true,
        ..greedy(4)
    };
    let clients = [28, 30, 2].map(|tokens| {
        rig.submit(
            0,
            Leg::Both,
            &prompt(tokens, tokens as usize),
            params.clone(),
        )
    });
    let mut order = Vec::new();
    for _ in 0..50 {
        rig.step(0);
        for client in clients {
            if !order.contains(&client) && !rig.ids(client, 0).is_empty() {
                order.push(client);
            }
        }
    }
    assert_eq!(order, clients);
}

#[test]
fn an_abort_ends_within_one_step_and_so_does_a_closed_receiver() {
    let mut rig = Rig::new(&[16], &config());
    let params = SamplingParams {
        ignore_eos: true,
        ..greedy(30)
    };
    let clients = [1, 2, 3].map(|n| rig.submit(0, Leg::Both, &prompt(n, 6), params.clone()));
    rig.step(0);
    rig.abort(clients[0]);
    assert_eq!(rig.heard(clients[0]).end, Some(Err(RequestError::Aborted)));
    rig.hang_up(clients[1]);
    rig.step(0);
    assert_eq!((rig.stats[0].aborted, rig.stats[0].running), (2, 1));
    // Nobody is there to be told.
    rig.abort(clients[0]);
    rig.settle();
    rig.clients[clients[2]].assert_right();
    rig.assert_returned(0, 0);
}

#[test]
fn a_deadline_says_what_it_was_doing() {
    let mut rig = Rig::new(&[8], &config());
    let params = SamplingParams {
        ignore_eos: true,
        ..greedy(20)
    };
    let time = Duration::from_secs(1);
    let running = rig.submit_for(0, Leg::Both, &prompt(1, 8), params.clone(), time);
    let waiting = rig.submit_for(0, Leg::Both, &prompt(2, 28), greedy(1), time);
    rig.step(0);
    rig.pass(time);
    rig.step(0);
    let phase = |client| match rig.heard(client).end.clone() {
        Some(Err(RequestError::Deadline { phase, after })) => (phase, after),
        other => panic!("{other:?}"),
    };
    assert_eq!(phase(running), ("computing", time));
    assert_eq!(phase(waiting), ("waiting in the queue", time));
    rig.assert_returned(0, 0);
}

#[test]
fn one_completion_can_be_stopped() {
    let mut rig = Rig::new(&[16], &config());
    let params = SamplingParams {
        n: 2,
        ignore_eos: true,
        ..greedy(5)
    };
    let client = rig.submit(0, Leg::Both, &prompt(1, 6), params);
    rig.step(0);
    rig.step(0);
    let id = rig.clients[client].id.clone();
    rig.command(0, Command::Finish { id, index: 1 });
    rig.settle();
    assert_eq!(rig.ids(client, 1).len(), 2);
    assert_eq!(rig.heard(client).finished[&1], FinishReason::Stop);
    assert_eq!(rig.heard(client).finished[&0], FinishReason::Length);
    rig.assert_returned(0, 0);
}

#[test]
fn log_probabilities_of_prompt_and_tokens() {
    let mut rig = Rig::new(&[16], &config());
    let tokens = prompt(5, 21);
    // Once to have it in the prefix cache, which must not hide the prompt's logits.
    for _ in 0..2 {
        let params = SamplingParams {
            prompt_logprobs: Some(2),
            logprobs: Some(3),
            ..greedy(2)
        };
        let client = rig.submit(0, Leg::Both, &tokens, params);
        rig.settle();
        let found = rig
            .heard(client)
            .prompt_logprobs
            .clone()
            .expect("asked for");
        assert_eq!(found.len(), tokens.len() - 1);
        for (place, token) in found.iter().enumerate() {
            let row = crate::engine::fake::reference(&tokens[..=place], 64);
            let expected = crate::engine::sampling::with_logprobs(&row, tokens[place + 1], 2);
            assert_eq!((token.id, token.logprob), (expected.id, expected.logprob));
            assert_eq!(token.top, expected.top);
        }
        let first = &rig.heard(client).tokens[&0][0];
        assert_eq!(first.top.len(), 3);
        assert_eq!(first.logprob, Some(first.top[0].1));
    }
}

#[test]
fn nobody_is_admitted_to_blocks_that_others_will_need_at_once() {
    let mut rig = Rig::new(&[7], &config());
    let params = SamplingParams {
        ignore_eos: true,
        ..greedy(4)
    };
    let first = rig.submit(0, Leg::Both, &prompt(1, 8), params.clone());
    rig.step(0);
    rig.step(0);
    // Three blocks are used. Four are free, which the second needs: but the first may need one more.
    let second = rig.submit(0, Leg::Both, &prompt(2, 16), params);
    rig.step(0);
    assert_eq!((rig.stats[0].running, rig.stats[0].waiting), (1, 1));
    rig.settle();
    assert_eq!(rig.stats[0].preemptions, 0);
    rig.clients[first].assert_right();
    rig.clients[second].assert_right();
}

#[test]
fn a_preempted_prompt_tells_its_log_probabilities_once() {
    let slow = Config {
        max_batch_tokens: 2,
        ..config()
    };
    let mut rig = Rig::new(&[9], &slow);
    let params = SamplingParams {
        ignore_eos: true,
        ..greedy(24)
    };
    rig.submit(0, Leg::Both, &prompt(1, 8), params);
    for _ in 0..5 {
        rig.step(0);
    }
    let tokens = prompt(2, 16);
    let params = SamplingParams {
        prompt_logprobs: Some(0),
        ..greedy(1)
    };
    let client = rig.submit(0, Leg::Both, &tokens, params);
    while rig.stats[0].preemptions == 0 {
        rig.step(0);
    }
    assert!(
        rig.ids(client, 0).is_empty(),
        "it was preempted within its prompt"
    );
    rig.settle();
    let found = rig.heard(client).prompt_logprobs.clone();
    let ids: Vec<_> = found.expect("asked for").iter().map(|t| t.id).collect();
    assert_eq!(ids, tokens[1..]);
}

#[test]
fn completions_that_were_preempted_share_the_prompt_again() {
    for prefix_cache in [true, false] {
        let config = Config {
            prefix_cache,
            ..config()
        };
        // The completions need 6 blocks together and 2 each: all there are.
        let mut rig = Rig::new(&[12], &config);
        let ignoring = |max_tokens, n| SamplingParams {
            n,
            ignore_eos: true,
            seed: Some(5),
            max_tokens,
            ..SamplingParams::default()
        };
        let older = rig.submit(0, Leg::Both, &prompt(1, 4), ignoring(12, 1));
        let client = rig.submit(0, Leg::Both, &prompt(3, 24), ignoring(8, 3));
        rig.settle();
        // Each time the prompt once, and no more than the eight tokens of each completion; not the prompt three times.
        let stats = rig.stats[0];
        assert!(stats.preemptions > 0 && stats.preempted_tokens > 0);
        let most = stats.preemptions * (24 + 3 * 8);
        assert!(stats.preempted_tokens <= most, "{stats:?}");
        rig.clients[older].assert_right();
        rig.clients[client].assert_right();
        for index in 0..3 {
            assert_eq!(rig.ids(client, index).len(), 8);
        }
        rig.assert_returned(0, 0);
    }
}
