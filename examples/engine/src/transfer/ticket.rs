//! The encoding of a [`Ticket`]: what a decode engine says to the prefill engine, through gateways.
//!
//! Little-endian, versioned, with a length limit, and SHA-256 over all of it, so that what was damaged on the way is told
//! from what was never right. The digest is no authority: the grants inside carry their own secrets, and a ticket should
//! travel only where its pages may be written.
//!
//! ```text
//! "KVTK" version:u16 reserved:u16=0
//! model:[32] dtype:u8 block_tokens:u32 layers:u32 kv_heads:u32 prefill_tp:u16 decode_tp:u16
//! tokens:u32 prompt:[32] blocks:u32 held:u32 valid_for_ms:u64 id:len16
//! grants:u16 { source_rank:u16 destination_rank:u16 first_head:u32 heads:u32 grant:len32 }
//! sha256 of all before:[32]
//! ```
//!
//! Pure: no clock, no I/O; any thread. A ticket that decodes is consistent in itself ([`TicketFields::check`]).

use std::time::Duration;

use kvpush::{
    Grant, GrantError,
    kv::{
        HeadRange,
        shard::{self, Pair, ShardError},
    },
};
use sha2::{Digest, Sha256};

use super::{Ticket, TransferError, codec::Reader};

const MAGIC: &[u8; 4] = b"KVTK";
/// The version written, and the only one read.
pub const VERSION: u16 = 1;
/// Most bytes of a ticket.
pub const MAX_TICKET: usize = 1 << 20;
/// Most bytes of a request's id in it. Longer ids are cut at the end; they are for logs only.
pub const MAX_ID: usize = 128;
/// Most ranks of either side.
pub const MAX_TP: u32 = 256;

/// What two engines must have in common to exchange pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// [`ModelConfig::digest`](crate::model::ModelConfig::digest).
    pub model: [u8; 32],
    /// Element type of the cache, as kvpush numbers it.
    pub dtype: u8,
    /// Tokens of a block.
    pub block_tokens: u32,
    /// Layers.
    pub layers: u32,
    /// KV heads of the whole model.
    pub kv_heads: u32,
}

/// What a ticket says.
#[derive(Clone, Debug)]
pub struct TicketFields {
    /// The decode engine's model and cache.
    pub identity: Identity,
    /// Ranks of the prefill engine.
    pub prefill_tp: u32,
    /// Ranks of the decode engine.
    pub decode_tp: u32,
    /// Tokens of the prompt.
    pub tokens: u32,
    /// Digest of the prompt.
    pub prompt: [u8; 32],
    /// Blocks of the prompt.
    pub blocks: u32,
    /// Of these, from the first on, those that the decode engine has.
    pub held: u32,
    /// How long it was valid when it was issued. Informative: the issuer's clock decides.
    pub valid_for: Duration,
    /// The request's id, for logs.
    pub id: String,
    /// The right to write, for each pair of ranks that have heads in common, in the order of
    /// [`kvpush::kv::shard::pairing`]. The tail goes with the first.
    pub grants: Vec<PairGrant>,
}

/// What one prefill rank may write to one decode rank.
#[derive(Clone, Debug)]
pub struct PairGrant {
    /// The ranks, and the heads.
    pub pair: Pair,
    /// The right.
    pub grant: Grant,
}

