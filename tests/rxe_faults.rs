//! Faults of a real network: whole endpoints over soft-RoCE while packets are lost, late or out of order, links go down,
//! packets become too long, and a device disappears. Each push ends by its deadline: whole and byte-exact, or with a
//! typed error on both sides, and then nothing changes any more.
//!
//! The guests of `cargo xtask rxe` have two RDMA devices on the two ends of a virtual cable. Each case changes that
//! cable with `tc`, `ip` or `rdma`, and puts it right again. It says what came of it in a line `FAULT {…}`, which
//! `docs/reliability.md` quotes. All cases are marked as ignored: `cargo xtask rxe` runs them, one at a time.

#[allow(dead_code)]
#[path = "endpoint_suite/fixture.rs"]
mod fixture;
#[allow(dead_code)]
#[path = "endpoint_suite/mover.rs"]
mod mover;

use std::{
    process::Command,
    time::{Duration, Instant},
};

use fixture::{Cache, Fabric, POISON, eventually};
use kvpush::{
    Arrival, Endpoint, Push,
    kv::{Dtype, HeadRange, KvLayout, presets::KvShape},
};

const LAYERS: usize = 16;
const PAGES: u32 = 16;
const HEADS: HeadRange = HeadRange::new(0, 8);
/// From the grant on. What an emulated host needs for the slowest case, and more.
const DEADLINE: Duration = Duration::from_secs(40);
/// How long after its deadline an arrival may end: the grace of the fixture, and time for a slow host.
const LATE: Duration = Duration::from_secs(15);

fn layout() -> KvLayout {
    let shape = KvShape {
        layers: LAYERS as u32,
        tokens_per_page: 4,
        heads: HEADS,
        head_dim: 128,
        dtype: Dtype::Bf16,
    };
    shape.vllm_flash(PAGES).unwrap()
}

/// Runs one command of the guest; it must succeed.
fn shell(line: &str) {
    let status = Command::new("sh").args(["-c", line]).status();
    assert!(status.expect("sh").success(), "{line}");
}

