//! Prefill and decode legs.

use std::time::Duration;

use super::{
    network::Failure,
    rig::{BLOCK, Rig, config, decode, greedy, prompt},
};
use crate::{
    engine::{Config, handle::Command, tail::Tail},
    request::{FinishReason, Leg, OnFailure, RequestError, SamplingParams, TokenId, Usage},
};

fn ignoring(max_tokens: usize) -> SamplingParams {
    SamplingParams {
        ignore_eos: true,
        ..greedy(max_tokens)
    }
}

/// Core 0 is for prefill, core 1 for decode.
fn pair() -> Rig {
    Rig::new(&[24, 24], &config())
}

/// A decode leg that has reserved, and its ticket.
fn reserved(
    rig: &mut Rig,
    tokens: &[TokenId],
    params: &SamplingParams,
    policy: OnFailure,
) -> (usize, Vec<u8>) {
    let client = rig.submit(1, decode(policy), tokens, params.clone());
    rig.step(1);
    let ticket = rig.heard(client).ticket.clone().expect("a ticket");
    (client, ticket)
}

fn usage(rig: &Rig, client: usize) -> Usage {
    rig.heard(client)
        .end
        .clone()
        .expect("an end")
        .expect("success")
}

fn error(rig: &Rig, client: usize) -> RequestError {
    rig.heard(client)
        .end
        .clone()
        .expect("an end")
        .expect_err("a failure")
}

#[test]
fn decode_goes_on_where_prefill_ends() {
    for tokens in [1, 3, 4, 17, 40] {
        let mut rig = pair();
        let (tokens, params) = (prompt(7, tokens), ignoring(6));
        let (there, ticket) = reserved(&mut rig, &tokens, &params, OnFailure::Fail);
        let here = rig.submit(0, Leg::Prefill { ticket }, &tokens, params);
        rig.settle();
        rig.clients[there].assert_right();
        assert_eq!(rig.ids(there, 0).len(), 6);
        assert_eq!(rig.ids(here, 0), rig.ids(there, 0)[..1]);
        assert_eq!(rig.heard(here).finished[&0], FinishReason::Handed);
        let usage = usage(&rig, there);
        assert_eq!(
            (usage.pushed_tokens, usage.recomputed_tokens),
            (tokens.len(), 0)
        );
        let (from, to) = (rig.stats[0], rig.stats[1]);
        assert_eq!((from.pushes, from.pushes_failed), (1, 0));
        assert_eq!((to.reservations, to.reservations_failed), (1, 0));
        assert_eq!(from.bytes_pushed, to.bytes_arrived);
        rig.assert_returned(0, 0);
        rig.assert_returned(1, 0);
    }
}

#[test]
fn nothing_is_computed_before_the_pages_are_there() {
    let mut rig = pair();
    let (tokens, params) = (prompt(7, 10), ignoring(3));
    let (there, ticket) = reserved(&mut rig, &tokens, &params, OnFailure::Fail);
    assert_eq!(rig.stats[1].blocks.granted, 3);
    rig.submit(0, Leg::Prefill { ticket }, &tokens, params);
    while rig.step(0) {}
    // Everything is handed over; one page of six is on its way.
    for _ in 0..5 {
        rig.network.lock().tick(1);
        rig.step(1);
        assert_eq!((rig.stats[1].steps, rig.stats[1].blocks.granted), (0, 3));
        assert!(rig.ids(there, 0).is_empty());
    }
    assert!(rig.stats[0].blocks.used >= 3, "the source is still read");
    rig.settle();
    rig.clients[there].assert_right();
}

#[test]
fn layers_are_handed_over_chunk_by_chunk() {
    let mut rig = pair();
    let (tokens, params) = (prompt(7, 39), greedy(2));
    let (_, ticket) = reserved(&mut rig, &tokens, &params, OnFailure::Fail);
    rig.submit(0, Leg::Prefill { ticket }, &tokens, params);
    rig.step(0);
    // 16 tokens in a step.
    assert_eq!(rig.network.lock().log, [(0, 0..4), (1, 0..4)]);
    rig.step(0);
    assert_eq!(rig.network.lock().log[2..], [(0, 4..8), (1, 4..8)]);
    rig.step(0);
    // The last block is not full.
    assert_eq!(rig.network.lock().log[4..], [(0, 8..10), (1, 8..10)]);
    rig.settle();
}

