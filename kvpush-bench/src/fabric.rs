//! Endpoints as the command line wants them, and which fabric two sides have in common.

use std::net::{IpAddr, SocketAddr};

use kvpush::{
    Auth, Endpoint,
    endpoint::Polling,
    fabric::{FabricKind, verbs::VerbsConfig},
};

use crate::{
    cli::{FabricArgs, FabricChoice, KeyArgs, PollingChoice},
    error::{Context, Error, Result},
    out,
    wire::Rail,
    workload::Workload,
};

impl KeyArgs {
    /// How the endpoints authenticate. Prints a warning if they do not.
    pub(crate) fn auth(&self) -> Auth {
        match &self.key {
            Some(key) => Auth::passphrase(key),
            None => {
                out::note(format_args!(
                    "kvpush-bench: warning: --insecure: nothing is authenticated or encrypted"
                ));
                Auth::insecure_plaintext()
            }
        }
    }
}

impl FabricArgs {
    /// Refuses settings that contradict each other.
    pub(crate) fn check(&self) -> Result<()> {
        let numbers = [self.gid_index, self.traffic_class, self.ack_timeout];
        let rdma = !self.devices.is_empty() || numbers.iter().any(Option::is_some);
        if matches!(self.fabric, FabricChoice::Tcp | FabricChoice::Shm) && rdma {
            return Err(Error::usage(
                "--devices, --gid-index, --traffic-class and --ack-timeout are of no use with --fabric tcp or shm",
            ));
        }
        Ok(())
    }

    /// Starts the endpoint of one rank.
    pub(crate) fn endpoint(
        &self,
        auth: &Auth,
        ip: IpAddr,
        name: String,
        workload: &Workload,
    ) -> Result<Endpoint> {
        let defaults = VerbsConfig::default();
        let verbs = VerbsConfig {
            gid_index: self.gid_index,
            traffic_class: self.traffic_class.unwrap_or(defaults.traffic_class),
            timeout: self.ack_timeout.unwrap_or(defaults.timeout),
            ..defaults
        };
        let pairs = workload.pairs()?.len() as u32;
        let transfers = workload
            .requests
            .saturating_mul(pairs)
            .saturating_add(16)
            .min(1 << 16);
        let mut builder = Endpoint::builder()
            .auth(auth.clone())
            .name(name)
            .lanes_per_rail(workload.lanes)
            .parts_per_layer(workload.lanes.max(4))
            .max_transfers(transfers)
            .tail_capacity(64)
            .verbs(verbs);
        if self.polling == PollingChoice::Busy {
            builder = builder.polling(Polling::Busy);
        }
        builder = match self.fabric {
            FabricChoice::Auto => builder,
            FabricChoice::Tcp => builder.fabrics([FabricKind::Tcp]),
            FabricChoice::Shm => builder.fabrics([FabricKind::Shm]),
            FabricChoice::Verbs => builder.fabrics([FabricKind::Verbs]),
        };
        if !self.devices.is_empty() {
            builder = builder.devices(&self.devices);
        }
        let endpoint = builder
            .bind(SocketAddr::new(ip, 0))
            .context("start an endpoint")?;
        if !self.devices.is_empty() && endpoint.rails().all(|rail| rail.kind != FabricKind::Verbs) {
            return Err(Error::failed(format!(
                "no RDMA device {} is usable here; see `kvpush-bench devices` and `kvpush-bench doctor`",
                self.devices.join(", ")
            )));
        }
        Ok(endpoint)
    }

    /// Why this side offers no RDMA; `None` if it does.
    pub(crate) fn why_no_rdma(&self, rails: &[Rail]) -> Option<String> {
        if rails.iter().any(|rail| rail.fabric == VERBS) {
            return None;
        }
        Some(match self.fabric {
            FabricChoice::Tcp => "--fabric tcp was asked for".to_owned(),
            FabricChoice::Shm => "--fabric shm was asked for".to_owned(),
            FabricChoice::Auto | FabricChoice::Verbs => crate::host::why_no_rdma(),
        })
    }
}

const VERBS: &str = "verbs";

/// The rails of an endpoint.
pub(crate) fn rails(endpoint: &Endpoint) -> Vec<Rail> {
    endpoint
        .rails()
        .map(|rail| Rail {
            fabric: rail.kind.to_string(),
            device: match rail.port {
                0 => rail.name.clone(),
                port => format!("{}:{port}", rail.name),
            },
            address: rail.address.clone(),
            mtu: rail.caps.mtu,
        })
        .collect()
}

/// What carries the pages between two sides, and what a person should know about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Chosen {
    pub(crate) fabric: String,
    pub(crate) line: String,
}

