//! What a simulated network is like. Times are virtual nanoseconds.

use std::ops::RangeInclusive;

use crate::fabric::{Capabilities, WindowCaps};

/// The network, its devices and how they recover. Two nets of one configuration and one single-threaded harness run
/// alike, event by event.
#[derive(Clone, Debug)]
pub struct SimConfig {
    /// Seed of every choice.
    pub seed: u64,
    /// Whether [`poll`](crate::fabric::Context::poll) and [`arm`](crate::fabric::Context::arm) advance virtual time
    /// themselves (for tests with real threads). If not, nothing moves until the harness advances time.
    pub free_running: bool,
    /// One-way delay of a packet in nanoseconds, drawn for each; packets of one lane still arrive in order.
    pub latency: RangeInclusive<u64>,
    /// Speed of each device's port, unless [`set_speed`](super::SimNet::set_speed) changes it.
    pub bits_per_second: u64,
    /// Whether completions of different work queues are delivered in random order. Off, they come as they were made.
    pub reorder_completions: bool,
    /// How long a requester waits for an acknowledgement before it sends again, in nanoseconds.
    pub timeout: u64,
    /// How many times it sends again without any progress before the lane fails.
    pub retry_count: u8,
    /// How long a requester waits after "receiver not ready", in nanoseconds.
    pub rnr_timer: u64,
    /// How many times it tries again then; 7 is without end, as in `ibv_modify_qp(3)`.
    pub rnr_retry: u8,
    /// Limits of every device; [`Capabilities::mtu`] is the size of a packet.
    pub caps: Capabilities,
    /// How many of the latest events [`trace`](super::SimNet::trace) keeps.
    pub trace_capacity: usize,
}

impl SimConfig {
    /// The value of [`SimConfig::rnr_retry`] that never gives up.
    pub const RNR_FOREVER: u8 = 7;

    /// The default network with another seed.
    pub fn seeded(seed: u64) -> Self {
        Self {
            seed,
            ..Self::default()
        }
    }

    /// How long a port of that speed is busy with a packet of `bytes` payload, at least 1 ns.
    pub(super) fn wire_time(bytes: u64, bits_per_second: u64) -> u64 {
        // Ethernet, IP, UDP, BTH, RETH, ICRC and the gap between frames.
        const OVERHEAD: u64 = 98;
        let bits = u128::from(bytes + OVERHEAD) * 8 * 1_000_000_000;
        u64::try_from(bits / u128::from(bits_per_second.max(1)))
            .unwrap_or(u64::MAX)
            .max(1)
    }

    pub(super) fn mtu(&self) -> u64 {
        u64::from(self.caps.mtu.max(1))
    }
}

impl Default for SimConfig {
    fn default() -> Self {
        Self {
            seed: 0,
            free_running: false,
            latency: 1_000..=8_000,
            bits_per_second: 100_000_000_000,
            reorder_completions: true,
            timeout: 500_000,
            retry_count: 7,
            rnr_timer: 10_000,
            rnr_retry: Self::RNR_FOREVER,
            caps: Capabilities {
                max_send_depth: 8192,
                max_receive_depth: 8192,
                max_completions: 1 << 20,
                max_sge: 16,
                max_inline: 220,
                max_message: 1 << 30,
                max_mr: 1 << 40,
                mtu: 4096,
                read: true,
                windows: Some(WindowCaps {
                    max: 4096,
                    per_lane: true,
                    bounded: true,
                    final_when_done: true,
                }),
                dmabuf: true,
                relaxed_ordering: false,
            },
            trace_capacity: 4096,
        }
    }
}
