//! Settings of the verbs fabric.

/// Settings of the verbs fabric. The defaults suit a lossless RoCE v2 network and InfiniBand alike.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VerbsConfig {
    /// The GRH traffic class: DSCP in the upper six bits, ECN below (RoCE v2 annex A17). PFC and DCQCN are configured
    /// for one DSCP, so this must match the switches.
    pub traffic_class: u8,
    /// The InfiniBand service level, or the Ethernet priority where the driver derives it from here.
    pub service_level: u8,
    /// Time until an unacknowledged packet is sent again: 4.096 µs · 2^timeout, 1 to 31.
    pub timeout: u8,
    /// Retransmissions before a queue pair fails, 0 to 7.
    pub retry_count: u8,
    /// Retries when the peer has no receive posted; 7 means for ever.
    pub rnr_retry: u8,
    /// Largest path MTU in bytes to negotiate; the active MTU of either port lowers it.
    pub max_mtu: u32,
    /// Take this GID index instead of the first suitable RoCE v2 GID.
    pub gid_index: Option<u8>,
    /// Use shared receive queues where the device has them.
    pub shared_receive_queue: bool,
}

impl Default for VerbsConfig {
    fn default() -> Self {
        Self {
            traffic_class: 0,
            service_level: 0,
            timeout: 14,
            retry_count: 7,
            rnr_retry: 7,
            max_mtu: 4096,
            gid_index: None,
            shared_receive_queue: true,
        }
    }
}
