//! Dialling: names to addresses, off the control thread because the system's resolver blocks, and the account of
//! what was tried.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::time::{Duration, Instant};

use super::{Command, ConnId, Mailbox};

/// Most addresses tried for one connection, however many a name has.
const MAX_CANDIDATES: usize = 32;
/// Least time an address gets, so that a long list does not starve each of them.
const MIN_ATTEMPT: Duration = Duration::from_millis(250);

/// Why one address of a peer was of no use.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{address}{}: {error}", resolved(address, *peer))]
pub struct DialFailure {
    /// As it was given.
    pub address: String,
    /// What it resolved to.
    pub peer: Option<SocketAddr>,
    /// Why it failed.
    pub error: DialError,
}

/// Why an address was of no use.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DialError {
    /// The name has no address.
    #[error("cannot resolve: {0}")]
    Resolve(String),
    /// The system refused or lost the connection; the value is an errno.
    #[error("{}", os(*_0))]
    Os(i32),
    /// No answer in time.
    #[error("timed out")]
    Timeout,
    /// Connected, but closed before the peer had authenticated itself.
    #[error("the peer closed the connection during the handshake")]
    Closed,
}

fn resolved(address: &str, peer: Option<SocketAddr>) -> String {
    match peer {
        Some(peer) if peer.to_string() != address => format!(" ({peer})"),
        _ => String::new(),
    }
}

/// An errno for people.
pub(super) fn os(errno: i32) -> io::Error {
    io::Error::from_raw_os_error(errno)
}

/// The errno of an error of a socket.
pub(super) fn errno(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(libc::EIO)
}

/// Attempts for people.
pub(super) fn list(attempts: &[DialFailure]) -> impl fmt::Display {
    let texts: Vec<String> = attempts.iter().map(ToString::to_string).collect();
    match texts.is_empty() {
        true => "no address was given".to_owned(),
        false => texts.join("; "),
    }
}

/// One address to try.
pub(super) struct Candidate {
    pub(super) address: String,
    pub(super) peer: SocketAddr,
}

/// A connection being made.
pub(super) struct Dial {
    pub(super) deadline: Instant,
    pub(super) candidates: VecDeque<Candidate>,
    pub(super) failures: Vec<DialFailure>,
}

impl Dial {
    pub(super) fn new(deadline: Instant) -> Self {
        Self {
            deadline,
            candidates: VecDeque::new(),
            failures: Vec::new(),
        }
    }

    pub(super) fn fail(&mut self, address: &str, peer: Option<SocketAddr>, error: DialError) {
        self.failures.push(DialFailure {
            address: address.to_owned(),
            peer,
            error,
        });
    }

    /// Until when the candidate just taken may take: an equal share of what is left.
    pub(super) fn attempt_deadline(&self, now: Instant) -> Instant {
        let left = self.deadline.saturating_duration_since(now);
        let shares = u32::try_from(self.candidates.len() + 1).unwrap_or(u32::MAX);
        self.deadline.min(now + (left / shares).max(MIN_ATTEMPT))
    }

    /// Adds what resolution gave.
    pub(super) fn resolved(&mut self, resolved: Resolved) {
        for (address, result) in resolved.addresses {
            match result {
                Ok(peers) => {
                    let room = MAX_CANDIDATES.saturating_sub(self.candidates.len());
                    self.candidates
                        .extend(peers.into_iter().take(room).map(|peer| Candidate {
                            address: address.clone(),
                            peer,
                        }));
                }
                Err(error) => self.fail(&address, None, DialError::Resolve(error)),
            }
        }
    }
}

/// What the names of one dial stand for.
pub(super) struct Resolved {
    pub(super) conn: ConnId,
    pub(super) addresses: Vec<(String, Result<Vec<SocketAddr>, String>)>,
}

/// Resolves names on threads of their own, a few at a time.
pub(super) struct Resolver {
    mailbox: Mailbox,
    running: usize,
    waiting: VecDeque<(ConnId, Vec<String>)>,
}

impl Resolver {
    /// Most threads at a time; the system's resolver can take many seconds for one name.
    const MAX_THREADS: usize = 8;

    pub(super) fn new(mailbox: Mailbox) -> Self {
        Self {
            mailbox,
            running: 0,
            waiting: VecDeque::new(),
        }
    }

    /// At once if no address is a name; otherwise a [`Command::Resolved`] will come.
    pub(super) fn resolve(&mut self, conn: ConnId, addresses: Vec<String>) -> Option<Resolved> {
        let literals: Vec<_> = addresses
            .iter()
            .map_while(|address| {
                let peer = address.parse().ok()?;
                Some((address.clone(), Ok(vec![peer])))
            })
            .collect();
        if literals.len() == addresses.len() {
            return Some(Resolved {
                conn,
                addresses: literals,
            });
        }
        self.waiting.push_back((conn, addresses));
        self.start();
        None
    }

    /// To be called for each [`Command::Resolved`].
    pub(super) fn finished(&mut self) {
        self.running = self.running.saturating_sub(1);
        self.start();
    }

    fn start(&mut self) {
        while self.running < Self::MAX_THREADS {
            let Some((conn, addresses)) = self.waiting.pop_front() else {
                return;
            };
            self.running += 1;
            let mailbox = self.mailbox.clone();
            let names = addresses.clone();
            // Not joined: it holds only the mailbox and ends when the system's resolver answers.
            let spawned = std::thread::Builder::new()
                .name("kvpush-resolve".into())
                .spawn(move || mailbox.post(Command::Resolved(lookup(conn, names))));
            if let Err(error) = spawned {
                let error = format!("no thread for the resolver: {error}");
                let addresses = addresses
                    .into_iter()
                    .map(|address| (address, Err(error.clone())))
                    .collect();
                self.mailbox
                    .post(Command::Resolved(Resolved { conn, addresses }));
            }
        }
    }
}

fn lookup(conn: ConnId, addresses: Vec<String>) -> Resolved {
    let addresses = addresses
        .into_iter()
        .map(|address| {
            let result = match address.to_socket_addrs() {
                Ok(peers) => Ok(peers.take(MAX_CANDIDATES).collect()),
                Err(error) => Err(error.to_string()),
            };
            (address, result)
        })
        .collect();
    Resolved { conn, addresses }
}
