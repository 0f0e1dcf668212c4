//! A thousand sessions come and go, and nothing of them stays: descriptors, threads, mappings, lanes, and what the
//! endpoints remember. Alone in its process, and one case at a time, because it counts what the process has.

// Shared with the endpoint suite, which uses more of it.
#[allow(dead_code)]
#[path = "endpoint_suite/fixture.rs"]
mod fixture;

use std::{fs, process::Command, sync::Mutex, time::Duration};

use fixture::{Cache, Fabric, LONG, eventually};
use kvpush::{
    Endpoint,
    endpoint::{Builder, Levels},
    kv::{Dtype, HeadRange, KvLayout, presets::KvShape},
};

/// One case at a time.
static ALONE: Mutex<()> = Mutex::new(());

/// Short enough that what waits for a time is gone soon, long enough that no push fails because of it.
fn builder(fabric: &Fabric, name: &str) -> Builder {
    fabric
        .builder(name)
        .keepalive(Duration::from_millis(500), Duration::from_secs(20))
        .max_transfers(16)
}

fn layout() -> KvLayout {
    let shape = KvShape {
        layers: 2,
        tokens_per_page: 4,
        heads: HeadRange::new(0, 1),
        head_dim: 32,
        dtype: Dtype::Bf16,
    };
    shape.vllm_flash(8).unwrap()
}

/// What the process has.
#[derive(Clone, Debug)]
struct Census {
    descriptors: usize,
    threads: usize,
    mappings: usize,
    /// Resident memory in KiB.
    resident: usize,
    /// Queue pairs and memory regions that the kernel knows, if it can be asked.
    objects: Option<(usize, usize)>,
}

impl Census {
    fn take(verbs: bool) -> Self {
        let count = |of: &str| fs::read_dir(of).expect("procfs").count();
        let text = |of: &str| fs::read_to_string(of).expect("procfs");
        let status = text("/proc/self/status");
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let resident = resident.and_then(|value| value.split_whitespace().next());
        Self {
            descriptors: count("/proc/self/fd"),
            threads: count("/proc/self/task"),
            mappings: text("/proc/self/maps").lines().count(),
            resident: resident.expect("VmRSS").parse().expect("a number"),
            objects: verbs.then(objects).flatten(),
        }
    }

    /// Nothing has been left by `cycles` cycles since `before`: far less than one of anything for each.
    #[track_caller]
    fn assert_no_more_than(&self, before: &Self, cycles: usize) {
        let slack = cycles / 20;
        let grown = |now: usize, then: usize| now > then + slack;
        assert!(
            self.descriptors <= before.descriptors + 2
                && self.threads <= before.threads
                && !grown(self.mappings, before.mappings)
                // 8 KiB for each cycle would be one forgotten session with its slots and lanes.
                && !grown(self.resident / 8, before.resident / 8 + 512)
                && self.objects == before.objects,
            "after {cycles} cycles {self:?}, before {before:?}"
        );
    }
}

/// Queue pairs and memory regions of all devices, as iproute2's `rdma` tells them.
fn objects() -> Option<(usize, usize)> {
    let output = Command::new("rdma").args(["resource", "show"]).output();
    let text = match output {
        Ok(output) if output.status.success() => {
            String::from_utf8_lossy(&output.stdout).into_owned()
        }
        other => {
            println!("queue pairs and regions are not counted: {other:?}");
            return None;
        }
    };
    let sum = |what: &str| {
        let mut words = text.split_whitespace();
        let mut sum = 0;
        while let Some(word) = words.next() {
            if word == what {
                sum += words.next()?.parse::<usize>().ok()?;
            }
        }
        Some(sum)
    };
    Some((sum("qp")?, sum("mr")?))
}

/// One push from beginning to end, over whatever session there is.
fn push(prefill: &Endpoint, source: &Cache, destination: &Cache) {
    let deadline = Duration::from_secs(5);
    let arrival = destination.pool.grant("x", &[1, 2], deadline).unwrap();
    let push = prefill
        .push_blocking(&source.pool, arrival.grant().clone(), LONG)
        .unwrap();
    for layer in 0..2 {
        push.layer(layer, &[1, 2]).unwrap();
    }
    push.finish_blocking("end", LONG).unwrap().unwrap();
    arrival.complete_blocking(LONG).unwrap().unwrap();
}

/// Waits until `endpoint` has none of what belongs to a session or a transfer, timers included.
#[track_caller]
fn assert_empty(endpoint: &Endpoint) {
    eventually("everything of the sessions is gone", || {
        let Levels {
            sessions,
            lanes,
            pushes,
            arrivals,
            accesses,
            timers,
            ..
        } = endpoint.stats().levels;
        (sessions, lanes, pushes, arrivals, accesses, timers) == (0, 0, 0, 0, 0, 0)
    });
}

/// Sessions that either side ends, and the other endpoint with it every now and then.
fn cycles(fabric: &Fabric, count: usize, verbs: bool) {
    let alone = ALONE.lock();
    let decode = builder(fabric, "decode").bind("127.0.0.1:0").unwrap();
    let destination = Cache::poisoned(&decode, &layout());
    let prefill = builder(fabric, "prefill").bind("127.0.0.1:0").unwrap();
    let source = Cache::filled(&prefill, &layout(), 1);
    let settle = || {
        assert_empty(&prefill);
        assert_empty(&decode);
    };
    let cycle = |number: usize| {
        push(&prefill, &source, &destination);
        match number % 2 {
            0 => prefill.disconnect(decode.incarnation()),
            _ => decode.disconnect(prefill.incarnation()),
        }
        // The other side has to learn of it, or its next push would use what is gone.
        eventually("the session is gone", || {
            prefill.stats().levels.sessions + decode.stats().levels.sessions == 0
        });
        if number % 100 == 29 {
            let fresh = builder(fabric, "fresh").bind("127.0.0.1:0").unwrap();
            let source = Cache::filled(&fresh, &layout(), 1);
            push(&fresh, &source, &destination);
            fresh.shutdown();
        }
    };
    (0..30).for_each(cycle);
    settle();
    let before = Census::take(verbs);
    println!("{before:?}");
    (0..count).for_each(cycle);
    settle();
    let after = Census::take(verbs);
    println!("{after:?}");
    after.assert_no_more_than(&before, count);
    let sessions: u64 = decode.stats().peers.iter().map(|peer| peer.sessions).sum();
    assert!(sessions as usize >= count, "{sessions} sessions");

    // What it must notice.
    let files: Vec<_> = (0..3)
        .map(|_| fs::File::open("/dev/null").unwrap())
        .collect();
    let leaking = Census::take(verbs);
    drop(files);
    let found = std::panic::catch_unwind(|| leaking.assert_no_more_than(&before, count));
    assert!(found.is_err(), "the census overlooks descriptors");
    drop(alone);
}

#[test]
fn a_thousand_sessions_over_tcp() {
    cycles(&Fabric::tcp(), 1000, false);
}

#[test]
fn a_thousand_sessions_over_the_simulation() {
    cycles(&Fabric::sim(), 1000, false);
}

/// Fewer, because an emulated guest takes its time for each.
#[test]
#[ignore = "needs an RDMA device: cargo xtask rxe"]
fn sessions_over_verbs() {
    cycles(&Fabric::verbs(), 200, true);
}
