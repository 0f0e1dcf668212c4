//! A short fuzz run in every test run, with a compiler that cargo-fuzz cannot use: the same properties as the targets
//! in `fuzz/`, from the same seeds.
//!
//! `KVPUSH_FUZZ_SEED` repeats a run, `KVPUSH_WRITE_CORPUS=1` rewrites the seed files of `fuzz/corpus`.

use std::panic::catch_unwind;
use std::path::PathBuf;

use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

use super::{grants, strategies};
use crate::wire::channel::Channel;
use crate::wire::*;

type Target = (&'static str, fn(&[u8]), u32);

/// Name, property and mutations of one run; a noise handshake costs about as much as fifty messages.
const TARGETS: [Target; 4] = [
    ("grant", fuzzing::grant, 95_000),
    ("message", fuzzing::message, 95_000),
    ("pool", fuzzing::pool, 20_000),
    ("channel", fuzzing::channel, 10_000),
];

/// Valid inputs to begin with, the same in every run.
fn seeds(target: &str) -> Vec<Vec<u8>> {
    match target {
        "grant" => {
            let token = RegionToken::new(RegionTokenFields {
                issuer: Incarnation([1; 16]),
                addresses: vec!["host:1".into()],
                region: 4,
                nonce: [2; 16],
                length: 100,
                read: true,
                write: false,
            });
            let pages = [
                Vec::new(),
                (5..500).collect(),
                vec![9, 1, 1, 2, 3, u32::MAX, 0],
            ];
            let grants = pages.map(|pages| grants::grant(pages).encode().to_vec());
            grants
                .into_iter()
                .chain([token.unwrap().encode().to_vec()])
                .collect()
        }
        "message" => {
            // One of each kind, and of bounded size.
            let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[7; 32]);
            let mut runner = TestRunner::new_with_rng(Config::default(), rng);
            let mut seeds = std::collections::BTreeMap::new();
            for _ in 0..2000 {
                let tree = strategies::message().new_tree(&mut runner).unwrap();
                let bytes = tree.current().encode().unwrap();
                let least = seeds.entry(bytes[0]).or_insert_with(|| bytes.clone());
                if bytes.len() < 2000 && (bytes.len() > least.len() || least.len() > 2000) {
                    *least = bytes;
                }
            }
            assert_eq!(seeds.len(), 23, "every message");
            seeds.into_values().collect()
        }
        "pool" => {
            let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[8; 32]);
            let mut runner = TestRunner::new_with_rng(Config::default(), rng);
            let mut seeds = Vec::new();
            while seeds.len() < 4 {
                let pool = strategies::pool().new_tree(&mut runner).unwrap().current();
                let mut writer = codec::Writer::new("pool");
                pool.write(&mut writer).unwrap();
                let bytes = writer.finish();
                if bytes.len() < 2000 {
                    seeds.push(bytes);
                }
            }
            seeds
        }
        "channel" => {
            let mut plain = Channel::initiator(&Auth::insecure_plaintext()).unwrap();
            let mut stream = vec![2, 10];
            stream.append(&mut plain.take_output());
            stream.extend_from_slice(&[3, 0, 0, 0, 1, 2, 3, 0, 0, 0, 0]);
            // Only the constant part of an encrypted beginning: the rest is random numbers.
            let beginning = [&[0, 255][..], b"KVPUSH\x01\x00\x01\x30\x00", &[5; 48]].concat();
            let mut reply = beginning.clone();
            reply[0] = 1;
            vec![
                stream,
                beginning,
                reply,
                vec![3, 20, 7, 0, 0],
                vec![3, 20, 7, 0, 1, 90, 1, 16],
            ]
        }
        other => panic!("no target {other}"),
    }
}

/// xorshift64*, enough to choose mutations.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() >> 16) as usize % limit.max(1)
    }
}

fn mutate(bytes: &mut Vec<u8>, random: &mut Random) {
    for _ in 0..=random.below(4) {
        let at = random.below(bytes.len());
        match random.below(7) {
            _ if bytes.is_empty() => bytes.push(random.next() as u8),
            0 => bytes[at] ^= 1 << random.below(8),
            1 => bytes[at] = random.next() as u8,
            2 => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][random.below(5)],
            3 => bytes.truncate(at),
            4 => bytes.insert(at, random.next() as u8),
            5 => {
                bytes.remove(at);
            }
            _ => {
                let length = random.below(bytes.len() - at).min(16);
                let piece = bytes[at..at + length].to_vec();
                let to = random.below(bytes.len());
                bytes.splice(to..to, piece);
            }
        }
    }
}

#[test]
fn fuzz_smoke() {
    let seed = match std::env::var("KVPUSH_FUZZ_SEED") {
        Ok(text) => text.parse().expect("KVPUSH_FUZZ_SEED is a number"),
        Err(_) => 0x6b76_7075_7368u64,
    };
    println!("KVPUSH_FUZZ_SEED={seed}");
    let mut random = Random(seed.max(1));
    for (name, property, mutations) in TARGETS {
        let seeds = seeds(name);
        seeds.iter().for_each(|seed| property(seed));
        for round in 0..mutations {
            let mut input = seeds[random.below(seeds.len())].clone();
            mutate(&mut input, &mut random);
            if catch_unwind(|| property(&input)).is_err() {
                panic!("{name}, round {round}, KVPUSH_FUZZ_SEED={seed}: {input:02x?}");
            }
        }
    }
}

/// Without this the run above could be of inputs that are all refused at once.
fn is_accepted(target: &str, bytes: &[u8]) -> bool {
    match target {
        "grant" => Grant::decode(bytes).is_ok() || RegionToken::decode(bytes).is_ok(),
        "message" => Message::decode(bytes).is_ok(),
        _ => true,
    }
}

#[test]
fn every_seed_and_the_stored_corpus_are_accepted() {
    let write = std::env::var_os("KVPUSH_WRITE_CORPUS").is_some();
    for (name, ..) in TARGETS {
        let folder: PathBuf = [env!("CARGO_MANIFEST_DIR"), "fuzz", "corpus", name]
            .iter()
            .collect();
        for (number, seed) in seeds(name).iter().enumerate() {
            assert!(is_accepted(name, seed), "{name} {number}");
            let path = folder.join(format!("seed-{number:02}"));
            if write {
                std::fs::create_dir_all(&folder).unwrap();
                std::fs::write(&path, seed).unwrap();
            }
            let stored = std::fs::read(&path).unwrap_or_default();
            assert!(
                !stored.is_empty() && is_accepted(name, &stored),
                "{} is of another format; run with KVPUSH_WRITE_CORPUS=1",
                path.display()
            );
        }
    }
}
