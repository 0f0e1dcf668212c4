//! How each fabric makes a pair of devices that reach each other. The place to add a fabric.

use std::{
    net::{IpAddr, Ipv4Addr},
    time::Duration,
};

use kvpush::fabric::{
    FabricKind,
    tcp::{TcpConfig, TcpDevice},
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
    selected(FabricKind::Tcp).then(|| {
        let host = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let open = |name: &str| {
            TcpDevice::open(TcpConfig {
                bind: host,
                name: name.into(),
                rnr_timeout: Duration::from_secs(30),
                ..TcpConfig::default()
            })
            .expect("open a tcp device")
        };
        Pair::new(open("tcp-a"), open("tcp-b"), host, host)
    })
}
