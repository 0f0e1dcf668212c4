//! A control path that goes silent without a word: no FIN, no reset, as when a host loses its power or its link. Data
//! lanes may go on meanwhile.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use kvpush::endpoint::{ArrivalError, PeerError, PushError};

use crate::{
    fixture::{Cache, Fabric, LONG, eventually},
    transfers::{plain, push},
};

const INTERVAL: Duration = Duration::from_millis(150);
const TIMEOUT: Duration = Duration::from_millis(900);

/// Carries connections to another address, until it stops doing so and keeps them open all the same.
struct Wire {
    address: SocketAddr,
    cut: Arc<AtomicBool>,
}

impl Wire {
    fn new(to: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        let cut = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&cut);
        // These threads end with the process.
        thread::spawn(move || {
            for near in listener.incoming().map_while(Result::ok) {
                let Ok(far) = TcpStream::connect(to) else {
                    return;
                };
                for (mut from, mut into) in [(&near, &far), (&far, &near)].map(|(from, into)| {
                    let clone = |socket: &TcpStream| socket.try_clone().expect("a descriptor");
                    (clone(from), clone(into))
                }) {
                    let cut = Arc::clone(&flag);
                    thread::spawn(move || {
                        let mut buffer = [0; 4096];
                        loop {
                            let count = from.read(&mut buffer).unwrap_or(0);
                            while cut.load(Ordering::Relaxed) {
                                thread::sleep(Duration::from_millis(5));
                            }
                            if count == 0 || into.write_all(&buffer[..count]).is_err() {
                                return;
                            }
                        }
                    });
                }
            }
        });
        Self { address, cut }
    }
}

/// Both sides find out by themselves, and both are fenced; the grant's deadline is far away.
pub(crate) fn a_peer_vanishes(fabric: &Fabric) {
    let builder = |name| fabric.builder(name).keepalive(INTERVAL, TIMEOUT);
    let prefill = builder("prefill").bind("127.0.0.1:0").unwrap();
    // The address it tells is that of the wire, which is known only when its own is.
    let port = TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr());
    let own = port.expect("a port");
    let wire = Wire::new(own);
    let decode = builder("decode")
        .advertise([wire.address.to_string()])
        .bind(own)
        .unwrap();
    let layout = plain(2, 8);
    let source = Cache::filled(&prefill, &layout, 1);
    let destination = Cache::poisoned(&decode, &layout);
    let arrival = destination.pool.grant("first", &[1, 2], LONG).unwrap();
    push(&prefill, &source, &arrival, &[1, 2], b"");
    arrival.complete_blocking(LONG).unwrap().unwrap();

    // Idle for several timeouts: it lives.
    let arrival = destination.pool.grant("second", &[1, 2], LONG).unwrap();
    let push = prefill
        .push_blocking(&source.pool, arrival.grant().clone(), LONG)
        .unwrap();
    thread::sleep(TIMEOUT * 3);
    assert_eq!(arrival.poll_complete(), None, "the peer was there");
    assert_eq!(push.poll_ended(), None, "the peer was there");

    wire.cut.store(true, Ordering::Relaxed);
    let begun = Instant::now();
    let end = arrival.complete_blocking(LONG).expect("no hang");
    assert!(
        matches!(end, Err(ArrivalError::Peer(PeerError::Silent { waited, .. })) if waited == TIMEOUT)
            || matches!(end, Err(ArrivalError::Peer(PeerError::Lane { .. }))),
        "{end:?}"
    );
    let end = push.ended_blocking(LONG).expect("no hang");
    assert!(
        matches!(
            end,
            Err(PushError::Peer(
                PeerError::Silent { .. } | PeerError::Lane { .. }
            ))
        ),
        "{end:?}"
    );
    let waited = begun.elapsed();
    assert!(waited > TIMEOUT - INTERVAL * 2, "too soon: {waited:?}");
    eventually("the pages are free", || {
        destination.pool.granted_pages() == 0
    });
}
