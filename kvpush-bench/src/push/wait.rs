//! Waiting for futures without a runtime: the calling thread sleeps until one of them is ready.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Wake, Waker},
    thread::{self, Thread},
};

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// The same, spinning: nobody has to wake this thread.
pub(super) fn all_polling<F: Future>(futures: impl IntoIterator<Item = F>) -> Vec<F::Output> {
    run(futures, Waker::noop(), std::hint::spin_loop)
}

/// Runs all futures together and returns their results in order.
pub(super) fn all<F: Future>(futures: impl IntoIterator<Item = F>) -> Vec<F::Output> {
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    run(futures, &waker, thread::park)
}

fn run<F: Future>(
    futures: impl IntoIterator<Item = F>,
    waker: &Waker,
    wait: impl Fn(),
) -> Vec<F::Output> {
    let mut context = Context::from_waker(waker);
    let mut waiting: Vec<Pin<Box<F>>> = futures.into_iter().map(Box::pin).collect();
    let mut done: Vec<Option<F::Output>> = waiting.iter().map(|_| None).collect();
    // Each future is polled again only after a wake-up; those at the front tend to be ready first.
    loop {
        let mut pending = false;
        for (future, done) in waiting
            .iter_mut()
            .zip(&mut done)
            .filter(|(_, done)| done.is_none())
        {
            match future.as_mut().poll(&mut context) {
                Poll::Ready(result) => *done = Some(result),
                Poll::Pending => pending = true,
            }
        }
        if !pending {
            return done.into_iter().flatten().collect();
        }
        wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{future::poll_fn, sync::Mutex, time::Duration};

    #[test]
    fn spinning_needs_no_wake_up() {
        let mut polls = 0;
        let results = all_polling([poll_fn(|_| {
            polls += 1;
            match polls {
                3 => Poll::Ready(polls),
                _ => Poll::Pending,
            }
        })]);
        assert_eq!(results, [3]);
    }

    #[test]
    fn results_come_in_order_however_they_become_ready() {
        let state = Arc::new(Mutex::new((0, Vec::<Waker>::new())));
        let other = Arc::clone(&state);
        let ticker = thread::spawn(move || {
            for _ in 0..5 {
                thread::sleep(Duration::from_millis(2));
                let mut state = other.lock().unwrap();
                state.0 += 1;
                state.1.drain(..).for_each(Waker::wake);
            }
        });
        let results = all((1..=5).rev().map(|due| {
            let state = &state;
            poll_fn(move |context| {
                let mut state = state.lock().unwrap();
                if state.0 >= due {
                    return Poll::Ready(due);
                }
                state.1.push(context.waker().clone());
                Poll::Pending
            })
        }));
        assert_eq!(results, [5, 4, 3, 2, 1]);
        ticker.join().unwrap();
    }
}