#[test]
fn chunks_that_end_within_a_block_leave_it_for_the_next() {
    let config = Config {
        max_batch_tokens: 6,
        ..config()
    };
    let mut rig = Rig::new(&[24, 24], &config);
    let (tokens, params) = (prompt(7, 14), greedy(2));
    let (there, ticket) = reserved(&mut rig, &tokens, &params, OnFailure::Fail);
    rig.submit(0, Leg::Prefill { ticket }, &tokens, params);
    rig.settle();
    let log = rig.network.lock().log.clone();
    let positions: Vec<_> = log.iter().map(|(_, positions)| positions.clone()).collect();
    assert_eq!(positions, [0..1, 0..1, 1..3, 1..3, 3..4, 3..4]);
    rig.clients[there].assert_right();
}

#[test]
fn what_prefill_has_cached_goes_at_once_and_what_decode_has_does_not_go() {
    let mut rig = pair();
    let (tokens, params) = (prompt(7, 22), greedy(4));
    // Both have the first 3 blocks, prefill has 5.
    rig.submit(0, Leg::Both, &tokens, greedy(1));
    rig.submit(1, Leg::Both, &tokens[..3 * BLOCK + 1], greedy(1));
    rig.settle();
    let (there, ticket) = reserved(&mut rig, &tokens, &params, OnFailure::Fail);
    assert_eq!(rig.stats[1].blocks.granted, 3);
    rig.submit(0, Leg::Prefill { ticket }, &tokens, params);
    rig.step(0);
    assert_eq!(
        rig.network.lock().log,
        [(0, 3..5), (1, 3..5), (0, 5..6), (1, 5..6)]
    );
    rig.settle();
    rig.clients[there].assert_right();
    let usage = usage(&rig, there);
    assert_eq!((usage.cached_tokens, usage.pushed_tokens), (12, 10));
    assert_eq!(rig.network.lock().copied, 6);
    // What has arrived is found again.
    let again = rig.submit(1, Leg::Both, &tokens, greedy(1));
    rig.settle();
    assert_eq!(self::usage(&rig, again).cached_tokens, 20);
    rig.assert_returned(1, 0);
}

#[test]
fn several_completions_and_a_seed_that_only_prefill_knows() {
    let mut rig = pair();
    let params = SamplingParams {
        n: 3,
        max_tokens: 5,
        ignore_eos: true,
        logprobs: Some(2),
        ..SamplingParams::default()
    };
    let tokens = prompt(7, 10);
    let (there, ticket) = reserved(&mut rig, &tokens, &params, OnFailure::Fail);
    let here = rig.submit(0, Leg::Prefill { ticket }, &tokens, params.clone());
    rig.settle();
    let tail = Tail::decode(&rig.network.lock().tails[0]).expect("a tail");
    let seeded = SamplingParams {
        seed: Some(tail.seed),
        ..params
    };
    rig.clients[there].params = seeded;
    rig.clients[there].assert_right();
    for index in 0..3 {
        assert_eq!(rig.ids(there, index).len(), 5);
        let (first, same) = (
            &rig.heard(there).tokens[&index][0],
            &rig.heard(here).tokens[&index][0],
        );
        assert_eq!(first, same);
        assert_eq!(first.top.len(), 2);
    }
    rig.assert_returned(1, 0);
}

#[test]
fn a_prompt_is_held_until_its_ticket_comes() {
    let mut rig = pair();
    let (tokens, params) = (prompt(7, 18), ignoring(4));
    let here = rig.submit(0, Leg::PrefillHeld, &tokens, params.clone());
    rig.settle();
    assert_eq!(rig.heard(here).finished[&0], FinishReason::Handed);
    assert!(rig.heard(here).end.is_none());
    // Who has asked for it may go: it is held for the decode engine.
    rig.hang_up(here);
    rig.step(0);
    assert_eq!(rig.stats[0].blocks.used, 5);

    let (there, ticket) = reserved(&mut rig, &tokens, &params, OnFailure::Fail);
    let id = rig.clients[here].id.clone();
    rig.command(0, Command::PushHeld { id, ticket });
    rig.settle();
    rig.clients[there].assert_right();
    assert_eq!(usage(&rig, there).pushed_tokens, 18);
    assert_eq!(rig.stats[0].succeeded, 1);
    rig.assert_returned(0, 0);
}

