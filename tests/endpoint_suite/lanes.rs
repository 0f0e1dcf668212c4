//! Lanes that are lost in the middle of a push, while the control connection stays.

use std::{
    net::{Shutdown, SocketAddr, TcpStream},
    os::fd::{FromRawFd, OwnedFd},
};

use kvpush::{
    Endpoint,
    endpoint::telemetry::{EventKind, RailStats},
};

use crate::{
    fixture::{Cache, Fabric, LONG},
    mover,
    transfers::plain,
};

/// Ends all connections of this process to the host of `control`, but for those to its port. Returns how many.
fn end_data_connections(control: SocketAddr) -> usize {
    let own = std::fs::read_dir("/proc/self/fd").expect("procfs");
    let fds: Vec<i32> = own
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect();
    let mut ended = 0;
    for fd in fds {
        // SAFETY: no memory is involved, and the number may be anybody's: what it is of is looked at below, by way of a
        // descriptor of our own.
        let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 0) };
        if copy < 0 {
            // It has been closed since.
            continue;
        }
        // SAFETY: fcntl(2) has just made `copy`, and nobody else knows it.
        let socket = TcpStream::from(unsafe { OwnedFd::from_raw_fd(copy) });
        // Fails for everything that is no connected socket.
        let peer = socket.peer_addr();
        if peer.is_ok_and(|peer| peer.ip() == control.ip() && peer.port() != control.port()) {
            socket.shutdown(Shutdown::Both).expect("a connection");
            ended += 1;
        }
    }
    ended
}

fn rail(endpoint: &Endpoint) -> RailStats {
    let stats = endpoint.stats();
    let rails = stats.peers.iter().flat_map(|peer| &peer.rails);
    rails
        .max_by_key(|rail| rail.lane_renewals)
        .expect("a rail")
        .clone()
}

/// What was lost on the way is sent again, and both the counters and the flight record tell.
pub(crate) fn a_push_survives_the_loss_of_its_lanes(fabric: &Fabric) {
    let prefill = fabric.endpoint("prefill");
    let decode = fabric.alone("decode");
    let layout = plain(8, 256);
    let source = Cache::filled(&prefill, &layout, 3);
    let destination = Cache::poisoned(&decode, &layout);
    let pages: Vec<u32> = (0..256).collect();
    let arrival = destination.pool.grant("x", &pages, LONG).unwrap();
    let push = prefill
        .push_blocking(&source.pool, arrival.grant().clone(), LONG)
        .unwrap();
    let mut lost = 0;
    for layer in 0..8 {
        push.layer(layer, &pages).unwrap();
        if layer == 2 || layer == 5 {
            lost += match fabric.net() {
                Some(net) => {
                    let lanes = net.lanes_of("prefill").into_iter();
                    lanes.filter(|&lane| net.fail_lane("prefill", lane)).count()
                }
                None => end_data_connections(decode.local_address()),
            };
        }
    }
    assert!(lost > 0, "no lane was found");
    let report = push.finish_blocking("end", LONG).expect("no hang");
    let report = report.expect("the push goes on over new lanes");
    let end = arrival.complete_blocking(LONG).expect("no hang");
    assert_eq!(end.expect("complete"), "end");
    mover::assert_same(&destination.bytes(), &source.bytes());
    let all: usize = source.bytes().iter().map(Vec::len).sum();
    assert_eq!(report.bytes, all as u64, "each byte is counted once");
    let rail = rail(&prefill);
    assert!(rail.lane_failures > 0 && rail.lane_renewals > 0, "{rail:?}");
    let record = prefill.flight_record();
    for kind in [EventKind::LaneDown, EventKind::LaneRenewed] {
        let mut events = record.events().iter();
        assert!(events.any(|event| event.kind == kind), "{kind:?}");
    }
}
