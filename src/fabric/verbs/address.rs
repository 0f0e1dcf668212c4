//! The lane address of the verbs fabric: what a peer needs to connect its queue pair to ours.
//!
//! Thirty-six bytes, explicitly little-endian, versioned. It arrives over the (authenticated) control channel, but the
//! decoder trusts nothing: length, version, ranges of all numbers. Pure; any thread may call.
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 1 | version, [`VERSION`] |
//! | 1 | 1 | link layer code: 1 InfiniBand, 2 Ethernet |
//! | 2 | 1 | GID type code: 0 InfiniBand, 1 RoCE v1, 2 RoCE v2 |
//! | 3 | 1 | path MTU code this side allows, 1 to 5 |
//! | 4 | 1 | port number |
//! | 5 | 1 | reads this side serves at a time (`max_dest_rd_atomic`) |
//! | 6 | 1 | flags: bit 0, the port can be reached only with a GRH |
//! | 7 | 1 | zero |
//! | 8 | 4 | queue pair number, 24 bits |
//! | 12 | 4 | first packet sequence number this side sends, 24 bits |
//! | 16 | 2 | LID, 0 on Ethernet |
//! | 18 | 2 | zero |
//! | 20 | 16 | GID |

use crate::fabric::LaneAddress;

use super::{
    gid::{Gid, GidType},
    link::{LinkLayer, Mtu},
};

/// The version of the encoding.
pub(crate) const VERSION: u8 = 1;
const LENGTH: usize = 36;
const FLAG_GRH: u8 = 1;
const MAX_24: u32 = 0x00ff_ffff;

/// One side of a reliable connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct VerbsAddress {
    pub(crate) link: LinkLayer,
    pub(crate) gid_type: GidType,
    pub(crate) mtu: Mtu,
    pub(crate) port: u8,
    pub(crate) max_dest_rd_atomic: u8,
    pub(crate) grh_required: bool,
    pub(crate) qpn: u32,
    pub(crate) psn: u32,
    pub(crate) lid: u16,
    pub(crate) gid: Gid,
}

