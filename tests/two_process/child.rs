//! The child process: an endpoint that obeys commands, one on each line of its standard input.
//!
//! Every command has one reply. It is `ok VALUE`, or `error KIND: TEXT`, where the kind is that of the typed error.

use std::{collections::HashMap, io::BufRead, sync::Arc, thread::JoinHandle, time::Duration};

use kvpush::{
    Arrival, Auth, Endpoint, Push,
    endpoint::{ArrivalError, DrainCount, PeerError, PushError, Revocation},
};

use crate::{
    content,
    fixture::{Cache, LONG},
    process::{Over, REPLY, ROLE, decode, encode, unlist},
};

/// Not a test: what the test binary runs as the other process.
#[test]
#[ignore = "not a test: run by the tests as the other process"]
fn entry() {
    let over = match std::env::var(ROLE).as_deref() {
        Ok("tcp") => Over::Tcp,
        Ok("shm") => Over::Shm,
        Ok("verbs") => Over::Verbs,
        // Somebody runs all that is ignored.
        _ => return,
    };
    let mut actor = Actor {
        over,
        endpoint: None,
        cache: None,
        pushes: HashMap::new(),
        arrivals: HashMap::new(),
        streams: Vec::new(),
        next: 0,
    };
    for line in std::io::stdin().lock().lines().map_while(Result::ok) {
        let words: Vec<&str> = line.split(' ').collect();
        match actor.obey(&words) {
            Ok(value) => println!("\n{REPLY}ok {value}"),
            Err(why) => println!("\n{REPLY}error {why}"),
        }
    }
}

struct Actor {
    over: Over,
    endpoint: Option<Endpoint>,
    cache: Option<Cache>,
    pushes: HashMap<usize, Arc<Push>>,
    arrivals: HashMap<usize, Arrival>,
    streams: Vec<JoinHandle<()>>,
    next: usize,
}

