//! Rails that die, go down, come back and flap; and messages about lanes that nobody should send.

use std::{cell::RefCell, rc::Rc, time::Duration};

use super::{
    recovery::{Pair, config},
    world::{Random, World},
};
use crate::{
    endpoint::{PeerError, PushError, config::Config},
    fabric::Status,
    wire::{
        LaneDown, LaneFenced, LaneLost, LaneRefusal, LaneRefused, LaneRenew, LaneRenewed, Message,
    },
};

/// One of two rails dies for good in the middle of a push, on either side.
#[test]
fn a_push_survives_the_death_of_a_rail() {
    for node in 0..2 {
        for step in 0..6 {
            let mut pair = Pair::new(step, [2, 2], &config());
            let (arrival, push) = pair.open();
            pair.push_all(&push);
            // At the reader with nothing acknowledged that it has not looked at: a device takes that with it.
            pair.micros(step * 9);
            pair.world.round();
            assert!(pair.world.net.kill_device(&format!("sim{node}-1")));
            pair.run(200);
            pair.assert_complete(&arrival, &push);
            assert_eq!((pair.sessions(0), pair.sessions(1)), (1, 1));
        }
    }
}

/// A port goes down for longer than the grace; the push completes over the other, and the lanes come back with the port.
#[test]
fn a_port_goes_down_and_comes_back() {
    for node in 0..2 {
        let mut pair = Pair::new(3, [2, 2], &config());
        let (arrival, push) = pair.open();
        pair.push_all(&push);
        pair.micros(20);
        let device = format!("sim{node}-0");
        assert!(pair.world.net.set_port(&device, false));
        pair.run(1000);
        pair.assert_complete(&arrival, &push);
        let attempts = pair.renewals();
        assert!(pair.world.net.set_port(&device, true));
        pair.run(5000);
        pair.assert_recovered();
        assert!(pair.renewals() > 0, "{attempts}");
        let (arrival, push) = pair.open();
        pair.push_all(&push);
        pair.run(100);
        pair.assert_complete(&arrival, &push);
    }
}

/// Without any lane the session ends when recovery has had its time, and says how the last lane failed.
#[test]
fn without_any_rail_the_session_ends() {
    let mut pair = Pair::new(4, [1, 1], &config());
    let (arrival, push) = pair.open();
    pair.push_all(&push);
    pair.micros(20);
    assert!(pair.world.net.set_port("sim1-0", false));
    pair.run(9_000);
    assert_eq!(push.poll_ended(), None, "it is given time");
    pair.run(4_000);
    let end = push.poll_ended();
    match &end {
        Some(Err(PushError::Peer(error @ PeerError::NoLane { .. }))) => {
            assert!(error.is_retryable())
        }
        other => panic!("{other:?}"),
    }
    let text = format!("{end:?}");
    assert!(
        text.contains("the port is down") || text.contains("RetryExceeded"),
        "{text}"
    );
    assert!(matches!(arrival.poll_complete(), Some(Err(_))));
    assert_eq!(pair.pool.granted_pages(), 0);
    assert_eq!((pair.sessions(0), pair.sessions(1)), (0, 0));
}

/// A port that flaps a thousand times a second costs a few attempts a second, and one that fails at every request too.
#[test]
fn a_flapping_rail_does_not_storm() {
    let mut pair = Pair::new(5, [2, 2], &config());
    let (arrival, push) = pair.open();
    for _ in 0..1000 {
        pair.world.net.change_address("sim0-0");
        pair.world.net.set_port("sim0-0", false);
        pair.micros(1000);
        pair.world.net.set_port("sim0-0", true);
        pair.micros(1000);
    }
    let attempts = pair.renewals();
    // Two lanes for two seconds, each at most every 100 ms beside its own backoff.
    assert!((2..100).contains(&attempts), "{attempts}");
    pair.push_all(&push);
    pair.run(5_000);
    pair.assert_complete(&arrival, &push);
}

