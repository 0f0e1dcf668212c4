//! Recorded sysfs trees for tests: a compact text becomes folders, files and links as the kernel makes them.
//!
//! One line for each thing, indented by what it hangs on:
//!
//! ```text
//! nodes 0 1
//! pci0000:15
//!   0000:15:01.0 class=060400 numa=0
//!     0000:16:00.0 class=020000 id=15b3:1021 numa=0 ib=mlx5_0 net=eth0
//! software rxe0 parent=eth0
//! bond bond0 slaves=eth0,eth1 gid-of=mlx5_bond_0
//! ```
//!
//! `ib=`, `net=` and `drm=` take several names separated by commas; `vf-of=` makes a virtual function. Test code of
//! other crates includes this file, so it uses nothing but the standard library.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
};

/// An MI300X host: two sockets, four host bridges each, below each a switch with one GPU and one Broadcom Thor2.
pub(crate) const MI300X: &str = include_str!("../../tests/data/topology/mi300x.txt");

/// A tree below the system's folder for temporary files, until dropped.
#[derive(Debug)]
pub(crate) struct Tree {
    pub(crate) root: PathBuf,
}

impl Drop for Tree {
    fn drop(&mut self) {
        // Left behind it is no more than clutter.
        let _ = fs::remove_dir_all(&self.root);
    }
}

impl Tree {
    /// Makes the tree of `text`. Panics if the text makes no sense.
    pub(crate) fn new(text: &str) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("kvpush-sysfs-{}-{number}", std::process::id());
        let tree = Self {
            root: std::env::temp_dir().join(name),
        };
        fs::create_dir_all(&tree.root).expect("a temporary folder");
        // The folders that lead to the line at hand, with their indentation.
        let mut above: Vec<(usize, PathBuf)> = Vec::new();
        for line in text.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            let Some(&first) = words.first().filter(|word| !word.starts_with('#')) else {
                continue;
            };
            let indent = line.len() - line.trim_start().len();
            above.retain(|(other, _)| *other < indent);
            match first {
                "nodes" => words[1..].iter().for_each(|node| {
                    tree.folder(Path::new(&format!("devices/system/node/node{node}")));
                }),
                "software" => tree.software(&words),
                "bond" => tree.bond(&words),
                _ => {
                    let parent = above.last().map_or(Path::new("devices"), |(_, path)| path);
                    let path = parent.join(first);
                    tree.folder(&path);
                    if !first.starts_with("pci") {
                        tree.function(&path, &words);
                    }
                    above.push((indent, path));
                }
            }
        }
        tree
    }

    fn function(&self, path: &Path, words: &[&str]) {
        let address = words[0];
        let (vendor, device) = value(words, "id").map_or(("1022", "14a5"), |id| {
            id.split_once(':').expect("vendor:device")
        });
        self.file(path, "vendor", &format!("0x{vendor}"));
        self.file(path, "device", &format!("0x{device}"));
        let class = value(words, "class").expect("each function has a class");
        self.file(path, "class", &format!("0x{class}"));
        if let Some(node) = value(words, "numa") {
            self.file(path, "numa_node", node);
        }
        self.link(&format!("bus/pci/devices/{address}"), path);
        if let Some(physical) = value(words, "vf-of") {
            let physical = fs::canonicalize(self.root.join("bus/pci/devices").join(physical));
            let link = self.root.join(path).join("physfn");
            symlink(physical.expect("before its virtual ones"), link).expect("a link");
        }
        for (key, folder) in [("ib", "infiniband"), ("net", "net"), ("drm", "drm")] {
            let names = value(words, key).into_iter();
            for name in names.flat_map(|names| names.split(',')) {
                let entry = path.join(folder).join(name);
                self.folder(&entry);
                self.link(&format!("class/{folder}/{name}"), &entry);
                let device = self.root.join(&entry).join("device");
                symlink(self.root.join(path), device).expect("a link");
            }
        }
    }

    /// An RDMA device without hardware.
    fn software(&self, words: &[&str]) {
        let entry = PathBuf::from(format!("devices/virtual/infiniband/{}", words[1]));
        self.folder(&entry);
        if let Some(parent) = value(words, "parent") {
            self.file(&entry, "parent", parent);
        }
        self.link(&format!("class/infiniband/{}", words[1]), &entry);
    }

    fn bond(&self, words: &[&str]) {
        let entry = PathBuf::from(format!("devices/virtual/net/{}", words[1]));
        self.folder(&entry.join("bonding"));
        let slaves = value(words, "slaves").expect("a bond has slaves");
        self.file(&entry.join("bonding"), "slaves", &slaves.replace(',', " "));
        self.link(&format!("class/net/{}", words[1]), &entry);
        if let Some(device) = value(words, "gid-of") {
            let table = format!("class/infiniband/{device}/ports/1/gid_attrs/ndevs");
            self.folder(Path::new(&table));
            self.file(Path::new(&table), "0", words[1]);
        }
    }

    fn folder(&self, path: &Path) {
        fs::create_dir_all(self.root.join(path)).expect("a folder");
    }

    fn file(&self, folder: &Path, name: &str, text: &str) {
        fs::write(self.root.join(folder).join(name), format!("{text}\n")).expect("a file");
    }

    fn link(&self, from: &str, to: &Path) {
        let from = self.root.join(from);
        fs::create_dir_all(from.parent().expect("not the root")).expect("a folder");
        symlink(self.root.join(to), from).expect("a link");
    }
}

/// The value of `key=value` among `words`.
fn value<'a>(words: &[&'a str], key: &str) -> Option<&'a str> {
    words
        .iter()
        .find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
}
