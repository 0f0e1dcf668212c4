//! Messages between pusher and server: one JSON object per line over TCP, beside the endpoints' own connections.
//!
//! Plain and unauthenticated on purpose: all it can do is have a server take scratch memory within its limit, hand
//! out grants for that memory, and report. Writing there still needs the endpoint's key. Lines are bounded.

use std::{
    io::{BufRead, BufReader, ErrorKind, Read, Write},
    net::{IpAddr, Shutdown, TcpStream},
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{
    error::{Context, Error, Result},
    signals,
    workload::Workload,
};

/// Changes with every incompatible change of the messages.
pub(crate) const PROTOCOL: u32 = 2;

/// Most bytes of one line. A grant of the most pages there are, in hexadecimal, fits.
const MAX_LINE: u64 = 4 << 20;

/// How often a wait looks whether it is time to stop.
const TICK: Duration = Duration::from_millis(250);

/// What the pusher says.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) enum ToServer {
    /// First of all.
    Hello { protocol: u32, version: String },
    /// Make pools and endpoints for this.
    Case { workload: Box<Workload> },
    /// Poison the pools and issue grants for the first `requests` requests.
    Round { seed: u64, requests: u32 },
    /// Everything is open; the clock runs.
    Start,
    /// One-sided access is over; look at the bytes.
    Done,
    /// Drop pools and endpoints.
    End,
}

/// What the server says.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub(crate) enum ToPusher {
    /// Answer to `Hello`.
    Hello {
        protocol: u32,
        version: String,
        memory_limit: u64,
    },
    /// Answer to `Case`.
    Ready {
        rails: Vec<Rail>,
        why_no_rdma: Option<String>,
        /// Where the pools are.
        memory: String,
    },
    /// Part of the answer to `Round`: one for each request and pair of ranks.
    Grant {
        request: u32,
        source_rank: u32,
        data: String,
    },
    /// Part of the answer to `Round`, for one-sided access.
    Token { data: String },
    /// End of the answer to `Round`.
    Go,
    /// Layers that have arrived since `Start`.
    Progress { layers: u64 },
    /// End of a round.
    Verified(Verified),
    /// Cannot be done; the session goes on if it can.
    Refused { message: String },
}

/// What the server found at the end of a round.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Verified {
    /// Bytes compared.
    pub(crate) bytes: u64,
    /// CPU seconds from `Start` until everything had arrived.
    pub(crate) cpu_seconds: f64,
    /// What is wrong, if anything is.
    pub(crate) failure: Option<String>,
}

/// One rail of a side.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Rail {
    pub(crate) fabric: String,
    pub(crate) device: String,
    pub(crate) address: String,
    pub(crate) mtu: u32,
}

/// One end of the conversation.
#[derive(Debug)]
pub(crate) struct Connection {
    reader: BufReader<TcpStream>,
    writer: TcpStream,
    peer: String,
    line: Vec<u8>,
}

/// The half that sends.
#[derive(Debug)]
pub(crate) struct Sender<'a> {
    writer: &'a TcpStream,
    peer: &'a str,
}

impl Connection {
    pub(crate) fn new(stream: TcpStream, peer: String) -> Result<Self> {
        let setup = || {
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(TICK))?;
            stream.set_write_timeout(Some(Duration::from_secs(30)))?;
            stream.try_clone()
        };
        let reader = BufReader::new(setup().context(&peer)?);
        Ok(Self {
            reader,
            writer: stream,
            peer,
            line: Vec::new(),
        })
    }

    /// The address at this end, which is what the peer has dialled or sees.
    pub(crate) fn local_ip(&self) -> Result<IpAddr> {
        let address = self
            .writer
            .local_addr()
            .context("address of the connection")?;
        Ok(address.ip().to_canonical())
    }

    /// Splits off the sending half.
    pub(crate) fn sender(&self) -> Result<Closer> {
        Ok(Closer(self.writer.try_clone().context(&self.peer)?))
    }

    pub(crate) fn send(&mut self, message: &impl Serialize) -> Result<()> {
        Sender {
            writer: &self.writer,
            peer: &self.peer,
        }
        .send(message)
    }

    /// The next message, `None` at the end of the conversation.
    pub(crate) fn receive<T: DeserializeOwned>(&mut self, timeout: Duration) -> Result<Option<T>> {
        let deadline = Instant::now() + timeout;
        loop {
            let room = MAX_LINE.saturating_sub(self.line.len() as u64);
            match self
                .reader
                .by_ref()
                .take(room)
                .read_until(b'\n', &mut self.line)
            {
                Ok(_) if self.line.ends_with(b"\n") => {
                    let message = serde_json::from_slice(&self.line);
                    self.line.clear();
                    return message.map(Some).context(format_args!(
                        "{} sent what is no message of kvpush-bench",
                        self.peer
                    ));
                }
                Ok(_) if self.line.len() as u64 >= MAX_LINE => {
                    return Err(Error::failed(format!(
                        "{} sent a line of more than {MAX_LINE} bytes",
                        self.peer
                    )));
                }
                Ok(_) if self.line.is_empty() => return Ok(None),
                Ok(_) => {
                    return Err(Error::failed(format!(
                        "{} stopped in the middle of a message",
                        self.peer
                    )));
                }
                Err(error)
                    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) =>
                {
                    signals::check()?;
                    if Instant::now() >= deadline {
                        return Err(Error::failed(format!(
                            "{} said nothing for {timeout:?}",
                            self.peer
                        )));
                    }
                }
                Err(error) => return Err(error).context(&self.peer),
            }
        }
    }

    /// The next message, which must come.
    pub(crate) fn expect<T: DeserializeOwned>(&mut self, timeout: Duration) -> Result<T> {
        self.receive(timeout)?
            .ok_or_else(|| Error::failed(format!("{} has closed the connection", self.peer)))
    }
}