/// Failure after failure, also while lanes are being made again and while the reader is asked.
#[test]
fn failures_in_a_row() {
    for seed in 0..8 {
        let mut pair = Pair::new(seed, [1, 2], &config());
        let (arrival, push) = pair.open();
        pair.push_all(&push);
        for step in 0..40 {
            let device = ["sim0-0", "sim1-0"][(step % 2) as usize];
            if let Some(lane) = pair.world.net.lanes_of(device).last() {
                pair.world.net.fail_lane(device, *lane);
            }
            if step % 5 == 0 {
                pair.world.net.post_fails_at(1);
            }
            if step % 7 == 0 {
                let status = Status::RnrRetryExceeded;
                pair.world.net.fail_at_request("sim0-0", step % 4, status);
            }
            pair.micros(seed * 13 + step * 11);
        }
        pair.run(20_000);
        pair.assert_complete(&arrival, &push);
        pair.assert_recovered();
    }
}

/// What a peer must not say about lanes ends its session, on either side and whatever the lane does.
#[test]
fn wrong_words_about_lanes_are_violations() {
    let detail = String::new;
    let address = || crate::wire::LaneAddress::new(vec![0; 8]).unwrap();
    let down = |lane, epoch, unacknowledged| LaneDown {
        lane,
        epoch,
        unacknowledged,
    };
    let to_reader = [
        Message::LaneDown(down(9, 0, vec![])),
        Message::LaneDown(down(0, 1, vec![])),
        Message::LaneDown(down(0, 0, vec![(1, 1 << 19)])),
        Message::LaneRenew(LaneRenew {
            lane: 0,
            epoch: 1,
            rail: 0,
            remote_rail: 0,
            address: address(),
        }),
    ];
    let to_writer = [
        Message::LaneLost(LaneLost {
            lane: 0,
            epoch: 1,
            detail: detail(),
        }),
        Message::LaneLost(LaneLost {
            lane: 9,
            epoch: 0,
            detail: detail(),
        }),
        Message::LaneFenced(LaneFenced {
            lane: 0,
            epoch: 0,
            counted: vec![],
        }),
        Message::LaneRenewed(LaneRenewed {
            lane: 0,
            epoch: 0,
            rail: 0,
            speed_bits: 0,
            address: address(),
            receives: 1,
        }),
        Message::LaneRefused(LaneRefused {
            lane: 0,
            epoch: 0,
            code: LaneRefusal::NoRail,
            detail: detail(),
        }),
    ];
    let cases = to_reader.into_iter().map(|m| (1, m));
    for (node, message) in cases.chain(to_writer.into_iter().map(|m| (0, m))) {
        let mut pair = Pair::new(6, [1, 1], &config());
        let (arrival, push) = pair.open();
        let conn = pair.world.conns_of(node)[0];
        pair.world.inject(node, conn, &message);
        pair.run(50);
        assert_eq!(pair.sessions(node), 0, "{message:?}");
        assert!(push.poll_ended().is_some() && arrival.poll_complete().is_some());
    }
}

/// An answer about other parts than were asked about is a violation: nothing is sent again on its word.
#[test]
fn an_answer_of_another_length_is_a_violation() {
    let mut pair = Pair::new(7, [1, 1], &config());
    let (_arrival, push) = pair.open();
    let seen = Rc::new(RefCell::new(0));
    let count = Rc::clone(&seen);
    pair.world.tamper = Some(Box::new(move |_, bytes| {
        match Message::decode(&bytes).unwrap() {
            Message::LaneFenced(mut fenced) => {
                *count.borrow_mut() += 1;
                fenced.counted.push(false);
                vec![Message::LaneFenced(fenced).encode().unwrap()]
            }
            _ => vec![bytes],
        }
    }));
    pair.push_all(&push);
    pair.micros(10);
    let lane = pair.world.net.lanes_of("sim0-0")[0];
    pair.world.net.fail_lane("sim0-0", lane);
    pair.run(50);
    assert_eq!(*seen.borrow(), 1);
    let end = push.poll_ended();
    assert!(
        matches!(end, Some(Err(PushError::Peer(PeerError::Protocol { .. })))),
        "{end:?}"
    );
}

