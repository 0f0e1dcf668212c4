//! How a socket becomes a lane's: the dialler names the acceptor's token and its own, the acceptor answers in kind.
//! The context's thread only.
//!
//! Nothing but one fixed-size hello is read from a socket that has not proved itself.

use std::{
    io::{self, Read, Write},
    time::Instant,
};

use mio::net::TcpStream;

use super::{
    super::software::Failure,
    lane::{Fault, Lane, Phase},
    wire::{Hello, same_token},
};

/// A hello on its way in.
#[derive(Debug)]
pub(super) struct Greeting {
    bytes: [u8; Hello::BYTES],
    have: usize,
}

/// How far a hello is.
pub(super) enum Progress {
    /// More bytes are to come.
    Partial,
    /// Here it is.
    Done(Hello),
    /// It is none.
    Refused,
}

impl Greeting {
    pub(super) fn new() -> Self {
        Self {
            bytes: [0; Hello::BYTES],
            have: 0,
        }
    }

    /// Reads what is there, and never past the hello.
    pub(super) fn read(&mut self, stream: &mut TcpStream) -> io::Result<Progress> {
        while let Some(room) = self
            .bytes
            .get_mut(self.have..)
            .filter(|room| !room.is_empty())
        {
            match stream.read(room) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => self.have += n,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Ok(Progress::Partial);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(Hello::decode(&self.bytes).map_or(Progress::Refused, Progress::Done))
    }
}

/// An accepted socket that is no lane's yet.
#[derive(Debug)]
pub(super) struct Pending {
    pub(super) stream: TcpStream,
    pub(super) greeting: Greeting,
    /// A complete hello whose lane is not connected on this side yet.
    pub(super) hello: Option<Hello>,
    pub(super) deadline: Option<Instant>,
}

impl Lane {
    /// The peer's hello for this lane has arrived on `stream`: answer it and go live.
    pub(super) fn adopt(&mut self, mut stream: TcpStream, hello: &Hello) {
        let answer = self.hello();
        // The first bytes on a new socket always fit its buffer.
        match stream.write(zerocopy::IntoBytes::as_bytes(&answer)) {
            Ok(Hello::BYTES) => {
                self.stream = Some(stream);
                self.readable = true;
                self.writable = true;
                self.go_live(hello);
            }
            Ok(_) => self.fail(Failure::lost(libc::EPIPE)),
            Err(error) => self.fail(Failure::lost(error.raw_os_error().unwrap_or(libc::EPIPE))),
        }
    }

    /// The dialler's socket is writable for the first time: connected, or not.
    pub(super) fn finish_connect(&mut self) -> Result<(), Fault> {
        let lost = |error: io::Error| {
            Fault::Fail(Failure::lost(error.raw_os_error().unwrap_or(libc::EPIPE)))
        };
        let hello = self.hello();
        let Some(stream) = &mut self.stream else {
            return Ok(());
        };
        if let Some(error) = stream.take_error().map_err(lost)? {
            return Err(lost(error));
        }
        match stream.peer_addr() {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotConnected => {
                self.writable = false;
                return Ok(());
            }
            Err(error) => return Err(lost(error)),
        }
        match stream.write(zerocopy::IntoBytes::as_bytes(&hello)) {
            Ok(Hello::BYTES) => {
                self.phase = Phase::Greeting;
                Ok(())
            }
            Ok(_) => Err(Fault::Fail(Failure::lost(libc::EPIPE))),
            Err(error) => Err(lost(error)),
        }
    }

    /// The acceptor answers; it must know both tokens.
    pub(super) fn read_greeting(&mut self) -> Result<(), Fault> {
        let Some(stream) = &mut self.stream else {
            return Ok(());
        };
        match self.greeting.read(stream) {
            Ok(Progress::Partial) => self.readable = false,
            Ok(Progress::Done(hello))
                if same_token(&hello.to, &self.token)
                    && same_token(&hello.from, &self.peer_token) =>
            {
                self.go_live(&hello);
            }
            Ok(Progress::Done(_) | Progress::Refused) => {
                return Err(Fault::Fail(Failure::lost(libc::EPROTO)));
            }
            Err(error) => {
                let errno = error.raw_os_error().unwrap_or(libc::ECONNRESET);
                return Err(Fault::Fail(Failure::lost(errno)));
            }
        }
        Ok(())
    }
}
