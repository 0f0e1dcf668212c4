//! The driver thread: gives a core its time, its commands and its events, and sleeps when there is nothing to do.

use std::{
    io,
    net::TcpListener,
    os::fd::RawFd,
    sync::Arc,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use crossbeam::channel::Receiver;

use super::{
    Polling,
    control::{self, ConnId, ControlConfig, ControlHandle, ControlThread},
    core::{Command, Control, ControlEvent, Core},
    wake::WakeHandle,
};
use crate::{protocol::Time, wire::Auth};

/// Longest sleep. Nothing depends on it; it bounds the harm of a lost wake-up that a faulty device causes.
const LONGEST_SLEEP: Duration = Duration::from_secs(60);

/// The control thread as the core wants it.
pub(super) struct ControlAdapter(pub(super) ControlHandle);

impl Control for ControlAdapter {
    fn connect(&mut self, conn: ConnId, addresses: Vec<String>, timeout: Duration) {
        self.0.connect(conn, addresses, timeout);
    }

    fn send(&mut self, conn: ConnId, message: Vec<u8>) {
        self.0.send(conn, message);
    }

    fn close(&mut self, conn: ConnId) {
        self.0.close(conn);
    }
}

/// Starts the control thread on `listener`.
pub(super) fn start_control(
    listener: TcpListener,
    auth: Auth,
    wake: WakeHandle,
) -> io::Result<(ControlHandle, Receiver<control::ControlEvent>)> {
    let wake = Arc::new(move || wake.wake());
    ControlThread::spawn(Some(listener), auth, ControlConfig::default(), wake)
}

/// See the module's documentation.
pub(super) struct Driver {
    core: Core,
    commands: Receiver<Command>,
    events: Receiver<control::ControlEvent>,
    wake: WakeHandle,
    polling: Polling,
    origin: Instant,
    /// What to sleep on; kept so that sleeping does not allocate.
    polls: Vec<libc::pollfd>,
}

impl Driver {
    pub(super) fn new(
        core: Core,
        commands: Receiver<Command>,
        events: Receiver<control::ControlEvent>,
        wake: WakeHandle,
        polling: Polling,
    ) -> Self {
        Self {
            core,
            commands,
            events,
            wake,
            polling,
            origin: Instant::now(),
            polls: Vec::new(),
        }
    }

    /// Runs on a thread of its own until `closed` says so.
    pub(super) fn start(
        mut self,
        closed: impl Fn() -> bool + Send + 'static,
    ) -> io::Result<JoinHandle<()>> {
        std::thread::Builder::new()
            .name("kvpush-driver".to_owned())
            .spawn(move || self.run(closed))
    }

    fn run(&mut self, closed: impl Fn() -> bool) {
        let mut commands = Vec::new();
        let mut events = Vec::new();
        let mut last_active = Instant::now();
        loop {
            // Looked at first: what was commanded before the endpoint was closed is still carried out below, so that
            // whoever handed something over gets an answer.
            let closing = closed();
            events.extend(self.events.try_iter().map(ControlEvent::from));
            commands.extend(self.commands.try_iter());
            let active = self.core.step(self.now(), &mut commands, &mut events);
            if closing {
                self.core.shutdown();
                return;
            }
            let now = Instant::now();
            if active {
                last_active = now;
                continue;
            }
            match self.polling {
                Polling::Busy => std::hint::spin_loop(),
                Polling::Adaptive(spin) if now.duration_since(last_active) < spin => {
                    std::hint::spin_loop();
                }
                Polling::Adaptive(_) => {
                    self.sleep(&closed);
                    last_active = Instant::now();
                }
            }
        }
    }

    fn now(&self) -> Time {
        Time(u64::try_from(self.origin.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }

    fn sleep(&mut self, closed: &impl Fn() -> bool) {
        self.polls.clear();
        self.polls.push(readable(self.wake.fd()));
        for context in self.core.contexts() {
            match context.arm() {
                Ok(true) => self.polls.push(readable(context.wait_fd())),
                Ok(false) => return,
                // The next poll reports it in full.
                Err(error) => {
                    tracing::debug!(%error, "arming failed");
                    return;
                }
            }
        }
        self.wake.announce_sleep();
        if self.commands.is_empty() && self.events.is_empty() && !closed() {
            let timeout = self.core.next_deadline().map_or(LONGEST_SLEEP, |deadline| {
                self.now().until(deadline).min(LONGEST_SLEEP)
            });
            wait(&mut self.polls, timeout);
        }
        self.wake.awake();
    }
}

fn readable(fd: RawFd) -> libc::pollfd {
    libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    }
}

/// Sleeps until one of `polls` is ready or `timeout` has passed. A signal may end it early.
fn wait(polls: &mut [libc::pollfd], timeout: Duration) {
    let timeout = libc::timespec {
        tv_sec: timeout.as_secs() as libc::time_t,
        tv_nsec: timeout.subsec_nanos().into(),
    };
    // SAFETY: `polls` is an array of that many valid entries and `timeout` a valid time; no signal mask is given. The
    // descriptors are owned by the contexts and the wake handle, which live while the driver does.
    unsafe {
        libc::ppoll(
            polls.as_mut_ptr(),
            polls.len() as libc::nfds_t,
            &timeout,
            std::ptr::null(),
        )
    };
}

impl From<control::ControlEvent> for ControlEvent {
    fn from(event: control::ControlEvent) -> Self {
        match event {
            control::ControlEvent::Accepted { conn, peer } => Self::Accepted { conn, peer },
            control::ControlEvent::Connected { conn, peer, .. } => Self::Connected { conn, peer },
            control::ControlEvent::Message { conn, bytes } => Self::Message {
                conn,
                bytes: bytes.to_vec(),
            },
            control::ControlEvent::Closed { conn, reason } => Self::Closed { conn, reason },
        }
    }
}