impl VerbsAddress {
    /// The bytes a peer gets.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let gid_type = match self.gid_type {
            GidType::InfiniBand => 0,
            GidType::RoceV1 => 1,
            // Nothing else gets past the choice of a GID except by an explicit index, and then RoCE v2 is what a
            // future type would be compatible with, if any.
            GidType::RoceV2 | GidType::Other(_) => 2,
        };
        let mut bytes = Vec::with_capacity(LENGTH);
        bytes.extend([
            VERSION,
            self.link.code(),
            gid_type,
            self.mtu.code(),
            self.port,
            self.max_dest_rd_atomic,
            if self.grh_required { FLAG_GRH } else { 0 },
            0,
        ]);
        bytes.extend(self.qpn.to_le_bytes());
        bytes.extend(self.psn.to_le_bytes());
        bytes.extend(self.lid.to_le_bytes());
        bytes.extend([0, 0]);
        bytes.extend(self.gid.0);
        bytes
    }

    /// Decodes what a peer sent; the error says which rule it breaks.
    pub(crate) fn decode(address: &LaneAddress) -> Result<Self, &'static str> {
        Self::decode_bytes(address.as_bytes())
    }

    fn decode_bytes(bytes: &[u8]) -> Result<Self, &'static str> {
        if bytes.first().is_some_and(|version| *version != VERSION) {
            return Err("not a version of the verbs lane address that this build knows");
        }
        let bytes: &[u8; LENGTH] = bytes.try_into().map_err(|_| "not 36 bytes long")?;
        let [
            _version,
            link,
            gid_type,
            mtu,
            port,
            reads,
            flags,
            zero,
            q0,
            q1,
            q2,
            q3,
            p0,
            p1,
            p2,
            p3,
            l0,
            l1,
            z0,
            z1,
            gid @ ..,
        ] = *bytes;
        let gid: [u8; 16] = gid;
        let address = Self {
            link: match link {
                1 | 2 => LinkLayer::from_code(link),
                _ => return Err("unknown link layer"),
            },
            gid_type: match gid_type {
                0..=2 => GidType::from_code(u32::from(gid_type)),
                _ => return Err("unknown GID type"),
            },
            mtu: Mtu::from_code(u32::from(mtu)).ok_or("unknown path MTU")?,
            port,
            max_dest_rd_atomic: reads,
            grh_required: flags & FLAG_GRH != 0,
            qpn: u32::from_le_bytes([q0, q1, q2, q3]),
            psn: u32::from_le_bytes([p0, p1, p2, p3]),
            lid: u16::from_le_bytes([l0, l1]),
            gid: Gid(gid),
        };
        if flags & !FLAG_GRH != 0 || [zero, z0, z1] != [0; 3] {
            return Err("reserved bits are set");
        }
        // Queue pairs 0 and 1 are for management (vol. 1, 3.9); 0xffffff is the multicast one.
        if address.qpn < 2 || address.qpn >= MAX_24 {
            return Err("not the number of a connected queue pair");
        }
        if address.psn > MAX_24 {
            return Err("packet sequence number beyond 24 bits");
        }
        if address.port == 0 {
            return Err("port number 0");
        }
        match address.link {
            LinkLayer::Ethernet if address.gid.is_zero() => Err("RoCE without a GID"),
            LinkLayer::Ethernet if address.gid_type == GidType::InfiniBand => {
                Err("RoCE with an InfiniBand GID")
            }
            LinkLayer::Ethernet => Ok(address),
            _ if address.gid_type != GidType::InfiniBand => Err("InfiniBand with a RoCE GID"),
            _ if address.lid == 0 && address.gid.is_zero() => {
                Err("InfiniBand with neither LID nor GID")
            }
            _ if address.lid >= 0xc000 => Err("multicast LID"),
            _ => Ok(address),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn roce() -> VerbsAddress {
        VerbsAddress {
            link: LinkLayer::Ethernet,
            gid_type: GidType::RoceV2,
            mtu: Mtu::M1024,
            port: 1,
            max_dest_rd_atomic: 16,
            grh_required: false,
            qpn: 0x0001_2345,
            psn: 0x00ab_cdef,
            lid: 0,
            gid: Gid([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 0, 0, 1]),
        }
    }

    fn decoded(bytes: Vec<u8>) -> Result<VerbsAddress, &'static str> {
        VerbsAddress::decode(&LaneAddress::new(bytes).unwrap())
    }

    #[test]
    fn the_layout_is_the_documented_one() {
        let bytes = roce().encode();
        assert_eq!(bytes.len(), LENGTH);
        assert_eq!(bytes[..8], [1, 2, 2, 3, 1, 16, 0, 0]);
        assert_eq!(
            bytes[8..16],
            [0x45, 0x23, 0x01, 0x00, 0xef, 0xcd, 0xab, 0x00]
        );
        assert_eq!(bytes[16..20], [0; 4]);
        assert_eq!(bytes[20..], roce().gid.0);
    }

    #[test]
    fn every_truncation_and_extension_is_refused() {
        let bytes = roce().encode();
        for length in 0..bytes.len() {
            assert!(decoded(bytes[..length].to_vec()).is_err(), "{length} bytes");
        }
        let mut longer = bytes;
        longer.push(0);
        assert!(decoded(longer).is_err());
    }

    #[test]
    fn each_field_out_of_range_is_refused() {
        let cases: [(usize, u8); 13] = [
            (0, 2),
            (1, 0),
            (1, 3),
            (2, 0),
            (2, 3),
            (3, 0),
            (3, 6),
            (4, 0),
            (6, 2),
            (7, 1),
            (11, 1),
            (15, 1),
            (18, 1),
        ];
        for (offset, value) in cases {
            let mut bytes = roce().encode();
            bytes[offset] = value;
            assert!(decoded(bytes).is_err(), "byte {offset} = {value}");
        }
        for qpn in [0, 1, 0x00ff_ffff] {
            assert!(decoded(VerbsAddress { qpn, ..roce() }.encode()).is_err());
        }
        assert!(
            decoded(
                VerbsAddress {
                    gid: Gid::default(),
                    ..roce()
                }
                .encode()
            )
            .is_err()
        );
    }

    #[test]
    fn infiniband_needs_a_unicast_lid_or_a_gid() {
        let infiniband = VerbsAddress {
            link: LinkLayer::InfiniBand,
            gid_type: GidType::InfiniBand,
            lid: 7,
            gid: Gid::default(),
            grh_required: true,
            ..roce()
        };
        assert_eq!(decoded(infiniband.encode()), Ok(infiniband));
        for lid in [0, 0xc000] {
            assert!(decoded(VerbsAddress { lid, ..infiniband }.encode()).is_err());
        }
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(
            qpn in 2u32..0x00ff_ffff,
            psn in 0u32..=0x00ff_ffff,
            mtu in 1u32..=5,
            reads: u8,
            port in 1u8..,
            grh_required: bool,
            gid in prop::array::uniform16(1u8..),
        ) {
            let mtu = Mtu::from_code(mtu).unwrap();
            let address =
                VerbsAddress { qpn, psn, mtu, max_dest_rd_atomic: reads, port, grh_required, gid: Gid(gid), ..roce() };
            prop_assert_eq!(decoded(address.encode()), Ok(address));
        }

        #[test]
        fn random_bytes_never_panic_and_survive_only_unchanged(
            mut bytes in prop::collection::vec(any::<u8>(), 0..=LaneAddress::MAX),
            patched: bool,
        ) {
            if patched {
                bytes.truncate(LENGTH);
                for (byte, good) in bytes.iter_mut().zip([VERSION, 2, 2, 3, 1]) {
                    *byte = good;
                }
            }
            if let Ok(address) = decoded(bytes.clone()) {
                prop_assert_eq!(address.encode(), bytes);
            }
        }
    }
}
