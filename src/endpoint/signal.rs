//! One state that a driver thread changes and callers wait for: as a future, blocking with a deadline, or by polling.
//!
//! The driver holds the lock only to change the state, callers only to look at it; nobody blocks while holding it.

use std::{
    task::{Context, Poll, Waker},
    time::Instant,
};

use parking_lot::{Condvar, Mutex};

/// A state and those who wait for it to change.
#[derive(Debug)]
pub(crate) struct Signal<T> {
    inner: Mutex<Inner<T>>,
    changed: Condvar,
}

#[derive(Debug)]
struct Inner<T> {
    state: T,
    wakers: Vec<Waker>,
}

impl<T> Signal<T> {
    pub(crate) fn new(state: T) -> Self {
        Self {
            inner: Mutex::new(Inner {
                state,
                wakers: Vec::new(),
            }),
            changed: Condvar::new(),
        }
    }

    /// Changes the state and wakes everyone who waits.
    pub(crate) fn update<R>(&self, change: impl FnOnce(&mut T) -> R) -> R {
        let mut inner = self.inner.lock();
        let result = change(&mut inner.state);
        let wakers = std::mem::take(&mut inner.wakers);
        drop(inner);
        self.changed.notify_all();
        wakers.into_iter().for_each(Waker::wake);
        result
    }

    /// Looks at the state.
    pub(crate) fn look<R>(&self, look: impl FnOnce(&T) -> R) -> R {
        look(&self.inner.lock().state)
    }

    /// Is ready once `ready` says so.
    pub(crate) fn poll<R>(
        &self,
        context: &mut Context<'_>,
        ready: impl FnOnce(&T) -> Option<R>,
    ) -> Poll<R> {
        let mut inner = self.inner.lock();
        match ready(&inner.state) {
            Some(result) => Poll::Ready(result),
            None => {
                if !inner
                    .wakers
                    .iter()
                    .any(|waker| waker.will_wake(context.waker()))
                {
                    inner.wakers.push(context.waker().clone());
                }
                Poll::Pending
            }
        }
    }

    /// Blocks until `ready` says so, or `None` once `deadline` has passed (never, if there is none).
    pub(crate) fn wait<R>(
        &self,
        deadline: Option<Instant>,
        mut ready: impl FnMut(&T) -> Option<R>,
    ) -> Option<R> {
        let mut inner = self.inner.lock();
        loop {
            if let Some(result) = ready(&inner.state) {
                return Some(result);
            }
            match deadline {
                None => self.changed.wait(&mut inner),
                Some(deadline) => {
                    if self.changed.wait_until(&mut inner, deadline).timed_out() {
                        return ready(&inner.state);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, thread, time::Duration};

    use super::*;

    #[test]
    fn a_blocked_caller_sees_the_change() {
        let signal = Arc::new(Signal::new(0));
        let other = Arc::clone(&signal);
        let waiter = thread::spawn(move || other.wait(None, |&n| (n == 2).then_some(n)));
        signal.update(|n| *n = 1);
        signal.update(|n| *n = 2);
        assert_eq!(waiter.join().unwrap(), Some(2));
    }

    #[test]
    fn a_deadline_ends_the_wait() {
        let signal = Signal::new(());
        let deadline = Instant::now() + Duration::from_millis(5);
        assert_eq!(signal.wait(Some(deadline), |()| None::<()>), None);
    }

    #[test]
    fn a_future_is_woken_once_for_each_change() {
        let signal = Signal::new(false);
        struct Nothing;
        impl std::task::Wake for Nothing {
            fn wake(self: Arc<Self>) {}
        }
        let waker = Waker::from(Arc::new(Nothing));
        let mut context = Context::from_waker(&waker);
        assert!(
            signal
                .poll(&mut context, |&done| done.then_some(()))
                .is_pending()
        );
        assert!(
            signal
                .poll(&mut context, |&done| done.then_some(()))
                .is_pending()
        );
        assert_eq!(
            signal.inner.lock().wakers.len(),
            1,
            "one waker however often it is polled"
        );
        signal.update(|done| *done = true);
        assert!(
            signal
                .poll(&mut context, |&done| done.then_some(()))
                .is_ready()
        );
    }
}