/// Why bytes are no ticket, or not one for this engine.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TicketError {
    /// It ends too early, or goes on too long.
    #[error("the ticket is cut off or has bytes too many: {0}")]
    Length(&'static str),
    /// It is longer than [`MAX_TICKET`].
    #[error("a ticket of {0} bytes; {MAX_TICKET} is the most")]
    TooLong(usize),
    /// It is something else.
    #[error("this is no ticket")]
    Magic,
    /// It is of another version.
    #[error("the ticket is of version {0}, this engine reads {VERSION}")]
    Version(u16),
    /// It has been changed on the way.
    #[error("the ticket has been changed on its way")]
    Damaged,
    /// A value is out of its range, or two contradict each other.
    #[error("the ticket makes no sense: {what} is {value}")]
    Value {
        /// Which.
        what: &'static str,
        /// The value.
        value: u64,
    },
    /// Heads cannot be shared out over these ranks.
    #[error("the ticket makes no sense: {0}")]
    Shard(#[from] ShardError),
    /// One of its grants is none.
    #[error("grant {index} of the ticket: {source}")]
    Grant {
        /// Which.
        index: usize,
        /// Why.
        source: GrantError,
    },
    /// The engines do not fit together.
    #[error("the engines do not match: {what} is {theirs} at the decode engine and {ours} here")]
    Mismatch {
        /// What differs.
        what: &'static str,
        /// There.
        theirs: String,
        /// Here.
        ours: String,
    },
}

impl From<TicketError> for TransferError {
    fn from(error: TicketError) -> Self {
        Self {
            message: error.to_string(),
            is_retryable: false,
        }
    }
}

impl TicketFields {
    /// As bytes.
    ///
    /// # Errors
    ///
    /// The fields contradict each other, or there are too many bytes.
    pub fn encode(&self) -> Result<Ticket, TicketError> {
        self.check()?;
        let mut out = Vec::with_capacity(256 + self.grants.len() * 256);
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&[0; 2]);
        let Identity {
            model,
            dtype,
            block_tokens,
            layers,
            kv_heads,
        } = self.identity;
        out.extend_from_slice(&model);
        out.push(dtype);
        for value in [block_tokens, layers, kv_heads] {
            out.extend_from_slice(&value.to_le_bytes());
        }
        // Both were checked to be small.
        for value in [self.prefill_tp as u16, self.decode_tp as u16] {
            out.extend_from_slice(&value.to_le_bytes());
        }
        out.extend_from_slice(&self.tokens.to_le_bytes());
        out.extend_from_slice(&self.prompt);
        out.extend_from_slice(&self.blocks.to_le_bytes());
        out.extend_from_slice(&self.held.to_le_bytes());
        let milliseconds = u64::try_from(self.valid_for.as_millis()).unwrap_or(u64::MAX);
        out.extend_from_slice(&milliseconds.to_le_bytes());
        let id = cut(&self.id);
        out.extend_from_slice(&(id.len() as u16).to_le_bytes());
        out.extend_from_slice(id.as_bytes());
        out.extend_from_slice(&(self.grants.len() as u16).to_le_bytes());
        for PairGrant { pair, grant } in &self.grants {
            out.extend_from_slice(&(pair.source_rank as u16).to_le_bytes());
            out.extend_from_slice(&(pair.destination_rank as u16).to_le_bytes());
            out.extend_from_slice(&pair.heads.first.to_le_bytes());
            out.extend_from_slice(&pair.heads.count.to_le_bytes());
            let grant = grant.encode();
            out.extend_from_slice(&(grant.len() as u32).to_le_bytes());
            out.extend_from_slice(&grant);
        }
        let digest = Sha256::digest(&out);
        out.extend_from_slice(&digest);
        if out.len() > MAX_TICKET {
            return Err(TicketError::TooLong(out.len()));
        }
        Ok(Ticket(out))
    }

    /// Reads what [`TicketFields::encode`] wrote. Memory is bounded by the input's length and [`MAX_TICKET`], beside the
    /// pages of grants, which [`Grant::decode`] bounds.
    ///
    /// # Errors
    ///
    /// Anything else.
    pub fn decode(bytes: &[u8]) -> Result<Self, TicketError> {
        if bytes.len() > MAX_TICKET {
            return Err(TicketError::TooLong(bytes.len()));
        }
        let mut reader = Reader::new(bytes);
        if reader.array("magic")? != *MAGIC {
            return Err(TicketError::Magic);
        }
        let version = reader.u16("version")?;
        if version != VERSION {
            return Err(TicketError::Version(version));
        }
        let (body, digest) = bytes
            .split_last_chunk::<32>()
            .ok_or(TicketError::Length("digest"))?;
        if *digest != *Sha256::digest(body) {
            return Err(TicketError::Damaged);
        }
        let mut reader = Reader::new(body.get(6..).ok_or(TicketError::Length("header"))?);
        let reserved = reader.u16("reserved")?;
        if reserved != 0 {
            return Err(value("the reserved field", reserved));
        }
        let identity = Identity {
            model: reader.array("model")?,
            dtype: reader.u8("dtype")?,
            block_tokens: reader.u32("block tokens")?,
            layers: reader.u32("layers")?,
            kv_heads: reader.u32("heads")?,
        };
        let prefill_tp = reader.u16("prefill ranks")?.into();
        let decode_tp = reader.u16("decode ranks")?.into();
        let tokens = reader.u32("tokens")?;
        let prompt = reader.array("prompt")?;
        let blocks = reader.u32("blocks")?;
        let held = reader.u32("held")?;
        let valid_for = Duration::from_millis(reader.u64("deadline")?);
        let length = usize::from(reader.u16("id")?);
        if length > MAX_ID {
            return Err(value("the id's length", length as u64));
        }
        let id = String::from_utf8_lossy(reader.take("id", length)?).into_owned();
        let count = usize::from(reader.u16("grants")?);
        // Each takes at least its fixed part, so a count cannot make us hold more than the input.
        let mut grants = Vec::with_capacity(count.min(body.len() / 16));
        for index in 0..count {
            let pair = Pair {
                source_rank: reader.u16("source rank")?.into(),
                destination_rank: reader.u16("destination rank")?.into(),
                heads: HeadRange::new(reader.u32("first head")?, reader.u32("head count")?),
            };
            let length = reader.u32("grant")? as usize;
            let grant = Grant::decode(reader.take("grant", length)?);
            let grant = grant.map_err(|source| TicketError::Grant { index, source })?;
            grants.push(PairGrant { pair, grant });
        }
        if !reader.is_empty() {
            return Err(TicketError::Length("bytes after the grants"));
        }
        let fields = Self {
            identity,
            prefill_tp,
            decode_tp,
            tokens,
            prompt,
            blocks,
            held,
            valid_for,
            id,
            grants,
        };
        fields.check()?;
        Ok(fields)
    }

    /// Whether the fields agree with each other.
    ///
    /// # Errors
    ///
    /// What does not.
    pub fn check(&self) -> Result<(), TicketError> {
        let Identity {
            block_tokens,
            kv_heads,
            ..
        } = self.identity;
        for (what, tp) in [
            ("the number of prefill ranks", self.prefill_tp),
            ("the number of decode ranks", self.decode_tp),
        ] {
            if !(1..=MAX_TP).contains(&tp) {
                return Err(value(what, tp));
            }
        }
        if block_tokens == 0 {
            return Err(value("the tokens of a block", block_tokens));
        }
        if self.tokens == 0 {
            return Err(value("the prompt's tokens", self.tokens));
        }
        if self.blocks != self.tokens.div_ceil(block_tokens) {
            return Err(value("the prompt's blocks", self.blocks));
        }
        if self.held >= self.blocks {
            return Err(value("the blocks held", self.held));
        }
        let pairs = shard::pairing(kv_heads, self.prefill_tp, self.decode_tp)?;
        if pairs.len() != self.grants.len() {
            return Err(value("the number of grants", self.grants.len() as u64));
        }
        let issuer = self.grants.first().map(|first| first.grant.issuer());
        for (wanted, PairGrant { pair, grant }) in pairs.iter().zip(&self.grants) {
            if wanted != pair || grant.heads() != pair.heads {
                return Err(value("the first head of a pair", pair.heads.first));
            }
            if grant.pages().len() as u64 != u64::from(self.blocks - self.held) {
                return Err(value("the pages of a grant", grant.pages().len() as u64));
            }
            if Some(grant.issuer()) != issuer {
                return Err(value("the issuer of a grant", 0u32));
            }
        }
        Ok(())
    }

    /// Whether an engine of `ours`, with `tp` ranks, that has computed `tokens` of digest `prompt`, may push to it.
    ///
    /// # Errors
    ///
    /// The first difference.
    pub fn check_for(
        &self,
        ours: &Identity,
        tp: u32,
        tokens: usize,
        prompt: &[u8; 32],
    ) -> Result<(), TicketError> {
        let theirs = &self.identity;
        if theirs.model != ours.model {
            return Err(mismatch(
                "the model",
                short(&theirs.model),
                short(&ours.model),
            ));
        }
        same("the cache's element type", &theirs.dtype, &ours.dtype)?;
        same(
            "the number of tokens of a block",
            &theirs.block_tokens,
            &ours.block_tokens,
        )?;
        same("the number of layers", &theirs.layers, &ours.layers)?;
        same("the number of KV heads", &theirs.kv_heads, &ours.kv_heads)?;
        same("the number of prefill ranks", &self.prefill_tp, &tp)?;
        same(
            "the number of the prompt's tokens",
            &(self.tokens as usize),
            &tokens,
        )?;
        if self.prompt != *prompt {
            return Err(mismatch("the prompt", short(&self.prompt), short(prompt)));
        }
        Ok(())
    }
}

fn value(what: &'static str, value: impl Into<u64>) -> TicketError {
    TicketError::Value {
        what,
        value: value.into(),
    }
}

fn mismatch(what: &'static str, theirs: String, ours: String) -> TicketError {
    TicketError::Mismatch { what, theirs, ours }
}

fn same<T: PartialEq + ToString>(
    what: &'static str,
    theirs: &T,
    ours: &T,
) -> Result<(), TicketError> {
    if theirs == ours {
        return Ok(());
    }
    Err(mismatch(what, theirs.to_string(), ours.to_string()))
}

/// The first bytes of a digest, for people.
fn short(digest: &[u8; 32]) -> String {
    digest[..6]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// At most [`MAX_ID`] bytes of whole characters.
pub(super) fn cut(id: &str) -> &str {
    let mut end = id.len().min(MAX_ID);
    while !id.is_char_boundary(end) {
        end -= 1;
    }
    &id[..end]
}
