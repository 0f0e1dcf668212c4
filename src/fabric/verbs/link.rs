//! What a port's link is: link layer, state, path MTU and speed, decoded from the codes of `ibv_query_port(3)`.
//!
//! Pure; any thread may call.

use std::fmt;

/// The link layer of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LinkLayer {
    /// InfiniBand, or an old driver that does not say.
    InfiniBand,
    /// Ethernet: RoCE.
    Ethernet,
    /// A code this library does not know.
    Other(u8),
}

impl LinkLayer {
    /// Decodes `ibv_port_attr::link_layer`. Drivers older than the field leave it unspecified, which means InfiniBand.
    pub fn from_code(code: u8) -> Self {
        match code {
            0 | 1 => Self::InfiniBand,
            2 => Self::Ethernet,
            other => Self::Other(other),
        }
    }

    /// The code of `ibv_port_attr::link_layer`.
    pub fn code(self) -> u8 {
        match self {
            Self::InfiniBand => 1,
            Self::Ethernet => 2,
            Self::Other(code) => code,
        }
    }
}

impl fmt::Display for LinkLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InfiniBand => f.write_str("InfiniBand"),
            Self::Ethernet => f.write_str("Ethernet"),
            Self::Other(code) => write!(f, "link layer {code}"),
        }
    }
}

/// The logical state of a port (`enum ibv_port_state`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PortState {
    /// No link.
    Down,
    /// The link is up, but no subnet manager has configured it yet.
    Init,
    /// Configured, about to become active.
    Armed,
    /// Traffic can flow.
    Active,
    /// Active, after a recoverable link error.
    ActiveDefer,
    /// The driver does not say, or a code this library does not know.
    Unknown(u32),
}

impl PortState {
    /// Decodes `ibv_port_attr::state`.
    pub fn from_code(code: u32) -> Self {
        match code {
            1 => Self::Down,
            2 => Self::Init,
            3 => Self::Armed,
            4 => Self::Active,
            5 => Self::ActiveDefer,
            other => Self::Unknown(other),
        }
    }

    /// The state as `ibv_devinfo` prints it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Down => "DOWN",
            Self::Init => "INIT",
            Self::Armed => "ARMED",
            Self::Active => "ACTIVE",
            Self::ActiveDefer => "ACTIVE_DEFER",
            Self::Unknown(_) => "UNKNOWN",
        }
    }
}

impl fmt::Display for PortState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// The physical state of a port as `ibv_devinfo` prints it (`ibv_port_attr::phys_state`; InfiniBand Architecture
/// Specification, vol. 1, 14.2.5.6).
pub fn physical_state_word(code: u8) -> &'static str {
    match code {
        1 => "SLEEP",
        2 => "POLLING",
        3 => "DISABLED",
        4 => "PORT_CONFIGURATION_TRAINING",
        5 => "LINK_UP",
        6 => "LINK_ERROR_RECOVERY",
        7 => "PHY_TEST",
        _ => "UNKNOWN",
    }
}

/// A path MTU (`enum ibv_mtu`): payload bytes of one packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Mtu {
    /// 256 bytes.
    M256 = 1,
    /// 512 bytes.
    M512 = 2,
    /// 1024 bytes: what an Ethernet MTU of 1500 leaves.
    M1024 = 3,
    /// 2048 bytes.
    M2048 = 4,
    /// 4096 bytes: needs an Ethernet MTU of about 4200 or more.
    M4096 = 5,
}

impl Mtu {
    const ALL: [Self; 5] = [
        Self::M256,
        Self::M512,
        Self::M1024,
        Self::M2048,
        Self::M4096,
    ];

