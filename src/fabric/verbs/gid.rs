//! GIDs, and which one of a port's table to use.
//!
//! A RoCE port's table holds every address of its network device twice or more: as RoCE v1 (an Ethernet protocol of
//! its own, not routable) and as RoCE v2 (UDP). Index 0 is as a rule RoCE v1 of the link-local address, so the choice
//! goes by type, never by position. Pure; any thread may call.

use std::{fmt, net::Ipv6Addr};

use super::link::LinkLayer;

/// A global identifier: 16 bytes, most significant first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct Gid(pub [u8; 16]);

impl Gid {
    /// The upper eight bytes: the InfiniBand subnet.
    pub fn subnet_prefix(self) -> u64 {
        let [a, b, c, d, e, f, g, h, ..] = self.0;
        u64::from_be_bytes([a, b, c, d, e, f, g, h])
    }

    /// Whether it is unset.
    pub fn is_zero(self) -> bool {
        self.0 == [0; 16]
    }

    /// As an IPv6 address, which a RoCE GID is.
    pub fn to_ipv6(self) -> Ipv6Addr {
        Ipv6Addr::from(self.0)
    }

    /// Whether it carries an IPv4 address (`::ffff:a.b.c.d`).
    pub fn is_ipv4_mapped(self) -> bool {
        self.to_ipv6().to_ipv4_mapped().is_some()
    }

    /// Whether it is a link-local IPv6 address (`fe80::/10`).
    pub fn is_link_local(self) -> bool {
        self.to_ipv6().is_unicast_link_local()
    }
}

impl fmt::Display for Gid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.to_ipv6().fmt(f)
    }
}

/// The type of a GID.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GidType {
    /// InfiniBand.
    InfiniBand,
    /// RoCE v1: over Ethernet, not routable.
    RoceV1,
    /// RoCE v2: over UDP.
    RoceV2,
    /// A code this library does not know.
    Other(u32),
}

impl GidType {
    /// Decodes `ibv_gid_entry::gid_type`.
    pub fn from_code(code: u32) -> Self {
        match code {
            0 => Self::InfiniBand,
            1 => Self::RoceV1,
            2 => Self::RoceV2,
            other => Self::Other(other),
        }
    }

    /// Decodes a line of `/sys/class/infiniband/<device>/ports/<port>/gid_attrs/types/<index>`, where the kernel calls
    /// RoCE v1 and InfiniBand by one name.
    pub fn from_sysfs(text: &str, link: LinkLayer) -> Self {
        match (text.trim(), link) {
            ("RoCE v2", _) => Self::RoceV2,
            ("IB/RoCE v1", LinkLayer::Ethernet) => Self::RoceV1,
            ("IB/RoCE v1", _) => Self::InfiniBand,
            _ => Self::Other(u32::MAX),
        }
    }
}

impl fmt::Display for GidType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InfiniBand => f.write_str("InfiniBand"),
            Self::RoceV1 => f.write_str("RoCE v1"),
            Self::RoceV2 => f.write_str("RoCE v2"),
            Self::Other(code) => write!(f, "GID type {code}"),
        }
    }
}

/// One row of a port's GID table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GidEntry {
    /// Its index in the table.
    pub index: u32,
    /// The GID.
    pub gid: Gid,
    /// Its type.
    pub kind: GidType,
    /// The network device it belongs to, where known.
    pub netdev: Option<String>,
}

impl fmt::Display for GidEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}, index {})", self.gid, self.kind, self.index)
    }
}

/// Why no GID of a table can be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoGid {
    /// The index that the configuration asks for is not in the table, or is unset.
    #[error("GID index {0} is not in the table")]
    Index(u8),
    /// An Ethernet port without any RoCE v2 GID.
    #[error("no RoCE v2 GID among {0}")]
    NoRoceV2(usize),
    /// An InfiniBand port without any GID.
    #[error("no GID")]
    None,
    /// A GID that fits no field of `ibv_ah_attr`, whose index has eight bits.
    #[error("GID index {0} does not fit 8 bits")]
    TooFar(u32),
}

/// Chooses the GID to use on a port of link layer `link`: the entry at `wanted` if set, else
///
/// * on Ethernet the first RoCE v2 entry, an IPv4-mapped one before a global IPv6 one before a link-local one (which
///   cannot be routed, and which peers on another VLAN or host cannot resolve);
/// * on InfiniBand the first entry, which the specification makes the port's own GUID (vol. 1, 4.1.1).
pub fn choose_gid(
    link: LinkLayer,
    table: &[GidEntry],
    wanted: Option<u8>,
) -> Result<&GidEntry, NoGid> {
    let mut set = table.iter().filter(|entry| !entry.gid.is_zero());
    let chosen = match (wanted, link) {
        (Some(index), _) => set
            .find(|entry| entry.index == u32::from(index))
            .ok_or(NoGid::Index(index)),
        (None, LinkLayer::Ethernet) => set
            .clone()
            .filter(|entry| entry.kind == GidType::RoceV2)
            .min_by_key(|entry| (rank(entry.gid), entry.index))
            .ok_or(NoGid::NoRoceV2(set.count())),
        (None, _) => set.min_by_key(|entry| entry.index).ok_or(NoGid::None),
    }?;
    if chosen.index > u32::from(u8::MAX) {
        return Err(NoGid::TooFar(chosen.index));
    }
    Ok(chosen)
}

