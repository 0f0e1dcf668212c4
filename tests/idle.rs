//! An idle endpoint is idle: its threads sleep until something happens. Alone in its process, because it counts what
//! every thread of the library does.

use std::{collections::BTreeMap, fs, sync::Arc, thread, time::Duration};

use kvpush::{
    Auth, Endpoint,
    fabric::FabricKind,
    kv::{Dtype, HeadRange, presets::KvShape, region_lengths},
    memory::{HostMemory, Memory},
};

const LONG: Duration = Duration::from_secs(60);

/// How often each thread of the library has gone to sleep, by its number.
fn sleeps() -> BTreeMap<String, u64> {
    let tasks = fs::read_dir("/proc/self/task").expect("/proc is mounted");
    let threads = tasks.filter_map(|task| {
        let path = task.ok()?.path();
        let name = fs::read_to_string(path.join("comm")).ok()?;
        let status = fs::read_to_string(path.join("status")).ok()?;
        let line = status
            .lines()
            .find(|line| line.starts_with("voluntary_ctxt_switches"))?;
        let count = line.split_whitespace().nth(1)?.parse().ok()?;
        name.starts_with("kvpush-")
            .then(|| (path.display().to_string(), count))
    });
    threads.collect()
}

#[test]
fn an_idle_endpoint_sleeps() {
    // One after the other, because threads are counted.
    for fabric in [FabricKind::Tcp, FabricKind::Shm] {
        println!("{fabric}");
        sleeps_over(fabric);
    }
}

fn sleeps_over(fabric: FabricKind) {
    let endpoint = |name| {
        let builder = Endpoint::builder().name(name).auth(Auth::psk([1; 32]));
        builder.fabrics([fabric]).bind("127.0.0.1:0").unwrap()
    };
    let (prefill, decode) = (endpoint("prefill"), endpoint("decode"));
    let shape = KvShape {
        layers: 2,
        tokens_per_page: 16,
        heads: HeadRange::new(0, 2),
        head_dim: 64,
        dtype: Dtype::Bf16,
    };
    let layout = shape.vllm_flash(16).unwrap();
    let memory = || -> Vec<Arc<dyn Memory>> {
        let lengths = region_lengths(&layout).unwrap();
        lengths
            .into_iter()
            .map(|n| Arc::new(HostMemory::new(n).unwrap()) as Arc<dyn Memory>)
            .collect()
    };
    let source = prefill.register_pool(layout.clone(), memory()).unwrap();
    let destination = decode.register_pool(layout.clone(), memory()).unwrap();
    let round = || {
        let arrival = destination.grant("x", &[1, 2], LONG).unwrap();
        let push = prefill
            .push_blocking(&source, arrival.grant().clone(), LONG)
            .unwrap();
        push.layer(0, &[1, 2]).unwrap();
        push.layer(1, &[1, 2]).unwrap();
        push.finish_blocking("", LONG).unwrap().unwrap();
        arrival.complete_blocking(LONG).unwrap().unwrap();
    };
    round();
    // Connections stand, lanes are up, and a grant waits for its writer.
    let waiting = destination.grant("y", &[3], LONG).unwrap();
    thread::sleep(Duration::from_millis(300));
    let before = sleeps();
    assert_eq!(
        before.len(),
        4,
        "a driver and a control thread for each endpoint: {before:?}"
    );
    thread::sleep(Duration::from_millis(700));
    let after = sleeps();
    for (thread, count) in &after {
        let woken = count - before.get(thread).copied().unwrap_or(0);
        // A thread that does not sleep at all would show no switches either, but one that spins shows in none of the
        // lower bound below.
        assert!(
            woken <= 2,
            "{thread} woke {woken} times while nothing happened"
        );
    }
    let used = cpu_ticks();
    thread::sleep(Duration::from_millis(500));
    assert!(
        cpu_ticks() - used <= 5,
        "the process used {} ticks while idle",
        cpu_ticks() - used
    );
    drop(waiting);
    round();
}

/// User and system time of this process in clock ticks (`proc_pid_stat(5)`, fields 14 and 15).
fn cpu_ticks() -> u64 {
    let stat = fs::read_to_string("/proc/self/stat").expect("/proc is mounted");
    let fields = stat
        .rsplit_once(')')
        .expect("a command name")
        .1
        .split_whitespace();
    fields
        .skip(11)
        .take(2)
        .map(|field| field.parse::<u64>().expect("a number"))
        .sum()
}
