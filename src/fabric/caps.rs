//! What a rail is and what it can do. Every figure here is asked from the device, never assumed.

use crate::{memory::PciAddress, wire::FabricKind};

use super::{FabricErrorKind, LaneConfig, WindowCaps};

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

impl Capabilities {
    /// Whether a lane may be as `config` asks.
    pub(super) fn check_lane(&self, config: &LaneConfig) -> Result<(), FabricErrorKind> {
        let limits = [
            ("send depth", config.send_depth, self.max_send_depth),
            (
                "receive depth",
                config.receive_depth,
                self.max_receive_depth,
            ),
            ("gather elements", config.max_sge, self.max_sge),
            ("inline bytes", config.max_inline, self.max_inline),
        ];
        match limits.into_iter().find(|(_, value, limit)| value > limit) {
            None => Ok(()),
            Some((what, value, limit)) => {
                let (value, limit) = (value.into(), limit.into());
                Err(FabricErrorKind::Limit { what, value, limit })
            }
        }
    }

    /// Whether a completion queue may have that many entries.
    pub(super) fn check_completions(&self, depth: u32) -> Result<(), FabricErrorKind> {
        if depth <= self.max_completions {
            return Ok(());
        }
        Err(FabricErrorKind::Limit {
            what: "completion depth",
            value: depth.into(),
            limit: self.max_completions.into(),
        })
    }

    /// Whether `[address, address + length)` may be one registration.
    pub(super) fn check_range(&self, address: u64, length: u64) -> Result<(), FabricErrorKind> {
        if length > self.max_mr {
            return Err(FabricErrorKind::Limit {
                what: "registration length",
                value: length,
                limit: self.max_mr,
            });
        }
        if address == 0 || length == 0 || address.checked_add(length).is_none() {
            return Err(FabricErrorKind::Memory(format!(
                "{length} bytes at {address:#x} are no memory"
            )));
        }
        Ok(())
    }
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