fn rank(gid: Gid) -> u8 {
    if gid.is_ipv4_mapped() {
        0
    } else if gid.is_link_local() {
        2
    } else {
        1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(index: u32, address: &str, kind: GidType) -> GidEntry {
        let gid = Gid(address.parse::<Ipv6Addr>().unwrap().octets());
        GidEntry {
            index,
            gid,
            kind,
            netdev: None,
        }
    }

    fn roce_table() -> Vec<GidEntry> {
        vec![
            entry(0, "fe80::1", GidType::RoceV1),
            entry(1, "fe80::1", GidType::RoceV2),
            entry(2, "::ffff:10.0.0.1", GidType::RoceV1),
            entry(3, "2001:db8::1", GidType::RoceV2),
            entry(4, "::ffff:10.0.0.1", GidType::RoceV2),
            entry(5, "::ffff:10.0.0.2", GidType::RoceV2),
        ]
    }

    fn chosen(link: LinkLayer, table: &[GidEntry], wanted: Option<u8>) -> Result<u32, NoGid> {
        choose_gid(link, table, wanted).map(|entry| entry.index)
    }

    #[test]
    fn roce_takes_the_first_ipv4_mapped_v2_gid_wherever_it_stands() {
        let mut table = roce_table();
        assert_eq!(chosen(LinkLayer::Ethernet, &table, None), Ok(4));
        table.reverse();
        assert_eq!(chosen(LinkLayer::Ethernet, &table, None), Ok(4));
    }

    #[test]
    fn roce_prefers_a_global_address_to_a_link_local_one_and_takes_that_at_need() {
        let mut table = roce_table();
        table.truncate(4);
        assert_eq!(chosen(LinkLayer::Ethernet, &table, None), Ok(3));
        table.truncate(3);
        assert_eq!(
            chosen(LinkLayer::Ethernet, &table, None),
            Ok(1),
            "v1 with IPv4 is no match"
        );
    }

    #[test]
    fn roce_v1_is_used_only_when_asked_for_by_index() {
        let table = [
            entry(0, "fe80::1", GidType::RoceV1),
            entry(1, "::", GidType::RoceV2),
        ];
        assert_eq!(
            chosen(LinkLayer::Ethernet, &table, None),
            Err(NoGid::NoRoceV2(1))
        );
        assert_eq!(chosen(LinkLayer::Ethernet, &table, Some(0)), Ok(0));
        assert_eq!(
            chosen(LinkLayer::Ethernet, &table, Some(1)),
            Err(NoGid::Index(1)),
            "unset"
        );
        assert_eq!(
            chosen(LinkLayer::Ethernet, &table, Some(9)),
            Err(NoGid::Index(9))
        );
    }

    #[test]
    fn infiniband_takes_the_first_set_gid() {
        let table = [
            entry(0, "fe80::2:c903:1", GidType::InfiniBand),
            entry(1, "fd00::1", GidType::InfiniBand),
        ];
        assert_eq!(chosen(LinkLayer::InfiniBand, &table, None), Ok(0));
        assert_eq!(chosen(LinkLayer::InfiniBand, &[], None), Err(NoGid::None));
        assert_eq!(table[0].gid.subnet_prefix(), 0xfe80_0000_0000_0000);
    }

    #[test]
    fn an_index_beyond_eight_bits_is_refused_rather_than_cut() {
        let table = [entry(256, "::ffff:10.0.0.1", GidType::RoceV2)];
        assert_eq!(
            chosen(LinkLayer::Ethernet, &table, None),
            Err(NoGid::TooFar(256))
        );
    }

    #[test]
    fn sysfs_calls_v1_and_infiniband_by_one_name() {
        assert_eq!(
            GidType::from_sysfs("RoCE v2\n", LinkLayer::Ethernet),
            GidType::RoceV2
        );
        assert_eq!(
            GidType::from_sysfs("IB/RoCE v1\n", LinkLayer::Ethernet),
            GidType::RoceV1
        );
        assert_eq!(
            GidType::from_sysfs("IB/RoCE v1\n", LinkLayer::InfiniBand),
            GidType::InfiniBand
        );
    }

    #[test]
    fn ipv4_is_shown_as_people_write_it() {
        assert_eq!(
            entry(4, "::ffff:10.0.0.1", GidType::RoceV2).to_string(),
            "::ffff:10.0.0.1 (RoCE v2, index 4)"
        );
    }
}
