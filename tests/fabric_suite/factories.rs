//! How each fabric makes a pair of devices that reach each other. The place to add a fabric.

use std::{
    net::{IpAddr, Ipv4Addr},
    time::Duration,
};

use kvpush::fabric::{
    Device,
    shm::{ShmConfig, ShmDevice},
    sim::SimNet,
    tcp::{TcpConfig, TcpDevice},
    verbs::{VerbsConfig, VerbsDevice},
};

use crate::harness::Pair;

/// Two simulated devices whose time runs by itself.
pub(crate) fn sim_pair() -> Pair {
    let net = SimNet::free_running(crate::harness::seed());
    let host = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
    Pair::new(net.device("sim-a"), net.device("sim-b"), host, host)
}

/// Two TCP devices on loopback.
pub(crate) fn tcp_pair() -> Pair {
    tcp(TcpConfig::default())
}

/// The same with socket buffers that are a fraction of a train, so that nearly every call is cut short. (Smaller than
/// loopback's segments they would only exercise the kernel's silly-window timers.)
pub(crate) fn tcp_pair_with_small_buffers() -> Pair {
    tcp(TcpConfig {
        send_buffer: 48 << 10,
        receive_buffer: 160 << 10,
        ..TcpConfig::default()
    })
}

fn tcp(config: TcpConfig) -> Pair {
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
}

/// Two devices of shared memory whose pages are in files, which the peer maps.
pub(crate) fn shm_pair() -> Pair {
    let mut pair = shm(ShmConfig {
        read_process_memory: false,
        ..ShmConfig::default()
    });
    pair.a.files = true;
    pair.b.files = true;
    pair
}

/// The same with pages that the kernel copies from process to process.
pub(crate) fn shm_pair_without_files() -> Pair {
    shm(ShmConfig::default())
}

/// The same with so short turns that nearly every message takes several.
pub(crate) fn shm_pair_with_short_turns() -> Pair {
    shm(ShmConfig {
        slice: 1500,
        ..ShmConfig::default()
    })
}

fn shm(config: ShmConfig) -> Pair {
    let host = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let open = |name: &str| {
        ShmDevice::open(ShmConfig {
            name: name.into(),
            rnr_timeout: Duration::from_secs(30),
            ..config.clone()
        })
        .expect("open a shm device")
    };
    Pair::new(open("shm-a"), open("shm-b"), host, host)
}

/// Two ports of the machine, or the same one twice if there is only one.
pub(crate) fn verbs_pair() -> Pair {
    verbs(patient())
}

/// The same with a receive queue for each lane.
pub(crate) fn verbs_pair_without_srq() -> Pair {
    verbs(VerbsConfig {
        shared_receive_queue: false,
        ..patient()
    })
}

/// An emulated host often takes longer to acknowledge than the 67 ms that suit real ones; this is 0.54 s.
fn patient() -> VerbsConfig {
    VerbsConfig {
        timeout: 17,
        ..VerbsConfig::default()
    }
}

fn verbs(config: VerbsConfig) -> Pair {
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
}
