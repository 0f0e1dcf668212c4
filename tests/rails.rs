//! Which rails a push takes: those near to the memory at both ends, or those that were named. Two hosts of eight GPUs and
//! eight simulated NICs at the places of a recorded MI300X host; the network's trace says who posted what.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use kvpush::{
    Auth, Endpoint, Grant, Pool,
    endpoint::{EndpointError, PoolOptions, PushError, RailChoice},
    fabric::sim::{SimConfig, SimNet, TraceEvent},
    kv::{Dtype, HeadRange, KvLayout, presets::KvShape, region_lengths},
    memory::{DmabufMemory, HostMemory, Memory},
    topology::Topology,
};

#[path = "../src/topology/testing.rs"]
mod sysfs;

const LONG: Duration = Duration::from_secs(60);
const PAGES: u32 = 8;

struct Hosts {
    net: SimNet,
    prefill: Endpoint,
    decode: Endpoint,
    topology: Topology,
}

fn layout() -> KvLayout {
    let shape = KvShape {
        layers: 4,
        tokens_per_page: 4,
        heads: HeadRange::new(0, 2),
        head_dim: 16,
        dtype: Dtype::Bf16,
    };
    shape.vllm_flash(PAGES).expect("a layout")
}

impl Hosts {
    fn new() -> Self {
        let net = SimNet::new(SimConfig {
            free_running: true,
            trace_capacity: 1 << 20,
            ..SimConfig::seeded(12)
        });
        let topology = Topology::read(&sysfs::Tree::new(sysfs::MI300X).root);
        let start = |name: &str| {
            let mut builder = Endpoint::builder()
                .name(name)
                .auth(Auth::psk([7; 32]))
                .fabrics([])
                .lanes_per_rail(1)
                .topology(topology.clone());
            for (number, nic) in topology.nics().iter().enumerate() {
                let rail = format!("{name}{number}");
                builder = builder.device(net.device_at(&rail, nic.functions[0]));
            }
            builder.bind("127.0.0.1:0").expect("start an endpoint")
        };
        Self {
            prefill: start("p"),
            decode: start("d"),
            net,
            topology,
        }
    }

    /// A pool in the memory of GPU `gpu`, or in that of the host.
    fn pool(&self, endpoint: &Endpoint, gpu: Option<usize>, rails: RailChoice) -> Pool {
        let memory = region_lengths(&layout()).expect("regions").into_iter();
        let memory = memory.map(|length| match gpu {
            None => Arc::new(HostMemory::new(length).expect("memory")) as Arc<dyn Memory>,
            Some(gpu) => {
                let file = HostMemory::memfd("kvpush-rails", length).expect("a memory file");
                let fd = file
                    .fd()
                    .expect("a file")
                    .try_clone_to_owned()
                    .expect("dup");
                let memory = DmabufMemory::import(fd, 0, length).expect("import");
                Arc::new(memory.at(self.topology.gpus()[gpu].address))
            }
        });
        endpoint
            .register_pool_with(
                layout(),
                memory.collect(),
                PoolOptions::default().rails(rails),
            )
            .expect("register a pool")
    }

    /// Pushes, and returns the rails of the writer that posted payload.
    fn push(&self, from: &Pool, to: &Pool) -> Result<BTreeSet<String>, PushError> {
        let arrival = to.grant("rails", &[5, 1, 0, 7], LONG).expect("a grant");
        let grant = Grant::decode(&arrival.grant().encode()).expect("decode");
        let before = self.net.trace().entries.len();
        let push = self.prefill.push_blocking(from, grant, LONG)?;
        for layer in 0..layout().layers.len() {
            push.layer(layer, &[0, 2, 4, 6])?;
        }
        push.finish_blocking("tail", LONG).expect("no hang")?;
        arrival
            .complete_blocking(LONG)
            .expect("no hang")
            .expect("complete");
        let trace = self.net.trace();
        assert_eq!(trace.forgotten, 0, "the trace is too short");
        let posts = trace.entries[before..].iter().filter_map(|entry| {
            let posted = matches!(entry.event, TraceEvent::Post { length: 1.., .. });
            posted.then(|| trace.devices[entry.device].clone())
        });
        Ok(posts.collect())
    }