#[test]
fn a_ticket_may_come_while_the_prompt_waits_or_is_computed() {
    for steps in 0..3 {
        let mut rig = pair();
        let (tokens, params) = (prompt(7, 40), ignoring(4));
        let here = rig.submit(0, Leg::PrefillHeld, &tokens, params.clone());
        for _ in 0..steps {
            rig.step(0);
        }
        let (there, ticket) = reserved(&mut rig, &tokens, &params, OnFailure::Fail);
        let id = rig.clients[here].id.clone();
        rig.command(0, Command::PushHeld { id, ticket });
        rig.settle();
        rig.clients[there].assert_right();
        rig.clients[here].assert_right();
        assert_eq!(usage(&rig, there).pushed_tokens, 40);
    }
}

#[test]
fn a_held_prompt_is_given_up_at_its_deadline() {
    let mut rig = pair();
    let time = Duration::from_secs(5);
    let here = rig.submit_for(0, Leg::PrefillHeld, &prompt(7, 18), greedy(4), time);
    rig.settle();
    rig.pass(time);
    rig.step(0);
    let phase = "holding pages for a decode engine";
    assert_eq!(
        error(&rig, here),
        RequestError::Deadline { after: time, phase }
    );
    rig.assert_returned(0, 0);
    // The ticket comes too late, and its issuer hears of it.
    let (there, ticket) = reserved(&mut rig, &prompt(7, 18), &greedy(4), OnFailure::Fail);
    let id = rig.clients[here].id.clone();
    rig.command(0, Command::PushHeld { id, ticket });
    rig.settle();
    assert!(matches!(error(&rig, there), RequestError::Transfer { .. }));
    rig.assert_returned(1, 0);
}

#[test]
fn pages_that_do_not_arrive_are_computed_again_only_by_policy() {
    for (policy, how) in [
        (OnFailure::Fail, Failure::Fenced),
        (OnFailure::Recompute, Failure::Fenced),
        (OnFailure::Fail, Failure::UnfencedArrival),
        (OnFailure::Recompute, Failure::UnfencedArrival),
        (OnFailure::Recompute, Failure::UnfencedPush),
    ] {
        let mut rig = pair();
        let (tokens, params) = (prompt(7, 10), ignoring(4));
        let (there, ticket) = reserved(&mut rig, &tokens, &params, policy);
        let here = rig.submit(0, Leg::Prefill { ticket }, &tokens, params);
        rig.step(0);
        rig.network.lock().tick(2);
        rig.network.lock().fail(1, how);
        rig.settle();
        assert!(matches!(
            error(&rig, here),
            RequestError::Transfer {
                is_retryable: true,
                ..
            }
        ));
        let stats = rig.stats[1];
        if policy == OnFailure::Fail {
            assert!(matches!(error(&rig, there), RequestError::Transfer { .. }));
            assert_eq!((stats.recomputed_tokens, stats.steps), (0, 0));
        } else {
            rig.clients[there].assert_right();
            assert_eq!(usage(&rig, there).recomputed_tokens, 10);
            assert_eq!(stats.recomputed_tokens, 10);
        }
        assert_eq!(
            (stats.reservations_failed, rig.stats[0].pushes_failed),
            (1, 1)
        );
        // Blocks that a peer may still write or read are gone.
        rig.assert_returned(0, if how == Failure::UnfencedPush { 3 } else { 0 });
        rig.assert_returned(
            1,
            if how == Failure::UnfencedArrival {
                3
            } else {
                0
            },
        );
    }
}

