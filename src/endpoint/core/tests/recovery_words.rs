//! What is said about a lane in each of its states: words that crossed others are ignored, all other words out of place
//! are violations; and lanes that fail again while they are being made again.

use std::{cell::RefCell, rc::Rc};

use super::recovery::{Pair, count_messages, one_lane};
use crate::wire::{
    Credits, LaneAddress, LaneDown, LaneFenced, LaneLost, LaneRefusal, LaneRefused, LaneRenew,
    LaneRenewed, Message,
};

fn credits(epoch: u32) -> Message {
    Message::Credits(Credits {
        lane: 0,
        epoch,
        total: 1,
    })
}

fn lost(epoch: u32) -> Message {
    Message::LaneLost(LaneLost {
        lane: 0,
        epoch,
        detail: String::new(),
    })
}

fn fenced(epoch: u32) -> Message {
    Message::LaneFenced(LaneFenced {
        lane: 0,
        epoch,
        counted: Vec::new(),
    })
}

fn renewed(epoch: u32) -> Message {
    Message::LaneRenewed(LaneRenewed {
        lane: 0,
        epoch,
        rail: 0,
        speed_bits: 0,
        address: LaneAddress::new(vec![0; 8]).unwrap(),
        receives: 1,
    })
}

fn refused(epoch: u32) -> Message {
    Message::LaneRefused(LaneRefused {
        lane: 0,
        epoch,
        code: LaneRefusal::NoRail,
        detail: String::new(),
    })
}

fn down(epoch: u32) -> Message {
    Message::LaneDown(LaneDown {
        lane: 0,
        epoch,
        unacknowledged: Vec::new(),
    })
}

fn renew(epoch: u32) -> Message {
    Message::LaneRenew(LaneRenew {
        lane: 0,
        epoch,
        rail: 0,
        remote_rail: 0,
        address: LaneAddress::new(vec![0; 8]).unwrap(),
    })
}

/// Loses messages of these names; a name with a number is for the messages of that epoch only.
fn lose(pair: &mut Pair, names: &'static [(&'static str, Option<u32>)]) {
    pair.world.tamper = Some(Box::new(move |_, bytes| {
        let message = Message::decode(&bytes).unwrap();
        let epoch = match &message {
            Message::LaneFenced(fenced) => Some(fenced.epoch),
            _ => None,
        };
        let is_lost = names.iter().any(|(name, of)| {
            let same = of.is_none() || *of == epoch;
            message.name() == *name && same
        });
        if is_lost { Vec::new() } else { vec![bytes] }
    }));
}

/// Brings `node`'s lane into a state, in which it stays.
fn bring(node: usize, state: &str, epoch: u32) -> Pair {
    let mut pair = Pair::new(1, [1, 1], &one_lane());
    let _ended = pair.open();
    let change = |pair: &mut Pair, node: usize, milliseconds| {
        assert!(pair.world.net.change_address(&format!("sim{node}-0")));
        pair.run(milliseconds);
    };
    match (node, state, epoch) {
        (0, "Fencing", 0) => {
            lose(&mut pair, &[("LaneFenced", None)]);
            change(&mut pair, 0, 5);
        }
        (0, "Fencing", 1) => {
            lose(&mut pair, &[("LaneRenewed", None), ("LaneFenced", Some(1))]);
            change(&mut pair, 0, 5);
            change(&mut pair, 0, 5);
        }
        (0, "Down", 0) => {
            assert!(pair.world.net.set_port("sim0-0", false));
            pair.run(400);
        }
        (0, "Renewing", 1) => {
            lose(&mut pair, &[("LaneRenewed", None)]);
            change(&mut pair, 0, 5);
        }
        (_, "Up", 1) => change(&mut pair, 0, 50),
        (1, "Lost", 0) => {
            lose(&mut pair, &[("LaneLost", None)]);
            change(&mut pair, 1, 5);
        }
        (1, "Down", 0) => {
            lose(&mut pair, &[("LaneRenew", None)]);
            change(&mut pair, 0, 5);
        }
        (1, "Refused", 1) => {
            lose(&mut pair, &[("LaneRefused", None)]);
            assert!(pair.world.net.set_port("sim1-0", false));
            pair.run(1);
            change(&mut pair, 0, 5);
        }
        other => panic!("nobody knows how: {other:?}"),
    }
    assert_eq!(pair.first_lane(node), (state.to_owned(), epoch));
    pair
}

