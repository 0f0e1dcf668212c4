//! Who has something to do: transfers that kvpush has woken, and those whose time has come.
//!
//! kvpush's driver threads mark a transfer as ready; one thread of ours takes the marks and looks at those transfers, and
//! no others. It sleeps until there is a mark or the earliest time it was set to; nobody spins.
//!
//! Invariant: a mark that is set after [`Ready::wait`] has taken it is seen by the next `wait`.

use std::{
    cmp::Reverse,
    collections::BinaryHeap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Wake, Waker},
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

/// The marks, and the times.
#[derive(Default)]
pub(super) struct Ready {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    marked: Vec<Arc<Mark>>,
    due: BinaryHeap<Reverse<Due>>,
    is_over: bool,
}

/// One transfer's mark; as a [`Waker`] it marks.
pub(super) struct Mark {
    key: Key,
    is_set: AtomicBool,
    ready: Arc<Ready>,
}

struct Due {
    at: Instant,
    mark: Arc<Mark>,
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

    /// Marks at `at`. There is no way to unset it: a mark without a cause costs one look.
    pub(super) fn alarm(&self, at: Instant, mark: &Arc<Mark>) {
        let mark = Arc::clone(mark);
        self.state.lock().due.push(Reverse(Due { at, mark }));
        self.changed.notify_one();
    }

    /// Waits until something is marked, takes the marks and adds whose they were to `keys`. False once it is over.
    pub(super) fn wait(&self, keys: &mut Vec<Key>) -> bool {
        let mut state = self.state.lock();
        loop {
            if state.is_over {
                return false;
            }
            let now = Instant::now();
            while state.due.peek().is_some_and(|Reverse(due)| due.at <= now) {
                if let Some(Reverse(due)) = state.due.pop() {
                    keys.push(due.mark.key);
                }
            }
            for mark in state.marked.drain(..) {
                // Before the caller looks: what happens from here on marks again.
                mark.is_set.store(false, Ordering::SeqCst);
                keys.push(mark.key);
            }
            if !keys.is_empty() {
                return true;
            }
            match state.due.peek() {
                None => self.changed.wait(&mut state),
                Some(Reverse(due)) => {
                    let at = due.at;
                    self.changed.wait_until(&mut state, at);
                }
            }
        }
    }

    /// Ends every wait.
    pub(super) fn end(&self) {
        self.state.lock().is_over = true;
        self.changed.notify_all();
    }
}

impl Mark {
    /// Marks.
    pub(super) fn set(self: &Arc<Self>) {
        if self.is_set.swap(true, Ordering::SeqCst) {
            return;
        }
        self.ready.state.lock().marked.push(Arc::clone(self));
        self.ready.changed.notify_one();
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn taken(ready: &Ready) -> Vec<Key> {
        let mut keys = Vec::new();
        assert!(ready.wait(&mut keys));
        keys
    }

    #[test]
    fn a_mark_is_told_once_until_it_is_taken() {
        let ready = Arc::new(Ready::default());
        let (one, other) = (Key::Transfer(7), Key::Release(7));
        let (mark, second) = (ready.mark(one), ready.mark(other));
        mark.set();
        mark.waker().wake_by_ref();
        second.set();
        assert_eq!(taken(&ready), [one, other]);
        mark.waker().wake();
        assert_eq!(taken(&ready), [one]);
        let waiter = Arc::clone(&ready);
        let waiter = std::thread::spawn(move || taken(&waiter));
        second.set();
        assert_eq!(waiter.join().expect("it was woken"), [other]);
        ready.end();
        assert!(!ready.wait(&mut Vec::new()));
    }

    #[test]
    fn alarms_go_off_in_the_order_of_their_times() {
        let ready = Arc::new(Ready::default());
        let now = Instant::now();
        let marks: Vec<_> = (0..3).map(|key| ready.mark(Key::Release(key))).collect();
        ready.alarm(now + Duration::from_secs(3600), &marks[0]);
        ready.alarm(now + Duration::from_millis(50), &marks[1]);
        ready.alarm(now, &marks[2]);
        assert_eq!(taken(&ready), [Key::Release(2)]);
        assert_eq!(taken(&ready), [Key::Release(1)]);
        assert!(now.elapsed() >= Duration::from_millis(50));
    }
}
