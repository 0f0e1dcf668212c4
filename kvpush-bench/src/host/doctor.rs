//! `kvpush-bench doctor`.

use kvpush::fabric::verbs::{
    Finding, Inventory, PortState, Severity, choose_gid, diagnose, inventory,
};
use serde_json::{Value, json};

use crate::{
    cli::HostArgs,
    error::{Context, Error, Result},
    out,
};

/// Prints what is wrong and how to mend it. Fails if RDMA does not work here because of it.
pub(crate) fn doctor(args: &HostArgs) -> Result<()> {
    let found = inventory();
    let findings = diagnose(&found);
    let usable = usable_ports(&found);
    if args.json {
        let findings: Vec<_> = findings.iter().map(finding_json).collect();
        let report = json!({ "usable_ports": usable, "findings": findings });
        out::say(serde_json::to_string_pretty(&report).context("encode the report")?);
    } else {
        out::say(text(&findings, &usable).trim_end());
    }
    match findings
        .iter()
        .filter(|finding| finding.severity == Severity::Error)
        .count()
    {
        0 => Ok(()),
        errors => Err(Error::failed(format!(
            "{errors} error(s) keep RDMA from working here; kvpush uses TCP instead"
        ))),
    }
}

/// Ports that are active and have a GID that suits.
fn usable_ports(found: &Inventory) -> Vec<String> {
    let mut usable = Vec::new();
    for device in &found.devices {
        for port in &device.ports {
            if port.state == PortState::Active && choose_gid(port.link, &port.gids, None).is_ok() {
                usable.push(format!("{}:{}", device.name, port.number));
            }
        }
    }
    usable
}

fn finding_json(finding: &Finding) -> Value {
    json!({ "severity": finding.severity.to_string(), "what": finding.what, "mend": finding.mend })
}

fn text(findings: &[Finding], usable: &[String]) -> String {
    let mut text = match usable {
        [] => "no RDMA port is usable\n".to_owned(),
        ports => format!("usable RDMA ports: {}\n", ports.join(", ")),
    };
    for finding in findings {
        text.push_str(&format!(
            "\n{}: {}\n  mend: {}\n",
            finding.severity, finding.what, finding.mend
        ));
    }
    if findings.is_empty() {
        text.push_str("nothing is wrong\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_finding_is_told_with_its_remedy() {
        let finding = Finding {
            severity: Severity::Warning,
            what: "it squeaks".into(),
            mend: "oil it".into(),
        };
        let told = text(std::slice::from_ref(&finding), &["mlx5_0:1".into()]);
        assert_eq!(
            told,
            "usable RDMA ports: mlx5_0:1\n\nwarning: it squeaks\n  mend: oil it\n"
        );
        assert_eq!(finding_json(&finding)["severity"], "warning");
        assert!(text(&[], &["x".into()]).contains("nothing is wrong"));
    }
}
