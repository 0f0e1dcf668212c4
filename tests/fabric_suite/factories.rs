//! How each fabric makes a pair of devices that reach each other. The place to add a fabric.

use std::{
    net::{IpAddr, Ipv4Addr},
    time::Duration,
};

use kvpush::fabric::{
    Device, FabricKind,
    tcp::{TcpConfig, TcpDevice},
    verbs::{VerbsConfig, VerbsDevice},
};

use crate::harness::Pair;

/// Whether `kind` is to be tested in this run.
fn selected(kind: FabricKind) -> bool {
    let chosen = match std::env::var("KVPUSH_TEST_FABRIC").as_deref() {
        Err(_) => match kind {
            FabricKind::Verbs => std::env::var("KVPUSH_REQUIRE_RXE").as_deref() == Ok("1"),
            _ => true,
        },
        Ok("tcp") => kind == FabricKind::Tcp,
        Ok("sim") => kind == FabricKind::Sim,
        Ok("verbs") => kind == FabricKind::Verbs,
        Ok(other) => panic!("KVPUSH_TEST_FABRIC={other}: know tcp, sim, verbs"),
    };
    if !chosen {
        println!("{kind}: not chosen by the environment");
    }
    chosen
}

/// Two TCP devices on loopback.
pub(crate) fn tcp_pair() -> Option<Pair> {
    tcp(TcpConfig::default())
}

/// The same with socket buffers that are a fraction of a train, so that nearly every call is cut short. (Smaller than
/// loopback's segments they would only exercise the kernel's silly-window timers.)
pub(crate) fn tcp_pair_with_small_buffers() -> Option<Pair> {
    tcp(TcpConfig {
        send_buffer: 48 << 10,
        receive_buffer: 160 << 10,
        ..TcpConfig::default()
    })
}

fn tcp(config: TcpConfig) -> Option<Pair> {
    selected(FabricKind::Tcp).then(|| {
        let host = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let open = |name: &str| {
            TcpDevice::open(TcpConfig {
                bind: host,
                name: name.into(),
                rnr_timeout: Duration::from_secs(30),
                ..config.clone()
            })
            .expect("open a tcp device")
        };
        Pair::new(open("tcp-a"), open("tcp-b"), host, host)
    })
}

/// Two ports of the machine, or the same one twice if there is only one.
pub(crate) fn verbs_pair() -> Option<Pair> {
    verbs(VerbsConfig::default())
}

/// The same with a receive queue for each lane.
pub(crate) fn verbs_pair_without_srq() -> Option<Pair> {
    verbs(VerbsConfig {
        shared_receive_queue: false,
        ..VerbsConfig::default()
    })
}

fn verbs(config: VerbsConfig) -> Option<Pair> {
    selected(FabricKind::Verbs).then(|| {
        let (mut devices, skipped) = VerbsDevice::open_all(&config, None);
        assert!(!devices.is_empty(), "no active RDMA port: {skipped:?}");
        let a = devices.remove(0);
        let b = if devices.is_empty() {
            let info = a.info();
            VerbsDevice::open(&info.name, info.port, &config).expect("open the device again")
        } else {
            devices.remove(0)
        };
        // Verbs lane addresses are complete; no network address is needed.
        let host = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
        Pair::new(a, b, host, host)
    })
}
