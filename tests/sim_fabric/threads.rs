//! A free-running net under real threads.

use std::{
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use kvpush::fabric::{
    Access, Completion, CompletionKind, Context, Device, LaneAddress, LaneConfig, LaneId, Opcode,
    RemoteKey, Sge, Status, WorkRequest, sim::SimNet,
};

use crate::rig::{HOST, LANE, Memory};

const ROUNDS: u32 = 300;
const SIZE: usize = 10_000;

/// Sleeps until the context has something; false if that takes so long that it never will.
fn sleep(context: &mut dyn Context) -> bool {
    if !context.arm().unwrap() {
        return true;
    }
    let mut wait = libc::pollfd {
        fd: context.wait_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one pollfd.
    unsafe { libc::poll(&mut wait, 1, 20_000) > 0 }
}

/// Polls until `count` completions are there, sleeping between.
fn wait(context: &mut dyn Context, count: usize) -> Vec<Completion> {
    let deadline = Instant::now() + Duration::from_secs(60);
    let mut all = Vec::new();
    while all.len() < count {
        context.poll(&mut all).unwrap();
        if all.len() < count {
            assert!(
                sleep(context) && Instant::now() < deadline,
                "{} of {count}",
                all.len()
            );
        }
    }
    all
}

/// What the two sides tell each other out of band.
type Hello = (LaneAddress, u64, RemoteKey);

struct Party {
    context: Box<dyn Context>,
    lane: LaneId,
    memory: Memory,
    sge: Sge,
    peer: Hello,
}

fn join(
    net: &SimNet,
    name: &str,
    config: &LaneConfig,
    to: mpsc::Sender<Hello>,
    from: mpsc::Receiver<Hello>,
) -> Party {
    let device = net.device(name);
    let memory = Memory::new(SIZE);
    // SAFETY: `memory` is dropped after the context, which is declared before it and holds the device.
    let keys = unsafe { device.register(memory.address(), SIZE as u64, Access::ALL) }.unwrap();
    let mut context = device.open_context(1024).unwrap();
    let (lane, address) = context.create_lane(config).unwrap();
    to.send((address, memory.address(), keys.remote)).unwrap();
    let peer = from.recv().unwrap();
    context.connect_lane(lane, &peer.0, HOST, true).unwrap();
    let sge = Sge {
        address: memory.address(),
        length: SIZE as u32,
        key: keys.local,
    };
    Party {
        context,
        lane,
        memory,
        sge,
        peer,
    }
}

impl Party {
    fn push(&mut self, round: u32) {
        self.post(round, Opcode::WriteImm(round));
    }

    /// The peer's context learns nothing of it.
    fn push_quietly(&mut self, round: u32) {
        self.post(round, Opcode::Write);
    }

    fn post(&mut self, round: u32, opcode: Opcode) {
        self.memory.fill(round as u8);
        let request = WorkRequest {
            id: round.into(),
            opcode,
            remote_address: self.peer.1,
            remote_key: self.peer.2,
            first_sge: 0,
            sge_count: 1,
            signaled: true,
            inline: false,
        };
        // SAFETY: the element is the whole of `memory`, which is registered, mapped until after the context is dropped
        // (field order), and touched by raw pointers only.
        unsafe { self.context.post(self.lane, &[request], &[self.sge]) }.unwrap();
    }
}

#[test]
fn two_threads_play_ping_pong_asleep() {
    let net = SimNet::free_running(51);
    let (to_b, from_a) = mpsc::channel();
    let (to_a, from_b) = mpsc::channel();
    let config = LaneConfig {
        receive_depth: 1,
        ..LANE
    };
    let play = move |net: SimNet, name: &'static str, first: bool, to, from| {
        let mut party = join(&net, name, &config, to, from);
        if first {
            party.push(0);
        }
        let mut next = u32::from(!first);
        let (mut sent, mut received) = (0, 0);
        while received < ROUNDS / 2 || sent < ROUNDS / 2 {
            for completion in wait(party.context.as_mut(), 1) {
                assert_eq!(completion.status, Status::Success);
                match completion.kind {
                    CompletionKind::Sent { .. } => sent += 1,
                    CompletionKind::Received { imm } => {
                        received += 1;
                        // The first one pushes the even rounds and gets the odd ones.
                        assert_eq!(imm, 2 * (received - 1) + u32::from(first));
                        assert_eq!(party.memory.bytes(0, SIZE), [imm as u8; SIZE]);
                        party.context.post_receives(party.lane, 1).unwrap();
                        next = imm + 1;
                        if next < ROUNDS {
                            party.push(next);
                        }
                    }
                }
            }
        }
        next
    };
    let other = net.clone();
    let b = thread::spawn(move || play(other, "b", false, to_a, from_a));
    let a = play(net.clone(), "a", true, to_b, from_b);
    let b = b.join().unwrap();
    assert_eq!(a.max(b), ROUNDS);
    assert_eq!(net.stats().messages, ROUNDS.into());
}

#[test]
fn a_sleeping_receiver_gets_what_a_sender_posts_and_forgets() {
    let net = SimNet::free_running(52);
    let (to_b, from_a) = mpsc::channel();
    let (to_a, from_b) = mpsc::channel();
    let (done, finished) = mpsc::channel::<()>();
    let other = net.clone();
    let receiver = thread::spawn(move || {
        let mut party = join(&other, "b", &LANE, to_a, from_a);
        let completions = wait(party.context.as_mut(), 1);
        assert_eq!(completions[0].kind, CompletionKind::Received { imm: 77 });
        assert_eq!(party.memory.bytes(0, SIZE), [77; SIZE]);
        drop(done);
    });
    let mut party = join(&net, "a", &LANE, to_b, from_b);
    thread::sleep(Duration::from_millis(50));
    party.push(77);
    // The sender neither polls nor arms.
    assert!(finished.recv_timeout(Duration::from_secs(60)).is_err());
    receiver.join().unwrap();
    assert_eq!(wait(party.context.as_mut(), 1)[0].status, Status::Success);
}

#[test]
fn an_idle_context_stays_asleep() {
    let net = SimNet::free_running(53);
    let mut context = net.device("a").open_context(16).unwrap();
    assert!(context.arm().unwrap());
    let mut wait = libc::pollfd {
        fd: context.wait_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one pollfd.
    assert_eq!(unsafe { libc::poll(&mut wait, 1, 50) }, 0);
    net.kill_device("a");
    // SAFETY: one pollfd.
    assert_eq!(unsafe { libc::poll(&mut wait, 1, 5_000) }, 1);
    assert!(context.poll(&mut Vec::new()).is_err());
}

#[test]
fn a_write_before_the_peer_is_connected_waits_for_it() {
    let net = SimNet::free_running(54);
    let (to_b, from_a) = mpsc::channel();
    let (to_a, from_b) = mpsc::channel::<Hello>();
    let device = net.device("b");
    let memory = Memory::new(SIZE);
    // SAFETY: `memory` outlives the context by the explicit drops below.
    let keys = unsafe { device.register(memory.address(), SIZE as u64, Access::ALL) }.unwrap();
    let mut context = device.open_context(1024).unwrap();
    let (lane, address) = context.create_lane(&LANE).unwrap();
    to_a.send((address, memory.address(), keys.remote)).unwrap();
    let mut party = join(&net, "a", &LANE, to_b, from_b);
    party.push(5);
    let mut out = Vec::new();
    for _ in 0..1000 {
        party.context.poll(&mut out).unwrap();
    }
    assert_eq!(out, []);
    let hello: Hello = from_a.recv().unwrap();
    context.connect_lane(lane, &hello.0, HOST, false).unwrap();
    assert_eq!(wait(party.context.as_mut(), 1)[0].status, Status::Success);
    drop(context);
    drop(memory);
}

#[test]
fn nobody_sleeps_while_something_is_to_happen() {
    let net = SimNet::free_running(55);
    let (to_b, from_a) = mpsc::channel();
    let (to_a, from_b) = mpsc::channel();
    let mut idle = net.device("idle").open_context(16).unwrap();
    let other = net.clone();
    let b = thread::spawn(move || join(&other, "b", &LANE, to_a, from_a));
    let mut a = join(&net, "a", &LANE, to_b, from_b);
    let b = b.join().unwrap();
    for round in 0..40 {
        a.push_quietly(round);
    }
    let mut refused = 0;
    while !idle.arm().unwrap() {
        refused += 1;
    }
    assert!(refused > 0);
    assert_eq!(net.next_event(), None);
    assert_eq!(b.memory.bytes(0, SIZE), [39; SIZE]);
}
