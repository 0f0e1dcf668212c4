//! An engine in another process, as the demo and the tests see it: started, asked, killed.

use std::{
    collections::VecDeque,
    io::{self, BufRead, BufReader, Write},
    path::Path,
    process::{Child, ChildStdin, Stdio},
    sync::mpsc::{Receiver, RecvTimeoutError, channel},
    time::{Duration, Instant},
};

use super::{
    protocol::{Command, Ready, Reply, State, What},
    worker::{KEY_VARIABLE, Options},
};

/// See the module's documentation. Killed when dropped.
pub struct Peer {
    process: Child,
    input: Option<ChildStdin>,
    replies: Receiver<Reply>,
    /// Events that came while something else was awaited.
    kept: VecDeque<(String, u64, What)>,
    /// What it said of itself.
    pub ready: Ready,
}

/// Why an engine does not answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PeerError {
    /// It cannot be started, or spoken to.
    #[error("engine process: {0}")]
    Io(#[from] io::Error),
    /// It has ended.
    #[error("the engine process has ended")]
    Gone,
    /// It takes too long.
    #[error("the engine process has said nothing for {0:?}")]
    Silent(Duration),
}

impl Peer {
    /// Starts `program` as an engine, and waits until it takes commands.
    ///
    /// # Errors
    ///
    /// It cannot be started, or does not say that it is ready.
    pub fn start(
        program: &Path,
        options: &Options,
        key: &str,
        patience: Duration,
    ) -> Result<Self, PeerError> {
        let mut process = std::process::Command::new(program)
            .args(options.arguments())
            .env(KEY_VARIABLE, key)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let input = process.stdin.take();
        let output = process.stdout.take().ok_or(PeerError::Gone)?;
        let (sender, replies) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                match serde_json::from_str(&line) {
                    Ok(reply) => {
                        if sender.send(reply).is_err() {
                            return;
                        }
                    }
                    Err(_) => eprintln!("{line}"),
                }
            }
        });
        let mut peer = Self {
            process,
            input,
            replies,
            kept: VecDeque::new(),
            ready: Ready::default(),
        };
        let end = Instant::now() + patience;
        while peer.ready.tp == 0 {
            if let Reply::Ready(ready) = peer.reply(end, patience)? {
                peer.ready = ready;
            }
        }
        Ok(peer)
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// Sends a command.
    ///
    /// # Errors
    ///
    /// It has ended.
    pub fn send(&mut self, command: &Command) -> Result<(), PeerError> {
        let line = serde_json::to_string(command).map_err(io::Error::from)?;
        let input = self.input.as_mut().ok_or(PeerError::Gone)?;
        writeln!(input, "{line}")?;
        Ok(input.flush()?)
    }

    /// The next event of any request: its id, when it was, what it is.
    ///
    /// # Errors
    ///
    /// It has ended, or takes longer than `patience`.
    pub fn event(&mut self, patience: Duration) -> Result<(String, u64, What), PeerError> {
        let end = Instant::now() + patience;
        loop {
            if let Some(event) = self.kept.pop_front() {
                return Ok(event);
            }
            if let Reply::Event { id, at, what } = self.reply(end, patience)? {
                self.kept.push_back((id, at, what));
            }
        }
    }

    /// How it is.
    ///
    /// # Errors
    ///
    /// It has ended, or takes longer than `patience`.
    pub fn state(&mut self, patience: Duration) -> Result<State, PeerError> {
        self.send(&Command::State)?;
        let end = Instant::now() + patience;
        loop {
            match self.reply(end, patience)? {
                Reply::State(state) => return Ok(state),
                Reply::Event { id, at, what } => self.kept.push_back((id, at, what)),
                Reply::Ready(_) => {}
            }
        }
    }

    fn reply(&mut self, end: Instant, patience: Duration) -> Result<Reply, PeerError> {
        let left = end.saturating_duration_since(Instant::now());
        self.replies
            .recv_timeout(left)
            .map_err(|error| match error {
                RecvTimeoutError::Timeout => PeerError::Silent(patience),
                RecvTimeoutError::Disconnected => PeerError::Gone,
            })
    }

    /// Ends it in good order.
    ///
    /// # Errors
    ///
    /// It did not end well.
    pub fn stop(mut self) -> Result<(), PeerError> {
        self.input = None;
        match self.process.wait()?.success() {
            true => Ok(()),
            false => Err(PeerError::Gone),
        }
    }

    /// Ends it as by `kill -9`.
    ///
    /// # Errors
    ///
    /// It has ended before.
    pub fn kill(mut self) -> Result<(), PeerError> {
        self.process.kill()?;
        self.process.wait()?;
        Ok(())
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // It has ended already, or is ended now; either is what is wanted.
        let _ended = self.process.kill();
        let _reaped = self.process.wait();
    }
}
