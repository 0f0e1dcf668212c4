//! The names that travel: who issued a right, which pool, which grant, which exact bytes.

use std::fmt;

use blake2::digest::consts::U16;
use blake2::{Blake2s, Digest as _};

/// A secret number inside a grant or token: who has not been given it cannot guess it.
pub(crate) type Nonce = [u8; 16];

/// Draws a nonce from the operating system.
pub(crate) fn random_nonce() -> std::io::Result<Nonce> {
    let mut nonce = [0; 16];
    getrandom::fill(&mut nonce).map_err(std::io::Error::other)?;
    Ok(nonce)
}

/// One start of an endpoint, drawn at random. A peer that restarted has another incarnation, and every right issued
/// before is refused.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Incarnation(pub(crate) [u8; 16]);

impl Incarnation {
    /// Draws a new incarnation from the operating system's random numbers.
    pub(crate) fn random() -> std::io::Result<Self> {
        random_nonce().map(Self)
    }

    /// The bytes, for logs and maps.
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl fmt::Display for Incarnation {
    /// The first eight bytes in hexadecimal: enough to tell two starts apart in a log.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0
            .iter()
            .take(8)
            .try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Incarnation({self})")
    }
}

/// A pool of its issuer's incarnation. Not reused while the issuer lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PoolId(pub(crate) u32);

impl PoolId {
    /// The number.
    pub const fn value(self) -> u32 {
        self.0
    }
}

impl fmt::Display for PoolId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pool {}", self.0)
    }
}

/// A grant of its issuer's incarnation: a slot and how often that slot was used before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GrantId {
    /// Slot in the issuer's table.
    pub slot: u32,
    /// Use of that slot; a stale generation is refused.
    pub generation: u32,
}

impl fmt::Display for GrantId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "grant {}.{}", self.slot, self.generation)
    }
}

/// 16 bytes of BLAKE2s (RFC 7693) over an encoded grant or token. Who presents it has seen the whole grant, so it is
/// printed only in part.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Digest(pub(crate) [u8; 16]);

impl Digest {
    /// The digest of `bytes`.
    pub(crate) fn of(bytes: &[u8]) -> Self {
        Self(Blake2s::<U16>::digest(bytes).into())
    }

    /// Compares without telling by its duration where the first difference is.
    pub(crate) fn matches(&self, other: &Self) -> bool {
        let difference = self
            .0
            .iter()
            .zip(&other.0)
            .fold(0, |sum, (a, b)| sum | (a ^ b));
        std::hint::black_box(difference) == 0
    }

    /// The bytes.
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, ..] = self.0;
        write!(f, "Digest({a:02x}{b:02x}{c:02x}..)")
    }
}