impl Actor {
    fn obey(&mut self, words: &[&str]) -> Result<String, String> {
        let number = |at: usize| words[at].parse::<u64>().expect("a number");
        match words[0] {
            // bind NAME ADDRESS LANES: starts the endpoint.
            "bind" => {
                let builder = self.over.builder(words[1]);
                // Few transfers, so that those that are not given back are missed.
                let builder = builder.lanes_per_rail(number(3) as u16).max_transfers(256);
                self.bind(builder, words[2])
            }
            // stranger ADDRESS: starts the endpoint with another key.
            "stranger" => {
                let builder = self.over.builder("stranger").auth(Auth::psk([8; 32]));
                self.bind(builder, words[1])
            }
            // pool LAYERS PAGES SEED: a pool with the content of a seed, or poisoned if that is 0.
            "pool" => {
                let layout = content::layout(number(1) as u32, number(2) as u32);
                self.cache = Some(match number(3) {
                    0 => Cache::poisoned(self.endpoint(), &layout),
                    seed => content::filled(self.endpoint(), &layout, seed),
                });
                Ok(String::new())
            }
            // grant MILLISECONDS PAGES
            "grant" => {
                let deadline = Duration::from_millis(number(1));
                let arrival = self
                    .cache()
                    .pool
                    .grant("two processes", &unlist(words[2]), deadline)
                    .map_err(|error| format!("issue: {error}"))?;
                let grant = encode(arrival.grant());
                let name = self.name();
                self.arrivals.insert(name, arrival);
                Ok(format!("{name} {grant}"))
            }
            // open GRANT
            "open" => {
                let pool = &self.cache().pool;
                let push = self
                    .endpoint()
                    .push_blocking(pool, decode(words[1]), LONG)
                    .map_err(|error| push_error(&error))?;
                let name = self.name();
                self.pushes.insert(name, Arc::new(push));
                Ok(name.to_string())
            }
            // layer PUSH LAYER PAGES
            "layer" => self.pushes[&(number(1) as usize)]
                .layer(number(2) as usize, &unlist(words[3]))
                .map(|()| String::new())
                .map_err(|error| push_error(&error)),
            // stream PUSH PAUSE_US PAGES: pushes layer after layer, with pauses, while other commands are obeyed.
            "stream" => {
                let push = Arc::clone(&self.pushes[&(number(1) as usize)]);
                let pause = Duration::from_micros(number(2));
                let pages = unlist(words[3]);
                let layers = self.cache().layout.layers.len();
                self.streams.push(std::thread::spawn(move || {
                    // Ends early with the push.
                    for layer in 0..layers {
                        if push.layer(layer, &pages).is_err() {
                            return;
                        }
                        std::thread::sleep(pause);
                    }
                }));
                Ok(String::new())
            }
            // whole PUSH PAGES: pushes all layers and the tail, in one go.
            "whole" => {
                let push = &self.pushes[&(number(1) as usize)];
                let pages = unlist(words[2]);
                for layer in 0..self.cache().layout.layers.len() {
                    let pushed = push.layer(layer, &pages);
                    pushed.map_err(|error| push_error(&error))?;
                }
                let finished = push.start_finish("end");
                finished.map_err(|error| push_error(&error))?;
                Ok(String::new())
            }
            // finish PUSH TAIL: once everything has been streamed.
            "finish" => {
                self.join();
                let tail = words[2].as_bytes().to_vec();
                let push = &self.pushes[&(number(1) as usize)];
                push.start_finish(tail)
                    .map(|()| String::new())
                    .map_err(|error| push_error(&error))
            }
            // pushed PUSH: waits for its end.
            "pushed" => match self.pushes[&(number(1) as usize)].ended_blocking(LONG) {
                None => Err("hang: the push does not end".to_owned()),
                Some(Ok(report)) => Ok(report.bytes.to_string()),
                Some(Err(error)) => Err(push_error(&error)),
            },
            // arrived ARRIVAL: waits for its end.
            "arrived" => match self.arrivals[&(number(1) as usize)].complete_blocking(LONG) {
                None => Err("hang: the arrival does not end".to_owned()),
                Some(Ok(tail)) => Ok(String::from_utf8_lossy(&tail).into_owned()),
                Some(Err(error)) => Err(arrival_error(&error)),
            },
            // layers ARRIVAL: complete layers.
            "layers" => {
                let arrival = &self.arrivals[&(number(1) as usize)];
                Ok(arrival.complete_layers().to_string())
            }
            // revoke ARRIVAL
            "revoke" => match self.arrivals[&(number(1) as usize)].revoke_blocking(LONG) {
                None => Err("hang: the revocation does not end".to_owned()),
                Some(Revocation::Revoked) => Ok("revoked".to_owned()),
                Some(Revocation::Completed) => Ok("completed".to_owned()),
                Some(Revocation::Ended(error)) => Err(arrival_error(&error)),
            },
            // check SEED FROM TO: the pool has all layers of these pages, and nothing else.
            "check" => {
                let pairs: Vec<_> = unlist(words[2]).into_iter().zip(unlist(words[3])).collect();
                let cache = self.cache();
                let layers = 0..cache.layout.layers.len();
                content::check(cache, number(1), &pairs, layers).map(|()| String::new())
            }
            // changed: bytes of the pool that are not poison.
            "changed" => Ok(content::changed(self.cache()).to_string()),
            "poison" => {
                content::poison(self.cache());
                Ok(String::new())
            }
            // granted: pages that live grants hold.
            "granted" => Ok(self.cache().pool.granted_pages().to_string()),
            // forget: drops all pushes and arrivals, and has the pages back.
            "forget" => {
                self.join();
                self.pushes.clear();
                for arrival in self.arrivals.values() {
                    arrival.revoke_blocking(LONG).expect("no hang");
                }
                self.arrivals.clear();
                Ok(String::new())
            }
            // drain MS: goes away in good order. Replies completed, ended, cut and unopened, of both kinds in all.
            "drain" => {
                let time = Duration::from_millis(number(1));
                let report = self.endpoint().drain_blocking(time);
                let sum = |of: fn(&DrainCount) -> u64| of(&report.pushes) + of(&report.arrivals);
                let completed = sum(|count| count.completed);
                let (ended, cut) = (sum(|count| count.ended), sum(|count| count.cut));
                Ok(format!("{completed} {ended} {cut} {}", report.unopened))
            }
            // census: open descriptors, and threads.
            "census" => {
                self.join();
                let count = |of: &str| std::fs::read_dir(of).expect("procfs").count();
                let (descriptors, threads) = (count("/proc/self/fd"), count("/proc/self/task"));
                Ok(format!("{descriptors},{threads}"))
            }
            // leak: what the census must notice.
            "leak" => {
                let file = std::fs::File::open("/dev/null").expect("a device");
                std::mem::forget(file);
                Ok(String::new())
            }
            other => panic!("no such command: {other}"),
        }
    }

