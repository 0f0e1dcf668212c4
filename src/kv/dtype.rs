//! Element types of KV caches.

/// The element type of a plane. A push never converts: both sides must agree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
#[non_exhaustive]
pub enum Dtype {
    /// IEEE 754 binary32.
    F32 = 1,
    /// IEEE 754 binary16.
    F16 = 2,
    /// bfloat16.
    Bf16 = 3,
    /// OCP FP8 E4M3 (finite only).
    F8E4M3 = 4,
    /// OCP FP8 E5M2.
    F8E5M2 = 5,
    /// FP8 E4M3 with the FNUZ encoding of CDNA3 (MI300); not the same bytes as OCP.
    F8E4M3Fnuz = 6,
    /// Signed 8-bit integer.
    I8 = 7,
    /// Opaque bytes (packed formats whose meaning only the engines know).
    U8 = 8,
}

impl Dtype {
    /// Bytes of one element.
    pub const fn bytes(self) -> u32 {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::F8E4M3 | Self::F8E5M2 | Self::F8E4M3Fnuz | Self::I8 | Self::U8 => 1,
        }
    }

    /// The type encoded as `value` on the wire.
    pub const fn from_wire(value: u8) -> Option<Self> {
        Some(match value {
            1 => Self::F32,
            2 => Self::F16,
            3 => Self::Bf16,
            4 => Self::F8E4M3,
            5 => Self::F8E5M2,
            6 => Self::F8E4M3Fnuz,
            7 => Self::I8,
            8 => Self::U8,
            _ => return None,
        })
    }
}
