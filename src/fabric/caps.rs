//! What a rail is and what it can do. Every figure here is asked from the device, never assumed.

use crate::{memory::PciAddress, wire::FabricKind};

use super::WindowCaps;

/// The state of a rail's link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkState {
    /// Traffic can flow.
    Active,
    /// No traffic; the text is the device's own word for the state ("DOWN", "INIT", "ARMED").
    Inactive(&'static str),
}

/// Limits of one rail.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Most requests outstanding on one lane's send queue.
    pub max_send_depth: u32,
    /// Most receives posted to one lane.
    pub max_receive_depth: u32,
    /// Most completion-queue entries.
    pub max_completions: u32,
    /// Most gather elements of one request.
    pub max_sge: u32,
    /// Most payload bytes sent inline; 0 where the fabric has no inline send.
    pub max_inline: u32,
    /// Most bytes of one message.
    pub max_message: u64,
    /// Most bytes of one registration.
    pub max_mr: u64,
    /// Path MTU of the active link in bytes; 0 where the fabric has none.
    pub mtu: u32,
    /// Whether one-sided reads are served.
    pub read: bool,
    /// Memory windows, if there are any.
    pub windows: Option<WindowCaps>,
    /// Whether dmabufs can be registered. Asked once, with a bad descriptor, when the rail is opened.
    pub dmabuf: bool,
    /// Whether registrations may let the device reorder its accesses on the host's bus
    /// (`IBV_ACCESS_RELAXED_ORDERING`).
    pub relaxed_ordering: bool,
}

/// One rail: its name, state and capabilities.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Which fabric moves the bytes.
    pub kind: FabricKind,
    /// The device's name, such as `mlx5_0`, `rxe0` or `tcp`.
    pub name: String,
    /// The port number, from 1; 0 where the fabric has no ports.
    pub port: u8,
    /// The address peers reach it by, for people: a GID with its type and index, or a socket address.
    pub address: String,
    /// Link state when it was opened.
    pub link: LinkState,
    /// Link speed in bits per second, 0 if unknown.
    pub bits_per_second: u64,
    /// The PCI function behind it, if there is one: where the rail is in the host.
    pub pci: Option<PciAddress>,
    /// Limits.
    pub caps: Capabilities,
}
