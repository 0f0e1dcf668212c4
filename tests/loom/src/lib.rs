//! Every order of memory accesses in the lock-free parts of the library, tried by loom. `cargo xtask loom` runs it.
//!
//! The files under test are the library's own, included here with loom's atomics in place of those of `std`. Without
//! `--cfg loom` there is nothing here.

#![cfg(loom)]

#[allow(dead_code)]
#[path = "../../../src/endpoint/sleep.rs"]
mod sleep;

#[cfg(test)]
mod tests {
    use loom::{
        sync::{
            Arc,
            atomic::{AtomicU32, Ordering},
        },
        thread,
    };

    use super::sleep::Sleep;

    struct Endpoint {
        sleep: Sleep,
        work: AtomicU32,
        /// The counter of the eventfd.
        event: AtomicU32,
    }

    impl Endpoint {
        fn new() -> Arc<Self> {
            Arc::new(Self {
                sleep: Sleep::new(),
                work: AtomicU32::new(0),
                event: AtomicU32::new(0),
            })
        }

        fn call(&self) {
            // As weak as can be: what makes it visible in time is the fence in `wake`.
            self.work.fetch_add(1, Ordering::Relaxed);
            if self.sleep.wake() {
                self.event.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// A driver that goes to sleep has seen the work, or is woken.
    #[test]
    fn no_wake_up_is_lost() {
        loom::model(|| {
            let endpoint = Endpoint::new();
            let caller = {
                let endpoint = Arc::clone(&endpoint);
                thread::spawn(move || endpoint.call())
            };
            endpoint.sleep.announce();
            let seen = endpoint.work.load(Ordering::Relaxed);
            caller.join().unwrap();
            let woken = endpoint.event.load(Ordering::Relaxed);
            assert!(seen == 1 || woken == 1, "it sleeps, and there is work");
        });
    }

    /// Of several callers one wakes it, and only one.
    #[test]
    fn one_wake_up_for_each_sleep() {
        loom::model(|| {
            let endpoint = Endpoint::new();
            endpoint.sleep.announce();
            let callers: Vec<_> = (0..2)
                .map(|_| {
                    let endpoint = Arc::clone(&endpoint);
                    thread::spawn(move || endpoint.call())
                })
                .collect();
            callers
                .into_iter()
                .for_each(|caller| caller.join().unwrap());
            assert_eq!(endpoint.event.load(Ordering::Relaxed), 1);
            assert!(endpoint.sleep.awake(), "it must take the event back");
            assert!(endpoint.sleep.awake(), "as it is awake already");
        });
    }
}