    fn bind(
        &mut self,
        builder: kvpush::endpoint::Builder,
        address: &str,
    ) -> Result<String, String> {
        let endpoint = builder.bind(address).map_err(|error| error.to_string())?;
        let rails: Vec<_> = endpoint.rails().map(|rail| rail.kind.to_string()).collect();
        assert!(
            rails.iter().all(|kind| kind == self.over.name()),
            "the fabric under test, not {rails:?}"
        );
        let address = endpoint.local_address().to_string();
        self.endpoint = Some(endpoint);
        Ok(address)
    }

    fn endpoint(&self) -> &Endpoint {
        self.endpoint.as_ref().expect("bind comes first")
    }

    fn cache(&self) -> &Cache {
        self.cache.as_ref().expect("pool comes first")
    }

    fn name(&mut self) -> usize {
        self.next += 1;
        self.next
    }

    fn join(&mut self) {
        for stream in self.streams.drain(..) {
            stream.join().expect("the stream does not panic");
        }
    }
}

/// `error` as a reply.
fn push_error(error: &PushError) -> String {
    let kind = match error {
        PushError::Input(_) => "input".to_owned(),
        PushError::Mismatch(_) => "mismatch".to_owned(),
        PushError::Refused { code, .. } => format!("refused {code:?}"),
        PushError::Revoked(reason) => format!("revoked {reason:?}"),
        PushError::Expired => "expired".to_owned(),
        PushError::Cancelled => "cancelled".to_owned(),
        PushError::Peer(error) => peer_error(error).to_owned(),
        other => panic!("no name for {other:?}"),
    };
    format!("{kind}: {error}")
}

fn arrival_error(error: &ArrivalError) -> String {
    let kind = match error {
        ArrivalError::Expired { .. } => "expired",
        ArrivalError::Revoked => "revoked",
        ArrivalError::Abandoned { .. } => "abandoned",
        ArrivalError::Peer(error) => peer_error(error),
        other => panic!("no name for {other:?}"),
    };
    format!("{kind}: {error}")
}

fn peer_error(error: &PeerError) -> &'static str {
    match error {
        PeerError::Control { .. } => "peer control",
        PeerError::NoSession { .. } => "peer session",
        PeerError::Restarted { .. } => "peer restarted",
        PeerError::Rejected { .. } => "peer rejected",
        PeerError::Goodbye { .. } => "peer goodbye",
        PeerError::Lane { .. } => "peer lane",
        PeerError::Fabric { .. } => "peer fabric",
        PeerError::Silent { .. } => "peer silent",
        PeerError::Protocol { .. } => "peer protocol",
        PeerError::Disconnected { .. } => "peer disconnected",
        PeerError::Draining => "draining",
        PeerError::Closed => "closed",
        other => panic!("no name for {other:?}"),
    }
}
