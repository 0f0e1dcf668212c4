//! How two endpoints know each other: the key of the control connection.

use std::fmt;

use blake2::{Blake2s256, Digest as _};

/// Separates keys derived from passphrases from every other use of the same text.
const PASSPHRASE_CONTEXT: &[u8] = b"kvpush control passphrase v1\0";

/// How the control connections of an endpoint are authenticated and encrypted. Both sides need the same.
///
/// With a key, control connections run the Noise protocol (`Noise_NNpsk0_25519_ChaChaPoly_BLAKE2s`, Noise revision
/// 34): peers without the key can neither connect nor read or change a message, and recorded traffic stays secret
/// even if the key leaks later. It protects the control connection only: what the fabric moves (RDMA writes) is
/// neither encrypted nor authenticated by it.
#[derive(Clone)]
pub struct Auth(Mode);

#[derive(Clone)]
enum Mode {
    Plaintext,
    Key([u8; 32]),
}

impl Auth {
    /// A key shared by all endpoints that may talk to each other. It must be random: 32 bytes from the operating
    /// system, not text.
    pub fn psk(key: [u8; 32]) -> Self {
        Self(Mode::Key(key))
    }

    /// A key derived from `text` by one BLAKE2s. There is no salt and no stretching, so it is as strong as the text
    /// is unguessable: use a long random secret, as `openssl rand -base64 32` prints it, and nothing a person thought
    /// of.
    pub fn passphrase(text: &str) -> Self {
        let hash = Blake2s256::new()
            .chain_update(PASSPHRASE_CONTEXT)
            .chain_update(text);
        Self(Mode::Key(hash.finalize().into()))
    }

    /// No authentication and no encryption: whoever reaches the control port can open sessions, and whoever sees a
    /// grant can use it. Only for tests and for networks that protect every packet by other means.
    pub fn insecure_plaintext() -> Self {
        Self(Mode::Plaintext)
    }

    /// Whether peers prove that they hold a key.
    pub fn is_authenticated(&self) -> bool {
        self.key().is_some()
    }

    pub(super) fn key(&self) -> Option<&[u8; 32]> {
        match &self.0 {
            Mode::Plaintext => None,
            Mode::Key(key) => Some(key),
        }
    }
}

impl fmt::Debug for Auth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            Mode::Plaintext => "Auth(plaintext)",
            Mode::Key(_) => "Auth(key)",
        })
    }
}
