//! Who has something to do: transfers that kvpush has woken, and those whose time has come.
//!
//! kvpush's driver threads, and the alarm's thread, mark a transfer as ready and call the engine's waker; the engine
//! thread takes the marks and polls the futures of those transfers, and no others. Nobody spins: the alarm sleeps until
//! the earliest time it was set to, and for ever without one.
//!
//! Invariant: a mark that is set after [`Ready::take`] has cleared it is seen by the next `take`, and the waker has been
//! called in between.

use std::{
    cmp::Reverse,
    collections::BinaryHeap,
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Wake, Waker},
    thread::JoinHandle,
    time::Instant,
};

use parking_lot::{Condvar, Mutex};

use super::RequestNumber;

/// What can be woken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Key {
    /// A push or a reservation.
    Transfer(RequestNumber),
    /// A ticket that is given back.
    Release(u64),
}

/// What is called when there is something to do.
type Notify = Arc<dyn Fn() + Send + Sync>;

/// The marks.
#[derive(Default)]
pub(super) struct Ready {
    marked: Mutex<Vec<Arc<Mark>>>,
    notify: Mutex<Option<Notify>>,
}

/// One transfer's mark; as a [`Waker`] it marks.
pub(super) struct Mark {
    key: Key,
    is_set: AtomicBool,
    ready: Arc<Ready>,
}

impl Ready {
    /// A mark for `key`, not set.
    pub(super) fn mark(self: &Arc<Self>, key: Key) -> Arc<Mark> {
        Arc::new(Mark {
            key,
            is_set: AtomicBool::new(false),
            ready: Arc::clone(self),
        })
    }

    /// Calls `notify` whenever something becomes ready, and now if something is.
    pub(super) fn on_ready(&self, notify: Notify) {
        *self.notify.lock() = Some(Arc::clone(&notify));
        if !self.marked.lock().is_empty() {
            notify();
        }
    }

    /// Clears the marks and says whose they were.
    pub(super) fn take(&self, keys: &mut Vec<Key>) {
        let marked = std::mem::take(&mut *self.marked.lock());
        keys.extend(marked.iter().map(|mark| {
            // Before the caller polls: what happens from here on marks again.
            mark.is_set.store(false, Ordering::SeqCst);
            mark.key
        }));
    }
}

impl Mark {
    /// Marks, and tells the engine unless it knows.
    pub(super) fn set(self: &Arc<Self>) {
        if self.is_set.swap(true, Ordering::SeqCst) {
            return;
        }
        self.ready.marked.lock().push(Arc::clone(self));
        // Called without the lock: it may do what it likes.
        let notify = self.ready.notify.lock().clone();
        if let Some(notify) = notify {
            notify();
        }
    }

    /// As a waker of futures.
    pub(super) fn waker(self: &Arc<Self>) -> Waker {
        Waker::from(Arc::clone(self))
    }
}

impl Wake for Mark {
    fn wake(self: Arc<Self>) {
        self.set();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.set();
    }
}

/// Marks transfers at given times. Its thread ends with it.
pub(super) struct Alarm {
    shared: Arc<AlarmShared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct AlarmShared {
    state: Mutex<AlarmState>,
    changed: Condvar,
}

#[derive(Default)]
struct AlarmState {
    due: BinaryHeap<Reverse<Due>>,
    is_over: bool,
}

struct Due {
    at: Instant,
    mark: Arc<Mark>,
}

impl PartialEq for Due {
    fn eq(&self, other: &Self) -> bool {
        self.at == other.at
    }
}

impl Eq for Due {}

impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Due {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.at.cmp(&other.at)
    }
}

impl Alarm {
    /// Starts its thread.
    ///
    /// # Errors
    ///
    /// The system gives no thread.
    pub(super) fn start() -> io::Result<Self> {
        let shared = Arc::new(AlarmShared::default());
        let state = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("engine-alarm".to_owned())
            .spawn(move || state.run())?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// Marks at `at`. There is no way to unset it: a mark without a cause costs one look.
    pub(super) fn set(&self, at: Instant, mark: &Arc<Mark>) {
        let mut state = self.shared.state.lock();
        state.due.push(Reverse(Due {
            at,
            mark: Arc::clone(mark),
        }));
        self.shared.changed.notify_one();
    }
}

impl AlarmShared {
    fn run(&self) {
        let mut state = self.state.lock();
        while !state.is_over {
            let next = state.due.peek().map(|Reverse(due)| due.at);
            match next {
                None => self.changed.wait(&mut state),
                Some(at) if at > Instant::now() => {
                    self.changed.wait_until(&mut state, at);
                }
                Some(_) => {
                    if let Some(Reverse(due)) = state.due.pop() {
                        // The engine's waker must not find the lock taken.
                        parking_lot::MutexGuard::unlocked(&mut state, || due.mark.set());
                    }
                }
            }
        }
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        self.shared.state.lock().is_over = true;
        self.shared.changed.notify_one();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the alarm's thread panicked");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::atomic::AtomicUsize, time::Duration};

    use super::*;

    fn taken(ready: &Ready) -> Vec<Key> {
        let mut keys = Vec::new();
        ready.take(&mut keys);
        keys
    }

    #[test]
    fn a_mark_is_told_once_until_it_is_taken() {
        let ready = Arc::new(Ready::default());
        let count = Arc::new(AtomicUsize::new(0));
        let mark = ready.mark(Key::Transfer(7));
        mark.set();
        let counter = Arc::clone(&count);
        ready.on_ready(Arc::new(move || {
            counter.fetch_add(1, Ordering::SeqCst);
        }));
        assert_eq!(count.load(Ordering::SeqCst), 1, "what was ready before");
        mark.waker().wake_by_ref();
        assert_eq!(count.load(Ordering::SeqCst), 1);
        assert_eq!(taken(&ready), [Key::Transfer(7)]);
        mark.waker().wake();
        assert_eq!(count.load(Ordering::SeqCst), 2);
        assert_eq!(taken(&ready), [Key::Transfer(7)]);
        assert!(taken(&ready).is_empty());
    }

    #[test]
    fn alarms_go_off_in_the_order_of_their_times() {
        let ready = Arc::new(Ready::default());
        let (sender, receiver) = std::sync::mpsc::channel();
        let told = Arc::clone(&ready);
        ready.on_ready(Arc::new(move || {
            let mut keys = Vec::new();
            told.take(&mut keys);
            sender.send(keys).expect("the test listens");
        }));
        let alarm = Alarm::start().expect("a thread");
        let now = Instant::now();
        let marks: Vec<_> = (0..3).map(|key| ready.mark(Key::Release(key))).collect();
        alarm.set(now + Duration::from_secs(3600), &marks[0]);
        alarm.set(now + Duration::from_millis(20), &marks[1]);
        alarm.set(now, &marks[2]);
        let next = || receiver.recv_timeout(Duration::from_secs(30));
        assert_eq!(next(), Ok(vec![Key::Release(2)]));
        assert_eq!(next(), Ok(vec![Key::Release(1)]));
        drop(alarm);
        assert!(taken(&ready).is_empty(), "the last was not due");
    }
}