/// The best fabric both sides have: the same rule as the endpoints' own.
pub(crate) fn choose(
    ours: &[Rail],
    theirs: &[Rail],
    no_rdma: [Option<String>; 2],
) -> Result<Chosen> {
    let of = |rails: &[Rail], kind: FabricKind| {
        let mut rails = rails.iter();
        rails
            .find(|rail| rail.fabric == kind.to_string())
            .map(|rail| host(&rail.address).to_owned())
    };
    let kind = [FabricKind::Shm, FabricKind::Verbs, FabricKind::Tcp]
        .into_iter()
        .find(|&kind| match (of(ours, kind), of(theirs, kind)) {
            (Some(here), Some(there)) => kind != FabricKind::Shm || here == there,
            _ => false,
        });
    let Some(kind) = kind else {
        let list = |rails: &[Rail]| {
            rails
                .iter()
                .map(|rail| rail.fabric.as_str())
                .collect::<Vec<_>>()
                .join(", ")
        };
        let [ours_why, theirs_why] =
            no_rdma.map(|why| why.map_or(String::new(), |why| format!(" ({why})")));
        return Err(Error::failed(format!(
            "the sides have no fabric in common: here {}{ours_why}, there {}{theirs_why}",
            list(ours),
            list(theirs),
        )));
    };
    let fabric = kind.to_string();
    let names = |rails: &[Rail]| {
        let of_kind = rails.iter().filter(|rail| rail.fabric == fabric);
        of_kind
            .map(|rail| format!("{} {}", rail.device, rail.address))
            .collect::<Vec<_>>()
            .join(", ")
    };
    let mut line = match kind {
        FabricKind::Verbs => format!(
            "fabric: verbs (RDMA), prefill {}; decode {}",
            names(ours),
            names(theirs)
        ),
        FabricKind::Shm => "fabric: shm (both sides are on one host)".to_owned(),
        _ => "fabric: tcp".to_owned(),
    };
    let [ours_why, theirs_why] = no_rdma;
    if kind == FabricKind::Tcp {
        let reasons = match (ours_why, theirs_why) {
            (Some(ours), Some(theirs)) if ours == theirs => ours,
            (ours, theirs) => [("prefill", ours), ("decode", theirs)]
                .into_iter()
                .filter_map(|(side, why)| Some(format!("{side}: {}", why?)))
                .collect::<Vec<_>>()
                .join("; "),
        };
        line.push_str(&format!("; no RDMA because {reasons}"));
    }
    let mtus = |rails: &[Rail]| {
        rails
            .iter()
            .filter(|rail| rail.fabric == fabric)
            .map(|rail| rail.mtu)
            .min()
    };
    if let (Some(a), Some(b)) = (mtus(ours), mtus(theirs))
        && a != b
    {
        line.push_str(&format!("\nwarning: path MTU {a} at the prefill side, {b} at the decode side: the smaller is used"));
    }
    Ok(Chosen { fabric, line })
}

/// The host in the address of a rail of shared memory, which is `host X, pid N`.
fn host(address: &str) -> &str {
    address.split(", ").next().unwrap_or(address)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rail(fabric: &str, mtu: u32) -> Rail {
        Rail {
            fabric: fabric.into(),
            device: "d:1".into(),
            address: "a".into(),
            mtu,
        }
    }

    #[test]
    fn the_best_in_common_is_chosen_and_explained() {
        let both = [rail("verbs", 1024), rail("tcp", 0)];
        let tcp = [rail("tcp", 0)];
        let chosen = choose(&both, &both, [None, None]).unwrap();
        assert_eq!(chosen.fabric, "verbs");
        assert!(!chosen.line.contains("warning"));
        let chosen = choose(&both, &tcp, [None, Some("no device".into())]).unwrap();
        assert_eq!(
            chosen.line,
            "fabric: tcp; no RDMA because decode: no device"
        );
        let chosen = choose(
            &tcp,
            &tcp,
            [Some("no device".into()), Some("no device".into())],
        )
        .unwrap();
        assert_eq!(chosen.line, "fabric: tcp; no RDMA because no device");
        let shm = |host: &str| {
            let mut shm = rail("shm", 0);
            shm.address = format!("host {host}, pid 7");
            [rail("tcp", 0), shm]
        };
        let chosen = choose(&shm("a"), &shm("a"), [None, None]).unwrap();
        assert_eq!(chosen.fabric, "shm");
        let chosen = choose(&shm("a"), &shm("b"), [None, None]).unwrap();
        assert_eq!(chosen.fabric, "tcp", "shared memory ends at the host");
        let chosen = choose(&both, &[rail("verbs", 4096)], [None, None]).unwrap();
        assert!(
            chosen
                .line
                .contains("path MTU 1024 at the prefill side, 4096"),
            "{}",
            chosen.line
        );
        let error = choose(&both[..1], &tcp, [None, Some("no device".into())])
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("here verbs, there tcp (no device)"),
            "{error}"
        );
    }
}
