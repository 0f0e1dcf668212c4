//! A rank's threads: all of them run one closure, and the caller waits.
//!
//! A decode step opens some hundred of these short sections, so workers spin for a moment before they sleep. A worker
//! that comes late finds the section closed and is not waited for. Which thread does what is no part of any result.
//!
//! One thread at a time may call [`Team::run`] (it takes `&mut self`).

use std::{
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex};

/// Set in the gate while workers may enter; the bits below count those inside, the bits above the sections.
const OPEN: u64 = 1 << 16;
const SECTION: u64 = 1 << 17;
/// How long a worker spins before it sleeps.
const SPIN: Duration = Duration::from_micros(50);

/// The threads.
pub(crate) struct Team {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

struct Shared {
    gate: AtomicU64,
    job: Mutex<Option<Job>>,
    panicked: AtomicBool,
    stopped: AtomicBool,
    sleepers: AtomicUsize,
    lock: Mutex<()>,
    wake: Condvar,
}

/// A section's closure, with its lifetime erased.
#[derive(Clone, Copy)]
struct Job(*const (dyn Fn() + Sync));

// SAFETY: the closure is `Sync`, so any thread may call it; that it is alive is argued in `Team::run`.
unsafe impl Send for Job {}

impl Team {
    /// `threads` counts the caller.
    pub(crate) fn new(name: &str, threads: usize) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            gate: AtomicU64::new(0),
            job: Mutex::new(None),
            panicked: AtomicBool::new(false),
            stopped: AtomicBool::new(false),
            sleepers: AtomicUsize::new(0),
            lock: Mutex::new(()),
            wake: Condvar::new(),
        });
        let mut team = Self {
            shared,
            workers: Vec::new(),
        };
        for index in 1..threads {
            let shared = Arc::clone(&team.shared);
            team.workers.push(
                std::thread::Builder::new()
                    .name(format!("{name}-{index}"))
                    .spawn(move || shared.work())?,
            );
        }
        Ok(team)
    }

    /// Threads, with the caller.
    pub(crate) fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `section` on this thread and on every worker that comes in time; returns when all calls have.
    pub(crate) fn run(&mut self, section: &(dyn Fn() + Sync)) {
        if self.workers.is_empty() {
            return section();
        }
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes. Workers reach the pointer only between entering the open gate and leaving
        // it, and this function does not return (nor unwind) before the gate is closed and everyone has left.
        let job = unsafe {
            std::mem::transmute::<*const (dyn Fn() + Sync + '_), *const (dyn Fn() + Sync + 'static)>(
                section,
            )
        };
        *shared.job.lock() = Some(Job(job));
        shared.gate.fetch_add(SECTION | OPEN, SeqCst);
        if shared.sleepers.load(SeqCst) > 0 {
            drop(shared.lock.lock());
            shared.wake.notify_all();
        }
        let mine = catch_unwind(AssertUnwindSafe(section));
        shared.gate.fetch_and(!OPEN, SeqCst);
        let mut turns = 0u32;
        while shared.gate.load(SeqCst) & (OPEN - 1) > 0 {
            turns += 1;
            if turns.is_multiple_of(256) {
                std::thread::yield_now();
            }
            std::hint::spin_loop();
        }
        *shared.job.lock() = None;
        if let Err(panic) = mine {
            resume_unwind(panic);
        }
        assert!(
            !shared.panicked.swap(false, SeqCst),
            "a worker of the team has panicked"
        );
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.stopped.store(true, SeqCst);
        drop(self.shared.lock.lock());
        self.shared.wake.notify_all();
        for worker in self.workers.drain(..) {
            // Its panics have been told by `run`.
            let _ = worker.join();
        }
    }
}

impl Shared {
    fn work(&self) {
        let mut seen = 0;
        while !self.stopped.load(SeqCst) {
            let gate = self.gate.load(SeqCst);
            if gate & OPEN > 0 && gate / SECTION != seen {
                if self
                    .gate
                    .compare_exchange(gate, gate + 1, SeqCst, SeqCst)
                    .is_err()
                {
                    continue;
                }
                seen = gate / SECTION;
                let job = *self.job.lock();
                if let Some(Job(section)) = job {
                    // SAFETY: this thread is inside of the gate, so `run` keeps the closure alive.
                    let section = unsafe { &*section };
                    if catch_unwind(AssertUnwindSafe(section)).is_err() {
                        self.panicked.store(true, SeqCst);
                    }
                }
                self.gate.fetch_sub(1, SeqCst);
            } else {
                self.wait(seen);
            }
        }
    }

    /// Returns when there may be a section that is not `seen`, or the team ends.
    fn wait(&self, seen: u64) {
        let is_idle = || {
            let gate = self.gate.load(SeqCst);
            !self.stopped.load(SeqCst) && (gate & OPEN == 0 || gate / SECTION == seen)
        };
        let since = Instant::now();
        while is_idle() {
            for _ in 0..64 {
                std::hint::spin_loop();
            }
            if since.elapsed() > SPIN {
                let mut guard = self.lock.lock();
                self.sleepers.fetch_add(1, SeqCst);
                if is_idle() {
                    self.wake.wait(&mut guard);
                }
                self.sleepers.fetch_sub(1, SeqCst);
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_piece_is_done_once() {
        let mut team = Team::new("test", 3).unwrap();
        for round in 0..2000u64 {
            let mut out = vec![0u64; 37];
            let pieces = Mutex::new(out.chunks_mut(5));
            team.run(&|| {
                while let Some(piece) = { pieces.lock().next() } {
                    piece.iter_mut().for_each(|x| *x += round);
                }
            });
            assert!(out.iter().all(|&x| x == round));
            if round % 500 == 0 {
                std::thread::sleep(SPIN * 10);
            }
        }
    }

    #[test]
    fn a_panic_comes_back_and_the_team_goes_on() {
        let mut team = Team::new("test", 2).unwrap();
        let result = catch_unwind(AssertUnwindSafe(|| team.run(&|| panic!("planned"))));
        assert!(result.is_err());
        let calls = AtomicUsize::new(0);
        // The flag of a worker that panicked together with the caller is still up; it is reported once.
        let _ = catch_unwind(AssertUnwindSafe(|| team.run(&|| ())));
        team.run(&|| {
            calls.fetch_add(1, SeqCst);
        });
        assert!(calls.load(SeqCst) >= 1);
    }
}
