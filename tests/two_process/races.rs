//! Ends that race with each other: whichever wins, both sides are done in time, what the reader calls complete is
//! whole, and nothing lands in what it has taken back.

use std::time::{Duration, Instant};

use kvpush::{
    Endpoint,
    endpoint::{ArrivalError, Revocation},
};

use crate::{
    content::{changed, check, layout, poison},
    fixture::{Cache, LONG, Random, seed},
    process::{GRACE, Over, Peer, SLACK, list},
};

const SEED: u64 = 61;
const LAYERS: u32 = 6;
const PAGES: u32 = 128;

/// What both sides said.
#[derive(Default, Debug)]
struct Tally {
    whole: usize,
    taken: usize,
    /// The writer had placed everything, but the reader had already changed its mind.
    too_late: usize,
    /// It was whole at the reader, but the deadline passed before the writer knew.
    unaware: usize,
}

/// A reader in this process and a writer in another, over and over.
struct Race {
    random: Random,
    _decode: Endpoint,
    destination: Cache,
    writer: Peer,
    pages: Vec<u32>,
    tally: Tally,
    /// How long a push takes that nothing races with.
    typical: Duration,
}

impl Race {
    fn new(over: Over) -> Self {
        let decode = over.builder("decode").bind("127.0.0.1:0").unwrap();
        let destination = Cache::poisoned(&decode, &layout(LAYERS, PAGES));
        let mut writer = Peer::start(over, "prefill");
        writer.tell(format!("pool {LAYERS} {PAGES} {SEED}"));
        let mut race = Self {
            random: Random(seed()),
            _decode: decode,
            destination,
            writer,
            pages: (0..PAGES).collect(),
            tally: Tally::default(),
            typical: Duration::ZERO,
        };
        let mut times: Vec<Duration> = (0..5).map(|_| race.undisturbed()).collect();
        times.sort_unstable();
        race.typical = times[2];
        race
    }

    fn undisturbed(&mut self) -> Duration {
        let pool = &self.destination.pool;
        let arrival = pool.grant("alone", &self.pages, LONG).unwrap();
        let push = self.writer.open(arrival.grant()).expect("open");
        let begun = Instant::now();
        self.begin(push);
        arrival
            .complete_blocking(LONG)
            .expect("no hang")
            .expect("complete");
        let time = begun.elapsed();
        let _ = self.writer.answer();
        self.ended(push, true, false);
        self.tally = Tally::default();
        time
    }

    /// The writer pushes everything, while this goes on. The answer is to come.
    fn begin(&mut self, push: usize) {
        self.writer
            .send(format!("whole {push} {}", list(&self.pages)));
    }

    /// A time at which the push may be ending.
    fn moment(&mut self) -> Duration {
        let typical = self.typical.as_micros() as u64;
        Duration::from_micros(self.random.below(typical * 3 / 2 + 1))
    }

    /// The reader says how a push has ended; so does the writer, which may be ended by a
    /// `deadline` too.
    fn ended(&mut self, push: usize, whole: bool, deadline: bool) {
        if whole {
            let pairs: Vec<_> = self.pages.iter().map(|&page| (page, page)).collect();
            check(&self.destination, SEED, &pairs, 0..LAYERS as usize).expect("every byte");
        }
        poison(&self.destination);
        assert_eq!(self.destination.pool.granted_pages(), 0);
        match (whole, self.writer.ask(format!("pushed {push}"))) {
            (true, Ok(_)) => self.tally.whole += 1,
            // The last acknowledgement came after the deadline.
            (true, Err(end)) if deadline && end.starts_with("expired: ") => {
                self.tally.unaware += 1;
            }
            (true, Err(end)) => panic!("complete at the reader, but at the writer {end}"),
            (false, Ok(_)) => self.tally.too_late += 1,
            (false, Err(end)) => {
                let typed = ["revoked ", "expired: ", "peer "];
                assert!(typed.iter().any(|kind| end.starts_with(kind)), "{end}");
                self.tally.taken += 1;
            }
        }
        assert_eq!(changed(&self.destination), 0, "bytes landed after the end");
        self.writer.tell("forget");
    }

    /// Both ways of ending have been seen.
    fn assert_raced(&self) {
        println!("{:?}, {:?} for a push", self.tally, self.typical);
        assert!(
            self.tally.whole + self.tally.unaware > 0,
            "{:?}",
            self.tally
        );
        assert!(
            self.tally.taken + self.tally.too_late > 0,
            "{:?}",
            self.tally
        );
    }
}

pub(crate) fn a_revocation_and_the_end(over: Over) {
    let mut race = Race::new(over);
    for _ in 0..40 {
        let arrival = race
            .destination
            .pool
            .grant("race", &race.pages, LONG)
            .unwrap();
        let push = race.writer.open(arrival.grant()).expect("open");
        let moment = race.moment();
        race.begin(push);
        std::thread::sleep(moment);
        let asked = Instant::now();
        let end = arrival.revoke_blocking(LONG).expect("no hang");
        assert!(asked.elapsed() < GRACE + SLACK, "{:?}", asked.elapsed());
        let whole = match end {
            Revocation::Completed => true,
            Revocation::Revoked => false,
            other => panic!("{other:?}"),
        };
        // It may have been told in the middle of its layers.
        let _ = race.writer.answer();
        race.ended(push, whole, false);
    }
    race.assert_raced();
}

pub(crate) fn a_deadline_and_the_end(over: Over) {
    let mut race = Race::new(over);
    let opening = Duration::from_millis(30);
    for _ in 0..40 {
        let deadline = opening + race.moment();
        let granted = Instant::now();
        let arrival = race
            .destination
            .pool
            .grant("race", &race.pages, deadline)
            .unwrap();
        let opened = race.writer.open(arrival.grant());
        if let Ok(push) = opened {
            // Begins late, so that the deadline is near.
            std::thread::sleep(opening.saturating_sub(granted.elapsed()));
            race.begin(push);
        }
        let end = arrival.complete_blocking(LONG).expect("no hang");
        let ended = granted.elapsed();
        assert!(
            ended < deadline + GRACE + SLACK,
            "{ended:?} of {deadline:?}"
        );
        let whole = match end {
            Ok(_) => true,
            Err(ArrivalError::Expired { .. } | ArrivalError::Abandoned { .. }) => false,
            Err(other) => panic!("{other:?}"),
        };
        match opened {
            Ok(push) => {
                let _ = race.writer.answer();
                race.ended(push, whole, true);
            }
            // The machine was too busy to open it in time.
            Err(_) => assert!(!whole),
        }
    }
    race.assert_raced();
}
