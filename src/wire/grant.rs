//! The grant: the right to write named pages once, as opaque bytes that users carry to the writer in any way they
//! like (base64 in JSON, a header, a queue).
//!
//! Encodings are canonical: `decode(encode(x)) == x`, and `encode(decode(b)) == b` for every `b` that is accepted.
//! Whether pages exist or repeat is the issuer's pool to check; the grant is only as wide as its numbers.

use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::codec::{Address, Reader, WireErrorKind};
use super::envelope::{Envelope, GrantError};
use super::ids::{Digest, GrantId, Incarnation, Nonce, PoolId};
use super::pages;
use crate::kv::HeadRange;

const ENVELOPE: Envelope = Envelope {
    what: "grant",
    magic: *b"KVPG",
    version: Grant::VERSION,
    // The longest possible is a little over 5 MiB: a million pages that are all far apart.
    limit: 8 << 20,
};

/// The right to write the pages of one request into one pool, once, as issued by the endpoint that owns the pool.
///
/// Whoever holds its bytes (and the endpoint's key, see `Auth`) can use it, so treat them as a secret. The bytes are
/// safe in base64; at most 8 MiB, normally a few bytes a page. Cloning is cheap except for the page list.
#[derive(Clone, PartialEq, Eq)]
pub struct Grant {
    fields: GrantFields,
    encoded: Bytes,
    digest: Digest,
}

/// What a grant says.
#[derive(Clone, PartialEq, Eq)]
#[cfg_attr(test, derive(Debug))]
pub(crate) struct GrantFields {
    pub(crate) issuer: Incarnation,
    /// Control addresses of the issuer, in order of preference: 1 to 4 of the form `host:port`.
    pub(crate) addresses: Vec<String>,
    pub(crate) pool: PoolId,
    pub(crate) id: GrantId,
    pub(crate) nonce: Nonce,
    pub(crate) heads: HeadRange,
    pub(crate) parts_per_layer: u16,
    pub(crate) tail_capacity: u32,
    /// From issue, in whole milliseconds (the rest is dropped). Informative: the issuer's own clock decides.
    pub(crate) valid_for: Duration,
    /// The user's name for the request, at most [`Grant::MAX_REQUEST`] bytes.
    pub(crate) request: Bytes,
    pub(crate) pages: Vec<u32>,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Header {
    issuer: [u8; 16],
    nonce: [u8; 16],
    pool: U32,
    slot: U32,
    generation: U32,
    heads_first: U32,
    heads_count: U32,
    tail_capacity: U32,
    valid_for_ms: U64,
    parts_per_layer: U16,
}

impl Grant {
    /// Version of the encoding.
    pub const VERSION: u16 = 1;
    /// Most pages.
    pub const MAX_PAGES: usize = pages::MAX_PAGES;
    /// Most bytes of the request name.
    pub const MAX_REQUEST: usize = 256;

    pub(crate) fn new(mut fields: GrantFields) -> Result<Self, GrantError> {
        let milliseconds = u64::try_from(fields.valid_for.as_millis()).unwrap_or(u64::MAX);
        fields.valid_for = Duration::from_millis(milliseconds);
        let mut writer = ENVELOPE.begin();
        let header = Header {
            issuer: fields.issuer.0,
            nonce: fields.nonce,
            pool: U32::new(fields.pool.0),
            slot: U32::new(fields.id.slot),
            generation: U32::new(fields.id.generation),
            heads_first: U32::new(fields.heads.first),
            heads_count: U32::new(fields.heads.count),
            tail_capacity: U32::new(fields.tail_capacity),
            valid_for_ms: U64::new(milliseconds),
            parts_per_layer: U16::new(fields.parts_per_layer),
        };
        writer.raw(header.as_bytes());
        Address::write_list(&mut writer, &fields.addresses)?;
        writer.bytes("request", Self::MAX_REQUEST, &fields.request)?;
        pages::write(&mut writer, &fields.pages)?;
        let (encoded, digest) = ENVELOPE.seal(writer)?;
        Ok(Self {
            fields,
            encoded: encoded.into(),
            digest,
        })
    }