#[test]
fn blocks_come_back_with_the_outcome_and_not_before() {
    let mut rig = pair();
    let (tokens, params) = (prompt(7, 10), ignoring(4));
    let (there, ticket) = reserved(&mut rig, &tokens, &params, OnFailure::Fail);
    let here = rig.submit(0, Leg::Prefill { ticket }, &tokens, params);
    rig.step(0);
    rig.abort(here);
    rig.abort(there);
    assert_eq!(error(&rig, here), RequestError::Aborted);
    assert_eq!(error(&rig, there), RequestError::Aborted);
    rig.step(0);
    rig.step(1);
    assert_eq!(rig.stats[0].blocks.used, 3);
    assert_eq!(rig.stats[1].blocks.granted, 3);
    assert_eq!((rig.stats[0].parked, rig.stats[1].parked), (1, 1));
    rig.settle();
    rig.assert_returned(0, 0);
    rig.assert_returned(1, 0);
}

#[test]
fn a_reservation_that_nobody_pushes_to_ends_in_time() {
    let mut rig = pair();
    let (there, _) = reserved(&mut rig, &prompt(7, 10), &greedy(4), OnFailure::Fail);
    rig.pass(config().transfer_timeout);
    rig.settle();
    assert!(matches!(error(&rig, there), RequestError::Transfer { .. }));
    rig.assert_returned(1, 0);
}

#[test]
fn every_refusal_releases_the_other_side() {
    for refused in [
        "reserve", "open", "layer", "finish", "prompt", "deadline", "abort",
    ] {
        let mut rig = pair();
        let (tokens, params) = (prompt(7, 10), greedy(4));
        if refused == "reserve" {
            rig.network.lock().refuse = Some("reserve");
            let there = rig.submit(1, decode(OnFailure::Fail), &tokens, params.clone());
            let again = rig.submit(1, decode(OnFailure::Fail), &tokens, params.clone());
            rig.step(1);
            assert!(matches!(error(&rig, there), RequestError::Transfer { .. }));
            assert!(rig.heard(again).ticket.is_some());
            rig.abort(again);
            rig.settle();
            rig.assert_returned(1, 0);
            continue;
        }
        let (there, ticket) = reserved(&mut rig, &tokens, &params, OnFailure::Fail);
        let mut other = tokens.clone();
        if refused == "prompt" {
            other[0] += 1;
        } else {
            rig.network.lock().refuse = Some(refused);
        }
        let here = rig.submit(0, Leg::Prefill { ticket }, &other, params);
        if refused == "abort" {
            rig.abort(here);
        }
        if refused == "deadline" {
            rig.pass(Duration::from_secs(60));
        }
        rig.settle();
        assert!(
            rig.heard(here).end.clone().expect("an end").is_err(),
            "{refused}"
        );
        assert!(
            rig.heard(there).end.clone().expect("an end").is_err(),
            "{refused}"
        );
        rig.assert_returned(0, 0);
        rig.assert_returned(1, 0);
    }
}

#[test]
fn a_tail_of_something_else_is_a_failure() {
    let mut rig = pair();
    let tokens = prompt(7, 10);
    // The prefill leg was asked for one completion, the decode leg for two.
    let two = SamplingParams { n: 2, ..greedy(4) };
    let (there, ticket) = reserved(&mut rig, &tokens, &two, OnFailure::Recompute);
    rig.submit(0, Leg::Prefill { ticket }, &tokens, greedy(4));
    rig.settle();
    assert_eq!(usage(&rig, there).recomputed_tokens, 10);
    rig.clients[there].assert_right();
    rig.assert_returned(1, 0);
}

#[test]
fn a_decode_leg_that_is_preempted_computes_again_here() {
    let mut rig = Rig::new(&[24, 10], &config());
    let params = ignoring(20);
    let first = rig.submit(1, Leg::Both, &prompt(1, 10), params.clone());
    rig.step(1);
    let tokens = prompt(7, 10);
    let (there, ticket) = reserved(&mut rig, &tokens, &params, OnFailure::Fail);
    rig.submit(0, Leg::Prefill { ticket }, &tokens, params);
    rig.settle();
    assert!(rig.stats[1].preemptions > 0);
    assert!(rig.stats[1].preempted_tokens > 0);
    rig.clients[first].assert_right();
    rig.clients[there].assert_right();
    assert_eq!(rig.ids(there, 0).len(), 20);
    rig.assert_returned(1, 0);
}

