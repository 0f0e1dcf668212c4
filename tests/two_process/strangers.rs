//! Processes that do not belong here: with another key, or with nothing to say.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use crate::{
    content::{self, LARGE_LAYERS, LARGE_PAGES, large},
    fixture::{LONG, Random, seed},
    process::{Over, Peer, list},
};

const SEED: u64 = 41;

pub(crate) fn another_key(over: Over) {
    let mut decode = Peer::start(over, "decode");
    decode.tell("pool 4 16 0");
    let (arrival, grant) = decode.grant(&[1, 2, 3], LONG);
    let mut stranger = Peer::spawn(over);
    stranger.tell("stranger 127.0.0.1:0");
    stranger.tell(format!("pool 4 16 {SEED}"));
    for _ in 0..3 {
        let refused = stranger.open(&grant).expect_err("another key");
        assert!(refused.starts_with("peer control: "), "{refused}");
    }
    assert_eq!(decode.get::<usize>("changed"), 0, "a stranger wrote");
    // The grant is as good as new for the one it was meant for.
    let mut prefill = Peer::start(over, "prefill");
    prefill.tell(format!("pool 4 16 {SEED}"));
    let push = prefill.open(&grant).expect("open");
    prefill.tell(format!("stream {push} 0 4,5,6"));
    prefill.tell(format!("finish {push} end"));
    assert_eq!(decode.get::<String>(format!("arrived {arrival}")), "end");
    decode.tell(format!("check {SEED} 4,5,6 1,2,3"));
    let wrong = decode.ask(format!("check {SEED} 4,5,6 1,2,4"));
    wrong.expect_err("the checker can fail");
}

/// The ports that a process listens on: of the control channel, and of lanes over TCP.
fn listening(peer: &Peer) -> Vec<SocketAddr> {
    let sockets: Vec<String> = std::fs::read_dir(format!("/proc/{}/fd", peer.id()))
        .expect("procfs")
        .filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok())
        .filter_map(|target| {
            let inode = target
                .to_str()?
                .strip_prefix("socket:[")?
                .strip_suffix(']')?;
            Some(inode.to_owned())
        })
        .collect();
    let table = std::fs::read_to_string("/proc/net/tcp").expect("procfs");
    let ports: Vec<SocketAddr> = table
        .lines()
        .filter_map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            let (local, state, inode) = (words.get(1)?, words.get(3)?, words.get(9)?);
            let listens = *state == "0A" && sockets.iter().any(|socket| socket == inode);
            let port = u16::from_str_radix(local.split_once(':')?.1, 16).ok()?;
            listens.then_some(SocketAddr::from(([127, 0, 0, 1], port)))
        })
        .collect();
    assert!(ports.contains(&peer.address), "{ports:?}");
    ports
}

/// Strangers call on every port all the time, and pushes go on as if they did not.
pub(crate) fn garbage_and_silence(over: Over) {
    let mut random = Random(seed());
    let prefill = over.builder("prefill").bind("127.0.0.1:0").unwrap();
    let source = content::filled(&prefill, &large(), SEED);
    let mut decode = Peer::start(over, "decode");
    decode.tell(format!("pool {LARGE_LAYERS} {LARGE_PAGES} 0"));
    let ports = listening(&decode);
    if matches!(over, Over::Tcp) {
        assert!(ports.len() > 1, "lanes have a port of their own: {ports:?}");
    }
    let pages: Vec<u32> = (0..LARGE_PAGES).collect();
    let all = list(&pages);
    let mut silent = Vec::new();
    for round in 0..4 {
        decode.tell("poison");
        let (arrival, grant) = decode.grant(&pages, LONG);
        // Some are there before the session is made, and more come while it is used.
        let mut call = |calls: usize| {
            for _ in 0..calls {
                let mut stranger =
                    TcpStream::connect(random.pick(&ports)).expect("the port is open to all");
                stranger.set_nonblocking(true).unwrap();
                let length = random.pick(&[0, 1, 2, 4, 7, 48, 64, 500, 5000]);
                let mut bytes: Vec<u8> = (0..length).map(|_| random.next() as u8).collect();
                if random.below(3) == 0 {
                    // Lengths that are short, or that promise much.
                    let fill = random.pick(&[0x00, 0xff, 0x7f]);
                    bytes.iter_mut().take(8).for_each(|byte| *byte = fill);
                }
                // It may have hung up on us by then.
                let _ = stranger.write(&bytes);
                match random.below(3) {
                    0 => drop(stranger),
                    _ => silent.push(stranger),
                }
            }
        };
        call(100);
        let push = prefill
            .push_blocking(&source.pool, grant, LONG)
            .expect("open");
        for layer in 0..LARGE_LAYERS {
            push.layer(layer, &pages).unwrap();
            call(3);
        }
        let begun = Instant::now();
        push.finish_blocking(format!("end-{round}"), LONG)
            .expect("no hang")
            .expect("complete");
        let waited = begun.elapsed();
        assert!(waited < LONG / 2, "{waited:?}");
        assert_eq!(
            decode.get::<String>(format!("arrived {arrival}")),
            format!("end-{round}")
        );
        decode.tell(format!("check {SEED} {all} {all}"));
    }
    // Those who say nothing are hung up on, sooner or later.
    let end = Instant::now() + LONG;
    while !silent.is_empty() {
        silent.retain_mut(|stranger| {
            let mut byte = [0; 64];
            matches!(stranger.read(&mut byte), Err(error) if error.kind() == std::io::ErrorKind::WouldBlock)
        });
        assert!(
            Instant::now() < end,
            "{} strangers are still connected",
            silent.len()
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}
