//! `devices` and `doctor`, on whatever host this is.

use serde_json::Value;

use crate::{
    sysfs::{MI300X, Tree},
    tool::run,
};

#[test]
fn devices_lists_what_the_kernel_has() {
    let outcome = run(&["devices", "--json"]);
    outcome.assert_code(0);
    let found: Value = serde_json::from_str(&outcome.out).expect("JSON");
    let names = |list: &Value| -> Vec<String> {
        list.as_array()
            .expect("a list")
            .iter()
            .map(|device| device["name"].as_str().expect("a name").to_owned())
            .collect()
    };
    let mut listed = [names(&found["devices"]), names(&found["unopened"])].concat();
    listed.sort();
    let mut kernel: Vec<String> = std::fs::read_dir("/sys/class/infiniband")
        .map(|entries| {
            entries
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .collect()
        })
        .unwrap_or_default();
    kernel.sort();
    if found["library"]["missing"].is_null() && found["library"]["no_device_list"].is_null() {
        assert_eq!(listed, kernel);
    } else {
        assert!(listed.is_empty(), "{listed:?}");
    }
    let text = run(&["devices"]);
    text.assert_code(0);
    assert!(text.out.contains("locked memory: "), "{}", text.out);
    assert_eq!(
        text.out.contains("no RDMA device"),
        listed.is_empty(),
        "{}",
        text.out
    );
    for name in &kernel {
        assert!(
            text.out.contains(name.as_str()) || listed.is_empty(),
            "{}",
            text.out
        );
    }
}

#[test]
fn doctor_fails_if_and_only_if_something_is_an_error() {
    let json = run(&["doctor", "--json"]);
    let report: Value = serde_json::from_str(&json.out).expect("JSON");
    let findings = report["findings"].as_array().expect("findings");
    let errors = findings
        .iter()
        .filter(|finding| finding["severity"] == "error")
        .count();
    json.assert_code(i32::from(errors > 0));
    let text = run(&["doctor"]);
    text.assert_code(i32::from(errors > 0));
    for finding in findings {
        for part in ["what", "mend"] {
            let part = finding[part].as_str().expect("text");
            assert!(
                !part.is_empty() && text.out.contains(part),
                "{part:?} is not in\n{}",
                text.out
            );
        }
    }
    // Without any device RDMA cannot be fine.
    if !std::path::Path::new("/sys/class/infiniband").exists() {
        assert!(errors > 0 && report["usable_ports"].as_array().is_some_and(Vec::is_empty));
    }
}

#[test]
fn devices_shows_what_is_near_to_what() {
    let tree = Tree::new(MI300X);
    let root = tree.root.to_str().expect("text");
    let outcome = run(&["devices", "--json", "--sysfs", root]);
    outcome.assert_code(0);
    let found: Value = serde_json::from_str(&outcome.out).expect("JSON");
    let gpus = found["topology"]["gpus"].as_array().expect("GPUs");
    assert_eq!(gpus.len(), 8);
    for (number, gpu) in gpus.iter().enumerate() {
        assert_eq!(
            gpu["nearest"],
            serde_json::json!([format!("bnxt_re{number}")])
        );
        let distances = gpu["distances"].as_object().expect("distances");
        assert_eq!(distances.len(), 8);
        assert_eq!(distances[&format!("bnxt_re{number}")], "PXB");
    }
    let node = &found["topology"]["numa_nodes"][1];
    assert_eq!(node["nearest"].as_array().map(Vec::len), Some(4));

    let text = run(&["devices", "--sysfs", root]);
    text.assert_code(0);
    let row = text.out.lines().find(|line| line.contains("GPU 2 (AMD)"));
    let words: Vec<_> = row.expect("a row").split_whitespace().collect();
    assert_eq!(
        words[3..],
        [
            "0000:46:00.0",
            "0",
            "NODE",
            "NODE",
            "PXB*",
            "NODE",
            "SYS",
            "SYS",
            "SYS",
            "SYS"
        ]
    );
    assert!(text.out.contains("PIX: at most one"), "{}", text.out);
    run(&["devices", "--sysfs", "/nonexistent"]).assert_code(0);
}

#[test]
fn devices_says_which_way_each_rail_reaches_each_kind_of_memory() {
    let outcome = run(&["devices", "--json"]);
    outcome.assert_code(0);
    let found: Value = serde_json::from_str(&outcome.out).expect("JSON");
    let kinds = found["paths"].as_array().expect("kinds of memory");
    let host = kinds.iter().find(|kind| kind["memory"] == "host");
    let rails = host.expect("host memory")["rails"]
        .as_array()
        .expect("rails");
    assert!(
        rails.iter().any(|rail| rail["fabric"] == "tcp"),
        "{rails:?}"
    );
    assert!(
        rails.iter().all(|rail| rail["path"] == "plain"),
        "{rails:?}"
    );
    for kind in kinds {
        let has_rails = kind["rails"]
            .as_array()
            .is_some_and(|rails| !rails.is_empty());
        let has_reason = kind["error"]
            .as_str()
            .is_some_and(|error| error.contains("next: "));
        assert!(has_rails || has_reason, "{kind}");
    }
    let udmabuf = kinds.iter().find(|kind| kind["memory"] == "udmabuf");
    let node = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/udmabuf");
    assert_eq!(udmabuf.expect("dmabufs")["rails"].is_array(), node.is_ok());
    let text = run(&["devices"]);
    for runtime in ["hip", "hsa", "cuda"] {
        let report = &found["gpus"][runtime];
        let words = report["found"].as_str().or(report["error"].as_str());
        assert!(words.is_some_and(|words| !words.is_empty()), "{report}");
        let line = format!("{}: ", runtime.to_uppercase());
        assert!(text.out.contains(&line), "no {line:?} in\n{}", text.out);
    }
}