    /// Decodes `enum ibv_mtu`.
    pub fn from_code(code: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|mtu| *mtu as u32 == code)
    }

    /// The code of `enum ibv_mtu`.
    pub fn code(self) -> u8 {
        self as u8
    }

    /// Bytes of payload per packet.
    pub fn bytes(self) -> u32 {
        128 << self as u32
    }

    /// The largest MTU of at most `bytes`, or the smallest there is.
    pub fn at_most(bytes: u32) -> Self {
        Self::ALL
            .into_iter()
            .rev()
            .find(|mtu| mtu.bytes() <= bytes)
            .unwrap_or(Self::M256)
    }
}

impl fmt::Display for Mtu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.bytes())
    }
}

/// Bits per second of a link: `speed` is `ibv_port_attr::active_speed`, `speed_ex` is `active_speed_ex` (0 where the
/// library has no such field, and then `speed` counts), `width` is `active_width`. 0 if either is unknown.
///
/// The figures are the signalling rates that `ibv_devinfo` and `ibstat` print, per lane: SDR 2.5, DDR 5, QDR and FDR10
/// 10, FDR 14, EDR 25, HDR 50, NDR 100, XDR 200 Gb/s.
pub fn link_bits_per_second(speed: u8, speed_ex: u32, width: u8) -> u64 {
    let code = if speed_ex != 0 {
        speed_ex
    } else {
        u32::from(speed)
    };
    let per_lane: u64 = match code {
        1 => 2_500_000_000,
        2 => 5_000_000_000,
        4 | 8 => 10_000_000_000,
        16 => 14_000_000_000,
        32 => 25_000_000_000,
        64 => 50_000_000_000,
        128 => 100_000_000_000,
        256 => 200_000_000_000,
        _ => 0,
    };
    let lanes = match width {
        1 => 1,
        2 => 4,
        4 => 8,
        8 => 12,
        16 => 2,
        _ => 0,
    };
    per_lane * lanes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mtu_codes_are_those_of_ibv_mtu() {
        let bytes: Vec<_> = (0..8)
            .map(|code| Mtu::from_code(code).map(Mtu::bytes))
            .collect();
        let expected = [
            None,
            Some(256),
            Some(512),
            Some(1024),
            Some(2048),
            Some(4096),
            None,
            None,
        ];
        assert_eq!(bytes, expected);
    }

    #[test]
    fn the_mtu_never_exceeds_what_was_asked() {
        assert_eq!(Mtu::at_most(u32::MAX), Mtu::M4096);
        assert_eq!(Mtu::at_most(4096), Mtu::M4096);
        assert_eq!(Mtu::at_most(4095), Mtu::M2048);
        assert_eq!(Mtu::at_most(1500), Mtu::M1024);
        assert_eq!(Mtu::at_most(0), Mtu::M256, "there is no smaller one");
    }

    #[test]
    fn speeds_are_per_lane_times_width() {
        assert_eq!(link_bits_per_second(1, 0, 1), 2_500_000_000, "SDR 1x");
        assert_eq!(
            link_bits_per_second(32, 0, 2),
            100_000_000_000,
            "EDR 4x: 100G"
        );
        assert_eq!(
            link_bits_per_second(64, 0, 2),
            200_000_000_000,
            "HDR 4x: 200G"
        );
        assert_eq!(
            link_bits_per_second(128, 0, 2),
            400_000_000_000,
            "NDR 4x: 400G"
        );
        // XDR does not fit the eight bits of active_speed; the driver reports NDR there.
        assert_eq!(
            link_bits_per_second(128, 256, 2),
            800_000_000_000,
            "XDR 4x: 800G"
        );
        assert_eq!(link_bits_per_second(0, 0, 2), 0);
        assert_eq!(link_bits_per_second(32, 0, 0), 0);
    }

    #[test]
    fn an_unspecified_link_layer_is_infiniband() {
        assert_eq!(LinkLayer::from_code(0), LinkLayer::InfiniBand);
        assert_eq!(LinkLayer::from_code(2), LinkLayer::Ethernet);
        assert_eq!(LinkLayer::from_code(7).code(), 7);
    }
}
