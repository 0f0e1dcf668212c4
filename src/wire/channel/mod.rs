//! The authenticated stream of a control connection, without I/O: bytes of the socket in, messages out, and back.
//!
//! Both sides begin with nine bytes in the clear: `KVPUSH`, the protocol version and the mode of authentication, so
//! that a foreign protocol, another version and a plaintext peer are told apart from a wrong key. In plaintext mode
//! messages follow at once. With a key, Noise `NNpsk0` follows, in records of a two-byte length and at most 65,535
//! bytes of ciphertext; the preamble is its prologue, so changing it breaks the handshake.
//!
//! * The first Noise message can be replayed, so a responder trusts the initiator only after a first record that
//!   needs the keys of this very handshake: an empty one, which the initiator sends unasked.
//! * A handshake record of length zero says that authentication failed. It is not itself authenticated, which gives
//!   an attacker nothing that cutting the connection would not.
//! * Until the peer is authenticated this side holds less than 512 bytes for it.
//! * After an error every further call returns that error.

mod error;
mod frames;
#[cfg(test)]
mod tests;

use snow::{HandshakeState, TransportState};

use super::auth::Auth;
use super::{MAX_MESSAGE, PROTOCOL_VERSION};
pub use error::ChannelError;
use frames::{Frames, fill};

const MAGIC: &[u8; 6] = b"KVPUSH";
const MODE_PLAINTEXT: u8 = 0;
const MODE_NOISE: u8 = 1;
const PREAMBLE: usize = 9;
const PATTERN: &str = "Noise_NNpsk0_25519_ChaChaPoly_BLAKE2s";

/// Bytes in front of each record.
const RECORD_HEADER: usize = 2;
/// Most bytes of a record's ciphertext, by the Noise specification.
const MAX_RECORD: usize = 65_535;
/// Bytes a record's ciphertext has more than its plaintext.
const TAG: usize = 16;
/// Exact size of both handshake messages: an ephemeral key and a tag.
const HANDSHAKE_RECORD: usize = 32 + TAG;
/// Most bytes queued by this side before the handshake is over.
const MAX_HELD: usize = MAX_MESSAGE + (1 << 20);

/// One side of a control connection's stream.
pub(crate) struct Channel {
    state: State,
    initiator: bool,
    ours: [u8; PREAMBLE],
    /// The preamble or record being received.
    unit: Vec<u8>,
    frames: Frames,
    /// For the socket, not yet taken.
    output: Vec<u8>,
    /// Framed messages that wait for the handshake.
    held: Vec<u8>,
    plaintext: Vec<u8>,
}

enum State {
    /// Waits for the peer's preamble; the handshake is none in plaintext mode.
    Preamble(Option<Box<HandshakeState>>),
    /// Waits for the peer's handshake record.
    Handshake(Box<HandshakeState>),
    /// Responder: waits for the record that proves the initiator is not a replay.
    Confirmation(Box<TransportState>),
    Encrypted(Box<TransportState>),
    Plaintext,
    Failed(ChannelError),
}

impl Channel {
    /// The side that dialled.
    pub(crate) fn initiator(auth: &Auth) -> Result<Self, ChannelError> {
        Self::new(auth, true)
    }

    /// The side that accepted.
    pub(crate) fn responder(auth: &Auth) -> Result<Self, ChannelError> {
        Self::new(auth, false)
    }

    fn new(auth: &Auth, initiator: bool) -> Result<Self, ChannelError> {
        let mode = match auth.key() {
            Some(_) => MODE_NOISE,
            None => MODE_PLAINTEXT,
        };
        let [v0, v1] = PROTOCOL_VERSION.to_le_bytes();
        let [a, b, c, d, e, f] = *MAGIC;
        let ours = [a, b, c, d, e, f, v0, v1, mode];
        let mut output = ours.to_vec();
        let mut handshake = None;
        if let Some(key) = auth.key() {
            let mut state = Box::new(build(key, &ours, initiator).map_err(crypto)?);
            if initiator {
                append_handshake(&mut state, &mut output)?;
            }
            handshake = Some(state);
        }
        Ok(Self {
            state: State::Preamble(handshake),
            initiator,
            ours,
            unit: Vec::new(),
            frames: Frames::default(),
            output,
            held: Vec::new(),
            plaintext: Vec::new(),
        })
    }

    /// Whether the peer is authenticated (or plaintext was agreed) and messages flow.
    pub(crate) fn is_established(&self) -> bool {
        matches!(self.state, State::Encrypted(_) | State::Plaintext)
    }