/// A rail four times as fast gets about four times as much.
#[test]
fn a_rail_of_another_speed_gets_its_share() {
    let mut world: World = World::with_rails(8, &[2, 2], &config());
    world.run(Duration::from_millis(1), |_| {});
    let mut pair = Pair::over(world);
    let (_arrival, _push) = pair.open();
    let core = &mut pair.world.nodes[0].core;
    let session = core.sessions.values_mut().next().unwrap();
    for lane in &mut session.lanes {
        lane.speed = if lane.rail == 0 { 400 } else { 100 };
    }
    let mut share = [0u64; 2];
    for _ in 0..500 {
        let lane = session.choose(&core.rails, crate::protocol::Time(0), 1000, |_| Some(0));
        let lane = &mut session.lanes[usize::from(lane)];
        lane.load += 1000;
        share[lane.rail] += 1;
    }
    assert!((395..=405).contains(&share[0]), "{share:?}");
    let loads: Vec<u64> = session.lanes.iter().map(|lane| lane.load).collect();
    assert!(loads[0].abs_diff(loads[1]) <= 1000 && loads[2].abs_diff(loads[3]) <= 1000);
    session.lanes.iter_mut().for_each(|lane| lane.load = 0);
}

/// Whatever waits on the lanes, and however fast their rails are, a block goes where it is done first.
#[test]
fn a_block_goes_to_the_lane_with_the_least_before_it() {
    let config = Config {
        lanes_per_rail: 3,
        ..config()
    };
    let mut pair = Pair::new(9, [3, 3], &config);
    let (_arrival, _push) = pair.open();
    let core = &mut pair.world.nodes[0].core;
    let session = core.sessions.values_mut().next().unwrap();
    assert_eq!(session.lanes.len(), 9);
    let mut random = Random::new(0x10ad);
    for round in 0..2000 {
        // Rails of one speed, of several, and of one that is unknown, which makes all alike.
        let speeds: [u64; 3] = match round % 3 {
            0 => [100; 3],
            1 => [100, 200, 400],
            _ => [100, 0, 400],
        };
        for lane in &mut session.lanes {
            lane.speed = speeds[lane.rail];
            lane.load = random.below(4) * (64 << 10);
        }
        let bytes = 1 + random.below(1 << 20);
        let chosen = session.choose(&core.rails, crate::protocol::Time(0), bytes, |_| Some(0));
        let chosen = &session.lanes[usize::from(chosen)];
        let waiting = |rail: usize| -> u64 {
            let lanes = session.lanes.iter().filter(|lane| lane.rail == rail);
            lanes.map(|lane| lane.load).sum()
        };
        // When the rail would be done: compared as fractions, so without rounding.
        let known = speeds.iter().all(|&speed| speed > 0);
        let work = |rail: usize| u128::from(waiting(rail) + bytes);
        let speed = |rail: usize| u128::from(if known { speeds[rail] } else { 1 });
        for rail in 0..3 {
            let sooner = work(rail) * speed(chosen.rail) < work(chosen.rail) * speed(rail);
            assert!(!sooner, "rail {rail} would be done before {}", chosen.rail);
        }
        let mut beside = session.lanes.iter().filter(|lane| lane.rail == chosen.rail);
        assert!(beside.all(|lane| lane.load >= chosen.load));
    }
    session.lanes.iter_mut().for_each(|lane| lane.load = 0);
}

/// Blocks of a push leave a lane alone on which much waits already, and what is done waits no more.
#[test]
fn a_push_goes_round_a_lane_with_a_backlog() {
    const BACKLOG: u64 = 1 << 40;
    let mut pair = Pair::new(10, [1, 1], &config());
    let (arrival, push) = pair.open();
    fn lanes(pair: &mut Pair) -> &mut Vec<super::super::session::Lane> {
        let core = &mut pair.world.nodes[0].core;
        &mut core.sessions.values_mut().next().unwrap().lanes
    }
    assert_eq!(lanes(&mut pair).len(), 2);
    lanes(&mut pair)[0].load = BACKLOG;
    pair.push_all(&push);
    pair.run(100);
    pair.assert_complete(&arrival, &push);
    let loads: Vec<u64> = lanes(&mut pair).iter().map(|lane| lane.load).collect();
    assert_eq!(loads, [BACKLOG, 0]);
    let posted: Vec<u64> = lanes(&mut pair)
        .iter()
        .map(|lane| lane.ledger.next_sequence())
        .collect();
    assert_eq!(posted[0], 0, "{posted:?}");
    assert!(posted[1] > 0, "{posted:?}");
}
