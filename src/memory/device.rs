//! What memory of a device (a GPU, or any exporter of dmabufs) can do beyond being a range of addresses.
//!
//! Host memory needs none of this. Everything here is asked for when memory is registered, except [`Copier`] and
//! [`DeviceMemory::flush`], which belong to the data path of memory that a NIC cannot reach by itself, or whose
//! readers do not see a NIC's writes without more ado.

use std::{fmt, os::fd::OwnedFd, str::FromStr};

use super::MemoryError;

/// A PCI function: `domain:bus:device.function`, as sysfs writes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PciAddress {
    /// Domain (segment).
    pub domain: u32,
    /// Bus.
    pub bus: u8,
    /// Device (slot), below 32.
    pub device: u8,
    /// Function, below 8.
    pub function: u8,
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            domain,
            bus,
            device,
            function,
        } = self;
        write!(f, "{domain:04x}:{bus:02x}:{device:02x}.{function:x}")
    }
}

/// The text is no PCI address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a PCI address such as 0000:c1:00.0")]
pub struct BadPciAddress(String);

impl FromStr for PciAddress {
    type Err = BadPciAddress;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parse = || {
            let (rest, function) = text.rsplit_once('.')?;
            let (rest, device) = rest.rsplit_once(':')?;
            let (domain, bus) = rest.rsplit_once(':').unwrap_or(("0", rest));
            let hex = |digits: &str, most: u32| {
                let plain = digits.bytes().all(|byte| byte.is_ascii_hexdigit());
                let value = u32::from_str_radix(digits, 16).ok()?;
                (plain && value <= most).then_some(value)
            };
            Some(Self {
                domain: hex(domain, u32::MAX)?,
                bus: hex(bus, 0xff)? as u8,
                device: hex(device, 0x1f)? as u8,
                function: hex(function, 7)? as u8,
            })
        };
        parse().ok_or_else(|| BadPciAddress(text.to_owned()))
    }
}

/// A range exported as a dmabuf.
#[derive(Debug)]
pub struct Dmabuf {
    /// The file; may be closed once everything that uses it has been registered.
    pub fd: OwnedFd,
    /// Where in the file the memory's first byte lies.
    pub offset: u64,
}

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// From the device to the host.
    ToHost,
    /// From the host to the device.
    ToDevice,
}

/// One piece to copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Copy {
    /// Where on the device: an address within the memory the copier was made for.
    pub device: u64,
    /// Where on the host.
    pub host: u64,
    /// Bytes.
    pub length: u64,
}

/// Names a batch of copies. Batches of one copier end in the order they were started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub u64);

/// Copies between a device's memory and the host without blocking. One thread owns it.
pub trait Copier: Send + fmt::Debug {
    /// Tells the device that `[address, address + length)` of the host will be used often, so that it can be pinned.
    /// Failing is no more than slow.
    ///
    /// # Safety
    ///
    /// The range must stay mapped until the copier has been dropped.
    unsafe fn pin(&mut self, address: u64, length: u64) -> Result<(), MemoryError>;

    /// Starts `copies`, in any order among themselves and after all that was started before.
    ///
    /// # Safety
    ///
    /// Every host range must be mapped, and every device range lie in the memory the copier was made for, until
    /// [`Copier::is_done`] has said so of the ticket, or the copier has been dropped (which waits). Until then the
    /// source must not change and nobody may hold a Rust reference to the destination.
    unsafe fn start(
        &mut self,
        direction: Direction,
        copies: &[Copy],
    ) -> Result<Ticket, MemoryError>;

    /// Whether `ticket` and all before it are done. Never blocks.
    ///
    /// # Errors
    ///
    /// The device failed; nothing is known of the bytes.
    fn is_done(&mut self, ticket: Ticket) -> Result<bool, MemoryError>;
}

/// A range of addresses of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Span {
    /// The first byte.
    pub address: u64,
    /// Bytes.
    pub length: u64,
}

impl Span {
    /// The address behind the last byte; `None` if there is no such address.
    pub const fn end(self) -> Option<u64> {
        self.address.checked_add(self.length)
    }

    /// Whether `other` lies wholly within.
    pub fn contains(self, other: Span) -> bool {
        match (self.end(), other.end()) {
            (Some(end), Some(other_end)) => self.address <= other.address && other_end <= end,
            _ => false,
        }
    }
}

