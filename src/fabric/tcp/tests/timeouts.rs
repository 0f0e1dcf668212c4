//! Peers that are not there, do not answer, or have no receive.

use super::*;

const NO_KEY: RemoteKey = RemoteKey(0);

fn signals(count: u64) -> Vec<WorkRequest> {
    (1..=count)
        .map(|id| write(id, Opcode::WriteImm(id as u32), 0, NO_KEY, 0))
        .collect()
}

fn expect_lost(end: &End) {
    let wanted = [(1, Status::RetryExceeded), (2, Status::Flushed)];
    assert_eq!(end.sends(), wanted);
}

/// An address at which nothing listens.
fn closed_port() -> LaneAddress {
    let listener = std::net::TcpListener::bind((HOST, 0)).unwrap();
    encode_address(listener.local_addr().unwrap().port(), &PEER).unwrap()
}

#[test]
fn refused_connection_fails_the_lane() {
    let mut end = End::new(patient());
    let (lane, _) = end.context.create_lane(&LANE).unwrap();
    end.context
        .connect_lane(lane, &closed_port(), HOST, true)
        .unwrap();
    end.post(lane, &signals(2), &[]).unwrap();
    end.until("the failure", |end| end.sends().len() == 2);
    expect_lost(&end);
    let errno = end.done.iter().map(|c| c.vendor_error).max();
    assert_eq!(errno, Some(libc::ECONNREFUSED as u32));
}

#[test]
fn first_post_after_a_loss_learns_the_reason() {
    let mut end = End::new(patient());
    let (lane, _) = end.context.create_lane(&LANE).unwrap();
    end.context
        .connect_lane(lane, &closed_port(), HOST, true)
        .unwrap();
    end.until("flushed receives", |end| end.has_failed());
    end.post(lane, &signals(2), &[]).unwrap();
    end.until("the failure", |end| end.sends().len() == 2);
    expect_lost(&end);
}

#[test]
fn acceptor_gives_up_when_nobody_dials() {
    let mut end = End::new(impatient());
    let (lane, _) = end.awaiting();
    end.post(lane, &signals(2), &[]).unwrap();
    end.until("the failure", |end| end.sends().len() == 2);
    expect_lost(&end);
}

#[test]
fn dialler_gives_up_when_nobody_answers() {
    let deaf = std::net::TcpListener::bind((HOST, 0)).unwrap();
    let mut end = End::new(impatient());
    let (lane, _) = end.context.create_lane(&LANE).unwrap();
    let address = encode_address(deaf.local_addr().unwrap().port(), &PEER).unwrap();
    end.context
        .connect_lane(lane, &address, HOST, true)
        .unwrap();
    end.post(lane, &signals(2), &[]).unwrap();
    end.until("the failure", |end| end.sends().len() == 2);
    expect_lost(&end);
}

#[test]
fn dialler_refuses_an_impostor() {
    let listener = std::net::TcpListener::bind((HOST, 0)).unwrap();
    let mut end = End::new(patient());
    let (lane, address) = end.context.create_lane(&LANE).unwrap();
    let (_, token) = decode_address(&address).unwrap();
    let remote = encode_address(listener.local_addr().unwrap().port(), &PEER).unwrap();
    end.context.connect_lane(lane, &remote, HOST, true).unwrap();
    end.post(lane, &signals(2), &[]).unwrap();
    let mut raw = Raw(listener.accept().unwrap().0);
    let hello = end.poll_while_reading(&mut raw, Hello::BYTES);
    let hello = Hello::decode(&hello).unwrap();
    assert_eq!((hello.to, hello.from), (PEER, token));
    // It knows the dialler's token from the hello, but not the one it should have.
    raw.send(Hello::new(token, [8; 16], 4).as_bytes());
    end.until("the failure", |end| end.sends().len() == 2);
    expect_lost(&end);
}

#[test]
fn peer_without_receives_exhausts_the_retries() {
    let (mut a, mut b) = (End::new(impatient()), End::new(patient()));
    let (lane_a, at_a) = a.context.create_lane(&LANE).unwrap();
    let (lane_b, at_b) = b.context.create_lane(&LANE).unwrap();
    b.context.connect_lane(lane_b, &at_a, HOST, false).unwrap();
    a.context.connect_lane(lane_a, &at_b, HOST, true).unwrap();
    a.post(lane_a, &signals(6), &[]).unwrap();
    a.until("the failure", |a| {
        b.poll();
        a.sends().len() == 6
    });
    let mut wanted: Vec<_> = (1..=4).map(|id| (id, Status::Success)).collect();
    wanted.extend([(5, Status::RnrRetryExceeded), (6, Status::Flushed)]);
    assert_eq!(a.sends(), wanted);
}

#[test]
fn dialling_first_is_fine() {
    let (mut a, mut b) = (End::new(patient()), End::new(patient()));
    let (lane_a, at_a) = a.context.create_lane(&LANE).unwrap();
    let (lane_b, at_b) = b.context.create_lane(&LANE).unwrap();
    a.context.connect_lane(lane_a, &at_b, HOST, true).unwrap();
    a.post(lane_a, &signals(1), &[]).unwrap();
    for _ in 0..50 {
        a.poll();
        b.poll();
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(
        b.done.is_empty() && a.done.is_empty(),
        "b has not connected yet"
    );
    b.context.connect_lane(lane_b, &at_a, HOST, false).unwrap();
    a.until("the send", |a| {
        b.poll();
        a.sends() == [(1, Status::Success)]
    });
    assert_eq!(
        b.count(CompletionKind::Received { imm: 1 }, Status::Success),
        1
    );
}

#[test]
fn deadline_beyond_the_clock_is_no_deadline() {
    let mut end = End::new(TcpConfig {
        connect_timeout: Duration::MAX,
        hello_timeout: Duration::MAX,
        rnr_timeout: Duration::MAX,
        ..patient()
    });
    let (lane, _) = end.awaiting();
    end.post(lane, &signals(1), &[]).unwrap();
    end.poll();
    assert!(end.done.is_empty());
}
