//! `devices` and `doctor`, on whatever host this is.

use serde_json::Value;

use crate::tool::run;

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