/// What it takes until a kernel, started after a NIC's write was reported as placed, sees that write.
///
/// Nothing here reaches a kernel that is running already.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Visibility {
    /// Nothing: the device orders a NIC's writes before later kernels by itself, or the memory is the host's.
    Ordered,
    /// A call of the device's runtime, which the device says it supports.
    RuntimeFlush,
    /// A write to the device's HDP flush register and reading it back, which is what AMD's own runtime does.
    HdpRegister,
    /// Reading a byte back through the device's copy engine. The best there is where the device offers neither of the
    /// others; no vendor promises that it suffices.
    ReadBack,
}

impl fmt::Display for Visibility {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ordered => "ordered by the device",
            Self::RuntimeFlush => "flush by the device's runtime",
            Self::HdpRegister => "flush by the HDP register",
            Self::ReadBack => "read-back (not promised to suffice)",
        })
    }
}

/// Memory that lives on a device. Any thread may call.
pub trait DeviceMemory: Send + Sync + fmt::Debug {
    /// Whether this process may load and store at the memory's addresses. If not, only a device can.
    fn is_host_accessible(&self) -> bool;

    /// The PCI function that holds it, for choosing the nearest rail.
    fn location(&self) -> Option<PciAddress>;

    /// Exports the memory as a dmabuf; [`Dmabuf::offset`] is that of the memory's first byte. The file may hold more
    /// than the memory, up to the whole allocation around it: register the memory's range only.
    ///
    /// # Errors
    ///
    /// Why it cannot be: not supported by driver or runtime, managed memory, and so on.
    fn export(&self) -> Result<Dmabuf, MemoryError>;

    /// The allocation that the memory is a part of, if the runtime knows one that holds all of it. Engines cut many
    /// regions out of one allocation; equal spans of one device are the same allocation, which need be exported only
    /// once ([`DeviceMemory::export_allocation`]).
    fn allocation(&self) -> Option<Span> {
        None
    }

    /// Exports all of [`DeviceMemory::allocation`]; [`Dmabuf::offset`] is that of the allocation's first byte, so
    /// memory at `address` lies at that offset plus `address - allocation.address`. The same as
    /// [`DeviceMemory::export`] where there is no allocation known.
    ///
    /// # Errors
    ///
    /// As [`DeviceMemory::export`].
    fn export_allocation(&self) -> Result<Dmabuf, MemoryError> {
        self.export()
    }

    /// Whether a NIC's driver may take the memory's own addresses (`ibv_reg_mr` with a peer-memory module).
    ///
    /// # Errors
    ///
    /// Why not, as far as can be told without trying.
    fn peer_memory(&self) -> Result<(), MemoryError>;

    /// A copier for staging.
    ///
    /// # Errors
    ///
    /// The device's runtime refuses.
    fn copier(&self) -> Result<Box<dyn Copier>, MemoryError>;

    /// What [`DeviceMemory::flush`] does, for reports.
    fn visibility(&self) -> Visibility {
        Visibility::Ordered
    }

    /// Makes what a NIC has written, and reported as placed, visible to kernels that the device starts afterwards, as
    /// [`DeviceMemory::visibility`] says. It covers all memory of the device, so once is enough for any number of
    /// completed writes. Takes no time worth mentioning if [`Visibility::Ordered`], and some microseconds otherwise.
    ///
    /// # Errors
    ///
    /// The device's runtime refuses.
    fn flush(&self) -> Result<(), MemoryError>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pci_addresses_are_read_as_they_are_written() {
        for text in ["0000:c1:00.0", "10000:01:1f.7", "0000:00:00.1"] {
            assert_eq!(text.parse::<PciAddress>().unwrap().to_string(), text);
        }
        let short: PciAddress = "c1:00.0".parse().unwrap();
        assert_eq!(short.to_string(), "0000:c1:00.0");
        for bad in [
            "",
            "c1",
            "0000:c1:20.0",
            "0000:c1:00.8",
            "0000:1c1:00.0",
            "x:c1:00.0",
            "+1:00:00.0",
        ] {
            assert!(bad.parse::<PciAddress>().is_err(), "{bad}");
        }
    }
}