/// Puts the cable right again, whatever the test does.
struct Undo(&'static str);

impl Drop for Undo {
    fn drop(&mut self) {
        // The fault may have undone itself.
        let _ = Command::new("sh").args(["-c", self.0]).status();
    }
}

/// Two endpoints and one push between them, of which some layers have been handed over.
struct Rig {
    _prefill: Endpoint,
    _decode: Endpoint,
    source: Cache,
    destination: Cache,
    pages: Vec<u32>,
    arrival: Arrival,
    push: Push,
    begun: Instant,
}

impl Rig {
    /// The writer on `from`, the reader on `to`.
    fn new(from: &[&str], to: &[&str]) -> Self {
        let fabric = Fabric::verbs();
        let start = |name: &str, devices: &[&str]| {
            let devices = devices.iter().map(|device| (*device).to_owned());
            let builder = fabric.builder(name).devices(devices);
            builder.bind("127.0.0.1:0").expect("an endpoint")
        };
        let (prefill, decode) = (start("prefill", from), start("decode", to));
        assert_eq!(prefill.rails().count(), from.len(), "the rails wanted");
        let source = Cache::filled(&prefill, &layout(), 11);
        let destination = Cache::poisoned(&decode, &layout());
        let pages: Vec<u32> = (0..PAGES).collect();
        let begun = Instant::now();
        let arrival = destination.pool.grant("fault", &pages, DEADLINE).unwrap();
        let grant = arrival.grant().clone();
        let push = prefill.push_blocking(&source.pool, grant, DEADLINE);
        let push = push.expect("open before the fault");
        Self {
            _prefill: prefill,
            _decode: decode,
            source,
            destination,
            pages,
            arrival,
            push,
            begun,
        }
    }

    fn layers(&self, layers: std::ops::Range<usize>) {
        for layer in layers {
            // After a failure the end says why.
            if self.push.layer(layer, &self.pages).is_err() {
                return;
            }
        }
    }

    /// Waits for both ends, and says what came of `fault`. Returns whether everything arrived.
    fn end(self, fault: &str, since: Instant) -> bool {
        // If it has failed meanwhile, that is its end.
        drop(self.push.start_finish("end"));
        let left = || (DEADLINE + LATE).saturating_sub(self.begun.elapsed());
        let arrived = self.arrival.complete_blocking(left());
        let arrived = arrived.expect("an arrival ends by its deadline");
        let arrival_ms = since.elapsed().as_millis();
        // It may not hear of the reader's end before its own deadline.
        let pushed = self.push.ended_blocking(left());
        let pushed = pushed.expect("a push ends by its deadline");
        let push_ms = since.elapsed().as_millis();
        let say = |end: Option<String>| end.unwrap_or_else(|| "completed".to_owned());
        let arrival = say(arrived.as_ref().err().map(ToString::to_string));
        let push = say(pushed.as_ref().err().map(ToString::to_string));
        println!(
            "FAULT {{\"fault\": {fault:?}, \"arrival\": {arrival:?}, \"arrival_ms\": {arrival_ms}, \
             \"push\": {push:?}, \"push_ms\": {push_ms}}}"
        );
        let bytes = self.destination.bytes();
        match &arrived {
            Ok(tail) => {
                assert_eq!(tail, "end");
                let pairs: Vec<_> = self.pages.iter().map(|&page| (page, page)).collect();
                let mut expected = bytes.clone();
                expected.iter_mut().for_each(|region| region.fill(POISON));
                let (from, to) = (&self.source, &self.destination);
                mover::copy(
                    (&from.layout, &from.bytes()),
                    (&to.layout, &mut expected),
                    &pairs,
                    HEADS,
                );
                mover::assert_same(&bytes, &expected);
            }
            Err(_) => {
                assert_eq!(self.destination.pool.granted_pages(), 0, "given back");
                std::thread::sleep(Duration::from_secs(2));
                mover::assert_same(&self.destination.bytes(), &bytes);
            }
        }
        arrived.is_ok()
    }
}

/// A push of which a quarter is handed over before the fault, and the rest after it.
fn under(fault: &str, on: &str, undo: &'static str) -> bool {
    let rig = Rig::new(&["rxe0"], &["rxe1"]);
    rig.layers(0..LAYERS / 4);
    let _undo = Undo(undo);
    shell(on);
    let since = Instant::now();
    rig.layers(LAYERS / 4..LAYERS);
    rig.end(fault, since)
}

const NO_NETEM: &str = "tc qdisc del dev veth0 root; tc qdisc del dev veth1 root; true";

fn netem(fault: &str, how: &str) -> bool {
    let on = format!(
        "tc qdisc add dev veth0 root netem {how} && tc qdisc add dev veth1 root netem {how}"
    );
    under(fault, &on, NO_NETEM)
}

#[test]
#[ignore = "needs the cable of a guest: cargo xtask rxe"]
fn one_packet_of_a_hundred_is_lost() {
    assert!(netem("loss 1 %", "loss 1%"), "the device repairs it");
}

#[test]
#[ignore = "needs the cable of a guest: cargo xtask rxe"]
fn one_packet_of_ten_is_lost() {
    // Whether it gets through in time is the device's matter.
    netem("loss 10 %", "loss 10%");
}

#[test]
#[ignore = "needs the cable of a guest: cargo xtask rxe"]
fn packets_are_late() {
    assert!(netem("delay 20 ms", "delay 20ms"), "late is not lost");
}

#[test]
#[ignore = "needs the cable of a guest: cargo xtask rxe"]
fn packets_change_their_order() {
    netem("reorder 5 %", "delay 2ms reorder 95%");
}

#[test]
#[ignore = "needs the cable of a guest: cargo xtask rxe"]
fn a_link_is_down_for_five_seconds() {
    let rig = Rig::new(&["rxe0"], &["rxe1"]);
    rig.layers(0..LAYERS / 4);
    let since = Instant::now();
    {
        let _undo = Undo("ip link set veth1 up");
        shell("ip link set veth1 down");
        rig.layers(LAYERS / 4..LAYERS);
        std::thread::sleep(Duration::from_secs(5));
    }
    rig.end("link down 5 s", since);
}

/// A second cable with a device at each end, on which `rxe2` and `rxe3` are the second rails of either side.
const SECOND_CABLE: &str = "set -e
ip link add veth2 type veth peer name veth3
for i in 2 3; do
    ip link set veth$i mtu 4200
    ip address add 10.79.0.$((i + 1))/24 dev veth$i
    ip link set veth$i up
    echo 1 >/proc/sys/net/ipv4/conf/veth$i/accept_local
    echo 0 >/proc/sys/net/ipv4/conf/veth$i/rp_filter
    echo 1 >/proc/sys/net/ipv4/conf/veth$i/arp_ignore
    rdma link add rxe$i type rxe netdev veth$i
done";

/// Deleting a device of rxe waits for its users, so the rail is taken away as a pulled cable is.
#[test]
#[ignore = "needs the cable of a guest: cargo xtask rxe"]
fn one_of_two_rails_is_removed() {
    shell(SECOND_CABLE);
    let _undo = Undo("rdma link delete rxe2; rdma link delete rxe3; ip link delete veth2");
    // Its GIDs come with its addresses, a moment later.
    eventually("the second cable's devices are up", || {
        let show = Command::new("rdma")
            .args(["link", "show"])
            .output()
            .expect("rdma");
        let text = String::from_utf8_lossy(&show.stdout).into_owned();
        let up = |name: &str| {
            text.lines()
                .any(|l| l.contains(name) && l.contains("ACTIVE"))
        };
        up("rxe2/1") && up("rxe3/1")
    });
    std::thread::sleep(Duration::from_secs(2));
    let rig = Rig::new(&["rxe0", "rxe2"], &["rxe1", "rxe3"]);
    rig.layers(0..LAYERS / 4);
    let since = Instant::now();
    shell("ip link set veth2 down");
    rig.layers(LAYERS / 4..LAYERS);
    let whole = rig.end("one of two rails removed", since);
    assert!(whole, "the other rail carries it");
}
