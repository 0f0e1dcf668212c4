//! The other process, as a test sees it: started, asked, signalled, and gone at the latest when the test is.

use std::{
    fmt::Display,
    io::{BufRead, BufReader, Write},
    net::SocketAddr,
    os::unix::process::CommandExt,
    process::{Child, ChildStdin, Command, Stdio},
    str::FromStr,
    sync::mpsc::{Receiver, RecvTimeoutError, channel},
    time::{Duration, Instant},
};

use base64::{Engine as _, engine::general_purpose::STANDARD_NO_PAD as BASE64};
use kvpush::{Grant, endpoint::Builder};

use crate::fixture::{Fabric, LONG};

/// What a process on a busy machine may take beyond the time that is configured. Less than any other time that
/// could end a wait (open 10 s, [`LONG`]), so that those are not mistaken for it.
pub(crate) const SLACK: Duration = Duration::from_secs(4);
/// Time a silent writer has when its grant is taken back.
pub(crate) const GRACE: Duration = Duration::from_millis(300);
/// Time that a push which stops waits for what is in flight.
pub(crate) const DRAIN: Duration = Duration::from_millis(700);

/// Marks a reply of the child among what the test harness prints.
pub(crate) const REPLY: &str = "@reply ";
/// Names the fabric to the child, and makes it one.
pub(crate) const ROLE: &str = "KVPUSH_TEST_CHILD";

/// The fabric of a case.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Over {
    Tcp,
    Shm,
    Verbs,
}

impl Over {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Shm => "shm",
            Self::Verbs => "verbs",
        }
    }

    pub(crate) fn fabric(self) -> Fabric {
        match self {
            Self::Tcp => Fabric::tcp(),
            Self::Shm => Fabric::shm(),
            Self::Verbs => Fabric::verbs(),
        }
    }

    /// An endpoint's builder with the times that the cases reckon with.
    pub(crate) fn builder(self, name: &str) -> Builder {
        let builder = self.fabric().builder(name);
        builder.revoke_grace(GRACE).drain_timeout(DRAIN)
    }
}

/// A child process. It is killed when dropped, and by the kernel when this process dies.
pub(crate) struct Peer {
    process: Child,
    input: ChildStdin,
    replies: Receiver<String>,
    pub(crate) address: SocketAddr,
}

impl Peer {
    /// Starts a child with an endpoint on a free port.
    pub(crate) fn start(over: Over, name: &str) -> Self {
        Self::start_with_lanes(over, name, 2)
    }

    /// Starts a child whose sessions have `lanes` lanes.
    pub(crate) fn start_with_lanes(over: Over, name: &str, lanes: u16) -> Self {
        let mut peer = Self::spawn(over);
        let address = SocketAddr::from(([127, 0, 0, 1], 0));
        peer.bind(name, address, lanes).expect("bind");
        peer
    }

    /// Starts a child with an endpoint on `address`, where its predecessor was.
    pub(crate) fn restart(over: Over, name: &str, address: SocketAddr) -> Self {
        let mut peer = Self::spawn(over);
        let end = Instant::now() + LONG;
        while let Err(error) = peer.bind(name, address, 2) {
            // Some outgoing connection of this busy machine may have the port for a while.
            assert!(
                Instant::now() < end && error.contains("in use"),
                "{address}: {error}"
            );
            std::thread::sleep(Duration::from_millis(50));
        }
        peer
    }

    fn bind(&mut self, name: &str, address: SocketAddr, lanes: u16) -> Result<(), String> {
        self.address = self
            .ask(format!("bind {name} {address} {lanes}"))?
            .parse()
            .expect("an address");
        Ok(())
    }

