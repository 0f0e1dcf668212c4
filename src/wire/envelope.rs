//! The envelope of things that users carry from one endpoint to another (grants, region tokens): magic, version,
//! body, digest. The digest finds damage and truncation on the way; authority comes from the nonce in the body.

use zerocopy::little_endian::U16;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::codec::{WireError, Writer};
use super::ids::Digest;

/// Bytes that are not a usable grant or region token.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GrantError {
    /// Not the beginning of one.
    #[error("these bytes are not a kvpush {0}")]
    NotOne(&'static str),
    /// Issued by another version of the library.
    #[error(
        "{what} of version {theirs}, this library reads version {ours} (hint: run the same kvpush release on both sides)"
    )]
    VersionMismatch {
        /// Grant or region token.
        what: &'static str,
        /// The version found.
        theirs: u16,
        /// The version of this library.
        ours: u16,
    },
    /// Shorter or longer than any can be.
    #[error(
        "{what} of {length} bytes; it has {minimum} to {limit} (hint: it may have been cut on the way)"
    )]
    Length {
        /// Grant or region token.
        what: &'static str,
        /// Bytes given.
        length: usize,
        /// Least possible.
        minimum: usize,
        /// Greatest allowed.
        limit: usize,
    },
    /// Changed or cut on its way.
    #[error("{what} damaged on its way: its digest does not match")]
    Damaged {
        /// Grant or region token.
        what: &'static str,
    },
    /// A field breaks the rules.
    #[error(transparent)]
    Malformed(#[from] WireError),
}

/// One kind of envelope.
pub(super) struct Envelope {
    pub(super) what: &'static str,
    pub(super) magic: [u8; 4],
    pub(super) version: u16,
    /// Most bytes, envelope included.
    pub(super) limit: usize,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Header {
    magic: [u8; 4],
    version: U16,
}

const DIGEST: usize = 16;

impl Envelope {
    /// A writer that already holds the header.
    pub(super) fn begin(&self) -> Writer {
        let mut writer = Writer::new(self.what);
        let header = Header {
            magic: self.magic,
            version: U16::new(self.version),
        };
        writer.raw(header.as_bytes());
        writer
    }

    /// Appends the digest.
    pub(super) fn seal(&self, writer: Writer) -> Result<(Vec<u8>, Digest), GrantError> {
        let mut bytes = writer.finish();
        let digest = Digest::of(&bytes);
        bytes.extend_from_slice(digest.as_bytes());
        self.check_length(bytes.len())?;
        Ok((bytes, digest))
    }

    /// Checks everything but the body, and returns it.
    pub(super) fn open<'a>(&self, bytes: &'a [u8]) -> Result<(&'a [u8], Digest), GrantError> {
        // Magic and version first: another version may have other lengths and another digest.
        let Ok((header, _)) = Header::ref_from_prefix(bytes) else {
            return Err(self.length_error(bytes.len()));
        };
        if header.magic != self.magic {
            return Err(GrantError::NotOne(self.what));
        }
        if header.version.get() != self.version {
            return Err(GrantError::VersionMismatch {
                what: self.what,
                theirs: header.version.get(),
                ours: self.version,
            });
        }
        self.check_length(bytes.len())?;
        let Some((signed, trailer)) = bytes.split_last_chunk::<DIGEST>() else {
            return Err(self.length_error(bytes.len()));
        };
        let digest = Digest::of(signed);
        if !digest.matches(&Digest(*trailer)) {
            return Err(GrantError::Damaged { what: self.what });
        }
        match signed.split_at_checked(size_of::<Header>()) {
            Some((_, body)) => Ok((body, digest)),
            None => Err(self.length_error(bytes.len())),
        }
    }

    fn check_length(&self, length: usize) -> Result<(), GrantError> {
        let minimum = size_of::<Header>() + DIGEST;
        match (minimum..=self.limit).contains(&length) {
            true => Ok(()),
            false => Err(self.length_error(length)),
        }
    }

    fn length_error(&self, length: usize) -> GrantError {
        GrantError::Length {
            what: self.what,
            length,
            minimum: size_of::<Header>() + DIGEST,
            limit: self.limit,
        }
    }
}