    /// What must go to the socket now: preamble, handshake, messages that waited for it, or the notice of a failure.
    pub(crate) fn take_output(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.output)
    }

    /// Takes bytes from the socket and appends complete messages. Messages that came before an error are delivered.
    pub(crate) fn read(
        &mut self,
        mut bytes: &[u8],
        messages: &mut Vec<Vec<u8>>,
    ) -> Result<(), ChannelError> {
        while self.step(&mut bytes, messages).inspect_err(|error| {
            self.state = State::Failed(error.clone());
            self.unit = Vec::new();
            self.frames = Frames::default();
        })? {}
        Ok(())
    }

    /// Frames and encrypts `message` to the end of `out`, or holds it back until the handshake is over.
    pub(crate) fn write(&mut self, message: &[u8], out: &mut Vec<u8>) -> Result<(), ChannelError> {
        if message.len() > MAX_MESSAGE {
            let length = message.len() as u64;
            return Err(ChannelError::Oversize { length });
        }
        let header = (message.len() as u32).to_le_bytes();
        match &mut self.state {
            State::Failed(error) => Err(error.clone()),
            State::Plaintext => {
                out.append(&mut self.output);
                out.extend_from_slice(&header);
                out.extend_from_slice(message);
                Ok(())
            }
            State::Encrypted(transport) => {
                out.append(&mut self.output);
                let first = message.len().min(MAX_RECORD - TAG - header.len());
                let (now, rest) = message.split_at_checked(first).unwrap_or((message, &[]));
                self.plaintext.clear();
                self.plaintext.extend_from_slice(&header);
                self.plaintext.extend_from_slice(now);
                encrypt(transport, &self.plaintext, out)?;
                encrypt_all(transport, rest, out)
            }
            State::Preamble(_) | State::Handshake(_) | State::Confirmation(_) => {
                if self.held.len() + header.len() + message.len() > MAX_HELD {
                    return Err(ChannelError::HeldTooMuch { limit: MAX_HELD });
                }
                self.held.extend_from_slice(&header);
                self.held.extend_from_slice(message);
                Ok(())
            }
        }
    }

    /// Consumes one unit of `bytes`. `false` once nothing complete is left.
    fn step(
        &mut self,
        bytes: &mut &[u8],
        messages: &mut Vec<Vec<u8>>,
    ) -> Result<bool, ChannelError> {
        match &mut self.state {
            State::Failed(error) => return Err(error.clone()),
            State::Plaintext => {
                self.frames.push(bytes, messages)?;
                *bytes = &[];
                return Ok(false);
            }
            State::Encrypted(transport) => {
                let Some(length) = record(&mut self.unit, bytes, TAG..=MAX_RECORD)? else {
                    return Ok(false);
                };
                self.plaintext.resize(length, 0);
                let ciphertext = self.unit.get(RECORD_HEADER..).unwrap_or_default();
                let size = transport
                    .read_message(ciphertext, &mut self.plaintext)
                    .map_err(|_| ChannelError::Decrypt)?;
                self.unit.clear();
                let plaintext = self.plaintext.get(..size).unwrap_or_default();
                self.frames.push(plaintext, messages)?;
                return Ok(true);
            }
            State::Preamble(_) if !fill(&mut self.unit, PREAMBLE, bytes) => return Ok(false),
            State::Handshake(_) => {
                let sizes = HANDSHAKE_RECORD..=HANDSHAKE_RECORD;
                if record(&mut self.unit, bytes, sizes)?.is_none() {
                    return Ok(false);
                }
            }
            State::Confirmation(_) if record(&mut self.unit, bytes, TAG..=TAG)?.is_none() => {
                return Ok(false);
            }
            State::Preamble(_) | State::Confirmation(_) => {}
        }
        self.advance()?;
        self.unit.clear();
        Ok(true)
    }

    /// Moves to the next state of the handshake with the complete `unit`.
    fn advance(&mut self) -> Result<(), ChannelError> {
        let broken = State::Failed(ChannelError::Handshake("interrupted"));
        self.state = match std::mem::replace(&mut self.state, broken) {
            State::Preamble(handshake) => {
                check_preamble(&self.unit, &self.ours)?;
                match handshake {
                    Some(handshake) => State::Handshake(handshake),
                    None => {
                        self.output.append(&mut self.held);
                        State::Plaintext
                    }
                }
            }
            State::Handshake(mut handshake) => {
                if let Err(error) =
                    self.read_record(|record, out| handshake.read_message(record, out))
                {
                    // Tell the other side, which cannot find out by itself.
                    self.output.extend_from_slice(&[0; RECORD_HEADER]);
                    return Err(error);
                }
                if !self.initiator {
                    append_handshake(&mut handshake, &mut self.output)?;
                }
                let mut transport = handshake.into_transport_mode().map_err(crypto)?;
                if self.initiator {
                    encrypt(&mut transport, &[], &mut self.output)?;
                    self.release(Box::new(transport))?
                } else {
                    State::Confirmation(Box::new(transport))
                }
            }
            State::Confirmation(mut transport) => {
                self.read_record(|record, out| transport.read_message(record, out))?;
                self.release(transport)?
            }
            other => other,
        };
        Ok(())
    }

    /// Decrypts the complete record, which must be empty inside.
    fn read_record(
        &self,
        decrypt: impl FnOnce(&[u8], &mut [u8]) -> Result<usize, snow::Error>,
    ) -> Result<(), ChannelError> {
        let record = self.unit.get(RECORD_HEADER..).unwrap_or_default();
        match decrypt(record, &mut [0; HANDSHAKE_RECORD]) {
            Ok(0) => Ok(()),
            Ok(_) => Err(ChannelError::Handshake("unexpected payload")),
            Err(_) => Err(ChannelError::Authentication {
                told_by_peer: false,
            }),
        }
    }

    /// The handshake is over: what waited for it goes out.
    fn release(&mut self, mut transport: Box<TransportState>) -> Result<State, ChannelError> {
        encrypt_all(&mut transport, &self.held, &mut self.output)?;
        self.held = Vec::new();
        Ok(State::Encrypted(transport))
    }
}