    /// Starts a child without an endpoint.
    pub(crate) fn spawn(over: Over) -> Self {
        let mut command = Command::new(std::env::current_exe().expect("this binary"));
        command
            .args(["child::entry", "--exact", "--ignored", "--nocapture"])
            .env(ROLE, over.name())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        // SAFETY: prctl(2) is a plain system call, allowed between fork and exec; it takes no memory of ours.
        unsafe {
            command.pre_exec(|| {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                Ok(())
            });
        }
        let mut process = command.spawn().expect("start the child");
        let input = process.stdin.take().expect("a pipe");
        let output = BufReader::new(process.stdout.take().expect("a pipe"));
        let (sender, replies) = channel();
        // Ends when the child does.
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                if let Some((_, reply)) = line.split_once(REPLY)
                    && sender.send(reply.to_owned()).is_err()
                {
                    return;
                }
            }
        });
        Self {
            process,
            input,
            replies,
            address: SocketAddr::from(([0, 0, 0, 0], 0)),
        }
    }

    /// Has the child obey `command`.
    #[track_caller]
    pub(crate) fn ask(&mut self, command: impl Display) -> Result<String, String> {
        self.send(command);
        self.answer()
    }

    /// Has the child begin to obey `command`; [`Peer::answer`] has the result.
    #[track_caller]
    pub(crate) fn send(&mut self, command: impl Display) {
        if let Err(error) = writeln!(self.input, "{command}") {
            panic!("the child has ended: {error}");
        }
    }

    /// The reply to the command before.
    #[track_caller]
    pub(crate) fn answer(&mut self) -> Result<String, String> {
        match self.replies.recv_timeout(LONG * 2) {
            Ok(reply) => match reply.split_once(' ') {
                Some(("ok", value)) => Ok(value.to_owned()),
                Some(("error", why)) => Err(why.to_owned()),
                _ => panic!("{reply}"),
            },
            Err(RecvTimeoutError::Timeout) => panic!("no answer from the child"),
            Err(RecvTimeoutError::Disconnected) => panic!("the child has ended"),
        }
    }

    /// Has the child obey `command`, which must succeed with a `T`.
    #[track_caller]
    pub(crate) fn get<T: FromStr>(&mut self, command: impl Display) -> T {
        let value = self.ask(command).expect("the child succeeds");
        match value.parse() {
            Ok(value) => value,
            Err(_) => panic!("{value}"),
        }
    }

    /// Has the child obey `command`, which must succeed.
    #[track_caller]
    pub(crate) fn tell(&mut self, command: impl Display) {
        self.ask(command).expect("the child succeeds");
    }

    /// Has the child issue a grant.
    #[track_caller]
    pub(crate) fn grant(&mut self, pages: &[u32], deadline: Duration) -> (usize, Grant) {
        let millis = deadline.as_millis();
        let reply: String = self.get(format!("grant {millis} {}", list(pages)));
        let (index, grant) = reply.split_once(' ').expect("two words");
        (index.parse().expect("a number"), decode(grant))
    }

    /// Has the child open `grant`.
    #[track_caller]
    pub(crate) fn open(&mut self, grant: &Grant) -> Result<usize, String> {
        let index = self.ask(format!("open {}", encode(grant)))?;
        Ok(index.parse().expect("a number"))
    }

    /// Sends `signal`.
    pub(crate) fn signal(&self, signal: libc::c_int) {
        let pid = self.process.id() as libc::pid_t;
        // SAFETY: a plain system call. The child has not been waited for, so the number is still its own.
        let result = unsafe { libc::kill(pid, signal) };
        assert_eq!(result, 0, "kill({pid}, {signal})");
    }

    /// Stops the child, and waits until all of its threads have stopped.
    pub(crate) fn stop(&self) {
        self.signal(libc::SIGSTOP);
        let pid = self.process.id() as libc::pid_t;
        let mut status = 0;
        // SAFETY: `status` is writable. Only this thread waits for the child.
        let found = unsafe { libc::waitpid(pid, &mut status, libc::WUNTRACED) };
        assert!(
            found == pid && libc::WIFSTOPPED(status),
            "the child has ended instead: {status:#x}"
        );
    }

    /// Lets a stopped child go on.
    pub(crate) fn resume(&self) {
        self.signal(libc::SIGCONT);
    }

    /// Kills the child, and returns once it is gone.
    pub(crate) fn kill(self) {
        drop(self);
    }

    /// Ends the child by `signal`, and returns once it is gone.
    pub(crate) fn end_by(mut self, signal: libc::c_int) {
        use std::os::unix::process::ExitStatusExt;
        self.signal(signal);
        let status = self.process.wait().expect("wait for the child");
        assert_eq!(status.signal(), Some(signal), "{status:?}");
    }

    /// The process.
    pub(crate) fn id(&self) -> u32 {
        self.process.id()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // Fails only if it is gone already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// `pages` as one word.
pub(crate) fn list(pages: &[u32]) -> String {
    let pages: Vec<String> = pages.iter().map(u32::to_string).collect();
    pages.join(",")
}

/// What [`list`] made.
pub(crate) fn unlist(pages: &str) -> Vec<u32> {
    let pages = pages.split(',');
    pages.map(|page| page.parse().expect("a page")).collect()
}

/// `grant` as one word.
pub(crate) fn encode(grant: &Grant) -> String {
    BASE64.encode(grant.encode())
}

/// What [`encode`] made.
pub(crate) fn decode(grant: &str) -> Grant {
    let bytes = BASE64.decode(grant).expect("base64");
    Grant::decode(&bytes).expect("a grant")
}