    /// The bytes to carry to the writer. Cheap: they were made when the grant was.
    pub fn encode(&self) -> Bytes {
        self.encoded.clone()
    }

    /// Reads the bytes of [`Grant::encode`]. Anything else is refused with a typed error; at most 4 MiB of pages are
    /// held for any input.
    pub fn decode(bytes: &[u8]) -> Result<Self, GrantError> {
        let (body, digest) = ENVELOPE.open(bytes)?;
        let mut reader = Reader::new(ENVELOPE.what, body);
        let header_bytes = reader.take("header", size_of::<Header>())?;
        let Ok(header) = Header::ref_from_bytes(header_bytes) else {
            // Not reachable: the length is right and the type has no alignment.
            let kind = WireErrorKind::Truncated {
                needed: size_of::<Header>(),
                left: header_bytes.len(),
            };
            return Err(reader.error("header", kind).into());
        };
        let addresses = Address::read_list(&mut reader)?;
        let request = Bytes::copy_from_slice(reader.bytes("request", Self::MAX_REQUEST)?);
        let pages = pages::read(&mut reader)?;
        reader.finish()?;
        Ok(Self {
            fields: GrantFields {
                issuer: Incarnation(header.issuer),
                addresses,
                pool: PoolId(header.pool.get()),
                id: GrantId {
                    slot: header.slot.get(),
                    generation: header.generation.get(),
                },
                nonce: header.nonce,
                heads: HeadRange {
                    first: header.heads_first.get(),
                    count: header.heads_count.get(),
                },
                parts_per_layer: header.parts_per_layer.get(),
                tail_capacity: header.tail_capacity.get(),
                valid_for: Duration::from_millis(header.valid_for_ms.get()),
                request,
                pages,
            },
            encoded: Bytes::copy_from_slice(bytes),
            digest,
        })
    }

    /// All it says, the secret included.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn fields(&self) -> &GrantFields {
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

    /// The issuer's pool.
    pub fn pool(&self) -> PoolId {
        self.fields.pool
    }

    /// Its name at the issuer.
    pub fn id(&self) -> GrantId {
        self.fields.id
    }

    /// The KV heads that may be written, by their number in the whole model.
    pub fn heads(&self) -> HeadRange {
        self.fields.heads
    }

    /// Most parts that each layer is counted in, and so the most lanes that carry it at once.
    pub fn parts_per_layer(&self) -> u16 {
        self.fields.parts_per_layer
    }

    /// Bytes the issuer keeps for the tail (the user's payload at the end of the push).
    pub fn tail_capacity(&self) -> u32 {
        self.fields.tail_capacity
    }

    /// How long it was valid when it was issued. Informative: the issuer's own clock decides.
    pub fn valid_for(&self) -> Duration {
        self.fields.valid_for
    }

    /// The user's name for the request.
    pub fn request(&self) -> &Bytes {
        &self.fields.request
    }

    /// The pages, in the request's order.
    pub fn pages(&self) -> &[u32] {
        &self.fields.pages
    }

    /// The digest at the end of the encoding.
    pub fn digest(&self) -> Digest {
        self.digest
    }
}

impl fmt::Display for Grant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { fields, .. } = self;
        write!(
            f,
            "{} of {}: {} pages of {} for request {}",
            fields.id,
            fields.issuer,
            fields.pages.len(),
            fields.pool,
            fields.request.escape_ascii(),
        )
    }
}

impl fmt::Debug for Grant {
    // The nonce is the authority and the digest proves knowledge of it; neither belongs in a log.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { fields, .. } = self;
        f.debug_struct("Grant")
            .field("id", &fields.id)
            .field("issuer", &fields.issuer)
            .field("addresses", &fields.addresses)
            .field("pool", &fields.pool)
            .field("heads", &fields.heads)
            .field("parts_per_layer", &fields.parts_per_layer)
            .field("tail_capacity", &fields.tail_capacity)
            .field("valid_for", &fields.valid_for)
            .field("request", &fields.request)
            .field("pages", &fields.pages.len())
            .finish_non_exhaustive()
    }
}
