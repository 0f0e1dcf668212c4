//! `kvpush-bench devices`: GPU runtimes, their GPUs, and who else exports dmabufs.

use std::{fs, path::Path};

use kvpush::memory::gpu::{DeviceReport, GpuError, Report, probe};
use serde_json::{Value, json};

use super::devices::table;
use crate::measure::bytes_text;

/// What this host has for memory beyond plain host memory.
pub(super) struct Found {
    report: Report,
    /// Device nodes that export dmabufs of host memory, and why one cannot be opened.
    exporters: Vec<(String, Option<String>)>,
}

/// Looks for everything. Opens the runtimes' libraries.
pub(super) fn find() -> Found {
    let mut nodes = vec!["/dev/udmabuf".to_owned()];
    let heaps = fs::read_dir("/dev/dma_heap").into_iter().flatten();
    nodes.extend(heaps.filter_map(|heap| heap.ok()?.path().into_os_string().into_string().ok()));
    nodes.sort();
    let exporters = nodes.into_iter().filter(|node| Path::new(node).exists());
    let exporters = exporters.map(|node| {
        let opened = fs::OpenOptions::new().read(true).write(true).open(&node);
        (node, opened.err().map(|error| error.to_string()))
    });
    Found {
        report: probe(),
        exporters: exporters.collect(),
    }
}

impl Found {
    /// Numbers of the GPUs that HIP and CUDA know.
    pub(super) fn numbers(&self) -> [Vec<u32>; 2] {
        let numbers = |devices: Option<&Vec<DeviceReport>>| {
            let devices = devices.into_iter().flatten();
            devices.map(|device| device.number).collect()
        };
        let (hip, cuda) = (self.report.hip.as_ref(), self.report.cuda.as_ref());
        [
            numbers(hip.ok().and_then(|hip| hip.devices.as_ref().ok())),
            numbers(cuda.ok().and_then(|cuda| cuda.devices.as_ref().ok())),
        ]
    }

    pub(super) fn text(&self) -> String {
        let mut text = String::new();
        let mut line = |name: &str, outcome: Result<String, String>| {
            let outcome = outcome.unwrap_or_else(|error| format!("not usable: {error}"));
            text.push_str(&format!("{name}: {outcome}\n"));
        };
        line("HIP", self.hip());
        line("HSA", self.hsa());
        line("CUDA", self.cuda());
        let exporters = self.exporters.iter().map(|(node, refused)| match refused {
            None => node.clone(),
            Some(error) => format!("{node} ({error})"),
        });
        let exporters: Vec<_> = exporters.collect();
        let exporters = match exporters.is_empty() {
            true => "none (neither /dev/udmabuf nor /dev/dma_heap)".to_owned(),
            false => exporters.join(", "),
        };
        line("dmabufs of host memory", Ok(exporters));
        let devices: Vec<_> = self.devices().collect();
        if !devices.is_empty() {
            let mut table = table(&["GPU", "name", "memory", "PCI", "flush"]);
            for (runtime, device) in devices {
                let location = device.location.map(|location| location.to_string());
                table.add_row(vec![
                    format!("{runtime}:{}", device.number),
                    device.name.clone(),
                    bytes_text(device.memory),
                    location.unwrap_or_else(|| "-".to_owned()),
                    device.visibility.to_string(),
                ]);
            }
            text.push_str(&format!("{table}\n"));
        }
        text
    }

    fn devices(&self) -> impl Iterator<Item = (&'static str, &DeviceReport)> {
        let hip = self.report.hip.iter().flat_map(|hip| &hip.devices);
        let cuda = self.report.cuda.iter().flat_map(|cuda| &cuda.devices);
        let hip = hip.flatten().map(|device| ("hip", device));
        hip.chain(cuda.flatten().map(|device| ("cuda", device)))
    }

    fn hip(&self) -> Result<String, String> {
        let hip = self.report.hip.as_ref().map_err(ToString::to_string)?;
        let warning = hip.warning.as_ref();
        let warning = warning.map_or(String::new(), |warning| format!("; WARNING: {warning}"));
        Ok(format!(
            "{}{}{}{warning}",
            hip.version,
            missing(&hip.missing),
            count(&hip.devices)
        ))
    }

    fn hsa(&self) -> Result<String, String> {
        let hsa = self.report.hsa.as_ref().map_err(ToString::to_string)?;
        let (major, minor) = hsa.version.as_ref().map_err(ToString::to_string)?;
        Ok(format!("{major}.{minor}{}", missing(&hsa.missing)))
    }

    fn cuda(&self) -> Result<String, String> {
        let cuda = self.report.cuda.as_ref().map_err(ToString::to_string)?;
        let (major, minor) = cuda.version.as_ref().map_err(ToString::to_string)?;
        Ok(format!(
            "{major}.{minor}{}{}",
            missing(&cuda.missing),
            count(&cuda.devices)
        ))
    }

    pub(super) fn json(&self) -> Value {
        let outcome = |outcome: Result<String, String>| match outcome {
            Ok(found) => json!({ "found": found }),
            Err(error) => json!({ "error": error }),
        };
        let devices = self.devices().map(|(runtime, device)| {
            json!({
                "memory": format!("{runtime}:{}", device.number),
                "name": device.name,
                "bytes": device.memory,
                "pci": device.location.map(|location| location.to_string()),
                "flush": device.visibility.to_string(),
            })
        });
        let exporters = self.exporters.iter();
        let exporters = exporters.map(|(node, error)| json!({ "node": node, "error": error }));
        json!({
            "hip": outcome(self.hip()),
            "hsa": outcome(self.hsa()),
            "cuda": outcome(self.cuda()),
            "devices": devices.collect::<Vec<_>>(),
            "exporters": exporters.collect::<Vec<_>>(),
        })
    }
}

fn missing(symbols: &[&str]) -> String {
    match symbols {
        [] => String::new(),
        symbols => format!("; lacks {}", symbols.join(", ")),
    }
}

fn count(devices: &Result<Vec<DeviceReport>, GpuError>) -> String {
    match devices {
        Ok(devices) => format!("; {} GPU(s)", devices.len()),
        Err(error) => format!("; {error}"),
    }
}