#[test]
fn granted_blocks_are_never_preempted_or_evicted() {
    let mut rig = Rig::new(&[24, 8], &config());
    let (there, ticket) = reserved(&mut rig, &prompt(7, 16), &ignoring(2), OnFailure::Fail);
    let other = rig.submit(1, Leg::Both, &prompt(1, 8), ignoring(16));
    for _ in 0..40 {
        rig.step(1);
        assert_eq!(rig.stats[1].blocks.granted, 4);
    }
    // It needs six of the four others.
    assert!(rig.stats[1].preemptions > 0 && rig.heard(other).end.is_none());
    rig.submit(0, Leg::Prefill { ticket }, &prompt(7, 16), ignoring(2));
    rig.settle();
    rig.clients[there].assert_right();
    rig.clients[other].assert_right();
    assert_eq!(rig.ids(other, 0).len(), 16);
}

#[test]
fn the_first_token_may_be_the_last() {
    let mut rig = pair();
    let tokens = prompt(7, 10);
    let (there, ticket) = reserved(&mut rig, &tokens, &greedy(1), OnFailure::Fail);
    rig.submit(0, Leg::Prefill { ticket }, &tokens, greedy(1));
    rig.settle();
    assert_eq!(rig.ids(there, 0).len(), 1);
    assert_eq!(usage(&rig, there).completion_tokens, 1);
    rig.assert_returned(1, 0);
}

#[test]
fn a_prefill_leg_keeps_its_blocks_when_others_need_some() {
    let config = Config {
        max_batch_tokens: 2,
        ..config()
    };
    let mut rig = Rig::new(&[10, 24], &config);
    let older = rig.submit(0, Leg::Both, &prompt(1, 8), ignoring(24));
    for _ in 0..5 {
        rig.step(0);
    }
    let (tokens, params) = (prompt(7, 24), ignoring(3));
    let (there, ticket) = reserved(&mut rig, &tokens, &params, OnFailure::Fail);
    let here = rig.submit(0, Leg::Prefill { ticket }, &tokens, params);
    while rig.ids(here, 0).is_empty() {
        rig.step(0);
        assert!(rig.stats[0].blocks.used >= 6);
    }
    assert!(
        rig.stats[0].preemptions > 0,
        "the older one had to give way"
    );
    rig.settle();
    for client in [older, here, there] {
        rig.clients[client].assert_right();
    }
    assert_eq!(rig.ids(older, 0).len(), 24);
    rig.assert_returned(0, 0);
}

#[test]
fn an_outcome_that_was_on_its_way_when_the_client_went_returns_the_blocks() {
    let mut rig = pair();
    let (tokens, params) = (prompt(7, 10), ignoring(4));
    let (there, ticket) = reserved(&mut rig, &tokens, &params, OnFailure::Fail);
    let here = rig.submit(0, Leg::Prefill { ticket }, &tokens, params);
    while rig.step(0) {}
    // Everything has arrived, and neither side has looked.
    rig.network.lock().tick(usize::MAX);
    rig.abort(here);
    rig.abort(there);
    rig.settle();
    assert_eq!(error(&rig, there), RequestError::Aborted);
    rig.assert_returned(0, 0);
    rig.assert_returned(1, 0);
}

#[test]
fn who_does_not_fit_any_more_is_told() {
    let mut rig = Rig::new(&[24, 8], &config());
    let (there, _) = reserved(&mut rig, &prompt(7, 16), &greedy(1), OnFailure::Fail);
    let other = rig.submit(1, Leg::Both, &prompt(1, 20), greedy(1));
    rig.step(1);
    rig.network.lock().fail(1, Failure::UnfencedArrival);
    rig.settle();
    assert!(matches!(error(&rig, there), RequestError::Transfer { .. }));
    assert!(matches!(error(&rig, other), RequestError::Busy { .. }));
    rig.assert_returned(1, 4);
}