    fn near(&self, from: Option<usize>, to: Option<usize>) -> BTreeSet<String> {
        let from = self.pool(&self.prefill, from, RailChoice::Nearest);
        let to = self.pool(&self.decode, to, RailChoice::Nearest);
        self.push(&from, &to).expect("push")
    }
}

fn names(rails: &[&str]) -> BTreeSet<String> {
    rails.iter().map(|&rail| rail.to_owned()).collect()
}

const ALL: [&str; 8] = ["p0", "p1", "p2", "p3", "p4", "p5", "p6", "p7"];

#[test]
fn pages_take_the_rails_near_to_both_ends() {
    let hosts = Hosts::new();
    for gpu in [0, 2, 7] {
        let expected = names(&[ALL[gpu]]);
        assert_eq!(
            hosts.near(Some(gpu), Some(gpu)),
            expected,
            "GPU {gpu} to {gpu}"
        );
    }
    // No lane joins the one's rail with the other's: those that are near to either end are equally good.
    assert_eq!(hosts.near(Some(0), Some(3)), names(&["p0", "p3"]));
    assert_eq!(hosts.near(Some(0), Some(5)), names(&["p0", "p5"]));
    // Host memory is near to all.
    assert_eq!(hosts.near(Some(4), None), names(&["p4"]));
    assert_eq!(hosts.near(None, Some(6)), names(&["p6"]));
    assert_eq!(hosts.near(None, None), names(&ALL));
}

#[test]
fn all_and_named_override_distance() {
    let hosts = Hosts::new();
    let near = hosts.pool(&hosts.decode, Some(3), RailChoice::Nearest);
    let all = |endpoint| hosts.pool(endpoint, Some(3), RailChoice::All);
    assert_eq!(
        hosts
            .push(&all(&hosts.prefill), &all(&hosts.decode))
            .expect("push"),
        names(&ALL)
    );
    assert_eq!(
        hosts.push(&all(&hosts.prefill), &near).expect("push"),
        names(&["p3"])
    );

    let named = |endpoint, rails: &[&str]| {
        let rails = rails.iter().map(|&rail| rail.to_owned()).collect();
        hosts.pool(endpoint, Some(3), RailChoice::Named(rails))
    };
    let from = named(&hosts.prefill, &["p5", "p6:1"]);
    assert_eq!(
        hosts.push(&from, &near).expect("push"),
        names(&["p5", "p6"])
    );
    let to = named(&hosts.decode, &["d6", "d7"]);
    assert_eq!(hosts.push(&from, &to).expect("push"), names(&["p6"]));
    let to = named(&hosts.decode, &["d0"]);
    assert_eq!(
        hosts.push(&all(&hosts.prefill), &to).expect("push"),
        names(&["p0"])
    );
    let error = hosts.push(&from, &to).expect_err("no lane joins them");
    let PushError::NoLane { ours, theirs } = &error else {
        panic!("{error}");
    };
    assert_eq!(
        (ours.as_slice(), theirs.as_slice()),
        (
            &["p5".to_owned(), "p6".to_owned()][..],
            &["p0".to_owned()][..]
        )
    );
    assert!(
        !error.is_retryable() && error.to_string().contains("PoolOptions::rails"),
        "{error}"
    );
}

#[test]
fn a_rail_that_does_not_exist_is_refused() {
    let hosts = Hosts::new();
    let memory = region_lengths(&layout()).expect("regions").into_iter();
    let memory =
        memory.map(|length| Arc::new(HostMemory::new(length).expect("memory")) as Arc<dyn Memory>);
    let options = PoolOptions::default().rails(RailChoice::Named(vec!["mlx5_0".to_owned()]));
    let error = hosts
        .prefill
        .register_pool_with(layout(), memory.collect(), options);
    assert!(
        matches!(
            error,
            Err(EndpointError::Setting {
                setting: "rails",
                ..
            })
        ),
        "{error:?}"
    );
}