/// Gives `message` to `node` in a state. Returns whether the session survives; then the lane must be as it was.
fn is_ignored(node: usize, state: &str, epoch: u32, message: &Message) -> bool {
    let mut pair = bring(node, state, epoch);
    let conn = pair.world.conns_of(node)[0];
    pair.world.inject(node, conn, message);
    pair.world.round();
    if pair.sessions(node) == 0 {
        return false;
    }
    assert_eq!(pair.first_lane(node), (state.to_owned(), epoch));
    true
}

#[test]
fn words_that_crossed_the_end_of_a_lane_are_ignored() {
    let cases = [
        (0, credits(0)),
        (0, lost(0)),
        (1, credits(1)),
        (1, lost(1)),
        (1, renewed(1)),
        (1, refused(1)),
    ];
    for (epoch, message) in cases {
        assert!(is_ignored(0, "Fencing", epoch, &message), "{message:?}");
    }
}

#[test]
fn words_of_another_time_are_violations() {
    let fencing_first = [credits(1), lost(1), fenced(1), renewed(1), refused(1)];
    let fencing_second = [credits(0), lost(0), fenced(0), renewed(0), refused(0)];
    let gone = [credits(0), lost(0), fenced(0), renewed(0), refused(0)];
    let renewing = [
        credits(0),
        credits(1),
        lost(0),
        lost(1),
        fenced(0),
        fenced(1),
        renewed(0),
        refused(0),
    ];
    let again = [
        credits(0),
        lost(0),
        fenced(0),
        fenced(1),
        renewed(0),
        renewed(1),
        refused(1),
    ];
    let reader_again = [down(0), down(2), renew(1), renew(2)];
    let reader_lost = [down(1), renew(0), renew(1)];
    let reader_gone = [down(0), down(1), renew(0), renew(2)];
    let reader_refused = [down(0), renew(1), renew(3)];
    let cases: [(usize, &str, u32, &[Message]); 9] = [
        (0, "Fencing", 0, &fencing_first),
        (0, "Fencing", 1, &fencing_second),
        (0, "Down", 0, &gone),
        (0, "Renewing", 1, &renewing),
        (0, "Up", 1, &again),
        (1, "Up", 1, &reader_again),
        (1, "Lost", 0, &reader_lost),
        (1, "Down", 0, &reader_gone),
        (1, "Refused", 1, &reader_refused),
    ];
    for (node, state, epoch, messages) in cases {
        for message in messages {
            let ignored = is_ignored(node, state, epoch, message);
            assert!(!ignored, "{node}, {state} {epoch}: {message:?}");
        }
    }
}

/// At the writer, at the reader, or at both.
#[test]
fn a_lane_fails_again_while_it_is_made_again() {
    for failing in [&[0][..], &[1], &[0, 1]] {
        for seed in 0..6 {
            let mut pair = Pair::new(seed, [1, 1], &one_lane());
            let (arrival, push) = pair.open();
            let ends = Rc::new(RefCell::new(Vec::new()));
            let kept = Rc::clone(&ends);
            pair.world.tamper = Some(Box::new(move |_, bytes| {
                if let Message::LaneDown(down) = Message::decode(&bytes).unwrap() {
                    kept.borrow_mut().push(down.epoch);
                }
                vec![bytes]
            }));
            pair.push_all(&push);
            pair.micros(10);
            pair.fail_lanes(0, 0);
            // Of the writer's lane while it waits for the answer, of the reader's as soon as there is one.
            let made = |pair: &Pair| match failing[0] {
                0 => pair.first_lane(0).0 == "Renewing",
                _ => pair.first_lane(1) == ("Up".to_owned(), 1),
            };
            for _ in 0..5_000 {
                if made(&pair) {
                    break;
                }
                pair.micros(1);
            }
            assert!(made(&pair), "it has not been made again");
            for node in failing {
                assert!(pair.world.net.change_address(&format!("sim{node}-0")));
            }
            pair.run(500);
            assert!(ends.borrow().starts_with(&[0, 1]), "{ends:?}");
            pair.assert_complete(&arrival, &push);
            pair.assert_recovered();
        }
    }
}

/// The reader cannot make its end, and later can.
#[test]
fn a_refused_lane_is_offered_again() {
    let mut pair = Pair::new(3, [1, 1], &one_lane());
    let (arrival, push) = pair.open();
    let refusals = count_messages(&mut pair.world, "LaneRefused");
    assert!(pair.world.net.set_port("sim1-0", false));
    pair.push_all(&push);
    pair.micros(10);
    pair.fail_lanes(0, 0);
    pair.run(200);
    assert!(refusals.get() > 1, "{}", refusals.get());
    assert_eq!(push.poll_ended(), None, "it waits");
    assert!(pair.world.net.set_port("sim1-0", true));
    pair.run(3_000);
    pair.assert_complete(&arrival, &push);
    pair.assert_recovered();
}
