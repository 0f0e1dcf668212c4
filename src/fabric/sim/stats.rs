//! What happened in a net so far, in numbers.

/// Counts of one net since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SimStats {
    /// Payload bytes placed into peers' memory (writes) or into the asker's (reads). A retransmission counts once.
    pub bytes: u64,
    /// Messages wholly placed.
    pub messages: u64,
    /// Packets put on the wire, without acknowledgements.
    pub packets: u64,
    /// Of those, packets that had been sent before.
    pub retransmissions: u64,
    /// Packets of any kind lost to a fault.
    pub lost: u64,
    /// Packets that reached a lane which was fenced, destroyed, not connected or another's, and were dropped.
    pub refused: u64,
    /// Immediates that met no receive.
    pub unready: u64,
    /// Times a requester waited because the peer had no receive posted.
    pub rnr_waits: u64,
    /// Times a requester heard nothing in time.
    pub timeouts: u64,
    /// Accesses the responder's memory checks refused.
    pub access_errors: u64,
    /// Completions made.
    pub completions: u64,
    /// The most completions that any completion queue held.
    pub cq_high_water: u32,
    /// Completion queues that overflowed. Each such context is [fatal](crate::fabric::FabricErrorKind::Fatal).
    pub cq_overflows: u64,
    /// Posts of either queue refused because it was full.
    pub queue_full: u64,
}