impl std::fmt::Debug for Channel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Channel")
            .field("initiator", &self.initiator)
            .field("established", &self.is_established())
            .finish_non_exhaustive()
    }
}

fn build(key: &[u8; 32], prologue: &[u8], initiator: bool) -> Result<HandshakeState, snow::Error> {
    let builder = snow::Builder::new(PATTERN.parse()?)
        .psk(0, key)?
        .prologue(prologue)?;
    match initiator {
        true => builder.build_initiator(),
        false => builder.build_responder(),
    }
}

/// `snow` errors that an input cannot cause.
fn crypto(error: snow::Error) -> ChannelError {
    ChannelError::Crypto(error.to_string())
}

fn check_preamble(theirs: &[u8], ours: &[u8; PREAMBLE]) -> Result<(), ChannelError> {
    let (Some([a, b, c, d, e, f, v0, v1, mode]), [.., our_mode]) =
        (theirs.first_chunk::<PREAMBLE>(), ours)
    else {
        return Err(ChannelError::Handshake("short preamble"));
    };
    let received = [*a, *b, *c, *d, *e, *f];
    if received != *MAGIC {
        return Err(ChannelError::NotKvpush { received });
    }
    let version = u16::from_le_bytes([*v0, *v1]);
    if version != PROTOCOL_VERSION {
        return Err(ChannelError::Version {
            theirs: version,
            ours: PROTOCOL_VERSION,
        });
    }
    if mode != our_mode {
        return Err(ChannelError::AuthModeMismatch {
            theirs: *mode,
            ours: *our_mode,
        });
    }
    Ok(())
}

/// Completes a record in `unit`; its ciphertext's length once it is there.
fn record(
    unit: &mut Vec<u8>,
    bytes: &mut &[u8],
    sizes: std::ops::RangeInclusive<usize>,
) -> Result<Option<usize>, ChannelError> {
    if !fill(unit, RECORD_HEADER, bytes) {
        return Ok(None);
    }
    let length = unit.first_chunk().copied().map(u16::from_le_bytes);
    let length = usize::from(length.unwrap_or_default());
    if length == 0 && *sizes.start() == HANDSHAKE_RECORD {
        return Err(ChannelError::Authentication { told_by_peer: true });
    }
    if !sizes.contains(&length) {
        return Err(match *sizes.end() {
            MAX_RECORD => ChannelError::Decrypt,
            _ => ChannelError::Handshake("wrong record size"),
        });
    }
    Ok(fill(unit, RECORD_HEADER + length, bytes).then_some(length))
}

fn append_handshake(handshake: &mut HandshakeState, out: &mut Vec<u8>) -> Result<(), ChannelError> {
    let mut message = [0; HANDSHAKE_RECORD];
    let size = handshake.write_message(&[], &mut message).map_err(crypto)?;
    out.extend_from_slice(&(size as u16).to_le_bytes());
    out.extend_from_slice(message.get(..size).unwrap_or_default());
    Ok(())
}

/// Encrypts `plaintext` in as many records as it takes; none for none.
fn encrypt_all(
    transport: &mut TransportState,
    plaintext: &[u8],
    out: &mut Vec<u8>,
) -> Result<(), ChannelError> {
    plaintext
        .chunks(MAX_RECORD - TAG)
        .try_for_each(|chunk| encrypt(transport, chunk, out))
}

/// Appends one record.
fn encrypt(
    transport: &mut TransportState,
    plaintext: &[u8],
    out: &mut Vec<u8>,
) -> Result<(), ChannelError> {
    let size = plaintext.len() + TAG;
    let start = out.len() + RECORD_HEADER;
    out.extend_from_slice(&(size as u16).to_le_bytes());
    out.resize(start + size, 0);
    let ciphertext = out.get_mut(start..).unwrap_or_default();
    transport
        .write_message(plaintext, ciphertext)
        .map_err(crypto)?;
    Ok(())
}
