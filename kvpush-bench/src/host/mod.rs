//! What this host has for RDMA, and what is wrong with it: the library's inventory and diagnosis for people and scripts.

mod devices;
mod doctor;
mod gpus;
mod paths;
mod topology;

use kvpush::fabric::verbs::{Severity, diagnose, inventory};

pub(crate) use self::{devices::devices, doctor::doctor};

/// Why RDMA is not used here, in one line: the worst finding.
pub(crate) fn why_no_rdma() -> String {
    let findings = diagnose(&inventory());
    match findings
        .into_iter()
        .find(|finding| finding.severity == Severity::Error)
    {
        Some(finding) => format!("{} (`kvpush-bench doctor` says more)", finding.what),
        None => {
            "no port of this host could be opened (`kvpush-bench devices` lists them)".to_owned()
        }
    }
}