impl Sender<'_> {
    fn send(mut self, message: &impl Serialize) -> Result<()> {
        let mut line = serde_json::to_vec(message).context("encode a message")?;
        line.push(b'\n');
        self.writer.write_all(&line).context(self.peer)
    }
}

/// Ends a conversation from another thread.
#[derive(Debug)]
pub(crate) struct Closer(TcpStream);

impl Closer {
    pub(crate) fn close(&self) {
        // Fails only if it is closed already.
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

/// Bytes as text.
pub(crate) fn to_hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes
        .iter()
        .fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
            // Writing to a string cannot fail.
            let _ = write!(text, "{byte:02x}");
            text
        })
}

/// The bytes of [`to_hex`].
pub(crate) fn from_hex(text: &str) -> Result<Vec<u8>> {
    let bad = || Error::failed("the server sent a grant that is no hexadecimal number");
    let digits: Option<Vec<u8>> = text
        .chars()
        .map(|digit| {
            digit
                .to_digit(16)
                .and_then(|digit| u8::try_from(digit).ok())
        })
        .collect();
    let digits = digits
        .filter(|digits| digits.len() % 2 == 0)
        .ok_or_else(bad)?;
    Ok(digits
        .chunks_exact(2)
        .map(|pair| pair.iter().fold(0, |byte, digit| byte << 4 | digit))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    fn pair() -> (TcpStream, Connection) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (
            stream,
            Connection::new(listener.accept().unwrap().0, "peer".into()).unwrap(),
        )
    }

    #[test]
    fn messages_in_pieces_are_put_together_and_rubbish_is_refused() {
        let (mut stream, mut connection) = pair();
        let writer = std::thread::spawn(move || {
            for piece in [
                "{\"type\":",
                "\"round\",\"seed\":5,",
                "\"requests\":2}\n{\"type\":\"done\"}\nnonsense\n",
            ] {
                stream.write_all(piece.as_bytes()).unwrap();
                std::thread::sleep(TICK + TICK / 4);
            }
        });
        let wait = Duration::from_secs(20);
        assert!(matches!(
            connection.expect(wait),
            Ok(ToServer::Round {
                seed: 5,
                requests: 2
            })
        ));
        assert!(matches!(connection.expect(wait), Ok(ToServer::Done)));
        assert!(connection.expect::<ToServer>(wait).is_err());
        assert!(matches!(connection.receive::<ToServer>(wait), Ok(None)));
        writer.join().unwrap();
    }

    #[test]
    fn silence_and_endless_lines_end() {
        let (mut stream, mut connection) = pair();
        let error = connection
            .receive::<ToServer>(Duration::from_millis(1))
            .unwrap_err();
        assert!(error.to_string().contains("said nothing"), "{error}");
        let writer = std::thread::spawn(move || {
            let megabyte = vec![b' '; 1 << 20];
            // Fails as soon as the other side has had enough.
            while stream.write_all(&megabyte).is_ok() {}
        });
        let error = connection
            .receive::<ToServer>(Duration::from_secs(20))
            .unwrap_err();
        assert!(error.to_string().contains("a line of more than"), "{error}");
        drop(connection);
        writer.join().unwrap();
    }

    #[test]
    fn hexadecimal_there_and_back() {
        let bytes: Vec<u8> = (0..=255).collect();
        assert_eq!(from_hex(&to_hex(&bytes)).unwrap(), bytes);
        assert!(from_hex("abc").is_err() && from_hex("zz").is_err() && from_hex("é0").is_err());
    }
}
