//! Who meets whom: what cannot share memory is refused at once, with the reason.

use super::{
    super::{ShmConfig, ShmDevice, wire::Address},
    HOST, LANE, Victim,
};
use crate::fabric::{Access, Device as _, FabricErrorKind, LaneAddress};

fn offered(change: impl FnOnce(&mut Address)) -> (LaneAddress, std::sync::Arc<ShmDevice>) {
    let device = ShmDevice::open(ShmConfig::default()).expect("open");
    let mut address = device.address([1; 16]);
    change(&mut address);
    (address.encode().expect("short"), device)
}

#[track_caller]
fn refused(config: ShmConfig, address: &LaneAddress) -> String {
    let mut victim = Victim::new(config);
    let (lane, _) = victim.context.create_lane(&LANE).expect("lane");
    let error = victim
        .context
        .connect_lane(lane, address, HOST, false)
        .expect_err("no memory to share");
    assert!(
        matches!(error.kind, FabricErrorKind::Unavailable(_)),
        "{error}"
    );
    assert!(error.hint.is_some(), "{error}");
    victim.context.destroy_lane(lane).expect("destroy");
    error.to_string()
}

#[test]
fn another_host_is_refused() {
    let (address, _device) = offered(|address| address.host.boot[0] ^= 1);
    let text = refused(ShmConfig::default(), &address);
    assert!(text.contains("another host"), "{text}");
}

#[test]
fn another_network_namespace_is_refused() {
    let (address, _device) = offered(|address| {
        address.listener[0] ^= 1;
        address.host.net_namespace = 1.into();
    });
    let text = refused(ShmConfig::default(), &address);
    assert!(text.contains("network namespace"), "{text}");
}

/// The socket is right, but the process behind it has not what the address says: it is another one.
#[test]
fn another_process_is_refused() {
    let (address, device) = offered(|address| address.beacon[0] ^= 1);
    // SAFETY: never accessed: no lane comes to life.
    unsafe { device.register(1 << 20, 4096, Access::LOCAL) }.expect("register");
    let with_memory = {
        let mut address = Address::decode(&address).expect("an address");
        let beacon = address.beacon;
        address = device.address([1; 16]);
        address.beacon = beacon;
        address.encode().expect("short")
    };
    let text = refused(ShmConfig::default(), &with_memory);
    assert!(text.contains("another process"), "{text}");
}

#[test]
fn memory_that_cannot_be_read_is_refused_unless_it_is_in_files() {
    let config = || ShmConfig {
        read_process_memory: false,
        ..ShmConfig::default()
    };
    let (address, device) = offered(|_| {});
    let mut victim = Victim::new(config());
    let (lane, _) = victim.context.create_lane(&LANE).expect("lane");
    victim
        .context
        .connect_lane(lane, &address, HOST, false)
        .expect("nothing but files so far");
    // SAFETY: never accessed: no lane comes to life.
    unsafe { device.register(1 << 20, 4096, Access::LOCAL) }.expect("register");
    let address = device.address([1; 16]).encode().expect("short");
    let text = refused(config(), &address);
    assert!(text.contains("cannot be read"), "{text}");
}

#[test]
fn malformed_addresses_are_refused() {
    let mut victim = Victim::new(ShmConfig::default());
    let (lane, own) = victim.context.create_lane(&LANE).expect("lane");
    let good = own.as_bytes().to_vec();
    assert!(good.len() <= LaneAddress::MAX);
    let mut cases: Vec<Vec<u8>> = (0..good.len()).map(|n| good[..n].to_vec()).collect();
    for at in 0..4 {
        let mut bad = good.clone();
        bad[at] = 0x77;
        cases.push(bad);
    }
    for bad in cases.into_iter().filter_map(LaneAddress::new) {
        let error = victim.context.connect_lane(lane, &bad, HOST, true);
        let error = error.expect_err("malformed");
        assert!(
            matches!(error.kind, FabricErrorKind::BadAddress(_)),
            "{error}"
        );
    }
}

#[test]
fn only_this_host_may_be_reached() {
    let device = ShmDevice::open(ShmConfig::default()).expect("open");
    for local in ["127.0.0.1", "127.0.1.9"] {
        assert!(device.may_reach(local.parse().unwrap()), "{local}");
    }
    // Addresses for documentation (RFC 5737) belong to nobody.
    for far in ["192.0.2.1", "203.0.113.7"] {
        assert!(!device.may_reach(far.parse().unwrap()), "{far}");
    }
}
