//! Everything that the fuzz targets in `fuzz/` call: one function for each decoder of bytes from a peer. Each panics if
//! its property does not hold for its input.

pub use crate::{
    fabric::{tcp::fuzzing::tcp_frames, verbs::fuzzing::verbs_address},
    wire::fuzzing::{channel, grant, immediate, message, pool},
};

#[cfg(test)]
mod tests {
    use super::*;

    type Target = (&'static str, fn(&[u8]));

    /// All targets, by the names that they have in `fuzz/`.
    const TARGETS: [Target; 7] = [
        ("channel", channel),
        ("grant", grant),
        ("immediate", immediate),
        ("message", message),
        ("pool", pool),
        ("tcp_frames", tcp_frames),
        ("verbs_address", verbs_address),
    ];

    /// A target without seeds starts from nothing; one that cargo does not know is never run.
    #[test]
    fn every_target_has_seeds_that_pass() {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz");
        let manifest = std::fs::read_to_string(root.join("Cargo.toml")).unwrap();
        let bins = manifest.matches("[[bin]]").count();
        assert_eq!(bins, TARGETS.len(), "a target that is not in this list");
        for (name, property) in TARGETS {
            assert!(manifest.contains(&format!("name = \"{name}\"")), "{name}");
            let mut seeds = 0;
            for entry in std::fs::read_dir(root.join("corpus").join(name)).unwrap() {
                let bytes = std::fs::read(entry.unwrap().path()).unwrap();
                property(&bytes);
                // A few of its neighbours, so that the rejecting side is walked, too.
                for at in 0..bytes.len().min(64) {
                    for change in [1, 0x80, 0xff] {
                        let mut changed = bytes.clone();
                        changed[at] ^= change;
                        property(&changed);
                    }
                    property(&bytes[..at]);
                }
                seeds += 1;
            }
            assert!(seeds > 0, "{name} has no seeds");
        }
    }
}
