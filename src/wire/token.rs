//! The region token: the right to read or write one exported region, for engines that schedule transfers themselves.
//! The same envelope and rules as a grant; the keys of the rails come over the control connection.

use std::fmt;

use bytes::Bytes;

use super::codec::{Address, Reader, WireErrorKind};
use super::envelope::{Envelope, GrantError};
use super::ids::{Digest, Incarnation, Nonce};

const ENVELOPE: Envelope = Envelope {
    what: "region token",
    magic: *b"KVPR",
    version: RegionToken::VERSION,
    limit: 2048,
};

const READ: u8 = 1;
const WRITE: u8 = 2;

/// The right to reach one exported region of an endpoint with one-sided operations until it is withdrawn.
///
/// Whoever holds its bytes (and the endpoint's key, see `Auth`) can use it, so treat them as a secret.
#[derive(Clone, PartialEq, Eq)]
pub struct RegionToken {
    fields: RegionTokenFields,
    encoded: Bytes,
    digest: Digest,
}

/// What a region token says.
#[derive(Clone, PartialEq, Eq)]
#[cfg_attr(test, derive(Debug))]
pub(crate) struct RegionTokenFields {
    pub(crate) issuer: Incarnation,
    pub(crate) addresses: Vec<String>,
    pub(crate) region: u32,
    pub(crate) nonce: Nonce,
    pub(crate) length: u64,
    pub(crate) read: bool,
    pub(crate) write: bool,
}

impl RegionToken {
    /// Version of the encoding.
    pub const VERSION: u16 = 1;

    pub(crate) fn new(fields: RegionTokenFields) -> Result<Self, GrantError> {
        let mut writer = ENVELOPE.begin();
        writer.raw(&fields.issuer.0);
        Address::write_list(&mut writer, &fields.addresses)?;
        writer.u32(fields.region);
        writer.raw(&fields.nonce);
        writer.u64(fields.length);
        writer.u8(if fields.read { READ } else { 0 } | if fields.write { WRITE } else { 0 });
        let (encoded, digest) = ENVELOPE.seal(writer)?;
        Ok(Self {
            fields,
            encoded: encoded.into(),
            digest,
        })
    }

    /// The bytes to carry to the peer.
    pub fn encode(&self) -> Bytes {
        self.encoded.clone()
    }

    /// Reads the bytes of [`RegionToken::encode`]; anything else is refused with a typed error.
    pub fn decode(bytes: &[u8]) -> Result<Self, GrantError> {
        let (body, digest) = ENVELOPE.open(bytes)?;
        let mut reader = Reader::new(ENVELOPE.what, body);
        let issuer = Incarnation(reader.array("issuer")?);
        let addresses = Address::read_list(&mut reader)?;
        let region = reader.u32("region")?;
        let nonce = reader.array("nonce")?;
        let length = reader.u64("length")?;
        let access = reader.u8("access")?;
        if access & !(READ | WRITE) != 0 {
            let kind = WireErrorKind::Unknown(access.into());
            return Err(reader.error("access", kind).into());
        }
        reader.finish()?;
        Ok(Self {
            fields: RegionTokenFields {
                issuer,
                addresses,
                region,
                nonce,
                length,
                read: access & READ != 0,
                write: access & WRITE != 0,
            },
            encoded: Bytes::copy_from_slice(bytes),
            digest,
        })
    }

    /// All it says, the secret included.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn fields(&self) -> &RegionTokenFields {
        &self.fields
    }

    /// The endpoint that issued it.
    pub fn issuer(&self) -> Incarnation {
        self.fields.issuer
    }

    /// Where the issuer listens, in order of preference: `host:port`.
    pub fn addresses(&self) -> &[String] {
        &self.fields.addresses
    }

    /// The issuer's number for the region.
    pub fn region(&self) -> u32 {
        self.fields.region
    }

    /// The secret that opens the region.
    pub(crate) fn nonce(&self) -> &Nonce {
        &self.fields.nonce
    }

    /// Bytes of the region.
    pub fn length(&self) -> u64 {
        self.fields.length
    }

    /// Whether reads are allowed.
    pub fn can_read(&self) -> bool {
        self.fields.read
    }

    /// Whether writes are allowed.
    pub fn can_write(&self) -> bool {
        self.fields.write
    }

    /// The digest at the end of the encoding.
    pub fn digest(&self) -> Digest {
        self.digest
    }
}

impl fmt::Display for RegionToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let access = match (self.can_read(), self.can_write()) {
            (true, true) => "read and write",
            (true, false) => "read",
            (false, true) => "write",
            (false, false) => "no access",
        };
        write!(
            f,
            "region {} of {}: {} bytes, {access}",
            self.region(),
            self.issuer(),
            self.length(),
        )
    }
}

impl fmt::Debug for RegionToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RegionToken")
            .field("issuer", &self.issuer())
            .field("addresses", &self.addresses())
            .field("region", &self.region())
            .field("length", &self.length())
            .field("read", &self.can_read())
            .field("write", &self.can_write())
            .finish_non_exhaustive()
    }
}
